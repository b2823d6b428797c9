//! A lane about to access memory, and what it knows of the accesses it finds there.
//!
//! The words that a warp accesses at once mostly have the same story. So the answers to the last
//! questions are remembered: while an agent lives its lanes only learn, and what was known stays
//! known.

use std::cell::Cell;
use std::sync::Arc;

use super::clock::Learned;
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
    /// Bytes of the whole access of the lane.
    pub bytes: u32,
    /// The scope of a strong access.
    pub strong: Option<Scope>,
    /// Through the non-coherent path.
    pub non_coherent: bool,
    /// Answers.
    pub memo: Memo,
}

/// What an agent has found out.
#[derive(Debug, Default)]
pub struct Memo {
    known: [Cell<Known>; KNOWN],
    /// An access, without its lane, that a lane does not know of.
    unknown: Cell<u64>,
    /// A set of reads, all of which lanes with this knowledge know of.
    clean: Cell<(u32, usize)>,
    /// A set of reads of which there is nothing to be forgotten.
    pub(super) kept: Cell<u32>,
}

/// Warps whose accesses an agent remembers to know of.
const KNOWN: usize = 4;

/// The accesses of all lanes of a warp before a time are known to lanes with this knowledge.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// See [`Epoch::of_warp`].
    warp: u64,
    until: u32,
    /// See [`Agent::knower`]; or [`ANYONE`].
    knower: usize,
}

/// All lanes of the agent's warp know.
const ANYONE: usize = usize::MAX;

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
    #[inline(always)]
    pub(super) fn epoch(&self) -> Epoch {
        Epoch::new(self.block, self.warp, self.lane, self.clock.time)
    }

    /// What memory keeps of this operation.
    #[inline(always)]
    pub(super) fn touch(&self, bytes: u8) -> Touch {
        let special = self.strong.is_some() || self.non_coherent;
        Touch::new(self.op, self.bytes, special, bytes)
    }

    /// What the lane has learned from elsewhere, as an address: lanes with the same know the same.
    #[inline(always)]
    fn knower(&self) -> usize {
        let sure = self.clock.learned[self.lane].sure.as_ref();
        sure.map_or(0, |sure| Arc::as_ptr(sure) as usize)
    }

    /// Whether all lanes of the warp have learned the same from elsewhere.
    #[inline(always)]
    pub(super) fn speaks_for_all(&self) -> bool {
        let address =
            |known: &Option<Arc<_>>| known.as_ref().map_or(0, |k| Arc::as_ptr(k) as usize);
        let learned = &self.clock.learned;
        let first = address(&learned[0].sure);
        let differ = |all, lane: &Learned| all | (address(&lane.sure) ^ first);
        learned.iter().fold(0, differ) == 0
    }

    /// Whether the lane knows of all accesses of a warp up to this one's time, and so do all that
    /// have learned the same.
    pub(super) fn makes_certain(&self, race: &Race, epoch: Epoch) -> bool {
        self.is_certain(epoch) || self.find_out(race, epoch) && self.is_certain(epoch)
    }

    /// Whether that is so of all reads of a set, and none of them is special.
    pub(super) fn makes_clean(&self, race: &Race, set: u32) -> bool {
        if self.is_clean(set) {
            return true;
        }
        let mut at = set;
        while let Some(reader) = race.readers.get(at) {
            let epoch = Epoch::new(reader.block, reader.warp, 0, reader.time);
            if reader.touch.special() || !self.makes_certain(race, epoch) {
                return false;
            }
            at = reader.before;
        }
        self.remember_clean(set);
        true
    }

    /// A set of reads without the last ones of which that is so, where whole words are accessed.
    pub(super) fn without_certain(&self, race: &Race, mut set: u32) -> u32 {
        while let Some(&reader) = race.readers.get(set) {
            let epoch = Epoch::new(reader.block, reader.warp, 0, reader.time);
            if !self.makes_certain(race, epoch) {
                break;
            }
            set = reader.before;
        }
        set
    }

    /// Whether the lane is known to know of all accesses of a warp up to this one's time.
    #[inline(always)]
    pub(super) fn is_certain(&self, epoch: Epoch) -> bool {
        if epoch.block() < self.launch.floor {
            return true;
        }
        let known = self.memo.known[slot(epoch)].get();
        known.warp == epoch.of_warp()
            && epoch.time() < known.until
            && (known.knower == ANYONE || known.knower == self.knower())
    }

    /// Whether an access is the lane's own.
    #[inline(always)]
    pub(super) fn is_own(&self, epoch: Epoch) -> bool {
        epoch.thread() == self.epoch().thread()
    }

    fn remember(&self, epoch: Epoch, until: u32, knower: usize) {
        self.memo.known[slot(epoch)].set(Known {
            warp: epoch.of_warp(),
            until,
            knower,
        });
    }

    /// Whether the lane knows of an access.
    #[inline(always)]
    pub(super) fn knows(&self, race: &Race, epoch: Epoch) -> bool {
        self.is_certain(epoch) || self.find_out(race, epoch)
    }

    #[inline(never)]
    fn find_out(&self, race: &Race, epoch: Epoch) -> bool {
        let (block, warp, lane, time) = (epoch.block(), epoch.warp(), epoch.lane(), epoch.time());
        if block == self.block {
            if warp == self.warp {
                let all = self.clock.near.of_all();
                if all > time {
                    self.remember(epoch, all, ANYONE);
                    return true;
                }
                if lane == self.lane || self.clock.near.of_lane(self.lane, lane) > time {
                    return true;
                }
            } else {
                let known = self.clock.near.known[warp as usize];
                if known > time {
                    self.remember(epoch, known, ANYONE);
                    return true;
                }
            }
        } else if race.knows_actor(self.launch, block) {
            self.remember(epoch, u32::MAX, ANYONE);
            return true;
        }
        let learned = self.clock.learned[self.lane].sure.as_deref();
        for (known, knower) in [
            (learned, self.knower()),
            (Some(&self.launch.clock.known), ANYONE),
        ] {
            let Some(known) = known else { continue };
            if let Some(times) = known.of_warp(epoch)
                && times[lane] > time
            {
                let all = times.iter().copied().min().unwrap_or(0);
                if all > time {
                    self.remember(epoch, all, knower);
                }
                return true;
            }
            if knower != ANYONE && race.knows_stream(known, epoch) {
                self.remember(epoch, u32::MAX, knower);
                return true;
            }
        }
        false
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
        self.is_certain(epoch) || lanes(mask).all(|lane| self.knows(race, epoch.with_lane(lane)))
    }

    /// As [`knows_lanes`](Self::knows_lanes), but it may say no of what another lane of the warp
    /// does not know: good for what need not, but may be forgotten.
    #[inline(always)]
    pub(super) fn surely_knows_lanes(&self, race: &Race, epoch: Epoch, mask: u32) -> bool {
        if self.memo.unknown.get() == epoch.0 {
            return false;
        }
        let knows = self.knows_lanes(race, epoch, mask);
        if !knows {
            self.memo.unknown.set(epoch.0);
        }
        knows
    }

    /// Whether the lane is known to know of all reads of a set.
    #[inline(always)]
    pub(super) fn is_clean(&self, set: u32) -> bool {
        set == 0 || self.memo.clean.get() == (set, self.knower())
    }

    /// The lane knows of all reads of a set, and so do all that know as much.
    pub(super) fn remember_clean(&self, set: u32) {
        self.memo.clean.set((set, self.knower()));
    }

    /// A set of reads without the last ones as far as the lane knows of them.
    pub(super) fn without_known(&self, race: &Race, set: u32, word: u32, bytes: u8) -> u32 {
        if self.memo.kept.get() == set {
            return set;
        }
        let mut left = set;
        while let Some(&reader) = race.readers.get(left) {
            let epoch = Epoch::new(reader.block, reader.warp, 0, reader.time);
            let covered = reader.touch.bytes() & !bytes == 0;
            if !covered || !self.knows_lanes(race, epoch, reader.lanes(word)) {
                break;
            }
            left = reader.before;
        }
        if left == set {
            // To keep what another lane knows of is no mistake.
            self.memo.kept.set(set);
        }
        left
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
        if touch.special() {
            // Strong accesses by one operation are of one size.
            let strong = touch.op() == self.op && self.strong.is_some();
            if strong && other.block() == self.block {
                return None;
            }
        } else if !self.non_coherent && self.knows(race, other) {
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

#[inline(always)]
fn slot(epoch: Epoch) -> usize {
    let warp = epoch.of_warp();
    (warp ^ warp >> 5) as usize % KNOWN
}
