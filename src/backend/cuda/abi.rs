//! The Rust side of `cuda/abi.h`: the structs that kernels take, and limits, made by bindgen.

#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    reason = "made by bindgen"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/abi.rs"));
}
pub use generated::*;

/// A struct that a kernel takes as its one parameter.
///
/// # Safety
/// The type is `#[repr(C)]`, and the kernels it is launched with take this struct of
/// `cuda/abi.h`.
pub unsafe trait KernelParams: Copy {}

// SAFETY: made from cuda/abi.h; taken by the kernels of cuda/norm.cu.
unsafe impl KernelParams for NormParams {}
// SAFETY: made from cuda/abi.h; taken by the kernels of cuda/gemm.cu.
unsafe impl KernelParams for GemmParams {}
// SAFETY: made from cuda/abi.h; taken by the kernels of cuda/rope.cu.
unsafe impl KernelParams for RopeParams {}
// SAFETY: made from cuda/abi.h; taken by the kernels of cuda/attention.cu.
unsafe impl KernelParams for AttentionParams {}
// SAFETY: made from cuda/abi.h; taken by the kernels of cuda/rows.cu.
unsafe impl KernelParams for RowsParams {}
// SAFETY: made from cuda/abi.h; taken by the kernel of cuda/sampling.cu.
unsafe impl KernelParams for RecordsParams {}
// SAFETY: made from cuda/collective/abi.h; taken by the kernels beside it.
unsafe impl KernelParams for CollectiveArgs {}
// SAFETY: made from cuda/collective/abi.h; taken by cuda/collective/probe.cu.
unsafe impl KernelParams for ProbeArgs {}
