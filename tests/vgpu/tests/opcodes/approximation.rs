//! The instructions that approximate, disturbed: within the errors that the PTX ISA states, and
//! using them up.

use vgpu::machine::{Approximation, Config};

use crate::bench::{B16, B32, Random, Ty, plain, run_on};

/// What is allowed.
#[derive(Debug, Clone, Copy)]
enum Allowed {
    Ulps(f64),
    Relative(f64),
    Absolute(f64),
}

fn disturbed(seed: u64) -> Config {
    Config {
        seed,
        approximation: Approximation::Disturbed,
        ..Config::default()
    }
}

/// The unit of the last place of f32 at a value, subnormals included.
fn ulp32(x: f64) -> f64 {
    let x = x.abs().max(f64::from(f32::MIN_POSITIVE));
    2f64.powi(x.log2().floor() as i32 - 23)
}

fn single(bits: u64) -> f64 {
    f64::from(f32::from_bits(bits as u32))
}

/// Compares results with the exact values: none beyond what is allowed, some beyond half of it.
fn within(
    what: &str,
    found: &[f64],
    exact: &[f64],
    allowed: impl Fn(usize) -> Allowed,
    rounding: impl Fn(f64) -> f64,
) {
    let mut largest = 0f64;
    for (n, (&y, &exact)) in found.iter().zip(exact).enumerate() {
        if exact.is_nan() {
            assert!(y.is_nan(), "{what} {n}: {y}, not a NaN");
            continue;
        }
        if exact.is_infinite() || y.is_infinite() || exact == 0.0 {
            // Overflow is where the rounded value overflows, or a neighbour does.
            let near = exact == y || exact.abs() > 3.4e38;
            assert!(near, "{what} {n}: {y}, not {exact}");
            continue;
        }
        let limit = match allowed(n) {
            Allowed::Ulps(u) => u * rounding(exact),
            Allowed::Relative(r) => r * exact.abs(),
            Allowed::Absolute(a) => a,
        };
        // Where the format is coarser than the error, rounding is all that is left.
        let limit = limit.max(0.501 * rounding(exact));
        let error = (y - exact).abs();
        assert!(
            error <= limit,
            "{what} {n}: {y}, exactly {exact}: {error:e} beyond {limit:e}"
        );
        largest = largest.max(error / limit);
    }
    assert!(
        largest > 0.5,
        "{what}: the largest error is {largest} of what is allowed"
    );
}

fn singles_stay_within_the_errors_of_the_isa() {
    use std::f64::consts::PI;
    let mut r = Random(3);
    let any: Vec<f32> = (0..4000).map(|_| f32::from_bits(r.next() as u32)).collect();
    let small: Vec<f32> = (0..4000)
        .map(|_| (r.next() as f64 / 2f64.powi(64) * 12.0 - 6.0) as f32)
        .collect();
    let wide: Vec<f32> = small.iter().map(|x| x * 50.0).collect();
    let positive: Vec<f32> = any.iter().map(|x| x.abs()).collect();
    let (tau, far) = (2.0 * PI, 100.0 * PI);
    type Function = fn(f64) -> f64;
    type Rule = fn(f64) -> Allowed;
    let cases: [(&str, Function, &[f32], Rule); 11] = [
        ("rcp", |x| 1.0 / x, &any, |_| Allowed::Ulps(1.0)),
        ("sqrt", f64::sqrt, &positive, |_| {
            Allowed::Relative(2f64.powi(-23))
        }),
        (
            "rsqrt",
            |x| 1.0 / x.sqrt(),
            &positive,
            |_| Allowed::Relative(2f64.powf(-22.9)),
        ),
        ("sin", f64::sin, &small, |_| {
            Allowed::Absolute(2f64.powf(-20.5))
        }),
        ("cos", f64::cos, &small, |_| {
            Allowed::Absolute(2f64.powf(-20.5))
        }),
        ("sin", f64::sin, &wide, |_| {
            Allowed::Absolute(2f64.powf(-14.7))
        }),
        ("cos", f64::cos, &wide, |_| {
            Allowed::Absolute(2f64.powf(-14.7))
        }),
        ("lg2", f64::log2, &positive, |x| {
            if x > 0.5 && x < 2.0 {
                Allowed::Absolute(2f64.powi(-22))
            } else {
                Allowed::Relative(2f64.powi(-22))
            }
        }),
        ("ex2", f64::exp2, &small, |_| Allowed::Ulps(2.0)),
        ("ex2", f64::exp2, &wide, |_| Allowed::Ulps(2.0)),
        ("tanh", f64::tanh, &small, |_| {
            Allowed::Relative(2f64.powi(-11))
        }),
    ];
    for (opcode, function, inputs, rule) in cases {
        let inputs: Vec<f32> = inputs
            .iter()
            .copied()
            .filter(|x| {
                f64::from(*x).abs() < far
                    || opcode == "rcp"
                    || opcode.ends_with("sqrt")
                    || opcode == "lg2"
            })
            .collect();
        let tuples: Vec<Vec<u64>> = inputs.iter().map(|x| vec![x.to_bits().into()]).collect();
        let exact: Vec<f64> = inputs.iter().map(|&x| function(x.into())).collect();
        let run = |config| -> Vec<u64> {
            run_on(
                config,
                &plain(&format!("{opcode}.approx.f32"), 1),
                B32,
                &[B32],
                &tuples,
            )
        };
        let correct = run(Config::default());
        for (n, &bits) in correct.iter().enumerate() {
            let rounded = exact[n] as f32;
            let same =
                rounded.is_nan() && single(bits).is_nan() || bits as u32 == rounded.to_bits();
            assert!(
                same,
                "{opcode} of {}: {}, not {rounded}",
                inputs[n],
                single(bits)
            );
        }
        for seed in 0..3 {
            let bits = run(disturbed(seed));
            assert_eq!(bits, run(disturbed(seed)), "the same seed gives the same");
            assert_ne!(
                bits,
                run(disturbed(seed + 100)),
                "another seed gives others"
            );
            let found: Vec<f64> = bits.iter().map(|&b| single(b)).collect();
            let allowed = |n: usize| {
                let x = f64::from(inputs[n]);
                match rule(x) {
                    Allowed::Absolute(_) if x.abs() <= tau && matches!(opcode, "sin" | "cos") => {
                        Allowed::Absolute(2f64.powf(-20.5))
                    }
                    rule => rule,
                }
            };
            within(opcode, &found, &exact, allowed, ulp32);
        }
        // With subnormals flushed, where it has the form.
        if opcode != "tanh" {
            let text = plain(&format!("{opcode}.approx.ftz.f32"), 1);
            let found = run_on(disturbed(1), &text, B32, &[B32], &tuples);
            let flush = |x: f32| {
                if x.is_subnormal() {
                    0f32.copysign(x)
                } else {
                    x
                }
            };
            for (n, &bits) in found.iter().enumerate() {
                let y = f32::from_bits(bits as u32);
                assert!(!y.is_subnormal(), "{opcode}.ftz of {}: {y}", inputs[n]);
                if inputs[n].is_subnormal() {
                    let expected = function(flush(inputs[n]).into()) as f32;
                    let same = y == expected || y.is_nan() && expected.is_nan();
                    assert!(same, "{opcode}.ftz of {}: {y}, not {expected}", inputs[n]);
                }
            }
        }
    }
}

fn quotients_stay_within_two_units() {
    let mut r = Random(5);
    let tuples: Vec<Vec<u64>> = (0..6000)
        .map(|_| vec![r.next() & 0xffff_ffff, r.next() & 0xffff_ffff])
        .collect();
    for form in [
        "div.approx.f32",
        "div.full.f32",
        "div.approx.ftz.f32",
        "div.full.ftz.f32",
    ] {
        let ftz = form.contains("ftz");
        let flush = |bits: u64| {
            let x = f32::from_bits(bits as u32);
            if ftz && x.is_subnormal() {
                0f32.copysign(x)
            } else {
                x
            }
        };
        let found: Vec<f64> = run_on(disturbed(2), &plain(form, 2), B32, &[B32, B32], &tuples)
            .into_iter()
            .map(single)
            .collect();
        let mut kept = (Vec::new(), Vec::new());
        for (tuple, y) in tuples.iter().zip(found) {
            let (a, b) = (flush(tuple[0]), flush(tuple[1]));
            let exact = f64::from(a) / f64::from(b);
            if b.is_finite() && b.abs() > 2f32.powi(126) && form.contains("approx") {
                // The reciprocal is flushed on the way.
                assert!(
                    if a.is_finite() { y == 0.0 } else { y.is_nan() },
                    "{a} / {b}: {y}"
                );
            } else if ftz && exact.abs() < 1.2e-38 {
                assert!(
                    y == 0.0 || exact.is_nan() || y.abs() < 1.2e-38,
                    "{a} / {b}: {y}"
                );
            } else {
                kept.0.push(y);
                kept.1.push(exact);
            }
        }
        within(form, &kept.0, &kept.1, |_| Allowed::Ulps(2.0), ulp32);
    }
}

/// All 65536 operands of the functions of halves.
fn halves_stay_within_the_errors_of_the_isa() {
    let all: Vec<Vec<u64>> = (0..1 << 16).map(|v| vec![v]).collect();
    let f16 = |b: u64| half::f16::from_bits(b as u16).to_f64();
    let bf16 = |b: u64| half::bf16::from_bits(b as u16).to_f64();
    type Decode = fn(u64) -> f64;
    // Form, format, function, error, exponent of the smallest normal number, mantissa.
    type Case = (&'static str, Decode, fn(f64) -> f64, Allowed, i32, i32);
    let cases: [Case; 4] = [
        (
            "tanh.approx.f16",
            f16,
            f64::tanh,
            Allowed::Absolute(2f64.powf(-10.987)),
            -14,
            10,
        ),
        (
            "tanh.approx.bf16",
            bf16,
            f64::tanh,
            Allowed::Absolute(2f64.powi(-8)),
            -126,
            7,
        ),
        (
            "ex2.approx.f16",
            f16,
            f64::exp2,
            Allowed::Relative(2f64.powf(-9.9)),
            -14,
            10,
        ),
        (
            "ex2.approx.ftz.bf16",
            bf16,
            f64::exp2,
            Allowed::Relative(2f64.powi(-7)),
            -126,
            7,
        ),
    ];
    for (form, decode, function, allowed, smallest, mantissa) in cases {
        let ulp = move |x: f64| 2f64.powi((x.abs().log2().floor() as i32).max(smallest) - mantissa);
        let largest = if mantissa == 10 { 65_504.0 } else { 3.3e38 };
        for packed in [false, true] {
            let (text, tuples, ty): (String, Vec<Vec<u64>>, Ty) = if packed {
                let both = all
                    .iter()
                    .map(|v| vec![v[0] << 16 | (v[0] ^ 0x155)])
                    .collect();
                (format!("{form}x2"), both, B32)
            } else {
                (form.to_owned(), all.clone(), B16)
            };
            let out = run_on(disturbed(9), &plain(&text, 1), ty, &[ty], &tuples);
            for shift in if packed { &[0, 16][..] } else { &[0] } {
                let (mut found, mut exact) = (Vec::new(), Vec::new());
                for (tuple, y) in tuples.iter().zip(&out) {
                    let x = decode(tuple[0] >> shift & 0xffff);
                    let (y, e) = (decode(y >> shift & 0xffff), function(x));
                    // Near overflow either side is right; below the normal numbers some flush.
                    if e.is_finite() && e.abs() < largest && e.abs() > 2f64.powi(smallest) {
                        found.push(y);
                        exact.push(e);
                    } else if e.is_nan() {
                        assert!(y.is_nan(), "{text} of {x}: {y}");
                    }
                }
                within(&text, &found, &exact, |_| allowed, ulp);
            }
        }
    }
}

fn special_operands_give_what_the_isa_lists() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for (form, table) in [
        (
            "rcp.approx.f32",
            &[
                (inf, 0.0),
                (-inf, -0.0),
                (0.0, inf),
                (-0.0, -inf),
                (nan, nan),
            ][..],
        ),
        (
            "sqrt.approx.f32",
            &[
                (-inf, nan),
                (-1.0, nan),
                (-0.0, -0.0),
                (0.0, 0.0),
                (inf, inf),
                (nan, nan),
            ],
        ),
        (
            "rsqrt.approx.f32",
            &[
                (-inf, nan),
                (-1.0, nan),
                (-0.0, -inf),
                (0.0, inf),
                (inf, 0.0),
                (nan, nan),
            ],
        ),
        (
            "sin.approx.f32",
            &[
                (-inf, nan),
                (inf, nan),
                (-0.0, -0.0),
                (0.0, 0.0),
                (nan, nan),
            ],
        ),
        (
            "cos.approx.f32",
            &[(-inf, nan), (inf, nan), (-0.0, 1.0), (0.0, 1.0), (nan, nan)],
        ),
        (
            "lg2.approx.f32",
            &[
                (-inf, nan),
                (-1.0, nan),
                (-0.0, -inf),
                (0.0, -inf),
                (inf, inf),
                (nan, nan),
            ],
        ),
        (
            "ex2.approx.f32",
            &[(-inf, 0.0), (-0.0, 1.0), (0.0, 1.0), (inf, inf), (nan, nan)],
        ),
        (
            "tanh.approx.f32",
            &[
                (-inf, -1.0),
                (-0.0, -0.0),
                (0.0, 0.0),
                (inf, 1.0),
                (nan, nan),
            ],
        ),
    ] {
        let tuples: Vec<Vec<u64>> = table.iter().map(|t| vec![t.0.to_bits().into()]).collect();
        for config in [Config::default(), disturbed(4)] {
            let out = run_on(config, &plain(form, 1), B32, &[B32], &tuples);
            for (&(x, expected), bits) in table.iter().zip(out) {
                let expected = if expected.is_nan() {
                    0x7fff_ffff
                } else {
                    expected.to_bits()
                };
                assert_eq!(bits as u32, expected, "{form} of {x}");
            }
        }
    }
}

tests![
    singles_stay_within_the_errors_of_the_isa,
    quotients_stay_within_two_units,
    halves_stay_within_the_errors_of_the_isa,
    special_operands_give_what_the_isa_lists,
];
