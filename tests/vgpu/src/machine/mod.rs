//! The machine that runs kernels: launches, blocks, warps, and the context an operation sees.
//!
//! `warp` interprets the operations of one warp, `barrier` keeps the block's barriers, `engine`
//! interleaves streams, blocks and warps of all devices under one deterministic scheduler.

mod barrier;
mod blocks;
mod deadlock;
mod device;
mod engine;
mod explore;
mod schedule;
mod streams;
mod warp;

use std::sync::Arc;

pub use barrier::Barriers;
pub use device::{Device, Properties, SHARED_PER_BLOCK, THREADS_PER_BLOCK};
pub use engine::{Approximation, Config, Machine, Progress};
pub use explore::{Exploration, Slow};
pub use schedule::Schedule;
pub use streams::{Command, EventId, StreamId, Work};
pub(crate) use warp::Polled;
pub use warp::{Frame, Group, Wait, Warp, WarpState};

use crate::finding::{Finding, Findings, Kind, Thread};
use crate::memory::{Data, LaneMemory, Memory, SharedMemory};
use crate::program::{BarrierResult, Kernel, Op};
use crate::race::{BlockClock, LaunchClock};
use crate::registers::{LANES, Lanes, Lanes64, Registers};
use crate::report::Counter;

/// A kernel on its way through the machine.
pub struct Launch {
    /// Unique in this process, from 1.
    pub id: u32,
    /// The device's ordinal.
    pub device: u32,
    /// What runs.
    pub kernel: Arc<Kernel>,
    /// `gridDim`
    pub grid: [u32; 3],
    /// `blockDim`
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
    /// The parameter bytes, as many as the kernel declares.
    pub params: Vec<u8>,
    /// Whether all blocks must be resident at once.
    pub cooperative: bool,
    /// Address of the grid-wide barrier's workspace, for cooperative launches; else 0.
    pub workspace: u64,
    /// Multiprocessors of the device, for `%nsmid`; filled in when it starts.
    pub multiprocessors: u32,
    /// What is ordered before it.
    pub clock: LaunchClock,
}

impl Launch {
    /// Threads in a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// Blocks in the grid.
    pub fn blocks(&self) -> u64 {
        self.grid.iter().map(|&n| u64::from(n)).product()
    }
}

/// A resident block, without its warps.
pub struct Block {
    /// Unique in this process, from 1, in the order blocks become resident.
    pub uid: u64,
    /// `blockIdx`
    pub index: [u32; 3],
    /// The block's shared memory.
    pub shared: SharedMemory,
    /// Its barriers.
    pub barriers: Barriers,
    /// What belongs to it in the memory model.
    pub clock: BlockClock,
    /// The streaming multiprocessor it sits on, for `%smid`.
    pub sm: u32,
}

/// What all devices share.
pub struct World {
    /// Every byte of every device.
    pub memory: Memory,
    /// What the checks found.
    pub findings: Findings,
    /// How to run.
    pub config: Config,
    /// Virtual nanoseconds since the start.
    pub now: u64,
    /// The device whose stream does the work at hand.
    pub engine: u32,
    /// Lane-instructions run by blocks that have ended.
    pub lane_instructions: u64,
    /// How often a kernel looked at a clock: whoever does will see it advance.
    pub clock_reads: u64,
    /// Strong reads so far.
    pub polls: u64,
    /// What kernels printed and nobody has written out yet.
    pub output: Vec<u8>,
    /// What the program should be told that is no finding.
    pub notices: Vec<String>,
    /// Counts what kernels and copies do, where that is wanted.
    pub report: Option<Box<Counter>>,
}

/// What lanes hand each other in a warp-wide operation.
pub struct Exchange {
    /// Values of up to 64 bits.
    pub value: Lanes64,
    /// Undefined lanes.
    pub undef: u32,
    /// Predicates.
    pub predicate: u32,
    /// The register planes of undefined bytes, where they matter.
    pub undef_bytes: [u32; 8],
    /// What a memory operation moves: to have it at hand costs less than to clear it each time.
    pub data: Option<Box<Data>>,
}

/// What an operation sees: the lanes it works on, their registers, and the world around them.
pub struct Cx<'a> {
    /// The registers of the frame.
    pub regs: &'a mut Registers,
    /// The frame's parameter bytes (a `.func`'s formals and results, arguments of calls).
    pub params: &'a mut LaneMemory,
    /// Where the frame's local variables begin in the thread's local memory.
    pub local_base: u32,
    /// The lanes that are here and pass the guard.
    pub mask: u32,
    /// In the parts of a [`WarpSync`](crate::program::WarpSync): all that take part.
    pub members: u32,
    /// Targets of `Step::JumpEach` and `Step::Call`.
    pub targets: Lanes,
    /// Nanoseconds for `Step::Sleep`.
    pub sleep: u64,
    /// See [`Exchange`].
    pub exchange: &'a mut Exchange,
    /// In [`Barrier::finish`](crate::program::Barrier).
    pub barrier_result: BarrierResult,
    /// The operation itself.
    pub op: &'a Op,
    /// The kernel and its shape.
    pub launch: &'a Launch,
    /// The block.
    pub block: &'a mut Block,
    /// The warp.
    pub warp: &'a mut Warp,
    /// Memory, findings, time.
    pub world: &'a mut World,
}

impl Cx<'_> {
    /// Who a lane is.
    pub fn thread(&self, lane: usize) -> Thread {
        Thread {
            device: self.launch.device,
            block: self.block.index,
            thread: self.warp.thread_index(lane),
        }
    }

    /// Reports a finding of the current operation, once for each cause.
    pub fn report(&mut self, kind: Kind, lane: usize, address: Option<u64>, message: String) {
        let finding = Finding {
            kind,
            place: Some((*self.op.place).clone()),
            thread: Some(self.thread(lane)),
            address,
            other: None,
            reason: None,
            message,
        };
        self.world.findings.report(finding);
    }
}

impl Exchange {
    fn new() -> Self {
        Self {
            value: [0; LANES],
            undef: 0,
            predicate: 0,
            undef_bytes: [0; 8],
            data: None,
        }
    }
}
