//! Integer arithmetic.

use super::super::expect_operands;
use super::lanes::{Scalar, Slot, destination, map1, map2, map2_where, map3, source};
use crate::lowering::{LoadError, Lowering, Modifiers, bad, unsupported};
use crate::program::Action;
use crate::ptx::ast::{Instruction, Type};

/// Runs the body with `$T` as the Rust type of an integer type.
macro_rules! for_integer {
    ($ty:expr, $opcode:expr, [$($name:ident $rust:ty),*], $T:ident => $body:expr) => {
        match $ty {
            $(Type::$name => {
                type $T = $rust;
                $body
            })*
            ty => Err(bad(format!("'{}' of {ty:?}", $opcode))),
        }
    };
}

/// See [`super::super::lower`]: the opcodes that have integer forms only, and the integer forms
/// of those that have others too (`ty` is the last type among the modifiers, not yet taken).
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match i.opcode.as_str() {
        "add" | "sub" if is_integer(m) => add_sub(i, m, f),
        "addc" | "subc" => add_sub(i, m, f),
        "mul" if is_integer(m) => mul(i, m, f),
        "mad" if is_integer(m) => mad(i, m, f),
        "madc" => mad(i, m, f),
        "mul24" => mul24(i, m, f),
        "mad24" => mad24(i, m, f),
        "div" if is_integer(m) => div(i, m, f),
        "rem" => rem(i, m, f),
        "abs" if is_integer(m) => abs(i, m, f),
        "neg" if is_integer(m) => neg(i, m, f),
        "min" | "max" if is_integer(m) => min_max(i, m, f),
        "sad" => sad(i, m, f),
        "popc" => popc(i, m, f),
        "clz" => clz(i, m, f),
        "bfind" => bfind(i, m, f),
        "fns" => fns(i, m, f),
        "dp4a" => dp4a(i, m, f),
        "dp2a" => dp2a(i, m, f),
        _ => return None,
    })
}

/// Whether the type among the modifiers is an integer's.
fn is_integer(m: &Modifiers) -> bool {
    let packed = |t: &&str| matches!(*t, "u16x2" | "s16x2");
    let mut types = m.rest().iter().filter_map(|t| crate::lowering::type_of(t));
    m.rest().iter().any(packed)
        || types.next().is_some_and(|ty| {
            !matches!(
                ty,
                Type::F16 | Type::F16x2 | Type::BF16 | Type::BF16x2 | Type::F32 | Type::F64
            )
        })
}

/// Applies a function to both halves of a word.
fn halves(a: u32, b: u32, op: impl Fn(u16, u16) -> u16) -> u32 {
    let low = op(a as u16, b as u16);
    let high = op((a >> 16) as u16, (b >> 16) as u16);
    u32::from(low) | u32::from(high) << 16
}

fn add_sub(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let subtract = i.opcode.starts_with("sub");
    let carry_in = i.opcode.ends_with('c');
    let carry_out = m.take("cc");
    if let Some(packed) = m.take_any(&["u16x2", "s16x2"]) {
        let _ = packed;
        if subtract {
            return Err(bad("'sub' of packed halves"));
        }
        return map2(i, f, |a: u32, b: u32| halves(a, b, u16::wrapping_add));
    }
    let saturate = m.take("sat");
    let ty = m.ty()?;
    if carry_in || carry_out {
        return match ty {
            Type::U32 | Type::S32 | Type::B32 => {
                carrying::<u32>(i, f, subtract, carry_in, carry_out, |a, b, c| {
                    let sum = u64::from(a) + u64::from(b) + u64::from(c);
                    (sum as u32, sum >> 32 != 0)
                })
            }
            Type::U64 | Type::S64 | Type::B64 => {
                carrying::<u64>(i, f, subtract, carry_in, carry_out, |a, b, c| {
                    let sum = u128::from(a) + u128::from(b) + u128::from(c);
                    (sum as u64, sum >> 64 != 0)
                })
            }
            ty => Err(bad(format!("'{}' of {ty:?}", i.opcode))),
        };
    }
    if saturate {
        return match (ty, subtract) {
            (Type::S32, false) => map2(i, f, |a: i32, b: i32| a.saturating_add(b)),
            (Type::S32, true) => map2(i, f, |a: i32, b: i32| a.saturating_sub(b)),
            _ => Err(bad(format!("'.sat' on '{}' of {ty:?}", i.opcode))),
        };
    }
    for_integer!(
        ty,
        i.opcode,
        [U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64],
        T => if subtract {
            map2(i, f, |a: T, b: T| a.wrapping_sub(b))
        } else {
            map2(i, f, |a: T, b: T| a.wrapping_add(b))
        }
    )
}

trait Complement {
    fn complement(self) -> Self;
}
impl Complement for u32 {
    fn complement(self) -> Self {
        !self
    }
}
impl Complement for u64 {
    fn complement(self) -> Self {
        !self
    }
}

/// Sums with a carry. A difference is the sum with the complement and the inverted borrow:
/// `a - b - borrow = a + !b + !borrow`, and the carry out is no borrow.
fn carrying<T: Scalar + Complement>(
    i: &Instruction,
    f: &mut Lowering,
    subtract: bool,
    carry_in: bool,
    carry_out: bool,
    sum: impl Fn(T, T, bool) -> (T, bool) + Send + Sync + 'static,
) -> Result<Action, LoadError> {
    expect_operands(i, 3..=3)?;
    let d = destination::<T>(f, &i.operands[0])?;
    let a = source::<T>(f, &i.operands[1])?;
    let b = source::<T>(f, &i.operands[2])?;
    let carry = f.carry();
    Ok(Action::simple(move |cx| {
        let (x, y) = (a.values(cx.regs), b.values(cx.regs));
        let flags = cx.regs.pred(carry);
        let mut undef = a.any_undef(cx.regs) | b.any_undef(cx.regs);
        if carry_in {
            undef |= cx.regs.pred_undef(carry);
        }
        let mut carries = 0u32;
        let out = std::array::from_fn(|lane| {
            let flag = carry_in && flags >> lane & 1 != 0;
            let (x, y) = (T::decode(x[lane]), T::decode(y[lane]));
            let (value, out) = if subtract {
                let (value, out) = sum(x, y.complement(), !flag);
                (value, !out)
            } else {
                sum(x, y, flag)
            };
            carries |= u32::from(out) << lane;
            value.encode()
        });
        d.write(cx.regs, cx.mask, &out, undef);
        if carry_out {
            cx.regs.set_pred(carry, cx.mask, carries, undef);
        }
    }))
}

/// The upper half of a product.
trait High {
    fn high(self, other: Self) -> Self;
}
macro_rules! high {
    ($($t:ty, $wide:ty;)*) => {
        $(impl High for $t {
            #[inline(always)]
            fn high(self, other: Self) -> Self {
                ((<$wide>::from(self) * <$wide>::from(other)) >> <$t>::BITS) as $t
            }
        })*
    };
}
high! { u16, u32; i16, i32; u32, u64; i32, i64; u64, u128; i64, i128; }

fn mul(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let part = m.take_any(&["lo", "hi", "wide"]);
    let ty = m.ty()?;
    match part {
        Some("wide") => match ty {
            Type::U16 => map2(i, f, |a: u16, b: u16| u32::from(a) * u32::from(b)),
            Type::S16 => map2(i, f, |a: i16, b: i16| i32::from(a) * i32::from(b)),
            Type::U32 => map2(i, f, |a: u32, b: u32| u64::from(a) * u64::from(b)),
            Type::S32 => map2(i, f, |a: i32, b: i32| i64::from(a) * i64::from(b)),
            ty => Err(bad(format!("'mul.wide' of {ty:?}"))),
        },
        Some(part) => for_integer!(
            ty,
            i.opcode,
            [U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64],
            T => if part == "hi" {
                map2(i, f, |a: T, b: T| a.high(b))
            } else {
                map2(i, f, |a: T, b: T| a.wrapping_mul(b))
            }
        ),
        None => Err(bad("'mul' of integers wants .lo, .hi or .wide")),
    }
}

fn mad(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let part = m.take_any(&["lo", "hi", "wide"]);
    let saturate = m.take("sat");
    let carry_out = m.take("cc");
    let carry_in = i.opcode == "madc";
    let ty = m.ty()?;
    if carry_in || carry_out {
        let high = part == Some("hi");
        if part == Some("wide") {
            return Err(bad("'mad.wide' has no carry"));
        }
        return match ty {
            Type::U32 => mad_carry::<u32>(i, f, carry_in, carry_out, move |a, b, c, n| {
                let p = if high { a.high(b) } else { a.wrapping_mul(b) };
                let sum = u64::from(p) + u64::from(c) + u64::from(n);
                (sum as u32, sum >> 32 != 0)
            }),
            Type::S32 => mad_carry::<i32>(i, f, carry_in, carry_out, move |a, b, c, n| {
                let p = if high { a.high(b) } else { a.wrapping_mul(b) };
                let sum = u64::from(p as u32) + u64::from(c as u32) + u64::from(n);
                (sum as i32, sum >> 32 != 0)
            }),
            Type::U64 => mad_carry::<u64>(i, f, carry_in, carry_out, move |a, b, c, n| {
                let p = if high { a.high(b) } else { a.wrapping_mul(b) };
                let sum = u128::from(p) + u128::from(c) + u128::from(n);
                (sum as u64, sum >> 64 != 0)
            }),
            Type::S64 => mad_carry::<i64>(i, f, carry_in, carry_out, move |a, b, c, n| {
                let p = if high { a.high(b) } else { a.wrapping_mul(b) };
                let sum = u128::from(p as u64) + u128::from(c as u64) + u128::from(n);
                (sum as i64, sum >> 64 != 0)
            }),
            ty => Err(bad(format!("'{}' of {ty:?} with a carry", i.opcode))),
        };
    }
    match part {
        Some("hi") if saturate => match ty {
            Type::S32 => map3(i, f, |a: i32, b: i32, c: i32| a.high(b).saturating_add(c)),
            ty => Err(bad(format!("'mad.hi.sat' of {ty:?}"))),
        },
        _ if saturate => Err(bad("'.sat' on 'mad' wants .hi.s32")),
        Some("wide") => match ty {
            Type::U16 => map3(i, f, |a: u16, b: u16, c: u32| {
                (u32::from(a) * u32::from(b)).wrapping_add(c)
            }),
            Type::S16 => map3(i, f, |a: i16, b: i16, c: i32| {
                (i32::from(a) * i32::from(b)).wrapping_add(c)
            }),
            Type::U32 => map3(i, f, |a: u32, b: u32, c: u64| {
                (u64::from(a) * u64::from(b)).wrapping_add(c)
            }),
            Type::S32 => map3(i, f, |a: i32, b: i32, c: i64| {
                (i64::from(a) * i64::from(b)).wrapping_add(c)
            }),
            ty => Err(bad(format!("'mad.wide' of {ty:?}"))),
        },
        Some(part) => for_integer!(
            ty,
            i.opcode,
            [U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64],
            T => if part == "hi" {
                map3(i, f, |a: T, b: T, c: T| a.high(b).wrapping_add(c))
            } else {
                map3(i, f, |a: T, b: T, c: T| a.wrapping_mul(b).wrapping_add(c))
            }
        ),
        None => Err(bad("'mad' of integers wants .lo, .hi or .wide")),
    }
}

fn mad_carry<T: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    carry_in: bool,
    carry_out: bool,
    op: impl Fn(T, T, T, bool) -> (T, bool) + Send + Sync + 'static,
) -> Result<Action, LoadError> {
    expect_operands(i, 4..=4)?;
    let d = destination::<T>(f, &i.operands[0])?;
    let a = source::<T>(f, &i.operands[1])?;
    let b = source::<T>(f, &i.operands[2])?;
    let c = source::<T>(f, &i.operands[3])?;
    let carry = f.carry();
    Ok(Action::simple(move |cx| {
        let (x, y, z) = (a.values(cx.regs), b.values(cx.regs), c.values(cx.regs));
        let flags = cx.regs.pred(carry);
        let mut undef = a.any_undef(cx.regs) | b.any_undef(cx.regs) | c.any_undef(cx.regs);
        if carry_in {
            undef |= cx.regs.pred_undef(carry);
        }
        let mut carries = 0u32;
        let out = std::array::from_fn(|lane| {
            let flag = carry_in && flags >> lane & 1 != 0;
            let (value, out) = op(
                T::decode(x[lane]),
                T::decode(y[lane]),
                T::decode(z[lane]),
                flag,
            );
            carries |= u32::from(out) << lane;
            value.encode()
        });
        d.write(cx.regs, cx.mask, &out, undef);
        if carry_out {
            cx.regs.set_pred(carry, cx.mask, carries, undef);
        }
    }))
}

/// The 48-bit product of the low 24 bits.
fn product24(a: u32, b: u32, signed: bool) -> u64 {
    if signed {
        let low = |v: u32| i64::from((v << 8) as i32 >> 8);
        (low(a) * low(b)) as u64
    } else {
        u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)
    }
}

fn signed32(m: &mut Modifiers, opcode: &str) -> Result<bool, LoadError> {
    match m.ty()? {
        Type::U32 => Ok(false),
        Type::S32 => Ok(true),
        ty => Err(bad(format!("'{opcode}' of {ty:?}"))),
    }
}

fn mul24(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let shift = if m.take("hi") { 16 } else { 0 };
    m.take("lo");
    let signed = signed32(m, "mul24")?;
    map2(i, f, move |a: u32, b: u32| {
        (product24(a, b, signed) >> shift) as u32
    })
}

fn mad24(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let high = m.take("hi");
    m.take("lo");
    let saturate = m.take("sat");
    let signed = signed32(m, "mad24")?;
    if saturate && !(high && signed) {
        return Err(bad("'.sat' on 'mad24' wants .hi.s32"));
    }
    let shift = if high { 16 } else { 0 };
    map3(i, f, move |a: u32, b: u32, c: u32| {
        let product = (product24(a, b, signed) >> shift) as u32;
        if saturate {
            (product as i32).saturating_add(c as i32) as u32
        } else {
            product.wrapping_add(c)
        }
    })
}

// What division by zero gives is the machine's secret ("unspecified"): the result counts as
// undefined, so that it may be computed and thrown away, but not decide anything.

fn div(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    for_integer!(
        ty,
        i.opcode,
        [U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64],
        T => map2_where(
            i,
            f,
            |a: T, b: T| if b == 0 { T::MAX } else { a.wrapping_div(b) },
            |_, b| b != 0,
        )
    )
}

fn rem(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    for_integer!(
        ty,
        i.opcode,
        [U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64],
        T => map2_where(
            i,
            f,
            |a: T, b: T| if b == 0 { a } else { a.wrapping_rem(b) },
            |_, b| b != 0,
        )
    )
}

fn abs(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    for_integer!(ty, i.opcode, [S16 i16, S32 i32, S64 i64], T => {
        map1(i, f, |a: T| a.wrapping_abs())
    })
}

fn neg(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    for_integer!(ty, i.opcode, [S16 i16, S32 i32, S64 i64], T => {
        map1(i, f, |a: T| a.wrapping_neg())
    })
}

fn min_max(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let max = i.opcode == "max";
    let relu = m.take("relu");
    if let Some(packed) = m.take_any(&["u16x2", "s16x2"]) {
        let signed = packed == "s16x2";
        if relu && !signed {
            return Err(bad("'.relu' wants a signed type"));
        }
        return map2(i, f, move |a: u32, b: u32| {
            halves(a, b, |a, b| {
                if !signed {
                    return if max { a.max(b) } else { a.min(b) };
                }
                let (a, b) = (a as i16, b as i16);
                let c = if max { a.max(b) } else { a.min(b) };
                (if relu { c.max(0) } else { c }) as u16
            })
        });
    }
    let ty = m.ty()?;
    if relu {
        return match (ty, max) {
            (Type::S32, true) => map2(i, f, |a: i32, b: i32| a.max(b).max(0)),
            (Type::S32, false) => map2(i, f, |a: i32, b: i32| a.min(b).max(0)),
            _ => Err(bad(format!("'.relu' on '{}' of {ty:?}", i.opcode))),
        };
    }
    for_integer!(
        ty,
        i.opcode,
        [U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64],
        T => if max {
            map2(i, f, |a: T, b: T| a.max(b))
        } else {
            map2(i, f, |a: T, b: T| a.min(b))
        }
    )
}

fn sad(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    macro_rules! with {
        ($T:ty, $U:ty) => {
            map3(i, f, |a: $T, b: $T, c: $U| c.wrapping_add(a.abs_diff(b)))
        };
    }
    match m.ty()? {
        Type::U16 => with!(u16, u16),
        Type::S16 => with!(i16, u16),
        Type::U32 => with!(u32, u32),
        Type::S32 => with!(i32, u32),
        Type::U64 => with!(u64, u64),
        Type::S64 => with!(i64, u64),
        ty => Err(bad(format!("'sad' of {ty:?}"))),
    }
}

fn popc(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    match m.ty()? {
        Type::B32 => map1(i, f, |a: u32| a.count_ones()),
        Type::B64 => map1(i, f, |a: u64| a.count_ones()),
        ty => Err(bad(format!("'popc' of {ty:?}"))),
    }
}

fn clz(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    match m.ty()? {
        Type::B32 => map1(i, f, |a: u32| a.leading_zeros()),
        Type::B64 => map1(i, f, |a: u64| a.leading_zeros()),
        ty => Err(bad(format!("'clz' of {ty:?}"))),
    }
}

/// The highest bit that is no sign bit; `u32::MAX` if there is none.
fn highest(a: u64, width: u32, shift_amount: bool) -> u32 {
    if a == 0 {
        return u32::MAX;
    }
    let bit = 63 - a.leading_zeros();
    if shift_amount { width - 1 - bit } else { bit }
}

fn bfind(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let shift = m.take("shiftamt");
    match m.ty()? {
        Type::U32 => map1(i, f, move |a: u32| highest(a.into(), 32, shift)),
        Type::U64 => map1(i, f, move |a: u64| highest(a, 64, shift)),
        Type::S32 => map1(i, f, move |a: i32| {
            highest(((a ^ (a >> 31)) as u32).into(), 32, shift)
        }),
        Type::S64 => map1(i, f, move |a: i64| {
            highest((a ^ (a >> 63)) as u64, 64, shift)
        }),
        ty => Err(bad(format!("'bfind' of {ty:?}"))),
    }
}

fn fns(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    if m.ty()? != Type::B32 {
        return Err(bad("'fns' wants .b32"));
    }
    map3(i, f, |mask: u32, base: u32, offset: i32| {
        let base = base & 31;
        if offset == 0 {
            return if mask >> base & 1 != 0 {
                base
            } else {
                u32::MAX
            };
        }
        let mut left = offset.unsigned_abs();
        let mut bit = base as i32;
        while (0..32).contains(&bit) {
            if mask >> bit & 1 != 0 {
                left -= 1;
                if left == 0 {
                    return bit as u32;
                }
            }
            bit += offset.signum();
        }
        u32::MAX
    })
}

fn signs(m: &mut Modifiers, opcode: &str) -> Result<(bool, bool), LoadError> {
    Ok((signed32(m, opcode)?, signed32(m, opcode)?))
}

/// Byte `n` of a word.
fn byte(a: u32, n: u32, signed: bool) -> i32 {
    let byte = (a >> (8 * n)) as u8;
    if signed {
        i32::from(byte as i8)
    } else {
        i32::from(byte)
    }
}

fn dp4a(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let (signed_a, signed_b) = signs(m, "dp4a")?;
    map3(i, f, move |a: u32, b: u32, c: u32| {
        (0..4).fold(c, |sum, n| {
            sum.wrapping_add((byte(a, n, signed_a) * byte(b, n, signed_b)) as u32)
        })
    })
}

fn dp2a(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let first = if m.take("hi") { 2 } else { 0 };
    if first == 0 && !m.take("lo") {
        return Err(unsupported("'dp2a' without .lo or .hi"));
    }
    let (signed_a, signed_b) = signs(m, "dp2a")?;
    map3(i, f, move |a: u32, b: u32, c: u32| {
        (0..2).fold(c, |sum, n| {
            let half = (a >> (16 * n)) as u16;
            let half = if signed_a {
                i32::from(half as i16)
            } else {
                i32::from(half)
            };
            sum.wrapping_add(half.wrapping_mul(byte(b, first + n, signed_b)) as u32)
        })
    })
}
