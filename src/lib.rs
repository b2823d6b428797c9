//! Tensor-parallel Llama inference with its own collectives: no NCCL, no Python.
//!
//! One model is split over N ranks; each computes its heads and columns, and two all-reduces a
//! layer put the parts together. Ranks are threads on the CPU or, with the feature `cuda`, have a
//! CUDA device each, or a share of one: the layers are the same code over the traits
//! [`backend::Backend`] and [`comm::Communicator`].
//!
//! ```
//! use ringtp::generate::{Llm, SamplingParams};
//!
//! # fn main() -> ringtp::Result<()> {
//! let mut llm = Llm::builder("tests/fixtures/austen").tp(2).build()?;
//! let params = SamplingParams::default().temperature(0.7).max_tokens(16).seed(1);
//! let completions = llm.generate(&["It is a truth", "My dear"], &params)?;
//! for completion in &completions {
//!     println!("{:?}: {}", completion.text, completion.finish_reason);
//! }
//! // The same seed gives the same bits, whatever else is in the batch.
//! let alone = llm.generate(&["My dear"], &params)?;
//! assert_eq!(alone[0].ids, completions[1].ids);
//! # Ok(())
//! # }
//! ```
//!
//! # Concepts
//!
//! | concept | type | what it is |
//! |---|---|---|
//! | text in, text out | [`generate::Llm`] | schedules requests, samples, decodes |
//! | the ranks of a process | [`llama::Group`] | owns their threads; runs a [`llama::Batch`] on all |
//! | one rank's model | [`llama::Model`] | for engines with threads of their own |
//! | a layer, split | [`layers`] | usable alone |
//! | a device | [`backend::Backend`] | the operations; [`backend::cpu::CpuBackend`] |
//! | the other ranks | [`comm::Communicator`] | collectives on a backend's tensors |
//! | collectives on slices | [`comm::CpuComm`] | and [`comm::AllReduce`], to write one's own |
//! | a model directory | [`checkpoint::Checkpoint`] | config and weights, checked |
//! | who holds what | [`shard::ShardPlan`] | arithmetic alone |
//! | what went wrong | [`Error`] | the thing, the expected, the found, the remedy |

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

/// The README's examples, run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
