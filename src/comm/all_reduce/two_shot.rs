//! Two hops: reduce-scatter, then all-gather, every rank reading from every other.

use super::{AllReduce, Rounding, Staging};
use crate::comm::{CommError, Wire, part, reduce};
use crate::dtype::DType;

/// Rank r sums part r of every peer, publishes it, and collects the others' parts. Two
/// waits; 2 S (N-1)/N bytes; for large messages.
#[derive(Clone, Copy, Debug)]
pub struct TwoShot;

impl AllReduce for TwoShot {
    fn name(&self) -> &'static str {
        "two-shot"
    }

    fn rounding(&self) -> Rounding {
        Rounding::RankOrder
    }

    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize {
        2 * bytes / world_size * (world_size - 1)
    }

    fn hops(&self, _world_size: usize) -> usize {
        2
    }

    fn staging(&self, world_size: usize, _dtype: DType, bytes: usize) -> Staging {
        // The parts of the N-1 others, then the sum of the own part.
        Staging {
            packets: world_size,
            bytes,
        }
    }

    fn run(&self, wire: &Wire<'_>, dtype: DType, data: &mut [u8]) -> Result<(), CommError> {
        let (rank, world_size, size) = (wire.rank(), wire.world_size(), dtype.size());
        let elements = data.len() / size;
        let bytes = |rank| {
            let part = part(elements, world_size, rank);
            part.start * size..part.end * size
        };
        publish_parts(wire, data, bytes)?;
        let mine = &mut data[bytes(rank)];
        let others = parts_of_peers(wire, mine.len())?;
        reduce::sum_in_place(wire, dtype, mine, rank, &others)?;
        wire.publish(mine)?;
        // Each starts behind itself, so that not all read from one rank at once.
        for peer in (1..world_size).map(|step| (rank + step) % world_size) {
            let out = &mut data[bytes(peer)];
            out.copy_from_slice(wire.packet(peer, world_size - 1, out.len())?);
        }
        Ok(())
    }
}

/// Publishes `data`'s part of each peer, in rank order: packets 0..N-1.
pub(crate) fn publish_parts(
    wire: &Wire<'_>,
    data: &[u8],
    bytes: impl Fn(usize) -> std::ops::Range<usize>,
) -> Result<(), CommError> {
    (0..wire.world_size())
        .filter(|&peer| peer != wire.rank())
        .try_for_each(|peer| wire.publish(&data[bytes(peer)]))
}

/// What each peer published of this rank's part by [`publish_parts`], in rank order.
pub(crate) fn parts_of_peers<'a>(wire: &Wire<'a>, len: usize) -> Result<Vec<&'a [u8]>, CommError> {
    let rank = wire.rank();
    (0..wire.world_size())
        .filter(|&peer| peer != rank)
        // A peer leaves itself out, so its packets behind that are numbered one lower.
        .map(|peer| wire.packet(peer, rank - usize::from(rank > peer), len))
        .collect()
}
