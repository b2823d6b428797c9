//! Compiles every `.cu` under `cuda/`, and those of the examples, to a fatbin, several at a time.

use std::borrow::Cow;
use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::targets::{self, Targets};
use super::toolkit::Toolkit;

/// One `.cu` and what becomes of it.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    /// The path under `cuda/` without the ending: `norm`, `collective/ring`; that of an example from
    /// the root: `examples/custom_collective/tree`.
    name: String,
    /// Whether it belongs to the crate, or to an example, which includes its fatbin itself.
    embedded: bool,
    /// Whether each architecture gets PTX of its own: where kernels wait, they read `%globaltimer`,
    /// which the PTX ISA leaves unspecified in code that is compiled for another target. The others
    /// go through the front end once, in half the time.
    per_arch: bool,
    source: PathBuf,
    fatbin: PathBuf,
    /// What the source includes, as make wants it.
    dependencies: PathBuf,
    /// The command that made the fatbin.
    stamp: PathBuf,
}

fn sources(directory: &Path, list: &mut Vec<PathBuf>) -> Result<(), String> {
    let fault = |e: std::io::Error| format!("{}: cannot be listed: {e}", directory.display());
    for entry in fs::read_dir(directory).map_err(fault)? {
        let path = entry.map_err(fault)?.path();
        if path.is_dir() {
            sources(&path, list)?;
        } else if path.extension().is_some_and(|e| e == "cu") {
            list.push(path);
        }
    }
    list.sort();
    Ok(())
}

fn units(root: &Path, out: &Path) -> Result<Vec<Unit>, String> {
    let (own, examples) = (root.join("cuda"), root.join("examples"));
    let mut list = Vec::new();
    sources(&own, &mut list)?;
    // Not there where the crate is a dependency without them.
    if examples.is_dir() {
        sources(&examples, &mut list)?;
    }
    let unit = |source: PathBuf| {
        let embedded = source.starts_with(&own);
        let relative = source.strip_prefix(if embedded { &own } else { root });
        let relative = relative.unwrap_or(&source);
        let name = relative
            .with_extension("")
            .display()
            .to_string()
            .replace('\\', "/");
        let stem = out.join(name.replace('/', "-"));
        Unit {
            per_arch: !embedded || name.starts_with("collective/"),
            name,
            embedded,
            fatbin: stem.with_extension("fatbin"),
            dependencies: stem.with_extension("d"),
            stamp: stem.with_extension("command"),
            source,
        }
    };
    Ok(list.into_iter().map(unit).collect())
}

/// The compiler with the flags of every unit, but for the architectures.
fn compiler(root: &Path, toolkit: &Toolkit) -> Result<cc::Tool, String> {
    // cc takes a compiler that it is given for a C compiler, and nvcc from this variable.
    // SAFETY: the build script has one thread here.
    unsafe { std::env::set_var("NVCC", &toolkit.nvcc) };
    let mut build = cc::Build::new();
    build
        .cuda(true)
        .cudart("none")
        // The dev profile would add -G, which turns the optimiser off.
        .debug(false)
        .opt_level(3)
        .warnings(false)
        .std("c++17")
        .include(root.join("cuda"))
        // A compiler may fuse a product and a sum differently in PTX and in machine code; then a
        // real GPU and the virtual one would differ. Fused operations are written as such.
        .flag("-fmad=false")
        .flag("-lineinfo");
    build.try_get_compiler().map_err(|e| format!("nvcc: {e}"))
}

/// Gives the build scripts of dependents what they need to compile kernels of their own in the same
/// way: DEP_RINGTP_CUDA_NVCC, and DEP_RINGTP_CUDA_NVCC_FLAGS with blanks between them.
fn tell_dependents(tool: &cc::Tool, toolkit: &Toolkit, targets: &Targets) {
    let flags = tool.args().iter().map(|flag| flag.to_string_lossy());
    let flags = flags.chain(targets.arguments().into_iter().map(Cow::from));
    // They name directories, whose names may have blanks: DEP_RINGTP_CUDA_INCLUDE has this one.
    let mut include = false;
    let flags = flags.filter(|flag| {
        let skip = include || flag.starts_with("-I");
        include = flag == "-I";
        !skip
    });
    let flags: Vec<_> = flags.collect();
    println!("cargo::metadata=nvcc={}", toolkit.nvcc.display());
    println!("cargo::metadata=nvcc_flags={}", flags.join(" "));
}

fn command(tool: &cc::Tool, targets: &Targets, unit: &Unit) -> Command {
    // Not `Build::compile`, which would make a library and link the CUDA runtime.
    let mut command = tool.to_command();
    command
        .args(if unit.per_arch {
            targets.arguments()
        } else {
            targets.arguments_in_common()
        })
        .args(["-fatbin", "-MD", "-MF"])
        .arg(&unit.dependencies);
    command.arg("-o").arg(&unit.fatbin).arg(&unit.source);
    command
}

fn modified(path: impl AsRef<Path>) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

/// Whether the fatbin was made by this command from the files as they are.
fn is_fresh(unit: &Unit, command: &str) -> bool {
    let Ok(dependencies) = fs::read_to_string(&unit.dependencies) else {
        return false;
    };
    let Some(made) = modified(&unit.fatbin) else {
        return false;
    };
    fs::read_to_string(&unit.stamp).is_ok_and(|stamp| stamp == command)
        && targets::parse_dependencies(&dependencies)
            .iter()
            .all(|file| modified(file).is_some_and(|time| time < made))
}

fn compile(tool: &cc::Tool, targets: &Targets, unit: &Unit) -> Result<(), String> {
    let mut command = command(tool, targets, unit);
    // Without the environment, which is never the same.
    let arguments = command.get_args().map(|a| a.to_string_lossy());
    let words: Vec<_> = std::iter::once(command.get_program().to_string_lossy())
        .chain(arguments)
        .collect();
    let text = words.join(" ");
    if is_fresh(unit, &text) {
        return Ok(());
    }
    let _ = fs::remove_file(&unit.stamp);
    let output = command
        .output()
        .map_err(|e| format!("{}: nvcc cannot be run: {e}", unit.source.display()))?;
    if !output.status.success() {
        // The words of the compiler in full; cargo shows them below the error.
        eprintln!("{text}");
        eprintln!("{}", String::from_utf8_lossy(&output.stdout));
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        let words = String::from_utf8_lossy(&output.stderr);
        let first = words.lines().find(|line| !line.trim().is_empty());
        return Err(format!(
            "{}: nvcc failed ({}): {}",
            unit.source.display(),
            output.status,
            first.unwrap_or("it said nothing")
        ));
    }
    fs::write(&unit.stamp, text).map_err(|e| format!("{}: {e}", unit.stamp.display()))
}

/// Compiles all units; what fails is reported together.
pub(crate) fn compile_all(
    root: &Path,
    toolkit: &Toolkit,
    targets: &Targets,
    out: &Path,
) -> Result<Vec<Unit>, Vec<String>> {
    let units = units(root, out).map_err(|e| vec![e])?;
    let tool = compiler(root, toolkit).map_err(|e| vec![e])?;
    tell_dependents(&tool, toolkit, targets);
    let queue: Mutex<VecDeque<&Unit>> = Mutex::new(units.iter().collect());
    let faults = Mutex::new(Vec::new());
    let take = || queue.lock().ok()?.pop_front();
    let run = |unit: &Unit| {
        if let (Err(fault), Ok(mut faults)) = (compile(&tool, targets, unit), faults.lock()) {
            faults.push(fault);
        }
    };
    // Cargo lets a build script run one job; each further one needs a token of its job server.
    // SAFETY: taken once, and nothing else in this process uses the server's file descriptors.
    let server = unsafe { jobserver::Client::from_env() };
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok());
    let more = jobs.unwrap_or(1usize).min(units.len()).saturating_sub(1);
    std::thread::scope(|scope| {
        for _ in 0..more {
            scope.spawn(|| {
                while queue.lock().is_ok_and(|queue| !queue.is_empty()) {
                    let token = server.as_ref().map(jobserver::Client::try_acquire);
                    match token {
                        // Held, or not asked for; let go after one unit.
                        None | Some(Ok(Some(_)) | Err(_)) => {
                            let Some(unit) = take() else { return };
                            run(unit);
                        }
                        // All are in use: wait without holding up the end of the build.
                        Some(Ok(None)) => std::thread::sleep(Duration::from_millis(20)),
                    }
                }
            });
        }
        while let Some(unit) = take() {
            run(unit);
        }
    });
    let faults = faults.into_inner().unwrap_or_default();
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut read = BTreeSet::new();
    for unit in &units {
        let text = fs::read_to_string(&unit.dependencies).unwrap_or_default();
        read.extend(targets::parse_dependencies(&text));
    }
    for file in read {
        println!("cargo::rerun-if-changed={file}");
    }
    Ok(units)
}

/// Writes the list of fatbins that the crate includes.
pub(crate) fn write_list(units: &[Unit], out: &Path) -> Result<(), String> {
    let mut text = String::from("pub(super) static FATBINS: &[Fatbin] = &[\n");
    for unit in units.iter().filter(|unit| unit.embedded) {
        let path = unit.fatbin.display().to_string();
        let _ = writeln!(
            text,
            "    Fatbin {{ name: {:?}, image: &Aligned(*include_bytes!({path:?})).0 }},",
            unit.name
        );
    }
    text.push_str("];\n");
    let file = out.join("fatbins.rs");
    fs::write(&file, text).map_err(|e| format!("{}: cannot be written: {e}", file.display()))
}
