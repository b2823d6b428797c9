//! Floating-point arithmetic: f32 and f64, f16 and bf16 with their packed forms.

use super::super::expect_operands;
use super::approx;
use super::lanes::{Slot, destination, map1, map2, map3, source};
use super::rounding::{self, Format, Round, add_odd, div_odd, double, fma_odd, sqrt_odd, zero_sum};
use crate::lowering::{LoadError, Lowering, Modifiers, bad, unsupported};
use crate::program::Action;
use crate::ptx::ast::{Instruction, Type};
use crate::registers::{LANES, R32};

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match i.opcode.as_str() {
        "add" | "sub" | "mul" | "div" | "min" | "max" => two(i, m, f),
        "fma" | "mad" => fused(i, m, f),
        "abs" | "neg" | "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => {
            one(i, m, f)
        }
        "copysign" => copysign(i, m, f),
        "testp" => testp(i, m, f),
        _ => return None,
    })
}

/// What the modifiers of an arithmetic instruction say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mode {
    round: Round,
    pub(super) approx: bool,
    full: bool,
    ftz: bool,
    sat: bool,
    relu: bool,
    nan: bool,
    xorsign: bool,
    pub(super) ty: Type,
}

impl Mode {
    fn take(m: &mut Modifiers) -> Result<Self, LoadError> {
        let round = m.take_any(&["rn", "rz", "rm", "rp"]);
        let approx = m.take("approx");
        let full = m.take("full");
        let ftz = m.take("ftz");
        let sat = m.take("sat");
        let relu = m.take("relu");
        let nan = m.take("NaN");
        let xorsign = m.take("xorsign");
        if xorsign && !m.take("abs") {
            return Err(bad("'.xorsign' wants '.abs'"));
        }
        m.take("noftz");
        let ty = m.ty()?;
        if let Some(second) = m.take_type() {
            return Err(unsupported(format!("arithmetic of {ty:?} and {second:?}")));
        }
        Ok(Self {
            round: round.map_or(Round::Nearest, Round::of),
            approx,
            full,
            ftz,
            sat,
            relu,
            nan,
            xorsign,
            ty,
        })
    }
}

const CANONICAL: f32 = f32::from_bits(0x7fff_ffff);

/// The NaN of the hardware for any NaN.
#[inline(always)]
fn canonical(x: f32) -> f32 {
    if x.is_nan() { CANONICAL } else { x }
}

/// Subnormals become zero, with their sign.
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    if bits & 0x7f80_0000 == 0 {
        f32::from_bits(bits & 0x8000_0000)
    } else {
        x
    }
}

/// Clamped to 0 to 1; NaN becomes 0.
#[inline(always)]
pub(super) fn saturate(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

fn saturate64(x: f64) -> f64 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

impl Mode {
    /// Before an f32 operation.
    #[inline(always)]
    pub(super) fn input(self, x: f32) -> f32 {
        if self.ftz { flush(x) } else { x }
    }

    /// After it.
    #[inline(always)]
    pub(super) fn output(self, x: f32) -> f32 {
        let x = canonical(x);
        let x = if self.ftz { flush(x) } else { x };
        if self.sat { saturate(x) } else { x }
    }

    fn narrow32(self, exact: f64) -> f32 {
        f32::from_bits(rounding::F32.encode(exact, self.round, false) as u32)
    }
}

/// A sum rounded once to f32.
fn add32(a: f32, b: f32, round: Round) -> f32 {
    let (x, y) = (f64::from(a), f64::from(b));
    let s = add_odd(x, y);
    let s = if s == 0.0 { zero_sum(x, y, round) } else { s };
    f32::from_bits(rounding::F32.encode(s, round, false) as u32)
}

/// `a * b + c` rounded once to f32.
fn fma32(a: f32, b: f32, c: f32, round: Round) -> f32 {
    let (p, z) = (f64::from(a) * f64::from(b), f64::from(c));
    let s = add_odd(p, z);
    let s = if s == 0.0 { zero_sum(p, z, round) } else { s };
    f32::from_bits(rounding::F32.encode(s, round, false) as u32)
}

/// Minimum and maximum as the ISA has them: -0 below +0, a NaN gives way to a number unless
/// `.NaN`, and `.xorsign.abs` compares magnitudes.
fn extreme(a: f64, b: f64, max: bool, mode: Mode) -> f64 {
    let sign = mode.xorsign && a.is_sign_negative() != b.is_sign_negative();
    let (a, b) = if mode.xorsign {
        (a.abs(), b.abs())
    } else {
        (a, b)
    };
    let value = if a.is_nan() || b.is_nan() {
        if mode.nan || (a.is_nan() && b.is_nan()) {
            return f64::NAN;
        }
        if a.is_nan() { b } else { a }
    } else {
        let first = match a.total_cmp(&b) {
            std::cmp::Ordering::Less => !max,
            _ => max,
        };
        if first { a } else { b }
    };
    if sign { -value } else { value }
}

fn two(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let opcode = i.opcode.clone();
    let mode = Mode::take(m)?;
    let max = opcode == "max";
    let round = mode.round;
    let nearest = round == Round::Nearest;
    match mode.ty {
        Type::F32 => match opcode.as_str() {
            "add" if nearest && !mode.ftz && !mode.sat => {
                map2(i, f, |a: f32, b: f32| canonical(a + b))
            }
            "sub" if nearest && !mode.ftz && !mode.sat => {
                map2(i, f, |a: f32, b: f32| canonical(a - b))
            }
            "mul" if nearest && !mode.ftz && !mode.sat => {
                map2(i, f, |a: f32, b: f32| canonical(a * b))
            }
            "add" if nearest => map2(i, f, move |a: f32, b: f32| {
                mode.output(mode.input(a) + mode.input(b))
            }),
            "sub" if nearest => map2(i, f, move |a: f32, b: f32| {
                mode.output(mode.input(a) - mode.input(b))
            }),
            "mul" if nearest => map2(i, f, move |a: f32, b: f32| {
                mode.output(mode.input(a) * mode.input(b))
            }),
            "add" => map2(i, f, move |a: f32, b: f32| {
                mode.output(add32(mode.input(a), mode.input(b), round))
            }),
            "sub" => map2(i, f, move |a: f32, b: f32| {
                mode.output(add32(mode.input(a), -mode.input(b), round))
            }),
            "mul" => map2(i, f, move |a: f32, b: f32| {
                let exact = f64::from(mode.input(a)) * f64::from(mode.input(b));
                mode.output(mode.narrow32(exact))
            }),
            "div" if mode.approx || mode.full => approx::div(i, f, mode),
            "div" if nearest => map2(i, f, move |a: f32, b: f32| {
                mode.output(mode.input(a) / mode.input(b))
            }),
            "div" => map2(i, f, move |a: f32, b: f32| {
                let exact = div_odd(mode.input(a).into(), mode.input(b).into());
                mode.output(mode.narrow32(exact))
            }),
            _ => map2(i, f, move |a: f32, b: f32| {
                let (a, b) = (mode.input(a), mode.input(b));
                mode.output(extreme(a.into(), b.into(), max, mode) as f32)
            }),
        },
        Type::F64 => {
            if mode.ftz || mode.relu || mode.approx || mode.full {
                return Err(bad(format!("a modifier that '{opcode}.f64' does not have")));
            }
            match opcode.as_str() {
                "add" if nearest => map2(i, f, |a: f64, b: f64| a + b),
                "sub" if nearest => map2(i, f, |a: f64, b: f64| a - b),
                "mul" if nearest => map2(i, f, |a: f64, b: f64| a * b),
                "div" if nearest => map2(i, f, |a: f64, b: f64| a / b),
                "add" => map2(i, f, move |a: f64, b: f64| double::add(a, b, round)),
                "sub" => map2(i, f, move |a: f64, b: f64| double::add(a, -b, round)),
                "mul" => map2(i, f, move |a: f64, b: f64| double::mul(a, b, round)),
                "div" => map2(i, f, move |a: f64, b: f64| double::div(a, b, round)),
                _ => map2(i, f, move |a: f64, b: f64| extreme(a, b, max, mode)),
            }
        }
        Type::F16 | Type::F16x2 | Type::BF16 | Type::BF16x2 => {
            let half = Half::of(mode)?;
            match opcode.as_str() {
                "add" => half.map::<2>(i, f, move |[a, b]| half.round(signed_sum(a, b))),
                "sub" => half.map::<2>(i, f, move |[a, b]| half.round(signed_sum(a, -b))),
                "mul" => half.map::<2>(i, f, move |[a, b]| half.round(a * b)),
                "min" | "max" => {
                    half.map::<2>(i, f, move |[a, b]| half.round(extreme(a, b, max, mode)))
                }
                _ => Err(bad(format!("'{opcode}' of {:?}", mode.ty))),
            }
        }
        ty => Err(bad(format!("'{opcode}' of {ty:?}"))),
    }
}

/// A sum, rounded to odd, with the sign that a zero has when rounding to nearest.
fn signed_sum(a: f64, b: f64) -> f64 {
    let s = add_odd(a, b);
    if s == 0.0 {
        zero_sum(a, b, Round::Nearest)
    } else {
        s
    }
}

/// Arithmetic of f16 or bf16, one or two to a register.
#[derive(Debug, Clone, Copy)]
pub(super) struct Half {
    pub(super) format: Format,
    pub(super) packed: bool,
    mode: Mode,
}

impl Half {
    pub(super) fn of(mode: Mode) -> Result<Self, LoadError> {
        if mode.approx && mode.sat || mode.full || mode.round != Round::Nearest {
            return Err(bad(format!("a modifier that {:?} does not have", mode.ty)));
        }
        let (format, packed) = match mode.ty {
            Type::F16 => (rounding::F16, false),
            Type::F16x2 => (rounding::F16, true),
            Type::BF16 => (rounding::BF16, false),
            _ => (rounding::BF16, true),
        };
        Ok(Self {
            format,
            packed,
            mode,
        })
    }

    pub(super) fn input(self, bits: u32) -> f64 {
        let bits = u64::from(bits & 0xffff);
        let exponent = 0x7fff & !((1 << if self.format == rounding::F16 { 10 } else { 7 }) - 1);
        if self.mode.ftz && bits & exponent == 0 {
            return if bits & 0x8000 != 0 { -0.0 } else { 0.0 };
        }
        self.format.decode(bits)
    }

    pub(super) fn round(self, exact: f64) -> u32 {
        let exact = if self.mode.sat {
            saturate64(exact)
        } else {
            exact
        };
        let exact = if self.mode.relu && exact <= 0.0 {
            0.0
        } else {
            exact
        };
        let bits = self.format.encode(exact, Round::Nearest, false) as u32;
        let exponent = 0x7fff & !((1 << if self.format == rounding::F16 { 10 } else { 7 }) - 1);
        if self.mode.ftz && bits & exponent == 0 {
            bits & 0x8000
        } else {
            bits
        }
    }

    /// `d = op(operands)` for each half.
    fn map<const N: usize>(
        self,
        i: &Instruction,
        f: &mut Lowering,
        op: impl Fn([f64; N]) -> u32 + Send + Sync + 'static,
    ) -> Result<Action, LoadError> {
        expect_operands(i, N + 1..=N + 1)?;
        let ty = if self.packed { Type::B32 } else { Type::B16 };
        let d = <R32 as Slot>::destination(f, &i.operands[0], ty)?;
        let mut sources = [R32(0); N];
        for (source, operand) in sources.iter_mut().zip(&i.operands[1..]) {
            *source = <R32 as Slot>::source(f, operand, ty)?;
        }
        let packed = self.packed;
        Ok(Action::simple(move |cx| {
            let mut out = [0; LANES];
            for lane in crate::registers::lanes(cx.mask) {
                let low = op(sources.map(|s| self.input(cx.regs.get32(s)[lane])));
                out[lane] = low;
                if packed {
                    let high = op(sources.map(|s| self.input(cx.regs.get32(s)[lane] >> 16)));
                    out[lane] |= high << 16;
                }
            }
            let (mut low, mut high) = (0, 0);
            for source in sources {
                let undef = cx.regs.undef32(source);
                low |= undef[0] | undef[1];
                high |= undef[2] | undef[3];
            }
            let undef = if packed {
                [low, low, high, high]
            } else {
                [low, low, 0, 0]
            };
            cx.regs.set32(d, cx.mask, &out, undef);
        }))
    }
}

fn fused(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let mode = Mode::take(m)?;
    let round = mode.round;
    let nearest = round == Round::Nearest;
    match mode.ty {
        Type::F32 if nearest => {
            let d = destination::<f32>(f, operand(i, 0)?)?;
            let a = source::<f32>(f, operand(i, 1)?)?;
            let b = source::<f32>(f, operand(i, 2)?)?;
            let c = source::<f32>(f, operand(i, 3)?)?;
            expect_operands(i, 4..=4)?;
            let row = fma_row();
            Ok(Action::simple(move |cx| {
                let mut out = [0; LANES];
                let (x, y, z) = (cx.regs.get32(a), cx.regs.get32(b), cx.regs.get32(c));
                if mode.ftz {
                    let flushed = |v: &[u32; LANES]| v.map(|v| flush(f32::from_bits(v)).to_bits());
                    row(&flushed(x), &flushed(y), &flushed(z), &mut out);
                } else {
                    row(x, y, z, &mut out);
                }
                for value in &mut out {
                    *value = mode.output(f32::from_bits(*value)).to_bits();
                }
                let undef = a.any_undef(cx.regs) | b.any_undef(cx.regs) | c.any_undef(cx.regs);
                d.write(cx.regs, cx.mask, &out, undef);
            }))
        }
        Type::F32 => map3(i, f, move |a: f32, b: f32, c: f32| {
            let (a, b, c) = (mode.input(a), mode.input(b), mode.input(c));
            mode.output(fma32(a, b, c, round))
        }),
        Type::F64 if nearest => map3(i, f, |a: f64, b: f64, c: f64| a.mul_add(b, c)),
        Type::F64 => map3(i, f, move |a: f64, b: f64, c: f64| {
            double::fma(a, b, c, round)
        }),
        Type::F16 | Type::F16x2 | Type::BF16 | Type::BF16x2 => {
            let half = Half::of(mode)?;
            half.map::<3>(i, f, move |[a, b, c]| {
                let s = fma_odd(a, b, c);
                let s = if s == 0.0 {
                    zero_sum(a * b, c, Round::Nearest)
                } else {
                    s
                };
                half.round(s)
            })
        }
        ty => Err(bad(format!("'{}' of {ty:?}", i.opcode))),
    }
}

fn operand(i: &Instruction, at: usize) -> Result<&crate::ptx::ast::Operand, LoadError> {
    i.operands
        .get(at)
        .ok_or_else(|| bad(format!("'{}' lacks an operand", i.opcode)))
}

type FmaRow = fn(&[u32; LANES], &[u32; LANES], &[u32; LANES], &mut [u32; LANES]);

/// A row of fused multiply-adds, with the processor's own where it has one.
fn fma_row() -> FmaRow {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "fma,avx2")]
        fn fast(a: &[u32; LANES], b: &[u32; LANES], c: &[u32; LANES], out: &mut [u32; LANES]) {
            for lane in 0..LANES {
                let (x, y, z) = (
                    f32::from_bits(a[lane]),
                    f32::from_bits(b[lane]),
                    f32::from_bits(c[lane]),
                );
                out[lane] = x.mul_add(y, z).to_bits();
            }
        }
        // SAFETY: the processor has what `fast` is compiled for.
        return |a, b, c, out| unsafe { fast(a, b, c, out) };
    }
    |a, b, c, out| {
        for lane in 0..LANES {
            let (x, y, z) = (
                f32::from_bits(a[lane]),
                f32::from_bits(b[lane]),
                f32::from_bits(c[lane]),
            );
            out[lane] = x.mul_add(y, z).to_bits();
        }
    }
}

fn one(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let opcode = i.opcode.as_str();
    let mode = Mode::take(m)?;
    let round = mode.round;
    match (opcode, mode.ty) {
        ("abs", Type::F32) => map1(i, f, move |a: f32| mode.input(a).abs()),
        ("neg", Type::F32) => map1(i, f, move |a: f32| -mode.input(a)),
        ("abs", Type::F64) => map1(i, f, |a: f64| a.abs()),
        ("neg", Type::F64) => map1(i, f, |a: f64| -a),
        ("abs" | "neg", Type::F16 | Type::F16x2 | Type::BF16 | Type::BF16x2) => {
            let half = Half::of(mode)?;
            let negate = opcode == "neg";
            half.map_bits(
                i,
                f,
                move |bits| {
                    if negate { bits ^ 0x8000 } else { bits & 0x7fff }
                },
            )
        }
        ("rcp", Type::F32) if !mode.approx => map1(i, f, move |a: f32| {
            mode.output(mode.narrow32(div_odd(1.0, mode.input(a).into())))
        }),
        ("sqrt", Type::F32) if !mode.approx => map1(i, f, move |a: f32| {
            mode.output(mode.narrow32(sqrt_odd(mode.input(a).into())))
        }),
        ("rcp", Type::F64) if !mode.approx => map1(i, f, move |a: f64| double::div(1.0, a, round)),
        ("sqrt", Type::F64) if !mode.approx => map1(i, f, move |a: f64| double::sqrt(a, round)),
        // These two keep the upper word only ("gross approximations").
        ("rcp", Type::F64) if mode.ftz => map1(i, f, |a: f64| upper(1.0 / upper(a))),
        ("rsqrt", Type::F64) => map1(i, f, |a: f64| upper(1.0 / upper(a).sqrt())),
        _ => approx::one(i, f, mode),
    }
}

/// The upper word of a double, with subnormals flushed.
fn upper(x: f64) -> f64 {
    let bits = x.to_bits() & 0xffff_ffff_0000_0000;
    if bits & 0x7ff0_0000_0000_0000 == 0 {
        f64::from_bits(bits & 1 << 63)
    } else {
        f64::from_bits(bits)
    }
}

impl Half {
    /// `d = op(a)` on the bits of each half.
    fn map_bits(
        self,
        i: &Instruction,
        f: &mut Lowering,
        op: impl Fn(u32) -> u32 + Send + Sync + 'static,
    ) -> Result<Action, LoadError> {
        expect_operands(i, 2..=2)?;
        let ty = if self.packed { Type::B32 } else { Type::B16 };
        let d = <R32 as Slot>::destination(f, &i.operands[0], ty)?;
        let a = <R32 as Slot>::source(f, &i.operands[1], ty)?;
        Ok(Action::simple(move |cx| {
            let canonical = |bits: u32| {
                let bits = bits & 0xffff;
                let flushed = self.mode.ftz && self.input(bits) == 0.0;
                op(if flushed { bits & 0x8000 } else { bits })
            };
            let packed = self.packed;
            let out = cx.regs.get32(a).map(|x| {
                let high = if packed { canonical(x >> 16) << 16 } else { 0 };
                canonical(x) | high
            });
            let undef = cx.regs.undef32(a);
            cx.regs.set32(d, cx.mask, &out, undef);
        }))
    }
}

fn copysign(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    // The sign comes from the first operand.
    match m.ty()? {
        Type::F32 => map2(i, f, |a: f32, b: f32| b.copysign(a)),
        Type::F64 => map2(i, f, |a: f64, b: f64| b.copysign(a)),
        ty => Err(bad(format!("'copysign' of {ty:?}"))),
    }
}

fn testp(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    use std::num::FpCategory::*;
    let property = m
        .take_any(&[
            "finite",
            "infinite",
            "number",
            "notanumber",
            "normal",
            "subnormal",
        ])
        .ok_or_else(|| bad("'testp' wants a property"))?
        .to_owned();
    let test = move |category: std::num::FpCategory| match property.as_str() {
        "finite" => !matches!(category, Nan | Infinite),
        "infinite" => category == Infinite,
        "number" => category != Nan,
        "notanumber" => category == Nan,
        "normal" => category == Normal,
        _ => category == Subnormal,
    };
    expect_operands(i, 2..=2)?;
    let d = f.dst_pred(&i.operands[0])?;
    match m.ty()? {
        Type::F32 => {
            let a = source::<f32>(f, &i.operands[1])?;
            Ok(Action::simple(move |cx| {
                let x = cx.regs.get32(a);
                let out = (0..LANES).fold(0, |out, lane| {
                    out | u32::from(test(f32::from_bits(x[lane]).classify())) << lane
                });
                let undef = a.any_undef(cx.regs);
                cx.regs.set_pred(d, cx.mask, out, undef);
            }))
        }
        Type::F64 => {
            let a = source::<f64>(f, &i.operands[1])?;
            Ok(Action::simple(move |cx| {
                let x = cx.regs.get64(a);
                let out = (0..LANES).fold(0, |out, lane| {
                    out | u32::from(test(f64::from_bits(x[lane]).classify())) << lane
                });
                let undef = a.any_undef(cx.regs);
                cx.regs.set_pred(d, cx.mask, out, undef);
            }))
        }
        ty => Err(bad(format!("'testp' of {ty:?}"))),
    }
}
