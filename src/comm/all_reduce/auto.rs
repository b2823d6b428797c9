//! The choice by size.

use super::{AllReduce, OneShot, Rounding, Staging, TwoShot};
use crate::comm::{CommError, Wire};
use crate::dtype::DType;

/// One-shot for small messages, two-shot for large ones: the same bits from either.
#[derive(Clone, Copy, Debug)]
pub struct Auto;

impl Auto {
    /// The algorithm it takes for `bytes` over `world_size` ranks.
    ///
    /// Two ranks: `benches/comm.rs` on two cores of a Sapphire Rapids (f32) has one-shot ahead
    /// by 0.5 us up to 8 KiB, still ahead at 32 KiB (8.0 us against 9.2), level at 128 KiB.
    /// Four ranks on the same two cores: level at 8 KiB, two-shot ahead at 32 KiB (17 us against
    /// 28). Not measured yet on a machine with a core for each of more than two.
    pub fn choose(world_size: usize, bytes: usize) -> &'static dyn AllReduce {
        let limit = if world_size == 2 { 64 << 10 } else { 16 << 10 };
        if bytes <= limit { &OneShot } else { &TwoShot }
    }
}

impl AllReduce for Auto {
    fn name(&self) -> &'static str {
        "auto"
    }

    fn rounding(&self) -> Rounding {
        Rounding::RankOrder
    }

    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize {
        Self::choose(world_size, bytes).bytes_sent(world_size, bytes)
    }

    fn hops(&self, world_size: usize) -> usize {
        OneShot.hops(world_size)
    }

    fn staging(&self, world_size: usize, dtype: DType, bytes: usize) -> Staging {
        Self::choose(world_size, bytes).staging(world_size, dtype, bytes)
    }

    fn run(&self, wire: &Wire<'_>, dtype: DType, data: &mut [u8]) -> Result<(), CommError> {
        Self::choose(wire.world_size(), data.len()).run(wire, dtype, data)
    }
}
