//! What a seed chooses beside the order of turns, so that many seeds go through all of it: the
//! kind of schedule, a slow device or link, and which old values strong loads return.

use super::engine::{Config, Machine};
use super::schedule::Schedule;
use crate::memory::Topology;
use crate::race::Stale;

/// A way to run a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exploration {
    /// How the scheduler chooses.
    pub schedule: Schedule,
    /// What strong loads return.
    pub stale: Stale,
    /// Who is slow.
    pub slow: Option<Slow>,
}

/// What gets fewer turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slow {
    /// A device.
    Device(u32),
    /// Accesses of the first to the memory of the second.
    Link(u32, u32),
}

impl Exploration {
    /// The way that belongs to a seed, on so many devices.
    pub fn of(seed: u64, devices: u32) -> Self {
        let turn = seed / 5;
        Self {
            schedule: match seed % 3 {
                1 => Schedule::Pct(3),
                _ => Schedule::Random,
            },
            stale: [Stale::Newest, Stale::Random, Stale::Oldest][(seed / 3 % 3) as usize],
            slow: match seed % 5 {
                3 => Some(Slow::Device((turn % u64::from(devices)) as u32)),
                4 if devices > 1 => Some(Slow::Link((turn % 2) as u32, 1 - (turn % 2) as u32)),
                _ => None,
            },
        }
    }

    /// Of the devices of a machine, as `VGPU_TOPOLOGY` would say it.
    pub fn topology(&self) -> Topology {
        let text = match self.slow {
            None => String::new(),
            Some(Slow::Device(device)) => format!("slow:{device}"),
            Some(Slow::Link(from, to)) => format!("slow:{from}>{to}"),
        };
        text.parse().unwrap_or_default()
    }

    /// A configuration that runs so.
    pub fn config(seed: u64, devices: u32) -> Config {
        let way = Self::of(seed, devices);
        Config {
            devices,
            seed,
            schedule: way.schedule,
            topology: way.topology(),
            stale: way.stale,
            ..Config::default()
        }
    }
}

impl Machine {
    /// As [`set_seed`](Self::set_seed), and the seed chooses how to run as well. `devices` are
    /// those that the program uses: one of them may become slow, and no other is. Nothing is in
    /// progress, and what was done before is known to all that comes.
    pub fn explore(&mut self, seed: u64, devices: u32) {
        let there = self.devices.len() as u32;
        let way = Exploration::of(seed, devices.clamp(1, there));
        self.set_schedule(way.schedule);
        self.world.memory.race.set_stale(way.stale);
        self.world.memory.links.set_slow(way.slow);
        self.settle();
        self.set_seed(seed);
    }
}
