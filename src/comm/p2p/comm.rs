//! One rank's handle and its collectives.

use std::sync::{Arc, PoisonError};

use super::algorithm::{DeviceAllReduce, OneShot, Reach, choose};
use super::group::{Shared, generation, lacks, lost};
use crate::backend::cuda::{DeviceSlice, DeviceSliceMut, Function, Kernels, Launch, Stream, abi};
use crate::comm::cpu::CpuComm;
use crate::comm::mailbox::Call;
use crate::comm::{CommError, CommStats, part};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Bytes of a pack.
const PACK: u64 = 16;

/// One rank of a [`P2pGroup`](super::P2pGroup). Send it to the thread that runs the rank.
///
/// Collectives are stream-ordered: a call puts a kernel into the rank's stream, whose results are
/// there for what is put in later, and on the host after [`synchronize`](Self::synchronize).
/// Nothing in a call depends on the host's memory, so a call can be captured in a graph; it may be
/// replayed, also after a rebuild, as long as all ranks replay in the same order.
///
/// When it is dropped, what it has put in is done still; whoever waits for more of this rank then
/// fails at once.
///
/// # Errors
/// A call returns [`CommError::Argument`] or [`Error::Shape`] before anything is put in if this
/// rank's arguments cannot be; the group stays usable. What goes wrong on a device surfaces at
/// `synchronize`, on every rank within the deadline, as the same [`CommError`], and from then on at
/// every call, until [`rebuild`](Self::rebuild). What the outputs of a call that failed hold is
/// undefined; nothing outside of them is written.
#[derive(Debug)]
pub struct P2pComm {
    shared: Arc<Shared>,
    host: CpuComm,
    rank: usize,
    stats: CommStats,
    /// The collective that was put in last.
    operation: &'static str,
}

/// A call on its way into the stream.
struct Plan<'a> {
    call: Call,
    kernel: &'a str,
    /// The algorithm, if its kernel is not the crate's own.
    outside: Option<&'a str>,
    blocks: u64,
    threads: u32,
    args: abi::CollectiveArgs,
    sent: usize,
}

impl AsMut<P2pComm> for P2pComm {
    fn as_mut(&mut self) -> &mut P2pComm {
        self
    }
}

impl P2pComm {
    pub(super) fn new(shared: Arc<Shared>, host: CpuComm) -> Self {
        Self {
            rank: host.rank(),
            shared,
            host,
            stats: CommStats::default(),
            operation: "nothing yet",
        }
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.shared.world_size()
    }

    /// The stream that collectives are put into.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.shared.streams[self.rank]
    }

    /// Where this rank's kernels say why they gave up, for devices: for tests that watch it as the
    /// host does.
    #[doc(hidden)]
    pub fn record_address(&self) -> u64 {
        self.shared.device(self.rank).record_address()
    }

    /// Where the words of this rank are that its peers write: for tests that stand in for a peer.
    #[doc(hidden)]
    pub fn arena_address(&self) -> u64 {
        self.shared.arenas[self.rank]
    }

    /// The kernels on this rank's device: the crate's, or those of
    /// [`P2pOptions::kernels`](super::P2pOptions::kernels).
    pub fn kernels(&self) -> Kernels {
        self.shared.device(self.rank).kernels.clone()
    }

    /// Rows of each rank's own, where all have `rows` to add and normalise.
    pub(super) fn rows_of_each(&self, rows: usize) -> usize {
        match self.shared.options.sequence_parallel && self.world_size() > 1 {
            true => rows / self.world_size(),
            false => 0,
        }
    }

    /// Calls and bytes sent so far, as the table of algorithms counts them. The time is not known
    /// here: the calls do not wait.
    pub fn stats(&self) -> CommStats {
        self.stats
    }

    /// The sum of `data`, elements of `dtype`, over all ranks, in place, by the algorithm of
    /// [`choose`](Self::choose).
    pub fn all_reduce(&mut self, dtype: DType, data: &mut DeviceSliceMut<'_>) -> Result<()> {
        let algorithm = self.choose(data.len())?;
        self.all_reduce_with(algorithm, dtype, data)
    }

    /// The sum of `input` over all ranks in `out`, which has its length and is apart from it.
    pub fn all_reduce_out(
        &mut self,
        dtype: DType,
        input: DeviceSlice<'_>,
        out: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        let algorithm = self.choose(input.len())?;
        self.all_reduce_out_with(algorithm, dtype, input, out)
    }

    /// The algorithm for a message of `bytes`, where a call names none:
    /// [`P2pOptions::all_reduce`](super::P2pOptions::all_reduce), or what the cost model chooses.
    pub fn choose(&self, bytes: usize) -> Result<&'static dyn DeviceAllReduce, CommError> {
        match self.shared.options.all_reduce {
            Some(named) => Ok(named),
            None => Ok(choose(&self.shared.links, self.shared.wire, bytes)?.algorithm),
        }
    }

    /// [`all_reduce`](Self::all_reduce) by `algorithm`, which all ranks must name alike.
    pub fn all_reduce_with(
        &mut self,
        algorithm: &dyn DeviceAllReduce,
        dtype: DType,
        data: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        // SAFETY: the kernels read each element before they write it, and the borrow covers both.
        let input = unsafe { DeviceSlice::from_raw(data.address(), data.len()) };
        self.all_reduce_out_with(algorithm, dtype, input, data)
    }

    /// [`all_reduce_out`](Self::all_reduce_out) by `algorithm`, which all ranks must name alike.
    pub fn all_reduce_out_with(
        &mut self,
        algorithm: &dyn DeviceAllReduce,
        dtype: DType,
        input: DeviceSlice<'_>,
        out: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        const OPERATION: &str = "all_reduce";
        let elements = elements(OPERATION, "input", dtype, input.address(), input.len())?;
        aligned(OPERATION, "out", dtype, out.address())?;
        same_len(OPERATION, "out", out.len(), input.len())?;
        self.needs(OPERATION, algorithm.name(), algorithm.reach())?;
        if elements == 0 {
            return self.enter();
        }
        let world_size = self.world_size();
        // What a rank alone does to its message is the same by all of them.
        let algorithm = if world_size == 1 { &OneShot } else { algorithm };
        let packs = (input.len() as u64).div_ceil(PACK);
        let most = self.shared.options.threads;
        let threads = algorithm.threads(world_size, packs).min(most);
        let direct = algorithm.reads_inputs()
            && input.address().is_multiple_of(PACK)
            && (input.len() as u64).is_multiple_of(PACK)
            && self.shared.contexts[self.rank].is_reached_by_peers(input.address())?;
        self.put(Plan {
            call: Call {
                operation: OPERATION,
                algorithm: algorithm.name(),
                element: dtype.name(),
                bytes: input.len(),
                root: None,
            },
            kernel: algorithm.kernel(dtype),
            outside: algorithm.image().map(|_| algorithm.name()),
            blocks: algorithm.blocks(world_size, packs, threads),
            threads,
            args: abi::CollectiveArgs {
                input: input.address(),
                output: out.address(),
                elements,
                direct: direct.into(),
                ..Default::default()
            },
            sent: algorithm.bytes_sent(world_size, input.len()),
        })
    }

    /// This rank's [`part`] of the sum of `input` over all ranks, in `out`.
    pub fn reduce_scatter(
        &mut self,
        dtype: DType,
        input: DeviceSlice<'_>,
        out: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        const OPERATION: &str = "reduce_scatter";
        let elements = elements(OPERATION, "input", dtype, input.address(), input.len())?;
        aligned(OPERATION, "out", dtype, out.address())?;
        let mine = part(elements as usize, self.world_size(), self.rank).len() * dtype.size();
        same_len(OPERATION, "out", out.len(), mine)?;
        if elements == 0 {
            return self.enter();
        }
        let (mesh, world_size) = (self.mesh(OPERATION)?, self.world_size());
        let longest = part(elements as usize, world_size, 0).len() * dtype.size();
        let name = if mesh {
            "reduce_scatter"
        } else {
            "ring_reduce_scatter"
        };
        let (threads, blocks) = self.shape(mesh, (longest as u64).div_ceil(PACK));
        self.put(Plan {
            call: call(OPERATION, dtype.name(), input.len(), None),
            kernel: &format!("{name}_{dtype}"),
            outside: None,
            blocks,
            threads,
            args: abi::CollectiveArgs {
                input: input.address(),
                output: out.address(),
                elements,
                ..Default::default()
            },
            sent: input.len() - mine,
        })
    }

    /// The `input`s of all ranks, of equal length, one after another in `out`: elements of
    /// `dtype`.
    pub fn all_gather(
        &mut self,
        dtype: DType,
        input: DeviceSlice<'_>,
        out: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        let elements = elements("all_gather", "input", dtype, input.address(), input.len())?;
        let widths = vec![elements as usize; self.world_size()];
        self.all_gather_columns(dtype, 1, &widths, input, out)
    }

    /// The ranks' columns side by side: `input` is `[rows, widths[rank]]`, `out` `[rows, sum of
    /// widths]`, of `dtype`.
    pub fn all_gather_columns(
        &mut self,
        dtype: DType,
        rows: usize,
        widths: &[usize],
        input: DeviceSlice<'_>,
        out: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        const OPERATION: &str = "all_gather";
        let (world_size, size) = (self.world_size(), dtype.size());
        same_len(OPERATION, "widths", widths.len(), world_size)?;
        let bytes = |width: usize| width.saturating_mul(rows).saturating_mul(size);
        let total = widths
            .iter()
            .fold(0usize, |sum, &width| sum.saturating_add(width));
        same_len(OPERATION, "input", input.len(), bytes(widths[self.rank]))?;
        same_len(OPERATION, "out", out.len(), bytes(total))?;
        aligned(OPERATION, "input", dtype, input.address())?;
        aligned(OPERATION, "out", dtype, out.address())?;
        if total == 0 || rows == 0 {
            return self.enter();
        }
        if !self.mesh(OPERATION)? {
            return self.ring_gather_columns(dtype, rows, widths, input, out);
        }
        let longest = widths.iter().copied().max().unwrap_or(0);
        let (threads, blocks) = self.shape(true, (bytes(longest) as u64).div_ceil(PACK));
        self.put(Plan {
            call: call(OPERATION, dtype.name(), out.len(), None),
            kernel: bits(dtype, "all_gather_b16", "all_gather_b32"),
            outside: None,
            blocks,
            threads,
            args: gather_args(input.address(), out.address(), rows, widths),
            sent: input.len() * (world_size - 1),
        })
    }

    /// Around the ring rows come one rank after another: as many at a time as fit into the staging
    /// buffers, which nobody reads where there is no mesh; then they are put side by side.
    fn ring_gather_columns(
        &mut self,
        dtype: DType,
        rows: usize,
        widths: &[usize],
        input: DeviceSlice<'_>,
        out: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        let size = dtype.size();
        let total: usize = widths.iter().sum();
        let staging = self.shared.device(self.rank).staging();
        let at_once = if rows == 1 {
            1
        } else {
            3 * self.shared.options.staging_bytes / (total * size)
        };
        if at_once == 0 {
            return Err(CommError::Argument {
                operation: "all_gather",
                problem: format!(
                    "a row of {} bytes does not fit into the {} of staging that the ring has; \
                     raise P2pOptions::staging_bytes",
                    total * size,
                    3 * self.shared.options.staging_bytes
                ),
            }
            .into());
        }
        for first in (0..rows).step_by(at_once) {
            let rows_now = at_once.min(rows - first);
            let from = input.address() + (first * widths[self.rank] * size) as u64;
            let to = out.address() + (first * total * size) as u64;
            let flat: Vec<usize> = widths.iter().map(|width| width * rows_now).collect();
            let longest = flat.iter().copied().max().unwrap_or(0) * size;
            let gathered = if rows == 1 { to } else { staging };
            let (threads, blocks) = self.shape(false, (longest as u64).div_ceil(PACK));
            self.put(Plan {
                call: call("all_gather", dtype.name(), out.len(), None),
                kernel: bits(dtype, "ring_all_gather_b16", "ring_all_gather_b32"),
                outside: None,
                blocks,
                threads,
                args: gather_args(from, gathered, 1, &flat),
                sent: (total * rows_now - flat[self.successor()]) * size,
            })?;
            if rows > 1 {
                let packs = ((total * rows_now * size) as u64).div_ceil(PACK);
                let (threads, blocks) = self.shape(true, packs);
                let kernel = bits(dtype, "place_columns_b16", "place_columns_b32");
                let args = gather_args(gathered, to, rows_now, widths);
                self.launch(kernel, None, blocks, threads, args)?;
            }
        }
        Ok(())
    }

    /// `root`'s `data`, elements of `dtype`, on every rank.
    pub fn broadcast(
        &mut self,
        dtype: DType,
        data: &mut DeviceSliceMut<'_>,
        root: usize,
    ) -> Result<()> {
        const OPERATION: &str = "broadcast";
        let elements = elements(OPERATION, "data", dtype, data.address(), data.len())?;
        let world_size = self.world_size();
        if root >= world_size {
            return Err(CommError::Argument {
                operation: OPERATION,
                problem: format!(
                    "root is rank {root} of {world_size}; name one of the ranks, from 0"
                ),
            }
            .into());
        }
        if elements == 0 {
            return self.enter();
        }
        let packs = (data.len() as u64).div_ceil(PACK);
        let call = call(OPERATION, dtype.name(), data.len(), Some(root));
        if !self.mesh(OPERATION)? {
            // An all-gather to which the others bring nothing.
            let mut widths = vec![0; world_size];
            widths[root] = elements as usize;
            let (threads, blocks) = self.shape(false, packs);
            return self.put(Plan {
                call,
                kernel: bits(dtype, "ring_all_gather_b16", "ring_all_gather_b32"),
                outside: None,
                blocks,
                threads,
                args: gather_args(data.address(), data.address(), 1, &widths),
                // The message ends before the root.
                sent: if self.successor() == root {
                    0
                } else {
                    data.len()
                },
            });
        }
        // One hop, or two with less out of the root's links: whichever the cost model prefers.
        let wire = self.shared.wire;
        let readers = world_size - 1;
        let in_parts =
            readers > 1 && wire.time_us(2, data.len()) < wire.time_us(1, readers * data.len());
        let (threads, blocks) = self.shape(true, packs);
        self.put(Plan {
            call,
            kernel: if in_parts {
                bits(dtype, "broadcast_parts_b16", "broadcast_parts_b32")
            } else {
                bits(dtype, "broadcast_b16", "broadcast_b32")
            },
            outside: None,
            blocks,
            threads,
            args: abi::CollectiveArgs {
                input: data.address(),
                output: data.address(),
                elements,
                root: root as u32,
                ..Default::default()
            },
            sent: match (self.rank == root, in_parts) {
                (true, true) => data.len(),
                (true, false) => data.len() * readers,
                (false, true) => data.len() / readers * (readers - 1),
                (false, false) => 0,
            },
        })
    }

    /// What is put in from now on runs after what every rank put in before its barrier.
    pub fn barrier(&mut self) -> Result<()> {
        let at = self.shared.device(self.rank).words();
        // SAFETY: words of this rank's own, for this alone; they live as long as the group.
        let (input, mut out) = unsafe {
            (
                DeviceSlice::from_raw(at, 4),
                DeviceSliceMut::from_raw(at + 4, 4 * self.world_size()),
            )
        };
        self.all_gather(DType::F32, input, &mut out)
    }

    /// Waits for all that was put into the stream.
    ///
    /// # Errors
    /// Why a collective failed, if one did: the same on all ranks.
    pub fn synchronize(&mut self) -> Result<()> {
        self.enter()?;
        let limit = self.shared.options.longest_drain();
        match self.stream().wait_until_idle(limit) {
            // Not of a collective: the stream cannot be waited for, say, as it records a graph.
            Err(error) if lost(&error).is_none() => return Err(error),
            Ok(true) if self.is_well() => return Ok(()),
            _ => {}
        }
        Err(self.fail().into())
    }

    /// Returns when all ranks have come here, and what this one has put into its stream is done: its
    /// device can be waited for then, as taking memory does.
    ///
    /// # Errors
    /// Why the group has ended: the same on all ranks. A rank that does not come is waited for as
    /// long as its stream would be.
    pub fn meet(&mut self) -> Result<()> {
        self.synchronize()?;
        match self.host.barrier() {
            Ok(()) => Ok(()),
            Err(_) => Err(self.fail().into()),
        }
    }

    /// Bytes of the device's memory that this rank has for what goes between ranks.
    pub fn memory(&self) -> usize {
        self.shared.device(self.rank).memory()
    }

    /// How often the group has been rebuilt.
    pub fn rebuilds(&self) -> u64 {
        self.host.generation()
    }

    /// Ends the group because of an error of this rank: all others get
    /// [`CommError::RankFailed`] with `cause`, those that wait at once. If the group has failed
    /// already, that cause stands.
    pub fn abort(&mut self, cause: &str) {
        self.host.abort(cause);
        self.shared.raise(self.generation(), self.rank);
    }

    /// Makes the group usable again after a failure. Every rank calls it (a lost one through a
    /// handle from [`P2pGroup::rejoin`](super::P2pGroup::rejoin)); it returns when all have.
    ///
    /// Nothing of the old generation runs then: each rank waits for its stream first, for at most
    /// twice the deadline and [`P2pOptions::drain`](super::P2pOptions::drain). Flags and epochs
    /// begin anew; captured graphs stay good.
    ///
    /// # Errors
    /// [`CommError::RankFailed`], which names the ranks that did not come within as long again: it
    /// can be called again. [`CommError::Poisoned`] where a device failed for good.
    pub fn rebuild(&mut self) -> Result<()> {
        if let Some(poison) = self.shared.poison() {
            return Err(poison.into());
        }
        if self.host.check().is_ok() {
            self.host.blame(self.rank, "it asked for a rebuild");
        }
        self.shared.raise(self.generation(), self.rank);
        let limit = self.shared.options.longest_drain();
        match self.stream().wait_until_idle(limit) {
            Ok(true) => {}
            Ok(false) => {
                return Err(CommError::RankFailed {
                    rank: self.rank,
                    cause: format!("its stream is still busy after {limit:?}"),
                }
                .into());
            }
            Err(error) => match lost(&error) {
                Some(_) => return Err(self.shared.poison_by(self.rank, &error).into()),
                None => return Err(error),
            },
        }
        if let Err(error) = self.host.rebuild() {
            return Err(self.shared.poison().unwrap_or(error).into());
        }
        let reset = self.shared.reset(self.rank, self.host.generation());
        if let Err(error) = reset {
            self.host.abort(&error.to_string());
            return Err(error);
        }
        Ok(self.host.barrier()?)
    }

    fn generation(&self) -> u64 {
        generation(self.host.generation())
    }

    /// Whether the group can be used.
    fn enter(&self) -> Result<()> {
        if let Some(poison) = self.shared.poison() {
            return Err(poison.into());
        }
        if self.host.check().is_err() {
            return Err(self.fail().into());
        }
        Ok(())
    }

    /// Whether nobody has ended the group, as far as this rank knows.
    fn is_well(&self) -> bool {
        let record = self.shared.device(self.rank).record(self.generation());
        record.is_none() && self.host.check().is_ok()
    }

    /// What ended the group; ends it for all if nothing has yet.
    #[cold]
    fn fail(&self) -> CommError {
        let told = self.host.check().err();
        self.shared.raise(self.generation(), self.rank);
        let error = self
            .shared
            .verdict(self.rank, self.generation(), self.operation, told);
        let culprit = match &error {
            CommError::RankFailed { rank, .. } | CommError::Poisoned { rank, .. } => *rank,
            CommError::Link { to, .. } => *to,
            _ => self.rank,
        };
        self.host.blame(culprit, &error.to_string());
        error
    }

    /// The rank behind this one in the ring; the next one where there is no ring.
    fn successor(&self) -> usize {
        let ring = self.shared.ring.as_deref().unwrap_or_default();
        let position = ring.iter().position(|&rank| rank == self.rank);
        position.map_or((self.rank + 1) % self.world_size(), |position| {
            ring[(position + 1) % ring.len()]
        })
    }

    /// Whether every rank reaches every other; an error if not even a ring does.
    fn mesh(&self, operation: &'static str) -> Result<bool> {
        if self.shared.links.is_mesh() {
            return Ok(true);
        }
        self.needs(operation, "ring", Reach::Ring)?;
        Ok(false)
    }

    fn needs(&self, operation: &'static str, algorithm: &str, reach: Reach) -> Result<()> {
        let shared = &self.shared;
        let Some(lacks) = lacks(&shared.links, shared.ring.as_deref(), reach) else {
            return Ok(());
        };
        Err(CommError::Argument {
            operation,
            problem: format!(
                "{algorithm} {lacks}; choose another algorithm or other devices (ringtp doctor \
                 shows the links)"
            ),
        }
        .into())
    }

    /// Threads and blocks for a message of `packs`, by the mesh or around the ring.
    fn shape(&self, mesh: bool, packs: u64) -> (u32, u64) {
        let most = self.shared.options.threads;
        if mesh {
            let threads = mesh_threads(packs).min(most);
            (threads, packs.div_ceil(threads.into()))
        } else {
            let message = u64::from(abi::kRingMessageBytes) / PACK;
            (most, packs.div_ceil(message))
        }
    }

    /// Puts a collective into the stream.
    fn put(&mut self, plan: Plan<'_>) -> Result<()> {
        self.enter()?;
        let calls = &self.shared.calls[self.rank];
        *calls.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan.call);
        self.operation = plan.call.operation;
        let tag = tag(&plan);
        let args = abi::CollectiveArgs { tag, ..plan.args };
        self.launch(plan.kernel, plan.outside, plan.blocks, plan.threads, args)?;
        self.stats.calls += 1;
        self.stats.bytes_sent += plan.sent as u64;
        Ok(())
    }

    fn launch(
        &self,
        kernel: &str,
        outside: Option<&str>,
        blocks: u64,
        threads: u32,
        args: abi::CollectiveArgs,
    ) -> Result<()> {
        let device = self.shared.device(self.rank);
        let function: &Function = match outside {
            None => device.kernels.get(kernel)?,
            Some(name) => {
                let extra = self.shared.extra[self.rank].iter();
                let kernels = extra.clone().find(|(other, _)| *other == name);
                let Some((_, kernels)) = kernels else {
                    return Err(CommError::Argument {
                        operation: "all_reduce",
                        problem: format!(
                            "the kernels of {name} are not loaded; name it in \
                             P2pOptions::algorithms"
                        ),
                    }
                    .into());
                };
                kernels.get(kernel)?
            }
        };
        let blocks = blocks.clamp(1, self.shared.blocks.into()) as u32;
        let shape = Launch::linear(blocks, threads).cooperative();
        let args = abi::CollectiveArgs {
            arena: self.shared.arenas[self.rank],
            ..args
        };
        // SAFETY: the arena is the rank's own, its control block names those of its peers, and all
        // live as long as the group. The operands are borrowed and have the lengths that the
        // arguments say, checked by the callers; stream order keeps them until the kernel ends, as
        // everything in a stream. The grid fits beside all others that wait on the device.
        let launched = unsafe { self.shared.streams[self.rank].launch(function, shape, &args) };
        drop(device);
        launched.inspect_err(|error| {
            self.host.blame(self.rank, &error.to_string());
            self.shared.raise(self.generation(), self.rank);
        })
    }
}

impl Drop for P2pComm {
    fn drop(&mut self) {
        // The handle between the threads tells the others' hosts; this, their devices.
        if self.host.check().is_err() || self.world_size() == 1 {
            return;
        }
        if std::thread::panicking() {
            self.host.abort("it panicked");
            self.shared.raise(self.generation(), self.rank);
        } else if let Err(error) = self.launch("leave", None, 1, 32, Default::default()) {
            tracing::warn!(rank = self.rank, %error, "while leaving a group");
        }
    }
}

/// Whole warps, at least one thread a rank, a pack a thread as far as one block goes.
pub(super) fn mesh_threads(packs: u64) -> u32 {
    let most = u64::from(abi::kCollectiveThreads);
    packs.next_multiple_of(32).clamp(64, most) as u32
}

fn gather_args(input: u64, output: u64, rows: usize, widths: &[usize]) -> abi::CollectiveArgs {
    let mut args = abi::CollectiveArgs {
        input,
        output,
        rows: rows as u64,
        ..Default::default()
    };
    for (to, &from) in args.widths.iter_mut().zip(widths) {
        *to = from as u64;
    }
    args
}

fn call(operation: &'static str, element: &'static str, bytes: usize, root: Option<usize>) -> Call {
    Call {
        operation,
        algorithm: "",
        element,
        bytes,
        root,
    }
}

/// Eight bits of what must be the same on all ranks, so that they notice if it is not (FNV-1a).
fn tag(plan: &Plan<'_>) -> u32 {
    let args = &plan.args;
    let numbers = [
        plan.call.bytes as u64,
        args.elements,
        args.rows,
        args.root.into(),
        plan.blocks,
        plan.threads.into(),
    ];
    let numbers = numbers.into_iter().chain(args.widths);
    let bytes = plan.kernel.bytes();
    let bytes = bytes.chain(numbers.flat_map(u64::to_le_bytes));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash >> 32) as u32 & 0xff
}

/// The kernel for elements of this size.
fn bits(dtype: DType, two: &'static str, four: &'static str) -> &'static str {
    if dtype.size() == 2 { two } else { four }
}

/// The elements in `bytes` from `address`, or an error.
fn elements(
    operation: &'static str,
    what: &str,
    dtype: DType,
    address: u64,
    bytes: usize,
) -> Result<u64> {
    aligned(operation, what, dtype, address)?;
    if !bytes.is_multiple_of(dtype.size()) {
        return Err(CommError::Argument {
            operation,
            problem: format!(
                "{what} has {bytes} bytes, which are no whole elements of {dtype}; pass whole ones"
            ),
        }
        .into());
    }
    Ok((bytes / dtype.size()) as u64)
}

fn aligned(operation: &'static str, what: &str, dtype: DType, address: u64) -> Result<()> {
    if address.is_multiple_of(dtype.size() as u64) {
        return Ok(());
    }
    Err(Error::from(CommError::Argument {
        operation,
        problem: format!(
            "{what} is at {address:#x}, no multiple of the {} bytes of a {dtype}; align it",
            dtype.size()
        ),
    }))
}

fn same_len(operation: &'static str, what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::from(CommError::Argument {
        operation,
        problem: format!("{what} has length {found}, expected {expected}; pass that many"),
    }))
}
