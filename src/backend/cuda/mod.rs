//! The device half of the CUDA backend: contexts, streams, events, memory, kernels and checked
//! launches, on the driver API.
//!
//! | concept | type | made of |
//! |---|---|---|
//! | a device and its primary context | [`Context`] | `cust`'s `Device` and `Context`, pushed and popped at each entry |
//! | a queue of work | [`Stream`] | own: non-blocking, or a foreign `CUstream` |
//! | a point in a stream | [`Event`] | own |
//! | device memory | [`DevicePool`], [`DeviceBuffer`], [`DeviceSlice`], [`DeviceSliceMut`] | own: slabs that peers reach; views also of foreign memory |
//! | host memory that devices reach | [`Pinned`] | own |
//! | all kernels of the crate on a device | [`Kernels`], [`Function`] | own: loaded before anything runs |
//! | a launch | [`Launch`], [`Stream::launch`] | own: checked on the host first |
//! | recorded work | [`Graph`], [`Stream::capture`] | own |
//! | what the virtual GPU counts | [`Counters`] | own |
//! | rows of elements | [`Rows`], [`RowsMut`] | views with a type and a stride |
//! | a rank on a device | [`CudaBackend`], [`CudaTensor`], [`CudaMatrix`], [`CudaVector`] | the operations of a model, as launches |
//! | a batch's metadata | [`CudaPlan`] | one upload a step |
//! | the KV cache | [`CudaKvPages`], [`KvLayer`] | pages, also foreign ones |
//! | what an operation costs at least | [`Work`] | bytes and operations, from the shapes |
//!
//! Nothing is global: there is one driver in a process, but no state of this crate's beside it,
//! and no thread needs a current context. `cust` sets devices up; calls beside which kernels
//! may run go through our own bindings (`sys`), because any of them may return a code that is
//! newer than `cust`'s enum, which would be undefined behaviour. Each file says why where it
//! does not use `cust`'s type.
//!
//! # A new family of kernels
//! 1. `cuda/NAME.cu`: `extern "C" __global__` kernels that take one struct,
//!    `const __grid_constant__ NameParams params`. The comment states grid, block, shared memory,
//!    layouts and the floor. Inline PTX goes to `cuda/ptx/`, packs of 16 bytes are in
//!    `cuda/pack.cuh`, sums over a block in `cuda/reduce.cuh`. The build finds the file by itself
//!    (`cuda/collective/ring.cu` is the family `collective/ring`).
//! 2. `cuda/abi.h`: the struct `NameParams` and `RINGTP_ABI_SIZE(NameParams, bytes)`; in [`abi`] a
//!    line `unsafe impl KernelParams for NameParams {}`.
//! 3. `src/backend/cuda/NAME.rs`: `FAMILY` with the names of the kernels, and the launcher, a
//!    function that checks operands, fills the struct and calls [`Stream::launch`]. A line in
//!    `families.rs`, and in the list below.
//! 4. `tests/cuda_NAME.rs`: `cuda_support::Gpu` is a device with a stream, a pool and the kernels,
//!    on the virtual GPU and where there is one on a real driver; findings left make the test
//!    fail. `tests/cuda_gates.rs` looks at the machine code of every kernel without being told.

pub mod abi;
mod attention;
mod backend;
mod collective;
mod context;
mod counters;
mod event;
mod families;
mod gemm;
mod graph;
mod kv;
mod launch;
#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
mod loader;
mod mail;
mod memory;
mod module;
mod norm;
mod pinned;
mod plan;
mod rope;
mod rows;
mod sampling;
mod stream;
pub(crate) mod sys;
mod tensor;
mod upload;
mod view;
mod work;

pub use attention::{AttentionScratch, attention, attention_work};
pub use backend::{CudaBackend, CudaVector};
pub use context::{Context, DeviceAttribute, Entered, Limits, P2pAttribute};
pub use counters::Counters;
pub use event::Event;
pub use families::families;
pub use gemm::{GEMM_FEW_ROWS, GemmEpilogue, gemm, gemm_batch_invariant, gemm_work};
pub use graph::Graph;
pub use kv::{CudaKvPages, KvLayer, KvLayerMut};
pub use launch::Launch;
pub use memory::{BUFFER_ALIGN, DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut};
pub use module::{Family, Function, FunctionAttributes, Kernels, fatbins};
pub use norm::{add_rms_norm, rms_norm, rms_norm_work};
pub use pinned::Pinned;
pub use plan::{CudaPlan, SPLIT_ROWS};
pub use rope::{rope_append, rope_append_work};
pub use rows::{add_bias, gather_rows, gather_rows_work};
pub use sampling::sampling_records;
pub(crate) use sampling::{RecordsSize, words_of};
pub use stream::Stream;
pub use tensor::{CudaMatrix, CudaTensor};
pub use view::{RowLayout, Rows, RowsMut};
pub use work::Work;
