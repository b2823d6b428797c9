//! What one rank has on its device: a stream, the kernels, and the arena that peers reach.
//!
//! All of it is made before the first collective and kept until the last handle of the group
//! goes, so that a rank that gives up frees nothing that a peer still reads.

use std::sync::Arc;
use std::time::Duration;

use super::diagnosis::{Record, Step};
use crate::backend::cuda::{
    Context, DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut, Kernels, Pinned, Stream, abi,
};
use crate::comm::Links;
use crate::error::Result;

/// Bytes of the arena before its buffers.
const HEAD: usize = (size_of::<abi::CollectiveArena>()).next_multiple_of(128);
/// Bytes of the ring's messages, for each block.
const RING: usize = (abi::kRingSlots * abi::kRingMessageBytes) as usize;

/// Pinned words: the record, then these.
const RECORD: usize = 0;
const RECORD_WORDS: usize = size_of::<abi::CollectiveRecord>() / 8;
const ABORT: usize = RECORD_WORDS;
const READ: usize = ABORT + 1;
const PROBE: usize = READ + 1;
const WORDS: usize = PROBE + abi::kMaxRanks as usize;

/// Where a flag or an abort word has the generation (`cuda/collective/collective.cuh`).
const GENERATION_SHIFT: u32 = 48;

/// How long a copy of a word may take on a device that works.
const WORD: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub(super) struct RankDevice {
    pub(super) context: Context,
    /// What the rank's work goes into.
    pub(super) stream: Arc<Stream>,
    /// For words of the host that must get past kernels which wait.
    side: Stream,
    pub(super) kernels: Kernels,
    arena: DeviceBuffer,
    pinned: Pinned<u64>,
    /// A word of this rank, then one of each rank, for barriers.
    words: DeviceBuffer,
    staging_bytes: usize,
    /// Of the last reset.
    generation: u64,
}

impl RankDevice {
    pub(super) fn new(
        context: &Context,
        stream: Arc<Stream>,
        kernels: Kernels,
        staging_bytes: usize,
        blocks: u32,
    ) -> Result<Self> {
        // An allocation of its own: the virtual GPU sees its bounds.
        let pool = DevicePool::new(context, 0);
        let side = Stream::new(context)?;
        let arena = pool.zeros(HEAD + 3 * staging_bytes + blocks as usize * RING, &side)?;
        let words = pool.zeros(4 * (1 + abi::kMaxRanks as usize), &side)?;
        side.synchronize()?;
        Ok(Self {
            context: context.clone(),
            stream,
            side,
            kernels,
            arena,
            pinned: Pinned::zeros(context, WORDS)?,
            words,
            staging_bytes,
            generation: 0,
        })
    }

    /// The address of the arena, for this rank and its peers.
    pub(super) fn arena(&self) -> u64 {
        self.arena.address()
    }

    /// Bytes of device memory.
    pub(super) fn memory(&self) -> usize {
        self.arena.len() + self.words.len()
    }

    /// The first staging buffer.
    pub(super) fn staging(&self) -> u64 {
        self.arena() + HEAD as u64
    }

    /// A word of this rank, then one of each rank, for barriers.
    pub(super) fn words(&self) -> u64 {
        self.words.address()
    }

    /// Where its kernels leave a `CollectiveRecord`.
    pub(super) fn record_address(&self) -> u64 {
        self.pinned.device_address() + 8 * RECORD as u64
    }

    /// Where the probe's results go.
    pub(super) fn probe_results(&self) -> u64 {
        self.pinned.device_address() + 8 * PROBE as u64
    }

    /// What the probe found of a peer: its writes here, and this rank's reads there.
    pub(super) fn probe_result(&self, peer: usize) -> (u32, u32) {
        let word = self.pinned.read(PROBE + peer);
        (word as u32, (word >> 32) as u32)
    }

    /// Writes the head of the arena: as after `rebuilds` rebuilds, with nothing done since. Only
    /// while no collective of any rank runs.
    pub(super) fn reset(
        &mut self,
        rank: usize,
        peers: &[u64],
        links: &Links,
        ring: &[usize],
        settings: Settings,
    ) -> Result<()> {
        self.generation = settings.generation;
        // SAFETY: words of memory that lives as long as `self`; no kernel runs that writes them.
        let mut record =
            unsafe { DeviceSliceMut::from_raw(self.record_address(), 8 * RECORD_WORDS) };
        self.side.fill(0, &mut record)?;
        // SAFETY: a repr(C) struct of integers, for which zeros are values.
        let mut head: Box<abi::CollectiveArena> = Box::new(unsafe { std::mem::zeroed() });
        let control = &mut head.control;
        control.generation = settings.generation;
        control.deadline_ns = u64::try_from(settings.deadline.as_nanos()).unwrap_or(u64::MAX);
        control.rank = rank as u32;
        control.world_size = peers.len() as u32;
        control.reachable = links.reachable(rank);
        let position = ring.iter().position(|&r| r == rank).unwrap_or(0);
        control.ring_position = position as u32;
        for (to, &from) in control.ring.iter_mut().zip(ring) {
            *to = from as u32;
        }
        control.arenas[..peers.len()].copy_from_slice(peers);
        control.staging_bytes = self.staging_bytes as u64;
        control.record = self.record_address();
        // Its own pattern, which peers read in a probe.
        for (index, word) in head.probe[rank].chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&pattern(settings.nonce, rank, index).to_le_bytes());
        }
        // SAFETY: a repr(C) struct of integers; what lies between its fields was zeroed with it.
        let bytes = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(&*head).cast::<u8>(), size_of_val(&*head))
        };
        let mut target = self.arena.as_mut().range(0..bytes.len())?;
        self.side.upload(bytes, &mut target)
    }

    /// Sets the epoch that the next collective begins with.
    pub(super) fn set_epoch(&mut self, epoch: u64) -> Result<()> {
        let epochs = [epoch; abi::kCollectiveBlocks as usize];
        let at = std::mem::offset_of!(abi::CollectiveArena, epochs);
        let mut target = self.arena.as_mut().range(at..at + size_of_val(&epochs))?;
        self.side.upload(&epochs, &mut target)
    }

    /// What a kernel of this generation left when it gave up.
    pub(super) fn record(&self, generation: u64) -> Option<Record> {
        let complete = self.pinned.read(RECORD);
        // The kernel stored that word last, with release.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        if complete != generation {
            return None;
        }
        Record::from_words(std::array::from_fn(|i| self.pinned.read(RECORD + 1 + i)))
    }

    /// The epoch that the next collective begins with, as the device has it; `None` if it does not
    /// say so in time.
    pub(super) fn next_epoch(&self) -> Result<Option<u64>> {
        self.word(std::mem::offset_of!(abi::CollectiveArena, epochs))
    }

    /// Whether what a kernel waited for is there now.
    pub(super) fn came_late(&self, record: &Record) -> Result<bool> {
        let block = record.block as usize;
        let (list, index) = match record.step {
            Step::Barrier => (
                std::mem::offset_of!(abi::CollectiveArena, barrier),
                block * abi::kMaxRanks as usize + record.peer,
            ),
            Step::RingMessage => (std::mem::offset_of!(abi::CollectiveArena, ring_sent), block),
            Step::RingCredit => (std::mem::offset_of!(abi::CollectiveArena, ring_read), block),
        };
        let flag = self.word(list + 8 * index)?;
        Ok(flag.is_some_and(|flag| {
            flag >> GENERATION_SHIFT == self.generation && record.is_met_by(flag)
        }))
    }

    /// A word of the arena's head, past kernels that wait.
    fn word(&self, at: usize) -> Result<Option<u64>> {
        let from = self.arena.as_ref().range(at..at + 8)?;
        // SAFETY: a word of the pinned memory that lives as long as `self`; nobody else uses it
        // while `&self` is with the one who holds the group's verdict.
        let mut to =
            unsafe { DeviceSliceMut::from_raw(self.pinned.device_address() + 8 * READ as u64, 8) };
        self.side.copy(from, &mut to)?;
        Ok(self
            .side
            .wait_until_idle(WORD)?
            .then(|| self.pinned.read(READ)))
    }

    /// Raises the abort word in this rank's arena, past kernels that wait there: they leave.
    /// Nothing is done for a generation that is over.
    pub(super) fn raise(&self, generation: u64, by: usize) -> Result<()> {
        if generation != self.generation {
            return Ok(());
        }
        let word = generation << GENERATION_SHIFT | (by as u64 + 1);
        self.pinned.write(ABORT, word);
        let at = std::mem::offset_of!(abi::CollectiveArena, abort) as u64;
        // SAFETY: words of memory that lives as long as `self`; the kernels and the host write the
        // abort word whole.
        let (from, mut to) = unsafe {
            (
                DeviceSlice::from_raw(self.pinned.device_address() + 8 * ABORT as u64, 8),
                DeviceSliceMut::from_raw(self.arena() + at, 8),
            )
        };
        self.side.copy(from, &mut to)
    }
}

/// What a reset sets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    /// From 1 to 65535.
    pub(super) generation: u64,
    pub(super) deadline: Duration,
    /// Of the probe that follows.
    pub(super) nonce: u64,
}

/// Word `index` of what rank `rank` writes in a probe: as in `cuda/collective/probe.cu`.
fn pattern(nonce: u64, rank: usize, index: usize) -> u32 {
    let x = (nonce as u32)
        .wrapping_mul(0x9e37_79b9)
        .wrapping_add((rank as u32).wrapping_mul(0x85eb_ca6b))
        .wrapping_add(index as u32);
    let x = (x ^ x >> 16).wrapping_mul(0x7feb_352d);
    x ^ x >> 15
}
