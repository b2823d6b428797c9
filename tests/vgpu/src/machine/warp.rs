//! One warp: its lanes, gathered in groups that stand at the same operation, and the loop that
//! runs them.
//!
//! Every lane has a program counter of its own. Lanes with the same counter in the same frame
//! form a group and run together; the group deepest in calls and lowest in the code goes first,
//! so that lanes meet again where branches join. A group that keeps jumping back gives way to
//! the others after [`PATIENCE`] turns, or lanes spinning on what a lane of their own warp
//! will write would never end.

use super::{Block, Cx, Exchange, Launch, World};
use std::sync::Arc;

use crate::finding::{Fault, Finding, Kind, Place};
use crate::memory::LaneMemory;
use crate::program::{Action, BarrierResult, Op, Step, WarpSync};
use crate::race::{self, WarpClock};
use crate::registers::{FULL, LANES, Lanes, Registers, lanes};
use crate::report::Waits;

/// Backward jumps a group may take while others of its warp could run.
const PATIENCE: u32 = 32;
/// Backward jumps with only reads between them after which a warp gives up its turn.
const SPINS: u32 = 4;
/// Bytes of local memory and frames a thread may use: the hardware's own limit is 512 KiB.
const LOCAL_LIMIT: u32 = 512 << 10;
/// Bytes of registers all frames of a warp may use, against runaway recursion.
const FRAMES_LIMIT: usize = 256 << 20;

/// Lanes that stand at the same operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The operation, an index into the frame's function.
    pub pc: u32,
    /// Index into the warp's frames.
    pub frame: usize,
    /// The lanes.
    pub mask: u32,
    /// Why it does not run.
    pub wait: Wait,
}

/// Why a group does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It can.
    No,
    /// For the other lanes of a warp-wide or aligned operation.
    Lanes,
    /// At this barrier of the block.
    Barrier(u32),
    /// Until this virtual time.
    Until(u64),
}

/// A call in progress.
pub struct Frame {
    /// Index into the kernel's functions.
    pub function: usize,
    /// Its registers.
    pub registers: Registers,
    /// Formals, results and arguments.
    pub params: LaneMemory,
    /// Where its local variables begin.
    pub local_base: u32,
    /// Calls below it.
    pub depth: u32,
    /// The caller: its frame, the operation after the call, the call site.
    caller: Option<(usize, u32, u32)>,
    /// Lanes that have not returned.
    inside: u32,
}

/// A strong read, as whoever spins makes them: the first lane's.
#[derive(Debug, Clone)]
pub(crate) struct Polled {
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    pub(crate) place: Arc<Place>,
}

/// What a warp is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarpState {
    /// It can go on.
    Ready,
    /// It waits for barriers of its block only.
    Blocked,
    /// It waits for this virtual time, at the earliest.
    Asleep(u64),
    /// All its lanes have ended.
    Done,
}

/// See the module.
pub struct Warp {
    /// Its number in the block.
    pub index: u32,
    /// The lanes that are threads of the block.
    pub existing: u32,
    /// Those that have not exited.
    pub live: u32,
    /// The threads' local memory.
    pub local: LaneMemory,
    /// What its lanes know, for the race checks.
    pub clock: WarpClock,
    /// Operations run, for `%clock`.
    pub instructions: u64,
    /// Lane-instructions run.
    pub lane_instructions: u64,
    /// `threadIdx`, by axis.
    pub tid: [Lanes; 3],
    /// The last strong read.
    pub(crate) polled: Option<Polled>,
    /// Strong reads since its lanes did anything else, where they are counted.
    pub(crate) waits: Waits,
    /// Virtual time before which it does not go on, whatever else it could do.
    pub(super) rest_until: u64,
    /// Where a schedule by priorities has it.
    pub(super) priority: u64,
    /// Give the turn back at every backward jump: for those who watch for repetition.
    pub(super) stop_at_back_jump: bool,
    /// Nobody can go on until a sleeper wakes or a barrier opens, though some wait for others of
    /// their warp.
    stalled: bool,
    groups: Vec<Group>,
    frames: Vec<Option<Box<Frame>>>,
    back_jumps: u32,
    last: usize,
    exchange: Option<Box<Exchange>>,
}

impl Warp {
    /// The warp with this number of a launch's block, standing at the kernel's first operation.
    pub fn new(launch: &Launch, index: u32) -> Self {
        let threads = launch.threads();
        let first = index * LANES as u32;
        let count = threads.saturating_sub(first).min(LANES as u32);
        let existing = if count == 32 { FULL } else { (1 << count) - 1 };
        let mut tid = [[0; LANES]; 3];
        let [width, height, _] = launch.block;
        for lane in 0..LANES as u32 {
            let flat = first + lane;
            tid[0][lane as usize] = flat % width;
            tid[1][lane as usize] = flat / width % height;
            tid[2][lane as usize] = flat / width / height;
        }
        let entry = &launch.kernel.functions[0];
        Self {
            index,
            existing,
            live: existing,
            local: LaneMemory::new(entry.local_bytes),
            clock: WarpClock::default(),
            instructions: 0,
            lane_instructions: 0,
            tid,
            polled: None,
            waits: Waits::default(),
            rest_until: 0,
            priority: 0,
            stop_at_back_jump: false,
            stalled: false,
            groups: vec![Group {
                pc: 0,
                frame: 0,
                mask: existing,
                wait: Wait::No,
            }],
            frames: vec![Some(Box::new(Frame {
                function: 0,
                registers: entry.template.clone(),
                params: LaneMemory::new(entry.param_bytes),
                local_base: 0,
                depth: 0,
                caller: None,
                inside: existing,
            }))],
            back_jumps: 0,
            last: 0,
            exchange: Some(Box::new(Exchange::new())),
        }
    }

    /// `threadIdx` of a lane.
    pub fn thread_index(&self, lane: usize) -> [u32; 3] {
        [self.tid[0][lane], self.tid[1][lane], self.tid[2][lane]]
    }

    /// What it is doing.
    pub fn state(&self, now: u64) -> WarpState {
        let mut state = WarpState::Done;
        let ready = if self.rest_until > now {
            WarpState::Asleep(self.rest_until)
        } else {
            WarpState::Ready
        };
        for group in &self.groups {
            match group.wait {
                Wait::No => return ready,
                Wait::Lanes if !self.stalled => return ready,
                Wait::Until(time) if time <= now => return ready,
                Wait::Until(time) => {
                    state = match state {
                        WarpState::Asleep(other) => WarpState::Asleep(other.min(time)),
                        _ => WarpState::Asleep(time),
                    }
                }
                Wait::Lanes | Wait::Barrier(_) => {
                    if state == WarpState::Done {
                        state = WarpState::Blocked;
                    }
                }
            }
        }
        state
    }

    /// Where its groups stand: the operation, the lanes, and what they wait for; for reports.
    pub fn positions<'a>(&'a self, launch: &'a Launch) -> impl Iterator<Item = (&'a Op, Group)> {
        self.groups.iter().filter_map(|group| {
            let function = self.frames[group.frame].as_ref()?.function;
            let op = launch.kernel.functions[function]
                .ops
                .get(group.pc as usize)?;
            Some((op, *group))
        })
    }

    /// A fingerprint of everything its lanes have in registers and where they stand: a warp
    /// that comes back to the same one has made no progress.
    pub(super) fn fingerprint(&self, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        for group in &self.groups {
            (group.pc, group.frame, group.mask).hash(hasher);
        }
        for frame in self.frames.iter().flatten() {
            frame.registers.fingerprint(hasher);
        }
    }

    /// Lets the lanes that wait at a barrier go on. `finish` runs for them first.
    pub(super) fn release(
        &mut self,
        id: u32,
        mask: u32,
        result: BarrierResult,
        launch: &Launch,
        block: &mut Block,
        world: &mut World,
    ) {
        for at in 0..self.groups.len() {
            let group = self.groups[at];
            if group.wait != Wait::Barrier(id) || group.mask & mask == 0 {
                continue;
            }
            self.with_cx(launch, block, world, &group, |cx, op| {
                if let Action::Barrier(barrier) = &op.action
                    && let Some(finish) = &barrier.finish
                {
                    cx.barrier_result = result;
                    finish(cx);
                }
            });
            self.groups[at].wait = Wait::No;
            self.groups[at].pc += 1;
            self.waits.forget(group.mask);
        }
        self.merge();
    }

    /// Runs up to `budget` operations. A fault ends the context.
    pub(super) fn run(
        &mut self,
        launch: &Launch,
        block: &mut Block,
        world: &mut World,
        budget: u32,
    ) -> Result<u32, Fault> {
        let mut left = budget;
        self.stalled = false;
        while left > 0 {
            for group in &mut self.groups {
                if matches!(group.wait, Wait::Until(time) if time <= world.now) {
                    group.wait = Wait::No;
                }
            }
            match self.pick() {
                Some(at) if world.report.is_some() => {
                    self.run_group::<true>(at, launch, block, world, &mut left)?;
                }
                Some(at) => self.run_group::<false>(at, launch, block, world, &mut left)?,
                None if self.groups.iter().any(|g| g.wait == Wait::Lanes) => {
                    // Whoever could still come is here, asleep, or at a barrier of the block.
                    if !self.meet(launch, block, world)? {
                        self.stalled = true;
                        break;
                    }
                }
                None => break,
            }
        }
        Ok(budget - left)
    }

    /// The group to run: the one deepest in calls and lowest in the code, or after too many
    /// backward jumps the next in turn.
    fn pick(&mut self) -> Option<usize> {
        let ready = |group: &Group| group.wait == Wait::No;
        if self.groups.len() == 1 {
            return ready(&self.groups[0]).then_some(0);
        }
        if self.back_jumps >= PATIENCE {
            self.back_jumps = 0;
            let n = self.groups.len();
            let next = (1..=n)
                .map(|i| (self.last + i) % n)
                .find(|&i| ready(&self.groups[i]));
            if let Some(next) = next {
                self.last = next;
            }
            return next;
        }
        let depth = |group: &Group| self.frames[group.frame].as_ref().map_or(0, |f| f.depth);
        let best = (0..self.groups.len())
            .filter(|&i| ready(&self.groups[i]))
            .min_by_key(|&i| (u32::MAX - depth(&self.groups[i]), self.groups[i].pc))?;
        self.last = best;
        Some(best)
    }

    /// Joins groups that stand at the same operation and wait for nothing else than each other.
    fn merge(&mut self) {
        let mut i = 0;
        while i < self.groups.len() {
            let mut j = i + 1;
            while j < self.groups.len() {
                let (a, b) = (self.groups[i], self.groups[j]);
                let joinable = |w: Wait| matches!(w, Wait::No | Wait::Lanes);
                if a.pc == b.pc && a.frame == b.frame && joinable(a.wait) && joinable(b.wait) {
                    self.groups[i].mask |= b.mask;
                    self.groups[i].wait = Wait::No;
                    self.groups.remove(j);
                } else {
                    j += 1;
                }
            }
            i += 1;
        }
        self.last = self.last.min(self.groups.len().saturating_sub(1));
    }

    /// Calls `f` with the context of a group at its operation.
    fn with_cx<T>(
        &mut self,
        launch: &Launch,
        block: &mut Block,
        world: &mut World,
        group: &Group,
        f: impl FnOnce(&mut Cx, &Op) -> T,
    ) -> T {
        let mut frame = self.frames[group.frame]
            .take()
            .expect("a group has a frame");
        let mut exchange = self.exchange.take().expect("nobody else holds it");
        let op = &launch.kernel.functions[frame.function].ops[group.pc as usize];
        let mut cx = Cx {
            regs: &mut frame.registers,
            params: &mut frame.params,
            local_base: frame.local_base,
            mask: group.mask,
            members: 0,
            targets: [0; LANES],
            sleep: 0,
            exchange: &mut exchange,
            barrier_result: BarrierResult::default(),
            op,
            launch,
            block,
            warp: self,
            world,
        };
        let result = f(&mut cx, op);
        self.frames[group.frame] = Some(frame);
        self.exchange = Some(exchange);
        result
    }

    /// Runs one group until it ends, waits, splits, meets another, or the budget is used; counts
    /// its instructions on the way if that is wanted.
    fn run_group<const COUNT: bool>(
        &mut self,
        at: usize,
        launch: &Launch,
        block: &mut Block,
        world: &mut World,
        left: &mut u32,
    ) -> Result<(), Fault> {
        let group = self.groups[at];
        // The lowest operation at which another group of this frame stands: there they meet.
        let others = self.groups.len() > 1;
        let meets = |pc: u32, groups: &[Group]| {
            others
                && groups
                    .iter()
                    .enumerate()
                    .any(|(i, g)| i != at && g.frame == group.frame && g.pc == pc)
        };
        let groups = self.groups.clone();
        let mut frame = self.frames[group.frame]
            .take()
            .expect("a group has a frame");
        let mut exchange = self.exchange.take().expect("nobody else holds it");
        let function = &launch.kernel.functions[frame.function];
        if COUNT && let Some(report) = &mut world.report {
            report.select(launch, frame.function);
        }
        let all = group.mask;
        let stop = self.stop_at_back_jump;
        let mut pc = group.pc;
        let mut back_jumps = self.back_jumps;
        // Strong reads and changes of memory at the last backward jump, and how often nothing but
        // a read lay between two.
        let (mut polls, mut changes, mut spins) = (world.polls, world.memory.changes(), 0);
        let mut instructions = 0u64;
        let mut lane_instructions = 0u64;

        // How the group left the loop, to be acted on once the frame is back in place.
        enum Left {
            Here,
            Step(Step, u32, Lanes, u64),
            Sync(u32),
        }
        let left_by = {
            let mut cx = Cx {
                regs: &mut frame.registers,
                params: &mut frame.params,
                local_base: frame.local_base,
                mask: all,
                members: 0,
                targets: [0; LANES],
                sleep: 0,
                exchange: &mut exchange,
                barrier_result: BarrierResult::default(),
                op: match function.ops.get(pc as usize) {
                    Some(op) => op,
                    None => return Err(Fault::InvalidPc),
                },
                launch,
                block: &mut *block,
                warp: &mut *self,
                world: &mut *world,
            };
            let mut first = true;
            loop {
                if *left == 0 || (!first && others && meets(pc, &groups)) {
                    break Left::Here;
                }
                first = false;
                let Some(op) = function.ops.get(pc as usize) else {
                    return Err(Fault::InvalidPc);
                };
                *left -= 1;
                instructions += 1;
                cx.op = op;
                let mask = match op.guard {
                    None => all,
                    Some((pred, negated)) => {
                        let value = cx.regs.pred(pred) ^ if negated { FULL } else { 0 };
                        let undef = cx.regs.pred_undef(pred) & all;
                        if undef != 0 {
                            report_undefined_guard(&mut cx, undef);
                        }
                        value & all
                    }
                };
                if mask == 0 {
                    pc += 1;
                    continue;
                }
                lane_instructions += u64::from(mask.count_ones());
                if COUNT && let Some(report) = &mut cx.world.report {
                    report.executed(pc, mask);
                }
                cx.mask = mask;
                match &op.action {
                    Action::Plain(run) => match run(&mut cx) {
                        Step::Next => pc += 1,
                        Step::Jump(target) if mask == all => {
                            if target <= pc {
                                back_jumps += 1;
                                if stop {
                                    *left = 0;
                                }
                                if cx.world.polls != polls {
                                    polls = cx.world.polls;
                                    if cx.world.memory.changes() == changes {
                                        spins += 1;
                                        // What it waits for needs the turns more than it does.
                                        if spins == SPINS {
                                            *left = 0;
                                        }
                                    } else {
                                        changes = cx.world.memory.changes();
                                        spins = 0;
                                    }
                                }
                                if others && back_jumps >= PATIENCE {
                                    pc = target;
                                    break Left::Here;
                                }
                            }
                            pc = target;
                        }
                        step => break Left::Step(step, mask, cx.targets, cx.sleep),
                    },
                    Action::WarpSync(sync) => {
                        if mask == all && try_sync(&mut cx, sync) {
                            pc += 1;
                        } else {
                            break Left::Sync(mask);
                        }
                    }
                    Action::Barrier(_) => break Left::Sync(mask),
                }
            }
        };
        self.frames[group.frame] = Some(frame);
        self.exchange = Some(exchange);
        self.back_jumps = if others { back_jumps } else { 0 };
        self.instructions += instructions;
        self.lane_instructions += lane_instructions;
        self.groups[at].pc = pc;
        match left_by {
            Left::Here => {}
            Left::Step(step, mask, targets, sleep) => {
                self.leave(at, step, mask, &targets, sleep, launch, world.now)?;
            }
            Left::Sync(mask) => {
                // Lanes whose guard is false go past the operation.
                self.split(at, mask, pc + 1);
                self.groups[at].wait = Wait::Lanes;
                self.arrive(at, launch, block, world, false)?;
            }
        }
        self.merge();
        Ok(())
    }

    /// Keeps the lanes of `mask` in group `at`; the others, if any, go on at `pc`.
    fn split(&mut self, at: usize, mask: u32, pc: u32) {
        let group = self.groups[at];
        let others = group.mask & !mask;
        if others != 0 {
            self.groups[at].mask = mask;
            self.groups.push(Group {
                pc,
                mask: others,
                wait: Wait::No,
                ..group
            });
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn leave(
        &mut self,
        at: usize,
        step: Step,
        mask: u32,
        targets: &Lanes,
        sleep: u64,
        launch: &Launch,
        now: u64,
    ) -> Result<(), Fault> {
        let pc = self.groups[at].pc;
        self.split(at, mask, pc + 1);
        match step {
            Step::Next => self.groups[at].pc = pc + 1,
            Step::Jump(target) => {
                if target <= pc {
                    self.back_jumps += 1;
                }
                self.groups[at].pc = target;
            }
            Step::JumpEach => {
                let group = self.groups[at];
                let mut rest = mask;
                while rest != 0 {
                    let target = targets[rest.trailing_zeros() as usize];
                    let same = lanes(rest).filter(|&l| targets[l] == target);
                    let same = same.fold(0, |m, l| m | 1 << l);
                    rest &= !same;
                    self.groups.push(Group {
                        pc: target,
                        mask: same,
                        ..group
                    });
                }
                self.groups.remove(at);
            }
            Step::Sleep => {
                self.groups[at].pc = pc + 1;
                self.groups[at].wait = Wait::Until(now + sleep);
            }
            Step::Exit => self.exit(at, mask),
            Step::Call(site) => self.call(at, mask, targets, site, launch)?,
            Step::Return => self.ret(at, mask, launch),
            Step::Fault(fault) => return Err(fault),
        }
        Ok(())
    }

    fn exit(&mut self, at: usize, mask: u32) {
        self.live &= !mask;
        self.groups.remove(at);
        for group in &mut self.groups {
            // Those who waited for these lanes look again.
            if group.wait == Wait::Lanes {
                group.wait = Wait::No;
            }
        }
    }

    fn call(
        &mut self,
        at: usize,
        mask: u32,
        targets: &Lanes,
        site: u32,
        launch: &Launch,
    ) -> Result<(), Fault> {
        let group = self.groups[at];
        let mut rest = mask;
        while rest != 0 {
            let target = targets[rest.trailing_zeros() as usize];
            let same = lanes(rest)
                .filter(|&l| targets[l] == target)
                .fold(0, |m, l| m | 1 << l);
            rest &= !same;
            let callee = launch
                .kernel
                .functions
                .get(target as usize)
                .ok_or(Fault::InvalidPc)?;
            let caller = self.frames[group.frame]
                .as_ref()
                .expect("a group has a frame");
            let function = &launch.kernel.functions[caller.function];
            let arguments = &function.calls[site as usize].arguments;
            let local_base = (caller.local_base + function.local_bytes).next_multiple_of(16);
            let local_end = u64::from(local_base) + u64::from(callee.local_bytes);
            let held: usize = self
                .frames
                .iter()
                .flatten()
                .map(|f| f.registers.bytes())
                .sum();
            if local_end > u64::from(LOCAL_LIMIT) || held > FRAMES_LIMIT || caller.depth > 4096 {
                return Err(Fault::HardwareStack);
            }
            let mut params = LaneMemory::new(callee.param_bytes);
            for (&(to, size), &(from, given)) in callee.formals.iter().zip(arguments) {
                params.copy_from(to, &caller.params, from, size.min(given), same);
            }
            let frame = Frame {
                function: target as usize,
                registers: callee.template.clone(),
                params,
                local_base,
                depth: caller.depth + 1,
                caller: Some((group.frame, group.pc + 1, site)),
                inside: same,
            };
            if self.local.len() < local_end {
                self.local.resize(local_end as u32);
            }
            self.local.forget(local_base, same);
            let slot = self
                .frames
                .iter()
                .position(Option::is_none)
                .unwrap_or_else(|| {
                    self.frames.push(None);
                    self.frames.len() - 1
                });
            self.frames[slot] = Some(Box::new(frame));
            self.groups.push(Group {
                pc: 0,
                frame: slot,
                mask: same,
                wait: Wait::No,
            });
        }
        self.groups.remove(at);
        Ok(())
    }

    fn ret(&mut self, at: usize, mask: u32, launch: &Launch) {
        let group = self.groups[at];
        let mut frame = self.frames[group.frame]
            .take()
            .expect("a group has a frame");
        let Some((caller_slot, pc, site)) = frame.caller else {
            self.frames[group.frame] = Some(frame);
            return self.exit(at, mask);
        };
        let results = &launch.kernel.functions[frame.function].results;
        let caller = self.frames[caller_slot]
            .as_mut()
            .expect("a callee's caller is still there");
        let places = &launch.kernel.functions[caller.function].calls[site as usize].results;
        for (&(from, size), &(to, taken)) in results.iter().zip(places) {
            caller
                .params
                .copy_from(to, &frame.params, from, size.min(taken), mask);
        }
        self.groups[at] = Group {
            pc,
            frame: caller_slot,
            mask,
            wait: Wait::No,
        };
        frame.inside &= !mask;
        if frame.inside & self.live != 0 {
            self.frames[group.frame] = Some(frame);
        }
    }

    /// A group stands at a warp-wide operation or a barrier that it could not pass alone. With
    /// `force`, nobody else can come any more.
    fn arrive(
        &mut self,
        at: usize,
        launch: &Launch,
        block: &mut Block,
        world: &mut World,
        force: bool,
    ) -> Result<bool, Fault> {
        let group = self.groups[at];
        let live = self.live;
        let function = self.frames[group.frame]
            .as_ref()
            .expect("a group has a frame")
            .function;
        let op = &launch.kernel.functions[function].ops[group.pc as usize];
        let Action::Barrier(barrier) = &op.action else {
            return Ok(false);
        };
        let request = self.with_cx(launch, block, world, &group, |cx, _| (barrier.request)(cx))?;
        if request.aligned && group.mask != live {
            if !force {
                return Ok(false);
            }
            self.with_cx(launch, block, world, &group, |cx, _| {
                let lane = cx.mask.trailing_zeros() as usize;
                let missing = live & !cx.mask;
                cx.report(
                    Kind::Barrier,
                    lane,
                    None,
                    format!(
                        "an aligned barrier is reached by lanes {:#x} of a warp alone; lanes \
                         {missing:#x} stand elsewhere and cannot come",
                        cx.mask
                    ),
                );
            });
            return Err(Fault::LaunchFailed);
        }
        let predicate = barrier.predicate.map_or(0, |(pred, negated)| {
            let frame = self.frames[group.frame]
                .as_ref()
                .expect("a group has a frame");
            frame.registers.pred(pred) ^ if negated { FULL } else { 0 }
        });
        let arrived = block.barriers.arrive(
            request.id,
            self.index as usize,
            group.mask,
            request.threads,
            !request.arrive_only,
            predicate,
        );
        if let Err(message) = arrived {
            self.with_cx(launch, block, world, &group, |cx, _| {
                let lane = cx.mask.trailing_zeros() as usize;
                cx.report(Kind::Barrier, lane, None, message);
            });
            return Err(Fault::LaunchFailed);
        }
        if request.arrive_only {
            self.groups[at].wait = Wait::No;
            self.groups[at].pc += 1;
        } else {
            self.groups[at].wait = Wait::Barrier(request.id);
        }
        block.barriers.touched |= 1 << request.id;
        Ok(true)
    }

    /// No group can run, and some wait for lanes of their own warp: lets those meet who stand at
    /// different instructions with the same operation, and reports those who never will. False
    /// when all that is left to do is to wait for a barrier or a time.
    fn meet(
        &mut self,
        launch: &Launch,
        block: &mut Block,
        world: &mut World,
    ) -> Result<bool, Fault> {
        let waiting: Vec<usize> = (0..self.groups.len())
            .filter(|&i| self.groups[i].wait == Wait::Lanes)
            .collect();
        for &at in &waiting {
            let group = self.groups[at];
            let function = self.frames[group.frame]
                .as_ref()
                .expect("a group has a frame")
                .function;
            let op = &launch.kernel.functions[function].ops[group.pc as usize];
            let Action::WarpSync(sync) = &op.action else {
                continue;
            };
            // Those of this group with the mask of its first lane, and all others with it.
            let members = |warp: &Self, g: &Group| -> Lanes {
                let frame = warp.frames[g.frame].as_ref().expect("a group has a frame");
                let function = &launch.kernel.functions[frame.function];
                match &function.ops[g.pc as usize].action {
                    Action::WarpSync(s) if s.key == sync.key => match s.members {
                        Some(register) => *frame.registers.get32(register),
                        None => [warp.live; LANES],
                    },
                    _ => [0; LANES],
                }
            };
            let first = group.mask.trailing_zeros() as usize;
            let wanted = members(self, &group)[first];
            let mut parts = Vec::new();
            for &other in &waiting {
                let values = members(self, &self.groups[other]);
                let same = lanes(self.groups[other].mask)
                    .filter(|&l| values[l] == wanted)
                    .fold(0, |m, l| m | 1 << l);
                if same != 0 {
                    parts.push((other, same));
                }
            }
            let present = parts.iter().fold(0, |m, p| m | p.1);
            if sync.aligned || wanted & self.live & !present != 0 {
                continue;
            }
            let orders_memory = sync.orders_memory;
            for collect in [false, true] {
                for &(other, same) in &parts {
                    let part = Group {
                        mask: same,
                        ..self.groups[other]
                    };
                    self.with_cx(launch, block, world, &part, |cx, op| {
                        if let Action::WarpSync(sync) = &op.action {
                            cx.members = present;
                            if collect {
                                (sync.collect)(cx);
                            } else {
                                (sync.publish)(cx);
                            }
                        }
                    });
                }
            }
            if orders_memory {
                race::warp_sync(self, present);
            }
            for &(other, same) in &parts {
                let pc = self.groups[other].pc;
                self.split(other, same, pc);
                let last = self.groups.len() - 1;
                if self.groups[other].mask == same && last != other && self.groups[last].pc == pc {
                    // The lanes with another mask go on waiting.
                    self.groups[last].wait = Wait::Lanes;
                }
                self.groups[other].pc = pc + 1;
                self.groups[other].wait = Wait::No;
            }
            self.merge();
            return Ok(true);
        }
        // A group asleep or at a barrier may still come.
        if self
            .groups
            .iter()
            .any(|g| matches!(g.wait, Wait::Until(_) | Wait::Barrier(_)))
        {
            let stuck = self
                .groups
                .iter()
                .all(|g| !matches!(g.wait, Wait::Until(_)));
            if !stuck {
                return Ok(false);
            }
        }
        let Some(&at) = waiting.first() else {
            return Ok(false);
        };
        let group = self.groups[at];
        if self.arrive(at, launch, block, world, true)? {
            return Ok(true);
        }
        let live = self.live;
        let finding = self.with_cx(launch, block, world, &group, |cx, op| {
            let lane = cx.mask.trailing_zeros() as usize;
            let members = match &op.action {
                Action::WarpSync(sync) => sync.members.map_or(live, |r| cx.regs.get32(r)[lane]),
                _ => live,
            };
            Finding {
                kind: Kind::WrongMask,
                place: Some((*op.place).clone()),
                thread: Some(cx.thread(lane)),
                address: None,
                other: None,
                reason: None,
                message: format!(
                    "lanes {:#x} wait for the lanes {members:#x} of their mask; lanes {:#x} stand \
                     elsewhere and never come",
                    cx.mask,
                    members & live & !cx.mask
                ),
            }
        });
        world.findings.report(finding);
        Err(Fault::LaunchTimeout)
    }
}

/// All lanes of the group stand at a warp-wide operation: runs it if everybody named is here.
fn try_sync(cx: &mut Cx, sync: &WarpSync) -> bool {
    let all = cx.mask;
    let live = cx.warp.live;
    let Some(register) = sync.members else {
        if all != live {
            return false;
        }
        run_sync(cx, sync, all);
        return true;
    };
    let masks = *cx.regs.get32(register);
    let undef = cx.regs.any_undef32(register) & all;
    if undef != 0 {
        let lane = undef.trailing_zeros() as usize;
        cx.report(
            Kind::Uninitialised,
            lane,
            None,
            "the member mask was never written".to_owned(),
        );
    }
    // Everybody must be in the mask it names, and everybody it names must be here.
    let mut rest = all;
    while rest != 0 {
        let first = rest.trailing_zeros() as usize;
        let members = masks[first];
        let same = lanes(rest)
            .filter(|&l| masks[l] == members)
            .fold(0, |m, l| m | 1 << l);
        rest &= !same;
        if same & !members != 0 {
            let lane = (same & !members).trailing_zeros() as usize;
            cx.report(
                Kind::WrongMask,
                lane,
                None,
                format!("lane {lane} executes with the mask {members:#x}, which leaves it out"),
            );
        }
        if members & live & !same != 0 {
            return false;
        }
    }
    let mut rest = all;
    while rest != 0 {
        let members = masks[rest.trailing_zeros() as usize];
        let same = lanes(rest)
            .filter(|&l| masks[l] == members)
            .fold(0, |m, l| m | 1 << l);
        rest &= !same;
        run_sync(cx, sync, same);
    }
    true
}

fn run_sync(cx: &mut Cx, sync: &WarpSync, mask: u32) {
    cx.mask = mask;
    cx.members = mask;
    (sync.publish)(cx);
    (sync.collect)(cx);
    if sync.orders_memory {
        race::warp_sync(cx.warp, mask);
    }
}

fn report_undefined_guard(cx: &mut Cx, undef: u32) {
    let lane = undef.trailing_zeros() as usize;
    cx.report(
        Kind::Uninitialised,
        lane,
        None,
        "a value nobody wrote decides whether this runs".to_owned(),
    );
}
