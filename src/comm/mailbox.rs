//! Mailboxes: how bytes pass from one rank's thread to another's. All `unsafe` of `comm` is
//! here.
//!
//! # The protocol
//!
//! Calls are numbered by an *epoch*, from 1, alike on all ranks. Each rank owns one mailbox:
//! a word `progress` and two *logs*; call `e` uses log `e % 2`. In a call a rank *publishes*
//! packets: it appends bytes to its log, writes the directory entry, then stores
//! `progress = e << 16 | packets`. Peers only ever read packets that `progress` covers. Epochs
//! and packets only grow, so every wait is a `>=` on one 64-bit word.
//!
//! **What a small message costs** is cache lines that travel from core to core, above all one
//! after another. A reader needs two in turn: `progress`, beside which the first packet's entry
//! lies, and then the packet's, all at once. What does not change from call to call is not
//! written again, so that every core keeps its copy.
//!
//! **Who writes, who reads.** A mailbox is written by its owner alone: there is one
//! [`Endpoint`] for it, neither `Clone` nor `Sync`. Everybody reads it.
//!
//! **Packets are complete when seen.** The owner writes a packet's bytes, its directory entry
//! and (at entry) the log's memory, directory and [`Call`] *before* the release store of
//! `progress` in its program order. A reader touches them only *after* its own acquire load
//! returned a value at least that high (`seen`). The load reads from that store or a later
//! one of the same thread, so all those writes happen before the reads. After publication a
//! packet is never written again in this call: the owner appends behind it, and `&[u8]` of a
//! packet never overlaps the `&mut [u8]` being filled.
//!
//! **A log may be reused two calls later.** At entry to call `e` the owner makes sure, by
//! acquire loads, that every peer's progress is at least `(e - 1) << 16`: it has *entered*
//! `e - 1`. The peer stored that value (release) after it returned from call `e - 2`, and
//! the borrow checker guarantees that no slice of a packet outlives its call: packets borrow
//! the endpoint, and [`Endpoint::enter`] takes it by `&mut`. So all reads of log `e % 2` (of
//! call `e - 2`) happen before the owner's writes of call `e`; nobody starts to read that log
//! again before the owner announces `e`. In between, the owner alone has it and may grow it.
//!
//! **Nothing is freed under a reader.** Logs belong to the generation (an `Arc` that every
//! endpoint holds), not to the caller: a rank that times out and returns frees nothing.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::{Cell, UnsafeCell};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Packets start at multiples of this many bytes, so they can be viewed as any element.
pub(crate) const ALIGN: usize = 64;

/// The packets a rank can publish in one call.
pub(crate) const MAX_PACKETS: usize = u16::MAX as usize;

/// The calls a generation can make: what fits a progress word above the packets.
const MAX_EPOCH: u64 = u64::MAX >> 16;

/// What a rank calls; all ranks must call the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) operation: &'static str,
    pub(crate) algorithm: &'static str,
    pub(crate) element: &'static str,
    pub(crate) bytes: usize,
    pub(crate) root: Option<usize>,
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.operation)?;
        if !self.algorithm.is_empty() {
            write!(f, " by {}", self.algorithm)?;
        }
        write!(f, " of {} bytes of {}", self.bytes, self.element)?;
        match self.root {
            Some(root) => write!(f, " with root {root}"),
            None => Ok(()),
        }
    }
}

/// The progress of a rank that has entered call `epoch` and published `packets` packets.
pub(crate) fn progress_word(epoch: u64, packets: usize) -> u64 {
    epoch << 16 | packets as u64
}

/// Zeroed bytes, aligned to [`ALIGN`], reached through a raw pointer.
struct Memory {
    start: NonNull<u8>,
    capacity: usize,
}

impl Memory {
    const EMPTY: Self = Self {
        start: NonNull::dangling(),
        capacity: 0,
    };

    fn new(capacity: usize) -> Option<Self> {
        if capacity == 0 {
            return Some(Self::EMPTY);
        }
        let layout = Layout::from_size_align(capacity, ALIGN).ok()?;
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, capacity })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: `new` allocated `start` with this very layout, which was valid then.
            unsafe {
                let layout = Layout::from_size_align_unchecked(self.capacity, ALIGN);
                dealloc(self.start.as_ptr(), layout);
            }
        }
    }
}

/// Where a packet lies. Relaxed accesses suffice: `progress` orders them.
#[derive(Default)]
struct Entry {
    /// The call it was published in; any other means that there is no such packet.
    epoch: AtomicU64,
    offset: AtomicUsize,
    len: AtomicUsize,
}

struct Log {
    call: Call,
    /// Of the packets behind the first.
    directory: Vec<Entry>,
    memory: Memory,
}

/// What is written at every publication, in one cache line.
#[derive(Default)]
#[repr(C, align(64))]
struct Head {
    progress: AtomicU64,
    /// The first packet of each log.
    first: [Entry; 2],
}

const _: () = assert!(size_of::<Head>() == 64);

/// One rank's `progress` and logs. Aligned so that a writer's line is no neighbour's line
/// (two lines, as adjacent ones are fetched in pairs).
#[repr(align(128))]
struct Mailbox {
    head: Line<Head>,
    logs: [UnsafeCell<Log>; 2],
}

impl Mailbox {
    /// The entry of packet `index` in `log`, that of call `epoch`.
    #[inline]
    fn entry<'a>(&'a self, log: &'a Log, epoch: u64, index: usize) -> Option<&'a Entry> {
        match index.checked_sub(1) {
            None => Some(&self.head.0.first[(epoch % 2) as usize]),
            Some(behind) => log.directory.get(behind),
        }
    }
}

/// A value with two cache lines to itself.
#[repr(align(128))]
pub(crate) struct Line<T>(pub(crate) T);

// SAFETY: the raw pointers in the logs are owned by them; every access to a log follows the
// protocol above, under which writes by the owner and reads by peers never overlap.
unsafe impl Sync for Mailbox {}
// SAFETY: as above; nothing in a mailbox is tied to a thread.
unsafe impl Send for Mailbox {}

/// Why a packet could not be published or a call not entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A peer may still read the log; see [`Endpoint::may_enter`].
    Busy,
    /// More packets or bytes than the call has announced, or than a log can hold.
    Full,
    /// No memory for the log.
    Memory,
    /// A packet is being filled already.
    Nested,
}

/// A packet that a rank asked for.
pub(crate) enum Lookup<'a> {
    /// Here it is.
    Packet(&'a [u8]),
    /// The peer's progress does not cover it yet.
    NotYet,
    /// The peer finished this call without such a packet.
    Never,
}

/// One rank's end of the mailboxes: writes its own, reads the others'.
pub(crate) struct Endpoint {
    boxes: Arc<[Mailbox]>,
    rank: usize,
    /// The call this rank is in or has finished; 0 before the first.
    epoch: u64,
    /// The highest progress seen by an acquire load, per rank.
    seen: Box<[Cell<u64>]>,
    published: Cell<usize>,
    /// The packets and bytes announced for this call; the log may hold more.
    announced_packets: usize,
    announced_bytes: usize,
    offset: Cell<usize>,
    announced: Cell<bool>,
    publishing: Cell<bool>,
}

impl Endpoint {
    /// Fresh mailboxes for `world_size` ranks: the endpoint of each.
    pub(crate) fn group(world_size: usize) -> Vec<Self> {
        let log = || {
            UnsafeCell::new(Log {
                call: Call {
                    operation: "",
                    algorithm: "",
                    element: "",
                    bytes: 0,
                    root: None,
                },
                directory: Vec::new(),
                memory: Memory::EMPTY,
            })
        };
        let boxes: Arc<[Mailbox]> = (0..world_size)
            .map(|_| Mailbox {
                head: Line(Head::default()),
                logs: [log(), log()],
            })
            .collect();
        (0..world_size)
            .map(|rank| Self {
                boxes: boxes.clone(),
                rank,
                epoch: 0,
                seen: (0..world_size).map(|_| Cell::new(0)).collect(),
                published: Cell::new(0),
                announced_packets: 0,
                announced_bytes: 0,
                offset: Cell::new(0),
                announced: Cell::new(true),
                publishing: Cell::new(false),
            })
            .collect()
    }

    /// The call this rank is in or has finished; 0 before the first.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Bytes of this rank's mailbox.
    pub(crate) fn memory(&self) -> usize {
        let mailbox = &self.boxes[self.rank];
        let logs = mailbox.logs.iter().map(|log| {
            // SAFETY: this endpoint alone writes this log, and only through `&mut self`; peers
            // read it.
            let log = unsafe { &*log.get() };
            log.memory.capacity + log.directory.capacity() * size_of::<Entry>()
        });
        size_of::<Mailbox>() + logs.sum::<usize>()
    }

    /// The progress this rank has announced by packets or by [`Self::announce`].
    #[inline]
    pub(crate) fn own_progress(&self) -> u64 {
        progress_word(self.epoch, self.published.get())
    }

    /// The progress of `peer`, at least; loads it if less than `target` is known.
    #[inline]
    pub(crate) fn progress(&self, peer: usize, target: u64) -> u64 {
        let seen = &self.seen[peer];
        if seen.get() < target {
            seen.set(self.boxes[peer].head.0.progress.load(Ordering::Acquire));
        }
        seen.get()
    }

    /// A peer that has not entered the current call, with the progress it must reach before
    /// this rank may enter the next.
    #[inline]
    pub(crate) fn may_enter(&self) -> Result<(), (usize, u64)> {
        let target = progress_word(self.epoch, 0);
        match (0..self.boxes.len())
            .find(|&peer| peer != self.rank && self.progress(peer, target) < target)
        {
            None => Ok(()),
            Some(peer) => Err((peer, target)),
        }
    }

    /// Enters the next call, in which at most `packets` packets of `bytes` bytes in all will
    /// be published. Nobody learns of it before the first packet or [`Self::announce`].
    pub(crate) fn enter(
        &mut self,
        call: Call,
        packets: usize,
        bytes: usize,
    ) -> Result<(), Refused> {
        if packets > MAX_PACKETS {
            return Err(Refused::Full);
        }
        // Each packet may waste just under ALIGN bytes in front of the next.
        let capacity = packets
            .checked_mul(ALIGN)
            .and_then(|waste| waste.checked_add(bytes))
            .ok_or(Refused::Full)?;
        self.may_enter().map_err(|_| Refused::Busy)?;
        let epoch = self.epoch + 1;
        if epoch > MAX_EPOCH {
            return Err(Refused::Full);
        }
        let log = self.boxes[self.rank].logs[(epoch % 2) as usize].get();
        // SAFETY: this endpoint alone writes this mailbox, and no peer reads this log: by
        // `may_enter` all have entered the call before this one, so they have left the one
        // that last used this log, and none reads it again before this call is announced
        // (module docs). No slice of ours is alive: they borrow `self`, taken here by `&mut`.
        let log = unsafe { &mut *log };
        if log.memory.capacity < capacity {
            let roomy = capacity.checked_next_power_of_two().unwrap_or(capacity);
            log.memory = Memory::EMPTY;
            log.memory = Memory::new(roomy).ok_or(Refused::Memory)?;
        }
        let behind = packets.saturating_sub(1);
        if log.directory.len() < behind {
            log.directory.resize_with(behind, Entry::default);
        }
        if log.call != call {
            log.call = call;
        }
        self.epoch = epoch;
        self.published.set(0);
        (self.announced_packets, self.announced_bytes) = (packets, capacity);
        self.offset.set(0);
        self.announced.set(false);
        self.publishing.set(false);
        Ok(())
    }

    /// Tells the peers that this rank is in this call, unless a packet did so. Returns
    /// whether it had to.
    #[inline]
    pub(crate) fn announce(&self) -> bool {
        let first = !self.announced.replace(true);
        if first {
            self.boxes[self.rank]
                .head
                .0
                .progress
                .store(progress_word(self.epoch, 0), Ordering::Release);
        }
        first
    }

    /// Publishes a packet of `len` bytes, filled by `fill` (which finds old bytes in it). If
    /// `fill` fails nothing is published.
    #[inline]
    pub(crate) fn publish_with<E: From<Refused>>(
        &self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.publishing.replace(true) {
            return Err(Refused::Nested.into());
        }
        let mailbox = &self.boxes[self.rank];
        // SAFETY: only `enter` makes a `&mut Log`, and only of our own: it cannot run while
        // `self` is borrowed.
        let log = unsafe { &*mailbox.logs[(self.epoch % 2) as usize].get() };
        let (index, offset) = (self.published.get(), self.offset.get());
        let fits = index < self.announced_packets
            && self
                .announced_bytes
                .checked_sub(offset)
                .is_some_and(|free| len <= free);
        let entry = mailbox.entry(log, self.epoch, index);
        let Some(entry) = entry.filter(|_| fits) else {
            self.publishing.set(false);
            return Err(Refused::Full.into());
        };
        // SAFETY: `offset + len` is within the allocation, whose bytes were zeroed at first;
        // the range lies behind every published packet, so no reader has a slice of it, and
        // `publishing` keeps `fill` from getting it a second time.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(log.memory.start.as_ptr().wrapping_add(offset), len)
        };
        prefetch_to_write(bytes);
        let filled = fill(bytes);
        self.publishing.set(false);
        filled?;
        entry.epoch.store(self.epoch, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        entry.len.store(len, Ordering::Relaxed);
        self.offset.set((offset + len).next_multiple_of(ALIGN));
        self.published.set(index + 1);
        self.announced.set(true);
        // Pairs with the acquire load in `progress`: see the module docs.
        mailbox
            .head
            .0
            .progress
            .store(progress_word(self.epoch, index + 1), Ordering::Release);
        Ok(())
    }

    /// Packet `index` of `peer` (or of this rank itself) in this call.
    #[inline]
    pub(crate) fn packet(&self, peer: usize, index: usize) -> Lookup<'_> {
        // First of all: a higher index would spill into the epoch of the target.
        if self.epoch == 0 || index >= MAX_PACKETS {
            return Lookup::Never;
        }
        let target = progress_word(self.epoch, index + 1);
        let known = if peer == self.rank {
            progress_word(self.epoch, self.published.get())
        } else {
            self.progress(peer, target)
        };
        if known < target {
            return Lookup::NotYet;
        }
        // SAFETY: the peer has announced this call (`known`, by an acquire load), so it has
        // finished `enter`; it will not touch what it published before this rank enters the
        // next call, which needs `&mut self` (module docs).
        let log = unsafe { &*self.boxes[peer].logs[(self.epoch % 2) as usize].get() };
        let Some(entry) = self.boxes[peer]
            .entry(log, self.epoch, index)
            .filter(|entry| entry.epoch.load(Ordering::Relaxed) == self.epoch)
        else {
            return Lookup::Never;
        };
        let (offset, len) = (
            entry.offset.load(Ordering::Relaxed),
            entry.len.load(Ordering::Relaxed),
        );
        // SAFETY: an entry of this epoch that `known` covers was written by `publish_with`,
        // in bounds, before the progress that we acquired. If the peer has gone on to its
        // next call, `known` is above the target without covering this entry; it then covers
        // all of this call's entries, and any other has another epoch.
        Lookup::Packet(unsafe {
            std::slice::from_raw_parts(log.memory.start.as_ptr().wrapping_add(offset), len)
        })
    }

    /// A peer whose call was not this rank's, in the call that this rank has finished; only
    /// once [`Self::may_enter`] says yes.
    pub(crate) fn odd_one_out(&self) -> Option<(usize, &Call)> {
        let mine = self.call(self.rank)?;
        (0..self.boxes.len())
            .filter_map(|peer| Some((peer, self.call(peer)?)))
            .find(|(_, call)| *call != mine)
    }

    /// What `peer` called, once it has announced this call.
    #[inline]
    pub(crate) fn call(&self, peer: usize) -> Option<&Call> {
        let target = progress_word(self.epoch, 0);
        if self.epoch == 0 || peer != self.rank && self.progress(peer, target) < target {
            return None;
        }
        // SAFETY: as in `packet`.
        let log = unsafe { &*self.boxes[peer].logs[(self.epoch % 2) as usize].get() };
        Some(&log.call)
    }
}

/// Asks for the cache lines of `bytes`, as many as fit in L1 beside the source, to be written.
///
/// Peers have read them, so each store would wait for its line to be taken from them, and few
/// stores wait at once: an 8 KiB all-reduce over two ranks took 2.4 us instead of 1.8.
#[inline]
fn prefetch_to_write(bytes: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes[..bytes.len().min(16 << 10)].chunks(ALIGN) {
        // SAFETY: a hint, which changes no memory and no register and cannot fault; processors
        // that do not know it pass over it.
        unsafe {
            std::arch::asm!(
                "prefetchw [{}]",
                in(reg) line.as_ptr(),
                options(nostack, preserves_flags)
            );
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}
