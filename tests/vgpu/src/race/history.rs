//! Old values: the last writes to each word that strong accesses touch, in coherence order, and
//! which of them a strong read may return.

use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::agent::Agent;
use super::clock::{Epoch, WarpClock};
use super::order::{self, Release};
use super::words::{Note, Notes};
use super::{HOST_OP, LaunchClock, Race, Shadow, Touch};
use crate::finding::Reason;
use crate::memory::{Order, Scope};

/// Writes kept of one word.
const MOST_WRITES: usize = 8;
/// Readers kept of one write; with more, everybody counts as having seen it.
const MOST_READERS: usize = 16;
/// Reads of a word, by anyone, that may return an old value after its last write: whoever spins
/// must see it in the end.
const MOST_STALE: u32 = 64;

/// Which of the values that a strong load may return it does return.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stale {
    /// Always the newest.
    Newest,
    /// Mostly the newest, else any, by the seed.
    #[default]
    Random,
    /// The oldest there is: the adversary.
    Oldest,
}

impl Stale {
    /// By the name used in `VGPU_STALE`.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "newest" => Self::Newest,
            "random" => Self::Random,
            "oldest" => Self::Oldest,
            _ => return None,
        })
    }
}

/// A write to a word.
#[derive(Debug)]
struct Write {
    value: u64,
    by: Epoch,
    op: u32,
    /// The scope of a strong write.
    scope: Option<Scope>,
    /// Everybody knows of it, or nobody does but by reading it (the host's own stores).
    known: Known,
    /// A read-modify-write: nothing comes between it and the write before.
    modifies: bool,
    /// Why it releases nothing, and a fence that should have been here.
    flaw: Option<(Reason, u32)>,
    seen_by_all: bool,
    /// What most writes have nothing of.
    more: Option<Box<More>>,
}

#[derive(Debug, Default)]
struct More {
    /// The release patterns that it ends, or hands on.
    releases: Vec<Arc<Release>>,
    /// Who read it: a warp at a time.
    seen: Vec<(Epoch, u32)>,
}

impl More {
    fn of(releases: Vec<Arc<Release>>) -> Option<Box<Self>> {
        let seen = Vec::new();
        (!releases.is_empty()).then(|| Box::new(Self { releases, seen }))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    ToAll,
    ByEpoch,
    ToNobody,
}

impl Write {
    /// What was there before, or what somebody wrote that the checks were not told of.
    fn anonymous(value: u64, known: Known) -> Self {
        Self {
            value,
            by: Epoch(0),
            op: HOST_OP,
            scope: Some(Scope::Sys),
            known,
            modifies: false,
            flaw: None,
            seen_by_all: false,
            more: None,
        }
    }

    fn releases(&self) -> &[Arc<Release>] {
        self.more.as_ref().map_or(&[], |more| &more.releases)
    }

    fn seen(&self) -> &[(Epoch, u32)] {
        self.more.as_ref().map_or(&[], |more| &more.seen)
    }

    /// Whether happens-before hides all older writes from the lane: it knows of this one, or of
    /// a read of it.
    fn hides(&self, race: &Race, agent: &Agent) -> bool {
        let known = match self.known {
            Known::ToAll => true,
            Known::ByEpoch => agent.knows_fenced(race, self.by),
            Known::ToNobody => false,
        };
        known
            || self.seen_by_all
            || self.seen().iter().any(|&(warp, mask)| {
                crate::registers::lanes(mask)
                    .any(|lane| agent.knows_fenced(race, warp.with_lane(lane)))
            })
    }

    fn is_by(&self, thread: Epoch) -> bool {
        self.known == Known::ByEpoch && self.by.thread() == thread.thread()
    }

    fn seen_by(&mut self, reader: Epoch) {
        let warp = Epoch::new(reader.block(), reader.warp(), 0, reader.time());
        let lane = 1 << reader.lane();
        let all = &mut self.more.get_or_insert_default().seen;
        if let Some(seen) = all.iter_mut().find(|s| s.0 == warp) {
            seen.1 |= lane;
        } else if all.len() < MOST_READERS {
            all.push((warp, lane));
        } else {
            self.seen_by_all = true;
            all.clear();
        }
    }
}

/// The writes to one scalar, from the oldest.
#[derive(Debug)]
struct History {
    /// Where in its word it begins, and its bytes.
    at: u8,
    bytes: u8,
    /// Whether one of the writes, or one before them, ended a release pattern.
    releases: bool,
    stale: u32,
    writes: VecDeque<Write>,
    /// What those who count ask of the last write: they need not fetch it.
    last: Option<Last>,
}

/// See [`History::last`].
#[derive(Debug, Clone, Copy)]
struct Last {
    value: u64,
    by: Epoch,
    op: u32,
    flaw: Option<(Reason, u32)>,
}

/// The histories of a stretch of memory, by word.
#[derive(Debug, Default)]
pub struct Flags {
    words: Words,
}

/// Words at the beginning of a stretch of memory that have places of their own. Blocks count in
/// shared memory, of which there is not more than a few times that.
const PLACES: u32 = 1 << 12;

/// Histories by word: the first words in a table, for it is quicker than any hash.
#[derive(Debug, Default)]
struct Words {
    table: Vec<Option<History>>,
    in_table: usize,
    rest: FxHashMap<u32, History>,
}

impl Words {
    #[inline(always)]
    fn len(&self) -> usize {
        self.in_table + self.rest.len()
    }

    #[inline(always)]
    fn get_mut(&mut self, word: u32) -> Option<&mut History> {
        if word < PLACES {
            self.table.get_mut(word as usize)?.as_mut()
        } else {
            self.rest.get_mut(&word)
        }
    }

    fn get(&self, word: u32) -> Option<&History> {
        if word < PLACES {
            self.table.get(word as usize)?.as_ref()
        } else {
            self.rest.get(&word)
        }
    }

    fn insert(&mut self, word: u32, history: History) {
        if word >= PLACES {
            self.rest.insert(word, history);
            return;
        }
        let at = word as usize;
        if at >= self.table.len() {
            self.table
                .resize_with((at + 1).next_power_of_two(), || None);
        }
        let before = self.table[at].replace(history);
        self.in_table += usize::from(before.is_none());
    }

    fn remove(&mut self, word: u32) {
        if word >= PLACES {
            self.rest.remove(&word);
        } else if let Some(place) = self.table.get_mut(word as usize) {
            self.in_table -= usize::from(place.take().is_some());
        }
    }

    fn remove_all(&mut self, words: std::ops::Range<u32>) {
        if words.len() > self.len() {
            let end = words.end.min(self.table.len() as u32);
            (words.start..end).for_each(|word| self.remove(word));
            self.rest.retain(|word, _| !words.contains(word));
        } else {
            words.for_each(|word| self.remove(word));
        }
    }
}

/// A strong access of one lane to a scalar.
#[derive(Debug, Clone, Copy)]
pub struct FlagAccess {
    /// Where it is in its stretch of memory.
    pub offset: u32,
    /// Where it is for others.
    pub address: u64,
    /// Its size.
    pub bytes: u32,
    /// See [`Order`].
    pub order: Order,
    /// See [`Scope`].
    pub scope: Scope,
    /// What is in memory; None if nobody wrote it.
    pub old: Option<u64>,
    /// A load or a read-modify-write.
    pub reads: bool,
    /// A read-modify-write, though a compare-and-swap may fail.
    pub modifies: bool,
    /// What a store or a read-modify-write puts there.
    pub new: Option<u64>,
    /// Its own race check failed.
    pub raced: bool,
}

/// A lane about to count: to change a word by a relaxed read-modify-write.
#[derive(Debug, Clone, Copy)]
pub struct Counter {
    by: Epoch,
    op: u32,
    scope: Scope,
}

impl Counter {
    /// Of a block's warp; None if a fence of the lane may make a release of it.
    pub fn new(
        block: u64,
        warp: u32,
        lane: usize,
        clock: &WarpClock,
        op: u32,
        scope: Scope,
    ) -> Option<Self> {
        let by = Epoch::new(block, warp, lane, clock.time);
        let fenced = clock.marks[lane].iter().any(Option::is_some);
        (!fenced).then_some(Self { by, op, scope })
    }

    /// The epoch of its accesses.
    pub(super) fn epoch(&self) -> Epoch {
        self.by
    }

    /// What memory keeps of it.
    pub(super) fn touch(&self, bytes: u32) -> Touch {
        Touch::new(self.op, bytes, true, 15)
    }
}

/// What it does.
#[derive(Debug, Clone, Copy)]
pub struct CountAccess {
    /// Where the scalar is in its stretch of memory.
    pub offset: u32,
    /// Where it is for others.
    pub address: u64,
    /// Its size, 4 or 8.
    pub bytes: u32,
    /// What is in memory.
    pub old: u64,
    /// What comes there.
    pub new: u64,
}

impl Flags {
    /// Whether no word has a history.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.words.len() == 0
    }

    /// Forgets the histories that an access of this place and size touches in part only: it is
    /// not morally strong with theirs, and sees what is in memory.
    fn drop_others(&mut self, offset: u32, bytes: u32) {
        if self.words.len() == 0 {
            return;
        }
        let word = offset / 4;
        if bytes == 8 {
            self.words.remove(word + 1);
        } else if word % 2 == 1 && self.words.get(word - 1).is_some_and(|h| h.bytes == 8) {
            self.words.remove(word - 1);
        }
        self.words.remove(word);
    }

    /// Somebody wrote these bytes weakly, or in a way that orders everything: no older value
    /// can be read without a race.
    pub fn forget(&mut self, from: u32, to: u32) {
        let first = from / 4;
        let last = to.div_ceil(4);
        let before = first.wrapping_sub(1);
        if first % 2 == 1 && self.words.get(before).is_some_and(|h| h.bytes == 8) {
            self.words.remove(before);
        }
        self.words.remove_all(first..last);
    }

    /// A stream wrote these bytes in its order: a flag that releases all before it in the stream.
    pub fn stream_wrote(&mut self, launch: &LaunchClock, by: Epoch, offset: u32, value: &[u8]) {
        let bytes = value.len();
        self.forget(offset, offset + bytes as u32);
        if !matches!(bytes, 4 | 8) || !(offset as usize).is_multiple_of(bytes) {
            return;
        }
        let mut all = [0; 8];
        all[..bytes].copy_from_slice(value);
        let write = Write {
            by,
            known: Known::ByEpoch,
            more: More::of(vec![Arc::new(Release::of_stream(launch, by))]),
            ..Write::anonymous(u64::from_le_bytes(all), Known::ByEpoch)
        };
        let mut history = History::new(0, bytes as u8, 1);
        history.push(write);
        self.words.insert(offset / 4, history);
    }

    /// A strong access of one lane, after its race check and before memory changes. If a load
    /// gets an older value than memory holds, that; if a store comes before another one in
    /// coherence order, the value that memory keeps.
    pub fn access(
        &mut self,
        race: &mut Race,
        agent: &mut Agent,
        notes: &mut Notes,
        access: FlagAccess,
    ) -> Option<u64> {
        notes.strong |= 1 << agent.warp;
        let FlagAccess { offset, bytes, .. } = access;
        let same = |h: &&mut History| (u32::from(h.at), u32::from(h.bytes)) == (offset % 4, bytes);
        let Some(history) = self.words.get_mut(offset / 4).filter(same) else {
            // No two histories overlap: this one's place is made here or never.
            self.drop_others(offset, bytes);
            self.begin(race, agent, notes, &access);
            return None;
        };
        // Memory of the host changes without a word.
        let last = history.writes.back().map(|w| w.value);
        if access.old != last
            && let Some(value) = access.old
        {
            history.push(Write::anonymous(value, Known::ToNobody));
        }
        let newest = history.writes.len() - 1;
        let mut taken = newest;
        if access.reads {
            // A read-modify-write reads what it comes next to.
            if !access.modifies && !access.raced {
                taken = history.choose(race, agent);
            }
            history.observe(race, agent, notes, taken, &access);
        }
        let Some(value) = access.new else {
            return (taken != newest).then(|| history.writes[taken].value);
        };
        let place = if access.modifies || access.raced {
            newest + 1
        } else {
            history.place(race, agent)
        };
        let write = history.write(race, agent, notes, value, &access);
        if place > newest {
            history.push(write);
            return None;
        }
        let kept = history.writes[newest].value;
        history.insert(place, write);
        Some(kept)
    }

    /// A relaxed read-modify-write that follows one by the same operation and block, as counters
    /// see them: if no release comes into it, this is all that [`access`](Self::access) would do.
    /// `last` is the last write to the word.
    pub(super) fn count_on(
        &mut self,
        agent: &Counter,
        notes: &mut Notes,
        access: &CountAccess,
        last: Epoch,
    ) -> bool {
        let CountAccess { offset, bytes, .. } = *access;
        let same = |h: &&mut History| (u32::from(h.at), u32::from(h.bytes)) == (offset % 4, bytes);
        let Some(history) = self.words.get_mut(offset / 4).filter(same) else {
            return false;
        };
        let Some(before) = history.last else {
            return false;
        };
        if history.releases || (before.value, before.by, before.op) != (access.old, last, agent.op)
        {
            return false;
        }
        if let Some((reason, op)) = before.flaw
            && last.thread() != agent.by.thread()
        {
            let note = Note::new(access.address, (last, agent.op), (agent.by, agent.op));
            notes.add(note.because(reason, op));
        }
        notes.strong |= 1 << agent.by.warp();
        let flaw = match notes.fence_elsewhere(agent.by.warp(), agent.by.lane()) {
            Some(fence) => (Reason::FenceElsewhere, fence),
            None => (Reason::FlagRelaxed, agent.op),
        };
        let write = Write {
            scope: Some(agent.scope),
            by: agent.by,
            op: agent.op,
            modifies: true,
            flaw: Some(flaw),
            ..Write::anonymous(access.new, Known::ByEpoch)
        };
        history.push(write);
        true
    }

    /// The first strong write to a word: what was there before is its oldest value.
    fn begin(&mut self, race: &Race, agent: &mut Agent, notes: &mut Notes, access: &FlagAccess) {
        let Some(value) = access.new else { return };
        let at = (access.offset % 4) as u8;
        let room = if access.modifies { MOST_WRITES } else { 2 };
        let mut history = History::new(at, access.bytes as u8, room);
        if let Some(old) = access.old {
            history.push(Write::anonymous(old, Known::ToAll));
        }
        let write = history.write(race, agent, notes, value, access);
        history.push(write);
        self.words.insert(access.offset / 4, history);
    }
}

impl History {
    fn new(at: u8, bytes: u8, room: usize) -> Self {
        Self {
            at,
            bytes,
            releases: false,
            stale: 0,
            writes: VecDeque::with_capacity(room),
            last: None,
        }
    }

    fn push(&mut self, write: Write) {
        self.make_room();
        self.releases |= !write.releases().is_empty();
        self.last = Some(Last {
            value: write.value,
            by: write.by,
            op: write.op,
            flaw: write.flaw,
        });
        self.writes.push_back(write);
        self.stale = 0;
    }

    fn insert(&mut self, mut place: usize, write: Write) {
        if self.make_room() {
            place = place.saturating_sub(1);
        }
        self.releases |= !write.releases().is_empty();
        self.writes.insert(place, write);
    }

    /// Whether the oldest write had to go.
    fn make_room(&mut self) -> bool {
        let full = self.writes.len() == MOST_WRITES;
        if full {
            self.writes.pop_front();
        }
        full
    }

    /// The oldest write that a lane may still read.
    fn oldest(&self, race: &Race, agent: &Agent) -> usize {
        let hides = |&i: &usize| self.writes[i].hides(race, agent);
        (0..self.writes.len()).rev().find(hides).unwrap_or(0)
    }

    /// Where in coherence order a store comes: mostly last, else anywhere after what its thread
    /// knows of, but not between a read-modify-write and what that has read.
    fn place(&self, race: &mut Race, agent: &Agent) -> usize {
        let end = self.writes.len();
        if race.stale == Stale::Newest {
            return end;
        }
        let first = self.oldest(race, agent) + 1;
        if first == end || race.random() & 3 != 0 {
            return end;
        }
        let place = first + (race.random() >> 32) as usize % (end - first);
        if self.writes[place].modifies {
            return end;
        }
        place
    }

    /// The write that a load of the lane reads.
    fn choose(&mut self, race: &mut Race, agent: &Agent) -> usize {
        let newest = self.writes.len() - 1;
        if race.stale == Stale::Newest || self.stale >= MOST_STALE {
            return newest;
        }
        let oldest = self.oldest(race, agent);
        if oldest == newest {
            return newest;
        }
        let taken = match race.stale {
            Stale::Newest => newest,
            Stale::Oldest => oldest,
            Stale::Random => {
                let random = race.random();
                if random & 1 == 0 {
                    newest
                } else {
                    oldest + (random >> 32) as usize % (newest - oldest + 1)
                }
            }
        };
        self.stale += u32::from(taken != newest);
        taken
    }

    /// A strong read takes its value from a write.
    fn observe(
        &mut self,
        race: &Race,
        agent: &mut Agent,
        notes: &mut Notes,
        taken: usize,
        access: &FlagAccess,
    ) {
        let reader = agent.epoch();
        let acquires = matches!(access.order, Order::Acquire | Order::AcqRel | Order::SeqCst);
        // An acquire also takes what relaxed reads of the same flag by its thread found before
        // (PTX ISA, the second acquire pattern).
        let first = if acquires { 0 } else { taken };
        for i in first..=taken {
            let write = &self.writes[i];
            let own = |&(warp, mask): &(Epoch, u32)| {
                (warp.block(), warp.warp()) == (reader.block(), reader.warp())
                    && mask >> reader.lane() & 1 != 0
            };
            if i != taken && !write.seen().iter().any(own) {
                continue;
            }
            let reaches = write.scope.is_some_and(|s| {
                race.includes(s.min(access.scope), write.by.block(), reader.block())
            });
            if !reaches && !access.raced {
                continue;
            }
            let note = Note::new(access.address, (write.by, write.op), (reader, agent.op));
            if write.releases().is_empty() {
                if let Some((reason, op)) = write.flaw
                    && write.by.thread() != reader.thread()
                {
                    notes.add(note.because(reason, op));
                }
                continue;
            }
            order::observe(race, agent, notes, access, write.releases(), note);
        }
        let write = &mut self.writes[taken];
        if access.new.is_none() && !write.is_by(reader) && write.known != Known::ToAll {
            write.seen_by(reader);
        }
    }

    /// The write that a store or read-modify-write adds.
    fn write(
        &self,
        race: &Race,
        agent: &mut Agent,
        notes: &Notes,
        value: u64,
        access: &FlagAccess,
    ) -> Write {
        let by = agent.epoch();
        let mut releases = order::releases(
            race,
            agent.launch,
            agent.clock,
            by,
            agent.op,
            access.order,
            access.scope,
        );
        let mut flaw = None;
        if releases.is_empty() {
            flaw = Some(match notes.fence_elsewhere(agent.warp, agent.lane) {
                Some(fence) => (Reason::FenceElsewhere, fence),
                None => (Reason::FlagRelaxed, agent.op),
            });
        }
        // A release at this flag by the same thread goes on through its later writes (PTX ISA,
        // the second release pattern).
        if let Some(own) = self.writes.iter().rev().find(|w| w.is_by(by))
            && !own.releases().is_empty()
        {
            let again = own.releases().iter().filter(|r| {
                r.by.thread() == by.thread() && !releases.iter().any(|n| n.scope >= r.scope)
            });
            let again: Vec<_> = again.cloned().collect();
            releases.extend(again);
        }
        // A read-modify-write hands on what it found, if the two are morally strong.
        if access.reads
            && let Some(before) = self.writes.back()
        {
            let reaches = before
                .scope
                .is_some_and(|s| race.includes(s.min(access.scope), before.by.block(), by.block()));
            if reaches || access.raced {
                order::hand_on(race, &mut releases, before.releases());
            }
        }
        Write {
            value,
            by,
            op: agent.op,
            scope: Some(access.scope),
            known: Known::ByEpoch,
            modifies: access.modifies,
            flaw,
            seen_by_all: false,
            more: More::of(releases),
        }
    }
}

/// Counts on, if the last access to the scalar was that of a counter of the same block; false if
/// not, and nothing has been done.
pub fn count(
    shadow: &mut Shadow,
    flags: &mut Flags,
    notes: &mut Notes,
    counter: &Counter,
    access: &CountAccess,
) -> bool {
    let Some(last) = shadow.last_count(counter, access.offset, access.bytes) else {
        return false;
    };
    if !flags.count_on(counter, notes, access, last) {
        return false;
    }
    shadow.count(counter, access.offset, access.bytes);
    true
}
