//! Builds nothing unless the feature `cuda` is on. With it: every `.cu` under `cuda/` becomes a
//! fatbin that the crate embeds, and bindgen writes the Rust side of `cuda/abi.h` and of the
//! driver calls that `cust` lacks. See `build/cuda.rs`.

#[cfg(feature = "cuda")]
#[path = "build/cuda.rs"]
mod cuda;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    // DEP_RINGTP_CUDA_INCLUDE in the build scripts of dependents, which may add kernels.
    println!("cargo::metadata=include={root}/cuda");
    #[cfg(feature = "cuda")]
    cuda::build(std::path::Path::new(&root));
}
