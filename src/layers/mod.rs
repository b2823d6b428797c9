//! The tensor-parallel layers, generic over the backend.
//!
//! Each takes whole weights, as a checkpoint has them (`[out, in]`, `y = x Wᵀ + b`), and keeps
//! its rank's slice by the rules of [`crate::shard`]. Each is usable alone.
//!
//! | layer | holds | communicates |
//! |---|---|---|
//! | [`ColumnParallelLinear`] | rows of W and b | all-gather with `gather_output` |
//! | [`MergedColumnParallelLinear`] | rows of gate and of up | no |
//! | [`QkvParallelLinear`] | whole heads of q, k, v | no |
//! | [`RowParallelLinear`] | columns of W, all of b | all-reduce, unless the caller does |
//! | [`OutputProjection`] | as the one or the other | what its kind needs, then residual and norm |
//! | [`VocabParallelEmbedding`] | rows of the vocabulary | all-reduce |
//! | [`ParallelLmHead`] | rows of the vocabulary | all-gather, on request |
//! | [`RmsNorm`] | all of its weight | no |

mod attention;
mod linear;
mod mlp;
mod norm;
mod output;
mod vocab;

pub(crate) use linear::opaque_debug;

pub use attention::{Attention, AttentionState};
pub use linear::{
    ColumnParallelLinear, MergedColumnParallelLinear, Partition, QkvParallelLinear,
    RowParallelLinear,
};
pub use mlp::Mlp;
pub use norm::RmsNorm;
pub use output::{OutputProjection, Stream};
pub use vocab::{ParallelLmHead, VocabParallelEmbedding};

use crate::backend::Backend;
use crate::comm::Communicator;

/// What a layer runs on: one rank's backend and its end of the group.
#[derive(Debug)]
pub struct Rank<'a, B, C> {
    /// The device.
    pub backend: &'a mut B,
    /// The other ranks.
    pub comm: &'a mut C,
}

impl<B: Backend, C: Communicator<B>> Rank<'_, B, C> {
    /// Which part of a layer this rank holds.
    pub fn partition(&self) -> Partition {
        Partition {
            tp: self.comm.world_size(),
            rank: self.comm.rank(),
        }
    }
}
