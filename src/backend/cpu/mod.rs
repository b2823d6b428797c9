//! Operations on host memory.

pub mod sampling;
