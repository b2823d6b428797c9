//! What memory remembers of the accesses to each of its words: the last write, and the reads
//! since. After C. Flanagan and S. Freund, "FastTrack: Efficient and Precise Dynamic Race
//! Detection" (PLDI 2009), for words of four bytes with a mask of bytes, and for sets of reads
//! that many words share (a warp reads a row: thirty-two words, one story).

use bytemuck::{Pod, Zeroable};
use rustc_hash::FxHashMap;

use super::{Epoch, HOST_OP, LaunchClock, Race, WarpClock};
use crate::memory::Scope;
use crate::registers::lanes;

/// Reads kept of one word; further readers are forgotten.
const MOST_READERS: u32 = 1 << 12;
/// How far back in a word's reads to look for one of the same warp.
const LOOK_BACK: u32 = 64;
/// Sets of reads kept before the old ones are forgotten.
const MOST_SETS: usize = 1 << 20;

/// A word's memory: the epoch of the last write; the warp that read it last, with its time (an
/// epoch without a lane) and the lanes that did; the number of the set of reads before those; and
/// the operation of each side, with the bytes it concerns in the low four bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Cell {
    write: u64,
    read: u64,
    write_op: u32,
    read_op: u32,
    read_lanes: u32,
    reads_before: u32,
}

/// In `Cell::write`: the bytes of the word have stories of their own, kept elsewhere.
const SPLIT: u64 = u64::MAX;

/// The memory of a stretch of memory.
#[derive(Debug, Default)]
pub struct Shadow {
    cells: Box<[Cell]>,
    split: FxHashMap<u32, [(u64, u32); 4]>,
}

/// One read, or the same by several lanes of a warp, and the reads before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Reader {
    before: u32,
    block: u64,
    warp: u32,
    time: u32,
    lanes: u32,
    op: u32,
    bytes: u8,
}

/// All sets of reads.
#[derive(Debug, Default)]
pub(super) struct Readers {
    /// Set `n` is number `n - first` here; 0 is the empty set.
    first: u32,
    list: Vec<(Reader, u32)>,
    numbers: FxHashMap<Reader, u32>,
}

impl Readers {
    fn get(&self, set: u32) -> Option<&(Reader, u32)> {
        self.list.get(set.checked_sub(self.first + 1)? as usize)
    }

    fn len(&self, set: u32) -> u32 {
        self.get(set).map_or(0, |s| s.1)
    }

    /// The set with one more read, unless it is full or has it already.
    fn push(&mut self, reader: Reader) -> u32 {
        let mut at = reader.before;
        for _ in 0..LOOK_BACK {
            let Some((other, _)) = self.get(at) else {
                break;
            };
            let same = (other.block, other.warp, other.time, other.op, other.bytes)
                == (
                    reader.block,
                    reader.warp,
                    reader.time,
                    reader.op,
                    reader.bytes,
                );
            if same && reader.lanes & !other.lanes == 0 {
                return reader.before;
            }
            at = other.before;
        }
        if self.len(reader.before) >= MOST_READERS {
            return reader.before;
        }
        self.intern(reader)
    }

    fn intern(&mut self, reader: Reader) -> u32 {
        if let Some(&number) = self.numbers.get(&reader) {
            return number;
        }
        if self.list.len() >= MOST_SETS {
            self.first += self.list.len() as u32;
            self.list.clear();
            self.numbers.clear();
        }
        let len = self.len(reader.before) + 1;
        self.list.push((reader, len));
        let number = self.first + self.list.len() as u32;
        self.numbers.insert(reader, number);
        number
    }
}

/// A lane about to access memory.
pub struct Agent<'a> {
    /// The block's number among the actors.
    pub block: u64,
    /// The warp in it.
    pub warp: u32,
    /// The lane in that.
    pub lane: usize,
    /// What the warp's lanes know.
    pub clock: &'a mut WarpClock,
    /// What the launch knows.
    pub launch: &'a LaunchClock,
    /// The device it runs on.
    pub device: u32,
    /// The operation.
    pub op: u32,
    /// The scope of a strong access.
    pub strong: Option<Scope>,
    /// Through the non-coherent path.
    pub non_coherent: bool,
}

/// Two accesses that nothing orders.
#[derive(Debug, Clone, Copy)]
pub struct Conflict {
    /// The one before.
    pub other: Epoch,
    /// Its operation.
    pub other_op: u32,
    /// Whether it wrote.
    pub other_wrote: bool,
    /// This one.
    pub this: Epoch,
    /// One of the two goes through the non-coherent path and the other writes.
    pub non_coherent: bool,
    /// A write to bytes that nobody had written before: the earlier read got nothing.
    pub unwritten: bool,
}

impl Agent<'_> {
    fn epoch(&self) -> Epoch {
        Epoch::new(self.block, self.warp, self.lane, self.clock.time)
    }

    /// Whether the lane knows of an access.
    #[inline(always)]
    fn knows(&self, race: &Race, epoch: Epoch) -> bool {
        let (block, warp, lane) = (epoch.block(), epoch.warp(), epoch.lane());
        if block < self.launch.floor {
            return true;
        }
        if block == self.block {
            let own = warp == self.warp;
            if own && (lane == self.lane || self.clock.of_lane(self.lane, lane) > epoch.time()) {
                return true;
            }
            if !own && self.clock.known[warp as usize] > epoch.time() {
                return true;
            }
        } else if race.knows_actor(self.launch, block) {
            return true;
        }
        let extra = &self.clock.extra[self.lane];
        extra
            .as_ref()
            .is_some_and(|e| e.of_lane(block, warp, lane) > epoch.time())
    }

    /// Whether the lane knows of the same access by several lanes of a warp.
    #[inline(always)]
    fn knows_lanes(&self, race: &Race, epoch: Epoch, mask: u32) -> bool {
        lanes(mask).all(|lane| self.knows(race, epoch.with_lane(lane)))
    }

    /// A set of reads without the last ones as far as the lane knows of them.
    fn without_known(&self, race: &Race, set: u32, bytes: u8) -> u32 {
        let mut set = set;
        while let Some(&(reader, _)) = race.readers.get(set) {
            let epoch = Epoch::new(reader.block, reader.warp, 0, reader.time);
            if reader.bytes & !bytes != 0 || !self.knows_lanes(race, epoch, reader.lanes) {
                break;
            }
            set = reader.before;
        }
        set
    }

    /// Whether two strong accesses reach each other, so that they may meet without order.
    fn morally_strong(&self, race: &Race, other: Epoch, op: u32) -> bool {
        let (Some(mine), Some(access)) = (self.strong, race.accesses.get(&op)) else {
            return false;
        };
        let Some(theirs) = access.strong else {
            return false;
        };
        match mine.min(theirs) {
            Scope::Cta | Scope::Cluster => other.block() == self.block,
            Scope::Gpu => race.actors[other.block() as usize].device == self.device,
            Scope::Sys => true,
        }
    }

    fn against(&self, race: &Race, other: Epoch, op: u32, wrote: bool) -> Option<Conflict> {
        let conflict = Conflict {
            other,
            other_op: op,
            other_wrote: wrote,
            this: self.epoch(),
            non_coherent: false,
            unwritten: false,
        };
        // The non-coherent path wants memory that nobody writes during the launch, ordered or
        // not.
        let non_coherent = if wrote {
            self.non_coherent
        } else {
            race.accesses.get(&op).is_some_and(|a| a.non_coherent)
        };
        if non_coherent && other.block() >= self.launch.first {
            let same = race.actors[other.block() as usize];
            if (same.stream, same.number) == (self.launch.stream, self.launch.number) {
                return Some(Conflict {
                    non_coherent: true,
                    ..conflict
                });
            }
        }
        if self.knows(race, other) || self.morally_strong(race, other, op) {
            return None;
        }
        Some(conflict)
    }
}

impl Shadow {
    /// For so many bytes.
    pub fn new(bytes: usize) -> Self {
        let words = bytes.div_ceil(4);
        // Too large to remember is too large to check.
        let cells = bytemuck::allocation::try_zeroed_slice_box(words).unwrap_or_default();
        Self {
            cells,
            split: FxHashMap::default(),
        }
    }

    /// The last write to the bytes of a word, if it conflicts.
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
                .find_map(|(_, part)| agent.against(race, Epoch(part.0), part.1, true));
        }
        if cell.write_op as u8 & 15 & bytes == 0 {
            return None;
        }
        agent.against(race, Epoch(cell.write), cell.write_op >> 4, true)
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
        let op = agent.op << 4 | u32::from(bytes);
        let own = Epoch::new(agent.block, agent.warp, 0, agent.clock.time).0;
        let lane = 1 << agent.lane;
        if cell.read == own && cell.read_op as u8 & 15 == bytes {
            self.cells[word as usize].read_lanes |= lane;
            return conflict;
        }
        // What comes before this read in every order needs no memory of its own.
        let kept = cell.read != 0
            && !(cell.read_op as u8 & 15 & !bytes == 0
                && agent.knows_lanes(race, Epoch(cell.read), cell.read_lanes));
        let before = match (kept, cell.reads_before) {
            (false, 0) => 0,
            (false, set) => agent.without_known(race, set, bytes),
            (true, set) => {
                let last = Epoch(cell.read);
                let before = agent.without_known(race, set, bytes);
                race.readers.push(Reader {
                    before,
                    block: last.block(),
                    warp: last.warp(),
                    time: last.time(),
                    lanes: cell.read_lanes,
                    op: cell.read_op >> 4,
                    bytes: cell.read_op as u8 & 15,
                })
            }
        };
        let cell = &mut self.cells[word as usize];
        cell.read = own;
        cell.read_op = op;
        cell.read_lanes = lane;
        cell.reads_before = before;
        conflict
    }

    /// A write of some bytes of a word.
    #[inline(always)]
    pub fn write(&mut self, race: &Race, agent: &Agent, word: u32, bytes: u8) -> Option<Conflict> {
        let cell = *self.cells.get(word as usize)?;
        let mut conflict = self.check_write(race, agent, word, &cell, bytes);
        if cell.read != 0 && conflict.is_none() {
            if cell.read_op as u8 & bytes & 15 != 0 {
                let op = cell.read_op >> 4;
                conflict = against_lanes(race, agent, Epoch(cell.read), cell.read_lanes, op);
            }
            if conflict.is_none() && cell.reads_before != 0 {
                conflict = check_reads(race, agent, cell.reads_before, bytes);
            }
        }
        self.put(word, agent.epoch().0, agent.op, bytes, cell);
        if bytes == 15 {
            let cell = &mut self.cells[word as usize];
            (cell.read, cell.read_op, cell.read_lanes, cell.reads_before) = (0, 0, 0, 0);
        }
        conflict
    }

    fn put(&mut self, word: u32, epoch: u64, op: u32, bytes: u8, cell: Cell) {
        let before = if cell.write == SPLIT {
            None
        } else {
            Some(cell.write_op as u8 & 15)
        };
        let new = &mut self.cells[word as usize];
        let covered = before.is_some_and(|b| cell.write == 0 || b & !bytes == 0);
        if bytes == 15 || covered {
            if cell.write == SPLIT {
                self.split.remove(&word);
            }
            new.write = epoch;
            new.write_op = op << 4 | u32::from(bytes);
            return;
        }
        if cell.write == epoch && cell.write_op >> 4 == op {
            new.write_op |= u32::from(bytes);
            return;
        }
        new.write = SPLIT;
        let parts = self.split.entry(word).or_insert_with(|| {
            std::array::from_fn(|b| {
                let has = before.is_some_and(|m| m >> b & 1 != 0);
                if has {
                    (cell.write, cell.write_op >> 4)
                } else {
                    (0, 0)
                }
            })
        });
        for (b, part) in parts.iter_mut().enumerate() {
            if bytes >> b & 1 != 0 {
                *part = (epoch, op);
            }
        }
    }

    /// The host, or nobody in particular, wrote these bytes: nothing before matters any more.
    pub fn forget(&mut self, from: usize, to: usize) {
        let last = to.div_ceil(4).min(self.cells.len());
        let first = (from / 4).min(last);
        self.cells[first..last].fill(Cell::zeroed());
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
            device: race.actors[actor as usize].device,
            op: HOST_OP,
            strong: Some(Scope::Sys),
            non_coherent: false,
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

fn check_reads(race: &Race, agent: &Agent, set: u32, bytes: u8) -> Option<Conflict> {
    let mut at = set;
    while let Some((reader, _)) = race.readers.get(at) {
        at = reader.before;
        if reader.bytes & bytes == 0 {
            continue;
        }
        let epoch = Epoch::new(reader.block, reader.warp, 0, reader.time);
        let found = against_lanes(race, agent, epoch, reader.lanes, reader.op);
        if found.is_some() {
            return found;
        }
    }
    None
}

/// The first of some lanes' reads that a write conflicts with.
#[inline(always)]
fn against_lanes(race: &Race, agent: &Agent, epoch: Epoch, mask: u32, op: u32) -> Option<Conflict> {
    lanes(mask).find_map(|lane| agent.against(race, epoch.with_lane(lane), op, false))
}
