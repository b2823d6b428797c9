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

/// The operation of an instruction.
pub fn lower(instruction: &Instruction, f: &mut Lowering) -> Result<Action, LoadError> {
    type Family =
        fn(&Instruction, &mut Modifiers, &mut Lowering) -> Option<Result<Action, LoadError>>;
    const FAMILIES: [Family; 4] = [alu::lower, memory::lower, control::lower, sync::lower];
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
