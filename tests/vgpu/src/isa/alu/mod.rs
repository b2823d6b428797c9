//! Arithmetic, logic, comparison, conversion and data movement between registers.

mod approx;
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

/// The sum of two halves, for atomics: rounded to nearest, subnormals kept.
pub(super) fn round_half(a: u16, b: u16, bf16: bool) -> u16 {
    let format = if bf16 { rounding::BF16 } else { rounding::F16 };
    let (a, b) = (format.decode(a.into()), format.decode(b.into()));
    let sum = rounding::add_odd(a, b);
    let sum = if sum == 0.0 {
        rounding::zero_sum(a, b, rounding::Round::Nearest)
    } else {
        sum
    };
    format.encode(sum, rounding::Round::Nearest, false) as u16
}
