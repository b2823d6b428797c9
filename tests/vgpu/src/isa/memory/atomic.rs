//! `atom` and `red`: read-modify-write.

use super::super::alu::round_half;
use super::super::expect_operands;
use super::{Target, take_cache_hints, take_scope, take_space};
use crate::finding::Kind;
use crate::lowering::{LoadError, Lowering, Modifiers, bad, size_of, unsupported};
use crate::memory::{self, Access, Order, Scope, Space, space_of};
use crate::program::{Action, Step};
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{LANES, R32, R64};

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    match i.opcode.as_str() {
        "atom" | "red" => Some(atomic(i, m, f)),
        _ => None,
    }
}

/// What an atomic does to the old value, given its operands and whether subnormals are flushed.
type Update = fn(old: u64, b: u64, c: u64, flush: bool) -> Option<u64>;

fn half_add(old: u64, b: u64, bf16: bool) -> u64 {
    round_half(old as u16, b as u16, bf16).into()
}

fn packed_add(old: u64, b: u64, bf16: bool) -> u64 {
    half_add(old, b, bf16) | half_add(old >> 16, b >> 16, bf16) << 16
}

fn flushed(x: f32, flush: bool) -> f32 {
    if flush && x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

fn update(op: &str, ty: Type) -> Option<Update> {
    use Type::*;
    let bits = |wide: Update, ty: Type| {
        let fits = matches!(ty, B32 | B64 | U32 | U64 | S32 | S64);
        fits.then_some(wide)
    };
    Some(match (op, ty) {
        ("and", _) => bits(|a, b, _, _| Some(a & b), ty)?,
        ("or", _) => bits(|a, b, _, _| Some(a | b), ty)?,
        ("xor", _) => bits(|a, b, _, _| Some(a ^ b), ty)?,
        ("exch", B32 | B64 | U32 | U64 | S32 | S64 | F32 | F64) => |_, b, _, _| Some(b),
        ("cas", B16 | B32 | B64 | U32 | U64 | S32 | S64) => |a, b, c, _| (a == b).then_some(c),
        ("inc", U32) => |a, b, _, _| Some(if a >= b { 0 } else { a + 1 }),
        ("dec", U32) => |a, b, _, _| Some(if a == 0 || a > b { b } else { a - 1 }),
        ("add", U32 | S32) => |a, b, _, _| Some(u64::from((a as u32).wrapping_add(b as u32))),
        ("add", U64 | S64) => |a, b, _, _| Some(a.wrapping_add(b)),
        ("min", U32 | U64) => |a, b, _, _| Some(a.min(b)),
        ("max", U32 | U64) => |a, b, _, _| Some(a.max(b)),
        ("min", S32) => |a, b, _, _| Some(u64::from((a as i32).min(b as i32) as u32)),
        ("max", S32) => |a, b, _, _| Some(u64::from((a as i32).max(b as i32) as u32)),
        ("min", S64) => |a, b, _, _| Some((a as i64).min(b as i64) as u64),
        ("max", S64) => |a, b, _, _| Some((a as i64).max(b as i64) as u64),
        ("add", F32) => |a, b, _, flush| {
            let a = flushed(f32::from_bits(a as u32), flush);
            let b = flushed(f32::from_bits(b as u32), flush);
            let sum = flushed(a + b, flush);
            let bits = if sum.is_nan() {
                0x7fff_ffff
            } else {
                sum.to_bits()
            };
            Some(bits.into())
        },
        ("add", F64) => |a, b, _, _| Some((f64::from_bits(a) + f64::from_bits(b)).to_bits()),
        ("add", F16) => |a, b, _, _| Some(half_add(a, b, false)),
        ("add", BF16) => |a, b, _, _| Some(half_add(a, b, true)),
        ("add", F16x2) => |a, b, _, _| Some(packed_add(a, b, false)),
        ("add", BF16x2) => |a, b, _, _| Some(packed_add(a, b, true)),
        _ => return None,
    })
}

#[derive(Debug, Clone, Copy)]
enum Any {
    Narrow(R32),
    Wide(R64),
}

impl Any {
    fn source(operand: &Operand, ty: Type, f: &mut Lowering) -> Result<Self, LoadError> {
        if matches!(f.register_bits(operand), Some(bits) if bits != 8 * size_of(ty)) {
            return Err(bad(format!("an operand of {ty:?} was expected")));
        }
        Ok(match size_of(ty) {
            8 => Any::Wide(f.src64(operand, ty)?),
            _ => Any::Narrow(f.src32(operand, ty)?),
        })
    }

    fn values(self, cx: &crate::machine::Cx) -> ([u64; LANES], u32) {
        match self {
            Any::Narrow(r) => (cx.regs.get32(r).map(u64::from), cx.regs.any_undef32(r)),
            Any::Wide(r) => (*cx.regs.get64(r), cx.regs.any_undef64(r)),
        }
    }
}

fn atomic(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    const OPS: [&str; 10] = [
        "and", "or", "xor", "cas", "exch", "add", "inc", "dec", "min", "max",
    ];
    let reduction = i.opcode == "red";
    if m.take_any(&["v2", "v4", "v8"]).is_some() {
        return Err(unsupported(format!("a vector '{}'", i.opcode)));
    }
    let order = match m.take_any(&["relaxed", "acquire", "release", "acq_rel"]) {
        Some("acquire") => Order::Acquire,
        Some("release") => Order::Release,
        Some("acq_rel") => Order::AcqRel,
        _ => Order::Relaxed,
    };
    let scope = take_scope(m).unwrap_or(Scope::Gpu);
    let space = take_space(m)?;
    let policy = take_cache_hints(m);
    let op = m
        .take_any(&OPS)
        .ok_or_else(|| bad(format!("'{}' wants an operation", i.opcode)))?;
    m.take("noftz");
    let ty = m.ty()?;
    let update = update(op, ty).ok_or_else(|| bad(format!("'{}.{op}' of {ty:?}", i.opcode)))?;
    if reduction && matches!(op, "cas" | "exch") {
        return Err(bad(format!("'red.{op}'")));
    }
    let first = usize::from(!reduction);
    let n = first + if op == "cas" { 3 } else { 2 } + usize::from(policy);
    expect_operands(i, n..=n)?;
    let target = Target::of(space, f.address(&i.operands[first])?)?;
    if !matches!(target.space, Space::Generic | Space::Global | Space::Shared) {
        return Err(bad(format!("'{}' in {:?} memory", i.opcode, target.space)));
    }
    let b = Any::source(&i.operands[first + 1], ty, f)?;
    let c = match op {
        "cas" => Any::source(&i.operands[first + 2], ty, f)?,
        _ => b,
    };
    let d = match (reduction, size_of(ty)) {
        (true, _) => None,
        (false, 8) => Some(Any::Wide(f.dst64(&i.operands[0])?)),
        (false, _) => Some(Any::Narrow(f.dst32(&i.operands[0])?)),
    };
    let bytes = size_of(ty);
    Ok(Action::plain(move |cx| {
        let (addresses, undef) = target.addresses(cx);
        let report = |cx: &mut crate::machine::Cx, undef: u32, message: &str| {
            if undef & cx.mask != 0 {
                let lane = (undef & cx.mask).trailing_zeros() as usize;
                let address = addresses[lane];
                cx.report(Kind::Uninitialised, lane, Some(address), message.to_owned());
            }
        };
        report(cx, undef, "a value nobody wrote decides the address");
        let (x, ux) = b.values(cx);
        let (y, uy) = c.values(cx);
        report(
            cx,
            ux | uy,
            "a value nobody wrote goes into an atomic operation",
        );
        let access = Access {
            space: target.space,
            addresses: &addresses,
            mask: cx.mask,
            bytes,
            element: bytes,
            order,
            scope,
            non_coherent: false,
        };
        // Global atomics on f32 flush subnormals, shared ones keep them (PTX ISA, atom).
        let shared = match target.space {
            Space::Shared => cx.mask,
            Space::Generic => (0..LANES).fold(0, |mask, lane| {
                mask | u32::from(space_of(addresses[lane]) == Space::Shared) << lane
            }),
            _ => 0,
        };
        let mut old = cx.exchange.data.take().unwrap_or_default();
        old.clear(8);
        let result = memory::atomic(cx, &access, &mut old, &mut |lane, value| {
            update(value, x[lane], y[lane], shared >> lane & 1 == 0)
        });
        if let Err(fault) = result {
            return Step::Fault(fault);
        }
        match d {
            None => {}
            Some(Any::Narrow(d)) => cx.regs.set32(d, cx.mask, &old.words[0], old.undef[0]),
            Some(Any::Wide(d)) => {
                let value = std::array::from_fn(|l| {
                    u64::from(old.words[1][l]) << 32 | u64::from(old.words[0][l])
                });
                let mut undef = [0; 8];
                undef[..4].copy_from_slice(&old.undef[0]);
                undef[4..].copy_from_slice(&old.undef[1]);
                cx.regs.set64(d, cx.mask, &value, undef);
            }
        }
        cx.exchange.data = Some(old);
        Step::Next
    }))
}
