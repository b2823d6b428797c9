//! Prompt in, tokens out: everything between a caller and the model's steps.
//!
//! | part | what it does |
//! |---|---|
//! | [`Llm`] | a loaded model with its tokenizer: text in, text out |
//! | [`run`] | requests of ids to completions, on any [`Engine`] |
//! | [`Scheduler`], [`BlockAllocator`] | which rows of which sequences a step computes, in which blocks |
//! | [`SamplingParams`], [`Sampling`] | how tokens are chosen, before and after the model's defaults |
//! | [`StopFilter`] | stop strings in streamed text |
//! | [`Tokenizer`], [`TextStream`], [`ChatTemplate`] | text and ids |
//!
//! Choosing a token from logits is the engine's part: the vocabulary lies spread over the
//! ranks, and full logits are never gathered for it.

mod block_allocator;
mod chat;
mod engine;
mod llm;
mod output;
mod params;
mod prompt;
mod run;
mod scheduler;
mod stop;
mod tokenizer;

pub use block_allocator::BlockAllocator;
pub use chat::{ChatTemplate, Message};
pub use engine::Engine;
pub use llm::{Llm, LlmBuilder, OpenModel};
pub use output::{Completion, Event, FinishReason, Timing, Usage};
pub use params::{Sampling, SamplingParams};
pub use prompt::Prompt;
pub use run::{Request, run};
pub use scheduler::{RequestId, Scheduler, Step, check_request};
pub use stop::StopFilter;
pub use tokenizer::{TextStream, Tokenizer};
