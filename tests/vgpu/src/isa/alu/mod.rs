//! Arithmetic, logic, comparison, conversion and data movement between registers.

mod compare;
mod convert;
mod float;
mod integer;
mod lanes;
mod logic;
mod mov;
mod rounding;

use crate::lowering::{LoadError, Lowering, Modifiers};
use crate::program::Action;
use crate::ptx::ast::Instruction;

/// See [`super::lower`].
pub(super) fn lower(
    instruction: &Instruction,
    modifiers: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    mov::lower(instruction, modifiers, f)
        .or_else(|| logic::lower(instruction, modifiers, f))
        .or_else(|| integer::lower(instruction, modifiers, f))
        .or_else(|| float::lower(instruction, modifiers, f))
        .or_else(|| compare::lower(instruction, modifiers, f))
        .or_else(|| convert::lower(instruction, modifiers, f))
}
