//! Several devices: kernels that speak to each other across them, the checks that watch, and the
//! program's threads that drive them.

mod child;
mod clean;
mod compile;
mod counts;
mod cuda;
mod dying;
mod mutants;
mod node;
mod peers;
mod speed;
mod threads;
