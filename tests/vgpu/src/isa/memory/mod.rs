//! Loads, stores, atomics, address conversion, fences and cache hints.

use crate::lowering::{LoadError, Lowering, Modifiers};
use crate::program::Action;
use crate::ptx::ast::Instruction;

/// See [`super::lower`].
pub(super) fn lower(
    _instruction: &Instruction,
    _modifiers: &mut Modifiers,
    _f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    None
}
