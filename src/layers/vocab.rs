//! The embedding and the LM head, split over the vocabulary.

use super::Rank;
use super::linear::{Partition, opaque_debug, rows};
use crate::backend::{Backend, Epilogue, Layout};
use crate::comm::Communicator;
use crate::dtype::DType;
use crate::error::Result;
use crate::host::HostMatrix;
use crate::shard::VocabShard;

/// Rows of the vocabulary on each rank; a rank gives zeros for ids that it does not have, and
/// the ranks' sum is the embedding.
pub struct VocabParallelEmbedding<B: Backend> {
    table: B::Matrix,
    shard: VocabShard,
}

impl<B: Backend> VocabParallelEmbedding<B> {
    /// The rank's rows of `table` `[vocab, hidden]`, stored as `dtype`.
    pub fn new(
        backend: &mut B,
        table: HostMatrix<'_>,
        part: Partition,
        dtype: DType,
    ) -> Result<Self> {
        let shard = VocabShard::new(table.rows(), part.tp, part.rank);
        let table = backend.matrix(&[rows(&table, shard.ids.clone())?], Layout::Rows, dtype)?;
        Ok(Self { table, shard })
    }

    /// `out` is `[rows, hidden]`, the same on all ranks.
    pub fn forward<C: Communicator<B>>(
        &self,
        rank: &mut Rank<'_, B, C>,
        plan: &B::Plan,
        out: &mut B::Tensor,
    ) -> Result<()> {
        rank.backend
            .embedding(&self.table, self.shard.ids.start, plan, out)?;
        rank.comm.all_reduce(rank.backend, out)
    }
}

/// Logits of the rank's part of the vocabulary.
pub struct ParallelLmHead<B: Backend> {
    /// `None` where the embedding's table serves.
    weight: Option<B::Matrix>,
    vocab_size: usize,
    part: Partition,
}

impl<B: Backend> ParallelLmHead<B> {
    /// The rank's rows of `weight` `[vocab, hidden]`, stored as `dtype`.
    pub fn new(
        backend: &mut B,
        weight: HostMatrix<'_>,
        part: Partition,
        dtype: DType,
    ) -> Result<Self> {
        let shard = VocabShard::new(weight.rows(), part.tp, part.rank);
        let slice = rows(&weight, shard.ids)?;
        let matrix = backend.matrix(&[slice], Layout::Rows, dtype)?;
        Ok(Self {
            weight: Some(matrix),
            vocab_size: weight.rows(),
            part,
        })
    }

    /// A head that uses the table of the embedding (tied weights).
    pub fn tied(vocab_size: usize, part: Partition) -> Self {
        Self {
            weight: None,
            vocab_size,
            part,
        }
    }

    /// The rows of the vocabulary that this rank has.
    pub fn shard(&self) -> VocabShard {
        VocabShard::new(self.vocab_size, self.part.tp, self.part.rank)
    }

    /// `out` is `[rows, ids of this rank]`. (Padding rows of the vocabulary are not held, so
    /// there are no logits of theirs.)
    pub fn forward(
        &self,
        backend: &mut B,
        embedding: &VocabParallelEmbedding<B>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let weight = self.weight.as_ref().unwrap_or(&embedding.table);
        backend.linear(x, weight, Epilogue::none(), out)
    }

    /// All ranks' logits: `out` is `[rows, vocab]`.
    pub fn gather<C: Communicator<B>>(
        &self,
        rank: &mut Rank<'_, B, C>,
        logits: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let width = |rank| {
            VocabShard::new(self.vocab_size, self.part.tp, rank)
                .ids
                .len()
        };
        let widths: Vec<_> = (0..self.part.tp).map(width).collect();
        rank.comm
            .all_gather_columns(rank.backend, logits, &widths, out)
    }
}

opaque_debug!(VocabParallelEmbedding, ParallelLmHead);
