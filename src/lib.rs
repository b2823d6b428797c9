//! Tensor-parallel Llama inference with its own collectives.

pub mod backend;
pub mod checkpoint;
pub mod comm;
pub mod dtype;
pub mod error;
pub mod generate;
pub mod host;
pub mod layers;
pub mod llama;
pub mod shard;

pub use dtype::DType;
pub use error::{Error, Result};
