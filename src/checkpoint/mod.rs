//! Model directories as Hugging Face writes them.

mod config;

pub use config::{GenerationConfig, LlamaConfig, RopeConfig, RopeScaling};
