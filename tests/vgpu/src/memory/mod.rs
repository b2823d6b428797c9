//! Memory as a warp sees it: state spaces, generic addresses, and the one door through which
//! every access of every thread goes, so that the checks (bounds, alignment, freed memory,
//! initialisation, races) and the memory model have a single place to stand.
//!
//! Addresses: `.global` and `.const` addresses are generic addresses as they are. `.shared`,
//! `.local` and `.param` addresses are offsets; their generic forms are the offsets plus
//! [`SHARED_WINDOW`], [`LOCAL_WINDOW`] and [`PARAM_WINDOW`].

mod lane_memory;
mod links;
mod region;
mod space;

pub use lane_memory::LaneMemory;
pub use links::{Crossing, Fabric, Links, MAX_DEVICES, Reach, Topology, TopologyError};
pub use space::{Allocation, Memory, MemoryError, SharedMemory};

use crate::finding::Fault;
use crate::machine::Cx;
use crate::race;
use crate::registers::{LANES, Lanes, Lanes64, Undef};

/// Generic address of byte 0 of the block's shared memory.
pub const SHARED_WINDOW: u64 = 1 << 40;
/// Generic address of byte 0 of the thread's local memory.
pub const LOCAL_WINDOW: u64 = SHARED_WINDOW + (1 << 32);
/// Generic address of byte 0 of the kernel's parameters.
pub const PARAM_WINDOW: u64 = LOCAL_WINDOW + (1 << 32);
/// Offset, among parameters, of those of a called function's frame: byte 0 of the kernel's own
/// parameters is 0.
pub const FRAME_PARAMS: u64 = 1 << 31;
/// Bytes in each of the three windows.
pub const WINDOW_SIZE: u64 = 1 << 32;

/// The state space named by an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Space {
    Generic,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// How an access takes part in the memory model (PTX ISA, "Memory Consistency Model").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// No ordering, and a race with any other access to the same bytes.
    Weak,
    /// `.volatile`: relaxed at system scope.
    Volatile,
    /// Strong, no ordering of other accesses.
    Relaxed,
    /// A load that pairs with a release.
    Acquire,
    /// A store that publishes what came before.
    Release,
    /// Read-modify-write: both.
    AcqRel,
    /// `fence.sc`
    SeqCst,
}

/// Whom a strong access or a fence concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Scope {
    Cta,
    Cluster,
    Gpu,
    Sys,
}

/// One memory instruction of a warp.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    /// The space the instruction names.
    pub space: Space,
    /// One address a lane: an offset or a generic address, by `space`.
    pub addresses: &'a Lanes64,
    /// The lanes that take part.
    pub mask: u32,
    /// Bytes a lane: 1, 2, 4, 8, 16 or 32.
    pub bytes: u32,
    /// Bytes of one element: what alignment the memory model sees (a vector access is treated
    /// as accesses to its elements); the address itself must be a multiple of `bytes`.
    pub element: u32,
    /// See [`Order`].
    pub order: Order,
    /// See [`Scope`]; of no meaning for weak accesses.
    pub scope: Scope,
    /// `ld.global.nc`: through the non-coherent path.
    pub non_coherent: bool,
}

/// What a warp's memory instruction moves, word by word: `words[w][lane]` are bytes `4 w` to
/// `4 w + 3` of that lane's value. Values of one or two bytes stand in the low bytes of word 0.
#[derive(Clone)]
pub struct Data {
    /// The values.
    pub words: [Lanes; 8],
    /// Which bytes of them are undefined.
    pub undef: [Undef; 8],
}

impl Default for Data {
    fn default() -> Self {
        Self {
            words: [[0; LANES]; 8],
            undef: [[0; 4]; 8],
        }
    }
}

impl Data {
    /// Makes the first words ready to be filled: zero, and nothing undefined.
    pub fn clear(&mut self, bytes: u32) {
        let words = bytes.div_ceil(4) as usize;
        self.words[..words].fill([0; LANES]);
        self.undef[..words].fill([0; 4]);
    }
}

/// Loads for the lanes of the access; the other lanes of `data` are left as they are.
pub fn load(cx: &mut Cx, access: &Access, data: &mut Data) -> Result<(), Fault> {
    space::load(cx, access, data)?;
    if let Some(report) = &mut cx.world.report {
        report.load(&cx.world.memory, &mut cx.warp.waits, cx.op.id, access);
    }
    Ok(())
}

/// Stores for the lanes of the access.
pub fn store(cx: &mut Cx, access: &Access, data: &Data) -> Result<(), Fault> {
    space::store(cx, access, data)?;
    if let Some(report) = &mut cx.world.report {
        report.store(&cx.world.memory, &mut cx.warp.waits, access);
    }
    Ok(())
}

/// An atomic read-modify-write for the lanes of the access, one lane after the other: `update`
/// gets the lane and the old value and returns the new one, or None to leave the memory
/// as it is (a failed compare-and-swap). `old` receives the old values.
pub fn atomic(
    cx: &mut Cx,
    access: &Access,
    old: &mut Data,
    update: &mut dyn FnMut(usize, u64) -> Option<u64>,
) -> Result<(), Fault> {
    space::atomic(cx, access, old, update)?;
    if let Some(report) = &mut cx.world.report {
        report.atomic(&cx.world.memory, &mut cx.warp.waits, access);
    }
    Ok(())
}

/// A fence by the lanes of `cx.mask`.
pub fn fence(cx: &mut Cx, order: Order, scope: Scope) {
    if let Some(report) = &mut cx.world.report {
        report.fence(cx.mask, order, scope);
        cx.warp.waits.forget(cx.mask);
    }
    let race = &mut cx.world.memory.race;
    if !race.is_on() {
        return;
    }
    race.note_fence(cx.op.id, &cx.op.place, order, scope);
    let fence = race::Fence {
        order,
        scope,
        op: cx.op.id,
    };
    let (block, notes) = (cx.block.uid, &mut cx.block.clock.notes);
    race::fence(
        race,
        &cx.launch.clock,
        block,
        notes,
        cx.warp,
        cx.mask,
        fence,
    );
}

/// The space a generic address points into: Shared, Local, Param or Global.
pub fn space_of(address: u64) -> Space {
    match address {
        SHARED_WINDOW..LOCAL_WINDOW => Space::Shared,
        LOCAL_WINDOW..PARAM_WINDOW => Space::Local,
        PARAM_WINDOW..PARAM_WINDOW_END => Space::Param,
        _ => Space::Global,
    }
}

const PARAM_WINDOW_END: u64 = PARAM_WINDOW + WINDOW_SIZE;
