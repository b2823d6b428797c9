//! One hop: everybody publishes its message, then reads and sums all of them.

use super::{AllReduce, Rounding, Staging};
use crate::comm::{CommError, Wire, reduce};
use crate::dtype::DType;

/// Every rank reads every peer's whole message. One wait; (N-1) S bytes; for small messages.
#[derive(Clone, Copy, Debug)]
pub struct OneShot;

impl AllReduce for OneShot {
    fn name(&self) -> &'static str {
        "one-shot"
    }

    fn rounding(&self) -> Rounding {
        Rounding::RankOrder
    }

    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize {
        (world_size - 1) * bytes
    }

    fn hops(&self, _world_size: usize) -> usize {
        1
    }

    fn staging(&self, _world_size: usize, _dtype: DType, bytes: usize) -> Staging {
        Staging { packets: 1, bytes }
    }

    fn run(&self, wire: &Wire<'_>, dtype: DType, data: &mut [u8]) -> Result<(), CommError> {
        wire.publish(data)?;
        let source = |rank| wire.packet(rank, 0, data.len());
        if wire.world_size() == 2 {
            // As below, without an allocation.
            let sources = [source(0)?, source(1)?];
            return reduce::sum(wire, dtype, data, &sources);
        }
        let sources = (0..wire.world_size())
            .map(source)
            .collect::<Result<Vec<_>, _>>()?;
        reduce::sum(wire, dtype, data, &sources)
    }
}
