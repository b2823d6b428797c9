//! The weak accesses of a warp, all lanes at once. Nearly all find words whose last write and last
//! reads their lane is certain to know of; these are dealt with here, in a few comparisons a
//! word, or as a whole where the lanes lie side by side (`lines`). The others go the long way, one
//! by one.

use super::lines::Line;
use super::{Last, Own, Reads, SPLIT, Shadow, zeros};
use crate::race::{Agent, Conflict, Epoch, Race, Touch};
use crate::registers::{FULL, Lanes64, lanes};

/// Where the lanes of a warp access a stretch of memory. Each lane's bytes are aligned to their
/// number.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// The lanes.
    pub mask: u32,
    /// Their addresses.
    pub addresses: &'a Lanes64,
    /// The address at which the stretch begins.
    pub base: u64,
    /// Bytes of each lane.
    pub bytes: u32,
}

impl Row<'_> {
    /// The words of a lane, and the bytes of each.
    #[inline(always)]
    fn words(&self, lane: usize) -> (std::ops::Range<u32>, u8) {
        let at = (self.addresses[lane] - self.base) as u32;
        let bytes = match self.bytes {
            1 => 1 << (at % 4),
            2 => 3 << (at % 4),
            _ => 15,
        };
        (at / 4..at / 4 + self.bytes.div_ceil(4), bytes)
    }

    /// The lanes from this one on, of those in `left`, whose addresses all lie a step apart: one
    /// at least. The step is none, or the lane's bytes if they are whole words.
    #[inline(always)]
    fn run(&self, lane: usize, left: u32) -> (usize, u64) {
        let most = (left >> lane).trailing_ones() as usize;
        let addresses = &self.addresses[lane..lane + most];
        let [first, second, ..] = *addresses else {
            return (1, 0);
        };
        let (step, bytes) = (second.wrapping_sub(first), u64::from(self.bytes));
        if step != 0 && (step != bytes || bytes < 4) {
            return (1, 0);
        }
        // Without a way out of the loop it is a few vector instructions.
        let expected = (0..).map(|lane| first.wrapping_add(lane * step));
        let others = addresses.iter().zip(expected);
        if others
            .clone()
            .fold(0, |any, (&at, expected)| any | (at ^ expected))
            == 0
        {
            return (most, step);
        }
        (
            others.take_while(|(at, expected)| *at == expected).count(),
            step,
        )
    }
}

/// Lanes that make a line worth looking at as such.
const SHORTEST: usize = 4;

/// A warp reads a word once more at the same time, by other lanes or other bytes; whether what is
/// kept of it can say so.
#[inline(always)]
fn reads_on(old: &mut u32, mask: &mut u32, new: Touch, lanes: u32) -> bool {
    if *old == new.0 {
        *mask |= lanes;
        return true;
    }
    if new.bytes() == 15 || !lanes.is_power_of_two() {
        return false;
    }
    let spread = Touch(*old).spread(*mask, new, lanes.trailing_zeros() as usize);
    let Some(spread) = spread else { return false };
    *old = spread.0;
    *mask |= lanes;
    true
}

impl Shadow {
    /// Reads; the first lane for which that is a conflict.
    pub fn read_row(
        &mut self,
        race: &mut Race,
        agent: &mut Agent,
        row: &Row,
    ) -> Option<(usize, Conflict)> {
        let mut found = None;
        if let Reads::Block { warps, own } = &mut self.reads {
            own[agent.warp as usize].get_or_insert_with(|| zeros(warps.len()));
        }
        let together = agent.speaks_for_all();
        let mut left = row.mask;
        while left != 0 {
            let lane = left.trailing_zeros() as usize;
            let (count, step) = if together {
                row.run(lane, left)
            } else {
                (1, 0)
            };
            let run = FULL >> (32 - count) << lane;
            left &= !run;
            agent.lane = lane;
            let (words, bytes) = row.words(lane);
            let touch = agent.touch(bytes);
            if step == 0 {
                for word in words {
                    agent.lane = lane;
                    if !self.reads_plainly(race, agent, word, touch, run) {
                        self.read_each(race, agent, run, word, bytes, &mut found);
                    }
                }
                continue;
            }
            let line = Line {
                lane,
                lanes: count,
                word: words.start,
            };
            let done = count >= SHORTEST
                && match row.bytes {
                    4 => self.read_line::<1>(race, agent, line),
                    8 => self.read_line::<2>(race, agent, line),
                    16 => self.read_line::<4>(race, agent, line),
                    _ => self.read_line::<8>(race, agent, line),
                };
            if done {
                continue;
            }
            for lane in lanes(run) {
                agent.lane = lane;
                for word in row.words(lane).0 {
                    self.read_each(race, agent, 1 << lane, word, bytes, &mut found);
                }
            }
        }
        found
    }

    /// Reads of a word by some lanes, one after the other.
    fn read_each(
        &mut self,
        race: &mut Race,
        agent: &mut Agent,
        by: u32,
        word: u32,
        bytes: u8,
        found: &mut Option<(usize, Conflict)>,
    ) {
        let touch = agent.touch(bytes);
        for lane in lanes(by) {
            agent.lane = lane;
            if !self.reads_plainly(race, agent, word, touch, 1 << lane) {
                let conflict = self.read(race, agent, word, bytes);
                if let Some(conflict) = conflict
                    && found.is_none_or(|(first, _)| lane < first)
                {
                    *found = Some((lane, conflict));
                }
            }
        }
    }

    /// Writes; the first lane for which that is a conflict.
    pub fn write_row(
        &mut self,
        race: &Race,
        agent: &mut Agent,
        row: &Row,
    ) -> Option<(usize, Conflict)> {
        let mut found = None;
        let together = agent.speaks_for_all();
        let mut left = row.mask;
        while left != 0 {
            let lane = left.trailing_zeros() as usize;
            let (mut count, step) = if together {
                row.run(lane, left)
            } else {
                (1, 0)
            };
            if step == 0 {
                count = 1;
            }
            let run = FULL >> (32 - count) << lane;
            left &= !run;
            agent.lane = lane;
            let (words, bytes) = row.words(lane);
            let line = Line {
                lane,
                lanes: count,
                word: words.start,
            };
            let done = count >= SHORTEST
                && match row.bytes {
                    4 => self.write_line::<1>(race, agent, line),
                    8 => self.write_line::<2>(race, agent, line),
                    16 => self.write_line::<4>(race, agent, line),
                    _ => self.write_line::<8>(race, agent, line),
                };
            if done {
                continue;
            }
            let touch = agent.touch(bytes);
            for lane in lanes(run) {
                agent.lane = lane;
                for word in row.words(lane).0 {
                    if !self.writes_plainly(race, agent, word, touch) {
                        let conflict = self.write(race, agent, word, bytes);
                        found = found.or(conflict.map(|c| (lane, c)));
                    }
                }
            }
        }
        found
    }

    /// Whether the agent is certain to know of a word's last write.
    #[inline(always)]
    fn knows_write(&self, race: &Race, agent: &Agent, word: u32, lanes: u32) -> bool {
        let cell = &self.cells[word as usize];
        let special = Touch(cell.write_touch).special() || agent.non_coherent;
        let write = Epoch(cell.write);
        let own = || lanes == 1 << agent.lane && agent.is_own(write);
        let known = || own() || agent.makes_certain(race, write);
        cell.write == 0 || cell.write != SPLIT && !special && known()
    }

    /// A read by some lanes that know the same, if it is certain to conflict with nothing and
    /// there is no other read to be kept.
    #[inline(always)]
    fn reads_plainly(
        &mut self,
        race: &Race,
        agent: &Agent,
        word: u32,
        touch: Touch,
        lanes: u32,
    ) -> bool {
        let at = word as usize;
        if at >= self.cells.len() || !self.knows_write(race, agent, word, lanes) {
            return false;
        }
        let time = agent.clock.time;
        match &mut self.reads {
            Reads::Any(reads) => {
                let last = &mut reads[at];
                let epoch = Epoch::new(agent.block, agent.warp, 0, time).0;
                if last.epoch == epoch {
                    return reads_on(&mut last.touch, &mut last.lanes, touch, lanes);
                }
                if last.epoch == 0 && self.cells[at].reads == 0 {
                    *last = Last {
                        epoch,
                        touch: touch.0,
                        lanes,
                    };
                    return true;
                }
                false
            }
            Reads::Block { warps, own } => {
                let Some(own) = &mut own[agent.warp as usize] else {
                    return false;
                };
                let (warps, own) = (&mut warps[at], &mut own[at]);
                if *warps >> agent.warp & 1 == 0 {
                    *warps |= 1 << agent.warp;
                    *own = Own {
                        time,
                        touch: touch.0,
                        lanes,
                    };
                    return true;
                }
                own.time == time && reads_on(&mut own.touch, &mut own.lanes, touch, lanes)
            }
        }
    }

    /// A write of a whole word, if it is certain to conflict with nothing.
    #[inline(always)]
    fn writes_plainly(&mut self, race: &Race, agent: &Agent, word: u32, touch: Touch) -> bool {
        let at = word as usize;
        let lanes = 1 << agent.lane;
        if touch.bytes() != 15
            || at >= self.cells.len()
            || !self.knows_write(race, agent, word, lanes)
        {
            return false;
        }
        let cell = &mut self.cells[at];
        if cell.write == SPLIT || !agent.is_clean(cell.reads) {
            return false;
        }
        match &mut self.reads {
            Reads::Any(reads) => {
                let last = &mut reads[at];
                if last.epoch != 0 {
                    let read = Epoch(last.epoch);
                    let own =
                        agent.is_own(read.with_lane(agent.lane)) && last.lanes == 1 << agent.lane;
                    if Touch(last.touch).special() || !(own || agent.is_certain(read)) {
                        return false;
                    }
                    *last = Last::default();
                }
            }
            Reads::Block { warps, .. } => {
                if warps[at] != 0 {
                    return false;
                }
            }
        }
        cell.write = agent.epoch().0;
        cell.write_touch = touch.0;
        cell.reads = 0;
        true
    }
}
