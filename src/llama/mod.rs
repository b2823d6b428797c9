//! The decoder: configuration to sharded model to logits, and the ranks that run it.
//!
//! Two entries: [`Model::forward`], called by each rank's own thread with a [`Rank`], for engines
//! that have such threads; and [`Group`], which owns them.
//!
//! [`Rank`]: crate::layers::Rank

mod batch;
#[cfg(feature = "cuda")]
mod capacity;
mod group;
mod model;
mod rope;
mod sample_row;
pub mod sampling;
mod seat;
mod select;
mod worker;

pub use batch::{Batch, Limits};
pub use group::{Group, GroupOptions, GroupStats, Progress, StepHook};
pub use model::{KvCache, LoadOptions, Model};
pub use rope::Rope;
pub use sample_row::SampleRow;
pub use select::select;
