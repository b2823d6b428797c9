//! Releases, acquires and fences: how what one thread knows reaches another.
//!
//! The patterns are those of the PTX ISA ("Release and Acquire Patterns"). A release pattern on a
//! flag begins with a release or a fence and ends with a strong write; an acquire pattern begins
//! with a strong read and ends with an acquire or a fence. They synchronise if the write reaches
//! the read (at once, or through read-modify-writes) and the pattern's first and last operations
//! are morally strong. So a write leaves at the flag, beside its own scope, the scope and the
//! knowledge of every pattern that it ends.

use std::sync::{Arc, OnceLock};

use super::agent::Agent;
use super::clock::{Epoch, Knowledge, Learned, Near, WarpClock};
use super::history::FlagAccess;
use super::words::{Note, Notes};
use super::{LaunchClock, Race};
use crate::finding::Reason;
use crate::machine::Warp;
use crate::memory::{Order, Scope};
use crate::registers::lanes;

/// Releases kept apart at a flag that read-modify-writes keep handing on; more are merged.
const MOST_RELEASES: usize = 8;

/// The beginning of a release pattern, as the write that ends it leaves it at the flag.
#[derive(Debug)]
pub(super) struct Release {
    /// Who released: for the reach of its scope, and for words. Who knows of this epoch of the
    /// thread's has learned all this, because knowledge is only ever handed on whole.
    pub(super) by: Epoch,
    /// The release or fence.
    pub(super) op: u32,
    pub(super) scope: Scope,
    /// Releases of several blocks in one: good for scopes beyond a block only.
    merged: bool,
    pub(super) learned: Learned,
}

impl Release {
    /// What the driver released: the work a stream has done.
    pub(super) fn of_stream(launch: &LaunchClock, by: Epoch) -> Self {
        let known = launch.clock.known.clone();
        Self {
            by,
            op: super::HOST_OP,
            scope: Scope::Sys,
            merged: false,
            learned: Learned {
                sure: Some(Arc::new(known)),
                fenced: None,
            },
        }
    }

    /// Whether a scope includes a block and the releasing thread.
    fn reaches(&self, race: &Race, scope: Scope, block: u64) -> bool {
        if self.merged && scope < Scope::Gpu {
            return false;
        }
        race.includes(scope, self.by.block(), block)
    }
}

/// Adds releases that a read-modify-write hands on.
pub(super) fn hand_on(race: &Race, to: &mut Vec<Arc<Release>>, from: &[Arc<Release>]) {
    to.extend(from.iter().cloned());
    if to.len() <= MOST_RELEASES {
        return;
    }
    let mut merged: Vec<Release> = Vec::new();
    for release in to.drain(..) {
        let device = |r: &Release| race.actors[r.by.block() as usize].device;
        let same = merged
            .iter_mut()
            .find(|m| (device(m), m.scope) == (device(&release), release.scope));
        match same {
            Some(same) => {
                same.merged |= release.merged || same.by.block() != release.by.block();
                same.learned.join(&release.learned);
            }
            None => merged.push(Release {
                learned: release.learned.clone(),
                ..*release
            }),
        }
    }
    to.extend(merged.into_iter().map(Arc::new));
}

/// A fence that publishes: what its thread knew then, put together when a flag asks for it.
#[derive(Debug)]
pub(super) struct Mark {
    time: u32,
    scope: Scope,
    op: u32,
    learned: Learned,
    near: Arc<Near>,
    release: OnceLock<Arc<Release>>,
}

/// The same at a release operation.
fn release_now(
    race: &Race,
    launch: &LaunchClock,
    by: Epoch,
    own: u32,
    near: &Near,
    learned: &Learned,
) -> Learned {
    let mut known = learned
        .sure
        .as_ref()
        .map_or_else(Knowledge::default, |k| (**k).clone());
    known.learn(&launch.clock.known);
    known.prune(race);
    let warps = near.tell(by.warp(), by.lane(), own, u32::MAX);
    known.add(by.block(), &warps);
    Learned {
        sure: Some(Arc::new(known)),
        fenced: learned.fenced.clone(),
    }
}

impl Mark {
    fn release(&self, race: &Race, launch: &LaunchClock, by: Epoch) -> Arc<Release> {
        let release = self.release.get_or_init(|| {
            let learned = release_now(race, launch, by, self.time, &self.near, &self.learned);
            Arc::new(Release {
                by: by.at(self.time - 1),
                op: self.op,
                scope: self.scope,
                merged: false,
                learned,
            })
        });
        release.clone()
    }
}

/// What relaxed reads of a lane found, for a fence of at least this scope to acquire.
#[derive(Debug)]
pub(super) struct Pending {
    lane: usize,
    scope: Scope,
    learned: Learned,
    /// What was found last: who spins finds it again.
    last: Learned,
}

/// The release patterns that a strong write by a lane ends, its own release included. The
/// clock's time is past the write afterwards if it is a release.
pub(super) fn releases(
    race: &Race,
    launch: &LaunchClock,
    clock: &mut WarpClock,
    by: Epoch,
    op: u32,
    order: Order,
    scope: Scope,
) -> Vec<Arc<Release>> {
    let lane = by.lane();
    let mut out = Vec::new();
    if matches!(order, Order::Release | Order::AcqRel | Order::SeqCst) {
        let own = clock.advance();
        let learned = release_now(race, launch, by, own, &clock.near, &clock.learned[lane]);
        out.push(Arc::new(Release {
            by,
            op,
            scope,
            merged: false,
            learned,
        }));
        if scope == Scope::Sys {
            return out;
        }
    }
    // A wider fence before says less, but to more.
    let mut last: Option<&Arc<Mark>> = None;
    for mark in clock.marks[lane].iter().rev().flatten() {
        if last.is_none_or(|last| !Arc::ptr_eq(last, mark)) {
            out.push(mark.release(race, launch, by));
        }
        last = Some(mark);
    }
    out
}

/// A strong read took its value from a write that ended these release patterns, and the two are
/// morally strong.
pub(super) fn observe(
    race: &Race,
    agent: &mut Agent,
    notes: &mut Notes,
    access: &FlagAccess,
    releases: &[Arc<Release>],
    note: Note,
) {
    let (reader, order, scope) = (note.reader, access.order, access.scope);
    let lane = reader.lane();
    for release in releases {
        if access.raced {
            // What a flag guards whose own accesses race is a consequence of that.
            agent.clock.learn(lane, &release.learned);
            continue;
        }
        if !release.merged && agent.knows(race, release.by) {
            continue;
        }
        if !release.reaches(race, release.scope, reader.block()) {
            notes.add(note.because(Reason::ReleaseTooNarrow, release.op));
            continue;
        }
        if !matches!(order, Order::Acquire | Order::AcqRel | Order::SeqCst) {
            let need = [Scope::Cta, Scope::Gpu, Scope::Sys]
                .into_iter()
                .find(|&s| release.reaches(race, s, reader.block()))
                .unwrap_or(Scope::Sys);
            agent.clock.wait_for_fence(lane, need, &release.learned);
            notes.add(note.because(Reason::FlagReadRelaxed, note.reader_op));
        } else if release.reaches(race, scope, reader.block()) {
            agent.clock.learn(lane, &release.learned);
        } else {
            notes.add(note.because(Reason::AcquireTooNarrow, note.reader_op));
        }
    }
}

impl WarpClock {
    fn wait_for_fence(&mut self, lane: usize, scope: Scope, learned: &Learned) {
        let same = self
            .pending
            .iter_mut()
            .find(|p| p.lane == lane && p.scope == scope);
        match same {
            Some(pending) if pending.last.is_same(learned) => {}
            Some(pending) => {
                pending.learned.join(learned);
                pending.last = learned.clone();
            }
            None => self.pending.push(Pending {
                lane,
                scope,
                learned: learned.clone(),
                last: learned.clone(),
            }),
        }
    }

    /// The acquiring half of a fence.
    fn acquire(&mut self, mask: u32, scope: Scope) {
        let learned = &mut self.learned;
        self.pending.retain(|pending| {
            let mine = mask >> pending.lane & 1 != 0 && pending.scope <= scope;
            if mine {
                learned[pending.lane].join(&pending.learned);
            }
            !mine
        });
    }
}

/// The order of `fence.sc`: what the fences so far have made known to later ones that are
/// morally strong with them.
#[derive(Debug, Default)]
pub(super) struct FenceOrder {
    blocks: rustc_hash::FxHashMap<u64, Arc<Knowledge>>,
    devices: rustc_hash::FxHashMap<u32, Arc<Knowledge>>,
    system: Option<Arc<Knowledge>>,
}

impl FenceOrder {
    /// Nobody will be in this block any more.
    pub(super) fn end_block(&mut self, block: u64) {
        self.blocks.remove(&block);
    }
}

/// A fence.
#[derive(Debug, Clone, Copy)]
pub struct Fence {
    /// See [`Order`].
    pub order: Order,
    /// See [`Scope`].
    pub scope: Scope,
    /// The operation.
    pub op: u32,
}

/// A fence by the lanes of a mask.
pub fn fence(
    race: &mut Race,
    launch: &LaunchClock,
    block: u64,
    notes: &mut Notes,
    warp: &mut Warp,
    mask: u32,
    fence: Fence,
) {
    let Fence { order, scope, op } = fence;
    if matches!(order, Order::Acquire | Order::AcqRel | Order::SeqCst) {
        warp.clock.acquire(mask, scope);
        notes.acquired(block, warp.index, mask, op);
    }
    if order == Order::SeqCst {
        fence_sc(race, launch, block, notes, warp, mask, scope);
    }
    if matches!(order, Order::Release | Order::AcqRel | Order::SeqCst) {
        let clock = &mut warp.clock;
        let time = clock.advance();
        let near = Arc::new(clock.near.clone());
        for lane in lanes(mask) {
            let mark = Arc::new(Mark {
                time,
                scope,
                op,
                learned: clock.learned[lane].clone(),
                near: near.clone(),
                release: OnceLock::new(),
            });
            let widest = match scope {
                Scope::Cta | Scope::Cluster => 0,
                Scope::Gpu => 1,
                Scope::Sys => 2,
            };
            for known in &mut clock.marks[lane][..=widest] {
                *known = Some(mark.clone());
            }
        }
        notes.fenced(warp.index, mask, op);
    }
}

/// A `fence.sc` takes its place in the order: after all those before that are morally strong
/// with it. Lanes that run it together are ordered among each other too; that each learns of
/// all others says more than the model does, which only makes fewer values stale.
fn fence_sc(
    race: &mut Race,
    launch: &LaunchClock,
    block: u64,
    notes: &Notes,
    warp: &mut Warp,
    mask: u32,
    scope: Scope,
) {
    let device = race.actors[block as usize].device;
    let mut all = Knowledge::default();
    all.learn(&launch.clock.known);
    let order = &race.fences;
    let wide = (scope >= Scope::Gpu).then(|| order.devices.get(&device));
    let system = (scope == Scope::Sys).then_some(order.system.as_ref());
    let before = [order.blocks.get(&block), wide.flatten(), system.flatten()];
    for known in before.into_iter().flatten() {
        all.learn(known);
    }
    let clock = &mut warp.clock;
    let own = clock.advance();
    for lane in lanes(mask) {
        // Only strong accesses have old values: who made none need not be known.
        let warps = clock.near.tell(warp.index, lane, own, notes.strong);
        all.add(block, &warps);
        let learned = &clock.learned[lane];
        for known in [&learned.sure, &learned.fenced].into_iter().flatten() {
            all.learn(known);
        }
    }
    all.prune(race);
    let all = Arc::new(all);
    for lane in lanes(mask) {
        clock.learned[lane].fenced = Some(all.clone());
    }
    let order = &mut race.fences;
    order.blocks.insert(block, all.clone());
    if scope >= Scope::Gpu {
        order.devices.insert(device, all.clone());
    }
    if scope == Scope::Sys {
        order.system = Some(all);
    }
}
