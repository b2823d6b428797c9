//! What can be put into a stream, as data: it can run now, or be kept in a graph and run again
//! and again. Every call that gives a stream work makes an [`Operation`] and submits it; whether
//! the stream runs it or captures it is decided here, once.

use super::copy::{Copy, Fill, Staging};
use super::graph::Graph;
use super::launch::KernelLaunch;
use super::{Driver, Handle, Status};
use crate::finding::Fault;
use crate::machine::{Command, EventId, World};

/// Work for a stream.
#[derive(Clone)]
pub(super) enum Operation {
    Kernel(KernelLaunch),
    Copy(Copy),
    Fill(Fill),
    Host(HostFunction),
    WaitValue(WaitValue),
    WriteValue(WriteValue),
    /// An event's record and wait that are part of the work of a graph.
    Record(Handle, EventId),
    Await(Handle, EventId),
    /// A whole graph as one node of another.
    Child(Graph),
    /// Nothing but a place in the order.
    Empty,
}

/// A function of the host and its argument.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostFunction {
    pub(super) function: extern "C" fn(u64),
    pub(super) argument: u64,
}

/// `cuStreamWaitValue`: until a word of memory compares as asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct WaitValue {
    pub(super) at: u64,
    pub(super) value: u64,
    pub(super) bytes: usize,
    /// `CU_STREAM_WAIT_VALUE_GEQ`, `EQ`, `AND`, `NOR`
    pub(super) comparison: u32,
}

/// `cuStreamWriteValue`
#[derive(Debug, Clone, Copy)]
pub(super) struct WriteValue {
    pub(super) at: u64,
    pub(super) value: u64,
    pub(super) bytes: usize,
}

impl WaitValue {
    fn holds(self, world: &World) -> bool {
        let Some((base, allocation)) = world.memory.containing(self.at) else {
            return false;
        };
        let offset = (self.at - base) as usize;
        let Some(found) = allocation.region.bytes().get(offset..offset + self.bytes) else {
            return false;
        };
        let mut word = [0; 8];
        word[..self.bytes].copy_from_slice(found);
        let (found, value) = (u64::from_le_bytes(word), self.value);
        let narrow = self.bytes == 4;
        match self.comparison {
            // Not less, cyclically: the difference is not negative.
            0 if narrow => (found as u32).wrapping_sub(value as u32) as i32 >= 0,
            0 => found.wrapping_sub(value) as i64 >= 0,
            1 => found == value,
            2 => found & value != 0,
            _ if narrow => !(found as u32 | value as u32) != 0,
            _ => !(found | value) != 0,
        }
    }
}

impl Operation {
    /// The commands that do it once.
    pub(super) fn commands(
        &self,
        driver: &mut Driver,
        staging: Staging,
    ) -> Result<Vec<Command>, Status> {
        Ok(vec![match self {
            Operation::Kernel(kernel) => return kernel.commands(driver),
            Operation::Copy(copy) => copy.command(staging)?,
            Operation::Fill(fill) => fill.command(),
            &Operation::Host(HostFunction { function, argument }) => {
                Command::Host(Box::new(move || function(argument)))
            }
            &Operation::WaitValue(wait) => Command::Until(Box::new(move |w| wait.holds(w))),
            &Operation::WriteValue(WriteValue { at, value, bytes }) => {
                Command::Work(Box::new(move |world: &mut World| {
                    let written = world.memory.write(at, &value.to_le_bytes()[..bytes]);
                    written.map_err(|_| Fault::IllegalAddress)
                }))
            }
            &Operation::Record(_, event) => Command::Record(event),
            &Operation::Await(_, event) => Command::Wait(event),
            // A graph's nodes go to streams of their own; see `graph`.
            Operation::Child(_) | Operation::Empty => return Ok(Vec::new()),
        }])
    }
}

impl Driver {
    /// Puts an operation into a stream, or into the graph that the stream is capturing.
    pub(super) fn submit(&mut self, stream: Handle, operation: Operation) -> Result<(), Status> {
        if self.is_captured(stream)? {
            return self.capture(stream, operation);
        }
        for command in operation.commands(self, Staging::Now)? {
            self.enqueue(stream, command)?;
        }
        Ok(())
    }
}
