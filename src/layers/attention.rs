//! The attention block.

use super::linear::opaque_debug;
use super::{QkvParallelLinear, RowParallelLinear};
use crate::backend::Backend;
use crate::error::Result;

/// Projections, rope, paged attention over the rank's heads, output projection. The sum over
/// the ranks is left to the caller, who fuses it with the residual and the next norm.
pub struct Attention<B: Backend> {
    /// Queries, keys and values.
    pub qkv: QkvParallelLinear<B>,
    /// Output.
    pub o: RowParallelLinear<B>,
}

/// Scratch of an attention block.
#[derive(Debug)]
pub struct AttentionScratch<'a, T> {
    /// `[rows, (q + 2 kv) * head_dim]`
    pub qkv: &'a mut T,
    /// `[rows, q * head_dim]`
    pub heads: &'a mut T,
}

impl<B: Backend> Attention<B> {
    /// This rank's summands of the output `[rows, hidden]`; appends the rows' entries to
    /// `pages` on the way.
    #[expect(clippy::too_many_arguments, reason = "the operands of one block")]
    pub fn partial(
        &self,
        backend: &mut B,
        x: &B::Tensor,
        plan: &B::Plan,
        pages: &mut B::KvPages,
        layer: usize,
        scratch: AttentionScratch<'_, B::Tensor>,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let AttentionScratch { qkv, heads } = scratch;
        let counts = self.qkv.heads();
        let scale = 1.0 / (counts.head_dim as f32).sqrt();
        self.qkv.forward(backend, x, qkv)?;
        backend.rope_append(qkv, counts, plan, pages, layer)?;
        backend.attention(qkv, counts, plan, pages, layer, scale, heads)?;
        self.o.partial(backend, heads, out)
    }
}

opaque_debug!(Attention);
