//! A race in words: both accesses, and what is missing between them. Flags that failed to order
//! anything leave a note with the block that read them; a race that a flag should have prevented
//! names it.

use std::collections::VecDeque;

use super::clock::Epoch;
use super::{Conflict, HOST_OP, Race};
use crate::finding::Reason;
use crate::memory::{Order, Scope};

/// Notes kept of a block.
const MOST_NOTES: usize = 64;
/// How far back to look for the same note: whoever polls writes it again and again.
const LOOK_BACK: usize = 4;
/// Fences kept of a block.
const MOST_FENCES: usize = 8;

/// A flag that was read and ordered nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Note {
    reason: Reason,
    /// The operation to blame.
    op: u32,
    pub(super) flag: u64,
    pub(super) writer: Epoch,
    pub(super) writer_op: u32,
    pub(super) reader: Epoch,
    pub(super) reader_op: u32,
    /// The lanes of the reader's warp that read it.
    lanes: u32,
}

impl Note {
    /// A flag at an address, written and read.
    pub(super) fn new(
        flag: u64,
        (writer, writer_op): (Epoch, u32),
        (reader, reader_op): (Epoch, u32),
    ) -> Self {
        Self {
            reason: Reason::Unordered,
            op: HOST_OP,
            flag,
            writer,
            writer_op,
            reader,
            reader_op,
            lanes: 1 << reader.lane(),
        }
    }

    pub(super) fn because(self, reason: Reason, op: u32) -> Self {
        Self { reason, op, ..self }
    }
}

/// What a block remembers for reports, and for the order of its fences.
#[derive(Debug, Default)]
pub struct Notes {
    /// Its warps that have made strong accesses, as bits.
    pub(super) strong: u32,
    notes: VecDeque<Note>,
    /// The last fences that publish: warp, lanes, operation.
    fences: VecDeque<(u32, u32, u32)>,
}

impl Notes {
    pub(super) fn add(&mut self, note: Note) {
        let warp = |n: &Note| (n.reader.block(), n.reader.warp());
        let last = self.notes.iter_mut().rev().take(LOOK_BACK);
        for same in last {
            if (same.flag, same.op, same.writer) == (note.flag, note.op, note.writer)
                && same.reason == note.reason
                && warp(same) == warp(&note)
            {
                same.lanes |= note.lanes;
                return;
            }
        }
        if self.notes.len() == MOST_NOTES {
            self.notes.pop_front();
        }
        self.notes.push_back(note);
    }

    /// A fence of some lanes follows what they read relaxed: it is an acquire, or if what it
    /// should acquire stays out of its reach, the one to blame.
    pub(super) fn acquired(&mut self, block: u64, warp: u32, mask: u32, op: u32) {
        for note in &mut self.notes {
            let reader = note.reader;
            let mine = (reader.block(), reader.warp()) == (block, warp);
            if mine && mask & note.lanes != 0 && note.reason == Reason::FlagReadRelaxed {
                note.reason = Reason::AcquireTooNarrow;
                note.op = op;
            }
        }
    }

    /// A fence that publishes, by some lanes.
    pub(super) fn fenced(&mut self, warp: u32, mask: u32, op: u32) {
        let same = |f: &&mut (u32, u32, u32)| f.0 == warp && f.2 == op;
        if let Some(fence) = self.fences.iter_mut().find(same) {
            fence.1 |= mask;
            return;
        }
        if self.fences.len() == MOST_FENCES {
            self.fences.pop_front();
        }
        self.fences.push_back((warp, mask, op));
    }

    /// A fence by another thread than this, of its own warp if there is one.
    pub(super) fn fence_elsewhere(&self, warp: u32, lane: usize) -> Option<u32> {
        let others = |f: &&(u32, u32, u32)| f.0 != warp || f.1 & !(1 << lane) != 0;
        let own = self
            .fences
            .iter()
            .rev()
            .filter(others)
            .find(|f| f.0 == warp);
        own.or_else(|| self.fences.iter().rev().find(others))
            .map(|f| f.2)
    }

    /// The flag that should have ordered an access of `other` before this block.
    fn about(&self, race: &Race, other: Epoch) -> Option<&Note> {
        let launch = |epoch: Epoch| {
            let actor = &race.actors[epoch.block() as usize];
            (actor.stream, actor.number)
        };
        let closeness = |note: &Note| {
            if note.writer.thread() == other.thread() {
                4
            } else if (note.writer.block(), note.writer.warp()) == (other.block(), other.warp()) {
                3
            } else if note.writer.block() == other.block() {
                2
            } else if launch(note.writer) == launch(other) {
                1
            } else {
                0
            }
        };
        let best = self.notes.iter().max_by_key(|note| closeness(note))?;
        (closeness(best) > 0).then_some(best)
    }
}

fn scope_name(scope: Scope) -> &'static str {
    match scope {
        Scope::Cta => "block (.cta)",
        Scope::Cluster => "cluster (.cluster)",
        Scope::Gpu => "device (.gpu)",
        Scope::Sys => "system (.sys)",
    }
}

impl Race {
    /// Why two accesses race, and the whole story in words. `notes` are those of the later one's
    /// block.
    pub fn explain(
        &self,
        conflict: &Conflict,
        doing: &str,
        notes: Option<&Notes>,
    ) -> (Reason, String) {
        let op = conflict.this_op;
        let (reason, missing) = self.what_is_missing(conflict, notes);
        let earlier = if conflict.other_wrote {
            "written"
        } else {
            "read"
        };
        let words = format!(
            "{}; {}; {missing}",
            self.side(earlier, conflict.other, conflict.other_op),
            self.side(doing, conflict.this, op),
        );
        (reason, words)
    }

    fn side(&self, doing: &str, epoch: Epoch, op: u32) -> String {
        let (place, thread) = self.describe(epoch, op);
        let how = self.accesses.get(&op).map_or("", |a| match a.order {
            Order::Weak => " weakly",
            Order::Volatile => " (volatile)",
            Order::Relaxed => " (relaxed)",
            Order::Acquire => " (acquire)",
            Order::Release => " (release)",
            Order::AcqRel | Order::SeqCst => " (acquire and release)",
        });
        match (place, thread) {
            (Some(place), Some(thread)) => format!("{doing}{how} by {thread}, with {place}"),
            _ => format!("{doing} by the host"),
        }
    }

    fn place(&self, op: u32) -> String {
        match self.accesses.get(&op) {
            Some(access) if op != HOST_OP => access.place.to_string(),
            _ => "the host".to_owned(),
        }
    }

    /// How far an operation's scope goes, in words.
    fn reach(&self, op: u32) -> &'static str {
        let scope = self.accesses.get(&op).map_or(Scope::Sys, |a| a.scope);
        scope_name(scope)
    }

    fn what_is_missing(&self, conflict: &Conflict, notes: Option<&Notes>) -> (Reason, String) {
        let op = conflict.this_op;
        if conflict.non_coherent {
            let words = "one of them goes through the non-coherent path (ld.global.nc), which \
                         wants memory that nobody writes while the kernel runs";
            return (Reason::NonCoherent, words.to_owned());
        }
        let (Some(this), Some(other)) = (
            self.accesses.get(&op),
            self.accesses.get(&conflict.other_op),
        ) else {
            return (Reason::Unordered, String::new());
        };
        if let (Some(mine), Some(theirs)) = (this.strong(), other.strong()) {
            if this.element != other.element && conflict.other_op != HOST_OP {
                let words = format!(
                    "both are strong, but one is of {} bytes and the other of {}: accesses that \
                     overlap only in part are not atomic to each other",
                    this.element, other.element
                );
                return (Reason::MixedSizes, words);
            }
            return self.too_narrow(conflict, (op, mine), (conflict.other_op, theirs));
        }
        if let Some(note) = notes.and_then(|notes| notes.about(self, conflict.other)) {
            return self.failed_flag(note, conflict);
        }
        let both = op != HOST_OP && conflict.other_op != HOST_OP;
        if both && this.strong().is_some() != other.strong().is_some() {
            let this_is_weak = this.strong().is_none();
            let weak_wrote = if this_is_weak {
                !conflict.this_reads
            } else {
                conflict.other_wrote
            };
            let (reason, side) = if weak_wrote {
                (Reason::FlagWrittenWeakly, "write")
            } else {
                (Reason::FlagReadWeakly, "read")
            };
            let words = format!(
                "one is strong and the other weak: nothing orders a weak {side} by itself, and a \
                 flag wants strong accesses on both sides (release and acquire, or relaxed with \
                 fences); {}",
                self.missing(conflict.this, conflict.other)
            );
            return (reason, words);
        }
        let words = format!(
            "nothing stands between them: {}",
            self.missing(conflict.this, conflict.other)
        );
        (Reason::Unordered, words)
    }

    /// Both are strong, but one scope leaves the other's thread out.
    fn too_narrow(
        &self,
        conflict: &Conflict,
        mine: (u32, Scope),
        theirs: (u32, Scope),
    ) -> (Reason, String) {
        let (this, other) = (conflict.this.block(), conflict.other.block());
        let mine_is = !self.includes(mine.1, this, other);
        let (narrow, scope) = if mine_is { mine } else { theirs };
        let order = self.accesses.get(&narrow).map_or(Order::Weak, |a| a.order);
        let reason = match order {
            Order::Release => Reason::ReleaseTooNarrow,
            Order::Acquire => Reason::AcquireTooNarrow,
            Order::AcqRel if mine_is && conflict.this_reads => Reason::AcquireTooNarrow,
            Order::AcqRel => Reason::ReleaseTooNarrow,
            _ => Reason::ScopeTooNarrow,
        };
        let words = format!(
            "both are strong, but the {} is of {} scope only, which leaves out the other thread: \
             {}",
            if mine_is { "later" } else { "earlier" },
            scope_name(scope),
            self.missing(conflict.this, conflict.other)
        );
        (reason, words)
    }

    fn failed_flag(&self, note: &Note, conflict: &Conflict) -> (Reason, String) {
        let (writer, reader) = (self.place(note.writer_op), self.place(note.reader_op));
        let same_vector = note.writer_op == conflict.other_op
            && note.writer.thread() == conflict.other.thread()
            && self
                .accesses
                .get(&note.writer_op)
                .is_some_and(|a| a.element < a.bytes);
        let (reason, why) = if same_vector {
            let why = format!(
                "is an element of the vector that carries the data ({writer}): elements of a \
                 vector have no order among each other"
            );
            (Reason::VectorElements, why)
        } else {
            let at = self.place(note.op);
            let why = match note.reason {
                Reason::FlagRelaxed => format!(
                    "was stored relaxed ({writer}), and no fence stands before that in its \
                     thread: it released nothing"
                ),
                Reason::FenceElsewhere => format!(
                    "was stored relaxed ({writer}); the fence before it ({at}) stands in another \
                     thread, and a fence must stand in the thread that writes the flag"
                ),
                Reason::ReleaseTooNarrow => format!(
                    "was released at {} scope ({at}), which does not reach its reader",
                    self.reach(note.op)
                ),
                Reason::AcquireTooNarrow => format!(
                    "was acquired at {} scope ({at}), which does not reach its writer",
                    self.reach(note.op)
                ),
                Reason::FlagReadRelaxed => format!(
                    "was read relaxed ({reader}), and no fence stands after that in its thread: \
                     it acquired nothing"
                ),
                _ => format!("({writer}, {reader}) orders nothing"),
            };
            (note.reason, why)
        };
        let words = format!("the flag between them ({:#x}) {why}", note.flag);
        (reason, words)
    }
}
