//! The CUDA part of the build. It probes no GPU and downloads nothing: it needs nvcc (12.4 or
//! newer) and libclang, and where one is missing ends with one message that says what to do.
//!
//! | variable | meaning |
//! |---|---|
//! | `NVCC` | the compiler to use; else one from `CUDA_HOME`, `CUDA_PATH`, `target/cuda`, `PATH`, `/usr/local/cuda`, `/opt/cuda` |
//! | `LIBCLANG_PATH` | the directory of libclang; else that of `target/cuda`, else what the system has |
//! | `CUDA_COMPUTE_CAP` | the architectures to compile for, such as `80,90`, instead of all |
//! | `RINGTP_PTX_PER_ARCH` | `1` or `0`: all PTX that machine code was made from, or that for the lowest architecture only; by default 1 in profiles that inherit from dev |
//!
//! Why `RINGTP_PTX_PER_ARCH`: a build script cannot know whether it builds for tests. The virtual
//! GPU runs PTX only, and that of collectives may differ by architecture, so the builds that tests
//! use embed the PTX that each architecture's machine code was made from. It costs bytes, no time.

mod bindings;
mod kernels;
mod targets;
mod toolkit;

use std::path::{Path, PathBuf};

/// Ends the build with messages and no backtrace.
fn fail(messages: &[String]) -> ! {
    for message in messages {
        println!("cargo::error={}", message.replace('\n', " "));
    }
    std::process::exit(1);
}

/// A variable that decides what is built.
fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Builds what the feature `cuda` needs into `OUT_DIR`.
pub(crate) fn build(root: &Path) {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=cuda");
    // Some have kernels of their own.
    if root.join("examples").is_dir() {
        println!("cargo::rerun-if-changed=examples");
    }
    if variable("DOCS_RS").is_some() {
        // Documentation is built without a toolkit: with bindings made before, and no kernels.
        bindings::copy_prepared(root, &out).unwrap_or_else(|e| fail(&[e]));
        kernels::write_list(&[], &out).unwrap_or_else(|e| fail(&[e]));
        return;
    }
    let toolkit = toolkit::Toolkit::find(root);
    let libclang = toolkit::find_libclang(root);
    let (toolkit, ()) = match (toolkit, libclang) {
        (Ok(toolkit), Ok(found)) => (toolkit, found),
        (toolkit, libclang) => {
            let messages: Vec<_> = toolkit.err().into_iter().chain(libclang.err()).collect();
            fail(&messages)
        }
    };
    for directory in toolkit.stub_directories() {
        println!("cargo::rustc-link-search=native={}", directory.display());
    }
    // For tests that look at machine code.
    println!(
        "cargo::rustc-env=RINGTP_CUDA_BIN={}",
        toolkit.bin().display()
    );
    println!("cargo::rustc-env=RINGTP_NVCC_RELEASE={}", toolkit.release);
    bindings::generate(root, &toolkit, &out).unwrap_or_else(|e| fail(&[e]));

    let wanted = variable("CUDA_COMPUTE_CAP");
    let per_arch = match variable("RINGTP_PTX_PER_ARCH").as_deref() {
        None => std::env::var("PROFILE").as_deref() == Ok("debug"),
        Some(value) => value != "0",
    };
    let targets = targets::Targets::choose(wanted.as_deref(), &toolkit.architectures, per_arch)
        .unwrap_or_else(|e| fail(&[e]));
    let built = kernels::compile_all(root, &toolkit, &targets, &out).unwrap_or_else(|e| fail(&e));
    kernels::write_list(&built, &out).unwrap_or_else(|e| fail(&[e]));
}
