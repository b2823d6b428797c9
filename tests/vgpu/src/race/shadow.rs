//! What memory remembers of the accesses to each of its words: the last write, and the reads
//! since. After C. Flanagan and S. Freund, "FastTrack: Efficient and Precise Dynamic Race
//! Detection" (PLDI 2009), for words of four bytes with a mask of bytes.
//!
//! Of the reads, the last one of a warp is kept with the word; those before it that it does not
//! cover are a set in `readers`. Memory that one block uses keeps a last read for every warp:
//! all its warps read the same tiles over and over, and none disturbs another's.

mod lines;
mod rows;
#[cfg(test)]
mod tests;

use bytemuck::{Pod, Zeroable};
use rustc_hash::FxHashMap;

pub use rows::Row;

use super::history::Counter;
use super::readers::Reader;
use super::{Agent, Conflict, Epoch, HOST_OP, Memo, Race, Touch, WarpClock};
use crate::memory::Scope;
use crate::registers::{LANES, lanes};

/// A word's memory: the epoch of the last write, its operation, and the number of the set of
/// reads before the last ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Cell {
    write: u64,
    write_touch: u32,
    reads: u32,
}

/// In `Cell::write`: the bytes of the word have stories of their own, kept elsewhere.
const SPLIT: u64 = u64::MAX;

/// The last warp that read a word: its time (an epoch without a lane), the operation, and the
/// lanes that did. No epoch is nobody.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Last {
    epoch: u64,
    touch: u32,
    lanes: u32,
}

/// What a warp of the block read last of a word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Own {
    time: u32,
    touch: u32,
    lanes: u32,
}

/// The last reads of each word.
#[derive(Debug)]
enum Reads {
    /// One, by whichever warp.
    Any(Box<[Last]>),
    /// One of each warp of the block: which warps have read since the last write, and what.
    Block {
        warps: Box<[u32]>,
        own: Box<[Option<Box<[Own]>>; LANES]>,
    },
}

impl Default for Reads {
    fn default() -> Self {
        Reads::Any(Box::default())
    }
}

/// The memory of a stretch of memory.
#[derive(Debug, Default)]
pub struct Shadow {
    cells: Box<[Cell]>,
    reads: Reads,
    split: FxHashMap<u32, [(u64, u32); 4]>,
}

/// Zeros, or nothing: too large to remember, in part or whole, is too large to check.
fn zeros<T: Zeroable>(n: usize) -> Box<[T]> {
    bytemuck::allocation::try_zeroed_slice_box(n).unwrap_or_default()
}

impl Shadow {
    /// For so many bytes that anybody may access.
    pub fn new(bytes: usize) -> Self {
        let words = bytes.div_ceil(4);
        let (cells, reads) = (zeros::<Cell>(words), zeros::<Last>(words));
        if cells.len() != reads.len() {
            return Self::default();
        }
        Self {
            cells,
            reads: Reads::Any(reads),
            split: FxHashMap::default(),
        }
    }

    /// For so many bytes that one block accesses.
    pub fn of_block(bytes: usize) -> Self {
        let words = bytes.div_ceil(4);
        Self {
            cells: zeros(words),
            reads: Reads::Block {
                warps: zeros(words),
                own: Box::new([const { None }; LANES]),
            },
            split: FxHashMap::default(),
        }
    }

    /// The last write to a word, and its operation; None where nobody wrote it, or several wrote
    /// parts of it.
    pub(super) fn last_write(&self, word: u32) -> Option<(Epoch, u32)> {
        let cell = self.cells.get(word as usize)?;
        let known = cell.write != 0 && cell.write != SPLIT;
        known.then(|| (Epoch(cell.write), Touch(cell.write_touch).op()))
    }

    /// The last write to the bytes of a word, if it conflicts.
    #[inline(always)]
    fn check_write(
        &self,
        race: &Race,
        agent: &Agent,
        word: u32,
        cell: &Cell,
        bytes: u8,
    ) -> Option<Conflict> {
        if cell.write == 0 {
            return None;
        }
        if cell.write == SPLIT {
            let parts = self.split.get(&word)?;
            return parts
                .iter()
                .enumerate()
                .filter(|(b, part)| bytes >> b & 1 != 0 && part.0 != 0)
                .find_map(|(_, part)| agent.against(race, Epoch(part.0), Touch(part.1), true));
        }
        let touch = Touch(cell.write_touch);
        if touch.bytes() & bytes == 0 {
            return None;
        }
        agent.against(race, Epoch(cell.write), touch, true)
    }

    /// A read of some bytes of a word.
    #[inline(always)]
    pub fn read(
        &mut self,
        race: &mut Race,
        agent: &mut Agent,
        word: u32,
        bytes: u8,
    ) -> Option<Conflict> {
        let cell = *self.cells.get(word as usize)?;
        let conflict = self.check_write(race, agent, word, &cell, bytes);
        let touch = agent.touch(bytes);
        let time = agent.clock.time;
        let lane = 1 << agent.lane;
        // The read to be replaced by this one: by whom, by which lanes, doing what.
        let (by, mask, before) = match &mut self.reads {
            Reads::Any(last) => {
                let last = &mut last[word as usize];
                let own = Epoch::new(agent.block, agent.warp, 0, time).0;
                if last.epoch == own && same_read(race, &mut last.lanes, last.touch, touch, lane) {
                    return conflict;
                }
                let old = std::mem::replace(
                    last,
                    Last {
                        epoch: own,
                        touch: touch.0,
                        lanes: lane,
                    },
                );
                (Epoch(old.epoch), old.lanes, Touch(old.touch))
            }
            Reads::Block { warps, own } => {
                let warp = agent.warp as usize;
                let words = warps.len();
                let own = &mut own[warp].get_or_insert_with(|| zeros(words))[word as usize];
                let new = Own {
                    time,
                    touch: touch.0,
                    lanes: lane,
                };
                if warps[word as usize] >> warp & 1 == 0 {
                    warps[word as usize] |= 1 << warp;
                    *own = new;
                    return conflict;
                }
                if own.time == time && same_read(race, &mut own.lanes, own.touch, touch, lane) {
                    return conflict;
                }
                let old = std::mem::replace(own, new);
                let by = Epoch::new(agent.block, agent.warp, 0, old.time);
                (by, old.lanes, Touch(old.touch))
            }
        };
        // What comes before this read in every order needs no memory of its own.
        let covered =
            by.0 == 0 || (before.bytes() & !bytes == 0 && agent.surely_knows_lanes(race, by, mask));
        let mut set = cell.reads;
        if set != 0 {
            set = agent.without_known(race, set, word, bytes);
        }
        if !covered {
            let who = (by.block(), by.warp(), by.time());
            set = race.readers.push(Reader::new(set, who, mask, word, before));
        }
        self.cells[word as usize].reads = set;
        conflict
    }

    /// A write of some bytes of a word.
    #[inline(always)]
    pub fn write(&mut self, race: &Race, agent: &Agent, word: u32, bytes: u8) -> Option<Conflict> {
        let cell = *self.cells.get(word as usize)?;
        let mut conflict = self.check_write(race, agent, word, &cell, bytes);
        if conflict.is_none() {
            conflict = self.check_reads(race, agent, word, bytes);
        }
        if conflict.is_none() && !agent.is_clean(cell.reads) {
            conflict = check_set(race, agent, cell.reads, word, bytes);
        }
        self.put(word, agent.epoch().0, agent.touch(bytes), cell);
        if bytes == 15 {
            self.cells[word as usize].reads = 0;
            match &mut self.reads {
                Reads::Any(last) => last[word as usize] = Last::default(),
                Reads::Block { warps, .. } => warps[word as usize] = 0,
            }
        }
        conflict
    }

    /// The last reads of a word, if one conflicts with a write.
    #[inline(always)]
    fn check_reads(&self, race: &Race, agent: &Agent, word: u32, bytes: u8) -> Option<Conflict> {
        match &self.reads {
            Reads::Any(last) => {
                let last = last[word as usize];
                let touch = Touch(last.touch);
                if last.epoch == 0 || touch.bytes() & bytes == 0 {
                    return None;
                }
                let lanes = touch.lanes_of(last.lanes, bytes);
                agent.against_reads(race, Epoch(last.epoch), lanes, touch)
            }
            Reads::Block { warps, own } => lanes(warps[word as usize]).find_map(|warp| {
                let own = own[warp].as_ref()?[word as usize];
                let touch = Touch(own.touch);
                if touch.bytes() & bytes == 0 {
                    return None;
                }
                let epoch = Epoch::new(agent.block, warp as u32, 0, own.time);
                agent.against_reads(race, epoch, touch.lanes_of(own.lanes, bytes), touch)
            }),
        }
    }

    #[inline(always)]
    fn put(&mut self, word: u32, epoch: u64, touch: Touch, cell: Cell) {
        let bytes = touch.bytes();
        let before = if cell.write == SPLIT {
            None
        } else {
            Some(Touch(cell.write_touch).bytes())
        };
        let new = &mut self.cells[word as usize];
        let covered = before.is_some_and(|b| cell.write == 0 || b & !bytes == 0);
        if bytes == 15 || covered {
            if cell.write == SPLIT {
                self.split.remove(&word);
            }
            new.write = epoch;
            new.write_touch = touch.0;
            return;
        }
        if cell.write == epoch && Touch(cell.write_touch).same_operation(touch) {
            new.write_touch |= u32::from(bytes);
            return;
        }
        new.write = SPLIT;
        let parts = self.split.entry(word).or_insert_with(|| {
            std::array::from_fn(|b| {
                let has = before.is_some_and(|m| m >> b & 1 != 0);
                if has {
                    (cell.write, cell.write_touch)
                } else {
                    (0, 0)
                }
            })
        });
        for (b, part) in parts.iter_mut().enumerate() {
            if bytes >> b & 1 != 0 {
                *part = (epoch, touch.0);
            }
        }
    }

    /// The last write to a scalar, if it was by the same operation of the same block, and nobody
    /// has read since.
    #[inline(always)]
    pub(super) fn last_count(&self, counter: &Counter, offset: u32, bytes: u32) -> Option<Epoch> {
        let at = offset as usize / 4;
        let cells = self.cells.get(at..at + bytes as usize / 4)?;
        let first = cells[0];
        let touch = counter.touch(bytes).0;
        let same = cells.iter().fold(true, |same, cell| {
            same & (cell.write == first.write && cell.write_touch == touch && cell.reads == 0)
        });
        let read = match &self.reads {
            Reads::Any(last) => last[at..at + cells.len()]
                .iter()
                .any(|last| last.epoch != 0),
            Reads::Block { warps, .. } => warps[at..at + cells.len()].iter().any(|&w| w != 0),
        };
        let last = Epoch(first.write);
        (same && !read && last.block() == counter.epoch().block()).then_some(last)
    }

    /// Counts on from there.
    #[inline(always)]
    pub(super) fn count(&mut self, counter: &Counter, offset: u32, bytes: u32) {
        let at = offset as usize / 4;
        for cell in &mut self.cells[at..at + bytes as usize / 4] {
            cell.write = counter.epoch().0;
        }
    }

    /// The host, or nobody in particular, wrote these bytes: nothing before matters any more.
    pub fn forget(&mut self, from: usize, to: usize) {
        let last = to.div_ceil(4).min(self.cells.len());
        let first = (from / 4).min(last);
        self.cells[first..last].fill(Cell::zeroed());
        match &mut self.reads {
            Reads::Any(reads) => reads[first..last].fill(Last::default()),
            Reads::Block { warps, .. } => warps[first..last].fill(0),
        }
        if !self.split.is_empty() {
            let range = first as u32..last as u32;
            self.split.retain(|word, _| !range.contains(word));
        }
    }

    /// A piece of a stream's own work (a copy, a fill) accesses these bytes.
    pub fn host(
        &mut self,
        race: &mut Race,
        from: usize,
        to: usize,
        writes: bool,
    ) -> Option<Conflict> {
        let (actor, launch) = race.host.clone()?;
        let mut clock = WarpClock::default();
        let mut agent = Agent {
            block: actor,
            warp: 0,
            lane: 0,
            clock: &mut clock,
            launch: &launch,
            op: HOST_OP,
            element: 0,
            bytes: 0,
            strong: Some(Scope::Sys),
            non_coherent: false,
            memo: Memo::default(),
        };
        let mut conflict = None;
        for word in from / 4..to.div_ceil(4) {
            let bytes = (0..4).fold(0u8, |mask, b| {
                let at = 4 * word + b;
                mask | u8::from(at >= from && at < to) << b
            });
            let found = if writes {
                self.write(race, &agent, word as u32, bytes)
            } else {
                self.read(race, &mut agent, word as u32, bytes)
            };
            conflict = conflict.or(found);
        }
        conflict
    }
}

/// A warp reads a word that it has read at the same time: whether nothing more has to be
/// remembered. Either it is the same operation, or the lane has read these bytes, and whatever
/// conflicts with this read conflicts with that one.
#[inline(always)]
fn same_read(race: &Race, mask: &mut u32, old: u32, new: Touch, lane: u32) -> bool {
    if old == new.0 {
        *mask |= lane;
        return true;
    }
    let old = Touch(old);
    let own = if old.is_spread() {
        old.lanes_of(*mask, new.bytes()) == lane
    } else {
        *mask & lane != 0
    };
    own && new.bytes() & !old.bytes() == 0
        && (!old.special() && !new.special() || race.same_kind(old.op(), new.op()))
}

/// The reads of a set, if one conflicts with a write.
fn check_set(race: &Race, agent: &Agent, set: u32, word: u32, bytes: u8) -> Option<Conflict> {
    let mut at = set;
    let mut clean = true;
    while let Some(reader) = race.readers.get(at) {
        at = reader.before;
        let epoch = Epoch::new(reader.block, reader.warp, 0, reader.time);
        if reader.touch.bytes() & bytes != 0 {
            let lanes = reader.touch.lanes_of(reader.lanes(word), bytes);
            let found = agent.against_reads(race, epoch, lanes, reader.touch);
            if found.is_some() {
                return found;
            }
        }
        clean &= !reader.touch.special() && agent.is_certain(epoch);
    }
    if clean {
        agent.remember_clean(set);
    }
    None
}
