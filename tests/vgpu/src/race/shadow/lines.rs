//! Lines: what several lanes of a warp access side by side, `W` words each. Mostly all words of a
//! line have the same story, told lane by lane: one warp wrote them at one time, and one warp read
//! them last. Then one look answers for all of them, if the lane that looks speaks for all lanes of
//! its warp.

use super::{Cell, Last, Own, Reads, SPLIT, Shadow};
use crate::race::clock::TIME_BITS;
use crate::race::readers::Reader;
use crate::race::{Agent, Epoch, Race, Touch};
use crate::registers::lanes;

/// Where a line is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    /// The first lane, and how many there are.
    pub(super) lane: usize,
    pub(super) lanes: usize,
    /// The first word.
    pub(super) word: u32,
}

impl Line {
    fn words<const W: usize>(&self) -> std::ops::Range<usize> {
        let at = self.word as usize;
        at..at + self.lanes * W
    }
}

/// The bits of an epoch that say which lane it is.
const LANE: u64 = 31 << TIME_BITS;

/// The last writes of a line.
struct Written {
    /// By whom, and when, without the lane; 0 is nobody.
    by: Epoch,
    /// Every word by the lane that accesses it now, if the warps are the same.
    in_place: bool,
    special: bool,
    /// The set of reads before the last ones.
    reads: u32,
}

impl Written {
    /// None if the words differ.
    #[inline(always)]
    fn of<const W: usize>(cells: &[Cell], lane: usize) -> Option<Self> {
        let first = cells[0];
        let (mut other, mut moved, mut touches, mut reads) = (0, 0, 0, 0);
        for (cells, lane) in cells.as_chunks::<W>().0.iter().zip(lane as u64..) {
            for cell in cells {
                other |= (cell.write ^ first.write) & !LANE;
                moved |= (cell.write ^ lane << TIME_BITS) & LANE;
                touches |= cell.write_touch;
                reads |= cell.reads ^ first.reads;
            }
        }
        (other == 0 && reads == 0 && first.write != SPLIT).then_some(Self {
            by: Epoch(first.write & !LANE),
            in_place: moved == 0,
            special: Touch(touches).special(),
            reads: first.reads,
        })
    }

    /// Whether all lanes know of the writes, and may access the words whatever they do.
    #[inline(always)]
    fn is_known(&self, race: &Race, agent: &Agent) -> bool {
        if self.by.0 == 0 {
            return true;
        }
        let own = self.in_place && self.by.of_warp() == agent.epoch().of_warp();
        !self.special && !agent.non_coherent && (own || agent.makes_certain(race, self.by))
    }
}

/// The last reads of a line by whichever warp: those of the first word, if the others have the
/// same, by lanes as far on as theirs.
#[inline(always)]
fn last_reads<const W: usize>(reads: &[Last]) -> Option<Last> {
    let first = reads[0];
    let (mut other, mut touches, mut moved) = (0, 0, 0);
    for (reads, lane) in reads.as_chunks::<W>().0.iter().zip(0..) {
        for last in reads {
            other |= last.epoch ^ first.epoch;
            touches |= last.touch ^ first.touch;
            moved |= last.lanes ^ first.lanes.rotate_left(lane);
        }
    }
    (other == 0 && touches == 0 && moved == 0).then_some(first)
}

/// Whether last reads are the agent's warp's own, of every word by the lane that accesses it now:
/// the agent is the first.
#[inline(always)]
fn is_own(agent: &Agent, first: Last) -> bool {
    Epoch(first.epoch).of_warp() == agent.epoch().of_warp() && first.lanes == 1 << agent.lane
}

impl Shadow {
    /// A read of a line; false if it is not as simple as that, and nothing has been done. The agent
    /// is the first lane, and speaks for all.
    #[inline(always)]
    pub(super) fn read_line<const W: usize>(
        &mut self,
        race: &mut Race,
        agent: &Agent,
        line: Line,
    ) -> bool {
        let (words, lane) = (line.words::<W>(), line.lane);
        let Some(cells) = self.cells.get_mut(words.clone()) else {
            return false;
        };
        let Some(written) = Written::of::<W>(cells, lane) else {
            return false;
        };
        if !written.is_known(race, agent) {
            return false;
        }
        let touch = agent.touch(15);
        let time = agent.clock.time;
        match &mut self.reads {
            Reads::Any(reads) => {
                let reads = &mut reads[words];
                let Some(last) = last_reads::<W>(reads) else {
                    return false;
                };
                let own = Epoch::new(agent.block, agent.warp, 0, time).0;
                if last.epoch == own && last.touch == touch.0 {
                    for (reads, lane) in reads.as_chunks_mut::<W>().0.iter_mut().zip(lane..) {
                        reads.iter_mut().for_each(|last| last.lanes |= 1 << lane);
                    }
                    return true;
                }
                // As `read` does for a single word.
                let (by, before) = (Epoch(last.epoch), Touch(last.touch));
                let plain = !before.special() && !touch.special();
                if last.epoch == own && plain && is_own(agent, last) {
                    return true;
                }
                let whole = before.bytes() == 15;
                let covered =
                    by.0 == 0 || whole && (is_own(agent, last) || agent.makes_certain(race, by));
                // The words have the same reader only if lanes are counted by the same steps.
                let steps = before.words() == W.ilog2() && line.word.is_multiple_of(W as u32);
                if !(covered || whole && steps) {
                    return false;
                }
                let mut set = agent.without_certain(race, written.reads);
                if !covered {
                    let who = (by.block(), by.warp(), by.time());
                    let reader = Reader::new(set, who, last.lanes, line.word, before);
                    set = race.readers.push(reader);
                }
                if set != written.reads {
                    cells.iter_mut().for_each(|cell| cell.reads = set);
                }
                for (reads, lane) in reads.as_chunks_mut::<W>().0.iter_mut().zip(lane..) {
                    *reads = [Last {
                        epoch: own,
                        touch: touch.0,
                        lanes: 1 << lane,
                    }; W];
                }
                true
            }
            Reads::Block { warps, own } => {
                let Some(own) = &mut own[agent.warp as usize] else {
                    return false;
                };
                let (warps, own) = (&mut warps[words.clone()], &mut own[words]);
                let bit = 1 << agent.warp;
                let some = warps.iter().fold(0, |some, warps| some | warps) & bit;
                let all = warps.iter().fold(bit, |all, warps| all & warps);
                if some == 0 {
                    warps.iter_mut().for_each(|warps| *warps |= bit);
                    for (own, lane) in own.as_chunks_mut::<W>().0.iter_mut().zip(lane..) {
                        *own = [Own {
                            time,
                            touch: touch.0,
                            lanes: 1 << lane,
                        }; W];
                    }
                    return true;
                }
                let differ = |own: &Own| (own.time ^ time) | (own.touch ^ touch.0);
                if all == 0 || own.iter().fold(0, |any, own| any | differ(own)) != 0 {
                    return false;
                }
                for (own, lane) in own.as_chunks_mut::<W>().0.iter_mut().zip(lane..) {
                    own.iter_mut().for_each(|own| own.lanes |= 1 << lane);
                }
                true
            }
        }
    }

    /// The same for a write.
    #[inline(always)]
    pub(super) fn write_line<const W: usize>(
        &mut self,
        race: &Race,
        agent: &Agent,
        line: Line,
    ) -> bool {
        let (words, lane) = (line.words::<W>(), line.lane);
        let Some(cells) = self.cells.get_mut(words.clone()) else {
            return false;
        };
        let Some(written) = Written::of::<W>(cells, lane) else {
            return false;
        };
        if !written.is_known(race, agent) || !agent.makes_clean(race, written.reads) {
            return false;
        }
        match &mut self.reads {
            Reads::Any(reads) => {
                let reads = &mut reads[words];
                let Some(last) = last_reads::<W>(reads) else {
                    return false;
                };
                let read = Epoch(last.epoch);
                let known = read.0 == 0
                    || !Touch(last.touch).special()
                        && (is_own(agent, last) || agent.makes_certain(race, read));
                if !known {
                    return false;
                }
                reads.fill(Last::default());
            }
            Reads::Block { warps, own } => {
                let warps = &mut warps[words.clone()];
                let readers = warps[0];
                if warps.iter().fold(0, |any, warps| any | (warps ^ readers)) != 0 {
                    return false;
                }
                for reader in lanes(readers) {
                    let Some(own) = &own[reader] else {
                        return false;
                    };
                    let own = &own[words.clone()];
                    let touches = own.iter().fold(0, |all, own| all | own.touch);
                    let last = own.iter().fold(0, |last, own| own.time.max(last));
                    let near = &agent.clock.near;
                    let known = if reader != agent.warp as usize {
                        near.known[reader] > last
                    } else if near.of_all() > last {
                        true
                    } else {
                        let others = own.as_chunks::<W>().0.iter().zip(lane..);
                        let others = others.fold(0, |any, (own, lane)| {
                            own.iter()
                                .fold(any, |any, own| any | (own.lanes ^ 1 << lane))
                        });
                        others == 0
                    };
                    if Touch(touches).special() || !known {
                        return false;
                    }
                }
                warps.fill(0);
            }
        }
        let touch = agent.touch(15).0;
        let own = agent.epoch().0 & !LANE;
        for (cells, lane) in cells.as_chunks_mut::<W>().0.iter_mut().zip(lane as u64..) {
            *cells = [Cell {
                write: own | lane << TIME_BITS,
                write_touch: touch,
                reads: 0,
            }; W];
        }
        true
    }
}
