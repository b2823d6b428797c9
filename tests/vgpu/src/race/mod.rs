//! The memory model: who knows of whose accesses, which accesses nothing orders, and which old
//! values a strong read may still return. After the PTX ISA, "Memory Consistency Model".
//!
//! **Happens-before.** Every access has an *epoch*: the thread that made it and that thread's
//! time. A warp's time advances whenever what its lanes have done is handed on (a barrier, a
//! release, a fence), so "T knows all of warp W's accesses before time t" says everything there
//! is to say about ordering. What a lane knows has four parts (`clock`): of its own warp
//! (`bar.warp.sync`), of the other warps of its block (barriers), of threads elsewhere (flags),
//! and of finished work (streams). Knowledge is only ever handed on whole, so it is transitive:
//! that is base causality order. Shuffles and votes order nothing.
//!
//! **Races.** Memory keeps, for each word, the epoch of the last write and the reads since
//! (`shadow`). An access that finds an epoch its thread does not know is a race, unless the two
//! are morally strong: both strong, scopes that include each other, the same size.
//!
//! **Flags.** A strong write keeps, with its own scope, every release pattern that it ends: the
//! scope of the release or fence and what its thread knew then (`order`). A read-modify-write
//! hands on the patterns of the write it reads, if the two are morally strong (observation
//! order). A strong read that is morally strong with the write joins those patterns whose first
//! operation is morally strong with its acquire; a relaxed read keeps them for a later fence.
//!
//! **Old values.** Words that strong writes touch keep their last writes in coherence order
//! (`history`), each with the reads that saw it. That list is all there is of a *view*: a strong
//! read may take any write that is not older than the newest one which its thread knows, or of
//! which it knows a read. Why each axiom holds:
//!
//! - *Coherence, Causality*: a write that precedes a read or write in causality order is known to
//!   it, or was read (strongly) by something known to it: causality is base causality, perhaps
//!   after one observation. Older writes are not offered to the read, and the write goes behind.
//! - *SC per location*: a thread knows its own reads and writes, and they move forward only.
//! - *Atomicity*: a read-modify-write reads the newest write and comes right behind it; no store
//!   is put before a read-modify-write.
//! - *Fence-SC*: each `fence.sc` learns what all earlier ones that are morally strong with it
//!   knew (a table a block, a device, the system). That hides old values but excuses no race: in
//!   another run the fences come in the other order.
//! - *No thin air*: operations run in program order on values that exist.
//!
//! A store may be put before others that its thread does not know, so that `2+2W`, `R` and `S`
//! appear. Which value a read takes is drawn from the seed ([`Stale`]); after 64 old values of one
//! write the new one is seen, so that spinners end.
//!
//! **Not modelled**: load buffering (a read that sees a store after it); read-modify-writes that
//! lose atomicity because their scopes are too narrow (the scopes are reported as a race); old
//! values of weak reads (reported as races as well), of words accessed in several sizes, of one-
//! and two-byte words overlapping others, and beyond the last eight writes; clusters count as
//! blocks. Stores of the host to mapped memory that nobody told of appear as writes at system
//! scope that release nothing.

mod agent;
mod clock;
mod history;
mod order;
mod readers;
mod shadow;
mod words;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use agent::{Agent, Conflict, Memo};
pub use clock::{Epoch, Knowledge, StreamClock, WarpClock, barrier, warp_sync};
pub use history::{CountAccess, Counter, FlagAccess, Flags, Stale, count};
pub use order::{Fence, fence};
pub use shadow::{Cell, Row, Shadow};
pub use words::Notes;

use rustc_hash::FxHashMap;

use crate::finding::{Place, Thread};
use crate::machine::{Block, Launch};
use crate::memory::{self, Order, Scope};

/// What memory keeps of an operation that touched it, in one word: the operation's number (25
/// bits), how many words of memory a lane accesses at once (its logarithm, 2 bits; 3 says that
/// several lanes touched the word, each its own bytes), whether it is anything but a plain access
/// (strong, or through the non-coherent path: then [`Race`] knows the rest), and which bytes of
/// the word it touched (4 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Touch(u32);

impl Touch {
    /// Bits of the number of an operation.
    pub(crate) const OP_BITS: u32 = 25;
    /// Lanes that follow each other touched the word, with as many bytes each that do so too.
    const SPREAD: u32 = 3 << 5;

    #[inline(always)]
    fn new(op: u32, access: u32, special: bool, bytes: u8) -> Self {
        let words = (access >> 2 | 1).ilog2().min(2);
        Self(op << 7 | words << 5 | u32::from(special) << 4 | u32::from(bytes))
    }

    #[inline(always)]
    fn op(self) -> u32 {
        self.0 >> 7
    }

    /// The logarithm of the words that a lane accessed.
    fn words(self) -> u32 {
        self.0 >> 5 & 3
    }

    #[inline(always)]
    fn special(self) -> bool {
        self.0 & 16 != 0
    }

    #[inline(always)]
    fn bytes(self) -> u8 {
        self.0 as u8 & 15
    }

    fn same_operation(self, other: Self) -> bool {
        self.0 >> 4 == other.0 >> 4
    }

    #[inline(always)]
    fn is_spread(self) -> bool {
        self.0 & Self::SPREAD == Self::SPREAD
    }

    /// The touch of some lanes by which one more lane has touched its own bytes of the word: the
    /// same if it is one of them, or spread one lane further.
    #[inline(always)]
    fn spread(self, lanes: u32, new: Self, lane: usize) -> Option<Self> {
        let (count, size) = (lanes.count_ones(), new.bytes().count_ones());
        let same = (self.0 ^ new.0) & !(Self::SPREAD | 15) == 0;
        let alike = self.bytes().count_ones() == count * size && (self.is_spread() || count == 1);
        let nth = (lane as u32).wrapping_sub(lanes.trailing_zeros());
        let first = new.bytes().trailing_zeros();
        let in_line = first
            == self
                .bytes()
                .trailing_zeros()
                .wrapping_add(nth.wrapping_mul(size));
        if size > 2 || !(same && alike && in_line) {
            None
        } else if nth < count {
            Some(self)
        } else {
            (nth == count).then_some(Self(self.0 | Self::SPREAD | u32::from(new.bytes())))
        }
    }

    /// Of the lanes that touched a word, those that touched some of these bytes.
    #[inline(always)]
    fn lanes_of(self, lanes: u32, bytes: u8) -> u32 {
        if !self.is_spread() {
            return lanes;
        }
        let first = self.bytes().trailing_zeros();
        let size = (self.bytes().count_ones() / lanes.count_ones().max(1)).max(1);
        let touched = (0..lanes.count_ones()).filter(|nth| {
            let own = ((1u32 << size) - 1) << (first + nth * size);
            own & u32::from(bytes) != 0
        });
        touched.fold(0, |some, nth| some | 1 << (lanes.trailing_zeros() + nth))
    }
}

/// What belongs to a block as a whole.
#[derive(Debug, Default)]
pub struct BlockClock {
    /// What it remembers of flags and fences.
    pub notes: Notes,
}

/// What a launch knows of other work: set when it starts.
#[derive(Debug, Clone, Default)]
pub struct LaunchClock {
    stream: u32,
    number: u64,
    clock: StreamClock,
    /// Every block before this one is known.
    floor: u64,
}

/// What an operation's accesses are like: the same each time it runs.
#[derive(Debug, Clone)]
struct Access {
    place: Arc<Place>,
    order: Order,
    scope: Scope,
    /// Bytes of an element, and of the whole.
    element: u32,
    bytes: u32,
    non_coherent: bool,
}

impl Access {
    /// The scope of a strong access; None for a weak one.
    fn strong(&self) -> Option<Scope> {
        (self.order != Order::Weak).then_some(self.scope)
    }
}

/// Somebody who accesses memory: a block of a launch, or a piece of a stream's own work.
#[derive(Debug, Clone, Copy)]
struct Actor {
    device: u32,
    stream: u32,
    number: u64,
    /// `blockIdx` and `blockDim`; None for the host.
    block: Option<([u32; 3], [u32; 3])>,
}

/// The number of the operation that stands for all the host does.
const HOST_OP: u32 = 0;
/// The host is on no device: only the system scope includes it.
const NO_DEVICE: u32 = u32::MAX;

/// Where the choices of a seed begin.
fn first_random(seed: u64) -> u64 {
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed_0f01_d5a1_0e5d | 1
}

/// The tables of the race checks.
#[derive(Debug)]
pub struct Race {
    on: bool,
    actors: Vec<Actor>,
    /// The last piece of work each stream began.
    latest: BTreeMap<u32, u64>,
    /// Every actor before this one is known to all that is still to come.
    settled: u64,
    accesses: FxHashMap<u32, Access>,
    readers: readers::Readers,
    /// The host call in progress: its number among the actors, and what it knows.
    host: Option<(u64, LaunchClock)>,
    fences: order::FenceOrder,
    stale: Stale,
    random: u64,
}

impl Race {
    /// Nobody has done anything.
    pub fn new(on: bool, stale: Stale, seed: u64) -> Self {
        let nobody = Actor {
            device: NO_DEVICE,
            stream: 0,
            number: 0,
            block: None,
        };
        // Copies and fills are seen word by word by whoever polls them.
        let host = Access {
            place: Arc::new(Place::default()),
            order: Order::Relaxed,
            scope: Scope::Sys,
            element: 0,
            bytes: 0,
            non_coherent: false,
        };
        Self {
            on,
            actors: vec![nobody],
            latest: BTreeMap::new(),
            settled: 0,
            accesses: FxHashMap::from_iter([(HOST_OP, host)]),
            readers: readers::Readers::default(),
            host: None,
            fences: order::FenceOrder::default(),
            stale,
            random: first_random(seed),
        }
    }

    /// Starts the choices anew.
    pub fn set_seed(&mut self, seed: u64) {
        self.random = first_random(seed);
    }

    /// Chooses among old values so from now on.
    pub fn set_stale(&mut self, stale: Stale) {
        self.stale = stale;
    }

    /// xorshift64*: which of several values a load returns.
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Whether a scope reaches from a thread of one block to one of another, and back.
    fn includes(&self, scope: Scope, one: u64, other: u64) -> bool {
        let device = |block: u64| self.actors[block as usize].device;
        match scope {
            _ if one == other => true,
            Scope::Cta | Scope::Cluster => false,
            Scope::Gpu => device(one) == device(other) && device(one) != NO_DEVICE,
            Scope::Sys => true,
        }
    }

    /// Whether the checks are on.
    #[inline(always)]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// The clock of a piece of work that starts now in a stream.
    pub fn start(&mut self, stream: u32, clock: &StreamClock) -> LaunchClock {
        let next = self.actors.len() as u64;
        let all = self.latest.iter().all(|(&s, &n)| clock.of(s) >= n);
        let number = clock.of(stream) + 1;
        self.latest.insert(stream, number);
        let mut clock = clock.clone();
        clock.known.prune(self);
        LaunchClock {
            stream,
            number,
            clock,
            floor: if all { next } else { self.settled },
        }
    }

    /// What was done so far is known to all that is still to come: nothing is in progress. Nothing
    /// need be kept of streams that are gone.
    pub fn settle(&mut self, is_there: impl Fn(u32) -> bool) {
        self.settled = self.actors.len() as u64;
        self.latest.retain(|&stream, _| is_there(stream));
    }

    /// The host's accesses that follow belong to a piece of work of a stream.
    pub fn start_host(&mut self, stream: u32, clock: &StreamClock) {
        let clock = self.start(stream, clock);
        self.actors.push(Actor {
            device: NO_DEVICE,
            stream,
            number: clock.number,
            block: None,
        });
        self.host = Some((self.actors.len() as u64 - 1, clock));
    }

    /// The piece of work in progress wrote a flag.
    pub fn stream_wrote(&self, flags: &mut Flags, offset: u32, value: &[u8]) {
        if let Some((actor, launch)) = &self.host
            && self.on
        {
            let by = Epoch::new(*actor, 0, 0, 1);
            flags.stream_wrote(launch, by, offset, value);
        }
    }

    /// Whether the host's accesses are nobody's in particular.
    pub fn host_is_nobody(&self) -> bool {
        self.host.is_none()
    }

    /// The piece of work is done.
    pub fn end_host(&mut self) {
        self.host = None;
    }

    /// A block becomes resident; its number.
    pub fn start_block(&mut self, launch: &Launch, index: [u32; 3]) -> u64 {
        self.actors.push(Actor {
            device: launch.device,
            stream: launch.clock.stream,
            number: launch.clock.number,
            block: Some((index, launch.block)),
        });
        self.actors.len() as u64 - 1
    }

    /// A block has ended.
    pub fn end_block(&mut self, block: u64) {
        self.fences.end_block(block);
    }

    /// Makes an operation known.
    #[inline(always)]
    pub fn note(&mut self, id: u32, place: &Arc<Place>, access: &memory::Access) {
        self.accesses.entry(id).or_insert_with(|| Access {
            place: place.clone(),
            order: access.order,
            scope: access.scope,
            element: access.element,
            bytes: access.bytes,
            non_coherent: access.non_coherent,
        });
    }

    /// Makes a fence known.
    pub fn note_fence(&mut self, id: u32, place: &Arc<Place>, order: Order, scope: Scope) {
        self.accesses.entry(id).or_insert_with(|| Access {
            place: place.clone(),
            order,
            scope,
            element: 0,
            bytes: 0,
            non_coherent: false,
        });
    }

    /// Whether two operations' accesses are of the same kind.
    fn same_kind(&self, one: u32, other: u32) -> bool {
        let kind = |op| {
            let access = self.accesses.get(&op);
            access.map(|a| (a.strong(), a.element, a.non_coherent))
        };
        kind(one) == kind(other)
    }

    /// Who wrote a word last, and where in the code, in words; None where nobody did.
    pub fn last_writer(&self, shadow: &Shadow, word: u32) -> Option<String> {
        let (epoch, op) = shadow.last_write(word)?;
        Some(match self.describe(epoch, op) {
            (Some(place), Some(thread)) => format!("{place}, {thread}"),
            _ => "the host".to_owned(),
        })
    }

    /// Who made an access, and where in the code; nothing of either for the host.
    pub fn describe(&self, epoch: Epoch, op: u32) -> (Option<Place>, Option<Thread>) {
        let place = self.accesses.get(&op).map(|a| (*a.place).clone());
        let actor = &self.actors[epoch.block() as usize];
        let Some((block, [width, height, _])) = actor.block else {
            return (None, None);
        };
        let flat = 32 * epoch.warp() + epoch.lane() as u32;
        let thread = Thread {
            device: actor.device,
            block,
            thread: [flat % width, flat / width % height, flat / width / height],
        };
        (place, Some(thread))
    }

    /// Whether a launch (or the host) knows all that another actor has done.
    fn knows_actor(&self, clock: &LaunchClock, actor: u64) -> bool {
        if actor < clock.floor {
            return true;
        }
        let actor = &self.actors[actor as usize];
        clock.clock.of(actor.stream) >= actor.number
    }

    /// Whether what came through flags tells of an access.
    fn knows_through(&self, known: &Knowledge, epoch: Epoch) -> bool {
        known.knows(epoch) || self.knows_stream(known, epoch)
    }

    /// Whether it tells of the whole piece of work of which an access is part.
    fn knows_stream(&self, known: &Knowledge, epoch: Epoch) -> bool {
        let actor = &self.actors[epoch.block() as usize];
        let is_known =
            epoch.block() < self.settled || known.of_stream(actor.stream) >= actor.number;
        is_known && actor.number > 0
    }

    /// What is missing between two accesses, in words.
    fn missing(&self, one: Epoch, other: Epoch) -> &'static str {
        let (a, b) = (
            &self.actors[one.block() as usize],
            &self.actors[other.block() as usize],
        );
        if one.block() == other.block() {
            if one.warp() == other.warp() {
                "lanes of one warp: __syncwarp() would order them"
            } else {
                "warps of one block: a barrier such as __syncthreads() would order them"
            }
        } else if a.device != b.device && a.block.is_some() && b.block.is_some() {
            "threads of different devices: a release and an acquire at system scope would order \
             them"
        } else if (a.stream, a.number) == (b.stream, b.number) {
            "different blocks: a release and an acquire at device scope would order them"
        } else {
            "different streams: an event or a synchronisation would order them"
        }
    }
}

/// A block becomes resident.
pub fn start_block(race: &mut Race, launch: &Launch, block: &mut Block) {
    block.uid = race.start_block(launch, block.index);
}
