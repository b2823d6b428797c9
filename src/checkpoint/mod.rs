//! Model directories as Hugging Face writes them: config.json, generation_config.json, and
//! weights as safetensors in one file or several.
//!
//! [`Checkpoint::open`] checks everything before anything is loaded and reports all that is
//! wrong together. Weights stay in the files: a [`HostMatrix`](crate::host::HostMatrix) borrows
//! them from a memory map, whole or the slice of one rank, and nothing is copied. Tokenizer and
//! chat template are left to others.

mod config;
mod diagnosis;
mod generation;
mod json;
mod open;
mod rope;
mod weights;

pub(crate) use json::read_text;

pub use config::{LlamaConfig, RopeConfig, RopeScaling};
pub use generation::GenerationConfig;
pub use open::Checkpoint;
