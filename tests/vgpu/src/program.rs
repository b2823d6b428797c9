//! Kernels ready to run: flat lists of pre-decoded operations.
//!
//! An operation is a closure over the slots of its operands, made by `isa` from an instruction
//! of the syntax tree. It works on a whole warp: the values of 32 lanes at a time, under a mask.

use std::sync::Arc;

use crate::finding::{Fault, Place};
use crate::machine::Cx;
use crate::registers::{Pred, R32, Registers};

/// What the warp does after an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Goes on with the next operation.
    Next,
    /// The active lanes go on at this operation of the same function; the others fall through.
    Jump(u32),
    /// As `Jump`, each active lane to the operation in `cx.targets[lane]`.
    JumpEach,
    /// The active lanes end.
    Exit,
    /// The active lanes call the function in `cx.targets[lane]` (an index into
    /// [`Kernel::functions`]) with the arguments of this call site.
    Call(u32),
    /// The active lanes return to their caller (or end, in a kernel).
    Return,
    /// The active lanes give way to others for at least `cx.sleep` virtual nanoseconds, then go
    /// on with the next operation.
    Sleep,
    /// The context dies.
    Fault(Fault),
}

/// A whole operation.
pub type Run = Box<dyn Fn(&mut Cx) -> Step + Send + Sync>;
/// A part of an operation that always goes on.
pub type Part = Box<dyn Fn(&mut Cx) + Send + Sync>;

/// What an operation does.
pub enum Action {
    /// Something the lanes that are here can do at once.
    Plain(Run),
    /// Something that needs all lanes of a member mask.
    WarpSync(WarpSync),
    /// A barrier of the block.
    Barrier(Barrier),
}

impl Action {
    /// An operation that always goes on to the next.
    pub fn simple(f: impl Fn(&mut Cx) + Send + Sync + 'static) -> Self {
        Action::Plain(Box::new(move |cx| {
            f(cx);
            Step::Next
        }))
    }

    /// An operation that may end in something else than `Step::Next`.
    pub fn plain(f: impl Fn(&mut Cx) -> Step + Send + Sync + 'static) -> Self {
        Action::Plain(Box::new(f))
    }
}

/// `shfl.sync`, `vote.sync`, `bar.warp.sync`, …: the interpreter gathers the lanes of the member
/// mask (those that have not exited), which may stand at different operations with the same
/// `key`. Then every group runs `publish`, and after all of them every group runs `collect`.
pub struct WarpSync {
    /// The opcode with its qualifiers: lanes meet only in the same operation.
    pub key: Arc<str>,
    /// Whether all lanes must stand at this very instruction (`.aligned`).
    pub aligned: bool,
    /// The register with the member mask; None is all lanes that have not exited.
    pub members: Option<R32>,
    /// Writes what the others need into `cx.exchange` (only the lanes of `cx.mask`).
    pub publish: Part,
    /// Reads `cx.exchange` and writes the result. `cx.mask` holds the lanes of this group,
    /// `cx.members` all the lanes that take part (members that have not exited).
    pub collect: Part,
    /// Whether memory is ordered between the participants (`bar.warp.sync`).
    pub orders_memory: bool,
}

/// Reads what a barrier operation asks for.
pub type Request = Box<dyn Fn(&mut Cx) -> Result<BarrierRequest, Fault> + Send + Sync>;

/// A barrier operation of the block.
pub struct Barrier {
    /// Reads barrier number and count.
    pub request: Request,
    /// For `.red`: what the lanes bring along, as predicates of the active lanes.
    pub predicate: Option<(Pred, bool)>,
    /// Runs once the barrier is complete, for the waiting lanes, with `cx.barrier_result` set.
    pub finish: Option<Part>,
}

/// What a barrier operation asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarrierRequest {
    /// 0 to 15.
    pub id: u32,
    /// Threads expected; None is all threads of the block that have not exited.
    pub threads: Option<u32>,
    /// Whether the whole warp must come together.
    pub aligned: bool,
    /// Whether the lanes go on at once (`bar.arrive`).
    pub arrive_only: bool,
}

/// The sums of a barrier's predicates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BarrierResult {
    /// Lanes whose predicate was true.
    pub population: u32,
    /// Lanes that took part.
    pub threads: u32,
}

/// One operation.
pub struct Op {
    /// A number of its own, for the tables of the checks.
    pub id: u32,
    /// What it does.
    pub action: Action,
    /// The guard: the operation runs in the lanes where the predicate differs from the flag.
    pub guard: Option<(Pred, bool)>,
    /// Where it stands.
    pub place: Arc<Place>,
}

/// A lowered kernel or function.
pub struct Function {
    /// The (mangled) name.
    pub name: String,
    /// The operations; execution starts at 0.
    pub ops: Vec<Op>,
    /// The registers at entry: constants in place, everything else undefined.
    pub template: Registers,
    /// Bytes of `.local` variables.
    pub local_bytes: u32,
    /// Bytes of `.param` variables of a frame: formals, results and arguments of calls.
    pub param_bytes: u32,
    /// Formals of a `.func`, in order: offset in the frame's parameter bytes, and size.
    pub formals: Vec<(u32, u32)>,
    /// Results of a `.func`.
    pub results: Vec<(u32, u32)>,
    /// Call sites, by the number in [`Step::Call`].
    pub calls: Vec<CallSite>,
}

/// The arguments of a call, as places in the caller's parameter bytes.
#[derive(Debug, Clone, Default)]
pub struct CallSite {
    /// Offset and size of each argument.
    pub arguments: Vec<(u32, u32)>,
    /// Offset and size of each result.
    pub results: Vec<(u32, u32)>,
}

/// A parameter of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelParam {
    /// Offset in the parameter bytes.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
}

/// A kernel with everything it calls.
pub struct Kernel {
    /// The (mangled) name.
    pub name: String,
    /// `functions[0]` is the entry.
    pub functions: Vec<Function>,
    /// The parameters, in order.
    pub params: Vec<KernelParam>,
    /// All parameter bytes.
    pub param_bytes: u32,
    /// Bytes of `.shared` variables of known size.
    pub static_shared: u32,
    /// Where the dynamic shared memory begins.
    pub dynamic_shared_at: u32,
    /// `.maxntid`, `.reqntid` as limits on the block's threads.
    pub max_threads: Option<u32>,
    /// `.reqntid`: the block's only shape.
    pub required_block: Option<[u32; 3]>,
    /// Registers a thread, from the machine code beside the PTX; None where there is none.
    pub registers: Option<u32>,
    /// Bytes of local memory an entry-level thread needs (functions called come on top).
    pub local_bytes: u32,
    /// The PTX module's version and target, for function attributes: `ptxVersion` 80 is sm_80.
    pub arch: u32,
}
