//! Happens-before: who knows of whose accesses, and which accesses nothing orders.
//!
//! Every access has an *epoch*: the thread that made it and that thread's time. A warp's time
//! advances whenever what its lanes have done is handed on (a barrier, a warp's barrier, a
//! release), so "thread T knows all of warp W's accesses before time t" says everything there is
//! to say about ordering. Memory keeps, for each word, the epoch of the last write and the set
//! of reads since (`shadow`); an access that finds an epoch there which its thread does not
//! know is a race, unless both are strong and their scopes include each other ("morally strong",
//! PTX ISA, "Memory Consistency Model").
//!
//! What a lane knows has three parts: of its own warp (`bar.warp.sync`), of the other warps of
//! its block (barriers), and of threads elsewhere, which it learned of through flags: a release
//! leaves what the releasing thread knows at the flag, an acquire that reads the flag joins it.
//! Shuffles and votes order nothing (the ISA gives them no memory ordering).

mod agent;
mod readers;
mod shadow;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use agent::{Agent, Conflict};
pub use shadow::{Cell, Shadow};

use rustc_hash::FxHashMap;

use crate::finding::{Place, Thread};
use crate::machine::{Block, Launch, Warp};
use crate::memory::{Order, Scope};
use crate::registers::{FULL, LANES, Lanes, lanes};

/// What a stream (or the host) knows: of each stream, how many of its pieces of work are done.
#[derive(Debug, Clone, Default)]
pub struct StreamClock {
    known: BTreeMap<u32, u64>,
}

impl StreamClock {
    /// A piece of work of the stream is done.
    pub fn tick(&mut self, stream: u32) {
        *self.known.entry(stream).or_default() += 1;
    }

    /// Learns what the other knows.
    pub fn join(&mut self, other: &Self) {
        for (&stream, &time) in &other.known {
            let known = self.known.entry(stream).or_default();
            *known = time.max(*known);
        }
    }

    fn of(&self, stream: u32) -> u64 {
        self.known.get(&stream).copied().unwrap_or(0)
    }
}

/// A thread and its time, in one word: block (27 bits), warp and lane (5 each), time (26).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epoch(pub(crate) u64);

const TIME_BITS: u32 = 26;

impl Epoch {
    fn new(block: u64, warp: u32, lane: usize, time: u32) -> Self {
        let time = u64::from(time).min((1 << TIME_BITS) - 1);
        Self(
            (block & ((1 << 27) - 1)) << 36
                | u64::from(warp) << 31
                | (lane as u64) << TIME_BITS
                | time,
        )
    }

    fn with_lane(self, lane: usize) -> Self {
        Self(self.0 | (lane as u64) << TIME_BITS)
    }

    fn block(self) -> u64 {
        self.0 >> 36
    }

    fn warp(self) -> u32 {
        (self.0 >> 31) as u32 & 31
    }

    fn lane(self) -> usize {
        (self.0 >> TIME_BITS) as usize & 31
    }

    fn time(self) -> u32 {
        self.0 as u32 & ((1 << TIME_BITS) - 1)
    }
}

/// What memory keeps of an operation that touched it, in one word: the operation's number,
/// whether it is anything but a plain access (strong, or through the non-coherent path: then
/// [`Race`] knows the rest), and which bytes of the word it touched (4 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Touch(u32);

impl Touch {
    #[inline(always)]
    fn new(op: u32, special: bool, bytes: u8) -> Self {
        Self(op << 5 | u32::from(special) << 4 | u32::from(bytes))
    }

    fn op(self) -> u32 {
        self.0 >> 5
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
}

/// Knowledge that came through flags: of each block, how far of each lane of its warps. Sorted
/// by block. What whole blocks know is handed around unchanged most of the time, so it is shared:
/// to learn what one knows already is to compare pointers.
#[derive(Debug, Clone, Default)]
pub struct Knowledge {
    blocks: Vec<(u64, Arc<Vec<Lanes>>)>,
}

impl Knowledge {
    /// Of some warps of one block.
    fn of_block(block: u64, warps: Vec<Lanes>) -> Self {
        Self {
            blocks: vec![(block, Arc::new(warps))],
        }
    }

    /// How far of a lane.
    #[inline(always)]
    fn of_lane(&self, block: u64, warp: u32, lane: usize) -> u32 {
        let found = self.blocks.binary_search_by_key(&block, |b| b.0);
        let warps = found.ok().map(|at| &self.blocks[at].1);
        warps
            .and_then(|w| w.get(warp as usize))
            .map_or(0, |times| times[lane])
    }

    /// Learns how far of the warps of a block.
    fn add(&mut self, block: u64, warps: &Arc<Vec<Lanes>>) {
        match self.blocks.binary_search_by_key(&block, |b| b.0) {
            Err(at) => self.blocks.insert(at, (block, warps.clone())),
            Ok(at) => {
                let own = &mut self.blocks[at].1;
                if Arc::ptr_eq(own, warps) || !has_news(own, warps) {
                    return;
                }
                if !has_news(warps, own) {
                    own.clone_from(warps);
                    return;
                }
                let merged = Arc::make_mut(own);
                if merged.len() < warps.len() {
                    merged.resize(warps.len(), [0; LANES]);
                }
                for (own, new) in merged.iter_mut().zip(warps.iter()) {
                    for (own, &new) in own.iter_mut().zip(new) {
                        *own = new.max(*own);
                    }
                }
            }
        }
    }

    /// Whether it concerns this block alone.
    fn is_of(&self, block: u64) -> bool {
        self.blocks.iter().all(|b| b.0 == block)
    }
}

/// Whether `new` has anything later than `own`.
fn has_news(own: &[Lanes], new: &[Lanes]) -> bool {
    new.iter()
        .enumerate()
        .any(|(warp, new)| match own.get(warp) {
            // Without a way out of the loop it is a few vector instructions.
            Some(own) => own.iter().zip(new).fold(false, |any, (o, n)| any | (n > o)),
            None => new.iter().any(|&n| n > 0),
        })
}

fn join(mine: &mut Option<Arc<Knowledge>>, other: &Arc<Knowledge>) {
    let Some(own) = mine else {
        *mine = Some(other.clone());
        return;
    };
    if Arc::ptr_eq(own, other) {
        return;
    }
    let news = other.blocks.iter().any(|(block, theirs)| {
        match own.blocks.binary_search_by_key(block, |b| b.0) {
            Err(_) => true,
            Ok(at) => {
                let own = &own.blocks[at].1;
                !Arc::ptr_eq(own, theirs) && has_news(own, theirs)
            }
        }
    });
    if !news {
        return;
    }
    let own = Arc::make_mut(own);
    for (block, warps) in &other.blocks {
        own.add(*block, warps);
    }
}

/// What a lane knows; None is nothing.
type Known = Option<Arc<Knowledge>>;

fn same(a: &Known, b: &Known) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

/// Lanes learn the same: those that knew the same before know the same afterwards.
fn join_lanes(extra: &mut [Known; LANES], mask: u32, other: &Arc<Knowledge>) {
    let mut last: Option<(Known, Known)> = None;
    for lane in lanes(mask) {
        match &last {
            Some((before, after)) if same(before, &extra[lane]) => extra[lane].clone_from(after),
            _ => {
                let before = extra[lane].clone();
                join(&mut extra[lane], other);
                last = Some((before, extra[lane].clone()));
            }
        }
    }
}

/// What a warp's lanes know.
#[derive(Debug)]
pub struct WarpClock {
    /// Accesses made now have this time.
    time: u32,
    /// The lanes of `together` know of each other's accesses before `met`.
    met: u32,
    together: u32,
    /// What lanes know of each other beyond that: `pairs[x][y]` is how far `x` knows of `y`.
    pairs: Option<Box<[[u32; LANES]; LANES]>>,
    /// How far all lanes know of the warps of their block.
    known: [u32; LANES],
    /// What single lanes know besides.
    extra: [Option<Arc<Knowledge>>; LANES],
    /// The last fence of each lane that publishes: its time and scope.
    fences: [Option<(u32, Scope)>; LANES],
    /// What strong reads found at flags, to be joined at the lane's next fence.
    pending: Vec<(usize, Scope, Arc<Knowledge>)>,
}

impl Default for WarpClock {
    fn default() -> Self {
        Self {
            time: 1,
            met: 0,
            together: 0,
            pairs: None,
            known: [0; LANES],
            extra: [const { None }; LANES],
            fences: [None; LANES],
            pending: Vec::new(),
        }
    }
}

impl WarpClock {
    /// How far lane `x` knows of lane `y` of its own warp.
    fn of_lane(&self, x: usize, y: usize) -> u32 {
        let met = if self.together >> x & self.together >> y & 1 != 0 {
            self.met
        } else {
            0
        };
        self.pairs.as_ref().map_or(met, |p| met.max(p[x][y]))
    }

    fn advance(&mut self) -> u32 {
        self.time += 1;
        self.time
    }

    /// The lanes of `members` learn of each other's accesses so far, and of what each of them
    /// knows.
    fn meet(&mut self, members: u32) {
        let time = self.advance();
        if self.pairs.is_some() || (self.met != 0 && self.together != members) {
            let mut pairs = self
                .pairs
                .take()
                .unwrap_or_else(|| Box::new([[0; LANES]; LANES]));
            for x in lanes(self.together) {
                for y in lanes(self.together) {
                    pairs[x][y] = pairs[x][y].max(self.met);
                }
            }
            let mut joined = [0; LANES];
            for x in lanes(members) {
                for (joined, &known) in joined.iter_mut().zip(&pairs[x]) {
                    *joined = known.max(*joined);
                }
            }
            for x in lanes(members) {
                pairs[x] = joined;
            }
            // With all lanes together the past is of no interest any more.
            self.pairs = (members != FULL).then_some(pairs);
        }
        self.met = time;
        self.together = members;
        self.share(members);
    }

    /// The lanes of `members` learn what any of them learned through flags.
    fn share(&mut self, members: u32) {
        let Some(first) = lanes(members).find_map(|l| self.extra[l].clone()) else {
            return;
        };
        let mut joined = Some(first);
        for lane in lanes(members) {
            if let Some(other) = &self.extra[lane] {
                join(&mut joined, other);
            }
        }
        for lane in lanes(members) {
            if !same(&self.extra[lane], &joined) {
                self.extra[lane].clone_from(&joined);
            }
        }
    }

    /// All that lane `x` could tell another, with its own accesses before `own`.
    fn snapshot(&self, block: u64, warp: u32, x: usize, own: u32) -> Arc<Knowledge> {
        let mut all = self.extra[x]
            .as_ref()
            .map_or_else(Knowledge::default, |extra| (**extra).clone());
        let last = self.known.iter().rposition(|&known| known > 0);
        let count = last.map_or(0, |last| last + 1).max(warp as usize + 1);
        let mut warps: Vec<Lanes> = self.known[..count].iter().map(|&k| [k; LANES]).collect();
        warps[warp as usize] =
            std::array::from_fn(|y| if y == x { own } else { self.of_lane(x, y) });
        all.add(block, &Arc::new(warps));
        Arc::new(all)
    }
}

/// What belongs to a block as a whole.
#[derive(Debug, Default)]
pub struct BlockClock {}

/// What a launch knows of other work: set when it starts.
#[derive(Debug, Clone, Default)]
pub struct LaunchClock {
    stream: u32,
    number: u64,
    clock: StreamClock,
    /// Every block before this one is known.
    floor: u64,
    /// The first block that can belong to the launch.
    first: u64,
}

/// What an operation's accesses are like: the same each time it runs.
#[derive(Debug, Clone)]
struct Access {
    place: Arc<Place>,
    /// The scope of a strong access; None for a weak one.
    strong: Option<Scope>,
    non_coherent: bool,
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

/// The tables of the race checks.
#[derive(Debug)]
pub struct Race {
    on: bool,
    actors: Vec<Actor>,
    /// The last piece of work each stream began.
    latest: BTreeMap<u32, u64>,
    accesses: FxHashMap<u32, Access>,
    readers: readers::Readers,
    /// The host call in progress: its number among the actors, and what it knows.
    host: Option<(u64, LaunchClock)>,
}

impl Race {
    /// Nobody has done anything.
    pub fn new(on: bool) -> Self {
        let nobody = Actor {
            device: 0,
            stream: 0,
            number: 0,
            block: None,
        };
        // Copies and fills are seen word by word by whoever polls them.
        let host = Access {
            place: Arc::new(Place::default()),
            strong: Some(Scope::Sys),
            non_coherent: false,
        };
        Self {
            on,
            actors: vec![nobody],
            latest: BTreeMap::new(),
            accesses: FxHashMap::from_iter([(HOST_OP, host)]),
            readers: readers::Readers::default(),
            host: None,
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
        LaunchClock {
            stream,
            number,
            clock: clock.clone(),
            floor: if all { next } else { 0 },
            first: next,
        }
    }

    /// The host's accesses that follow belong to a piece of work of a stream.
    pub fn start_host(&mut self, stream: u32, clock: &StreamClock) {
        let clock = self.start(stream, clock);
        self.actors.push(Actor {
            device: 0,
            stream,
            number: clock.number,
            block: None,
        });
        self.host = Some((self.actors.len() as u64 - 1, clock));
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

    /// Makes an operation known.
    #[inline(always)]
    pub fn note(
        &mut self,
        id: u32,
        place: &Arc<Place>,
        order: Order,
        scope: Scope,
        non_coherent: bool,
    ) {
        self.accesses.entry(id).or_insert_with(|| Access {
            place: place.clone(),
            strong: (order != Order::Weak).then_some(scope),
            non_coherent,
        });
    }

    /// Whether two operations' accesses are of the same kind.
    fn same_kind(&self, one: u32, other: u32) -> bool {
        let kind = |op| self.accesses.get(&op).map(|a| (a.strong, a.non_coherent));
        kind(one) == kind(other)
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

    /// What is missing between two accesses, in words.
    pub fn missing(&self, one: Epoch, other: Epoch) -> &'static str {
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
        } else if a.device != b.device {
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

/// The lanes of `members` met in an operation that orders memory between them.
pub fn warp_sync(warp: &mut Warp, members: u32) {
    warp.clock.meet(members);
}

/// A barrier completed: of each warp, the lanes that arrived (their accesses are published) and
/// those that waited (they learn of what was published).
pub fn barrier(block: u64, warps: &mut [Warp], arrived: &[u32], waited: &[u32]) {
    let mut known = [0u32; LANES];
    let mut extra: Option<Arc<Knowledge>> = None;
    let mut partial: Vec<Lanes> = Vec::new();
    for (w, warp) in warps.iter_mut().enumerate() {
        if arrived[w] == 0 {
            continue;
        }
        // What the lanes of a warp know of each other goes along with what they did.
        warp.clock.meet(arrived[w] | (warp.existing & !warp.live));
        let time = warp.clock.time;
        for (known, &other) in known.iter_mut().zip(&warp.clock.known) {
            *known = other.max(*known);
        }
        if arrived[w] & warp.live == warp.live {
            known[w] = known[w].max(time);
        } else {
            let times = std::array::from_fn(|l| if arrived[w] >> l & 1 != 0 { time } else { 0 });
            partial.resize(w + 1, [0; LANES]);
            partial[w] = times;
        }
        if let Some(lane) = lanes(arrived[w]).next()
            && let Some(other) = &warp.clock.extra[lane]
        {
            join(&mut extra, other);
        }
    }
    if !partial.is_empty() {
        join(&mut extra, &Arc::new(Knowledge::of_block(block, partial)));
    }
    for (w, warp) in warps.iter_mut().enumerate() {
        if waited[w] == 0 {
            continue;
        }
        let mut extra = extra.clone();
        if waited[w] & warp.live == warp.live {
            for (own, &new) in warp.clock.known.iter_mut().zip(&known) {
                *own = new.max(*own);
            }
        } else {
            let lent = known.iter().map(|&time| [time; LANES]).collect();
            join(&mut extra, &Arc::new(Knowledge::of_block(block, lent)));
        }
        if let Some(extra) = extra {
            join_lanes(&mut warp.clock.extra, waited[w], &extra);
        }
    }
}

/// A fence by the lanes of a mask.
pub fn fence(block: u64, warp: &mut Warp, mask: u32, order: Order, scope: Scope) {
    let clock = &mut warp.clock;
    if matches!(order, Order::Acquire | Order::AcqRel | Order::SeqCst) {
        let mut left = Vec::new();
        for (lane, written, knowledge) in std::mem::take(&mut clock.pending) {
            if mask >> lane & 1 == 0 {
                left.push((lane, written, knowledge));
            } else if includes(scope, &knowledge, block) && includes(written, &knowledge, block) {
                join(&mut clock.extra[lane], &knowledge);
            }
        }
        clock.pending = left;
    }
    if matches!(order, Order::Release | Order::AcqRel | Order::SeqCst) {
        let time = clock.advance();
        for lane in lanes(mask) {
            clock.fences[lane] = Some((time, scope));
        }
    }
}

/// Whether a scope reaches from a block to those whose knowledge came along. Knowledge within
/// the block is of use at any scope.
fn includes(scope: Scope, knowledge: &Knowledge, block: u64) -> bool {
    scope > Scope::Cluster || knowledge.is_of(block)
}

/// What a release left at a flag.
#[derive(Debug, Clone)]
pub struct Released {
    knowledge: Arc<Knowledge>,
    scope: Scope,
    bytes: u32,
}

/// Flags: what releases left at the words they wrote, by offset.
pub type Flags = FxHashMap<u32, Released>;

/// A strong access to a flag.
#[derive(Debug, Clone, Copy)]
pub struct FlagAccess {
    /// Where the flag is.
    pub offset: u32,
    /// Its size.
    pub bytes: u32,
    /// See [`Order`].
    pub order: Order,
    /// See [`Scope`].
    pub scope: Scope,
    /// A load or a read-modify-write.
    pub reads: bool,
    /// A store or a read-modify-write.
    pub writes: bool,
    /// Its own race check failed.
    pub raced: bool,
}

/// A strong access of one lane to a flag, after its race check.
pub fn flag(flags: &mut Flags, agent: &mut Agent, access: FlagAccess) {
    let FlagAccess {
        offset,
        bytes,
        order,
        scope,
        reads,
        writes,
        raced,
    } = access;
    let lane = agent.lane;
    let nothing = flags.is_empty();
    let found = match flags.get(&offset) {
        Some(flag) if reads && flag.bytes == bytes => Some(flag.clone()),
        _ => None,
    };
    if let Some(found) = &found {
        let reach = scope.min(found.scope);
        let clock = &mut agent.clock;
        // A flag whose own accesses race is reported as that; what it guards is a consequence.
        if raced || includes(reach, &found.knowledge, agent.block) {
            if matches!(order, Order::Acquire | Order::AcqRel | Order::SeqCst) {
                join(&mut clock.extra[lane], &found.knowledge);
            } else {
                clock
                    .pending
                    .retain(|(l, _, k)| *l != lane || !Arc::ptr_eq(k, &found.knowledge));
                clock.pending.push((lane, reach, found.knowledge.clone()));
            }
        }
    }
    if !writes {
        return;
    }
    let clock = &mut agent.clock;
    let own = if matches!(order, Order::Release | Order::AcqRel | Order::SeqCst) {
        let time = clock.advance();
        Some((time, scope))
    } else {
        clock.fences[lane].map(|(time, fence)| (time, fence.min(scope)))
    };
    let own = own.map(|(time, scope)| Released {
        knowledge: agent.clock.snapshot(agent.block, agent.warp, lane, time),
        scope,
        bytes,
    });
    // A read-modify-write hands on what it found: the release sequence goes through it.
    let left = match (own, found) {
        (Some(mut own), Some(found)) => {
            let mut both = Some(own.knowledge);
            join(&mut both, &found.knowledge);
            if let Some(both) = both {
                own.knowledge = both;
                own.scope = own.scope.min(found.scope);
                flags.insert(offset, own);
            }
            return;
        }
        (own, found) => own.or(found),
    };
    match left {
        Some(left) => flags.insert(offset, left),
        None if nothing => None,
        None => flags.remove(&offset),
    };
}
