//! What instructions do: each is lowered to an operation by the family it belongs to. A family
//! returns None for an opcode that is not its own; an opcode that nobody owns, or a modifier
//! that nobody asked for, is an error that names it.

mod alu;
mod control;
mod memory;
mod special;
mod sync;

use crate::lowering::{LoadError, Lowering, Modifiers, unsupported};
use crate::program::Action;
use crate::ptx::ast::Instruction;

/// The opcodes there are. What is not in this list is refused, so that a list of what must be
/// tested cannot miss one.
pub const OPCODES: &[&str] = &[
    "abs",
    "activemask",
    "add",
    "addc",
    "and",
    "applypriority",
    "atom",
    "bar",
    "barrier",
    "bfe",
    "bfi",
    "bfind",
    "bmsk",
    "bra",
    "brev",
    "brkpt",
    "brx",
    "call",
    "clz",
    "cnot",
    "copysign",
    "cos",
    "createpolicy",
    "cvt",
    "cvta",
    "discard",
    "div",
    "dp2a",
    "dp4a",
    "elect",
    "ex2",
    "exit",
    "fence",
    "fma",
    "fns",
    "griddepcontrol",
    "isspacep",
    "ld",
    "ldu",
    "lg2",
    "lop3",
    "mad",
    "mad24",
    "madc",
    "match",
    "max",
    "membar",
    "min",
    "mov",
    "mul",
    "mul24",
    "nanosleep",
    "neg",
    "not",
    "or",
    "pmevent",
    "popc",
    "prefetch",
    "prefetchu",
    "prmt",
    "rcp",
    "red",
    "redux",
    "rem",
    "ret",
    "rsqrt",
    "sad",
    "selp",
    "set",
    "setmaxnreg",
    "setp",
    "shf",
    "shfl",
    "shl",
    "shr",
    "sin",
    "slct",
    "sqrt",
    "st",
    "sub",
    "subc",
    "szext",
    "tanh",
    "testp",
    "trap",
    "vote",
    "xor",
];

/// The operation of an instruction.
pub fn lower(instruction: &Instruction, f: &mut Lowering) -> Result<Action, LoadError> {
    type Family =
        fn(&Instruction, &mut Modifiers, &mut Lowering) -> Option<Result<Action, LoadError>>;
    const FAMILIES: [Family; 4] = [alu::lower, memory::lower, control::lower, sync::lower];
    if !OPCODES.contains(&instruction.opcode.as_str()) {
        return Err(unsupported(format!("'{}'", instruction.opcode)));
    }
    for family in FAMILIES {
        let mut modifiers = Modifiers::new(instruction);
        if let Some(action) = family(instruction, &mut modifiers, f) {
            let action = action?;
            modifiers.finish()?;
            return Ok(action);
        }
    }
    Err(unsupported(format!("'{}'", instruction.opcode)))
}

/// An error unless the instruction has so many operands.
pub(crate) fn expect_operands(
    instruction: &Instruction,
    allowed: std::ops::RangeInclusive<usize>,
) -> Result<(), LoadError> {
    let n = instruction.operands.len();
    if allowed.contains(&n) {
        return Ok(());
    }
    Err(crate::lowering::bad(format!(
        "'{}' takes {} to {} operands, found {n}",
        instruction.opcode,
        allowed.start(),
        allowed.end()
    )))
}
