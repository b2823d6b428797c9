//! Makes the virtual GPU the driver of every test that links this crate, without a script around
//! cargo: a directory with `libcuda.so.1` that points to the shared library of the crate `vgpu`,
//! given as a library path of the link. Cargo (and nextest) put such paths into
//! `LD_LIBRARY_PATH` when they start a test, an example or a bench, and only then.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "vgpu")]
    point_to_vgpu();
}

#[cfg(feature = "vgpu")]
fn point_to_vgpu() {
    use std::path::PathBuf;

    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    // <target>/<profile>/build/<package>-<hash>/out; cargo writes the library of a dependency to
    // <target>/<profile>/deps, before any test starts.
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let library = out
        .ancestors()
        .nth(3)
        .expect("OUT_DIR has parents")
        .join("deps/libvgpu.so");
    let link = out.join("libcuda.so.1");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(&library, &link)
        .unwrap_or_else(|e| panic!("{}: cannot be made: {e}", link.display()));
    println!("cargo:rustc-link-search=native={}", out.display());
    // Tests start themselves again without this directory to run on a real driver.
    println!("cargo:rustc-env=TEST_DRIVER_DIR={}", out.display());
}
