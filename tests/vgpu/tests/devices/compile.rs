//! nvcc, for the kernels beside these tests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// nvcc: what `NVCC` names, what `tests/setup-cuda` made, or what is installed.
fn nvcc() -> PathBuf {
    if let Some(path) = std::env::var_os("NVCC") {
        return path.into();
    }
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/cuda/bin/nvcc");
    if made.is_file() { made } else { "nvcc".into() }
}

/// The PTX of one of the files in this directory; made anew when any of them has changed.
pub(crate) fn ptx(file: &str) -> String {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/devices");
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("devices-{file}.ptx"));
    let time = |p: &Path| p.metadata().and_then(|m| m.modified()).ok();
    let sources = std::fs::read_dir(&here).expect("the directory of these tests");
    let newest = sources
        .flatten()
        .map(|entry| entry.path())
        .filter(|p| p.extension().is_some_and(|e| e == "cu" || e == "cuh"))
        .filter_map(|p| time(&p))
        .max();
    if time(&output) <= newest {
        let partial = output.with_extension(format!("{}", std::process::id()));
        let nvcc = nvcc();
        let run = Command::new(&nvcc)
            .args(["-arch=sm_90", "-ptx", "-lineinfo", "-o"])
            .args([&partial, &here.join(file)])
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}; tests/setup-cuda makes one", nvcc.display()));
        let words = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "nvcc {file}: {words}");
        std::fs::rename(&partial, &output).expect("the PTX is moved into place");
    }
    std::fs::read_to_string(&output).expect("nvcc wrote the PTX")
}
