//! Fences, and the hints to the caches, which change no result.

use super::super::expect_operands;
use super::{take_cache_hints, take_scope, take_space};
use crate::lowering::{LoadError, Lowering, Modifiers, bad, unsupported};
use crate::memory::{self, Order, Scope};
use crate::program::Action;
use crate::ptx::ast::{Instruction, Type};

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match i.opcode.as_str() {
        "fence" => fence(i, m),
        "membar" => membar(i, m),
        "prefetch" | "prefetchu" => {
            if m.take("tensormap") {
                return Some(Err(unsupported("'prefetch.tensormap'")));
            }
            m.take_any(&["L1", "L2"]);
            hint(i, m, f)
        }
        "applypriority" | "discard" => hint(i, m, f),
        "createpolicy" => policy(i, m, f),
        _ => return None,
    })
}

fn fence(i: &Instruction, m: &mut Modifiers) -> Result<Action, LoadError> {
    expect_operands(i, 0..=0)?;
    if m.take("proxy") {
        // The generic proxy is the only one here so far; between it and an alias of itself
        // there is nothing to order.
        return if m.take("alias") {
            Ok(Action::simple(|_| {}))
        } else {
            Err(unsupported("'fence.proxy' other than .alias"))
        };
    }
    let order = match m.take_any(&["sc", "acq_rel", "acquire", "release"]) {
        Some("sc") => Order::SeqCst,
        Some("acquire") => Order::Acquire,
        Some("release") => Order::Release,
        // Without a word it is .acq_rel.
        _ => Order::AcqRel,
    };
    let scope = take_scope(m).ok_or_else(|| bad("'fence' wants a scope"))?;
    Ok(Action::simple(move |cx| memory::fence(cx, order, scope)))
}

fn membar(i: &Instruction, m: &mut Modifiers) -> Result<Action, LoadError> {
    expect_operands(i, 0..=0)?;
    // `membar` is `fence.sc` of the scope (PTX ISA, membar).
    let scope = match m.take_any(&["cta", "gl", "sys"]) {
        Some("cta") => Scope::Cta,
        Some("gl") => Scope::Gpu,
        Some(_) => Scope::Sys,
        None => return Err(unsupported("'membar' without .cta, .gl or .sys")),
    };
    Ok(Action::simple(move |cx| {
        memory::fence(cx, Order::SeqCst, scope);
    }))
}

/// Touches nothing: the operand must make sense all the same.
fn hint(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    take_space(m)?;
    take_cache_hints(m);
    m.take("L2");
    let first = i
        .operands
        .first()
        .ok_or_else(|| bad(format!("'{}' wants an address", i.opcode)))?;
    f.address(first)?;
    Ok(Action::simple(|_| {}))
}

/// A cache policy is opaque: its bits only ever reach hints.
fn policy(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    m.take_any(&["fractional", "range"]);
    m.take("global");
    take_cache_hints(m);
    if m.ty()? != Type::B64 {
        return Err(bad("'createpolicy' gives .b64"));
    }
    let first = i
        .operands
        .first()
        .ok_or_else(|| bad("'createpolicy' wants a destination"))?;
    let d = f.dst64(first)?;
    Ok(Action::simple(move |cx| {
        cx.regs.set64(d, cx.mask, &[0; 32], [0; 8]);
    }))
}
