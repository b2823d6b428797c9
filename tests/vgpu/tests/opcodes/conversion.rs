//! `cvt`, `cvt.pack` and the narrow formats.

use rustc_apfloat::ieee::{BFloat, Double, Half, Single};
use rustc_apfloat::{Float, FloatConvert, Round};

use crate::bench::{B16, B32, B64, Ty, check, check_on, int};

const INTEGERS: [(&str, usize, bool); 8] = [
    ("u8", 1, false),
    ("s8", 1, true),
    ("u16", 2, false),
    ("s16", 2, true),
    ("u32", 4, false),
    ("s32", 4, true),
    ("u64", 8, false),
    ("s64", 8, true),
];

fn register(bytes: usize) -> Ty {
    match bytes {
        1 | 2 => B16,
        4 => B32,
        _ => B64,
    }
}

fn limits(bytes: usize, signed: bool) -> (i128, i128) {
    let bits = 8 * bytes as u32;
    if signed {
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        (0, (1 << bits) - 1)
    }
}

fn integers_are_extended_truncated_and_saturated() {
    for (to, to_bytes, to_signed) in INTEGERS {
        for (from, from_bytes, from_signed) in INTEGERS {
            let (d, a) = (register(to_bytes), register(from_bytes));
            let convert = |v: u64, clamp: bool| {
                let value = int(v, from_bytes, from_signed);
                let (low, high) = limits(to_bytes, to_signed);
                let value = if clamp { value.clamp(low, high) } else { value };
                int(value as u64, to_bytes, to_signed) as u64
            };
            check(&format!("cvt.{to}.{from} %d, %a;"), d, &[a], |v| {
                Some(convert(v[0], false))
            });
            check(&format!("cvt.sat.{to}.{from} %d, %a;"), d, &[a], |v| {
                Some(convert(v[0], true))
            });
        }
    }
    // Into registers wider than the type: extended by the type's sign.
    check("cvt.s8.s32 %d, %a;", B32, &[B32], |v| {
        Some(int(v[0], 1, true) as u64)
    });
    check("cvt.u8.u64 %d, %a;", B64, &[B64], |v| Some(v[0] & 0xff));
    check("cvt.s16.s64 %d, %a;", B32, &[B64], |v| {
        Some(int(v[0], 2, true) as u64)
    });
}

const MODES: [(&str, Round); 4] = [
    ("n", Round::NearestTiesToEven),
    ("z", Round::TowardZero),
    ("m", Round::TowardNegative),
    ("p", Round::TowardPositive),
];

fn to_integers<F: Float>(name: &str, ty: Ty) {
    for (to, bytes, signed) in INTEGERS {
        for (mode, round) in MODES {
            let instruction = format!("cvt.r{mode}i.{to}.{name} %d, %a;");
            check(&instruction, register(bytes), &[ty], |v| {
                let value = F::from_bits(v[0].into());
                let bits = 8 * bytes as u32;
                let result = if value.is_nan() {
                    if ty.1 == 8 || bytes == 8 {
                        1u64 << (bits - 1)
                    } else {
                        0
                    }
                } else {
                    // Out of range it saturates, as the instruction does.
                    let mut exact = false;
                    if signed {
                        value.to_i128_r(bits as usize, round, &mut exact).value as u64
                    } else {
                        value.to_u128_r(bits as usize, round, &mut exact).value as u64
                    }
                };
                // In a wider register by the type's sign.
                Some(int(result, bytes, signed) as u64)
            });
        }
    }
}

fn floats_become_integers_in_every_rounding() {
    to_integers::<Half>("f16", B16);
    to_integers::<BFloat>("bf16", B16);
    to_integers::<Single>("f32", B32);
    to_integers::<Double>("f64", B64);
}

fn from_integers<F: Float>(name: &str, ty: Ty) {
    for (from, bytes, signed) in INTEGERS {
        for (mode, round) in MODES {
            let instruction = format!("cvt.r{mode}.{name}.{from} %d, %a;");
            check(&instruction, ty, &[register(bytes)], |v| {
                let value = int(v[0], bytes, signed);
                let value = F::from_i128_r(value, round).value;
                Some(value.to_bits() as u64)
            });
        }
    }
}

fn integers_become_floats_in_every_rounding() {
    from_integers::<Half>("f16", B16);
    from_integers::<Single>("f32", B32);
    from_integers::<Double>("f64", B64);
    from_integers::<BFloat>("bf16", B16);
}

fn between<A, B>(from: (&str, Ty), to: (&str, Ty), nan: Option<u64>, rounds: bool)
where
    A: FloatConvert<B>,
    B: Float,
{
    for (mode, round) in MODES {
        let dot = if rounds {
            format!(".r{mode}")
        } else {
            String::new()
        };
        let instruction = format!("cvt{dot}.{}.{} %d, %a;", to.0, from.0);
        check(&instruction, to.1, &[from.1], |v| {
            let mut exact = false;
            let value: B = A::from_bits(v[0].into()).convert_r(round, &mut exact).value;
            if value.is_nan() {
                return nan;
            }
            Some(value.to_bits() as u64)
        });
        if !rounds {
            break;
        }
    }
}

fn floats_become_wider_and_narrower() {
    let (f16, bf16) = (("f16", B16), ("bf16", B16));
    let (f32, f64) = (("f32", B32), ("f64", B64));
    let nan = Some(0x7fff_ffff);
    between::<Half, Single>(f16, f32, nan, false);
    between::<BFloat, Single>(bf16, f32, nan, false);
    between::<Half, Double>(f16, f64, None, false);
    between::<Single, Double>(f32, f64, None, false);
    between::<Double, Single>(f64, f32, nan, true);
    between::<Single, Half>(f32, f16, Some(0x7fff), true);
    between::<Single, BFloat>(f32, bf16, Some(0x7fff), true);
    between::<Double, Half>(f64, f16, Some(0x7fff), true);
}

fn floats_round_to_whole_numbers() {
    for (mode, round) in MODES {
        check(&format!("cvt.r{mode}i.f32.f32 %d, %a;"), B32, &[B32], |v| {
            let value = Single::from_bits(v[0].into());
            if value.is_nan() {
                return Some(0x7fff_ffff);
            }
            Some(value.round_to_integral(round).value.to_bits() as u64)
        });
    }
    check("cvt.sat.f32.f32 %d, %a;", B32, &[B32], |v| {
        let x = f32::from_bits(v[0] as u32);
        let clamped = if x > 0.0 { x.min(1.0) } else { 0.0 };
        Some(clamped.to_bits().into())
    });
    check("cvt.ftz.f32.f32 %d, %a;", B32, &[B32], |v| {
        let x = f32::from_bits(v[0] as u32);
        let x = if x.is_subnormal() {
            0f32.copysign(x)
        } else {
            x
        };
        Some(if x.is_nan() {
            0x7fff_ffff
        } else {
            x.to_bits().into()
        })
    });
}

fn two_singles_become_two_halves_the_first_one_high() {
    fn narrow<F: Float>(bits: u64, round: Round) -> u64
    where
        Single: FloatConvert<F>,
    {
        let mut exact = false;
        let value: F = Single::from_bits(bits.into())
            .convert_r(round, &mut exact)
            .value;
        if value.is_nan() {
            0x7fff
        } else {
            value.to_bits() as u64
        }
    }
    for (mode, round) in [("rn", Round::NearestTiesToEven), ("rz", Round::TowardZero)] {
        check(
            &format!("cvt.{mode}.f16x2.f32 %d, %a, %b;"),
            B32,
            &[B32, B32],
            |v| Some(narrow::<Half>(v[0], round) << 16 | narrow::<Half>(v[1], round)),
        );
        check(
            &format!("cvt.{mode}.bf16x2.f32 %d, %a, %b;"),
            B32,
            &[B32, B32],
            |v| Some(narrow::<BFloat>(v[0], round) << 16 | narrow::<BFloat>(v[1], round)),
        );
    }
    check(
        "cvt.rn.relu.bf16x2.f32 %d, %a, %b;",
        B32,
        &[B32, B32],
        |v| {
            let relu = |bits: u64| {
                let n = narrow::<BFloat>(bits, Round::NearestTiesToEven);
                if n & 0x8000 != 0 && n != 0x7fff { 0 } else { n }
            };
            Some(relu(v[0]) << 16 | relu(v[1]))
        },
    );
}

/// The values of an 8-bit format, by its definition.
fn eight(code: u8, exponent: u32, mantissa: u32, bias: i32) -> f64 {
    let e = i32::from(code >> mantissa) & ((1 << exponent) - 1);
    let m = f64::from(code & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
    let value = if e == 0 {
        m * 2f64.powi(1 - bias)
    } else {
        (1.0 + m) * 2f64.powi(e - bias)
    };
    if code & 0x80 != 0 { -value } else { value }
}

fn eight_bit_floats_are_the_nearest_of_their_values() {
    for (name, exponent, mantissa, bias, largest) in
        [("e4m3x2", 4, 3, 7, 0x7e), ("e5m2x2", 5, 2, 15, 0x7b)]
    {
        let value = |code: u8| eight(code, exponent, mantissa, bias);
        let nearest = |x: f64| -> u64 {
            if x.is_nan() {
                return 0x7f;
            }
            let sign = if x.is_sign_negative() { 0x80 } else { 0 };
            let x = x.abs();
            let best = (0..=largest)
                .min_by(|&a, &b| {
                    let (da, db) = ((value(a) - x).abs(), (value(b) - x).abs());
                    da.total_cmp(&db).then((a & 1).cmp(&(b & 1)))
                })
                .unwrap_or(0);
            u64::from(if x > value(largest) { largest } else { best } | sign)
        };
        let pair = format!("cvt.rn.satfinite.{name}.f32 %d, %a, %b;");
        check(&pair, B16, &[B32, B32], |v| {
            let of = |b: u64| nearest(f32::from_bits(b as u32).into());
            Some(of(v[0]) << 8 | of(v[1]))
        });
        let back = format!("cvt.rn.f16x2.{name} %d, %a;");
        let all: Vec<Vec<u64>> = (0..1 << 16).map(|n| vec![n]).collect();
        check_on(&back, B32, &[B16], &all, |v| {
            let half = |code: u64| {
                let code = code as u8;
                if code & 0x7f > largest {
                    let infinite = name == "e5m2x2" && code & 0x7f == 0x7c;
                    let sign = u64::from(code & 0x80) << 8;
                    return if infinite { 0x7c00 | sign } else { 0x7fff };
                }
                half::f16::from_f64(value(code)).to_bits().into()
            };
            Some(half(v[0] >> 8) << 16 | half(v[0]))
        });
        let halves = format!("cvt.rn.satfinite.{name}.f16x2 %d, %a;");
        check(&halves, B16, &[B32], |v| {
            let of = |b: u64| nearest(half::f16::from_bits(b as u16).to_f64());
            Some(of(v[0] >> 16) << 8 | of(v[0]))
        });
    }
}

fn tf32_keeps_ten_bits() {
    check("cvt.rna.tf32.f32 %d, %a;", B32, &[B32], |v| {
        let x = f32::from_bits(v[0] as u32);
        if x.is_nan() || x.is_infinite() {
            return (!x.is_nan()).then_some(v[0]);
        }
        // Half of the last kept place, then cut off: ties go away from zero.
        Some((v[0] + 0x1000) & 0xffff_e000)
    });
}

fn integers_are_packed_with_saturation() {
    for (name, bytes, signed) in [("u16", 2, false), ("s16", 2, true)] {
        let (low, high) = limits(bytes, signed);
        check(
            &format!("cvt.pack.sat.{name}.s32 %d, %a, %b;"),
            B32,
            &[B32, B32],
            |v| {
                let of = |b: u64| int(b, 4, true).clamp(low, high) as u64 & 0xffff;
                Some(of(v[0]) << 16 | of(v[1]))
            },
        );
    }
    for (name, signed) in [("u8", false), ("s8", true)] {
        let (low, high) = limits(1, signed);
        let text = format!("cvt.pack.sat.{name}.s32.b32 %d, %a, %b, %c;");
        check(&text, B32, &[B32, B32, B32], |v| {
            let of = |b: u64| int(b, 4, true).clamp(low, high) as u64 & 0xff;
            Some(v[2] << 16 | of(v[0]) << 8 | of(v[1]))
        });
    }
}

tests![
    integers_are_extended_truncated_and_saturated,
    floats_become_integers_in_every_rounding,
    integers_become_floats_in_every_rounding,
    floats_become_wider_and_narrower,
    floats_round_to_whole_numbers,
    two_singles_become_two_halves_the_first_one_high,
    eight_bit_floats_are_the_nearest_of_their_values,
    tf32_keeps_ten_bits,
    integers_are_packed_with_saturation
];
