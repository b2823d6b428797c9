use crate::bench::{B16, B32, B64, Ty, check, int, plain};

const TYPES: [(&str, Ty, bool); 6] = [
    ("u16", B16, false),
    ("s16", B16, true),
    ("u32", B32, false),
    ("s32", B32, true),
    ("u64", B64, false),
    ("s64", B64, true),
];

/// The limits of a type.
fn limits(bytes: usize, signed: bool) -> (i128, i128) {
    let bits = 8 * bytes;
    if signed {
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        (0, (1 << bits) - 1)
    }
}

/// A binary operation of all integer types, in 128 bits.
fn binary(opcode: &str, op: impl Fn(i128, i128) -> Option<i128> + Copy) {
    for (name, ty, signed) in TYPES {
        check(&plain(&format!("{opcode}.{name}"), 2), ty, &[ty, ty], |v| {
            op(int(v[0], ty.1, signed), int(v[1], ty.1, signed)).map(|r| r as u64)
        });
    }
}

fn sums_and_differences_wrap() {
    binary("add", |a, b| Some(a.wrapping_add(b)));
    binary("sub", |a, b| Some(a.wrapping_sub(b)));
}

fn sums_and_differences_saturate_when_told_to() {
    let (low, high) = limits(4, true);
    for (opcode, sign) in [("add.sat.s32", 1), ("sub.sat.s32", -1)] {
        check(&plain(opcode, 2), B32, &[B32, B32], |v| {
            let sum = int(v[0], 4, true) + sign * int(v[1], 4, true);
            Some(sum.clamp(low, high) as u64)
        });
    }
}

fn packed_halves_add_and_compare_apart() {
    let both = |v: &[u64], op: &dyn Fn(u16, u16) -> u16| {
        let low = op(v[0] as u16, v[1] as u16);
        let high = op((v[0] >> 16) as u16, (v[1] >> 16) as u16);
        Some(u64::from(high) << 16 | u64::from(low))
    };
    for name in ["u16x2", "s16x2"] {
        check(&plain(&format!("add.{name}"), 2), B32, &[B32, B32], |v| {
            both(v, &u16::wrapping_add)
        });
    }
    check(&plain("min.u16x2", 2), B32, &[B32, B32], |v| {
        both(v, &u16::min)
    });
    check(&plain("max.u16x2", 2), B32, &[B32, B32], |v| {
        both(v, &u16::max)
    });
    check(&plain("min.s16x2", 2), B32, &[B32, B32], |v| {
        both(v, &|a, b| (a as i16).min(b as i16) as u16)
    });
    check(&plain("max.relu.s16x2", 2), B32, &[B32, B32], |v| {
        both(v, &|a, b| (a as i16).max(b as i16).max(0) as u16)
    });
}

fn products_have_a_low_half_a_high_half_and_a_whole() {
    binary("mul.lo", |a, b| Some(a.wrapping_mul(b)));
    for (name, ty, signed) in TYPES {
        let bits = 8 * ty.1 as u32;
        check(&plain(&format!("mul.hi.{name}"), 2), ty, &[ty, ty], |v| {
            if signed {
                Some(((int(v[0], ty.1, true) * int(v[1], ty.1, true)) >> bits) as u64)
            } else {
                Some(((u128::from(v[0]) * u128::from(v[1])) >> bits) as u64)
            }
        });
    }
    for (name, ty, wide, signed) in [
        ("u16", B16, B32, false),
        ("s16", B16, B32, true),
        ("u32", B32, B64, false),
        ("s32", B32, B64, true),
    ] {
        let product = move |v: &[u64]| int(v[0], ty.1, signed) * int(v[1], ty.1, signed);
        check(
            &plain(&format!("mul.wide.{name}"), 2),
            wide,
            &[ty, ty],
            |v| Some(product(v) as u64),
        );
        check(
            &plain(&format!("mad.wide.{name}"), 3),
            wide,
            &[ty, ty, wide],
            |v| Some((product(v) + int(v[2], wide.1, false)) as u64),
        );
    }
}

fn multiply_add_takes_either_half() {
    for (name, ty, signed) in TYPES {
        let bits = 8 * ty.1 as u32;
        check(
            &plain(&format!("mad.lo.{name}"), 3),
            ty,
            &[ty, ty, ty],
            |v| Some(v[0].wrapping_mul(v[1]).wrapping_add(v[2])),
        );
        check(
            &plain(&format!("mad.hi.{name}"), 3),
            ty,
            &[ty, ty, ty],
            |v| {
                let high = if signed {
                    ((int(v[0], ty.1, true) * int(v[1], ty.1, true)) >> bits) as u64
                } else {
                    ((u128::from(v[0]) * u128::from(v[1])) >> bits) as u64
                };
                Some(high.wrapping_add(v[2]))
            },
        );
    }
    let (low, high) = limits(4, true);
    check(&plain("mad.hi.sat.s32", 3), B32, &[B32, B32, B32], |v| {
        let sum = ((int(v[0], 4, true) * int(v[1], 4, true)) >> 32) + int(v[2], 4, true);
        Some(sum.clamp(low, high) as u64)
    });
}

fn twenty_four_bits_multiply() {
    for (name, signed) in [("u32", false), ("s32", true)] {
        let product = move |v: &[u64]| {
            let low = |x: u64| {
                let x = int(x & 0xff_ffff, 4, false);
                if signed && x >= 1 << 23 {
                    x - (1 << 24)
                } else {
                    x
                }
            };
            low(v[0]) * low(v[1])
        };
        check(
            &plain(&format!("mul24.lo.{name}"), 2),
            B32,
            &[B32, B32],
            |v| Some(product(v) as u64),
        );
        check(
            &plain(&format!("mul24.hi.{name}"), 2),
            B32,
            &[B32, B32],
            |v| Some((product(v) >> 16) as u64),
        );
        check(
            &plain(&format!("mad24.lo.{name}"), 3),
            B32,
            &[B32, B32, B32],
            |v| Some((product(v) + int(v[2], 4, false)) as u64),
        );
    }
}

fn division_truncates_and_by_zero_is_unspecified() {
    binary("div", |a, b| (b != 0).then(|| a / b));
    binary("rem", |a, b| (b != 0).then(|| a % b));
}

fn signs_and_extremes() {
    binary("min", |a, b| Some(a.min(b)));
    binary("max", |a, b| Some(a.max(b)));
    for (name, ty, signed) in TYPES.into_iter().filter(|t| t.2) {
        check(&plain(&format!("abs.{name}"), 1), ty, &[ty], |v| {
            Some(int(v[0], ty.1, signed).unsigned_abs() as u64)
        });
        check(&plain(&format!("neg.{name}"), 1), ty, &[ty], |v| {
            Some(-int(v[0], ty.1, signed) as u64)
        });
    }
    check(&plain("max.relu.s32", 2), B32, &[B32, B32], |v| {
        Some(int(v[0], 4, true).max(int(v[1], 4, true)).max(0) as u64)
    });
    for (name, ty, signed) in TYPES {
        check(&plain(&format!("sad.{name}"), 3), ty, &[ty, ty, ty], |v| {
            let difference = (int(v[0], ty.1, signed) - int(v[1], ty.1, signed)).abs();
            Some((difference as u64).wrapping_add(v[2]))
        });
    }
}

fn bits_are_counted_and_found() {
    for (ty, bits) in [(B32, 32u32), (B64, 64)] {
        let bit = |v: u64, n: u32| v >> n & 1 != 0;
        check(&plain(&format!("popc.b{bits}"), 1), B32, &[ty], |v| {
            Some((0..bits).filter(|&n| bit(v[0], n)).count() as u64)
        });
        check(&plain(&format!("clz.b{bits}"), 1), B32, &[ty], |v| {
            Some((0..bits).rev().take_while(|&n| !bit(v[0], n)).count() as u64)
        });
        for (letter, signed) in [("u", false), ("s", true)] {
            let find = |v: u64| {
                let sign = signed && bit(v, bits - 1);
                (0..bits).rev().find(|&n| bit(v, n) != sign)
            };
            check(
                &plain(&format!("bfind.{letter}{bits}"), 1),
                B32,
                &[ty],
                |v| Some(find(v[0]).map_or(u64::from(u32::MAX), u64::from)),
            );
            let shift = format!("bfind.shiftamt.{letter}{bits}");
            check(&plain(&shift, 1), B32, &[ty], |v| {
                Some(find(v[0]).map_or(u64::from(u32::MAX), |n| u64::from(bits - 1 - n)))
            });
        }
    }
    check(&plain("fns.b32", 3), B32, &[B32, B32, B32], |v| {
        let (mask, base, offset) = (v[0] as u32, v[1] as u32, v[2] as i32);
        if base > 31 {
            return None;
        }
        let set = |n: &i64| mask >> n & 1 != 0;
        let none = u64::from(u32::MAX);
        let nth = |mut list: Box<dyn Iterator<Item = i64>>, n: usize| {
            list.nth(n).map_or(none, |bit| bit as u64)
        };
        let base = i64::from(base);
        Some(match offset {
            0 => {
                if set(&base) {
                    base as u64
                } else {
                    none
                }
            }
            n if n > 0 => nth(
                Box::new((base..32).filter(move |b| mask >> b & 1 != 0)),
                n as usize - 1,
            ),
            n => nth(
                Box::new((0..=base).rev().filter(move |b| mask >> b & 1 != 0)),
                n.unsigned_abs() as usize - 1,
            ),
        })
    });
}

fn bytes_and_halves_make_dot_products() {
    for (a, signed_a) in [("u32", false), ("s32", true)] {
        for (b, signed_b) in [("u32", false), ("s32", true)] {
            check(
                &plain(&format!("dp4a.{a}.{b}"), 3),
                B32,
                &[B32, B32, B32],
                |v| {
                    let sum: i128 = (0..4)
                        .map(|n| {
                            int(v[0] >> (8 * n), 1, signed_a) * int(v[1] >> (8 * n), 1, signed_b)
                        })
                        .sum();
                    Some((sum + int(v[2], 4, false)) as u64)
                },
            );
            for (part, first) in [("lo", 0), ("hi", 2)] {
                let opcode = format!("dp2a.{part}.{a}.{b}");
                check(&plain(&opcode, 3), B32, &[B32, B32, B32], |v| {
                    let sum: i128 = (0..2)
                        .map(|n| {
                            int(v[0] >> (16 * n), 2, signed_a)
                                * int(v[1] >> (8 * (n + first)), 1, signed_b)
                        })
                        .sum();
                    Some((sum + int(v[2], 4, false)) as u64)
                });
            }
        }
    }
}

fn carries_chain_words_into_longer_numbers() {
    // a + b and a - b of 64 bits, from words of 32.
    for (opcode, subtract) in [("add", false), ("sub", true)] {
        let body = format!(
            "{{ .reg .b32 %al, %ah, %bl, %bh; mov.b64 {{%al, %ah}}, %a; mov.b64 {{%bl, %bh}}, %b;\n\
             {opcode}.cc.u32 %al, %al, %bl; {opcode}c.u32 %ah, %ah, %bh;\n\
             mov.b64 %d, {{%al, %ah}}; }}"
        );
        check(&body, B64, &[B64, B64], |v| {
            Some(if subtract {
                v[0].wrapping_sub(v[1])
            } else {
                v[0].wrapping_add(v[1])
            })
        });
    }
    // The borrow itself: 0 - 0 - borrow.
    let body = "{ .reg .b64 %t; sub.cc.u64 %t, %a, %b; subc.u64 %d, 0, 0; }";
    check(body, B64, &[B64, B64], |v| {
        Some(if v[0] < v[1] { u64::MAX } else { 0 })
    });
    // a * b + c of 64 bits by words: (al bl) + (al bh + ah bl) 2^32.
    let body = "{ .reg .b32 %al, %ah, %bl, %bh, %cl, %ch, %l, %h;\n\
                mov.b64 {%al, %ah}, %a; mov.b64 {%bl, %bh}, %b; mov.b64 {%cl, %ch}, %c;\n\
                mad.lo.cc.u32 %l, %al, %bl, %cl; madc.hi.u32 %h, %al, %bl, %ch;\n\
                mad.lo.u32 %h, %al, %bh, %h; mad.lo.u32 %h, %ah, %bl, %h;\n\
                mov.b64 %d, {%l, %h}; }";
    check(body, B64, &[B64, B64, B64], |v| {
        Some(v[0].wrapping_mul(v[1]).wrapping_add(v[2]))
    });
}

tests![
    sums_and_differences_wrap,
    sums_and_differences_saturate_when_told_to,
    packed_halves_add_and_compare_apart,
    products_have_a_low_half_a_high_half_and_a_whole,
    multiply_add_takes_either_half,
    twenty_four_bits_multiply,
    division_truncates_and_by_zero_is_unspecified,
    signs_and_extremes,
    bits_are_counted_and_found,
    bytes_and_halves_make_dot_products,
    carries_chain_words_into_longer_numbers
];
