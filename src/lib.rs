//! Tensor-parallel Llama inference with its own collectives.
//!
//! A model is a directory as Hugging Face has them. Its weights are split over ranks, which are
//! threads of this process; each reads its own slices, and they meet in all-reduces.
//!
//! # Text in, text out
//!
//! ```
//! use ringtp::DType;
//! use ringtp::generate::{Llm, SamplingParams};
//!
//! # let path = "tests/fixtures/austen";
//! let mut llm = Llm::builder(path).tp(4).dtype(DType::F32).build()?;
//! let params = SamplingParams::default().temperature(0.7).max_tokens(16).seed(1);
//! for completion in llm.generate(&["It is a truth", "My dear"], &params)? {
//!     println!("{} ({})", completion.text.unwrap_or_default(), completion.finish_reason);
//! #   assert_eq!(completion.usage.completion_tokens, 16);
//! }
//! # Ok::<(), ringtp::Error>(())
//! ```
//!
//! # From another engine
//!
//! [`llama::Group::forward`] takes the rows of a step as an engine with a paged cache has them,
//! prefill and decode mixed, and returns the logits of the rows asked for.
//!
//! ```
//! use std::sync::Arc;
//!
//! use ringtp::checkpoint::Checkpoint;
//! use ringtp::llama::{Batch, Group, GroupOptions};
//!
//! # let path = "tests/fixtures/austen";
//! let options = GroupOptions { tp: 2, ..Default::default() };
//! let mut group = Group::load(Arc::new(Checkpoint::open(path)?), options)?;
//! let vocab_size = group.limits().vocab_size;
//!
//! // A prompt of three tokens from position 0, its keys and values in block 7 of the cache.
//! let mut batch = Batch::new();
//! let rows = batch.push(&[42, 7, 99], 0, 3, &[7]);
//! batch.logits_rows = vec![rows.end - 1];
//! let logits = group.forward(&batch)?;
//! assert_eq!(logits.len(), vocab_size);
//!
//! // Its next token, beside the first chunk of another prompt, in block 3.
//! let mut batch = Batch::new();
//! let rows = batch.push(&[5], 3, 3, &[7]);
//! batch.push(&[11, 12], 0, 20, &[3]);
//! batch.logits_rows = vec![rows.end - 1];
//! assert_eq!(group.forward(&batch)?.len(), vocab_size);
//! # Ok::<(), ringtp::Error>(())
//! ```
//!
//! | module | what it is for |
//! |---|---|
//! | [`generate`] | prompts to completions: scheduling, sampling settings, text |
//! | [`llama`] | the model, one rank of it and all ranks as a group |
//! | [`layers`] | what the model is made of, split over ranks |
//! | [`comm`] | the collectives between the ranks |
//! | [`backend`] | the operations of a device |
//! | [`checkpoint`] | model directories, checked as a whole |
//! | [`shard`] | which slice of which tensor a rank takes |
//! | [`error`] | what can go wrong: the thing, the expected, the found, the remedy |

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
