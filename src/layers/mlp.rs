//! The feed-forward block: `down(silu(gate(x)) * up(x))`.

use super::linear::opaque_debug;
use super::{MergedColumnParallelLinear, OutputProjection, Rank, RmsNorm, Stream};
use crate::backend::Backend;
use crate::comm::Communicator;
use crate::error::Result;

/// Gate, up and down.
pub struct Mlp<B: Backend> {
    /// Gate and up.
    pub gate_up: MergedColumnParallelLinear<B>,
    /// Down.
    pub down: OutputProjection<B>,
}

impl<B: Backend> Mlp<B> {
    /// From `stream.hidden` to the residual, and its norm by `next_norm` to `stream.hidden`.
    /// `inner` is scratch, `[rows, the rank's part of intermediate]`.
    pub fn forward<C: Communicator<B>>(
        &self,
        rank: &mut Rank<'_, B, C>,
        stream: &mut Stream<'_, B::Tensor>,
        next_norm: &RmsNorm<B>,
        inner: &mut B::Tensor,
    ) -> Result<()> {
        self.gate_up.forward(rank.backend, stream.hidden, inner)?;
        self.down.forward_add_norm(rank, inner, stream, next_norm)
    }
}

opaque_debug!(Mlp);
