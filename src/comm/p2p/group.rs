//! Making a group of ranks on devices.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::algorithm::{ALL, DeviceAllReduce, Reach};
use super::budget::Lease;
use super::comm::P2pComm;
use super::diagnosis::{Reason, State, diagnose};
use super::probe;
use super::rank_device::{RankDevice, Settings};
use crate::backend::cuda::{Context, Kernels, Stream, abi};
use crate::comm::cost::Wire;
use crate::comm::group::{Group, GroupOptions};
use crate::comm::mailbox::Call;
use crate::comm::{CommError, Links};
use crate::error::{Error, Result};

/// Ranks a group can have.
pub const MAX_RANKS: usize = abi::kMaxRanks as usize;
/// Blocks of a collective's grid.
pub const MAX_BLOCKS: u32 = abi::kCollectiveBlocks;

/// Staging and result buffers are multiples of this: whole packs for every number of ranks.
const STAGING_UNIT: usize = 16 * 840;

/// What a group can be told.
#[derive(Clone, Debug)]
pub struct P2pOptions {
    /// How long any single wait for a peer may last, by the waiting device's own clock.
    pub deadline: Duration,
    /// How long a rank waits for its own stream beyond twice the deadline: what else is in it may
    /// take that long.
    pub drain: Duration,
    /// Bytes of a message that are under way at once; longer ones go in passes. Each rank takes
    /// about three times that of its device's memory. Rounded up to a multiple of 13440.
    pub staging_bytes: usize,
    /// Whether to test every pair of ranks by kernels that write to each other, and how long to
    /// wait for what they write.
    pub probe: Option<Duration>,
    /// Most blocks of a collective, up to [`MAX_BLOCKS`].
    pub blocks: u32,
    /// What the links cost, for the choice of algorithms; by their kind if `None`.
    pub wire: Option<Wire>,
    /// Most threads of a block, rounded to whole warps: from 64 to 512. With fewer, a message of a
    /// given size has more blocks.
    pub threads: u32,
    /// Kernels that are loaded already, on some of the devices: an engine's, which the group then
    /// shares. The group loads those of the other devices.
    pub kernels: Vec<Kernels>,
    /// Rebuilds that ranks are ahead by from the start; for tests of one that was left behind.
    #[doc(hidden)]
    pub ahead: Vec<u64>,
    /// All-reduce algorithms from outside the crate, so that their kernels are loaded before
    /// anything runs.
    pub algorithms: Vec<&'static dyn DeviceAllReduce>,
    /// The algorithm of all-reduces that name none; the cost model chooses if `None`.
    pub all_reduce: Option<&'static dyn DeviceAllReduce>,
    /// Sequence parallelism, as of
    /// [`TensorComm::sequence_parallel`](crate::comm::TensorComm::sequence_parallel): in
    /// [`Communicator::all_reduce_add_rms_norm`](crate::comm::Communicator::all_reduce_add_rms_norm)
    /// each rank reduces, adds and normalises as many of the rows, which are then gathered. What is
    /// left over, fewer rows than there are ranks, is everybody's.
    pub sequence_parallel: bool,
}

impl Default for P2pOptions {
    /// 30 s; a minute; 4 MiB; a probe of 2 s; all blocks, of all threads.
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            drain: Duration::from_secs(60),
            staging_bytes: 4 << 20,
            probe: Some(Duration::from_secs(2)),
            blocks: MAX_BLOCKS,
            wire: None,
            threads: abi::kCollectiveThreads,
            kernels: Vec::new(),
            ahead: Vec::new(),
            algorithms: Vec::new(),
            all_reduce: None,
            sequence_parallel: false,
        }
    }
}

impl P2pOptions {
    /// How long a rank waits for its own stream at most.
    pub(super) fn longest_drain(&self) -> Duration {
        self.deadline.saturating_mul(2).saturating_add(self.drain)
    }
}

/// Ranks on devices that call collectives together: a thread each, in one process. A clone is
/// the same group.
#[derive(Clone, Debug)]
pub struct P2pGroup {
    shared: Arc<Shared>,
    host: Group,
}

/// What all ranks of a group see.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ranks: Vec<Mutex<RankDevice>>,
    pub(super) streams: Vec<Arc<Stream>>,
    pub(super) contexts: Vec<Context>,
    /// The addresses of the arenas.
    pub(super) arenas: Vec<u64>,
    /// The kernels of algorithms from outside the crate, a list for each rank.
    pub(super) extra: Vec<Vec<(&'static str, Kernels)>>,
    pub(super) options: P2pOptions,
    pub(super) links: Links,
    pub(super) ring: Option<Vec<usize>>,
    pub(super) wire: Wire,
    /// Blocks of a collective: the same on all ranks.
    pub(super) blocks: u32,
    /// What ended the group, by generation: all ranks say the same.
    verdict: Mutex<Option<(u64, CommError)>>,
    poisoned: Mutex<Option<CommError>>,
    /// What each rank called last.
    pub(super) calls: Vec<Mutex<Option<Call>>>,
    _leases: Vec<Lease>,
}

impl P2pGroup {
    /// A group with a rank on each of these devices, which may repeat, and the handle of each
    /// rank in order. Each rank gets a stream of its own.
    ///
    /// Takes memory, loads kernels and probes links: before anything else waits on these devices.
    ///
    /// # Errors
    /// [`Error::Input`] for no devices, too many, or one that is not there; [`Error::Driver`];
    /// [`Error::OutOfMemory`]. Links that do not work are no error here, unless they leave no way
    /// to talk, or not the one that [`P2pOptions::all_reduce`] needs: see [`Self::links`].
    pub fn new(devices: &[usize], options: P2pOptions) -> Result<(Self, Vec<P2pComm>)> {
        let contexts = contexts(devices)?;
        let streams = contexts.iter().map(|c| Ok(Arc::new(Stream::new(c)?)));
        let streams: Vec<_> = streams.collect::<Result<_>>()?;
        Self::with_streams(streams, options)
    }

    /// The same with a stream for each rank that somebody else made: the ranks are on the
    /// streams' devices.
    pub fn with_streams(
        streams: Vec<Arc<Stream>>,
        mut options: P2pOptions,
    ) -> Result<(Self, Vec<P2pComm>)> {
        let world_size = streams.len();
        if !(1..=MAX_RANKS).contains(&world_size) {
            return Err(Error::input(
                "ranks on devices",
                format!("1 to {MAX_RANKS}"),
                world_size,
                "name as many devices; one may be named several times",
            ));
        }
        let staging = options.staging_bytes.max(1);
        options.staging_bytes =
            staging
                .checked_next_multiple_of(STAGING_UNIT)
                .ok_or_else(|| {
                    Error::input(
                        "staging_bytes",
                        "a size in memory",
                        staging,
                        "use a smaller one",
                    )
                })?;
        options.blocks = options.blocks.clamp(1, MAX_BLOCKS);
        if let Some(named) = options.all_reduce
            && named.image().is_some()
            && options.algorithms.iter().all(|a| a.name() != named.name())
        {
            options.algorithms.push(named);
        }
        let most = abi::kCollectiveThreads;
        options.threads = options.threads.clamp(64, most).next_multiple_of(32);
        let contexts: Vec<Context> = streams.iter().map(|s| s.context().clone()).collect();
        for own in &contexts {
            for peer in &contexts {
                if own.can_access(peer)? || own.ordinal() == peer.ordinal() {
                    own.enable_access(peer)?;
                }
            }
        }
        let of_caller = options.kernels.iter();
        let mut loaded: BTreeMap<usize, Kernels> = of_caller
            .map(|kernels| (kernels.context().ordinal(), kernels.clone()))
            .collect();
        let mut ranks = Vec::new();
        let mut extra = Vec::new();
        for (stream, context) in streams.iter().zip(&contexts) {
            let kernels = match loaded.get(&context.ordinal()) {
                Some(kernels) => kernels.clone(),
                None => Kernels::load(context)?,
            };
            loaded.insert(context.ordinal(), kernels.clone());
            extra.push(load_extra(context, &options.algorithms)?);
            ranks.push(RankDevice::new(
                context,
                stream.clone(),
                kernels,
                options.staging_bytes,
                options.blocks,
            )?);
        }
        let arenas: Vec<u64> = ranks.iter().map(RankDevice::arena).collect();
        let mut links = probe::ask_driver(&contexts)?;
        if let Some(limit) = options.probe {
            probe::run(&mut ranks, &arenas, &mut links, limit)?;
        }
        let ring = links.ring();
        if let Some(named) = options.all_reduce {
            works(&links, ring.as_deref(), named)?;
        }
        let capability = contexts[0].limits().compute_capability;
        let (leases, blocks) = take_leases(&ranks, &extra, options.blocks)?;
        let shared = Shared {
            streams,
            arenas,
            extra,
            ring,
            wire: options.wire.unwrap_or_else(|| Wire::of(&links, capability)),
            links,
            blocks,
            verdict: Mutex::new(None),
            poisoned: Mutex::new(None),
            calls: ranks.iter().map(|_| Mutex::default()).collect(),
            ranks: ranks.into_iter().map(Mutex::new).collect(),
            contexts,
            options,
            _leases: leases,
        };
        for rank in 0..world_size {
            shared.reset(rank, 0)?;
        }
        // The hosts wait for each other in a rebuild alone, where each drains its stream first.
        let options = GroupOptions {
            deadline: shared.options.longest_drain(),
            ..GroupOptions::default()
        };
        let (host, hosts) = Group::new(world_size, options)?;
        let group = Self {
            shared: Arc::new(shared),
            host,
        };
        let comms = hosts
            .into_iter()
            .map(|host| P2pComm::new(group.shared.clone(), host))
            .collect();
        Ok((group, comms))
    }

    /// A new handle for `rank`, whose thread is lost. It becomes usable by
    /// [`P2pComm::rebuild`], with all other ranks; the old handle is void.
    pub fn rejoin(&self, rank: usize) -> Result<P2pComm> {
        let host = self.host.rejoin(rank)?;
        self.shared.raise(self.host_generation(), rank);
        Ok(P2pComm::new(self.shared.clone(), host))
    }

    /// Lets the next collective begin with this epoch, which is even, as after many others: for tests
    /// of how epochs wrap. Nothing may be under way.
    #[doc(hidden)]
    pub fn set_epoch(&self, epoch: u64) -> Result<()> {
        (0..self.world_size()).try_for_each(|rank| self.shared.device(rank).set_epoch(epoch))
    }

    fn host_generation(&self) -> u64 {
        generation(self.host.generation())
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.shared.streams.len()
    }

    /// What is known of the links between the ranks' devices.
    pub fn links(&self) -> &Links {
        &self.shared.links
    }

    /// The ranks in the order of the ring, if there is one.
    pub fn ring(&self) -> Option<&[usize]> {
        self.shared.ring.as_deref()
    }

    /// What the cost model takes the links for.
    pub fn wire(&self) -> Wire {
        self.shared.wire
    }

    /// Blocks of a collective.
    pub fn blocks(&self) -> u32 {
        self.shared.blocks
    }
}

/// The generation of the devices' flags after so many rebuilds: 16 bits, and never 0.
pub(super) fn generation(rebuilds: u64) -> u64 {
    rebuilds % 0xffff + 1
}

impl Shared {
    pub(super) fn world_size(&self) -> usize {
        self.streams.len()
    }

    /// Locks a rank's device: whatever happened to another holder, it is as whole as the device.
    pub(super) fn device(&self, rank: usize) -> std::sync::MutexGuard<'_, RankDevice> {
        self.ranks[rank]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a rank's arena as after `rebuilds` rebuilds.
    pub(super) fn reset(&self, rank: usize, rebuilds: u64) -> Result<()> {
        let settings = Settings {
            generation: generation(rebuilds + self.options.ahead.get(rank).unwrap_or(&0)),
            deadline: self.options.deadline,
            nonce: 0,
        };
        let whole: Vec<usize> = (0..self.world_size()).collect();
        let ring = self.ring.as_deref().unwrap_or(&whole);
        self.device(rank)
            .reset(rank, &self.arenas, &self.links, ring, settings)
    }

    /// Raises everybody's abort word, because of `by`. What fails has failed already.
    pub(super) fn raise(&self, generation: u64, by: usize) {
        for rank in 0..self.world_size() {
            if let Err(error) = self.device(rank).raise(generation, by) {
                tracing::warn!(rank, %error, "while telling a device that its group has ended");
            }
        }
    }

    /// The error with which no rank can go on any more.
    pub(super) fn poison(&self) -> Option<CommError> {
        let poisoned = self.poisoned.lock();
        poisoned.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_poison(&self, error: &CommError) {
        let mut poisoned = self.poisoned.lock().unwrap_or_else(PoisonError::into_inner);
        poisoned.get_or_insert_with(|| error.clone());
    }

    /// The error of a rank whose context turned out to be lost in a rebuild.
    pub(super) fn poison_by(&self, rank: usize, error: &Error) -> CommError {
        let cause = error.to_string();
        self.set_poison(&CommError::Poisoned { rank, cause });
        self.poison().expect("it was set above")
    }

    /// What ended this generation, as all ranks say it: found out now if nobody has yet. `told` is
    /// what a rank has said on the host; what the devices left are its consequences then.
    pub(super) fn verdict(
        &self,
        rank: usize,
        generation: u64,
        operation: &'static str,
        told: Option<CommError>,
    ) -> CommError {
        let mut verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, error)) = &*verdict
            && *of == generation
        {
            return error.clone();
        }
        let mut error = match told {
            Some(error) => error,
            None => diagnose(&self.settle(generation), rank, operation),
        };
        if let CommError::Mismatch {
            rank,
            peer,
            expected,
            found,
            ..
        } = &mut error
        {
            let call = |rank: usize| match self.calls.get(rank) {
                Some(call) => *call.lock().unwrap_or_else(PoisonError::into_inner),
                None => None,
            };
            let call = |rank| call(rank).map_or("nothing".to_owned(), |call| call.to_string());
            (*expected, *found) = (call(*peer), call(*rank));
        }
        if let CommError::Poisoned { .. } = error {
            self.set_poison(&error);
        }
        *verdict = Some((generation, error.clone()));
        error
    }

    /// Waits until every rank's kernels have ended one way or the other, but not for long: they
    /// have been told. What became of each.
    fn settle(&self, generation: u64) -> Vec<State> {
        let begin = Instant::now();
        let wait =
            |stream: &Arc<Stream>| stream.wait_until_idle(SETTLE.saturating_sub(begin.elapsed()));
        // All of them first: a rank's flag may come while another one is waited for.
        let idle: Vec<Result<bool>> = self.streams.iter().map(wait).collect();
        let states = idle.into_iter().enumerate().map(|(rank, idle)| {
            let state = self.state(rank, generation, idle);
            state.unwrap_or_else(|error| match lost(&error) {
                Some(by_link) => State::Failed {
                    cause: error.to_string(),
                    by_link,
                },
                // It records a graph, say, and cannot be asked.
                None => State::Busy,
            })
        });
        states.collect()
    }

    fn state(&self, rank: usize, generation: u64, idle: Result<bool>) -> Result<State> {
        let idle = idle?;
        let device = self.device(rank);
        Ok(match (device.record(generation), idle) {
            (Some(record), _) => State::GaveUp {
                came_late: record.reason == Reason::Timeout && device.came_late(&record)?,
                record,
            },
            (None, false) => State::Busy,
            (None, true) => match device.next_epoch()? {
                Some(next_epoch) => State::Done { next_epoch },
                None => State::Busy,
            },
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The arenas go: nobody's kernels may be at work in them. No rank has a handle any more, so
        // each has left, and whoever waits for it ends.
        let (begin, limit) = (Instant::now(), self.options.longest_drain());
        for stream in &self.streams {
            let left = limit.saturating_sub(begin.elapsed());
            if let Ok(false) = stream.wait_until_idle(left) {
                tracing::warn!("a rank's stream is still busy as its group goes");
            }
        }
    }
}

/// Whether an error says that a context is lost, and then whether by an access to another device.
pub(super) fn lost(error: &Error) -> Option<bool> {
    const NVLINK_UNCORRECTABLE: u32 = 220;
    match error {
        Error::Driver(error) => error.sticky.then_some(error.code == NVLINK_UNCORRECTABLE),
        _ => None,
    }
}

/// How long to wait for a rank's kernels to leave after all have been told.
const SETTLE: Duration = Duration::from_secs(1);

pub(super) fn contexts(devices: &[usize]) -> Result<Vec<Context>> {
    let mut made: BTreeMap<usize, Context> = BTreeMap::new();
    devices
        .iter()
        .map(|&device| {
            if let Some(context) = made.get(&device) {
                return Ok(context.clone());
            }
            let context = Context::new(device)?;
            made.insert(device, context.clone());
            Ok(context)
        })
        .collect()
}

fn load_extra(
    context: &Context,
    algorithms: &[&'static dyn DeviceAllReduce],
) -> Result<Vec<(&'static str, Kernels)>> {
    let with_image = algorithms
        .iter()
        .filter_map(|a| Some((a.name(), a.image()?)));
    with_image
        .map(|(name, image)| {
            // SAFETY: whoever made the image has vouched for it.
            let kernels = unsafe { Kernels::from_image(context, image.family, image.bytes)? };
            Ok((name, kernels))
        })
        .collect()
}

/// Room for every rank's blocks, and how many that makes for all.
fn take_leases(
    ranks: &[RankDevice],
    extra: &[Vec<(&'static str, Kernels)>],
    wanted: u32,
) -> Result<(Vec<Lease>, u32)> {
    let mut leases = Vec::new();
    for (index, rank) in ranks.iter().enumerate() {
        let ordinal = rank.context.ordinal();
        // What fits on the device of the hungriest kernel, with the most threads.
        let mut fit = u32::MAX;
        let own = rank.kernels.iter();
        let own = own.filter(|k| k.family().starts_with("collective/"));
        let outside = extra[index].iter().flat_map(|(_, kernels)| kernels.iter());
        for kernel in own.chain(outside) {
            fit = fit.min(kernel.blocks_per_multiprocessor(abi::kCollectiveThreads, 0)?);
        }
        let capacity = fit.saturating_mul(rank.context.limits().multiprocessors);
        let sharers = ranks[index..]
            .iter()
            .filter(|r| r.context.ordinal() == ordinal);
        let lease = Lease::take(ordinal, capacity, wanted, sharers.count() as u32);
        leases.push(lease.ok_or_else(|| {
            Error::input(
                format!("blocks that wait on CUDA device {ordinal}"),
                format!("room beside those of other groups, of {capacity} in all"),
                "none",
                "drop a group, or put fewer ranks on the device",
            )
        })?);
    }
    let blocks = leases.iter().map(Lease::blocks).min().unwrap_or(1);
    Ok((leases, blocks))
}

/// What a group over these links lacks of what an algorithm needs.
pub(super) fn lacks(links: &Links, ring: Option<&[usize]>, reach: Reach) -> Option<String> {
    let needs = match reach {
        Reach::Mesh if links.is_mesh() => return None,
        Reach::Ring if ring.is_some() => return None,
        Reach::Mesh => "links between all ranks",
        Reach::Ring => "a ring of links through all ranks",
    };
    let (a, b) = links.gaps().next().unwrap_or((0, 0));
    let link = match links.get(a, b) {
        good if good.is_good() => links.get(b, a),
        bad => bad,
    };
    Some(format!(
        "needs {needs}, and ranks {a} and {b} cannot reach each other ({link})"
    ))
}

/// Whether an algorithm can be that of a group over these links.
fn works(links: &Links, ring: Option<&[usize]>, algorithm: &dyn DeviceAllReduce) -> Result<()> {
    let Some(lacks) = lacks(links, ring, algorithm.reach()) else {
        return Ok(());
    };
    let others = ALL
        .iter()
        .filter(|a| self::lacks(links, ring, a.reach()).is_none());
    let others: Vec<_> = others.map(|a| a.name()).collect();
    Err(Error::input(
        "all_reduce",
        match others[..] {
            [] => "links over which some algorithm works".to_owned(),
            _ => format!("one that works over these links: {}", others.join(", ")),
        },
        format_args!("{:?}, which {lacks}", algorithm.name()),
        "name one that works, leave it out, or choose other devices (ringtp doctor shows the links)",
    ))
}
