//! Streams, launches and the scheduler. One scheduler interleaves everything on all devices;
//! with the same seed and the same calls the whole run is the same to the bit.
//!
//! The machine advances only inside [`Machine::step`]: whoever holds it decides when. A step
//! starts every command that is due, then runs one warp for a while.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use super::device::{Device, Properties};
use super::{Barriers, Block, Launch, Warp, WarpState, World};
use crate::finding::{Fault, Finding, Findings, Kind, Thread};
use crate::memory::{Memory, SharedMemory, Topology};
use crate::race::{self, BlockClock, Stale, StreamClock};
use crate::registers::LANES;

/// Blocks kept going at once at first.
const FIRST_WINDOW: usize = 4;
/// See `Machine::patience`.
const FIRST_PATIENCE: u64 = 64;

/// splitmix64's finaliser: seeds that differ little give runs that differ much.
fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the instructions that approximate give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Approximation {
    /// The correctly rounded value.
    #[default]
    Exact,
    /// Any value within the error the PTX ISA states; which one depends on the seed.
    Disturbed,
}

impl Approximation {
    /// By the word in `VGPU_APPROX`.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "exact" => Some(Approximation::Exact),
            "perturb" => Some(Approximation::Disturbed),
            _ => None,
        }
    }
}

/// How to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Number of devices.
    pub devices: u32,
    /// Compute capability, 80 or 90, ….
    pub arch: u32,
    /// What the scheduler's choices depend on.
    pub seed: u64,
    /// Operations of a warp that one launch may take before it is ended as one that never will.
    pub launch_budget: u64,
    /// Operations of a warp after which it is another's turn, at most: few for the finest
    /// interleaving, more for speed.
    pub longest_turn: u32,
    /// The checks that are on.
    pub checks: Vec<Kind>,
    /// See [`Approximation`].
    pub approximation: Approximation,
    /// What lies between the devices.
    pub topology: Topology,
    /// Which of the values that a strong load may return it does return.
    pub stale: Stale,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            devices: 1,
            arch: 90,
            seed: 0,
            launch_budget: 2_000_000_000,
            longest_turn: 512,
            checks: Kind::ALL.to_vec(),
            approximation: Approximation::default(),
            topology: Topology::default(),
            stale: Stale::default(),
        }
    }
}

/// A stream of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u32);

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(pub u32);

/// Something done to the world at once.
pub type Work = Box<dyn FnOnce(&mut World) -> Result<(), Fault> + Send>;

/// What can be put into a stream.
pub enum Command {
    /// A kernel; `id` and `clock` are filled in when it starts.
    Kernel(Box<Launch>),
    /// A copy, a fill, an allocation: done at once when its turn comes. A fault ends the context.
    Work(Work),
    /// A function of the host: handed out by [`Machine::step`] to be called without the machine.
    Host(Box<dyn FnOnce() + Send>),
    /// Records an event.
    Record(EventId),
    /// Waits for what the event had been told to record when this was put in.
    Wait(EventId),
    /// Waits until something is so.
    Until(Box<dyn Fn(&World) -> bool + Send>),
}

/// What a step came to.
pub enum Progress {
    /// Something was done.
    Advanced,
    /// There is nothing to do.
    Idle,
    /// There is something to do, but no step will ever bring it further unless the host acts.
    Stuck,
    /// The host function to call now; afterwards [`Machine::host_function_done`].
    HostFunction(StreamId, Box<dyn FnOnce() + Send>),
}

struct Stream {
    device: u32,
    /// Each with what the host knew when it put it in.
    queue: VecDeque<(Queued, StreamClock)>,
    /// A kernel or host function in progress.
    busy: bool,
    /// Commands put in, and finished.
    submitted: u64,
    finished: u64,
    clock: StreamClock,
    /// Streams that a command must wait for, and how far: the legacy default stream's rule.
    barriers: VecDeque<(u64, Vec<(StreamId, u64)>)>,
}

enum Queued {
    Command(Command),
    Wait(EventId, u64),
    Record(EventId, u64),
}

#[derive(Default)]
struct Event {
    /// Records asked for, and done.
    submitted: u64,
    finished: u64,
    /// Virtual time of the last record done.
    time: u64,
    clock: StreamClock,
}

struct Grid {
    launch: Arc<Launch>,
    stream: StreamId,
    next_block: u64,
    finished: u64,
    resident: u32,
    operations: u64,
    /// What its ended blocks knew.
    clock: StreamClock,
}

struct Resident {
    launch: Arc<Launch>,
    grid: u32,
    block: Block,
    warps: Vec<Warp>,
    registers_per_sm_share: u32,
    live: Vec<u32>,
    existing: Vec<u32>,
}

/// All devices and what they do.
pub struct Machine {
    /// Memory, findings, time.
    pub world: World,
    /// The devices.
    pub devices: Vec<Device>,
    streams: BTreeMap<StreamId, Stream>,
    events: BTreeMap<EventId, Event>,
    grids: BTreeMap<u32, Grid>,
    resident: Vec<Resident>,
    /// Streams made so far, by device: threads that use different devices get the same ones in
    /// whatever order they come.
    next_stream: Vec<u32>,
    next_event: u32,
    next_launch: u32,
    random: u64,
    /// Blocks the scheduler keeps going at once; grows while none of them ends.
    window: usize,
    /// Runs since a block ended, a command started or memory changed.
    quiet_runs: u64,
    /// Quiet runs, for each warp, after which to look whether anything can still happen; grows
    /// while the answer is yes, so that looking stays cheap beside long computations.
    patience: u64,
    /// Runs since a block ended.
    runs_without_end: u64,
    seen_changes: u64,
    /// Nothing could happen when last looked.
    stuck: bool,
    host_clock: StreamClock,
    completions: u64,
    turns: u64,
}

impl Machine {
    /// Devices as configured, with nothing to do.
    pub fn new(config: Config) -> Self {
        let count = config.devices as usize;
        let devices = (0..config.devices)
            .map(|ordinal| Device {
                ordinal,
                properties: Properties::of(config.arch),
                fault: None,
            })
            .collect();
        let seed = config.seed;
        Self {
            world: World {
                memory: Memory::new(&config),
                findings: Findings::new(&config.checks),
                config,
                now: 0,
                clock_reads: 0,
                lane_instructions: 0,
                output: Vec::new(),
            },
            devices,
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            grids: BTreeMap::new(),
            resident: Vec::new(),
            next_stream: vec![0; count],
            next_event: 0,
            next_launch: 0,
            random: scramble(seed).max(1),
            window: FIRST_WINDOW,
            quiet_runs: 0,
            patience: FIRST_PATIENCE,
            runs_without_end: 0,
            seen_changes: 0,
            stuck: false,
            host_clock: StreamClock::default(),
            completions: 0,
            turns: 0,
        }
    }

    /// xorshift64*: the scheduler's choices.
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A new stream of a device.
    pub fn create_stream(&mut self, device: u32) -> StreamId {
        let next = &mut self.next_stream[device as usize];
        *next += 1;
        let id = StreamId(device << 24 | *next);
        let stream = Stream {
            device,
            queue: VecDeque::new(),
            busy: false,
            submitted: 0,
            finished: 0,
            clock: StreamClock::default(),
            barriers: VecDeque::new(),
        };
        self.streams.insert(id, stream);
        id
    }

    /// Forgets a stream with nothing left to do.
    pub fn destroy_stream(&mut self, id: StreamId) {
        if self.is_idle(id) {
            self.streams.remove(&id);
        }
    }

    /// A new event.
    pub fn create_event(&mut self) -> EventId {
        self.next_event += 1;
        let id = EventId(self.next_event);
        self.events.insert(id, Event::default());
        id
    }

    /// Forgets an event. Waits for it that are under way are taken as met.
    pub fn destroy_event(&mut self, id: EventId) {
        self.events.remove(&id);
    }

    /// Puts a command into a stream; its number there, from 1. None for a stream that is gone.
    pub fn enqueue(&mut self, id: StreamId, command: Command) -> Option<u64> {
        let queued = match command {
            Command::Wait(event) => {
                Queued::Wait(event, self.events.get(&event).map_or(0, |e| e.submitted))
            }
            Command::Record(event) => {
                let record = self.events.get_mut(&event)?;
                record.submitted += 1;
                Queued::Record(event, record.submitted)
            }
            other => Queued::Command(other),
        };
        let host = self.host_clock.clone();
        let stream = self.streams.get_mut(&id)?;
        stream.queue.push_back((queued, host));
        stream.submitted += 1;
        Some(stream.submitted)
    }

    /// Makes the next command put into `id` wait for everything now in `others`.
    pub fn wait_for_streams(&mut self, id: StreamId, others: &[StreamId]) {
        let marks: Vec<(StreamId, u64)> = others
            .iter()
            .filter_map(|o| self.streams.get(o).map(|s| (*o, s.submitted)))
            .collect();
        if let Some(stream) = self.streams.get_mut(&id) {
            let number = stream.submitted + 1;
            stream.barriers.push_back((number, marks));
        }
    }

    /// Commands put into a stream so far.
    pub fn submitted(&self, id: StreamId) -> u64 {
        self.streams.get(&id).map_or(0, |s| s.submitted)
    }

    /// Whether the command with this number, and all before it, are done.
    pub fn is_finished(&self, id: StreamId, number: u64) -> bool {
        self.streams.get(&id).is_none_or(|s| s.finished >= number)
    }

    /// Whether a stream has nothing left to do.
    pub fn is_idle(&self, id: StreamId) -> bool {
        self.streams
            .get(&id)
            .is_none_or(|s| s.finished == s.submitted)
    }

    /// The streams of a device.
    pub fn streams_of(&self, device: u32) -> Vec<StreamId> {
        let of = self.streams.iter().filter(|(_, s)| s.device == device);
        of.map(|(id, _)| *id).collect()
    }

    /// The device of a stream.
    pub fn device_of(&self, id: StreamId) -> Option<u32> {
        self.streams.get(&id).map(|s| s.device)
    }

    /// Whether the last record asked for is done; true for one never recorded.
    pub fn event_finished(&self, id: EventId) -> bool {
        self.events
            .get(&id)
            .is_none_or(|e| e.finished == e.submitted)
    }

    /// Whether a record was ever asked for.
    pub fn event_recorded(&self, id: EventId) -> bool {
        self.events.get(&id).is_some_and(|e| e.submitted > 0)
    }

    /// The virtual time, in nanoseconds, of the last record done.
    pub fn event_time(&self, id: EventId) -> u64 {
        self.events.get(&id).map_or(0, |e| e.time)
    }

    /// Records of an event asked for so far.
    pub fn records(&self, id: EventId) -> u64 {
        self.events.get(&id).map_or(0, |e| e.submitted)
    }

    /// Whether the record of an event with this number is done.
    pub fn is_recorded(&self, id: EventId, number: u64) -> bool {
        self.events.get(&id).is_none_or(|e| e.finished >= number)
    }

    /// Changes whenever something that somebody may wait for has been done.
    pub fn completions(&self) -> u64 {
        self.completions
    }

    /// Turns taken so far.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// The host has waited for a stream: what it did is before what the host does next.
    pub fn host_synchronised(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get(&id) {
            self.host_clock.join(&stream.clock);
        }
    }

    /// The host has waited for an event.
    pub fn host_synchronised_event(&mut self, id: EventId) {
        if let Some(event) = self.events.get(&id) {
            self.host_clock.join(&event.clock);
        }
    }

    /// A host function handed out by `step` has returned.
    pub fn host_function_done(&mut self, id: StreamId) {
        self.completions += 1;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.busy = false;
            stream.finished += 1;
            stream.clock.tick(id.0);
        }
    }

    /// Ends everything a device is doing, as a fault does; its streams are empty afterwards.
    pub fn fail_device(&mut self, device: u32, fault: Fault) {
        if let Some(device) = self.devices.get_mut(device as usize) {
            device.fault.get_or_insert(fault);
        }
        self.cancel(device);
    }

    /// Drops everything a device is doing.
    pub fn cancel(&mut self, device: u32) {
        self.completions += 1;
        self.stuck = false;
        self.resident.retain(|r| r.launch.device != device);
        self.grids.retain(|_, g| g.launch.device != device);
        for (_, stream) in self.streams.iter_mut().filter(|(_, s)| s.device == device) {
            for (queued, _) in std::mem::take(&mut stream.queue) {
                if let Queued::Record(event, number) = queued
                    && let Some(event) = self.events.get_mut(&event)
                {
                    event.finished = event.finished.max(number);
                }
            }
            stream.barriers.clear();
            stream.busy = false;
            stream.finished = stream.submitted;
        }
    }

    /// Advances a little; see [`Progress`].
    pub fn step(&mut self) -> Progress {
        self.turns += 1;
        if let Some(progress) = self.start_commands() {
            self.quiet_runs = 0;
            self.completions += 1;
            self.stuck = false;
            return progress;
        }
        self.place_blocks();
        if self.resident.is_empty() {
            let busy = self.streams.values().any(|s| s.busy || !s.queue.is_empty());
            return if busy {
                Progress::Stuck
            } else {
                Progress::Idle
            };
        }
        // Only the host can change what was so a moment ago.
        if self.stuck {
            if self.all_repeat() {
                return Progress::Stuck;
            }
            self.stuck = false;
            return Progress::Advanced;
        }
        self.run_some_warp()
    }

    /// Starts the commands whose turn has come.
    fn start_commands(&mut self) -> Option<Progress> {
        let mut advanced = false;
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            loop {
                let stream = self.streams.get(&id)?;
                let Some((head, _)) = stream.queue.front() else {
                    break;
                };
                if stream.busy {
                    break;
                }
                let number = stream.finished + 1;
                if let Some((at, marks)) = stream.barriers.front()
                    && *at <= number
                {
                    if !marks
                        .iter()
                        .all(|&(other, mark)| self.is_finished(other, mark))
                    {
                        break;
                    }
                    let clocks: Vec<StreamClock> = marks
                        .iter()
                        .filter_map(|(other, _)| self.streams.get(other).map(|s| s.clock.clone()))
                        .collect();
                    let stream = self.streams.get_mut(&id)?;
                    stream.barriers.pop_front();
                    clocks.iter().for_each(|clock| stream.clock.join(clock));
                    continue;
                }
                let ready = match head {
                    Queued::Wait(event, number) => {
                        self.events.get(event).is_none_or(|e| e.finished >= *number)
                    }
                    Queued::Command(Command::Until(condition)) => condition(&self.world),
                    _ => true,
                };
                if !ready {
                    break;
                }
                advanced = true;
                if let Some(progress) = self.start(id) {
                    return Some(progress);
                }
            }
        }
        advanced.then_some(Progress::Advanced)
    }

    /// Starts the first command of a stream.
    fn start(&mut self, id: StreamId) -> Option<Progress> {
        let stream = self.streams.get_mut(&id)?;
        let device = stream.device;
        let (queued, host) = stream.queue.pop_front()?;
        stream.clock.join(&host);
        match queued {
            Queued::Record(event, number) => {
                stream.finished += 1;
                let clock = stream.clock.clone();
                if let Some(event) = self.events.get_mut(&event) {
                    event.finished = number;
                    event.time = self.world.now;
                    event.clock = clock;
                }
            }
            Queued::Wait(event, _) => {
                stream.finished += 1;
                if let Some(event) = self.events.get(&event) {
                    stream.clock.join(&event.clock);
                }
            }
            Queued::Command(Command::Until(_)) => stream.finished += 1,
            Queued::Command(Command::Work(work)) => {
                self.world.memory.set_actor(id.0, &stream.clock);
                stream.finished += 1;
                stream.clock.tick(id.0);
                let result = work(&mut self.world);
                self.world.memory.clear_actor();
                for finding in std::mem::take(&mut self.world.memory.findings) {
                    self.world.findings.report(finding);
                }
                if let Err(fault) = result {
                    self.fail_device(device, fault);
                }
            }
            Queued::Command(Command::Host(function)) => {
                stream.busy = true;
                return Some(Progress::HostFunction(id, function));
            }
            Queued::Command(Command::Kernel(mut launch)) => {
                stream.busy = true;
                self.next_launch += 1;
                launch.id = self.next_launch;
                launch.multiprocessors = self.devices[device as usize].properties.multiprocessors;
                launch.clock = self.world.memory.race.start(id.0, &stream.clock);
                let grid = Grid {
                    launch: Arc::new(*launch),
                    stream: id,
                    next_block: 0,
                    finished: 0,
                    resident: 0,
                    operations: 0,
                    clock: StreamClock::default(),
                };
                self.grids.insert(self.next_launch, grid);
                self.window = FIRST_WINDOW;
            }
            // `enqueue` turns these into the forms above.
            Queued::Command(Command::Record(_) | Command::Wait(_)) => stream.finished += 1,
        }
        None
    }

    /// Brings blocks onto the devices, as many as the chip holds and the window asks for.
    fn place_blocks(&mut self) {
        let ids: Vec<u32> = self.grids.keys().copied().collect();
        for id in ids {
            while let Some(grid) = self.grids.get(&id) {
                if grid.next_block == grid.launch.blocks() || self.resident.len() >= self.window {
                    break;
                }
                if !self.fits(&grid.launch) {
                    break;
                }
                self.place_block(id);
            }
        }
    }

    /// Whether one more block of a launch fits beside what is resident on its device.
    fn fits(&self, launch: &Launch) -> bool {
        let properties = &self.devices[launch.device as usize].properties;
        let per_sm =
            properties.resident_blocks(&launch.kernel, launch.threads(), launch.dynamic_shared);
        if per_sm == 0 {
            return false;
        }
        // A block takes the share of a multiprocessor that it would have if its kind filled it.
        let scale = 1 << 16;
        let need = u64::from(scale / per_sm);
        let used: u64 = self
            .resident
            .iter()
            .filter(|r| r.launch.device == launch.device)
            .map(|r| u64::from(r.registers_per_sm_share))
            .sum();
        used + need <= u64::from(properties.multiprocessors) * u64::from(scale)
    }

    fn place_block(&mut self, id: u32) {
        let Some(grid) = self.grids.get_mut(&id) else {
            return;
        };
        let launch = grid.launch.clone();
        let flat = grid.next_block;
        grid.next_block += 1;
        grid.resident += 1;
        let [width, height, _] = launch.grid.map(u64::from);
        let index = [flat % width, flat / width % height, flat / width / height].map(|i| i as u32);
        let properties = &self.devices[launch.device as usize].properties;
        let per_sm =
            properties.resident_blocks(&launch.kernel, launch.threads(), launch.dynamic_shared);
        let warps = launch.threads().div_ceil(LANES as u32);
        let mut block = Block {
            uid: 0,
            index,
            shared: SharedMemory::new(
                launch.kernel.dynamic_shared_at + launch.dynamic_shared,
                self.world.memory.race.is_on(),
            ),
            barriers: Barriers::new(warps as usize),
            clock: BlockClock::default(),
            sm: (flat % u64::from(properties.multiprocessors)) as u32,
        };
        let warps: Vec<Warp> = (0..warps).map(|w| Warp::new(&launch, w)).collect();
        race::start_block(&mut self.world.memory.race, &launch, &mut block);
        self.resident.push(Resident {
            grid: id,
            existing: warps.iter().map(|w| w.existing).collect(),
            live: warps.iter().map(|w| w.live).collect(),
            registers_per_sm_share: (1 << 16) / per_sm.max(1),
            launch,
            block,
            warps,
        });
    }

    /// Picks a warp that can go on and runs it for a while.
    fn run_some_warp(&mut self) -> Progress {
        let now = self.world.now;
        let blocks = self.resident.len();
        let first = self.random() as usize % blocks;
        let mut earliest = None::<u64>;
        let mut choice = None;
        'blocks: for b in (0..blocks).map(|i| (first + i) % blocks) {
            let warps = self.resident[b].warps.len();
            let start = self.random() as usize % warps;
            for w in (0..warps).map(|i| (start + i) % warps) {
                match self.resident[b].warps[w].state(now) {
                    WarpState::Ready => {
                        choice = Some((b, w));
                        break 'blocks;
                    }
                    WarpState::Asleep(time) => {
                        earliest = Some(earliest.map_or(time, |e| e.min(time)));
                    }
                    WarpState::Blocked | WarpState::Done => {}
                }
            }
        }
        let Some((b, w)) = choice else {
            if self.widen() {
                return Progress::Advanced;
            }
            return match earliest {
                Some(time) => {
                    self.world.now = time;
                    self.quiet_runs += 1;
                    Progress::Advanced
                }
                None => Progress::Stuck,
            };
        };
        // Short and long turns both occur: the first shake out orders, the second save time.
        let longest = self.world.config.longest_turn;
        let budget = if longest < 16 {
            1 + (self.random() >> 32) as u32 % longest.max(1)
        } else {
            longest.min(1 << (4 + self.random() % 6))
        };
        let result = self.run_warp(b, w, budget, false);
        if let Err(fault) = result {
            let device = self.resident[b].launch.device;
            self.fail_device(device, fault);
            return Progress::Advanced;
        }
        self.after_run(b);
        if self.resident.is_empty() {
            return Progress::Advanced;
        }
        let changes = self.world.memory.changes();
        if changes == self.seen_changes {
            self.quiet_runs += 1;
        } else {
            self.seen_changes = changes;
            self.quiet_runs = 0;
            self.patience = FIRST_PATIENCE;
        }
        // Nothing has changed for long: others may be needed, or this is the end.
        let warps: usize = self.resident.iter().map(|r| r.warps.len()).sum();
        self.runs_without_end += 1;
        if self.runs_without_end >= 4 * FIRST_PATIENCE * warps as u64 {
            // Those who are here may wait for those who are not, whatever they write meanwhile.
            self.runs_without_end = 0;
            self.widen();
        }
        if self.quiet_runs >= self.patience * warps as u64 {
            self.quiet_runs = 0;
            if !self.widen() {
                if self.all_repeat() {
                    self.stuck = true;
                    return Progress::Stuck;
                }
                self.patience = self.patience.saturating_mul(2);
            }
        }
        Progress::Advanced
    }

    /// Lets more blocks in, if there are any that fit.
    fn widen(&mut self) -> bool {
        let before = self.resident.len();
        self.window = (before + 1).max(self.window.saturating_mul(2));
        self.place_blocks();
        self.resident.len() > before
    }

    fn run_warp(&mut self, b: usize, w: usize, budget: u32, watch: bool) -> Result<u32, Fault> {
        let resident = &mut self.resident[b];
        let launch = resident.launch.clone();
        let warp = &mut resident.warps[w];
        warp.stop_at_back_jump = watch;
        let ran = warp.run(&launch, &mut resident.block, &mut self.world, budget)?;
        self.world.now += u64::from(ran);
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

    /// Barriers that are complete now, warps and blocks that have ended.
    fn after_run(&mut self, b: usize) {
        let resident = &mut self.resident[b];
        let mut exited = false;
        for (live, warp) in resident.live.iter_mut().zip(&resident.warps) {
            exited |= *live != warp.live;
            *live = warp.live;
        }
        let touched = std::mem::take(&mut resident.block.barriers.touched);
        let candidates = if exited { u32::MAX } else { touched };
        for id in 0..super::barrier::BARRIERS as u32 {
            if candidates >> id & 1 == 0 {
                continue;
            }
            let barriers = &mut resident.block.barriers;
            let Some(done) = barriers.complete(id, &resident.existing, &resident.live) else {
                continue;
            };
            race::barrier(
                resident.block.uid,
                &mut resident.warps,
                &done.arrived,
                &done.waiting,
            );
            let launch = resident.launch.clone();
            for (warp, &waiting) in resident.warps.iter_mut().zip(&done.waiting) {
                let block = &mut resident.block;
                warp.release(id, waiting, done.result, &launch, block, &mut self.world);
            }
        }
        if exited && resident.live.iter().all(|&l| l == 0) {
            let ended = self.resident.swap_remove(b);
            let lanes: u64 = ended.warps.iter().map(|w| w.lane_instructions).sum();
            self.world.lane_instructions += lanes;
            self.quiet_runs = 0;
            self.runs_without_end = 0;
            if let Some(grid) = self.grids.get_mut(&ended.grid) {
                grid.clock.learn(&ended.warps);
            }
            self.world.memory.race.end_block(ended.block.uid);
            self.end_block(ended.grid);
        }
    }

    fn end_block(&mut self, id: u32) {
        let Some(grid) = self.grids.get_mut(&id) else {
            return;
        };
        grid.finished += 1;
        grid.resident -= 1;
        self.completions += 1;
        if grid.finished == grid.launch.blocks()
            && let Some(grid) = self.grids.remove(&id)
            && let Some(stream) = self.streams.get_mut(&grid.stream)
        {
            stream.busy = false;
            stream.finished += 1;
            stream.clock.join(&grid.clock);
            stream.clock.tick(grid.stream.0);
            stream.clock.prune(&self.world.memory.race);
        }
    }

    /// Whether every warp, run alone, comes back to a state it has been in without having
    /// changed any memory: then nothing that any of them does will ever release another.
    fn all_repeat(&mut self) -> bool {
        const TURNS: u32 = 64;
        let changes = self.world.memory.changes();
        for b in 0..self.resident.len() {
            for w in 0..self.resident[b].warps.len() {
                let mut seen: HashMap<u64, u32> = HashMap::new();
                let mut repeats = false;
                for turn in 0..TURNS {
                    match self.resident[b].warps[w].state(self.world.now) {
                        WarpState::Done | WarpState::Blocked => {
                            repeats = true;
                            break;
                        }
                        WarpState::Asleep(time) => self.world.now = time,
                        WarpState::Ready => {}
                    }
                    let mut hasher = DefaultHasher::new();
                    self.resident[b].warps[w].fingerprint(&mut hasher);
                    if seen.insert(hasher.finish(), turn).is_some() {
                        repeats = true;
                        break;
                    }
                    if let Err(fault) = self.run_warp(b, w, 4096, true) {
                        let device = self.resident[b].launch.device;
                        self.fail_device(device, fault);
                        return false;
                    }
                    if self.world.memory.changes() != changes {
                        self.after_run(b);
                        return false;
                    }
                    let touched = self.resident[b].block.barriers.touched != 0;
                    let exited = self.resident[b].warps[w].live != self.resident[b].live[w];
                    if touched || exited {
                        self.after_run(b);
                        return false;
                    }
                }
                if !repeats {
                    return false;
                }
            }
        }
        true
    }

    /// Nothing can advance any more and the host, which waits in these calls, will not help:
    /// reports who waits for what, and ends the devices concerned.
    pub fn declare_deadlock(&mut self, calls: &[&str]) {
        let mut stuck: Vec<u32> = Vec::new();
        let mut findings = Vec::new();
        for resident in &self.resident {
            let device = resident.launch.device;
            if stuck.contains(&device) {
                continue;
            }
            stuck.push(device);
            let mut words = Vec::new();
            let mut first = None;
            let blocks = self.resident.iter().filter(|r| r.launch.device == device);
            for r in blocks.clone() {
                for warp in &r.warps {
                    for (op, group) in warp.positions(&r.launch) {
                        let thread = Thread {
                            device,
                            block: r.block.index,
                            thread: warp.thread_index(group.mask.trailing_zeros() as usize % 32),
                        };
                        if first.is_none() {
                            first = Some((op.place.clone(), thread));
                        }
                        if words.len() < 8 {
                            words.push(format!(
                                "block {:?} warp {} lanes {:#x} {} at {}",
                                r.block.index,
                                warp.index,
                                group.mask,
                                match group.wait {
                                    super::warp::Wait::Barrier(id) => {
                                        let (come, wanted) =
                                            r.block.barriers.progress(id, &r.existing, &r.live);
                                        format!("wait at barrier {id} ({come} of {wanted} threads)")
                                    }
                                    super::warp::Wait::Lanes => "wait for lanes".to_owned(),
                                    _ => "spin".to_owned(),
                                },
                                op.place
                            ));
                        }
                    }
                }
            }
            let not_resident: u64 = self
                .grids
                .values()
                .filter(|g| g.launch.device == device)
                .map(|g| g.launch.blocks() - g.next_block)
                .sum();
            if not_resident > 0 {
                words.push(format!(
                    "{not_resident} blocks do not fit on the device beside the {} that wait",
                    blocks.count()
                ));
            }
            findings.push(Finding {
                kind: Kind::Deadlock,
                place: first.as_ref().map(|(place, _)| (**place).clone()),
                thread: first.map(|(_, thread)| thread),
                address: None,
                other: None,
                reason: None,
                message: format!(
                    "nothing can advance any more: {}{}",
                    words.join("; "),
                    if calls.is_empty() {
                        String::new()
                    } else {
                        format!("; the host waits in {}", calls.join(", "))
                    }
                ),
            });
        }
        for finding in findings {
            self.world.findings.report(finding);
        }
        for (_, stream) in self.streams.iter() {
            if (stream.busy || !stream.queue.is_empty()) && !stuck.contains(&stream.device) {
                stuck.push(stream.device);
            }
        }
        for device in stuck {
            self.fail_device(device, Fault::LaunchTimeout);
        }
    }
}
