//! Kernels in CUDA C: those without a fault (`clean.cu`) and those with one each
//! (`mutants.cu`). They need nvcc; `tests/setup-cuda` in the root of the project makes one.

mod clean;
mod determinism;
mod gpu;
mod mutants;
