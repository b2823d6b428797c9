//! The feed-forward block: `down(silu(gate(x)) * up(x))`.

use super::linear::opaque_debug;
use super::{MergedColumnParallelLinear, RowParallelLinear};
use crate::backend::Backend;
use crate::error::Result;

/// Gate, up and down. The sum over the ranks is left to the caller, who fuses it with the
/// residual and the next norm.
pub struct Mlp<B: Backend> {
    /// Gate and up.
    pub gate_up: MergedColumnParallelLinear<B>,
    /// Down.
    pub down: RowParallelLinear<B>,
}

impl<B: Backend> Mlp<B> {
    /// This rank's summands of the output `[rows, hidden]`; `inner` is scratch `[rows, the
    /// rank's part of intermediate]`.
    pub fn partial(
        &self,
        backend: &mut B,
        x: &B::Tensor,
        inner: &mut B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<()> {
        self.gate_up.forward(backend, x, inner)?;
        self.down.partial(backend, inner, out)
    }
}

opaque_debug!(Mlp);
