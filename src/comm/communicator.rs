//! What a model asks of the ranks it runs on.

use crate::backend::{Backend, WantedRecord};
use crate::error::Result;
use crate::shard::VocabShard;

/// One rank's end of a group, on tensors of backend `B`.
///
/// Ranks are not assumed to be threads: all that is asked is that each makes the same calls
/// in the same order. Calls are stream-ordered like those of [`Backend`]: what goes wrong
/// surfaces here or at the next `synchronize` or read, as [`crate::comm::CommError`], on every
/// rank within the deadline. After an error the group is unusable until it is rebuilt.
pub trait Communicator<B: Backend>: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn world_size(&self) -> usize;

    /// A tensor that the other ranks may reach: what collectives are fastest on. It belongs to
    /// the group, so that a rank that gives up frees nothing that a peer still reads. By default
    /// any tensor will do.
    fn buffer(&mut self, backend: &mut B, rows: usize, cols: usize) -> Result<B::Tensor> {
        backend.tensor(rows, cols)
    }

    /// `x = sum of x over the ranks`: the same bits on all.
    fn all_reduce(&mut self, backend: &mut B, x: &mut B::Tensor) -> Result<()>;

    /// `residual += sum of x over the ranks (+ bias)`, then `out = rms_norm(residual)`: what
    /// follows every row-parallel product. A backend that can fuse it overrides this.
    #[expect(
        clippy::too_many_arguments,
        reason = "the operands of one fused operation"
    )]
    fn all_reduce_add_rms_norm(
        &mut self,
        backend: &mut B,
        x: &mut B::Tensor,
        bias: Option<&B::Vector>,
        residual: &mut B::Tensor,
        weight: &B::Vector,
        eps: f32,
        out: &mut B::Tensor,
    ) -> Result<()> {
        self.all_reduce(backend, x)?;
        backend.add_rms_norm(x, bias, residual, weight, eps, out)
    }

    /// What [`Self::all_reduce_add_rms_norm`] takes from the backend while it runs, where activations
    /// have `cols` columns: tensors with the rows of a step and so many columns each, for
    /// [`Backend::reserve`]. By default none.
    fn passing_columns(&self, cols: usize) -> Vec<usize> {
        let _ = cols;
        Vec::new()
    }

    /// The ranks' columns side by side: `out` is `[rows, sum of widths]`, `widths[r]` the
    /// columns of rank r's `x`.
    fn all_gather_columns(
        &mut self,
        backend: &mut B,
        x: &B::Tensor,
        widths: &[usize],
        out: &mut B::Tensor,
    ) -> Result<()>;

    /// Every rank's words, in rank order; each passes as many.
    fn all_gather_words(&mut self, backend: &mut B, words: &[u32]) -> Result<Vec<u32>>;

    /// The records `wanted` (see [`Backend::records`]) of every rank, in rank order; `shard` is this
    /// rank's part of the vocabulary. A read: it waits for the logits.
    fn gather_records(
        &mut self,
        backend: &mut B,
        logits: &B::Tensor,
        shard: &VocabShard,
        wanted: &[WantedRecord<'_>],
    ) -> Result<Vec<u32>> {
        let words = backend.records(logits, shard.ids.start, wanted)?;
        self.all_gather_words(backend, &words)
    }

    /// Bytes of this rank's memory that serve what goes between ranks.
    fn memory(&self) -> usize {
        0
    }

    /// How often the group has been made anew: what its ranks have agreed on before is void.
    fn generation(&self) -> u64 {
        0
    }

    /// Lets no rank go on before all are here and have nothing under way. What waits for devices, as
    /// taking memory does, belongs between two meetings, or a rank may wait for it while a collective
    /// waits for that rank. By default nothing: where taking memory waits for nobody.
    fn meet(&mut self, backend: &mut B) -> Result<()> {
        let _ = backend;
        Ok(())
    }

    /// Tells the others that this rank cannot go on: their waits end at once.
    fn abort(&mut self, cause: &str);
}
