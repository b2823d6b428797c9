//! The instructions that approximate. They are correctly rounded here, unless the machine is
//! told to disturb them: then a result lies anywhere within the error that the PTX ISA allows
//! (version 9.1, sections 9.7.3 and 9.7.4), always the same place for the same operand and seed,
//! as a table in hardware has it. What depends on more than the ISA promises
//! shows as a difference between seeds.

use super::super::expect_operands;
use super::float::{Half, Mode};
use super::lanes::{Slot, destination, source};
use super::rounding::{self, Format};
use crate::lowering::{LoadError, Lowering, bad};
use crate::machine::{Approximation, Cx};
use crate::program::Action;
use crate::ptx::ast::{Instruction, Type};
use crate::registers::{LANES, R32, lanes};

/// A function that the hardware approximates, in f64: rounded from there it is as good as
/// correctly rounded.
type Function = fn(f64) -> f64;

fn function(opcode: &str) -> Option<Function> {
    Some(match opcode {
        "rcp" => |x| 1.0 / x,
        "sqrt" => f64::sqrt,
        "rsqrt" => |x| 1.0 / x.sqrt(),
        "sin" => f64::sin,
        "cos" => f64::cos,
        "lg2" => f64::log2,
        "ex2" => f64::exp2,
        "tanh" => f64::tanh,
        _ => return None,
    })
}

/// The largest error of a result that the ISA states.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Error {
    /// In units of the last place. Of the exact result, which keeps within as many units of the
    /// rounded one too.
    Ulps(f64),
    Relative(f64),
    Absolute(f64),
    /// Nothing is stated, or nothing allowed.
    None,
}

/// The error of an instruction's result for an operand, with the section of the PTX ISA that
/// states it.
fn error(opcode: &str, format: Format, x: f64) -> Error {
    use std::f64::consts::PI;
    match (opcode, format) {
        // 9.7.3.13, over the full range.
        ("rcp", rounding::F32) => Error::Ulps(1.0),
        // 9.7.3.15 and 9.7.3.16, over all positive finite numbers.
        ("sqrt", rounding::F32) => Error::Relative(2f64.powi(-23)),
        ("rsqrt", rounding::F32) => Error::Relative(2f64.powf(-22.9)),
        // 9.7.3.18 and 9.7.3.19; beyond 100 pi nothing is promised.
        ("sin" | "cos", rounding::F32) if x.abs() <= 2.0 * PI => Error::Absolute(2f64.powf(-20.5)),
        ("sin" | "cos", rounding::F32) if x.abs() <= 100.0 * PI => {
            Error::Absolute(2f64.powf(-14.7))
        }
        // 9.7.3.20
        ("lg2", rounding::F32) if x > 0.5 && x < 2.0 => Error::Absolute(2f64.powi(-22)),
        ("lg2", rounding::F32) => Error::Relative(2f64.powi(-22)),
        // 9.7.3.21, from the correctly rounded result. (Older versions had 2^-22, relative.)
        ("ex2", rounding::F32) => Error::Ulps(2.0),
        // 9.7.3.22
        ("tanh", rounding::F32) => Error::Relative(2f64.powi(-11)),
        // 9.7.4.9
        ("tanh", rounding::F16) => Error::Absolute(2f64.powf(-10.987)),
        ("tanh", rounding::BF16) => Error::Absolute(2f64.powi(-8)),
        // 9.7.4.10
        ("ex2", rounding::F16) => Error::Relative(2f64.powf(-9.9)),
        ("ex2", rounding::BF16) => Error::Relative(2f64.powi(-7)),
        _ => Error::None,
    }
}

/// The error of a quotient (9.7.3.8): of `div.full` over the full range, of `div.approx` for
/// divisors that have a normal reciprocal.
fn division_error(approx: bool, divisor: f32) -> Error {
    if approx && divisor.abs() < f32::MIN_POSITIVE {
        return Error::None;
    }
    Error::Ulps(2.0)
}

/// A number from -1 to 1 that depends on all of these.
fn somewhere(seed: u64, opcode: &str, operands: [u64; 2]) -> f64 {
    let mut z = seed;
    let opcode = opcode.bytes().map(u64::from);
    for word in opcode.chain(operands) {
        // splitmix64's finaliser.
        z = (z ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    (z >> 11) as f64 / 2f64.powi(52) - 1.0
}

/// A result, moved by at most what the ISA allows beside the rounding that follows.
fn disturbed(exact: f64, error: Error, format: Format, somewhere: f64) -> f64 {
    if exact == 0.0 || !exact.is_finite() {
        return exact;
    }
    let allowed = match error {
        Error::Ulps(n) => n * format.ulp(exact),
        Error::Relative(r) => r * exact.abs(),
        Error::Absolute(a) => a,
        Error::None => 0.0,
    };
    // Rounding takes its share, at most half a unit of the larger neighbour.
    let ulp = format.ulp(exact.abs() + allowed);
    let room = (allowed - 0.5 * ulp).max(0.0) * 0.999;
    exact + room * somewhere
}

fn is_on(cx: &Cx) -> Option<u64> {
    let config = &cx.world.config;
    (config.approximation == Approximation::Disturbed).then_some(config.seed)
}

/// `rcp.approx.f32 d, a` and its like; `tanh` and `ex2` of halves too.
pub(super) fn one(i: &Instruction, f: &mut Lowering, mode: Mode) -> Result<Action, LoadError> {
    let opcode = i.opcode.clone();
    let no_such = || bad(format!("'{}' of {:?}", i.opcode, mode.ty));
    let function = function(&opcode).ok_or_else(no_such)?;
    expect_operands(i, 2..=2)?;
    match mode.ty {
        Type::F32 => {
            let d = destination::<f32>(f, &i.operands[0])?;
            let a = source::<f32>(f, &i.operands[1])?;
            Ok(Action::simple(move |cx| {
                let disturb = is_on(cx);
                let mut out = [0; LANES];
                let x = a.values(cx.regs);
                for lane in lanes(cx.mask) {
                    let x = f64::from(mode.input(f32::from_bits(x[lane])));
                    let mut y = function(x);
                    if let Some(seed) = disturb
                        && x != 0.0
                        && x.is_finite()
                    {
                        let place = somewhere(seed, &opcode, [x.to_bits(), 0]);
                        let error = error(&opcode, rounding::F32, x);
                        y = disturbed(y, error, rounding::F32, place);
                    }
                    out[lane] = mode.output(y as f32).to_bits();
                }
                let undef = a.any_undef(cx.regs);
                d.write(cx.regs, cx.mask, &out, undef);
            }))
        }
        Type::F16 | Type::F16x2 | Type::BF16 | Type::BF16x2
            if matches!(opcode.as_str(), "tanh" | "ex2") =>
        {
            let half = Half::of(mode)?;
            let ty = if half.packed { Type::B32 } else { Type::B16 };
            let d = <R32 as Slot>::destination(f, &i.operands[0], ty)?;
            let a = <R32 as Slot>::source(f, &i.operands[1], ty)?;
            Ok(Action::simple(move |cx| {
                let disturb = is_on(cx);
                let one = |bits: u32| {
                    let x = half.input(bits);
                    let mut y = function(x);
                    if let Some(seed) = disturb
                        && x != 0.0
                        && x.is_finite()
                    {
                        let place = somewhere(seed, &opcode, [x.to_bits(), 0]);
                        let error = error(&opcode, half.format, x);
                        y = disturbed(y, error, half.format, place);
                    }
                    half.round(y)
                };
                let mut out = [0; LANES];
                let x = cx.regs.get32(a);
                for lane in lanes(cx.mask) {
                    out[lane] = one(x[lane]);
                    if half.packed {
                        out[lane] |= one(x[lane] >> 16) << 16;
                    }
                }
                let u = cx.regs.undef32(a);
                let (low, high) = (u[0] | u[1], u[2] | u[3]);
                let undef = if half.packed {
                    [low, low, high, high]
                } else {
                    [low, low, 0, 0]
                };
                cx.regs.set32(d, cx.mask, &out, undef);
            }))
        }
        _ => Err(no_such()),
    }
}

/// `div.approx.f32` and `div.full.f32`.
pub(super) fn div(i: &Instruction, f: &mut Lowering, mode: Mode) -> Result<Action, LoadError> {
    expect_operands(i, 3..=3)?;
    let d = destination::<f32>(f, &i.operands[0])?;
    let a = source::<f32>(f, &i.operands[1])?;
    let b = source::<f32>(f, &i.operands[2])?;
    Ok(Action::simple(move |cx| {
        let disturb = is_on(cx);
        let mut out = [0; LANES];
        let (x, y) = (a.values(cx.regs), b.values(cx.regs));
        for lane in lanes(cx.mask) {
            let x = mode.input(f32::from_bits(x[lane]));
            let y = mode.input(f32::from_bits(y[lane]));
            let mut quotient = x / y;
            if let Some(seed) = disturb
                && x.is_finite()
                && y.is_finite()
                && y != 0.0
            {
                let bits = [x.to_bits().into(), y.to_bits().into()];
                let place = somewhere(seed, "div", bits);
                let error = division_error(mode.approx, y);
                let exact = f64::from(x) / f64::from(y);
                quotient = disturbed(exact, error, rounding::F32, place) as f32;
            }
            // `.approx` multiplies by a reciprocal, which here is no normal number and gives way to
            // a zero, as the ISA has it (9.7.3.8).
            if mode.approx && y.is_finite() && y.abs() > 2f32.powi(126) {
                quotient = x * 0f32.copysign(y);
            }
            out[lane] = mode.output(quotient).to_bits();
        }
        let undef = a.any_undef(cx.regs) | b.any_undef(cx.regs);
        d.write(cx.regs, cx.mask, &out, undef);
    }))
}
