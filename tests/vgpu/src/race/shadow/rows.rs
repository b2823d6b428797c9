//! The weak accesses of a warp, all lanes at once. Nearly all find words whose last write and last
//! reads their lane is certain to know of; these are dealt with here, in a few comparisons a
//! word, or as a whole where the lanes lie side by side (`lines`). The others go the long way, one
//! by one.

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

    /// The first word of a line: 32 lanes side by side, with whole words each.
    #[inline(always)]
    fn line(&self) -> Option<u32> {
        if self.mask != FULL || self.bytes < 4 {
            return None;
        }
        let (first, bytes) = (self.addresses[0], u64::from(self.bytes));
        let lanes = self.addresses.iter().zip(0u64..);
        let gaps = lanes.fold(0, |gaps, (&at, lane)| {
            gaps | (at ^ first.wrapping_add(lane * bytes))
        });
        (gaps == 0).then_some(((first - self.base) / 4) as u32)
    }
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
        if let Some(first) = row.line() {
            agent.lane = 0;
            let done = match row.bytes {
                4 => self.read_line::<1>(race, agent, first),
                8 => self.read_line::<2>(race, agent, first),
                16 => self.read_line::<4>(race, agent, first),
                _ => self.read_line::<8>(race, agent, first),
            };
            if done {
                return None;
            }
        }
        for lane in lanes(row.mask) {
            agent.lane = lane;
            let (words, bytes) = row.words(lane);
            let touch = agent.touch(bytes);
            for word in words {
                if !self.reads_plainly(agent, word, touch) {
                    let conflict = self.read(race, agent, word, bytes);
                    found = found.or(conflict.map(|c| (lane, c)));
                }
            }
        }
        found
    }

    /// Writes; the first lane for which that is a conflict.
    pub fn write_row(
        &mut self,
        race: &Race,
        agent: &mut Agent,
        row: &Row,
    ) -> Option<(usize, Conflict)> {
        let mut found = None;
        if let Some(first) = row.line() {
            agent.lane = 0;
            let done = match row.bytes {
                4 => self.write_line::<1>(race, agent, first),
                8 => self.write_line::<2>(race, agent, first),
                16 => self.write_line::<4>(race, agent, first),
                _ => self.write_line::<8>(race, agent, first),
            };
            if done {
                return None;
            }
        }
        for lane in lanes(row.mask) {
            agent.lane = lane;
            let (words, bytes) = row.words(lane);
            let touch = agent.touch(bytes);
            for word in words {
                if !self.writes_plainly(agent, word, touch) {
                    let conflict = self.write(race, agent, word, bytes);
                    found = found.or(conflict.map(|c| (lane, c)));
                }
            }
        }
        found
    }

    /// Whether the agent is certain to know of a word's last write.
    #[inline(always)]
    fn knows_write(&self, agent: &Agent, word: u32) -> bool {
        let cell = &self.cells[word as usize];
        let special = Touch(cell.write_touch).special() || agent.non_coherent;
        let write = Epoch(cell.write);
        cell.write == 0 || !special && (agent.is_certain(write) || agent.is_own(write))
    }

    /// A read, if it is certain to conflict with nothing and there is no other read to be kept.
    #[inline(always)]
    fn reads_plainly(&mut self, agent: &Agent, word: u32, touch: Touch) -> bool {
        let at = word as usize;
        if at >= self.cells.len() || !self.knows_write(agent, word) {
            return false;
        }
        let (time, lanes) = (agent.clock.time, 1 << agent.lane);
        match &mut self.reads {
            Reads::Any(reads) => {
                let last = &mut reads[at];
                let epoch = Epoch::new(agent.block, agent.warp, 0, time).0;
                if last.epoch == epoch && last.touch == touch.0 {
                    last.lanes |= lanes;
                    return true;
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
                if own.time == time && own.touch == touch.0 {
                    own.lanes |= lanes;
                    return true;
                }
                false
            }
        }
    }

    /// A write of a whole word, if it is certain to conflict with nothing.
    #[inline(always)]
    fn writes_plainly(&mut self, agent: &Agent, word: u32, touch: Touch) -> bool {
        let at = word as usize;
        if touch.bytes() != 15 || at >= self.cells.len() || !self.knows_write(agent, word) {
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
