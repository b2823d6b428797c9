//! The decoder: configuration to sharded model to logits.

mod batch;
mod sample_row;
pub mod sampling;

pub use batch::{Batch, Limits};
pub use sample_row::SampleRow;
