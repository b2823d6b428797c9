//! One CPU rank's handle and its collectives.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytemuck::Pod;

use super::all_reduce::two_shot::{parts_of_peers, publish_parts};
use super::all_reduce::{AllReduce, Auto, Staging};
use super::error::CommError;
use super::generation::{Departure, Generation, LIVE_RANKS};
use super::group::Group;
use super::mailbox::{Call, Endpoint};
use super::stats::CommStats;
use super::wire::{Wire, refused_error};
use super::{part, reduce};
use crate::dtype::Element;

/// Longer all-reduces are made in segments of this many bytes, a multiple of any element:
/// both logs of a rank then stay in its L2 cache, and the memory for them is bounded.
const SEGMENT: usize = 256 << 10;

/// One rank of a [`Group`] of threads. Send it to the thread that runs the rank.
///
/// Dropping it while peers wait for this rank fails them at once.
///
/// # Errors
/// Every collective returns [`CommError::Argument`] before anything is sent if this rank's
/// arguments cannot be (the group stays usable); [`CommError::Timeout`],
/// [`CommError::RankFailed`] or [`CommError::Mismatch`] once ranks have lost each other, from
/// then on at every call, until [`CpuComm::rebuild`].
pub struct CpuComm {
    rank: usize,
    group: Group,
    generation: Arc<Generation>,
    endpoint: Endpoint,
    /// Which handle of this rank this is: [`Group::rejoin`] makes the next.
    incarnation: u64,
    stats: CommStats,
}

impl CpuComm {
    pub(crate) fn new(
        rank: usize,
        group: Group,
        generation: Arc<Generation>,
        endpoint: Endpoint,
        incarnation: u64,
    ) -> Self {
        if generation.world_size() > 1 {
            LIVE_RANKS.fetch_add(1, Ordering::Relaxed);
        }
        Self {
            rank,
            group,
            generation,
            endpoint,
            incarnation,
            stats: CommStats::default(),
        }
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.generation.world_size()
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Calls, bytes sent and time so far.
    pub fn stats(&self) -> CommStats {
        self.stats
    }

    /// Bytes of this rank's mailbox: they grow with its messages.
    pub fn memory(&self) -> usize {
        self.endpoint.memory()
    }

    /// Time spent in collectives so far.
    pub fn elapsed(&self) -> Duration {
        self.stats.elapsed
    }

    /// Ends the group because of an error of this rank: all others get
    /// [`CommError::RankFailed`] with `cause`, those that wait at once. If the group has
    /// failed already, that cause stands.
    pub fn abort(&mut self, cause: &str) {
        self.generation.abort(self.rank, || cause.to_owned());
    }

    /// Ends the group because of `rank`, as this rank found out; the first cause stands.
    #[cfg(feature = "cuda")]
    pub(super) fn blame(&self, rank: usize, cause: &str) {
        self.generation.abort(rank, || cause.to_owned());
    }

    /// The error of a group that has ended.
    #[cfg(feature = "cuda")]
    pub(super) fn check(&self) -> Result<(), CommError> {
        self.generation.check()
    }

    /// Rebuilds so far.
    #[cfg(feature = "cuda")]
    pub(super) fn generation(&self) -> u64 {
        self.generation.number
    }

    /// The sum of `data` over all ranks, in place, by the algorithm [`Auto`] chooses.
    pub fn all_reduce<T: Element>(&mut self, data: &mut [T]) -> Result<(), CommError> {
        self.all_reduce_with(&Auto, data)
    }

    /// The sum of `input` over all ranks in `out`, which has its length.
    pub fn all_reduce_out<T: Element>(
        &mut self,
        input: &[T],
        out: &mut [T],
    ) -> Result<(), CommError> {
        check_len("all_reduce", "out", out.len(), input.len())?;
        // Sending copies anyway; the sum can as well be made in place.
        out.copy_from_slice(input);
        self.all_reduce(out)
    }

    /// The sum of `data` over all ranks, in place, by `algorithm`, which all ranks must name
    /// alike.
    pub fn all_reduce_with<T: Element>(
        &mut self,
        algorithm: &dyn AllReduce,
        data: &mut [T],
    ) -> Result<(), CommError> {
        let (world_size, dtype) = (self.world_size(), T::DTYPE);
        let data: &mut [u8] = bytemuck::cast_slice_mut(data);
        let call = Call {
            operation: "all_reduce",
            algorithm: algorithm.name(),
            element: dtype.name(),
            bytes: data.len(),
            root: None,
        };
        if world_size == 1 || data.is_empty() {
            return self.collective(call, Staging::default(), 0, |wire| {
                reduce::sum_in_place(wire, dtype, data, 0, &[])
            });
        }
        let calls = self.stats.calls + 1;
        for segment in data.chunks_mut(SEGMENT) {
            let staging = algorithm.staging(world_size, dtype, segment.len());
            let sent = algorithm.bytes_sent(world_size, segment.len());
            self.collective(call, staging, sent, |wire| {
                algorithm.run(wire, dtype, segment)
            })?;
        }
        self.stats.calls = calls;
        Ok(())
    }

    /// This rank's [`part`] of the sum of `input` over all ranks, in `out`.
    pub fn reduce_scatter<T: Element>(
        &mut self,
        input: &[T],
        out: &mut [T],
    ) -> Result<(), CommError> {
        let (rank, world_size, dtype) = (self.rank, self.world_size(), T::DTYPE);
        let elements = input.len();
        let mine = part(elements, world_size, rank);
        check_len("reduce_scatter", "out", out.len(), mine.len())?;
        out.copy_from_slice(&input[mine]);
        let (input, out): (&[u8], &mut [u8]) =
            (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(out));
        let call = call::<T>("reduce_scatter", input.len(), None);
        let staging = Staging {
            packets: world_size - 1,
            bytes: input.len(),
        };
        self.collective(call, staging, input.len() - out.len(), |wire| {
            let size = dtype.size();
            publish_parts(wire, input, |rank| {
                let part = part(elements, world_size, rank);
                part.start * size..part.end * size
            })?;
            let others = parts_of_peers(wire, out.len())?;
            reduce::sum_in_place(wire, dtype, out, rank, &others)
        })
    }

    /// The `input`s of all ranks, of equal length, one after another in `out`.
    pub fn all_gather<T: Pod>(&mut self, input: &[T], out: &mut [T]) -> Result<(), CommError> {
        let (len, world_size) = (input.len(), self.world_size());
        check_len(
            "all_gather",
            "out",
            out.len(),
            len.saturating_mul(world_size),
        )?;
        self.gather_parts("all_gather", input, out, |rank| {
            rank * len..(rank + 1) * len
        })
    }

    /// The `input`s of all ranks, `counts[rank]` elements of each, one after another in `out`.
    pub fn all_gather_v<T: Pod>(
        &mut self,
        input: &[T],
        counts: &[usize],
        out: &mut [T],
    ) -> Result<(), CommError> {
        const OPERATION: &str = "all_gather_v";
        check_len(OPERATION, "counts", counts.len(), self.world_size())?;
        check_len(OPERATION, "input", input.len(), counts[self.rank])?;
        let mut starts = vec![0_usize];
        for &count in counts {
            starts.push(starts[starts.len() - 1].saturating_add(count));
        }
        check_len(OPERATION, "out", out.len(), starts[counts.len()])?;
        self.gather_parts(OPERATION, input, out, |rank| starts[rank]..starts[rank + 1])
    }

    fn gather_parts<T: Pod>(
        &mut self,
        operation: &'static str,
        input: &[T],
        out: &mut [T],
        range: impl Fn(usize) -> std::ops::Range<usize>,
    ) -> Result<(), CommError> {
        let world_size = self.world_size();
        let input: &[u8] = bytemuck::cast_slice(input);
        let call = call::<T>(operation, size_of_val(out), None);
        let staging = one_packet(input);
        self.collective(call, staging, input.len() * (world_size - 1), |wire| {
            wire.publish(input)?;
            for rank in 0..world_size {
                copy(wire, rank, 0, &mut out[range(rank)])?;
            }
            Ok(())
        })
    }

    /// `root`'s `data` on every rank.
    pub fn broadcast<T: Pod>(&mut self, data: &mut [T], root: usize) -> Result<(), CommError> {
        const OPERATION: &str = "broadcast";
        self.check_root(OPERATION, root)?;
        let (is_root, peers) = (self.rank == root, self.world_size() - 1);
        let call = call::<T>(OPERATION, size_of_val(data), Some(root));
        if is_root {
            let data: &[u8] = bytemuck::cast_slice(data);
            self.collective(call, one_packet(data), data.len() * peers, |wire| {
                wire.publish(data)
            })
        } else {
            self.collective(call, Staging::default(), 0, |wire| {
                copy(wire, root, 0, data)
            })
        }
    }

    /// Part `rank` of `root`'s `input`, in `out`: `input` holds `world_size` parts of `out`'s
    /// length on the root and is empty elsewhere.
    pub fn scatter<T: Pod>(
        &mut self,
        input: &[T],
        out: &mut [T],
        root: usize,
    ) -> Result<(), CommError> {
        const OPERATION: &str = "scatter";
        self.check_root(OPERATION, root)?;
        let (rank, world_size, len) = (self.rank, self.world_size(), out.len());
        let call = call::<T>(OPERATION, size_of_val(out), Some(root));
        if rank != root {
            check_len(
                OPERATION,
                "input, on a rank that is not root,",
                input.len(),
                0,
            )?;
            return self.collective(call, Staging::default(), 0, |wire| {
                copy(wire, root, rank - usize::from(rank > root), out)
            });
        }
        let expected = len.saturating_mul(world_size);
        check_len(OPERATION, "input, on the root,", input.len(), expected)?;
        let part = |rank: usize| &input[rank * len..(rank + 1) * len];
        let bytes = size_of_val(out) * (world_size - 1);
        let staging = Staging {
            packets: world_size - 1,
            bytes,
        };
        out.copy_from_slice(part(rank));
        self.collective(call, staging, bytes, |wire| {
            (0..world_size)
                .filter(|&peer| peer != rank)
                .try_for_each(|peer| wire.publish(bytemuck::cast_slice(part(peer))))
        })
    }

    /// The `input`s of all ranks, of equal length, one after another in `root`'s `out`; `out`
    /// is empty elsewhere.
    pub fn gather<T: Pod>(
        &mut self,
        input: &[T],
        out: &mut [T],
        root: usize,
    ) -> Result<(), CommError> {
        const OPERATION: &str = "gather";
        self.check_root(OPERATION, root)?;
        let (rank, world_size, len) = (self.rank, self.world_size(), input.len());
        let call = call::<T>(OPERATION, size_of_val(input), Some(root));
        if rank != root {
            check_len(OPERATION, "out, on a rank that is not root,", out.len(), 0)?;
            let input: &[u8] = bytemuck::cast_slice(input);
            return self.collective(call, one_packet(input), input.len(), |wire| {
                wire.publish(input)
            });
        }
        let expected = len.saturating_mul(world_size);
        check_len(OPERATION, "out, on the root,", out.len(), expected)?;
        out[rank * len..(rank + 1) * len].copy_from_slice(input);
        self.collective(call, Staging::default(), 0, |wire| {
            (0..world_size)
                .filter(|&peer| peer != rank)
                .try_for_each(|peer| copy(wire, peer, 0, &mut out[peer * len..(peer + 1) * len]))
        })
    }

    /// Returns once every rank has called it.
    pub fn barrier(&mut self) -> Result<(), CommError> {
        let call = call::<u8>("barrier", 0, None);
        self.collective(call, Staging::default(), 0, |wire| wire.barrier())
    }

    /// Makes the group usable again after a failure. Every rank calls it (a lost one through
    /// a handle from [`Group::rejoin`]); it returns when all have, with fresh mailboxes. A
    /// thread that is stuck in the old ones keeps them and gets an error when it wakes.
    ///
    /// # Errors
    /// [`CommError::RankFailed`], which names the ranks that did not come within the
    /// deadline, or says that this handle was replaced. It can be called again.
    pub fn rebuild(&mut self) -> Result<(), CommError> {
        self.generation.depart(self.rank, Departure::Rebuilding);
        let (generation, endpoint) =
            self.group
                .rebuild(self.rank, self.incarnation, self.generation.number)?;
        self.generation = generation;
        self.endpoint = endpoint;
        Ok(())
    }

    fn check_root(&self, operation: &'static str, root: usize) -> Result<(), CommError> {
        if root < self.world_size() {
            return Ok(());
        }
        Err(CommError::Argument {
            operation,
            problem: format!(
                "root is rank {root} of {}; name one of the ranks, from 0",
                self.world_size()
            ),
        })
    }

    /// One collective: enter, `body`, count. An error ends the group.
    fn collective(
        &mut self,
        call: Call,
        staging: Staging,
        sent: usize,
        body: impl FnOnce(&Wire<'_>) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        let start = Instant::now();
        let result = self.try_collective(call, staging, body);
        self.stats.elapsed += start.elapsed();
        self.stats.calls += 1;
        match result {
            Ok(()) => self.stats.bytes_sent += sent as u64,
            Err(ref error) => {
                self.generation.abort(self.rank, || error.to_string());
            }
        }
        result
    }

    fn try_collective(
        &mut self,
        call: Call,
        staging: Staging,
        body: impl FnOnce(&Wire<'_>) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        self.generation.check()?;
        while let Err((peer, target)) = self.endpoint.may_enter() {
            self.generation
                .wait(&self.endpoint, self.rank, peer, target, call.operation)?;
        }
        // A rank that only sent in its last call has not looked at what its peers called.
        if let (Some((peer, theirs)), Some(mine)) =
            (self.endpoint.odd_one_out(), self.endpoint.call(self.rank))
        {
            return Err(CommError::Mismatch {
                rank: self.rank,
                peer,
                epoch: self.endpoint.epoch(),
                expected: theirs.to_string(),
                found: mine.to_string(),
            });
        }
        self.endpoint
            .enter(call, staging.packets, staging.bytes)
            .map_err(|refused| refused_error(call.operation, refused))?;
        let wire = Wire {
            generation: &self.generation,
            endpoint: &self.endpoint,
            rank: self.rank,
            call,
        };
        body(&wire)?;
        wire.announce();
        self.generation
            .wake(self.rank, self.endpoint.own_progress());
        Ok(())
    }
}

impl Drop for CpuComm {
    fn drop(&mut self) {
        if self.world_size() > 1 {
            LIVE_RANKS.fetch_sub(1, Ordering::Relaxed);
        }
        if std::thread::panicking() {
            self.generation.abort(self.rank, || "it panicked".into());
        } else {
            self.generation.depart(self.rank, Departure::Left);
        }
    }
}

impl std::fmt::Debug for CpuComm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuComm")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size())
            .field("generation", &self.generation.number)
            .field("epoch", &self.endpoint.epoch())
            .finish()
    }
}

fn call<T>(operation: &'static str, bytes: usize, root: Option<usize>) -> Call {
    Call {
        operation,
        algorithm: "",
        element: std::any::type_name::<T>(),
        bytes,
        root,
    }
}

fn one_packet(bytes: &[u8]) -> Staging {
    Staging {
        packets: 1,
        bytes: bytes.len(),
    }
}

/// Copies packet `index` of `rank` to `out`.
fn copy<T: Pod>(
    wire: &Wire<'_>,
    rank: usize,
    index: usize,
    out: &mut [T],
) -> Result<(), CommError> {
    let packet = wire.packet(rank, index, size_of_val(out))?;
    bytemuck::cast_slice_mut(out).copy_from_slice(packet);
    Ok(())
}

fn check_len(
    operation: &'static str,
    what: &str,
    found: usize,
    expected: usize,
) -> Result<(), CommError> {
    if found == expected {
        return Ok(());
    }
    Err(CommError::Argument {
        operation,
        problem: format!("{what} has length {found}, expected {expected}; pass that many"),
    })
}
