//! Barriers, warp-wide operations, special registers, and what ends or delays a thread.

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

/// A call of a function that the driver provides: `vprintf`, `__assertfail`, ….
pub(super) fn system_call(
    name: &str,
    _site: &crate::program::CallSite,
    _f: &mut Lowering,
) -> Result<Action, LoadError> {
    Err(crate::lowering::unsupported(format!(
        "'call' of '{name}', which has no body,"
    )))
}
