//! Time, and who knows how much of whose: epochs, what a warp's lanes know, and how barriers
//! and releases hand it on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::Race;
use super::order::{Mark, Pending};
use crate::machine::Warp;
use crate::registers::{FULL, LANES, Lanes, lanes};

/// A thread and its time, in one word: block (27 bits), warp and lane (5 each), time (26).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epoch(pub(crate) u64);

pub(super) const TIME_BITS: u32 = 26;

impl Epoch {
    #[inline(always)]
    pub(super) fn new(block: u64, warp: u32, lane: usize, time: u32) -> Self {
        let time = u64::from(time).min((1 << TIME_BITS) - 1);
        Self(
            (block & ((1 << 27) - 1)) << 36
                | u64::from(warp) << 31
                | (lane as u64) << TIME_BITS
                | time,
        )
    }

    #[inline(always)]
    pub(super) fn with_lane(self, lane: usize) -> Self {
        Self(self.0 | (lane as u64) << TIME_BITS)
    }

    #[inline(always)]
    pub(super) fn block(self) -> u64 {
        self.0 >> 36
    }

    #[inline(always)]
    pub(super) fn warp(self) -> u32 {
        (self.0 >> 31) as u32 & 31
    }

    #[inline(always)]
    pub(super) fn lane(self) -> usize {
        (self.0 >> TIME_BITS) as usize & 31
    }

    #[inline(always)]
    pub(super) fn time(self) -> u32 {
        self.0 as u32 & ((1 << TIME_BITS) - 1)
    }

    /// The same thread at another time.
    pub(super) fn at(self, time: u32) -> Self {
        Self::new(self.block(), self.warp(), self.lane(), time)
    }

    /// The thread, without its time.
    #[inline(always)]
    pub(super) fn thread(self) -> u64 {
        self.0 >> TIME_BITS
    }

    /// The warp, without lane and time.
    #[inline(always)]
    pub(super) fn of_warp(self) -> u64 {
        self.0 >> (TIME_BITS + 5)
    }
}

/// Knowledge that came from elsewhere: of each block, how far of each lane of its warps, sorted
/// by block; and of each stream, how many of its pieces of work. What whole blocks know is handed
/// around unchanged most of the time, so it is shared: to learn what one knows already is to
/// compare pointers.
#[derive(Debug, Clone, Default)]
pub struct Knowledge {
    blocks: Vec<(u64, Arc<Vec<Lanes>>)>,
    streams: BTreeMap<u32, u64>,
}

impl Knowledge {
    /// Of some warps of one block.
    fn of_block(block: u64, warps: Vec<Lanes>) -> Self {
        Self {
            blocks: vec![(block, Arc::new(warps))],
            ..Self::default()
        }
    }

    /// How far it knows of the lanes of an access's warp.
    pub(super) fn of_warp(&self, epoch: Epoch) -> Option<&Lanes> {
        let found = self.blocks.binary_search_by_key(&epoch.block(), |b| b.0);
        let warps = &self.blocks[found.ok()?].1;
        warps.get(epoch.warp() as usize)
    }

    /// Whether it tells of an access.
    pub(super) fn knows(&self, epoch: Epoch) -> bool {
        let warp = self.of_warp(epoch);
        warp.is_some_and(|times| times[epoch.lane()] > epoch.time())
    }

    /// How many of the pieces of work of a stream.
    #[inline(always)]
    pub(super) fn of_stream(&self, stream: u32) -> u64 {
        self.streams.get(&stream).copied().unwrap_or(0)
    }

    /// Learns how far of the warps of a block.
    pub(super) fn add(&mut self, block: u64, warps: &Arc<Vec<Lanes>>) {
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

    /// Learns all that the other knows.
    pub(super) fn learn(&mut self, other: &Self) {
        for (block, warps) in &other.blocks {
            self.add(*block, warps);
        }
        for (&stream, &number) in &other.streams {
            let known = self.streams.entry(stream).or_default();
            *known = number.max(*known);
        }
    }

    /// Whether the other knows nothing besides.
    fn covers(&self, other: &Self) -> bool {
        let blocks = other.blocks.iter().all(|(block, theirs)| {
            let found = self.blocks.binary_search_by_key(block, |b| b.0);
            found.is_ok_and(|at| {
                let own = &self.blocks[at].1;
                Arc::ptr_eq(own, theirs) || !has_news(own, theirs)
            })
        });
        blocks && other.streams.iter().all(|(&s, &n)| self.of_stream(s) >= n)
    }

    /// Forgets of single blocks what knowing their whole launch implies: or what is handed from
    /// launch to launch would grow with every one.
    pub(super) fn prune(&mut self, race: &Race) {
        let streams = &self.streams;
        self.blocks.retain(|&(block, _)| {
            let actor = &race.actors[block as usize];
            block >= race.settled && streams.get(&actor.stream).is_none_or(|&n| n < actor.number)
        });
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

/// What a lane knows; None is nothing.
type Known = Option<Arc<Knowledge>>;

fn join(mine: &mut Known, other: &Known) {
    let Some(other) = other else { return };
    match mine {
        None => *mine = Some(other.clone()),
        Some(own) if Arc::ptr_eq(own, other) || own.covers(other) => {}
        Some(own) => Arc::make_mut(own).learn(other),
    }
}

fn same(a: &Known, b: &Known) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

/// What a stream (or the host) knows: what is done, of each stream, and what the threads of its
/// finished kernels had learned through flags.
#[derive(Debug, Clone, Default)]
pub struct StreamClock {
    pub(super) known: Knowledge,
}

impl StreamClock {
    /// A piece of work of the stream is done.
    pub fn tick(&mut self, stream: u32) {
        *self.known.streams.entry(stream).or_default() += 1;
    }

    /// Learns what the other knows.
    pub fn join(&mut self, other: &Self) {
        self.known.learn(&other.known);
    }

    /// Learns what the threads of an ended block knew.
    pub fn learn(&mut self, warps: &[Warp]) {
        let mut last = None;
        let all = warps.iter().flat_map(|warp| &warp.clock.learned);
        for known in all.filter_map(|learned| learned.sure.as_ref()) {
            if last.is_none_or(|last| !Arc::ptr_eq(last, known)) {
                self.known.learn(known);
            }
            last = Some(known);
        }
    }

    /// Forgets what is known otherwise.
    pub fn prune(&mut self, race: &Race) {
        self.known.prune(race);
    }

    /// Forgets streams that are gone, of which all is known otherwise.
    pub fn settle(&mut self, race: &Race, is_there: impl Fn(u32) -> bool) {
        self.known.streams.retain(|&stream, _| is_there(stream));
        self.prune(race);
    }

    pub(super) fn of(&self, stream: u32) -> u64 {
        self.known.of_stream(stream)
    }
}

/// What a thread has learned from others.
#[derive(Debug, Clone, Default)]
pub(super) struct Learned {
    /// Through releases and acquires.
    pub(super) sure: Option<Arc<Knowledge>>,
    /// Through the order of `fence.sc` besides: it hides old values, but since another run may
    /// order the fences the other way, it excuses no race.
    pub(super) fenced: Option<Arc<Knowledge>>,
}

impl Learned {
    pub(super) fn join(&mut self, other: &Self) {
        join(&mut self.sure, &other.sure);
        join(&mut self.fenced, &other.fenced);
    }

    fn of(known: Knowledge) -> Self {
        Self {
            sure: Some(Arc::new(known)),
            fenced: None,
        }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        same(&self.sure, &other.sure) && same(&self.fenced, &other.fenced)
    }
}

/// Lanes learn the same: those that knew the same before know the same afterwards.
fn join_lanes(all: &mut [Learned; LANES], mask: u32, other: &Learned) {
    let mut last: Option<(Learned, usize)> = None;
    for lane in lanes(mask) {
        match &last {
            Some((before, as_lane)) if before.is_same(&all[lane]) => {
                all[lane] = all[*as_lane].clone();
            }
            _ => {
                let before = all[lane].clone();
                all[lane].join(other);
                last = Some((before, lane));
            }
        }
    }
}

/// What the lanes of a warp know of their own block.
#[derive(Debug, Clone)]
pub(super) struct Near {
    /// The lanes of `together` know of each other's accesses before `met`.
    met: u32,
    together: u32,
    /// What lanes know of each other beyond that: `pairs[x][y]` is how far `x` knows of `y`.
    pairs: Option<Box<[[u32; LANES]; LANES]>>,
    /// How far all lanes know of the warps of their block.
    pub(super) known: [u32; LANES],
}

impl Near {
    /// How far lane `x` knows of lane `y` of its own warp.
    pub(super) fn of_lane(&self, x: usize, y: usize) -> u32 {
        let met = if self.together >> x & self.together >> y & 1 != 0 {
            self.met
        } else {
            0
        };
        self.pairs.as_ref().map_or(met, |p| met.max(p[x][y]))
    }

    /// How far every lane knows of all lanes of its own warp.
    #[inline(always)]
    pub(super) fn of_all(&self) -> u32 {
        if self.together == FULL { self.met } else { 0 }
    }

    fn meet(&mut self, members: u32, time: u32) {
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
    }

    /// What lane `x` of a warp knows of its own block, with its own accesses before `own`: of
    /// the warps in `which`.
    pub(super) fn tell(&self, warp: u32, x: usize, own: u32, which: u32) -> Arc<Vec<Lanes>> {
        let last = self.known.iter().rposition(|&known| known > 0);
        let count = last.map_or(0, |last| last + 1).max(warp as usize + 1);
        let known = self.known[..count].iter().enumerate();
        let mut warps: Vec<Lanes> = known.map(|(w, &k)| [k * (which >> w & 1); LANES]).collect();
        if which >> warp & 1 != 0 {
            warps[warp as usize] =
                std::array::from_fn(|y| if y == x { own } else { self.of_lane(x, y) });
        }
        Arc::new(warps)
    }
}

/// What a warp's lanes know.
#[derive(Debug)]
pub struct WarpClock {
    /// Accesses made now have this time.
    pub(super) time: u32,
    pub(super) near: Near,
    /// What single lanes have learned from elsewhere.
    pub(super) learned: [Learned; LANES],
    /// The last fences of each lane that publish: the last that is at least at block, at device
    /// and at system scope.
    pub(super) marks: [[Option<Arc<Mark>>; 3]; LANES],
    /// What relaxed reads found at flags, for the lane's next fence to acquire.
    pub(super) pending: Vec<Pending>,
    /// What lanes learned last: who spins reads the same over and over.
    heard: VecDeque<(usize, Learned)>,
}

/// See `WarpClock::heard`.
const MOST_HEARD: usize = 16;

impl Default for WarpClock {
    fn default() -> Self {
        Self {
            time: 1,
            near: Near {
                met: 0,
                together: 0,
                pairs: None,
                known: [0; LANES],
            },
            learned: [const {
                Learned {
                    sure: None,
                    fenced: None,
                }
            }; LANES],
            marks: [const { [const { None }; 3] }; LANES],
            pending: Vec::new(),
            heard: VecDeque::new(),
        }
    }
}

impl WarpClock {
    pub(super) fn advance(&mut self) -> u32 {
        self.time += 1;
        self.time
    }

    /// A lane learns what a release left at a flag.
    pub(super) fn learn(&mut self, lane: usize, learned: &Learned) {
        let again = |heard: &&(usize, Learned)| heard.0 == lane && heard.1.is_same(learned);
        if self.heard.iter().find(again).is_some() {
            return;
        }
        self.learned[lane].join(learned);
        if self.heard.len() == MOST_HEARD {
            self.heard.pop_front();
        }
        self.heard.push_back((lane, learned.clone()));
    }

    /// The lanes of `members` learn of each other's accesses so far, and of what each of them
    /// knows.
    pub(super) fn meet(&mut self, members: u32) {
        let time = self.advance();
        self.near.meet(members, time);
        let mut joined = Learned::default();
        for lane in lanes(members) {
            joined.join(&self.learned[lane]);
        }
        for lane in lanes(members) {
            if !self.learned[lane].is_same(&joined) {
                self.learned[lane].clone_from(&joined);
            }
        }
    }
}

/// The lanes of `members` met in an operation that orders memory between them.
pub fn warp_sync(warp: &mut Warp, members: u32) {
    warp.clock.meet(members);
}

/// A barrier completed: of each warp, the lanes that arrived (their accesses are published) and
/// those that waited (they learn of what was published).
pub fn barrier(block: u64, warps: &mut [Warp], arrived: &[u32], waited: &[u32]) {
    let mut known = [0u32; LANES];
    let mut learned = Learned::default();
    let mut partial: Vec<Lanes> = Vec::new();
    for (w, warp) in warps.iter_mut().enumerate() {
        if arrived[w] == 0 {
            continue;
        }
        // What the lanes of a warp know of each other goes along with what they did.
        warp.clock.meet(arrived[w] | (warp.existing & !warp.live));
        let time = warp.clock.time;
        for (known, &other) in known.iter_mut().zip(&warp.clock.near.known) {
            *known = other.max(*known);
        }
        if arrived[w] & warp.live == warp.live {
            known[w] = known[w].max(time);
        } else {
            let times = std::array::from_fn(|l| if arrived[w] >> l & 1 != 0 { time } else { 0 });
            partial.resize(w + 1, [0; LANES]);
            partial[w] = times;
        }
        if let Some(lane) = lanes(arrived[w]).next() {
            learned.join(&warp.clock.learned[lane]);
        }
    }
    if !partial.is_empty() {
        learned.join(&Learned::of(Knowledge::of_block(block, partial)));
    }
    for (w, warp) in warps.iter_mut().enumerate() {
        if waited[w] == 0 {
            continue;
        }
        let mut learned = learned.clone();
        if waited[w] & warp.live == warp.live {
            for (own, &new) in warp.clock.near.known.iter_mut().zip(&known) {
                *own = new.max(*own);
            }
        } else {
            let lent = known.iter().map(|&time| [time; LANES]).collect();
            learned.join(&Learned::of(Knowledge::of_block(block, lent)));
        }
        join_lanes(&mut warp.clock.learned, waited[w], &learned);
    }
}
