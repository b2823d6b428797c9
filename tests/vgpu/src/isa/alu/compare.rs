//! Comparison and selection.

use std::cmp::Ordering;

use super::super::expect_operands;
use super::float::flush;
use super::lanes::{Scalar, Slot, destination, source};
use super::rounding;
use crate::lowering::{LoadError, Lowering, Modifiers, bad, size_of, unsupported};
use crate::program::Action;
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{DEFINED, FULL, LANES, Pred, R32, R64};

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match i.opcode.as_str() {
        "setp" => setp(i, m, f),
        "set" => set(i, m, f),
        "selp" => selp(i, m, f),
        "slct" => slct(i, m, f),
        _ => return None,
    })
}

const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu",
    "geu", "num", "nan",
];

/// Which outcomes of a comparison count as true: less, equal, greater, unordered.
#[derive(Debug, Clone, Copy)]
struct Outcomes {
    less: bool,
    equal: bool,
    greater: bool,
    unordered: bool,
}

impl Outcomes {
    fn of(name: &str) -> Self {
        let is = |names: &[&str]| names.contains(&name);
        Self {
            less: is(&["ne", "neu", "lt", "ltu", "le", "leu", "lo", "ls", "num"]),
            equal: is(&["eq", "equ", "le", "leu", "ge", "geu", "ls", "hs", "num"]),
            greater: is(&["ne", "neu", "gt", "gtu", "ge", "geu", "hi", "hs", "num"]),
            unordered: is(&["equ", "neu", "ltu", "leu", "gtu", "geu", "nan"]),
        }
    }

    #[inline(always)]
    fn hold(self, order: Option<Ordering>) -> bool {
        match order {
            Some(Ordering::Less) => self.less,
            Some(Ordering::Equal) => self.equal,
            Some(Ordering::Greater) => self.greater,
            None => self.unordered,
        }
    }
}

/// Compares two registers: the lanes where the comparison holds, and where it is undefined.
type Compare = Box<dyn Fn(&crate::registers::Registers) -> (u32, u32) + Send + Sync>;

fn compare_with<T: Scalar>(
    f: &mut Lowering,
    a: &Operand,
    b: &Operand,
    test: impl Fn(T, T) -> bool + Send + Sync + 'static,
) -> Result<Compare, LoadError> {
    let a = source::<T>(f, a)?;
    let b = source::<T>(f, b)?;
    Ok(Box::new(move |registers| {
        let (x, y) = (a.values(registers), b.values(registers));
        let mut out = 0;
        for lane in 0..LANES {
            out |= u32::from(test(T::decode(x[lane]), T::decode(y[lane]))) << lane;
        }
        (out, a.any_undef(registers) | b.any_undef(registers))
    }))
}

/// The common comparisons of a type, each with a loop of its own.
fn ordered<T: Scalar + PartialOrd>(
    f: &mut Lowering,
    a: &Operand,
    b: &Operand,
    name: &str,
    prepare: impl Fn(T) -> T + Copy + Send + Sync + 'static,
) -> Result<Compare, LoadError> {
    let p = prepare;
    match name {
        "eq" => compare_with(f, a, b, move |x: T, y: T| p(x) == p(y)),
        "neu" => compare_with(f, a, b, move |x: T, y: T| p(x) != p(y)),
        "lt" | "lo" => compare_with(f, a, b, move |x: T, y: T| p(x) < p(y)),
        "le" | "ls" => compare_with(f, a, b, move |x: T, y: T| p(x) <= p(y)),
        "gt" | "hi" => compare_with(f, a, b, move |x: T, y: T| p(x) > p(y)),
        "ge" | "hs" => compare_with(f, a, b, move |x: T, y: T| p(x) >= p(y)),
        _ => {
            let outcomes = Outcomes::of(name);
            compare_with(f, a, b, move |x: T, y: T| {
                outcomes.hold(p(x).partial_cmp(&p(y)))
            })
        }
    }
}

fn compare(
    f: &mut Lowering,
    a: &Operand,
    b: &Operand,
    name: &str,
    ty: Type,
    ftz: bool,
) -> Result<Compare, LoadError> {
    let float = matches!(ty, Type::F16 | Type::BF16 | Type::F32 | Type::F64);
    let signed = matches!(ty, Type::S16 | Type::S32 | Type::S64);
    let fits = match name {
        "eq" | "ne" => true,
        "lt" | "le" | "gt" | "ge" => !matches!(ty, Type::B16 | Type::B32 | Type::B64),
        "lo" | "ls" | "hi" | "hs" => !float && !signed,
        _ => float,
    };
    if !fits {
        return Err(bad(format!("'.{name}' of {ty:?}")));
    }
    match ty {
        Type::B16 | Type::U16 => ordered::<u16>(f, a, b, name, |x| x),
        Type::B32 | Type::U32 => ordered::<u32>(f, a, b, name, |x| x),
        Type::B64 | Type::U64 => ordered::<u64>(f, a, b, name, |x| x),
        Type::S16 => ordered::<i16>(f, a, b, name, |x| x),
        Type::S32 => ordered::<i32>(f, a, b, name, |x| x),
        Type::S64 => ordered::<i64>(f, a, b, name, |x| x),
        Type::F32 if ftz => ordered::<f32>(f, a, b, name, flush),
        Type::F32 => ordered::<f32>(f, a, b, name, |x| x),
        Type::F64 => ordered::<f64>(f, a, b, name, |x| x),
        Type::F16 | Type::BF16 => {
            let outcomes = Outcomes::of(name);
            let value = half_value(ty, ftz);
            compare_with(f, a, b, move |x: u16, y: u16| {
                outcomes.hold(value(x).partial_cmp(&value(y)))
            })
        }
        ty => Err(bad(format!("a comparison of {ty:?}"))),
    }
}

/// The value of a half, subnormals flushed if asked.
fn half_value(ty: Type, ftz: bool) -> impl Fn(u16) -> f64 + Copy + Send + Sync + 'static {
    let (format, exponent) = match ty {
        Type::F16 | Type::F16x2 => (rounding::F16, 0x7c00),
        _ => (rounding::BF16, 0x7f80),
    };
    move |bits: u16| {
        if ftz && bits & exponent == 0 {
            0.0
        } else {
            format.decode(bits.into())
        }
    }
}

/// What a comparison is combined with.
#[derive(Debug, Clone, Copy)]
struct Combine {
    op: fn(u32, u32) -> u32,
    pred: Pred,
    flip: u32,
}

impl Combine {
    /// `.and`, `.or`, `.xor` and the predicate operand that goes with it.
    fn take(
        i: &Instruction,
        m: &mut Modifiers,
        f: &mut Lowering,
    ) -> Result<Option<Self>, LoadError> {
        let op: fn(u32, u32) -> u32 = match m.take_any(&["and", "or", "xor"]) {
            None => {
                expect_operands(i, 3..=3)?;
                return Ok(None);
            }
            Some("and") => |a, b| a & b,
            Some("or") => |a, b| a | b,
            Some(_) => |a, b| a ^ b,
        };
        expect_operands(i, 4..=4)?;
        let (pred, negated) = f.src_pred(&i.operands[3])?;
        let flip = if negated { FULL } else { 0 };
        Ok(Some(Self { op, pred, flip }))
    }
}

fn setp(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let name = m
        .take_any(&COMPARISONS)
        .ok_or_else(|| bad("'setp' wants a comparison"))?;
    let combine = Combine::take(i, m, f)?;
    let ftz = m.take("ftz");
    let ty = m.ty()?;
    let (d, e) = match &i.operands[0] {
        Operand::Pair(d, e) => (f.dst_pred(d)?, Some(f.dst_pred(e)?)),
        d => (f.dst_pred(d)?, None),
    };
    let finish = move |cx: &mut crate::machine::Cx, d: Pred, value: u32, undef: u32| {
        let (value, undef) = match combine {
            None => (value, undef),
            Some(c) => (
                (c.op)(value, cx.regs.pred(c.pred) ^ c.flip),
                undef | cx.regs.pred_undef(c.pred),
            ),
        };
        (d, value, undef)
    };
    if matches!(ty, Type::F16x2 | Type::BF16x2) {
        let e = e.ok_or_else(|| bad("'setp' of two halves wants two destinations"))?;
        let outcomes = Outcomes::of(name);
        let value = half_value(ty, ftz);
        let a = <R32 as Slot>::source(f, &i.operands[1], Type::B32)?;
        let b = <R32 as Slot>::source(f, &i.operands[2], Type::B32)?;
        return Ok(Action::simple(move |cx| {
            let mut out = [0, 0];
            let (x, y) = (cx.regs.get32(a), cx.regs.get32(b));
            for lane in 0..LANES {
                for (half, out) in out.iter_mut().enumerate() {
                    let x = value((x[lane] >> (16 * half)) as u16);
                    let y = value((y[lane] >> (16 * half)) as u16);
                    *out |= u32::from(outcomes.hold(x.partial_cmp(&y))) << lane;
                }
            }
            let (u, v) = (cx.regs.undef32(a), cx.regs.undef32(b));
            let low = finish(cx, d, out[0], u[0] | u[1] | v[0] | v[1]);
            let high = finish(cx, e, out[1], u[2] | u[3] | v[2] | v[3]);
            for (d, value, undef) in [low, high] {
                cx.regs.set_pred(d, cx.mask, value, undef);
            }
        }));
    }
    let compare = compare(f, &i.operands[1], &i.operands[2], name, ty, ftz)?;
    Ok(Action::simple(move |cx| {
        let (value, undef) = compare(cx.regs);
        let first = finish(cx, d, value, undef);
        let second = e.map(|e| finish(cx, e, !value, undef));
        for (d, value, undef) in std::iter::once(first).chain(second) {
            cx.regs.set_pred(d, cx.mask, value, undef);
        }
    }))
}

fn set(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let name = m
        .take_any(&COMPARISONS)
        .ok_or_else(|| bad("'set' wants a comparison"))?;
    let combine = Combine::take(i, m, f)?;
    let ftz = m.take("ftz");
    let (dtype, stype) = (m.ty()?, m.ty()?);
    if matches!(stype, Type::F16x2 | Type::BF16x2) {
        return Err(unsupported("'set' of two halves"));
    }
    let yes = match dtype {
        Type::U32 | Type::S32 => u32::MAX,
        Type::F32 => 1f32.to_bits(),
        Type::U16 | Type::S16 => 0xffff,
        Type::F16 => 0x3c00,
        Type::BF16 => 0x3f80,
        ty => return Err(bad(format!("'set' to {ty:?}"))),
    };
    let d = <R32 as Slot>::destination(f, &i.operands[0], dtype)?;
    let compare = compare(f, &i.operands[1], &i.operands[2], name, stype, ftz)?;
    Ok(Action::simple(move |cx| {
        let (mut value, mut undef) = compare(cx.regs);
        if let Some(c) = combine {
            value = (c.op)(value, cx.regs.pred(c.pred) ^ c.flip);
            undef |= cx.regs.pred_undef(c.pred);
        }
        let out = std::array::from_fn(|lane| if value >> lane & 1 != 0 { yes } else { 0 });
        d.write(cx.regs, cx.mask, &out, undef);
    }))
}

fn selp(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    expect_operands(i, 4..=4)?;
    let (p, negated) = f.src_pred(&i.operands[3])?;
    let flip = if negated { FULL } else { 0 };
    match size_of(ty) {
        8 => {
            let d = destination::<u64>(f, &i.operands[0])?;
            let a = <R64 as Slot>::source(f, &i.operands[1], ty)?;
            let b = <R64 as Slot>::source(f, &i.operands[2], ty)?;
            Ok(Action::simple(move |cx| {
                let choice = cx.regs.pred(p) ^ flip;
                let unsure = cx.regs.pred_undef(p);
                let (x, y) = (cx.regs.get64(a), cx.regs.get64(b));
                let out = std::array::from_fn(|lane| {
                    if choice >> lane & 1 != 0 {
                        x[lane]
                    } else {
                        y[lane]
                    }
                });
                let (ua, ub) = (cx.regs.undef64(a), cx.regs.undef64(b));
                let undef = std::array::from_fn(|n| (ua[n] & choice) | (ub[n] & !choice) | unsure);
                cx.regs.set64(d, cx.mask, &out, undef);
            }))
        }
        2 | 4 => {
            let d = <R32 as Slot>::destination(f, &i.operands[0], ty)?;
            let a = <R32 as Slot>::source(f, &i.operands[1], ty)?;
            let b = <R32 as Slot>::source(f, &i.operands[2], ty)?;
            Ok(Action::simple(move |cx| {
                let choice = cx.regs.pred(p) ^ flip;
                let unsure = cx.regs.pred_undef(p);
                let (x, y) = (cx.regs.get32(a), cx.regs.get32(b));
                let out = std::array::from_fn(|lane| {
                    if choice >> lane & 1 != 0 {
                        x[lane]
                    } else {
                        y[lane]
                    }
                });
                let (ua, ub) = (cx.regs.undef32(a), cx.regs.undef32(b));
                let mut undef = DEFINED;
                for (n, plane) in undef.iter_mut().enumerate() {
                    *plane = (ua[n] & choice) | (ub[n] & !choice) | unsure;
                }
                cx.regs.set32(d, cx.mask, &out, undef);
            }))
        }
        _ => Err(bad(format!("'selp' of {ty:?}"))),
    }
}

fn slct(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ftz = m.take("ftz");
    let (ty, by) = (m.ty()?, m.ty()?);
    expect_operands(i, 4..=4)?;
    // "Not below zero": minus zero and flushed subnormals choose the first, NaN the second.
    let first: fn(u32, bool) -> bool = match by {
        Type::S32 => |c, _| c as i32 >= 0,
        Type::F32 => |c, ftz| {
            let c = f32::from_bits(c);
            (if ftz { flush(c) } else { c }) >= 0.0
        },
        by => return Err(bad(format!("'slct' by {by:?}"))),
    };
    let c = <R32 as Slot>::source(f, &i.operands[3], by)?;
    macro_rules! with {
        ($slot:ty) => {{
            let d = <$slot as Slot>::destination(f, &i.operands[0], ty)?;
            let a = <$slot as Slot>::source(f, &i.operands[1], ty)?;
            let b = <$slot as Slot>::source(f, &i.operands[2], ty)?;
            Ok(Action::simple(move |cx| {
                let z = cx.regs.get32(c);
                let choice = (0..LANES).fold(0u32, |choice, lane| {
                    choice | u32::from(first(z[lane], ftz)) << lane
                });
                let (x, y) = (a.values(cx.regs), b.values(cx.regs));
                let out = std::array::from_fn(|lane| {
                    if choice >> lane & 1 != 0 {
                        x[lane]
                    } else {
                        y[lane]
                    }
                });
                let undef = (a.any_undef(cx.regs) & choice)
                    | (b.any_undef(cx.regs) & !choice)
                    | c.any_undef(cx.regs);
                d.write(cx.regs, cx.mask, &out, undef);
            }))
        }};
    }
    match size_of(ty) {
        8 => with!(R64),
        2 | 4 => with!(R32),
        _ => Err(bad(format!("'slct' of {ty:?}"))),
    }
}
