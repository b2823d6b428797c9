//! Floating point against `rustc_apfloat`, a port of LLVM's software floating point.

use rustc_apfloat::ieee::{BFloat, Double, Half, Single};
use rustc_apfloat::{Float, Round};

use crate::bench::{B16, B32, B64, PRED, Ty, check, plain};

const ROUNDS: [(&str, Round); 4] = [
    ("rn", Round::NearestTiesToEven),
    ("rz", Round::TowardZero),
    ("rm", Round::TowardNegative),
    ("rp", Round::TowardPositive),
];

/// A NaN is a NaN; which one is for the tests of canonical NaNs.
fn same<F: Float>(bits: u64, value: F, nan: u64) -> Option<u64> {
    let _ = bits;
    Some(if value.is_nan() {
        nan
    } else {
        value.to_bits() as u64
    })
}

fn of<F: Float>(bits: u64) -> F {
    F::from_bits(bits.into())
}

/// Sum, difference, product, quotient and fused product and sum of a format.
fn arithmetic<F: Float>(ty: Ty, name: &str, rounds: &[(&str, Round)], nan: Option<u64>) {
    let result = |value: F| match nan {
        Some(nan) => same(0, value, nan),
        // Doubles keep the payload of some operand: any NaN will do.
        None => (!value.is_nan()).then(|| value.to_bits() as u64),
    };
    // Without a word it is rounded to nearest.
    for op in ["add", "sub", "mul"] {
        check(&plain(&format!("{op}.{name}"), 2), ty, &[ty, ty], |v| {
            let (a, b) = (of::<F>(v[0]), of::<F>(v[1]));
            result(match op {
                "add" => (a + b).value,
                "sub" => (a - b).value,
                _ => (a * b).value,
            })
        });
    }
    for &(suffix, round) in rounds {
        let opcode = |op: &str| plain(&format!("{op}.{suffix}.{name}"), 2);
        check(&opcode("add"), ty, &[ty, ty], |v| {
            result(of::<F>(v[0]).add_r(of(v[1]), round).value)
        });
        check(&opcode("sub"), ty, &[ty, ty], |v| {
            result(of::<F>(v[0]).sub_r(of(v[1]), round).value)
        });
        check(&opcode("mul"), ty, &[ty, ty], |v| {
            result(of::<F>(v[0]).mul_r(of(v[1]), round).value)
        });
        let fused = plain(&format!("fma.{suffix}.{name}"), 3);
        check(&fused, ty, &[ty, ty, ty], |v| {
            result(of::<F>(v[0]).mul_add_r(of(v[1]), of(v[2]), round).value)
        });
        if ty.1 > 2 {
            check(&opcode("div"), ty, &[ty, ty], |v| {
                result(of::<F>(v[0]).div_r(of(v[1]), round).value)
            });
            check(&plain(&format!("rcp.{suffix}.{name}"), 1), ty, &[ty], |v| {
                let one = F::from_u128(1).value;
                result(one.div_r(of(v[0]), round).value)
            });
        }
    }
}

fn singles_in_every_rounding() {
    arithmetic::<Single>(B32, "f32", &ROUNDS, Some(0x7fff_ffff));
}

fn doubles_in_every_rounding() {
    arithmetic::<Double>(B64, "f64", &ROUNDS, None);
}

fn halves_round_once() {
    arithmetic::<Half>(B16, "f16", &ROUNDS[..1], Some(0x7fff));
    arithmetic::<BFloat>(B16, "bf16", &ROUNDS[..1], Some(0x7fff));
}

fn packed_halves_are_two_halves() {
    fn two<F: Float>(v: &[u64], op: impl Fn(&[F]) -> F) -> Option<u64> {
        let half = |shift: u32| {
            let operands: Vec<F> = v.iter().map(|x| of(x >> shift & 0xffff)).collect();
            let value = op(&operands);
            if value.is_nan() {
                0x7fff
            } else {
                value.to_bits() as u64
            }
        };
        Some(half(16) << 16 | half(0))
    }
    fn with<F: Float>(name: &str) {
        check(&plain(&format!("add.{name}"), 2), B32, &[B32, B32], |v| {
            two::<F>(v, |o| (o[0] + o[1]).value)
        });
        check(&plain(&format!("sub.{name}"), 2), B32, &[B32, B32], |v| {
            two::<F>(v, |o| (o[0] - o[1]).value)
        });
        check(&plain(&format!("mul.{name}"), 2), B32, &[B32, B32], |v| {
            two::<F>(v, |o| (o[0] * o[1]).value)
        });
        check(
            &plain(&format!("fma.rn.{name}"), 3),
            B32,
            &[B32, B32, B32],
            |v| two::<F>(v, |o| o[0].mul_add(o[1], o[2]).value),
        );
        check(
            &plain(&format!("fma.rn.relu.{name}"), 3),
            B32,
            &[B32, B32, B32],
            |v| {
                two::<F>(v, |o| {
                    let value = o[0].mul_add(o[1], o[2]).value;
                    if value.is_negative() && !value.is_nan() {
                        F::ZERO
                    } else {
                        value
                    }
                })
            },
        );
        check(&plain(&format!("neg.{name}"), 1), B32, &[B32], |v| {
            Some(v[0] ^ 0x8000_8000)
        });
        check(&plain(&format!("abs.{name}"), 1), B32, &[B32], |v| {
            Some(v[0] & 0x7fff_7fff)
        });
    }
    with::<Half>("f16x2");
    with::<BFloat>("bf16x2");
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

fn bits(x: f32) -> Option<u64> {
    Some(if x.is_nan() {
        0x7fff_ffff
    } else {
        x.to_bits().into()
    })
}

fn single(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn subnormals_are_flushed_and_results_clamped_when_told_to() {
    let f = |v: &[u64], n: usize| flush(single(v[n]));
    let clamp = |x: f32| {
        if x.is_nan() {
            0.0
        } else {
            x.clamp(0.0, 1.0) + 0.0
        }
    };
    check(&plain("add.ftz.f32", 2), B32, &[B32, B32], |v| {
        bits(flush(f(v, 0) + f(v, 1)))
    });
    check(&plain("mul.rn.ftz.f32", 2), B32, &[B32, B32], |v| {
        bits(flush(f(v, 0) * f(v, 1)))
    });
    check(&plain("fma.rn.ftz.f32", 3), B32, &[B32, B32, B32], |v| {
        bits(flush(f(v, 0).mul_add(f(v, 1), f(v, 2))))
    });
    check(&plain("abs.ftz.f32", 1), B32, &[B32], |v| {
        Some(u64::from(f(v, 0).to_bits() & 0x7fff_ffff))
    });
    for rn in ["", ".rn"] {
        check(
            &plain(&format!("mul{rn}.ftz.f32"), 2),
            B32,
            &[B32, B32],
            |v| bits(flush(f(v, 0) * f(v, 1))),
        );
        check(
            &plain(&format!("sub{rn}.ftz.f32"), 2),
            B32,
            &[B32, B32],
            |v| bits(flush(f(v, 0) - f(v, 1))),
        );
    }
    check(&plain("neg.ftz.f32", 1), B32, &[B32], |v| {
        Some(u64::from(f(v, 0).to_bits() ^ 0x8000_0000))
    });
    check(&plain("sqrt.rn.ftz.f32", 1), B32, &[B32], |v| {
        bits(flush(f(v, 0).sqrt()))
    });
    check(&plain("div.rn.ftz.f32", 2), B32, &[B32, B32], |v| {
        bits(flush(f(v, 0) / f(v, 1)))
    });
    type Holds = fn(f32, f32) -> bool;
    let comparisons: [(&str, Holds); 6] = [
        ("eq", |a, b| a == b),
        ("lt", |a, b| a < b),
        ("gt", |a, b| a > b),
        ("equ", |a, b| a == b || a.is_nan() || b.is_nan()),
        ("neu", |a, b| a != b),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ];
    for (name, holds) in comparisons {
        let opcode = format!("setp.{name}.ftz.f32");
        check(&plain(&opcode, 2), PRED, &[B32, B32], |v| {
            Some(holds(f(v, 0), f(v, 1)).into())
        });
    }
    check(&plain("mul.sat.f32", 2), B32, &[B32, B32], |v| {
        bits(clamp(single(v[0]) * single(v[1])))
    });
    check(&plain("add.ftz.sat.f32", 2), B32, &[B32, B32], |v| {
        bits(clamp(flush(f(v, 0) + f(v, 1))))
    });
    check(&plain("add.sat.f32", 2), B32, &[B32, B32], |v| {
        bits(clamp(single(v[0]) + single(v[1])))
    });
    check(&plain("fma.rn.sat.f32", 3), B32, &[B32, B32, B32], |v| {
        bits(clamp(single(v[0]).mul_add(single(v[1]), single(v[2]))))
    });
}

fn extremes_prefer_numbers_and_order_zeros() {
    // Ordered as integers: the trick that every total order of floats rests on.
    let key = |b: u64| {
        let b = b as u32 as i32;
        if b < 0 {
            i32::MIN.wrapping_sub(b).wrapping_sub(1)
        } else {
            b
        }
    };
    for (name, max) in [("min", false), ("max", true)] {
        let choose = |v: &[u64], nan: bool| {
            let (a, b) = (single(v[0]), single(v[1]));
            match (a.is_nan(), b.is_nan()) {
                (true, true) => Some(0x7fff_ffff),
                (true, false) | (false, true) if nan => Some(0x7fff_ffff),
                (true, false) => Some(v[1]),
                (false, true) => Some(v[0]),
                _ => Some(if (key(v[0]) < key(v[1])) == max {
                    v[1]
                } else {
                    v[0]
                }),
            }
        };
        check(&plain(&format!("{name}.f32"), 2), B32, &[B32, B32], |v| {
            choose(v, false)
        });
        check(
            &plain(&format!("{name}.NaN.f32"), 2),
            B32,
            &[B32, B32],
            |v| choose(v, true),
        );
        // Halves as the singles they are exactly.
        for (half, bf16) in [("f16", false), ("bf16", true)] {
            let wide = move |b: u64| {
                let b = b as u16;
                let x = if bf16 {
                    half::bf16::from_bits(b).to_f32()
                } else {
                    half::f16::from_bits(b).to_f32()
                };
                u64::from(x.to_bits())
            };
            check(
                &plain(&format!("{name}.{half}"), 2),
                B16,
                &[B16, B16],
                |v| {
                    let (x, y) = (wide(v[0]), wide(v[1]));
                    let nan = |x: u64| single(x).is_nan();
                    if nan(x) && nan(y) {
                        return Some(0x7fff);
                    }
                    let wide_choice = choose(&[x, y], false)?;
                    Some(if wide_choice == x && !nan(x) {
                        v[0]
                    } else {
                        v[1]
                    })
                },
            );
        }
        check(
            &plain(&format!("{name}.ftz.f32"), 2),
            B32,
            &[B32, B32],
            |v| {
                let flushed = |bits: u64| u64::from(flush(single(bits)).to_bits());
                choose(&[flushed(v[0]), flushed(v[1])], false)
            },
        );
        // Two halves, and with `.NaN`.
        for (half, bf16) in [("f16x2", false), ("bf16x2", true)] {
            for nan in [false, true] {
                let opcode = format!("{name}{}.{half}", if nan { ".NaN" } else { "" });
                check(&plain(&opcode, 2), B32, &[B32, B32], |v| {
                    let wide = |b: u64| {
                        let x = if bf16 {
                            half::bf16::from_bits(b as u16).to_f32()
                        } else {
                            half::f16::from_bits(b as u16).to_f32()
                        };
                        u64::from(x.to_bits())
                    };
                    let one = |shift: u32| {
                        let (a, b) = (v[0] >> shift & 0xffff, v[1] >> shift & 0xffff);
                        let best = choose(&[wide(a), wide(b)], nan)?;
                        Some(if single(best).is_nan() {
                            0x7fff
                        } else if best == wide(a) {
                            a
                        } else {
                            b
                        })
                    };
                    Some(one(16)? << 16 | one(0)?)
                });
            }
        }
        check(
            &plain(&format!("{name}.xorsign.abs.f32"), 2),
            B32,
            &[B32, B32],
            |v| {
                let sign = (v[0] ^ v[1]) & 0x8000_0000;
                let magnitude = choose(&[v[0] & 0x7fff_ffff, v[1] & 0x7fff_ffff], false)?;
                if single(magnitude).is_nan() {
                    return None;
                }
                Some(magnitude | sign)
            },
        );
    }
}

fn roots_round_correctly() {
    // r is the root rounded down exactly if r * r <= a < next(r)^2, exactly, in integers.
    fn floor_root(a: u128) -> u128 {
        let mut low = 0u128;
        let mut high = 1u128 << 64;
        while high - low > 1 {
            let middle = (low + high) / 2;
            if middle * middle <= a {
                low = middle
            } else {
                high = middle
            }
        }
        low
    }
    for (name, round) in ROUNDS {
        check(&plain(&format!("sqrt.{name}.f32"), 1), B32, &[B32], |v| {
            let a = single(v[0]);
            if a.is_nan() || a < 0.0 {
                return Some(0x7fff_ffff);
            }
            if a == 0.0 || a.is_infinite() {
                return Some(v[0]);
            }
            // a = m 2^e with m an integer and e even; the root is floor(sqrt(m 2^2k)) 2^(e/2-k)
            // to 24 bits and more.
            let field = (v[0] >> 23 & 0xff) as i32;
            let fraction = u128::from(v[0] & 0x7f_ffff);
            let (mut m, mut e) = if field == 0 {
                (fraction, -149)
            } else {
                (fraction | 1 << 23, field - 150)
            };
            if e % 2 != 0 {
                m *= 2;
                e -= 1;
            }
            let shift = (126 - (128 - m.leading_zeros())) / 2 * 2;
            let scaled = m << shift;
            let root = floor_root(scaled);
            let exact = root * root == scaled;
            let drop = 128 - root.leading_zeros() - 24;
            let kept = root >> drop;
            let rest = root & ((1 << drop) - 1);
            let half = 1u128 << (drop - 1);
            let up = match round {
                Round::NearestTiesToEven => {
                    rest > half || (rest == half && (!exact || kept & 1 != 0))
                }
                Round::TowardPositive => rest != 0 || !exact,
                _ => false,
            };
            let value =
                (kept + u128::from(up)) as f64 * 2f64.powi(e / 2 - shift as i32 / 2 + drop as i32);
            bits(value as f32)
        });
    }
    check(&plain("sqrt.rn.f64", 1), B64, &[B64], |v| {
        let root = f64::from_bits(v[0]).sqrt();
        (!root.is_nan()).then(|| root.to_bits())
    });
    // Directed roots of doubles bracket the nearest one.
    for (name, up) in [("rm", false), ("rp", true)] {
        check(&plain(&format!("sqrt.{name}.f64"), 1), B64, &[B64], |v| {
            let a = f64::from_bits(v[0]);
            let nearest = a.sqrt();
            if nearest.is_nan() || nearest.is_infinite() || nearest == 0.0 {
                return None;
            }
            // The sign of nearest^2 - a, exactly.
            let (m, e) = whole(nearest);
            let (n, f) = whole(a);
            let square = (num(m) * num(m), 2 * e);
            let above = compare(square, (num(n), f));
            Some(
                match (above, up) {
                    (std::cmp::Ordering::Greater, false) => nearest.next_down(),
                    (std::cmp::Ordering::Less, true) => nearest.next_up(),
                    _ => nearest,
                }
                .to_bits(),
            )
        });
    }
}

/// A double as an integer times a power of two.
fn whole(x: f64) -> (u64, i32) {
    let b = x.to_bits();
    let field = (b >> 52 & 0x7ff) as i32;
    let fraction = b & ((1 << 52) - 1);
    if field == 0 {
        (fraction, -1074)
    } else {
        (fraction | 1 << 52, field - 1075)
    }
}

fn num(x: u64) -> u128 {
    x.into()
}

/// Compares a 2^e and b 2^f.
fn compare((a, e): (u128, i32), (b, f): (u128, i32)) -> std::cmp::Ordering {
    let top = |x: u128, e: i32| 128 - x.leading_zeros() as i32 + e;
    if a == 0 || b == 0 || top(a, e) != top(b, f) {
        return top(a, e).cmp(&top(b, f));
    }
    // Equal leading bits: the shifts that line them up lose nothing.
    (a << a.leading_zeros()).cmp(&(b << b.leading_zeros()))
}

type Holds = fn(f64, f64) -> bool;

// Written as the ISA words them, from the ordered comparisons alone.
#[allow(clippy::double_comparisons, clippy::neg_cmp_op_on_partial_ord)]
fn comparisons_know_of_nan() {
    let names: [(&str, Holds); 14] = [
        ("eq", |a, b| a == b),
        ("ne", |a, b| a < b || a > b),
        ("lt", |a, b| a < b),
        ("le", |a, b| a <= b),
        ("gt", |a, b| a > b),
        ("ge", |a, b| a >= b),
        ("equ", |a, b| !(a < b || a > b)),
        ("neu", |a, b| a != b),
        ("ltu", |a, b| !(a >= b)),
        ("leu", |a, b| !(a > b)),
        ("gtu", |a, b| !(a <= b)),
        ("geu", |a, b| !(a < b)),
        ("num", |a, b| !a.is_nan() && !b.is_nan()),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ];
    for (name, holds) in names {
        check(
            &plain(&format!("setp.{name}.f32"), 2),
            PRED,
            &[B32, B32],
            |v| Some(holds(single(v[0]).into(), single(v[1]).into()).into()),
        );
        check(
            &plain(&format!("setp.{name}.f64"), 2),
            PRED,
            &[B64, B64],
            |v| Some(holds(f64::from_bits(v[0]), f64::from_bits(v[1])).into()),
        );
        check(
            &plain(&format!("setp.{name}.f16"), 2),
            PRED,
            &[B16, B16],
            |v| {
                let of = |b: u64| half::f16::from_bits(b as u16).to_f64();
                Some(holds(of(v[0]), of(v[1])).into())
            },
        );
        check(
            &plain(&format!("setp.{name}.bf16"), 2),
            PRED,
            &[B16, B16],
            |v| {
                let of = |b: u64| half::bf16::from_bits(b as u16).to_f64();
                Some(holds(of(v[0]), of(v[1])).into())
            },
        );
        let high = format!("{{ .reg .pred %x; setp.{name}.f16x2 %x|%d, %a, %b; }}");
        check(&high, PRED, &[B32, B32], |v| {
            let of = |b: u64| half::f16::from_bits((b >> 16) as u16).to_f64();
            Some(holds(of(v[0]), of(v[1])).into())
        });
    }
}

fn signs_and_properties() {
    check(&plain("copysign.f32", 2), B32, &[B32, B32], |v| {
        Some((v[0] & 0x8000_0000) | (v[1] & 0x7fff_ffff))
    });
    check(&plain("copysign.f64", 2), B64, &[B64, B64], |v| {
        Some((v[0] & 1 << 63) | (v[1] & !(1 << 63)))
    });
    check(&plain("neg.f32", 1), B32, &[B32], |v| {
        Some(v[0] ^ 0x8000_0000)
    });
    check(&plain("abs.f32", 1), B32, &[B32], |v| {
        Some(v[0] & 0x7fff_ffff)
    });
    check(&plain("neg.f64", 1), B64, &[B64], |v| Some(v[0] ^ 1 << 63));
    check(&plain("abs.f64", 1), B64, &[B64], |v| {
        Some(v[0] & !(1 << 63))
    });
    check(&plain("abs.f16", 1), B16, &[B16], |v| Some(v[0] & 0x7fff));
    check(&plain("neg.f16", 1), B16, &[B16], |v| Some(v[0] ^ 0x8000));
    check(&plain("neg.bf16", 1), B16, &[B16], |v| Some(v[0] ^ 0x8000));
    check(&plain("abs.bf16", 1), B16, &[B16], |v| Some(v[0] & 0x7fff));
    let field = |v: &[u64]| (v[0] >> 23 & 0xff, v[0] & 0x7f_ffff);
    type Test = fn((u64, u64)) -> bool;
    let tests: [(&str, Test); 6] = [
        ("finite", |(e, _)| e != 255),
        ("infinite", |(e, m)| e == 255 && m == 0),
        ("number", |(e, m)| e != 255 || m == 0),
        ("notanumber", |(e, m)| e == 255 && m != 0),
        ("normal", |(e, _)| e != 0 && e != 255),
        ("subnormal", |(e, m)| e == 0 && m != 0),
    ];
    for (name, holds) in tests {
        check(&plain(&format!("testp.{name}.f32"), 1), PRED, &[B32], |v| {
            Some(holds(field(v)).into())
        });
        check(&plain(&format!("testp.{name}.f64"), 1), PRED, &[B64], |v| {
            let e = match v[0] >> 52 & 0x7ff {
                0x7ff => 255,
                e => e.min(1),
            };
            Some(holds((e, v[0] & ((1 << 52) - 1))).into())
        });
    }
}

/// The distance of two floats in steps.
fn steps(a: f32, b: f32) -> u32 {
    let key = |x: f32| {
        let b = x.to_bits() as i32;
        if b < 0 { i32::MIN - b } else { b }
    };
    key(a).abs_diff(key(b))
}

fn approximations_are_the_nearest_value_or_its_neighbour() {
    // Independent of f64's library: x^y by repeated squaring, sums of series in 128 bits would be
    // overkill for a bound of one step; the identities below need no such function.
    let run = |opcode: &str, inputs: &[f32]| -> Vec<f32> {
        let tuples: Vec<Vec<u64>> = inputs.iter().map(|x| vec![x.to_bits().into()]).collect();
        crate::bench::run(&plain(opcode, 1), B32, &[B32], &tuples)
            .into_iter()
            .map(single)
            .collect()
    };
    let inputs: Vec<f32> = (1..2000).map(|n| n as f32 * 0.37 - 300.0).collect();
    let positive: Vec<f32> = inputs.iter().map(|x| x.abs() + 0.01).collect();
    for (x, y) in positive.iter().zip(run("rcp.approx.f32", &positive)) {
        assert!(steps(y, 1.0 / x) <= 1, "1/{x}: {y}");
    }
    for (x, y) in positive.iter().zip(run("rsqrt.approx.f32", &positive)) {
        let back = 1.0 / (f64::from(y) * f64::from(y));
        assert!(
            (back / f64::from(*x) - 1.0).abs() < 2e-7,
            "1/sqrt({x}): {y}"
        );
    }
    // 2^n exactly, and 2^(x/2) squared.
    let whole: Vec<f32> = (-140..128).map(|n| n as f32).collect();
    for (n, y) in whole.iter().zip(run("ex2.approx.f32", &whole)) {
        assert_eq!(f64::from(y), 2f64.powi(*n as i32), "2^{n}");
    }
    let halves: Vec<f32> = (-60..60).map(|n| n as f32 + 0.5).collect();
    for (x, y) in halves.iter().zip(run("ex2.approx.ftz.f32", &halves)) {
        let square = f64::from(y) * f64::from(y);
        let exact = 2f64.powi((2.0 * x) as i32);
        assert!((square / exact - 1.0).abs() < 2.5e-7, "2^{x}: {y}");
    }
    for (n, y) in whole.iter().zip(run(
        "lg2.approx.f32",
        &whole
            .iter()
            .map(|&n| 2f64.powi(n as i32) as f32)
            .collect::<Vec<_>>(),
    )) {
        assert_eq!(*n, y);
    }
    // sin^2 + cos^2 = 1; sin is odd, cos even; sin(x) ~ x near zero.
    let sines = run("sin.approx.f32", &inputs);
    let cosines = run("cos.approx.f32", &inputs);
    for ((x, s), c) in inputs.iter().zip(sines).zip(cosines) {
        let one = f64::from(s) * f64::from(s) + f64::from(c) * f64::from(c);
        assert!((one - 1.0).abs() < 3e-7, "{x}: {s}, {c}");
    }
    assert_eq!(run("sin.approx.f32", &[1e-6]), [1e-6]);
    // tanh(x) = (e^2x - 1) / (e^2x + 1)
    let small: Vec<f32> = (-100..100).map(|n| n as f32 * 0.05).collect();
    for (x, y) in small.iter().zip(run("tanh.approx.f32", &small)) {
        let e = (2.0 * f64::from(*x)).exp();
        assert!(
            (f64::from(y) - (e - 1.0) / (e + 1.0)).abs() < 1e-7,
            "tanh {x}: {y}"
        );
    }
    for (opcode, input, expected) in [
        ("rcp.approx.f32", 0.0f32, f32::INFINITY),
        ("rcp.approx.ftz.f32", 1e-40, f32::INFINITY),
        ("rsqrt.approx.f32", -0.0, f32::NEG_INFINITY),
        ("ex2.approx.f32", f32::NEG_INFINITY, 0.0),
        ("lg2.approx.f32", 0.0, f32::NEG_INFINITY),
        ("tanh.approx.f32", f32::INFINITY, 1.0),
        ("sqrt.approx.f32", 4.0, 2.0),
    ] {
        assert_eq!(run(opcode, &[input]), [expected], "{opcode} {input}");
    }
    check(&plain("div.full.f32", 2), B32, &[B32, B32], |v| {
        bits(single(v[0]) / single(v[1]))
    });
    // Divisors whose reciprocal is no normal number count as infinite.
    check(&plain("div.approx.f32", 2), B32, &[B32, B32], |v| {
        let (a, b) = (single(v[0]), single(v[1]));
        let huge = b.is_finite() && b.abs() > 2f32.powi(126);
        bits(if huge { a * 0f32.copysign(b) } else { a / b })
    });
}

tests![
    singles_in_every_rounding,
    doubles_in_every_rounding,
    halves_round_once,
    packed_halves_are_two_halves,
    subnormals_are_flushed_and_results_clamped_when_told_to,
    extremes_prefer_numbers_and_order_zeros,
    roots_round_correctly,
    comparisons_know_of_nan,
    signs_and_properties,
    approximations_are_the_nearest_value_or_its_neighbour
];
