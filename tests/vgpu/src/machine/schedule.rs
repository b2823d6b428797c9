//! Whose turn it is.
//!
//! A turn is one warp's, for some of its operations. By default every block is as likely as any
//! other, and turns are short or long: the short ones shake out orders, the long ones save time.
//! `VGPU_SCHEDULE=pct:d` gives priorities instead (Burckhardt et al., "A Randomized Scheduler
//! with Probabilistic Guarantees of Finding Bugs", ASPLOS 2010): each warp has one at random, the
//! highest that can run runs, and at `d - 1` random turns it falls below all others. That finds
//! what takes one warp to be far behind, or far ahead, for long. So that whoever spins gives way
//! to whom it waits for, a warp whose turn changed no memory falls too.
//!
//! A slow device gets one turn where others get [`SLOWNESS`]; a warp that accessed memory over a
//! slow link rests before it goes on. Both leave the results of a correct program as they are.

use super::WarpState;
use super::engine::{Machine, Progress};
use crate::finding::{Fault, Finding, Kind, Thread};

/// See [`Scheduler::patience`].
const FIRST_PATIENCE: u64 = 64;
/// How much slower a slow device is, and for how many nanoseconds a slow access delays its warp.
const SLOWNESS: u64 = 16;
const SLOW_ACCESS: u64 = 4096;
/// The first jump of the clock where nothing but reading it happens.
const FIRST_LEAP: u64 = 1 << 14;
/// The clock leaps no further: two and a half centuries before it would begin anew.
const LAST_LEAP: u64 = 1 << 63;
/// Turns among which the falls of a `pct` schedule are spread, for each that there is.
const FALLS_WITHIN: u64 = 4096;

/// How the scheduler chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Schedule {
    /// Every block is as likely as any other.
    #[default]
    Random,
    /// The warp with the highest priority, with so many changes of priorities and one more.
    Pct(u32),
}

impl std::str::FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let pct = |depth: &str| depth.parse().ok().filter(|d| (1..=64).contains(d));
        match text.trim().split_once(':') {
            None if text.trim() == "random" => Ok(Schedule::Random),
            Some(("pct", depth)) if pct(depth).is_some() => {
                Ok(pct(depth).map_or(Schedule::Random, Schedule::Pct))
            }
            _ => Err(format!("'{text}' is neither random nor pct:1 to pct:64")),
        }
    }
}

/// splitmix64's finaliser: seeds that differ little give runs that differ much.
fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the choices depend on.
pub(super) struct Scheduler {
    schedule: Schedule,
    random: u64,
    /// Turns since a block ended, a command started or memory changed.
    quiet: u64,
    /// Quiet turns, for each warp, after which to look whether anything can still happen; grows
    /// while the answer is yes, so that looking stays cheap beside long computations.
    patience: u64,
    /// Turns since a block ended.
    without_end: u64,
    changes: u64,
    clock_reads: u64,
    leap: u64,
    /// Of a `pct` schedule: turns left until the next falls, and the next lowest priority.
    falls: Vec<u64>,
    lowest: u64,
}

impl Scheduler {
    pub(super) fn new(seed: u64, schedule: Schedule) -> Self {
        let mut new = Self {
            schedule,
            random: scramble(seed).max(1),
            quiet: 0,
            patience: FIRST_PATIENCE,
            without_end: 0,
            changes: 0,
            clock_reads: 0,
            leap: FIRST_LEAP,
            falls: Vec::new(),
            lowest: 1 << 32,
        };
        if let Schedule::Pct(depth) = schedule {
            let within = FALLS_WITHIN * u64::from(depth);
            new.falls = (1..depth).map(|_| new.random() % within).collect();
        }
        new
    }

    /// xorshift64*.
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A command has started or ended.
    pub(super) fn something_happened(&mut self) {
        self.quiet = 0;
    }

    pub(super) fn block_ended(&mut self) {
        self.quiet = 0;
        self.without_end = 0;
    }
}

impl Machine {
    /// Starts the choices anew from a seed. The same work from here on, with the same memory and
    /// nothing in progress, then runs the same.
    pub fn set_seed(&mut self, seed: u64) {
        self.world.config.seed = seed;
        self.scheduler = Scheduler::new(seed, self.scheduler.schedule);
        self.scheduler.changes = self.world.memory.changes();
        self.scheduler.clock_reads = self.world.clock_reads;
        self.world.memory.race.set_seed(seed);
    }

    /// How to choose from the next seed on.
    pub(super) fn set_schedule(&mut self, schedule: Schedule) {
        self.scheduler.schedule = schedule;
    }

    /// The priority of a new warp.
    pub(super) fn first_priority(&mut self) -> u64 {
        match self.scheduler.schedule {
            Schedule::Random => 0,
            Schedule::Pct(_) => 1 << 33 | self.scheduler.random() >> 32,
        }
    }

    /// Picks a warp that can go on and runs it for a while.
    pub(super) fn run_some_warp(&mut self) -> Progress {
        let choice = match self.scheduler.schedule {
            Schedule::Random => self.choose_at_random(),
            Schedule::Pct(_) => self.choose_highest(),
        };
        let (b, w) = match choice {
            Ok(choice) => choice,
            Err(_) if self.widen() => return Progress::Advanced,
            Err(Some(time)) if time > self.clock_limit => return Progress::TooEarly,
            Err(Some(time)) => {
                self.world.now = time;
                self.scheduler.quiet += 1;
                return Progress::Advanced;
            }
            Err(None) => return Progress::Stuck,
        };
        let longest = self.world.config.longest_turn;
        let budget = if longest < 16 {
            1 + (self.scheduler.random() >> 32) as u32 % longest.max(1)
        } else {
            longest.min(1 << (4 + self.scheduler.random() % 6))
        };
        let slow = self.world.memory.links.slow_crossings;
        let result = self.run_warp(b, w, budget, false);
        let device = self.resident[b].launch.device;
        if let Err(fault) = result {
            self.fail_device(device, fault);
            return Progress::Advanced;
        }
        if self.has_died(device) {
            return Progress::Advanced;
        }
        let quiet = self.world.memory.changes() == self.scheduler.changes;
        let warp = &mut self.resident[b].warps[w];
        if self.world.memory.links.slow_crossings != slow {
            warp.rest_until = self.world.now + SLOW_ACCESS + self.scheduler.random() % SLOW_ACCESS;
        }
        if self.scheduler.schedule != Schedule::Random {
            let falls = &mut self.scheduler.falls;
            let falling = falls.iter().position(|&turns| turns == 0);
            if let Some(at) = falling {
                falls.swap_remove(at);
            }
            falls
                .iter_mut()
                .for_each(|turns| *turns = turns.saturating_sub(1));
            if quiet || falling.is_some() {
                self.scheduler.lowest -= 1;
                warp.priority = self.scheduler.lowest;
            }
        }
        self.after_run(b);
        self.look_about(quiet)
    }

    /// A turn is over: if nothing has changed for long, others may be needed, or this is the end.
    fn look_about(&mut self, quiet: bool) -> Progress {
        let scheduler = &mut self.scheduler;
        if quiet {
            scheduler.quiet += 1;
        } else {
            scheduler.changes = self.world.memory.changes();
            scheduler.quiet = 0;
            scheduler.patience = FIRST_PATIENCE;
            scheduler.leap = FIRST_LEAP;
        }
        scheduler.without_end += 1;
        if self.resident.is_empty() {
            return Progress::Advanced;
        }
        if scheduler.without_end >= 4 * FIRST_PATIENCE * self.warps {
            // Those who are here may wait for those who are not, whatever they write meanwhile.
            scheduler.without_end = 0;
            self.widen();
        }
        if self.scheduler.quiet >= self.scheduler.patience * self.warps {
            self.scheduler.quiet = 0;
            if self.widen() {
                return Progress::Advanced;
            }
            if self.all_repeat() {
                self.stuck = true;
                return Progress::Stuck;
            }
            let scheduler = &mut self.scheduler;
            let clock_was_read = self.world.clock_reads != scheduler.clock_reads;
            if clock_was_read && self.world.now < LAST_LEAP {
                // Whoever waits for a time to come need not be watched waiting.
                let to = self.world.now.saturating_add(scheduler.leap);
                let to = to.min(self.clock_limit).min(LAST_LEAP);
                if to <= self.world.now {
                    return Progress::TooEarly;
                }
                scheduler.clock_reads = self.world.clock_reads;
                self.world.now = to;
                scheduler.leap = scheduler.leap.saturating_mul(2);
            } else {
                scheduler.patience = scheduler.patience.saturating_mul(2);
            }
        }
        Progress::Advanced
    }

    /// A warp that can go on, from a block at random; or when the first of those asleep wakes.
    fn choose_at_random(&mut self) -> Result<(usize, usize), Option<u64>> {
        let slow = self.world.memory.links.slow();
        let spared = if slow != 0 && !self.scheduler.random().is_multiple_of(SLOWNESS) {
            slow
        } else {
            0
        };
        let choice = self.choose_beside(spared);
        if choice.is_err() && spared != 0 {
            return self.choose_beside(0);
        }
        choice
    }

    /// A warp that can go on, but of none of the devices spared.
    fn choose_beside(&mut self, spared: u64) -> Result<(usize, usize), Option<u64>> {
        let now = self.world.now;
        let blocks = self.resident.len();
        let first = self.scheduler.random() as usize % blocks;
        let mut earliest = None::<u64>;
        for b in (first..blocks).chain(0..first) {
            let resident = &self.resident[b];
            if spared >> resident.launch.device & 1 != 0 {
                continue;
            }
            let warps = resident.warps.len();
            let start = self.scheduler.random() as usize % warps;
            for w in (start..warps).chain(0..start) {
                match resident.warps[w].state(now) {
                    WarpState::Ready => return Ok((b, w)),
                    WarpState::Asleep(time) => {
                        earliest = Some(earliest.map_or(time, |e| e.min(time)));
                    }
                    WarpState::Blocked | WarpState::Done => {}
                }
            }
        }
        Err(earliest)
    }

    /// The warp with the highest priority among those that can go on.
    fn choose_highest(&mut self) -> Result<(usize, usize), Option<u64>> {
        let now = self.world.now;
        let mut slow = self.world.memory.links.slow();
        // Or it would never have a turn while others spin until it has done something.
        if slow != 0 && self.scheduler.random().is_multiple_of(SLOWNESS) {
            slow = 0;
        }
        let mut earliest = None::<u64>;
        let mut highest = None;
        for (b, resident) in self.resident.iter().enumerate() {
            for (w, warp) in resident.warps.iter().enumerate() {
                match warp.state(now) {
                    WarpState::Ready => {
                        let fast = slow >> resident.launch.device & 1 == 0;
                        highest = highest.max(Some((fast, warp.priority, b, w)));
                    }
                    WarpState::Asleep(time) => {
                        earliest = Some(earliest.map_or(time, |e| e.min(time)));
                    }
                    WarpState::Blocked | WarpState::Done => {}
                }
            }
        }
        highest.map(|(_, _, b, w)| (b, w)).ok_or(earliest)
    }

    /// Ends a device whose time has come, as `VGPU_TOPOLOGY` has it.
    fn has_died(&mut self, device: u32) -> bool {
        let links = &mut self.world.memory.links;
        let operations = self.devices[device as usize].operations;
        if links.dies_at(device).is_none_or(|at| operations < at) {
            return false;
        }
        links.kill(device);
        let words = format!("device {device} dies at its operation {operations}, as asked for");
        self.world.notices.push(words);
        self.fail_device(device, Fault::EccUncorrectable);
        true
    }

    pub(super) fn run_warp(
        &mut self,
        b: usize,
        w: usize,
        budget: u32,
        watch: bool,
    ) -> Result<u32, Fault> {
        let resident = &mut self.resident[b];
        let launch = resident.launch.clone();
        let warp = &mut resident.warps[w];
        warp.stop_at_back_jump = watch;
        let before = warp.instructions;
        let ran = warp.run(&launch, &mut resident.block, &mut self.world, budget)?;
        // Whoever gives up its turn has used it up, but time passes with what is done only.
        let done = warp.instructions - before;
        self.world.now += done;
        self.devices[launch.device as usize].operations += done;
        if let Some(grid) = self.grids.get_mut(&resident.grid) {
            grid.operations += u64::from(ran);
            if grid.operations > self.world.config.launch_budget {
                let thread = Thread {
                    device: launch.device,
                    block: resident.block.index,
                    thread: resident.warps[w].thread_index(0),
                };
                self.world.findings.report(Finding {
                    kind: Kind::Deadlock,
                    place: resident.warps[w]
                        .positions(&launch)
                        .next()
                        .map(|(op, _)| (*op.place).clone()),
                    thread: Some(thread),
                    address: None,
                    other: None,
                    reason: None,
                    message: format!(
                        "the launch has run for {} warp operations and does not end; raise \
                         VGPU_BUDGET if it is only long",
                        grid.operations
                    ),
                });
                return Err(Fault::LaunchTimeout);
            }
        }
        Ok(ran)
    }
}
