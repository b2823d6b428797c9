//! A virtual GPU: the CUDA driver API on top of an interpreter of PTX.
//!
//! Built as a shared library with the soname `libcuda.so.1`, so that a program that uses the
//! driver API runs on it unchanged. It executes the PTX that nvcc emitted and checks every
//! access on the way.

mod driver;
pub mod fatbin;
pub mod finding;
pub mod isa;
pub mod litmus;
pub mod loader;
pub mod lowering;
pub mod machine;
pub mod memory;
pub mod program;
pub mod ptx;
pub mod race;
pub mod registers;
pub mod report;
pub mod rig;
