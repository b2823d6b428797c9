//! RMSNorm.

use super::linear::opaque_debug;
use crate::backend::Backend;
use crate::error::Result;
use crate::host::HostMatrix;

/// `y = x / sqrt(mean(x²) + eps) * weight`; every rank holds all of it.
pub struct RmsNorm<B: Backend> {
    /// `[hidden]`
    pub weight: B::Vector,
    /// Added to the mean square.
    pub eps: f32,
}

impl<B: Backend> RmsNorm<B> {
    /// The norm with `weight` `[hidden]`.
    pub fn new(backend: &mut B, weight: HostMatrix<'_>, eps: f32) -> Result<Self> {
        Ok(Self {
            weight: backend.vector(&[weight])?,
            eps,
        })
    }

    /// `out`, of the shape of x.
    pub fn forward(&self, backend: &mut B, x: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        backend.rms_norm(x, &self.weight, self.eps, out)
    }
}

opaque_debug!(RmsNorm);
