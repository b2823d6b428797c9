//! What the scheduler drives.

use crate::error::Result;
use crate::llama::{Batch, Group, Limits, SampleRow};

/// A model that runs one step of a batch: a [group of ranks](crate::llama), or an engine of
/// the caller's own.
pub trait Engine {
    /// What a batch must keep to.
    fn limits(&self) -> Limits;

    /// Runs one step and returns the token chosen for each of `batch.logits_rows`, in order;
    /// `sample` has one entry a logits row. KV entries of the rows stay until another step
    /// writes their slots.
    fn step(&mut self, batch: &Batch, sample: &[SampleRow]) -> Result<Vec<u32>>;
}

impl<E: Engine + ?Sized> Engine for &mut E {
    fn limits(&self) -> Limits {
        (**self).limits()
    }

    fn step(&mut self, batch: &Batch, sample: &[SampleRow]) -> Result<Vec<u32>> {
        (**self).step(batch, sample)
    }
}

impl Engine for Group {
    fn limits(&self) -> Limits {
        Self::limits(self)
    }

    fn step(&mut self, batch: &Batch, sample: &[SampleRow]) -> Result<Vec<u32>> {
        Self::step(self, batch, sample)
    }
}
