//! Programs in other languages, which know nothing of this library, run on it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cuda::{library_path, run};

/// nvcc: what `NVCC` names, what `tests/setup-cuda` made, or what is installed.
pub(crate) fn nvcc() -> PathBuf {
    if let Some(path) = std::env::var_os("NVCC") {
        return path.into();
    }
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/cuda/bin/nvcc");
    if made.is_file() { made } else { "nvcc".into() }
}

pub(crate) fn source(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(file)
}

fn output(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs a tool, which must succeed.
fn tool(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| {
        panic!("{command:?}: {e}; tests/setup-cuda makes a toolkit, cc comes with the system")
    });
    let words = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {words}");
}

/// What nvcc makes of a file in `tests`.
pub(crate) fn compile(file: &str, kind: &str, arguments: &[&str]) -> Vec<u8> {
    let name = file.replace('/', "-");
    let made = output(&format!("{name}.{}.{kind}", arguments.concat()));
    let partial = output(&format!("{name}.{}.{}", std::process::id(), kind));
    let newer = |a: &Path, b: &Path| {
        let time = |p: &Path| p.metadata().and_then(|m| m.modified()).ok();
        time(a) > time(b)
    };
    if !newer(&made, &source(file)) {
        let mut command = Command::new(nvcc());
        command.arg(format!("-{kind}")).args(arguments);
        tool(command.args(["-o".as_ref(), partial.as_os_str(), source(file).as_os_str()]));
        std::fs::rename(&partial, &made).expect("what nvcc made is moved into place");
    }
    std::fs::read(made).expect("nvcc made it")
}

/// Puts bytes into a file of their own.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = output(name);
    std::fs::write(&path, bytes).expect("a file is written");
    path
}

#[test]
fn a_c_program_runs_a_fatbin() {
    let toolkit = nvcc()
        .canonicalize()
        .expect("nvcc is there; tests/setup-cuda makes one");
    let toolkit = toolkit.ancestors().nth(2).expect("nvcc is in bin");
    let fatbin = compile("driver/program.cu", "fatbin", &["-arch=compute_80"]);
    let fatbin = file("program.fatbin", &fatbin);
    let program = output("program");
    tool(
        Command::new("cc")
            .args(["-std=c11", "-Wall", "-Werror", "-I"])
            .arg(toolkit.join("include"))
            .arg(source("driver/program.c"))
            .arg("-o")
            .arg(&program)
            .arg(library_path().join("libcuda.so.1")),
    );
    let child = run(Command::new(&program).arg(&fatbin).env("VGPU_ARCH", "90"));
    assert_eq!(child.code, Some(0), "{}", child.errors);
    assert_eq!(
        child.output,
        "Virtual GPU (like H100), compute capability 9: 1000 values are right\n"
    );
    // The control: the program itself notices what is wrong.
    let child = run(Command::new(&program).arg(source("driver/program.c")));
    assert_eq!(child.code, Some(1));
    assert!(child.errors.contains("cuModuleLoad"), "{}", child.errors);
}

#[test]
fn a_python_program_runs_ptx() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("SKIPPED: there is no python3");
        return;
    }
    let ptx = compile("driver/program.cu", "ptx", &["-arch=compute_80"]);
    let ptx = file("program.ptx", &ptx);
    let child = run(Command::new("python3")
        .arg(source("driver/program.py"))
        .arg(&ptx));
    assert_eq!(child.code, Some(0), "{}", child.errors);
    assert_eq!(child.output, "1000 values are right\n");
}
