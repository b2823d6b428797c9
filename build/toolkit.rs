//! Finds nvcc and libclang.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{targets, variable};

/// The oldest release that compiles the kernels.
const OLDEST: (u32, u32) = (12, 4);

const REMEDY: &str = "run tests/setup-cuda, which fetches a compiler into target/cuda in seconds, or \
                      install the CUDA toolkit and set CUDA_HOME (or NVCC)";

/// A CUDA toolkit.
#[derive(Clone, Debug)]
pub(crate) struct Toolkit {
    /// The compiler.
    pub(crate) nvcc: PathBuf,
    /// The directory above `bin`, with `include` in it.
    pub(crate) root: PathBuf,
    /// Its release, such as `13.0`; empty if it is not understood.
    pub(crate) release: String,
    /// What it can make machine code for; empty if it does not say.
    pub(crate) architectures: Vec<String>,
}

fn output(program: &Path, argument: &str) -> Result<String, String> {
    let run = Command::new(program).arg(argument).output();
    match run {
        Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) => Err(format!("{}: cannot be run: {error}", program.display())),
    }
}

/// The first program of that name on `PATH`; only once that is asked does `PATH` matter.
fn on_path(name: &str) -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed=PATH");
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

impl Toolkit {
    /// The toolkit to use, or what to do about there being none.
    pub(crate) fn find(root: &Path) -> Result<Self, String> {
        if let Some(nvcc) = variable("NVCC") {
            return Self::open(Path::new(&nvcc)).map_err(|e| {
                format!("NVCC: {e}; unset it, or name an nvcc of release 12.4 or newer")
            });
        }
        let exe = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
        let named = [
            "CUDA_HOME",
            "CUDA_PATH",
            "CUDA_ROOT",
            "CUDA_TOOLKIT_ROOT_DIR",
        ]
        .into_iter()
        .filter_map(variable)
        .map(PathBuf::from);
        let usual = ["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from);
        let made = root.join("target/cuda");
        if made.join("stamp").is_file() {
            println!("cargo::rerun-if-changed={}", made.join("stamp").display());
        }
        let candidates = named
            .chain([made])
            .map(|root| root.join("bin").join(exe))
            .chain(std::iter::once_with(|| on_path(exe)).flatten())
            .chain(usual.map(|root| root.join("bin").join(exe)))
            .filter(|file| file.is_file());
        let mut faults = Vec::new();
        for candidate in candidates {
            match Self::open(&candidate) {
                Ok(toolkit) => return Ok(toolkit),
                Err(fault) => faults.push(fault),
            }
        }
        if faults.is_empty() {
            faults.push("no nvcc was found".to_owned());
        }
        Err(format!("feature cuda: {}: {REMEDY}", faults.join("; ")))
    }

    fn open(nvcc: &Path) -> Result<Self, String> {
        let version = output(nvcc, "--version")?;
        let release = targets::parse_release(&version);
        if release.is_some_and(|release| release < OLDEST) {
            let (major, minor) = release.unwrap_or_default();
            return Err(format!(
                "{} is release {major}.{minor}, older than {}.{}",
                nvcc.display(),
                OLDEST.0,
                OLDEST.1
            ));
        }
        if release.is_none() {
            println!(
                "cargo::warning={}: its release is not understood; going on",
                nvcc.display()
            );
        }
        let architectures = targets::parse_list(&output(nvcc, "--list-gpu-code")?);
        // Distributions link /usr/bin/nvcc to where it lives.
        let lives = nvcc.canonicalize().unwrap_or_else(|_| nvcc.to_owned());
        let has_header = |root: &&Path| root.join("include/cuda.h").is_file();
        let above = |path: &Path| path.parent().and_then(Path::parent).map(Path::to_owned);
        let roots = [above(nvcc), above(&lives)];
        let root = roots
            .iter()
            .flatten()
            .map(PathBuf::as_path)
            .find(has_header)
            .ok_or_else(|| {
                format!(
                    "{}: there is no ../include/cuda.h beside it, which the bindings are made from",
                    nvcc.display()
                )
            })?;
        Ok(Self {
            nvcc: nvcc.to_owned(),
            root: root.to_owned(),
            release: release.map_or_else(String::new, |(major, minor)| format!("{major}.{minor}")),
            architectures,
        })
    }

    /// Where the compiler and its tools are.
    pub(crate) fn bin(&self) -> &Path {
        self.nvcc.parent().unwrap_or(Path::new(""))
    }

    /// Where the stub of libcuda may be that programs are linked against.
    pub(crate) fn stub_directories(&self) -> Vec<PathBuf> {
        [
            "lib64/stubs",
            "lib/stubs",
            "targets/x86_64-linux/lib/stubs",
            "lib/x64",
        ]
        .into_iter()
        .map(|directory| self.root.join(directory))
        .filter(|directory| directory.is_dir())
        .collect()
    }
}

/// Makes sure that bindgen finds libclang, or says what to do.
pub(crate) fn find_libclang(root: &Path) -> Result<(), String> {
    let made = root.join("target/cuda/lib");
    if variable("LIBCLANG_PATH").is_none() && made.join("libclang.so").is_file() {
        // SAFETY: the build script has one thread here.
        unsafe { std::env::set_var("LIBCLANG_PATH", &made) };
    }
    // bindgen says that there is none by a panic.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let found = std::panic::catch_unwind(bindgen::clang_version);
    std::panic::set_hook(hook);
    found.map(|_| ()).map_err(|_| {
        "feature cuda: no libclang was found, which bindgen needs: run tests/setup-cuda, which \
         fetches one into target/cuda in seconds, or install it (Debian: apt-get install \
         libclang-dev) or set LIBCLANG_PATH to its directory"
            .to_owned()
    })
}

/// The compiler's own headers (stddef.h), which a libclang that came alone lacks.
pub(crate) fn compiler_headers() -> Option<PathBuf> {
    let cc = variable("CC").unwrap_or_else(|| "cc".to_owned());
    let run = Command::new(cc).arg("-print-file-name=include").output();
    let text = String::from_utf8(run.ok()?.stdout).ok()?;
    let directory = PathBuf::from(text.trim());
    directory.is_absolute().then_some(directory)
}
