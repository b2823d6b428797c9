//! Several devices: kernels that speak to each other across them, the checks that watch, and the
//! program's threads that drive them.

mod child;
mod compile;
mod cuda;
mod peers;
mod threads;
