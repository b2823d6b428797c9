//! Tensor-parallel Llama inference with its own collectives.

pub mod checkpoint;
pub mod comm;
pub mod dtype;
pub mod error;
pub mod generate;
pub mod host;
pub mod llama;
pub mod shard;

pub use dtype::DType;
pub use error::{Error, Result};
