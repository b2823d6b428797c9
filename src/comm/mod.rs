//! Ranks, groups and collectives.
//!
//! | piece | what |
//! |---|---|
//! | [`Group`], [`GroupOptions`] | ranks that belong together; rebuild, replacement of a lost rank |
//! | [`CpuComm`] | one rank's handle: the collectives |
//! | [`AllReduce`], [`ALL`] | all-reduce algorithms as values: [`Auto`], [`OneShot`], [`TwoShot`], [`Ring`] |
//! | [`Wire`], [`reduce`] | what an algorithm is written with |
//! | [`run_ranks`] | a thread per rank, for tests, examples and small programs |
//! | `p2p` | collectives on devices, over NVLink or the bus (feature `cuda`) |
//! | [`Links`], [`cost`] | which device reaches which, and what an algorithm costs there |
//!
//! What holds for every collective:
//!
//! - All ranks make the same calls in the same order with fitting arguments; another call is
//!   [`CommError::Mismatch`].
//! - Every wait has a deadline. A rank that misses it, panics, leaves or reports an error ends
//!   the group for all: they get an error that names it, at once and at every later call,
//!   until [`CpuComm::rebuild`].
//! - After an error the contents of output buffers are unspecified.
//! - Sums are taken in f32 in rank order 0..N-1 and rounded once, so that all ranks hold the
//!   same bits; the ring rounds at each hop instead ([`Rounding`]). -0 becomes +0.
//! - Nothing is global but a count of the ranks alive in this process, which decides whether a
//!   waiting rank spins or sleeps.
//!
//! CPU ranks are threads of one process. They copy packets into mailboxes that the group owns
//! (`mailbox.rs`); no rank ever reads another's buffers.

mod all_reduce;
mod communicator;
pub mod cost;
mod cpu;
mod error;
mod generation;
mod group;
mod links;
mod mailbox;
#[cfg(feature = "cuda")]
pub mod p2p;
pub mod reduce;
mod room;
mod stats;
mod tensors;
mod wire;

use std::ops::Range;

pub use all_reduce::{ALL, AllReduce, Auto, OneShot, Ring, Rounding, Staging, TwoShot, by_name};
pub use communicator::Communicator;
pub use cpu::CpuComm;
pub use error::CommError;
pub use group::{Group, GroupOptions, run_ranks};
pub use links::{Link, Links};
pub(crate) use room::Room;
pub use stats::CommStats;
pub use tensors::TensorComm;
pub use wire::Wire;

/// The part of `0..n` that rank `rank` of `world_size` owns in a reduce-scatter: parts that
/// differ by at most one element, the longer ones on the lower ranks.
pub fn part(n: usize, world_size: usize, rank: usize) -> Range<usize> {
    let start = |rank: usize| rank * (n / world_size) + rank.min(n % world_size);
    start(rank)..start(rank + 1)
}
