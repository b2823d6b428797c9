//! A lane about to access memory, and what it knows of the accesses it finds there.

use super::{Epoch, HOST_OP, LaunchClock, Race, Touch, WarpClock};
use crate::memory::Scope;
use crate::registers::lanes;

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
    /// The operation.
    pub op: u32,
    /// Bytes of an element of the access.
    pub element: u32,
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
    /// Its operation.
    pub this_op: u32,
    /// Whether it reads.
    pub this_reads: bool,
    /// One of the two goes through the non-coherent path and the other writes.
    pub non_coherent: bool,
    /// A write to bytes that nobody had written before: the earlier read got nothing.
    pub unwritten: bool,
}

impl Agent<'_> {
    pub(super) fn epoch(&self) -> Epoch {
        Epoch::new(self.block, self.warp, self.lane, self.clock.time)
    }

    /// What memory keeps of this operation.
    #[inline(always)]
    pub(super) fn touch(&self, bytes: u8) -> Touch {
        let special = self.strong.is_some() || self.non_coherent;
        Touch::new(self.op, special, bytes)
    }

    /// Whether the lane knows of an access.
    #[inline(always)]
    pub(super) fn knows(&self, race: &Race, epoch: Epoch) -> bool {
        let (block, warp, lane) = (epoch.block(), epoch.warp(), epoch.lane());
        if block < self.launch.floor {
            return true;
        }
        if block == self.block {
            let own = warp == self.warp;
            if own && (lane == self.lane || self.clock.near.of_lane(self.lane, lane) > epoch.time())
            {
                return true;
            }
            if !own && self.clock.near.known[warp as usize] > epoch.time() {
                return true;
            }
        } else if race.knows_actor(self.launch, block) {
            return true;
        }
        let learned = self.clock.learned[self.lane].sure.as_ref();
        learned.is_some_and(|known| race.knows_through(known, epoch))
            || self.launch.clock.known.knows(epoch)
    }

    /// Whether the lane knows of an access, be it by the order of fences: then no value from
    /// before is left for it.
    pub(super) fn knows_fenced(&self, race: &Race, epoch: Epoch) -> bool {
        let fenced = self.clock.learned[self.lane].fenced.as_ref();
        self.knows(race, epoch) || fenced.is_some_and(|known| race.knows_through(known, epoch))
    }

    /// Whether the lane knows of the same access by several lanes of a warp.
    #[inline(always)]
    pub(super) fn knows_lanes(&self, race: &Race, epoch: Epoch, mask: u32) -> bool {
        let sibling = epoch.block() == self.block && epoch.warp() != self.warp;
        (sibling && self.clock.near.known[epoch.warp() as usize] > epoch.time())
            || lanes(mask).all(|lane| self.knows(race, epoch.with_lane(lane)))
    }

    /// A set of reads without the last ones as far as the lane knows of them.
    pub(super) fn without_known(&self, race: &Race, set: u32, word: u32, bytes: u8) -> u32 {
        let mut set = set;
        while let Some(&reader) = race.readers.get(set) {
            let epoch = Epoch::new(reader.block, reader.warp, 0, reader.time);
            let covered = reader.touch.bytes() & !bytes == 0;
            if !covered || !self.knows_lanes(race, epoch, reader.lanes(word)) {
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
        let Some(theirs) = access.strong() else {
            return false;
        };
        // Overlapping only in part, two accesses are not atomic to each other. Copies are seen
        // word by word, whatever the word.
        let whole = access.element == self.element || op == HOST_OP || self.op == HOST_OP;
        whole && race.includes(mine.min(theirs), other.block(), self.block)
    }

    /// Whether this access and an earlier one conflict.
    #[inline(always)]
    pub(super) fn against(
        &self,
        race: &Race,
        other: Epoch,
        touch: Touch,
        wrote: bool,
    ) -> Option<Conflict> {
        if !touch.special() && !self.non_coherent && self.knows(race, other) {
            return None;
        }
        self.against_special(race, other, touch, wrote)
    }

    #[cold]
    fn against_special(
        &self,
        race: &Race,
        other: Epoch,
        touch: Touch,
        wrote: bool,
    ) -> Option<Conflict> {
        let op = touch.op();
        let conflict = Conflict {
            other,
            other_op: op,
            other_wrote: wrote,
            this: self.epoch(),
            this_op: self.op,
            this_reads: false,
            non_coherent: false,
            unwritten: false,
        };
        // The non-coherent path wants memory that nobody, on this device or another, writes during
        // the launch: an order that came about within it does not help.
        let non_coherent = if wrote {
            self.non_coherent
        } else {
            race.accesses.get(&op).is_some_and(|a| a.non_coherent)
        };
        if non_coherent
            && !race.knows_actor(self.launch, other.block())
            && !race.knows_through(&self.launch.clock.known, other)
        {
            return Some(Conflict {
                non_coherent: true,
                ..conflict
            });
        }
        if self.knows(race, other) || self.morally_strong(race, other, op) {
            return None;
        }
        Some(conflict)
    }

    /// The first of some lanes' reads that this write conflicts with.
    #[inline(always)]
    pub(super) fn against_reads(
        &self,
        race: &Race,
        epoch: Epoch,
        mask: u32,
        touch: Touch,
    ) -> Option<Conflict> {
        if !touch.special() && self.knows_lanes(race, epoch, mask) {
            return None;
        }
        lanes(mask).find_map(|lane| self.against(race, epoch.with_lane(lane), touch, false))
    }
}
