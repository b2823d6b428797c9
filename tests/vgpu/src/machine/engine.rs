//! The machine: all devices and what they do. One scheduler interleaves everything on all
//! devices; with the same seed and the same calls the whole run is the same to the bit.
//!
//! The machine advances only inside [`Machine::step`]: whoever holds it decides when. A step
//! starts every command that is due (`streams`), brings blocks onto the devices (`blocks`), then
//! runs one warp for a while (`schedule`). `deadlock` knows when nothing of that helps.

use std::collections::BTreeMap;

use super::World;
use super::blocks::{Grid, Resident};
use super::device::{Device, Properties};
use super::schedule::{Schedule, Scheduler};
use super::streams::{Event, EventId, Queued, Stream, StreamId};
use crate::finding::{Fault, Findings, Kind};
use crate::memory::{Memory, Topology};
use crate::race::{Stale, StreamClock};

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
    /// How the scheduler chooses.
    pub schedule: Schedule,
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
            schedule: Schedule::default(),
        }
    }
}

/// What a step came to.
pub enum Progress {
    /// Something was done.
    Advanced,
    /// There is nothing to do.
    Idle,
    /// There is something to do, but no step will ever bring it further unless the host acts.
    Stuck,
    /// What was stuck goes on: the host has stored to memory that the devices see.
    Released,
    /// All that could happen waits for a time to come, and the clock may not leap there now: see
    /// [`Machine::clock_limit`].
    TooEarly,
    /// The host function to call now; afterwards [`Machine::host_function_done`].
    HostFunction(StreamId, Box<dyn FnOnce() + Send>),
}

/// All devices and what they do.
pub struct Machine {
    /// Memory, findings, time.
    pub world: World,
    /// The devices.
    pub devices: Vec<Device>,
    pub(super) streams: BTreeMap<StreamId, Stream>,
    pub(super) events: BTreeMap<EventId, Event>,
    pub(super) grids: BTreeMap<u32, Grid>,
    pub(super) resident: Vec<Resident>,
    /// Warps of all of them.
    pub(super) warps: u64,
    /// Streams made so far, by device: threads that use different devices get the same ones in
    /// whatever order they come.
    pub(super) next_stream: Vec<u32>,
    pub(super) next_event: u32,
    pub(super) next_launch: u32,
    pub(super) scheduler: Scheduler,
    /// Nothing could happen when last looked.
    pub(super) stuck: bool,
    pub(super) host_clock: StreamClock,
    pub(super) completions: u64,
    pub(super) turns: u64,
    /// The virtual time up to which the clock may leap where nothing happens but waiting for it.
    pub clock_limit: u64,
}

impl Machine {
    /// Devices as configured, with nothing to do.
    pub fn new(config: Config) -> Self {
        let count = config.devices as usize;
        let scheduler = Scheduler::new(config.seed, config.schedule);
        let devices = (0..config.devices)
            .map(|ordinal| Device::new(ordinal, Properties::of(config.arch)))
            .collect();
        Self {
            world: World {
                memory: Memory::new(&config),
                findings: Findings::new(&config.checks),
                config,
                now: 0,
                engine: 0,
                clock_reads: 0,
                polls: 0,
                lane_instructions: 0,
                output: Vec::new(),
                notices: Vec::new(),
                report: None,
            },
            devices,
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            grids: BTreeMap::new(),
            resident: Vec::new(),
            warps: 0,
            next_stream: vec![0; count],
            next_event: 0,
            next_launch: 0,
            scheduler,
            stuck: false,
            host_clock: StreamClock::default(),
            completions: 0,
            turns: 0,
            clock_limit: u64::MAX,
        }
    }

    /// Changes whenever something that somebody may wait for has been done.
    pub fn completions(&self) -> u64 {
        self.completions
    }

    /// Turns taken so far.
    pub fn turns(&self) -> u64 {
        self.turns
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
        self.cancel_streams(&self.streams_of(device));
    }

    /// Drops everything these streams have in them, kernels that run included.
    pub fn cancel_streams(&mut self, ids: &[StreamId]) {
        self.completions += 1;
        self.stuck = false;
        self.clear_blocks(ids);
        for id in ids {
            let Some(stream) = self.streams.get_mut(id) else {
                continue;
            };
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
            self.scheduler.something_happened();
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
            return Progress::Released;
        }
        self.run_some_warp()
    }
}
