//! Bitwise logic, shifts and the movement of bits and bytes. Which bits of a result nobody has
//! defined is followed exactly here: packing two halves into a word, or masking one out, is what
//! compilers do all day.

use super::super::expect_operands;
use super::lanes::{
    Bits, Scalar, Slot, UndefRule, bits1, bits2, bits3, destination, map1, map2, source,
};
use crate::lowering::{LoadError, Lowering, Modifiers, bad, unsupported};
use crate::program::Action;
use crate::ptx::ast::{Immediate, Instruction, Operand, Type};
use crate::registers::{FULL, LANES};

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match i.opcode.as_str() {
        "and" => binary(i, m, f, |a, b| a & b),
        "or" => binary(i, m, f, |a, b| a | b),
        "xor" => binary(i, m, f, |a, b| a ^ b),
        "not" => not(i, m, f),
        "cnot" => cnot(i, m, f),
        "lop3" => lop3(i, m, f),
        "shl" => shl(i, m, f),
        "shr" => shr(i, m, f),
        "shf" => shf(i, m, f),
        "bfe" => bfe(i, m, f),
        "bfi" => bfi(i, m, f),
        "bmsk" => bmsk(i, m, f),
        "szext" => szext(i, m, f),
        "brev" => brev(i, m, f),
        "prmt" => prmt(i, m, f),
        _ => return None,
    })
}

/// Undefined where the result of a bitwise function depends on an undefined bit: it is evaluated
/// with every undefined bit as 0 and as 1.
fn substitution(op: impl Fn(u64, u64) -> u64 + Send + Sync + 'static) -> UndefRule<2> {
    Box::new(move |[a, b], [ua, ub]| {
        let (mut all, mut any) = (u64::MAX, 0);
        for a in [a & !ua, a | ua] {
            for b in [b & !ub, b | ub] {
                all &= op(a, b);
                any |= op(a, b);
            }
        }
        all ^ any
    })
}

/// Undefined bits move as the bits do, as long as what directs the movement is defined.
fn moved<const N: usize>(
    data: usize,
    op: impl Fn([u64; N]) -> u64 + Send + Sync + 'static,
) -> UndefRule<N> {
    Box::new(move |values, undef| {
        if undef[data..].iter().any(|&u| u != 0) {
            return u64::MAX;
        }
        let mut masks = values;
        masks[..data].copy_from_slice(&undef[..data]);
        op(masks)
    })
}

fn binary(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
    op: fn(u64, u64) -> u64,
) -> Result<Action, LoadError> {
    // A function pointer would be called for every lane: the opcode picks a closure instead.
    macro_rules! with {
        ($T:ty) => {
            match i.opcode.as_str() {
                "and" => bits2(i, f, |a: $T, b: $T| a & b, substitution(op)),
                "or" => bits2(i, f, |a: $T, b: $T| a | b, substitution(op)),
                _ => bits2(i, f, |a: $T, b: $T| a ^ b, substitution(op)),
            }
        };
    }
    match m.ty()? {
        Type::Pred => {
            expect_operands(i, 3..=3)?;
            let d = f.dst_pred(&i.operands[0])?;
            let (a, not_a) = f.src_pred(&i.operands[1])?;
            let (b, not_b) = f.src_pred(&i.operands[2])?;
            let flip = |negated: bool| if negated { FULL } else { 0 };
            let (flip_a, flip_b) = (flip(not_a), flip(not_b));
            let op = move |a: u32, b: u32| op(a.into(), b.into()) as u32;
            Ok(Action::simple(move |cx| {
                let (x, y) = (cx.regs.pred(a) ^ flip_a, cx.regs.pred(b) ^ flip_b);
                let (ux, uy) = (cx.regs.pred_undef(a), cx.regs.pred_undef(b));
                let (mut all, mut any) = (FULL, 0);
                for x in [x & !ux, x | ux] {
                    for y in [y & !uy, y | uy] {
                        all &= op(x, y);
                        any |= op(x, y);
                    }
                }
                cx.regs.set_pred(d, cx.mask, op(x, y), all ^ any);
            }))
        }
        Type::B16 => with!(u16),
        Type::B32 => with!(u32),
        Type::B64 => with!(u64),
        ty => Err(bad(format!("'{}' of {ty:?}", i.opcode))),
    }
}

fn not(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let same = || -> UndefRule<1> { Box::new(|_, [u]| u) };
    match m.ty()? {
        Type::Pred => {
            expect_operands(i, 2..=2)?;
            let d = f.dst_pred(&i.operands[0])?;
            let (a, negated) = f.src_pred(&i.operands[1])?;
            let flip = if negated { 0 } else { FULL };
            Ok(Action::simple(move |cx| {
                let (value, undef) = (cx.regs.pred(a) ^ flip, cx.regs.pred_undef(a));
                cx.regs.set_pred(d, cx.mask, value, undef);
            }))
        }
        Type::B16 => bits1(i, f, |a: u16| !a, same()),
        Type::B32 => bits1(i, f, |a: u32| !a, same()),
        Type::B64 => bits1(i, f, |a: u64| !a, same()),
        ty => Err(bad(format!("'not' of {ty:?}"))),
    }
}

fn cnot(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    match m.ty()? {
        Type::B16 => map1(i, f, |a: u16| u16::from(a == 0)),
        Type::B32 => map1(i, f, |a: u32| u32::from(a == 0)),
        Type::B64 => map1(i, f, |a: u64| u64::from(a == 0)),
        ty => Err(bad(format!("'cnot' of {ty:?}"))),
    }
}

/// An operand that must be a literal.
fn literal(operand: &Operand) -> Result<u64, LoadError> {
    match operand {
        Operand::Immediate(Immediate::Int(value)) => Ok(*value),
        other => Err(bad(format!("expected an integer literal, found {other:?}"))),
    }
}

/// The function of three bits with this truth table; `a` is bit 2 of the index.
#[inline(always)]
fn look_up(table: u8, a: u32, b: u32, c: u32) -> u32 {
    let mut out = 0;
    for index in 0..8u8 {
        if table >> index & 1 != 0 {
            let x = if index & 4 != 0 { a } else { !a };
            let y = if index & 2 != 0 { b } else { !b };
            let z = if index & 1 != 0 { c } else { !c };
            out |= x & y & z;
        }
    }
    out
}

fn lop3(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    if ty != Type::B32 {
        return Err(bad(format!("'lop3' of {ty:?}")));
    }
    expect_operands(i, 5..=5)?;
    let table = literal(&i.operands[4])?;
    let table =
        u8::try_from(table).map_err(|_| bad(format!("the truth table {table:#x} is no byte")))?;
    let rule: UndefRule<3> = Box::new(move |[a, b, c], [ua, ub, uc]| {
        let (mut all, mut any) = (u32::MAX, 0);
        for a in [a & !ua, a | ua] {
            for b in [b & !ub, b | ub] {
                for c in [c & !uc, c | uc] {
                    let out = look_up(table, a as u32, b as u32, c as u32);
                    all &= out;
                    any |= out;
                }
            }
        }
        u64::from(all ^ any)
    });
    let mut without_table = i.clone();
    without_table.operands.pop();
    let i = &without_table;
    // The common ones (three-way and, or, xor, select, majority) are worth a line each.
    match table {
        0x96 => bits3(i, f, |a: u32, b: u32, c: u32| a ^ b ^ c, rule),
        0x80 => bits3(i, f, |a: u32, b: u32, c: u32| a & b & c, rule),
        0xfe => bits3(i, f, |a: u32, b: u32, c: u32| a | b | c, rule),
        0xca => bits3(i, f, |a: u32, b: u32, c: u32| (a & b) | (!a & c), rule),
        0xe8 => bits3(
            i,
            f,
            |a: u32, b: u32, c: u32| (a & b) | (b & c) | (a & c),
            rule,
        ),
        _ => {
            let op = move |a: u32, b: u32, c: u32| look_up(table, a, b, c);
            bits3(i, f, op, rule)
        }
    }
}

fn shl(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    // Amounts beyond the width are clamped: everything is shifted out.
    fn rule() -> UndefRule<2> {
        moved(1, |[a, n]| a.checked_shl(n as u32).unwrap_or(0))
    }
    match m.ty()? {
        Type::B16 => bits2(i, f, |a: u16, n: u32| a.checked_shl(n).unwrap_or(0), rule()),
        Type::B32 => bits2(i, f, |a: u32, n: u32| a.checked_shl(n).unwrap_or(0), rule()),
        Type::B64 => bits2(i, f, |a: u64, n: u32| a.checked_shl(n).unwrap_or(0), rule()),
        ty => Err(bad(format!("'shl' of {ty:?}"))),
    }
}

fn shr(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    fn logical() -> UndefRule<2> {
        moved(1, |[a, n]| a.checked_shr(n as u32).unwrap_or(0))
    }
    macro_rules! signed {
        ($T:ty, $U:ty) => {
            bits2(
                i,
                f,
                |a: $T, n: u32| a >> n.min(<$T>::BITS - 1),
                moved(1, |[a, n]| {
                    (a as $T >> (n as u32).min(<$T>::BITS - 1)) as $U as u64
                }),
            )
        };
    }
    match m.ty()? {
        Type::B16 | Type::U16 => bits2(
            i,
            f,
            |a: u16, n: u32| a.checked_shr(n).unwrap_or(0),
            logical(),
        ),
        Type::B32 | Type::U32 => bits2(
            i,
            f,
            |a: u32, n: u32| a.checked_shr(n).unwrap_or(0),
            logical(),
        ),
        Type::B64 | Type::U64 => bits2(
            i,
            f,
            |a: u64, n: u32| a.checked_shr(n).unwrap_or(0),
            logical(),
        ),
        Type::S16 => signed!(i16, u16),
        Type::S32 => signed!(i32, u32),
        Type::S64 => signed!(i64, u64),
        ty => Err(bad(format!("'shr' of {ty:?}"))),
    }
}

fn shf(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let left = m.take("l");
    let right = m.take("r");
    let clamp = m.take("clamp");
    let wrap = m.take("wrap");
    let ty = m.ty()?;
    if left == right || clamp == wrap || ty != Type::B32 {
        return Err(bad("'shf' wants .l or .r, .clamp or .wrap, and .b32"));
    }
    let amount = move |n: u32| if clamp { n.min(32) } else { n & 31 };
    let op = move |a: u32, b: u32, n: u32| {
        let both = u64::from(b) << 32 | u64::from(a);
        if left {
            // The upper word of the pair shifted left.
            (both << amount(n) >> 32) as u32
        } else {
            (both >> amount(n)) as u32
        }
    };
    let rule = moved(2, move |[a, b, n]| {
        u64::from(op(a as u32, b as u32, n as u32))
    });
    bits3(i, f, op, rule)
}

/// `len` bits from `pos`, as in the ISA's description of `bfe`.
fn extract(a: u64, pos: u32, len: u32, width: u32, signed: bool) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let msb = width - 1;
    let sign = if !signed || len == 0 {
        0
    } else {
        a >> (pos + len - 1).min(msb) & 1
    };
    let mut out = if sign != 0 { u64::MAX } else { 0 };
    for bit in 0..width {
        if bit < len && pos + bit <= msb {
            out = (out & !(1 << bit)) | (a >> (pos + bit) & 1) << bit;
        }
    }
    if width == 64 {
        out
    } else {
        out & ((1 << width) - 1)
    }
}

fn bfe(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    let (width, signed) = match ty {
        Type::U32 => (32, false),
        Type::S32 => (32, true),
        Type::U64 => (64, false),
        Type::S64 => (64, true),
        ty => return Err(bad(format!("'bfe' of {ty:?}"))),
    };
    let rule = moved(1, move |[a, pos, len]| {
        extract(a, pos as u32, len as u32, width, signed)
    });
    if width == 32 {
        let op = move |a: u32, pos: u32, len: u32| extract(a.into(), pos, len, 32, signed) as u32;
        bits3(i, f, op, rule)
    } else {
        let op = move |a: u64, pos: u32, len: u32| extract(a, pos, len, 64, signed);
        bits3(i, f, op, rule)
    }
}

/// The bits that `bfi` replaces.
fn field(pos: u32, len: u32, width: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    if pos >= width {
        return 0;
    }
    let ones = if len >= 64 { u64::MAX } else { (1 << len) - 1 };
    let all = if width == 64 {
        u64::MAX
    } else {
        (1 << width) - 1
    };
    (ones << pos) & all
}

fn bfi(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    match m.ty()? {
        Type::B32 => insert::<u32>(i, f, 32),
        Type::B64 => insert::<u64>(i, f, 64),
        ty => Err(bad(format!("'bfi' of {ty:?}"))),
    }
}

fn insert<T: Scalar>(i: &Instruction, f: &mut Lowering, width: u32) -> Result<Action, LoadError> {
    expect_operands(i, 5..=5)?;
    let d = destination::<T>(f, &i.operands[0])?;
    let a = source::<T>(f, &i.operands[1])?;
    let b = source::<T>(f, &i.operands[2])?;
    let pos = source::<u32>(f, &i.operands[3])?;
    let len = source::<u32>(f, &i.operands[4])?;
    Ok(Action::simple(move |cx| {
        let (x, y) = (a.values(cx.regs), b.values(cx.regs));
        let (p, n) = (pos.values(cx.regs), len.values(cx.regs));
        let put = |a: u64, b: u64, lane: usize| {
            let field = field(p[lane], n[lane], width);
            let shifted = a.checked_shl(p[lane] & 0xff).unwrap_or(0);
            (b & !field) | (shifted & field)
        };
        let out =
            std::array::from_fn(|lane| Bits::narrow(put(x[lane].widen(), y[lane].widen(), lane)));
        let control = pos.any_undef(cx.regs) | len.any_undef(cx.regs);
        let any = control | a.any_undef(cx.regs) | b.any_undef(cx.regs);
        if any & cx.mask == 0 {
            return d.write(cx.regs, cx.mask, &out, 0);
        }
        let undef: [u64; LANES] = std::array::from_fn(|lane| {
            if control >> lane & 1 != 0 {
                return u64::MAX;
            }
            put(
                a.undef_bits(cx.regs, lane),
                b.undef_bits(cx.regs, lane),
                lane,
            )
        });
        d.write_bits(cx.regs, cx.mask, &out, &undef);
    }))
}

fn bmsk(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let wrap = m.take("wrap");
    if m.take("clamp") == wrap || m.ty()? != Type::B32 {
        return Err(bad("'bmsk' wants .clamp or .wrap, and .b32"));
    }
    map2(i, f, move |a: u32, b: u32| {
        let (a, b) = if wrap {
            (a & 31, b & 31)
        } else {
            (a.min(32), b.min(32))
        };
        field(a, b, 32) as u32
    })
}

fn szext(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let wrap = m.take("wrap");
    if m.take("clamp") == wrap {
        return Err(bad("'szext' wants .clamp or .wrap"));
    }
    let signed = match m.ty()? {
        Type::U32 => false,
        Type::S32 => true,
        ty => return Err(bad(format!("'szext' of {ty:?}"))),
    };
    let op = move |a: u32, n: u32| {
        let n = if wrap { n & 31 } else { n.min(32) };
        extract(a.into(), 0, n, 32, signed) as u32
    };
    let rule = moved(1, move |[a, n]| u64::from(op(a as u32, n as u32)));
    bits2(i, f, op, rule)
}

fn brev(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    match m.ty()? {
        Type::B32 => bits1(
            i,
            f,
            |a: u32| a.reverse_bits(),
            Box::new(|_, [u]| u64::from((u as u32).reverse_bits())),
        ),
        Type::B64 => bits1(
            i,
            f,
            |a: u64| a.reverse_bits(),
            Box::new(|_, [u]| u.reverse_bits()),
        ),
        ty => Err(bad(format!("'brev' of {ty:?}"))),
    }
}

/// The selectors of the special modes of `prmt`, by mode and the two low bits of `c`.
fn mode_selector(mode: &str, c: u32) -> u32 {
    let c = c & 3;
    match mode {
        "f4e" => [0x3210, 0x4321, 0x5432, 0x6543][c as usize],
        "b4e" => [0x5670, 0x6701, 0x7012, 0x0123][c as usize],
        "rc8" => 0x1111 * c,
        "ecl" => [0x3210, 0x3211, 0x3222, 0x3333][c as usize],
        "ecr" => [0x0000, 0x1110, 0x2210, 0x3210][c as usize],
        // rc16
        _ => [0x1010, 0x3232, 0x1010, 0x3232][c as usize],
    }
}

fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = u64::from(b) << 32 | u64::from(a);
    (0..4).fold(0, |out, i| {
        let control = selector >> (4 * i) & 0xf;
        let byte = (bytes >> (8 * (control & 7))) as u8;
        let byte = if control & 8 != 0 {
            ((byte as i8) >> 7) as u8
        } else {
            byte
        };
        out | u32::from(byte) << (8 * i)
    })
}

fn prmt(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let mode = m.take_any(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]);
    let ty = m.ty()?;
    if ty != Type::B32 {
        return Err(unsupported(format!("'prmt' of {ty:?}")));
    }
    match mode {
        None => bits3(
            i,
            f,
            permute,
            moved(2, |[a, b, c]| {
                u64::from(permute(a as u32, b as u32, c as u32))
            }),
        ),
        Some(mode) => {
            let mode = mode.to_owned();
            let op = move |a: u32, b: u32, c: u32| permute(a, b, mode_selector(&mode, c));
            let rule_op = op.clone();
            let rule = moved(2, move |[a, b, c]| {
                u64::from(rule_op(a as u32, b as u32, c as u32))
            });
            bits3(i, f, op, rule)
        }
    }
}
