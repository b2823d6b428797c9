use crate::bench::{B16, B32, B64, PRED, check, check_on, low, operands, plain};

fn bitwise_functions() {
    for (ty, bits) in [(B16, 16), (B32, 32), (B64, 64)] {
        let two = |name: &str| plain(&format!("{name}.b{bits}"), 2);
        check(&two("and"), ty, &[ty, ty], |v| Some(v[0] & v[1]));
        check(&two("or"), ty, &[ty, ty], |v| Some(v[0] | v[1]));
        check(&two("xor"), ty, &[ty, ty], |v| Some(v[0] ^ v[1]));
        check(&plain(&format!("not.b{bits}"), 1), ty, &[ty], |v| {
            Some(!v[0])
        });
        check(&plain(&format!("cnot.b{bits}"), 1), ty, &[ty], |v| {
            Some(u64::from(v[0] == 0))
        });
    }
}

fn predicates_combine() {
    let pairs: Vec<Vec<u64>> = (0..4).map(|n| vec![n & 1, n >> 1]).collect();
    let two = |body: &str, op: fn(bool, bool) -> bool| {
        check_on(body, PRED, &[PRED, PRED], &pairs, |v| {
            Some(op(v[0] != 0, v[1] != 0).into())
        });
    };
    two("and.pred %d, %a, %b;", |a, b| a && b);
    two("or.pred %d, %a, %b;", |a, b| a || b);
    two("xor.pred %d, %a, %b;", |a, b| a != b);
    two("not.pred %d, %a;", |a, _| !a);
    two("mov.pred %d, %b;", |_, b| b);
}

fn every_function_of_three_bits() {
    let tuples = operands(&[4, 4, 4], 64);
    let tuples = &tuples[tuples.len() - 64..];
    for table in 0..256u64 {
        let body = format!("lop3.b32 %d, %a, %b, %c, {table:#x};");
        check_on(&body, B32, &[B32, B32, B32], tuples, |v| {
            Some((0..32).fold(0, |out, bit| {
                let index = (v[0] >> bit & 1) << 2 | (v[1] >> bit & 1) << 1 | (v[2] >> bit & 1);
                out | (table >> index & 1) << bit
            }))
        });
    }
}

fn shifts_clamp_their_amount() {
    for (ty, bits) in [(B16, 16u64), (B32, 32), (B64, 64)] {
        check(&plain(&format!("shl.b{bits}"), 2), ty, &[ty, B32], |v| {
            Some(if v[1] >= bits { 0 } else { v[0] << v[1] })
        });
        for letter in ["u", "b"] {
            check(
                &plain(&format!("shr.{letter}{bits}"), 2),
                ty,
                &[ty, B32],
                |v| Some(if v[1] >= bits { 0 } else { v[0] >> v[1] }),
            );
        }
        check(&plain(&format!("shr.s{bits}"), 2), ty, &[ty, B32], |v| {
            let value = crate::bench::int(v[0], ty.1, true);
            Some((value >> v[1].min(bits - 1)) as u64)
        });
    }
}

fn funnel_shifts_take_from_both_words() {
    for (mode, wrap) in [("clamp", false), ("wrap", true)] {
        let amount = move |n: u64| if wrap { n & 31 } else { n.min(32) };
        check(
            &plain(&format!("shf.l.{mode}.b32"), 3),
            B32,
            &[B32, B32, B32],
            |v| {
                let n = amount(v[2]);
                Some(((v[1] << 32 | v[0]) << n) >> 32)
            },
        );
        check(
            &plain(&format!("shf.r.{mode}.b32"), 3),
            B32,
            &[B32, B32, B32],
            |v| Some((v[1] << 32 | v[0]) >> amount(v[2])),
        );
    }
}

fn fields_are_cut_out_and_put_in() {
    for (ty, bits) in [(B32, 32u64), (B64, 64)] {
        for (letter, signed) in [("u", false), ("s", true)] {
            let opcode = format!("bfe.{letter}{bits}");
            // The ISA's own loop.
            check(&plain(&opcode, 3), ty, &[ty, B32, B32], |v| {
                let (pos, len) = (v[1] & 0xff, v[2] & 0xff);
                let bit = |n: u64| v[0] >> n & 1;
                let sign = if !signed || len == 0 {
                    0
                } else {
                    bit((pos + len - 1).min(bits - 1))
                };
                Some((0..bits).fold(0, |d, i| {
                    let inside = i < len && pos + i < bits;
                    d | (if inside { bit(pos + i) } else { sign }) << i
                }))
            });
        }
        let body = format!("bfi.b{bits} %d, %a, %b, %c, %e;");
        check(&body, ty, &[ty, ty, B32, B32], |v| {
            let (pos, len) = (v[2] & 0xff, v[3] & 0xff);
            let mut d = v[1];
            for i in 0..len {
                if pos + i < bits && i < 64 {
                    d = d & !(1 << (pos + i)) | (v[0] >> i & 1) << (pos + i);
                }
            }
            Some(d)
        });
        check(&plain(&format!("brev.b{bits}"), 1), ty, &[ty], |v| {
            Some((0..bits).fold(0, |d, i| d | (v[0] >> i & 1) << (bits - 1 - i)))
        });
    }
    for (mode, wrap) in [("clamp", false), ("wrap", true)] {
        let of = move |n: u64| if wrap { n & 31 } else { n.min(32) };
        check(
            &plain(&format!("bmsk.{mode}.b32"), 2),
            B32,
            &[B32, B32],
            |v| {
                let (pos, len) = (of(v[0]), of(v[1]));
                Some(
                    (pos..pos + len)
                        .filter(|&n| n < 32)
                        .fold(0, |d, n| d | 1 << n),
                )
            },
        );
        for (letter, signed) in [("u32", false), ("s32", true)] {
            let opcode = format!("szext.{mode}.{letter}");
            check(&plain(&opcode, 2), B32, &[B32, B32], |v| {
                let n = of(v[1]);
                let kept = if n == 0 {
                    0
                } else {
                    low(v[0], 4) & (u64::MAX >> (64 - n))
                };
                let negative = signed && n > 0 && v[0] >> (n - 1) & 1 != 0;
                Some(if negative {
                    kept | (u64::MAX << n)
                } else {
                    kept
                })
            });
        }
    }
}

fn bytes_are_permuted() {
    let byte = |v: &[u64], n: u64| (v[1] << 32 | v[0]) >> (8 * (n & 7)) & 0xff;
    check(&plain("prmt.b32", 3), B32, &[B32, B32, B32], |v| {
        Some((0..4).fold(0, |d, i| {
            let control = v[2] >> (4 * i) & 0xf;
            let b = byte(v, control);
            let b = if control & 8 == 0 {
                b
            } else if b & 0x80 != 0 {
                0xff
            } else {
                0
            };
            d | b << (8 * i)
        }))
    });
    // The tables of the ISA, low byte first.
    let modes: [(&str, [[u64; 4]; 4]); 6] = [
        (
            "f4e",
            [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
        ),
        (
            "b4e",
            [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
        ),
        ("rc8", [[0; 4], [1; 4], [2; 4], [3; 4]]),
        (
            "ecl",
            [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
        ),
        (
            "ecr",
            [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
        ),
        (
            "rc16",
            [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
        ),
    ];
    for (mode, table) in modes {
        check(
            &plain(&format!("prmt.b32.{mode}"), 3),
            B32,
            &[B32, B32, B32],
            |v| {
                let row = table[(v[2] & 3) as usize];
                Some((0..4).fold(0, |d, i| d | byte(v, row[i]) << (8 * i)))
            },
        );
    }
}

fn values_are_packed_unpacked_and_selected() {
    for (ty, names) in [
        (B16, &["b16", "u16", "s16"][..]),
        (B32, &["b32", "u32", "s32", "f32"]),
        (B64, &["b64", "u64", "s64", "f64"]),
    ] {
        for name in names {
            check(&plain(&format!("mov.{name}"), 1), ty, &[ty], |v| Some(v[0]));
        }
    }
    check(
        "mov.b64 %d, {%a, %b, %c, %e};",
        B64,
        &[B16, B16, B16, B16],
        |v| Some(v[3] << 48 | v[2] << 32 | v[1] << 16 | v[0]),
    );
    check(
        "{ .reg .b16 %x, %y; mov.b64 {%x, _, %d, %y}, %a; }",
        B16,
        &[B64],
        |v| Some(v[0] >> 32),
    );
    check(
        "{ .reg .b32 %x; mov.b64 {%d, %x}, %a; }",
        B32,
        &[B64],
        |v| Some(v[0]),
    );
    check("mov.b64 %d, {%a, %b};", B64, &[B32, B32], |v| {
        Some(v[1] << 32 | v[0])
    });
    check("mov.b32 %d, {%a, %b};", B32, &[B16, B16], |v| {
        Some(v[1] << 16 | v[0])
    });
    check("{ .reg .b32 %x; mov.b64 {_, %d}, %a; }", B32, &[B64], |v| {
        Some(v[0] >> 32)
    });
    check(
        "{ .reg .b16 %x; mov.b32 {%d, %x}, %a; }",
        B16,
        &[B32],
        |v| Some(v[0]),
    );
    for (ty, name) in [(B16, "b16"), (B32, "f32"), (B64, "s64")] {
        check(
            &format!("selp.{name} %d, %a, %b, %c;"),
            ty,
            &[ty, ty, PRED],
            |v| Some(if v[2] & 1 != 0 { v[0] } else { v[1] }),
        );
        let from_s32 = |v: &[u64]| Some(if (v[2] as i32) >= 0 { v[0] } else { v[1] });
        check(
            &format!("slct.{name}.s32 %d, %a, %b, %c;"),
            ty,
            &[ty, ty, B32],
            from_s32,
        );
        check(
            &format!("slct.{name}.f32 %d, %a, %b, %c;"),
            ty,
            &[ty, ty, B32],
            |v| {
                Some(if f32::from_bits(v[2] as u32) >= 0.0 {
                    v[0]
                } else {
                    v[1]
                })
            },
        );
    }
}

fn integers_compare() {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let holds = |name: &str, order| match name {
        "eq" => order == Equal,
        "ne" => order != Equal,
        "lt" | "lo" => order == Less,
        "le" | "ls" => order != Greater,
        "gt" | "hi" => order == Greater,
        _ => order != Less,
    };
    for (ty, bits) in [(B16, 16), (B32, 32), (B64, 64)] {
        for (letter, signed, names) in [
            (
                "u",
                false,
                &["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"][..],
            ),
            ("s", true, &["eq", "ne", "lt", "le", "gt", "ge"]),
            ("b", false, &["eq", "ne"]),
        ] {
            for name in names {
                let opcode = format!("setp.{name}.{letter}{bits}");
                check(&plain(&opcode, 2), PRED, &[ty, ty], |v| {
                    let of = |v| crate::bench::int(v, ty.1, signed);
                    Some(holds(name, of(v[0]).cmp(&of(v[1]))).into())
                });
            }
        }
    }
    // With a predicate joined to it, and the second result.
    for (join, op) in [
        ("and", (|a, b| a && b) as fn(bool, bool) -> bool),
        ("or", |a, b| a || b),
        ("xor", |a, b| a != b),
    ] {
        let first = format!("setp.lt.{join}.s32 %d, %a, %b, !%c;");
        check(&first, PRED, &[B32, B32, PRED], |v| {
            let c = v[2] & 1 == 0;
            Some(op((v[0] as i32) < (v[1] as i32), c).into())
        });
        let second = format!("{{ .reg .pred %x; setp.lt.{join}.s32 %x|%d, %a, %b, %c; }}");
        check(&second, PRED, &[B32, B32, PRED], |v| {
            let c = v[2] & 1 != 0;
            Some(op((v[0] as i32) >= (v[1] as i32), c).into())
        });
    }
    check("set.lt.u32.s32 %d, %a, %b;", B32, &[B32, B32], |v| {
        Some(if (v[0] as i32) < (v[1] as i32) {
            0xffff_ffff
        } else {
            0
        })
    });
    check("set.gt.f32.u32 %d, %a, %b;", B32, &[B32, B32], |v| {
        Some(if v[0] > v[1] {
            u64::from(1f32.to_bits())
        } else {
            0
        })
    });
}

tests![
    bitwise_functions,
    predicates_combine,
    every_function_of_three_bits,
    shifts_clamp_their_amount,
    funnel_shifts_take_from_both_words,
    fields_are_cut_out_and_put_in,
    bytes_are_permuted,
    values_are_packed_unpacked_and_selected,
    integers_compare
];
