//! The ring: each rank reads from its predecessor alone.

use std::ops::Range;

use super::{AllReduce, Rounding, Staging};
use crate::comm::{CommError, Wire, part, reduce};
use crate::dtype::DType;

/// N-1 steps of reduce-scatter, then N-1 of all-gather, around the ring 0, 1, .. N-1, 0.
///
/// Part p starts at rank p; every rank on its way adds its own and rounds to the message's
/// type; rank p-1 completes it and sends it around once more. Parts travel in chunks, so that
/// a rank works on one while its successor works on the one before. 2 S (N-1)/N bytes,
/// 2 (N-1) hops: for partial meshes, and by name.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// The bytes of a chunk, at least; more for messages of over 2^14 chunks.
    pub chunk: usize,
}

impl Ring {
    /// Chunks of 32 KiB, which fit a core's L1 with the own part beside them.
    pub const DEFAULT: Self = Self { chunk: 32 << 10 };
}

/// Chunks of a message in all; keeps a rank's packets, twice as many at most, under 65536.
const MAX_CHUNKS: usize = 1 << 14;

/// How a message of `elements` is cut up: alike on all ranks.
struct Cut {
    elements: usize,
    world_size: usize,
    /// Elements of a chunk.
    chunk: usize,
    /// Chunks of each part; the last ones of short parts may be empty.
    chunks: usize,
}

impl Cut {
    fn new(ring: &Ring, world_size: usize, elements: usize, size: usize) -> Self {
        let chunk = (ring.chunk / size).max(elements / MAX_CHUNKS + 1).max(1);
        let longest = part(elements, world_size, 0).len();
        Self {
            elements,
            world_size,
            chunk,
            chunks: longest.div_ceil(chunk),
        }
    }

    /// The elements of chunk `chunk` of part `part`, counted round the ring.
    fn range(&self, index: usize, chunk: usize) -> Range<usize> {
        let part = part(self.elements, self.world_size, index % self.world_size);
        let at = |chunk: usize| (part.start + chunk * self.chunk).min(part.end);
        at(chunk)..at(chunk + 1)
    }
}

impl AllReduce for Ring {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn rounding(&self) -> Rounding {
        Rounding::PerHop
    }

    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize {
        2 * bytes / world_size * (world_size - 1)
    }

    fn hops(&self, world_size: usize) -> usize {
        2 * (world_size - 1)
    }

    fn staging(&self, world_size: usize, dtype: DType, bytes: usize) -> Staging {
        let elements = bytes / dtype.size();
        let cut = Cut::new(self, world_size, elements, dtype.size());
        let steps = 2 * (world_size - 1);
        Staging {
            packets: steps * cut.chunks,
            bytes: steps * part(elements, world_size, 0).len() * dtype.size(),
        }
    }

    fn run(&self, wire: &Wire<'_>, dtype: DType, data: &mut [u8]) -> Result<(), CommError> {
        let (rank, n, size) = (wire.rank(), wire.world_size(), dtype.size());
        let previous = (rank + n - 1) % n;
        let cut = Cut::new(self, n, data.len() / size, size);
        let bytes = |index: usize, chunk: usize| {
            let range = cut.range(index, chunk);
            range.start * size..range.end * size
        };
        let received = |step: usize, chunk: usize, len: usize| {
            wire.packet(previous, (step - 1) * cut.chunks + chunk, len)
        };
        for chunk in 0..cut.chunks {
            wire.publish(&data[bytes(rank, chunk)])?;
        }
        // In step s the predecessor's packets hold part rank - s.
        for step in 1..2 * n - 1 {
            for chunk in 0..cut.chunks {
                let own = &mut data[bytes(rank + 2 * n - step, chunk)];
                let incoming = received(step, chunk, own.len())?;
                if step < n - 1 {
                    // The sum so far comes first; what this rank has stays for no one.
                    wire.publish_with(own.len(), |packet| {
                        reduce::sum(wire, dtype, packet, &[incoming, own])
                    })?;
                    continue;
                }
                if step == n - 1 {
                    reduce::sum_in_place(wire, dtype, own, 1, &[incoming])?;
                } else {
                    own.copy_from_slice(incoming);
                }
                if step < 2 * n - 2 {
                    wire.publish(own)?;
                }
            }
        }
        Ok(())
    }
}
