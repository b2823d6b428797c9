//! Choosing the next token from logits that are sharded over ranks by vocabulary.
//!
//! Logits stay where they are. Each rank boils its shard of a row down to a [`Record`] of a few
//! words (`backend::cpu::sampling::record`), the records are all-gathered, and every rank
//! merges them to the same [`Choice`] ([`choose`]): a token, or a wish for longer records where
//! the candidates do not yet contain the cut of a filter. [`crate::llama::SampleRow`] says what
//! is to be chosen.
//!
//! # Semantics
//!
//! Those of the processors of Hugging Face transformers, in their order: repetition penalty,
//! banned ids, temperature, top-k (ties with the k-th are kept), top-p (the fewest most probable
//! that reach p, normalised over what top-k kept; at least one), min-p; then a draw. Where
//! probabilities tie at the cut of top-p the lower ids are kept. A temperature of zero takes the
//! greatest logit, ties to the lowest id. Ids past the true vocabulary are in no record. A NaN or
//! +inf logit makes the row a [`SamplingError`], whatever the filters; so does a row without any
//! candidate.
//!
//! # The draw
//!
//! By the Gumbel-max trick: the token is `argmax(l / T + g)` over the kept set, where the `g` are
//! independent standard Gumbel numbers `-ln(-ln u)`. That is an exact draw from
//! `softmax(l / T)` over the kept set (Gumbel, *Statistical Theory of Extreme Values*, 1954;
//! Maddison, Tarlow and Minka, *A\* Sampling*, NIPS 2014), and it needs neither a normaliser nor
//! an order of summation. `g` is a pure function of (seed, draw, token id), see
//! [`Gumbel`]: so it is the same on whichever rank the token lies and whatever else is in the
//! batch, and the argmax of the shards' argmaxes is the argmax.
//!
//! # What does not depend on the number of ranks
//!
//! Given the same bits in the logits, nothing does: greedy, top-k and min-p compare logits; the
//! mass of top-p is summed exactly ([`mass::Mass`]), so a split changes no bit of it; the draw is
//! as above. Across tp the logits themselves agree only within their f32 tolerance, and with it
//! the token is the same wherever the margin (between two perturbed values, or of a logit or a
//! cumulative mass to a cut) exceeds that. The arithmetic is IEEE 754 basic operations alone, no
//! platform libm ([`elementary`]), so the same logits give the same token on every machine.

pub mod elementary;
mod error;
mod gumbel;
pub mod mass;
mod merge;
pub mod philox;
mod record;
#[cfg(test)]
mod tests;

pub use error::SamplingError;
pub use gumbel::{GUMBEL_MAX, Gumbel};
pub use merge::{Choice, choose};
pub use record::{Candidate, Record};
