//! The attention block.

use super::linear::opaque_debug;
use super::{OutputProjection, QkvParallelLinear, Rank, RmsNorm, Stream};
use crate::backend::Backend;
use crate::comm::Communicator;
use crate::error::Result;

/// Projections, rope, paged attention over the rank's heads, output projection.
pub struct Attention<B: Backend> {
    /// Queries, keys and values.
    pub qkv: QkvParallelLinear<B>,
    /// Output.
    pub o: OutputProjection<B>,
}

/// The KV cache and scratch of an attention block.
#[derive(Debug)]
pub struct AttentionState<'a, B: Backend> {
    /// The batch's metadata.
    pub plan: &'a B::Plan,
    /// Where keys and values are.
    pub pages: &'a mut B::KvPages,
    /// Which layer's pages.
    pub layer: usize,
    /// Scratch: `[rows, (q + 2 kv) * head_dim]`
    pub qkv: &'a mut B::Tensor,
    /// Scratch: `[rows, q * head_dim]`
    pub heads: &'a mut B::Tensor,
}

impl<B: Backend> Attention<B> {
    /// From `stream.hidden` to the residual, and its norm by `next_norm` to `stream.hidden`;
    /// appends the rows' keys and values to the pages on the way.
    pub fn forward<C: Communicator<B>>(
        &self,
        rank: &mut Rank<'_, B, C>,
        stream: &mut Stream<'_, B::Tensor>,
        next_norm: &RmsNorm<B>,
        state: AttentionState<'_, B>,
    ) -> Result<()> {
        let AttentionState {
            plan,
            pages,
            layer,
            qkv,
            heads,
        } = state;
        let counts = self.qkv.heads();
        let scale = 1.0 / (counts.head_dim as f32).sqrt();
        self.qkv.forward(rank.backend, stream.hidden, qkv)?;
        rank.backend.rope_append(qkv, counts, plan, pages, layer)?;
        rank.backend
            .attention(qkv, counts, plan, pages, layer, scale, heads)?;
        self.o.forward_add_norm(rank, heads, stream, next_norm)
    }
}

opaque_debug!(Attention);
