//! Counting: what kernels and copies did, for `VGPU_REPORT` and `vgpuTakeReport`.
//!
//! Nothing is counted unless [`World::report`](crate::machine::World::report) is there: then the
//! interpreter tells it of every instruction, and the one door to memory of every access that
//! succeeded. `shape` is the result as data, `requests` says what a warp's request costs,
//! `touched` counts by byte, `waits` tells the turns of polling loops from other loads, `table` is
//! for people.

mod requests;
mod shape;
mod table;
mod touched;
mod waits;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use shape::{Atomics, Copied, Counts, Executed, Global, Launch, Link, Report, Shared, Touched};
pub use waits::Waits;

use crate::machine;
use crate::memory::{Access, Memory, Order, Scope, Space, space_of};
use crate::program::Kernel;
use crate::registers::lanes;
use touched::{AllTouched, Doing};

/// What a strong operation or a fence is, for its name in [`Counts::strong`].
type Strong = (&'static str, Order, Scope);

/// What a launch did so far.
struct Tally {
    launch: Launch,
    kernel: Arc<Kernel>,
    /// How often each operation of each function was executed.
    executed: Vec<Vec<Executed>>,
    strong: Vec<(Strong, u64)>,
}

/// Counts.
#[derive(Default)]
pub struct Counter {
    /// Launches under way.
    running: Vec<Tally>,
    /// Which of them, and which of its functions, the warp runs whose turn it is.
    current: usize,
    function: usize,
    ended: Vec<Launch>,
    copies: BTreeMap<(Option<u32>, Option<u32>), Copied>,
    touched: AllTouched,
}

impl Tally {
    fn new(launch: &machine::Launch) -> Self {
        let functions = launch.kernel.functions.iter();
        Self {
            launch: Launch {
                id: launch.id,
                kernel: launch.kernel.name.clone(),
                device: launch.device,
                grid: launch.grid,
                block: launch.block,
                counts: Counts::default(),
            },
            executed: functions
                .map(|f| vec![Executed::default(); f.ops.len()])
                .collect(),
            kernel: launch.kernel.clone(),
            strong: Vec::new(),
        }
    }

    fn strong(&mut self, what: Strong, threads: u64) {
        match self.strong.iter_mut().find(|(known, _)| *known == what) {
            Some((_, n)) => *n += threads,
            None => self.strong.push((what, threads)),
        }
    }

    /// The launch as it is reported.
    fn finish(&self) -> Launch {
        let mut launch = self.launch.clone();
        let counts = &mut launch.counts;
        for (function, executed) in self.kernel.functions.iter().zip(&self.executed) {
            for (op, n) in function.ops.iter().zip(executed) {
                if n.warps > 0 {
                    let name = op.place.instruction.clone();
                    let all = counts.instructions.entry(name).or_default();
                    all.warps += n.warps;
                    all.lanes += n.lanes;
                    counts.lane_instructions += n.lanes;
                }
            }
        }
        for &((verb, order, scope), n) in &self.strong {
            let order = match order {
                Order::Weak => "weak",
                Order::Volatile => "volatile",
                Order::Relaxed => "relaxed",
                Order::Acquire => "acquire",
                Order::Release => "release",
                Order::AcqRel => "acq_rel",
                Order::SeqCst => "sc",
            };
            let scope = match scope {
                Scope::Cta => "cta",
                Scope::Cluster => "cluster",
                Scope::Gpu => "gpu",
                Scope::Sys => "sys",
            };
            let name = format!("{verb}.{order}.{scope}");
            *counts.strong.entry(name).or_default() += n;
        }
        launch
    }
}

impl Counter {
    /// The warp whose turn it is runs a function of this launch.
    #[inline]
    pub(crate) fn select(&mut self, launch: &machine::Launch, function: usize) {
        self.function = function;
        let known = self.running.get(self.current);
        if known.is_none_or(|t| t.launch.id != launch.id) {
            self.current = self.place_of(launch);
        }
    }

    /// A launch begins, or goes on after its counts were taken.
    fn place_of(&mut self, launch: &machine::Launch) -> usize {
        let known = self.running.iter().position(|t| t.launch.id == launch.id);
        known.unwrap_or_else(|| {
            self.running.push(Tally::new(launch));
            self.running.len() - 1
        })
    }

    /// Lanes execute an operation of the function that was selected.
    #[inline(always)]
    pub(crate) fn executed(&mut self, op: u32, mask: u32) {
        let executed = &mut self.running[self.current].executed[self.function][op as usize];
        executed.warps += 1;
        executed.lanes += u64::from(mask.count_ones());
    }

    /// A launch has ended, one way or the other.
    pub(crate) fn end(&mut self, launch: &machine::Launch) {
        // One without a warp that ran is one all the same.
        let at = self.place_of(launch);
        let tally = self.running.swap_remove(at);
        self.ended.push(tally.finish());
    }

    /// A barrier of a block of a launch is complete.
    pub(crate) fn barrier(&mut self, launch: &machine::Launch) {
        let at = self.place_of(launch);
        self.running[at].launch.counts.barriers += 1;
    }

    /// A fence by threads of the warp whose turn it is.
    pub(crate) fn fence(&mut self, mask: u32, order: Order, scope: Scope) {
        let threads = u64::from(mask.count_ones());
        self.running[self.current].strong(("fence", order, scope), threads);
    }

    /// Loads that succeeded.
    pub(crate) fn load(&mut self, memory: &Memory, waits: &mut Waits, op: u32, access: &Access) {
        let repeated = if access.order == Order::Weak {
            waits.forget(access.mask);
            0
        } else {
            waits.repeated(op, access)
        };
        self.strong_access("ld", access, access.mask & !repeated);
        let (global, shared) = split(access);
        let tally = &mut self.running[self.current];
        tally.launch.counts.spins += u64::from(repeated.count_ones());
        let counts = &mut tally.launch.counts;
        add_global(&mut counts.global_loads, access, global & !repeated);
        add_shared(&mut counts.shared_loads, access, shared & !repeated);
        self.bytes(memory, access, global & !repeated, Doing::Read);
        self.spun(memory, access, global & repeated);
    }

    /// Stores that succeeded.
    pub(crate) fn store(&mut self, memory: &Memory, waits: &mut Waits, access: &Access) {
        waits.forget(access.mask);
        self.strong_access("st", access, access.mask);
        let (global, shared) = split(access);
        let counts = &mut self.running[self.current].launch.counts;
        add_global(&mut counts.global_stores, access, global);
        add_shared(&mut counts.shared_stores, access, shared);
        self.bytes(memory, access, global, Doing::Write);
    }

    /// Atomic operations that succeeded.
    pub(crate) fn atomic(&mut self, memory: &Memory, waits: &mut Waits, access: &Access) {
        waits.forget(access.mask);
        self.strong_access("atom", access, access.mask);
        let (global, shared) = split(access);
        let counts = &mut self.running[self.current].launch.counts;
        add_global(&mut counts.global_atomics, access, global);
        if shared != 0 {
            let threads = u64::from(shared.count_ones());
            counts.shared_atomics.requests += 1;
            counts.shared_atomics.threads += threads;
            counts.shared_atomics.bytes += threads * u64::from(access.bytes);
        }
        self.bytes(memory, access, global, Doing::Change);
    }

    fn strong_access(&mut self, verb: &'static str, access: &Access, mask: u32) {
        if access.order != Order::Weak && mask != 0 {
            let threads = u64::from(mask.count_ones());
            self.running[self.current].strong((verb, access.order, access.scope), threads);
        }
    }

    /// Counts an access by allocation and by link.
    fn bytes(&mut self, memory: &Memory, access: &Access, mask: u32, doing: Doing) {
        let launch = &mut self.running[self.current].launch;
        let from = launch.device;
        let mut last = None;
        for lane in lanes(mask) {
            let address = access.addresses[lane];
            last = self.touched.find(memory, last, address);
            let Some(found) = last else { continue };
            self.touched.touch(found, address, access.bytes, doing);
            if found.device != Some(from) {
                let link = launch.counts.link_mut(from, found.device);
                let bytes = match doing {
                    Doing::Read => &mut link.read,
                    Doing::Write => &mut link.written,
                    Doing::Change => &mut link.atomics,
                };
                *bytes += u64::from(access.bytes);
            }
        }
    }

    /// Counts what polling loops load again, where it goes over a link.
    fn spun(&mut self, memory: &Memory, access: &Access, mask: u32) {
        let launch = &mut self.running[self.current].launch;
        let from = launch.device;
        let mut last = None;
        for lane in lanes(mask) {
            last = self.touched.find(memory, last, access.addresses[lane]);
            if let Some(found) = last
                && found.device != Some(from)
            {
                launch.counts.link_mut(from, found.device).spun += u64::from(access.bytes);
            }
        }
    }

    /// A copy of so many bytes, done by a stream, between two memories.
    pub(crate) fn copied(
        &mut self,
        memory: &Memory,
        from: Option<u32>,
        to: Option<u32>,
        bytes: u64,
    ) {
        let ways = match (from, to) {
            (Some(a), Some(b)) if a != b && !memory.links.is_enabled(a, b) => {
                vec![(from, None), (None, to)]
            }
            _ => vec![(from, to)],
        };
        for (from, to) in ways {
            let new = Copied {
                from,
                to,
                ..Copied::default()
            };
            let way = self.copies.entry((from, to)).or_insert(new);
            way.count += 1;
            way.bytes += bytes;
        }
    }

    /// What kernels did to a part of an allocation; None if it is not one.
    pub fn part(&self, memory: &Memory, address: u64, bytes: u64) -> Option<Touched> {
        self.touched.part(memory, address, bytes)
    }

    /// All of it so far.
    pub fn report(&self) -> Report {
        let mut launches = self.ended.clone();
        launches.extend(self.running.iter().map(Tally::finish));
        launches.sort_by_key(|l| l.id);
        let mut total = Counts::default();
        for launch in &launches {
            total.add(&launch.counts);
        }
        Report {
            launches,
            total,
            copies: self.copies.values().copied().collect(),
            memory: self.touched.list(),
        }
    }
}

/// The lanes of an access that concern global and shared memory.
fn split(access: &Access) -> (u32, u32) {
    match access.space {
        Space::Global => (access.mask, 0),
        Space::Shared => (0, access.mask),
        Space::Generic => {
            let of = |space| {
                let there = |&lane: &usize| space_of(access.addresses[lane]) == space;
                lanes(access.mask).filter(there).fold(0, |m, l| m | 1 << l)
            };
            (of(Space::Global), of(Space::Shared))
        }
        Space::Const | Space::Local | Space::Param => (0, 0),
    }
}

fn add_global(to: &mut Global, access: &Access, mask: u32) {
    if mask == 0 {
        return;
    }
    let threads = u64::from(mask.count_ones());
    to.requests += 1;
    to.threads += threads;
    to.bytes += threads * u64::from(access.bytes);
    to.sectors += requests::sectors(access.addresses, mask);
}

fn add_shared(to: &mut Shared, access: &Access, mask: u32) {
    if mask == 0 {
        return;
    }
    let threads = u64::from(mask.count_ones());
    // The generic window begins at a multiple of all banks.
    let (passes, parts) = requests::wavefronts(access.addresses, mask, access.bytes);
    to.requests += 1;
    to.threads += threads;
    to.bytes += threads * u64::from(access.bytes);
    to.wavefronts += passes;
    to.conflicts += passes - parts;
}
