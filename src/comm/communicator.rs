//! What a model asks of the ranks it runs on.

use crate::backend::Backend;
use crate::error::Result;

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

    /// Tells the others that this rank cannot go on: their waits end at once.
    fn abort(&mut self, cause: &str);
}
