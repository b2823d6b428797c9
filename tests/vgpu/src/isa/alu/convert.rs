//! `cvt`: conversions between types.

use super::super::expect_operands;
use super::float::flush;
use super::rounding::{self, Format, Round, integer_odd};
use crate::lowering::{LoadError, Lowering, Modifiers, bad, size_of, unsupported};
use crate::machine::Cx;
use crate::program::Action;
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{DEFINED, LANES, R32, R64, lanes, spread, spread64};

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    (i.opcode == "cvt").then(|| cvt(i, m, f))
}

/// A register of either width: `cvt` takes operands wider than its types.
#[derive(Debug, Clone, Copy)]
enum Any {
    Narrow(R32),
    Wide(R64),
}

impl Any {
    fn bits(f: &Lowering, operand: &Operand, ty: Type) -> Result<u32, LoadError> {
        let bits = f.register_bits(operand).unwrap_or(8 * size_of(ty));
        if bits < 8 * size_of(ty) {
            return Err(bad(format!("{ty:?} in a register of {bits} bits")));
        }
        Ok(bits)
    }

    fn source(f: &mut Lowering, operand: &Operand, ty: Type) -> Result<Self, LoadError> {
        Ok(match Self::bits(f, operand, ty)? {
            64 => Any::Wide(f.src64(operand, ty)?),
            _ => Any::Narrow(f.src32(operand, ty)?),
        })
    }

    fn read(self, cx: &Cx) -> ([u64; LANES], [u32; 8]) {
        match self {
            Any::Narrow(r) => {
                let mut planes = [0; 8];
                planes[..4].copy_from_slice(&cx.regs.undef32(r));
                (cx.regs.get32(r).map(u64::from), planes)
            }
            Any::Wide(r) => (*cx.regs.get64(r), cx.regs.undef64(r)),
        }
    }

    fn write(self, cx: &mut Cx, value: &[u64; LANES], planes: [u32; 8]) {
        match self {
            Any::Narrow(r) => {
                let value = value.map(|v| v as u32);
                let mut undef = DEFINED;
                undef.copy_from_slice(&planes[..4]);
                cx.regs.set32(r, cx.mask, &value, undef);
            }
            Any::Wide(r) => cx.regs.set64(r, cx.mask, value, planes),
        }
    }
}

fn is_float(ty: Type) -> bool {
    matches!(ty, Type::F16 | Type::BF16 | Type::F32 | Type::F64)
}

fn is_signed(ty: Type) -> bool {
    matches!(ty, Type::S8 | Type::S16 | Type::S32 | Type::S64)
}

fn cvt(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    if m.take("pack") {
        return pack(i, m, f);
    }
    let small = m.rest().iter().any(|t| matches!(*t, "e4m3x2" | "e5m2x2"));
    if small {
        return eight_bits(i, m, f);
    }
    if m.take("tf32") {
        return tf32(i, m, f);
    }
    let round = m.take_any(&["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"]);
    let ftz = m.take("ftz");
    let sat = m.take("sat");
    let relu = m.take("relu");
    let satfinite = m.take("satfinite");
    let (to, from) = (m.ty()?, m.ty()?);
    if matches!(to, Type::F16x2 | Type::BF16x2) {
        if from != Type::F32 {
            return Err(unsupported(format!("'cvt' of {from:?} to {to:?}")));
        }
        return two_halves(i, f, to, Narrow::of(to, round, relu, satfinite)?);
    }
    if to == Type::Pred || from == Type::Pred {
        return Err(bad("'cvt' of a predicate"));
    }
    expect_operands(i, 2..=2)?;
    let (d, a) = (&i.operands[0], &i.operands[1]);
    let register_bits = Any::bits(f, d, to)?;
    let target = match register_bits {
        64 => Any::Wide(f.dst64(d)?),
        _ => Any::Narrow(f.dst32(d)?),
    };
    let source = Any::source(f, a, from)?;
    match (is_float(to), is_float(from)) {
        (false, false) => {
            if round.is_some() || ftz || relu || satfinite {
                return Err(bad("a modifier that an integer conversion does not have"));
            }
            Ok(integers(target, source, to, from, register_bits, sat))
        }
        (false, true) => {
            let Some(round) = round.filter(|r| r.ends_with('i')) else {
                return Err(bad(
                    "a conversion to an integer wants .rni, .rzi, .rmi or .rpi",
                ));
            };
            let round = Round::of(round);
            let float = Float { ty: from, ftz };
            Ok(each(target, source, move |x| {
                let value = to_integer(float.decode(x), round, to, from);
                extend(value as u64, to, register_bits)
            }))
        }
        (true, false) => {
            let Some(round) = round.filter(|r| !r.ends_with('i')) else {
                return Err(bad(
                    "a conversion from an integer wants .rn, .rz, .rm or .rp",
                ));
            };
            let round = Round::of(round);
            let float = Float { ty: to, ftz };
            Ok(each(target, source, move |x| {
                float.of_integer(integer(x, from), round, sat)
            }))
        }
        (true, true) => {
            let integral = round.is_some_and(|r| r.ends_with('i'));
            let round = round.map_or(Round::Nearest, Round::of);
            let (input, output) = (Float { ty: from, ftz }, Float { ty: to, ftz });
            if from == Type::BF16 && to == Type::F32 && !sat && !ftz && !relu {
                return Ok(each(target, source, |x| {
                    let wide = (x as u32) << 16;
                    let nan = f32::from_bits(wide).is_nan();
                    u64::from(if nan { 0x7fff_ffff } else { wide })
                }));
            }
            Ok(each(target, source, move |x| {
                let value = input.decode(x);
                let value = if integral {
                    round_to_integral(value, round)
                } else {
                    value
                };
                let value = if sat {
                    if value > 0.0 { value.min(1.0) } else { 0.0 }
                } else if relu && value <= 0.0 {
                    0.0
                } else {
                    value
                };
                output.encode(value, round, satfinite)
            }))
        }
    }
}

/// An operation that needs every byte of its operand.
fn each(target: Any, source: Any, op: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Action {
    Action::simple(move |cx| {
        let (value, planes) = source.read(cx);
        let mut out = [0; LANES];
        for lane in lanes(cx.mask) {
            out[lane] = op(value[lane]);
        }
        let undef = planes.iter().fold(0, |u, p| u | p);
        target.write(cx, &out, spread64(undef));
    })
}

/// The integer that the low bits of a register stand for.
fn integer(bits: u64, ty: Type) -> i128 {
    let width = 8 * size_of(ty);
    let bits = bits << (64 - width);
    if is_signed(ty) {
        i128::from(bits as i64 >> (64 - width))
    } else {
        i128::from(bits >> (64 - width))
    }
}

fn range(ty: Type) -> (i128, i128) {
    let width = 8 * size_of(ty);
    if is_signed(ty) {
        (-(1 << (width - 1)), (1 << (width - 1)) - 1)
    } else {
        (0, (1 << width) - 1)
    }
}

/// A value of a type in a register that may be wider: extended by its sign or by zeros.
fn extend(value: u64, ty: Type, register_bits: u32) -> u64 {
    let value = integer(value, ty) as u64;
    if register_bits == 64 {
        value
    } else {
        value & ((1 << register_bits) - 1)
    }
}

fn integers(target: Any, source: Any, to: Type, from: Type, bits: u32, sat: bool) -> Action {
    if sat {
        let (low, high) = range(to);
        return each(target, source, move |x| {
            extend(integer(x, from).clamp(low, high) as u64, to, bits)
        });
    }
    // Sign extension to at most 64 bits, then to the target's width; undefined bits go along.
    let convert = move |x: u64| extend(integer(x, from) as u64, to, bits);
    // The common ones without 128-bit arithmetic.
    let fast: fn(u64) -> u64 = match (from, to, bits) {
        (Type::U32 | Type::B32, Type::U64 | Type::S64 | Type::B64, 64) => |x| x & 0xffff_ffff,
        (Type::S32, Type::S64 | Type::U64 | Type::B64, 64) => |x| x as i32 as u64,
        (_, Type::U32 | Type::S32 | Type::B32, 32) if size_of(from) >= 4 => |x| x & 0xffff_ffff,
        (_, Type::U16 | Type::S16 | Type::B16, 16) if size_of(from) >= 2 => |x| x & 0xffff,
        _ => {
            return Action::simple(move |cx| {
                let (value, planes) = source.read(cx);
                let out = value.map(convert);
                let planes = move_planes(planes, from, to, bits);
                target.write(cx, &out, planes);
            });
        }
    };
    Action::simple(move |cx| {
        let (value, planes) = source.read(cx);
        let out = value.map(fast);
        let planes = if planes == [0; 8] {
            planes
        } else {
            move_planes(planes, from, to, bits)
        };
        target.write(cx, &out, planes);
    })
}

/// Where the undefined bytes go: bytes that are kept keep theirs, sign bytes take that of the
/// byte with the sign, zeros are defined.
fn move_planes(planes: [u32; 8], from: Type, to: Type, bits: u32) -> [u32; 8] {
    let (from_bytes, to_bytes) = (size_of(from) as usize, size_of(to) as usize);
    let mut out = [0; 8];
    for (byte, plane) in out.iter_mut().enumerate().take(bits as usize / 8) {
        let byte = if byte < to_bytes {
            byte
        } else if is_signed(to) {
            to_bytes - 1
        } else {
            continue;
        };
        if byte < from_bytes {
            *plane = planes[byte];
        } else if is_signed(from) {
            *plane = planes[from_bytes - 1];
        }
    }
    out
}

/// A floating-point type as an operand or a result.
#[derive(Debug, Clone, Copy)]
struct Float {
    ty: Type,
    /// Subnormal f32 become zero.
    ftz: bool,
}

impl Float {
    fn decode(self, bits: u64) -> f64 {
        match self.ty {
            Type::F16 => half::f16::from_bits(bits as u16).to_f64(),
            Type::BF16 => half::bf16::from_bits(bits as u16).to_f64(),
            Type::F32 => {
                let value = f32::from_bits(bits as u32);
                f64::from(if self.ftz { flush(value) } else { value })
            }
            _ => f64::from_bits(bits),
        }
    }

    fn format(self) -> Format {
        match self.ty {
            Type::F16 => rounding::F16,
            Type::BF16 => rounding::BF16,
            _ => rounding::F32,
        }
    }

    fn encode(self, value: f64, round: Round, satfinite: bool) -> u64 {
        match self.ty {
            Type::F64 => value.to_bits(),
            _ if satfinite && value.is_nan() => self.format().nan(),
            _ => {
                let bits = self.format().encode(value, round, satfinite);
                if self.ty == Type::F32 && self.ftz {
                    u64::from(flush(f32::from_bits(bits as u32)).to_bits())
                } else {
                    bits
                }
            }
        }
    }

    fn of_integer(self, value: i128, round: Round, sat: bool) -> u64 {
        if sat {
            let value = f64::from(u8::from(value > 0));
            return self.encode(value, round, false);
        }
        if self.ty != Type::F64 {
            return self.encode(integer_odd(value), round, false);
        }
        let nearest = value as f64;
        let error = value - nearest as i128;
        let value = match round {
            Round::Down if error < 0 => nearest.next_down(),
            Round::Up if error > 0 => nearest.next_up(),
            Round::Zero if error != 0 && (error < 0) == (nearest > 0.0) => {
                f64::from_bits(nearest.to_bits() - 1)
            }
            _ => nearest,
        };
        value.to_bits()
    }
}

fn round_to_integral(value: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => value.round_ties_even(),
        Round::Away => value.round(),
        Round::Zero => value.trunc(),
        Round::Down => value.floor(),
        Round::Up => value.ceil(),
    }
}

/// Clamped to the range of the type. A NaN gives 0, or the value with only the highest bit set
/// where a type of 64 bits is involved (PTX ISA, `cvt`).
fn to_integer(value: f64, round: Round, to: Type, from: Type) -> i128 {
    if value.is_nan() {
        let wide = from == Type::F64 || size_of(to) == 8;
        return if wide { 1 << (8 * size_of(to) - 1) } else { 0 };
    }
    let (low, high) = range(to);
    (round_to_integral(value, round) as i128).clamp(low, high)
}

/// A conversion of f32 to a narrower format.
#[derive(Debug, Clone, Copy)]
struct Narrow {
    format: Format,
    round: Round,
    relu: bool,
    satfinite: bool,
}

impl Narrow {
    fn of(to: Type, round: Option<&str>, relu: bool, satfinite: bool) -> Result<Self, LoadError> {
        let round = match round {
            Some("rn") => Round::Nearest,
            Some("rz") => Round::Zero,
            _ => return Err(bad(format!("a conversion to {to:?} wants .rn or .rz"))),
        };
        Ok(Self {
            format: match to {
                Type::F16x2 => rounding::F16,
                _ => rounding::BF16,
            },
            round,
            relu,
            satfinite,
        })
    }

    fn bits(self, value: f64) -> u32 {
        let value = if self.relu && value <= 0.0 {
            0.0
        } else {
            value
        };
        self.format.encode(value, self.round, self.satfinite) as u32
    }
}

/// `cvt.rn.f16x2.f32 d, high, low`
fn two_halves(
    i: &Instruction,
    f: &mut Lowering,
    to: Type,
    narrow: Narrow,
) -> Result<Action, LoadError> {
    expect_operands(i, 3..=3)?;
    Any::bits(f, &i.operands[0], to)?;
    let d = f.dst32(&i.operands[0])?;
    let high = f.src32(&i.operands[1], Type::F32)?;
    let low = f.src32(&i.operands[2], Type::F32)?;
    Ok(Action::simple(move |cx| {
        let (x, y) = (cx.regs.get32(high), cx.regs.get32(low));
        let mut out = [0; LANES];
        for lane in lanes(cx.mask) {
            let bits = |v: u32| narrow.bits(f32::from_bits(v).into());
            out[lane] = bits(x[lane]) << 16 | bits(y[lane]);
        }
        let (low, high) = (cx.regs.any_undef32(low), cx.regs.any_undef32(high));
        cx.regs.set32(d, cx.mask, &out, [low, low, high, high]);
    }))
}

fn tf32(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let round = m.take_any(&["rna", "rn", "rz"]);
    let round = round
        .map(Round::of)
        .ok_or_else(|| bad("'cvt' to tf32 wants a rounding"))?;
    let relu = m.take("relu");
    let satfinite = m.take("satfinite");
    if m.ty()? != Type::F32 {
        return Err(bad("'cvt' to tf32 takes f32"));
    }
    expect_operands(i, 2..=2)?;
    let narrow = Narrow {
        format: rounding::TF32,
        round,
        relu,
        satfinite,
    };
    let d = Any::Narrow(f.dst32(&i.operands[0])?);
    let a = Any::Narrow(f.src32(&i.operands[1], Type::F32)?);
    // A tf32 keeps the place of an f32, the low bits zero.
    Ok(each(d, a, move |x| {
        let value = f64::from(f32::from_bits(x as u32));
        u64::from(narrow.bits(value)) << 13 | if value.is_nan() { 0x1fff } else { 0 }
    }))
}

/// Conversions to and from pairs of 8-bit floats.
fn eight_bits(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    if m.take_any(&["rn"]).is_none() {
        return Err(bad("'cvt' of 8-bit floats wants .rn"));
    }
    let satfinite = m.take("satfinite");
    let relu = m.take("relu");
    let name = m.take_any(&["e4m3x2", "e5m2x2"]);
    let format = match name {
        Some("e4m3x2") => rounding::E4M3,
        _ => rounding::E5M2,
    };
    let other = m.ty()?;
    match (other, i.operands.len()) {
        // Two f32 to a pair.
        (Type::F32, 3) => {
            if !satfinite {
                return Err(bad("'cvt' to 8-bit floats wants .satfinite"));
            }
            let narrow = Narrow {
                format,
                round: Round::Nearest,
                relu,
                satfinite,
            };
            let d = f.dst32(&i.operands[0])?;
            let high = f.src32(&i.operands[1], Type::F32)?;
            let low = f.src32(&i.operands[2], Type::F32)?;
            Ok(Action::simple(move |cx| {
                let (x, y) = (cx.regs.get32(high), cx.regs.get32(low));
                let mut out = [0; LANES];
                for lane in lanes(cx.mask) {
                    let bits = |v: u32| narrow.bits(f32::from_bits(v).into());
                    out[lane] = bits(x[lane]) << 8 | bits(y[lane]);
                }
                let (low, high) = (cx.regs.any_undef32(low), cx.regs.any_undef32(high));
                cx.regs.set32(d, cx.mask, &out, [low, high, 0, 0]);
            }))
        }
        (Type::F16x2, 2) => {
            let wide = f.register_bits(&i.operands[0]) == Some(32);
            let d = f.dst32(&i.operands[0])?;
            let a = f.src32(&i.operands[1], Type::B32)?;
            if wide {
                // A pair to two halves.
                return Ok(Action::simple(move |cx| {
                    let half = |byte: u32| {
                        let value = format.decode(u64::from(byte & 0xff));
                        let value = if relu && value <= 0.0 { 0.0 } else { value };
                        rounding::F16.encode(value, Round::Nearest, false) as u32
                    };
                    let out = cx.regs.get32(a).map(|x| half(x >> 8) << 16 | half(x));
                    let undef = cx.regs.undef32(a);
                    let planes = [undef[0], undef[0], undef[1], undef[1]];
                    cx.regs.set32(d, cx.mask, &out, planes);
                }));
            }
            if !satfinite {
                return Err(bad("'cvt' to 8-bit floats wants .satfinite"));
            }
            let narrow = Narrow {
                format,
                round: Round::Nearest,
                relu,
                satfinite,
            };
            Ok(Action::simple(move |cx| {
                let byte = |half: u32| narrow.bits(rounding::F16.decode(u64::from(half & 0xffff)));
                let out = cx.regs.get32(a).map(|x| byte(x >> 16) << 8 | byte(x));
                let undef = cx.regs.undef32(a);
                let planes = [undef[0] | undef[1], undef[2] | undef[3], 0, 0];
                cx.regs.set32(d, cx.mask, &out, planes);
            }))
        }
        (other, n) => Err(unsupported(format!(
            "'cvt' between 8-bit floats and {other:?} with {n} operands"
        ))),
    }
}

/// `cvt.pack.sat.u8.s32.b32 d, a, b, c`
fn pack(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    // Below 8 bits there are types that occur nowhere else.
    let tiny = m.take_any(&["u2", "s2", "u4", "s4"]);
    if !m.take("sat") {
        return Err(bad("'cvt.pack' wants .sat"));
    }
    let (bits, signed) = match tiny {
        Some(name) => (
            if name.ends_with('2') { 2 } else { 4 },
            name.starts_with('s'),
        ),
        None => {
            let ty = m.ty()?;
            match ty {
                Type::U16 | Type::S16 | Type::U8 | Type::S8 => (8 * size_of(ty), is_signed(ty)),
                ty => return Err(bad(format!("'cvt.pack' to {ty:?}"))),
            }
        }
    };
    if m.ty()? != Type::S32 {
        return Err(bad("'cvt.pack' takes .s32"));
    }
    let carried = bits < 16;
    if carried && m.ty()? != Type::B32 {
        return Err(bad("'cvt.pack' takes its third operand as .b32"));
    }
    expect_operands(i, if carried { 4..=4 } else { 3..=3 })?;
    let d = f.dst32(&i.operands[0])?;
    let a = f.src32(&i.operands[1], Type::S32)?;
    let b = f.src32(&i.operands[2], Type::S32)?;
    let c = match i.operands.get(3) {
        Some(c) => f.src32(c, Type::B32)?,
        None => f.constant32(0),
    };
    let (low, high) = if signed {
        (-(1i32 << (bits - 1)), (1i32 << (bits - 1)) - 1)
    } else {
        (0, (1i32 << bits) - 1)
    };
    Ok(Action::simple(move |cx| {
        let (x, y, z) = (cx.regs.get32(a), cx.regs.get32(b), cx.regs.get32(c));
        let clamp = |v: u32| (v as i32).clamp(low, high) as u32 & ((1 << bits) - 1);
        let out = std::array::from_fn(|lane| {
            let rest = if carried { z[lane] << (2 * bits) } else { 0 };
            rest | clamp(x[lane]) << bits | clamp(y[lane])
        });
        let undef = cx.regs.any_undef32(a) | cx.regs.any_undef32(b) | cx.regs.any_undef32(c);
        cx.regs.set32(d, cx.mask, &out, spread(undef));
    }))
}
