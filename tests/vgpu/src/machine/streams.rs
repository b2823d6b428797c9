//! Streams, what is put into them, and events: what may start when.

use std::collections::VecDeque;

use rustc_hash::FxHashSet;

use super::blocks::Grid;
use super::engine::{Machine, Progress};
use super::{Launch, World};
use crate::finding::Fault;
use crate::race::StreamClock;

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

pub(super) struct Stream {
    pub(super) device: u32,
    /// Each with what the host knew when it put it in.
    pub(super) queue: VecDeque<(Queued, StreamClock)>,
    /// A kernel or host function in progress.
    pub(super) busy: bool,
    /// Commands put in, and finished.
    pub(super) submitted: u64,
    pub(super) finished: u64,
    pub(super) clock: StreamClock,
    /// Streams that a command must wait for, and how far: the legacy default stream's rule.
    pub(super) barriers: VecDeque<(u64, Vec<(StreamId, u64)>)>,
}

pub(super) enum Queued {
    Command(Command),
    Wait(EventId, u64),
    Record(EventId, u64),
}

#[derive(Default)]
pub(super) struct Event {
    /// Records asked for, and done.
    pub(super) submitted: u64,
    pub(super) finished: u64,
    /// Virtual time of the last record done.
    pub(super) time: u64,
    pub(super) clock: StreamClock,
}

impl Machine {
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

    /// Whether nothing is left to do anywhere.
    pub fn is_quiet(&self) -> bool {
        self.streams.values().all(|s| s.finished == s.submitted)
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

    /// Nothing is in progress, and all that was done is known to whatever comes: what a program
    /// remembers then does not grow with every stream that it ever had.
    pub(super) fn settle(&mut self) {
        for stream in self.streams.values() {
            self.host_clock.join(&stream.clock);
        }
        let streams: FxHashSet<u32> = self.streams.keys().map(|id| id.0).collect();
        let is_there = |stream| streams.contains(&stream);
        self.world.memory.race.settle(is_there);
        let race = &self.world.memory.race;
        let of_streams = self.streams.values_mut().map(|s| &mut s.clock);
        let of_events = self.events.values_mut().map(|e| &mut e.clock);
        for clock in of_streams.chain(of_events).chain([&mut self.host_clock]) {
            clock.settle(race, is_there);
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

    /// Starts the commands whose turn has come.
    pub(super) fn start_commands(&mut self) -> Option<Progress> {
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
                self.world.engine = device;
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
                let properties = &self.devices[device as usize].properties;
                launch.multiprocessors = properties.multiprocessors;
                launch.clock = self.world.memory.race.start(id.0, &stream.clock);
                let share =
                    properties.share(&launch.kernel, launch.threads(), launch.dynamic_shared);
                self.grids
                    .insert(self.next_launch, Grid::new(*launch, id, share));
            }
            // `enqueue` turns these into the forms above.
            Queued::Command(Command::Record(_) | Command::Wait(_)) => stream.finished += 1,
        }
        None
    }
}
