//! `atom` and `red`: every operation of every type in every space, against integers of 128 bits,
//! the ISA's formulas and soft floating point.

use rustc_apfloat::Float;
use rustc_apfloat::ieee::{BFloat, Half};

use crate::bench::{Program, int, low, note, operands};

/// The new value from the old one and the operands; the last says whether the memory is shared.
type Update = fn(u64, u64, u64, bool) -> u64;

/// Operation, type, bytes, update.
type Case = (&'static str, &'static str, usize, Update);

fn single(a: u64, b: u64, shared: bool) -> u64 {
    // Atomics on shared memory keep subnormals, those on global memory flush them.
    let flush = |x: f32| {
        if !shared && x.is_subnormal() {
            0f32.copysign(x)
        } else {
            x
        }
    };
    let of = |x: u64| flush(f32::from_bits(x as u32));
    let sum = flush(of(a) + of(b));
    u64::from(if sum.is_nan() {
        0x7fff_ffff
    } else {
        sum.to_bits()
    })
}

fn half<F: Float>(a: u64, b: u64) -> u64 {
    let of = |x: u64| F::from_bits(u128::from(x & 0xffff));
    let sum = (of(a) + of(b)).value;
    if sum.is_nan() {
        0x7fff
    } else {
        sum.to_bits() as u64
    }
}

fn halves<F: Float>(a: u64, b: u64) -> u64 {
    half::<F>(a, b) | half::<F>(a >> 16, b >> 16) << 16
}

const CASES: [Case; 40] = [
    ("add", "u32", 4, |a, b, _, _| a + b),
    ("add", "s32", 4, |a, b, _, _| a + b),
    ("add", "u64", 8, |a, b, _, _| {
        (u128::from(a) + u128::from(b)) as u64
    }),
    ("add", "s64", 8, |a, b, _, _| {
        (u128::from(a) + u128::from(b)) as u64
    }),
    ("add", "f32", 4, |a, b, _, shared| single(a, b, shared)),
    ("add", "f64", 8, |a, b, _, _| {
        (f64::from_bits(a) + f64::from_bits(b)).to_bits()
    }),
    ("add.noftz", "f16", 2, |a, b, _, _| half::<Half>(a, b)),
    ("add.noftz", "bf16", 2, |a, b, _, _| half::<BFloat>(a, b)),
    ("add.noftz", "f16x2", 4, |a, b, _, _| halves::<Half>(a, b)),
    ("add.noftz", "bf16x2", 4, |a, b, _, _| {
        halves::<BFloat>(a, b)
    }),
    ("min", "u32", 4, |a, b, _, _| if a < b { a } else { b }),
    ("max", "u32", 4, |a, b, _, _| if a > b { a } else { b }),
    ("min", "s32", 4, |a, b, _, _| {
        if int(a, 4, true) < int(b, 4, true) {
            a
        } else {
            b
        }
    }),
    ("max", "s32", 4, |a, b, _, _| {
        if int(a, 4, true) > int(b, 4, true) {
            a
        } else {
            b
        }
    }),
    ("min", "u64", 8, |a, b, _, _| if a < b { a } else { b }),
    ("max", "u64", 8, |a, b, _, _| if a > b { a } else { b }),
    ("min", "s64", 8, |a, b, _, _| {
        if int(a, 8, true) < int(b, 8, true) {
            a
        } else {
            b
        }
    }),
    ("max", "s64", 8, |a, b, _, _| {
        if int(a, 8, true) > int(b, 8, true) {
            a
        } else {
            b
        }
    }),
    ("inc", "u32", 4, |a, b, _, _| if a >= b { 0 } else { a + 1 }),
    (
        "dec",
        "u32",
        4,
        |a, b, _, _| if a == 0 || a > b { b } else { a - 1 },
    ),
    ("and", "b32", 4, |a, b, _, _| a & b),
    ("or", "b32", 4, |a, b, _, _| a | b),
    ("xor", "b32", 4, |a, b, _, _| a ^ b),
    ("and", "b64", 8, |a, b, _, _| a & b),
    ("or", "b64", 8, |a, b, _, _| a | b),
    ("xor", "b64", 8, |a, b, _, _| a ^ b),
    ("exch", "b32", 4, |_, b, _, _| b),
    ("exch", "u32", 4, |_, b, _, _| b),
    ("exch", "s32", 4, |_, b, _, _| b),
    ("exch", "f32", 4, |_, b, _, _| b),
    ("exch", "b64", 8, |_, b, _, _| b),
    ("exch", "u64", 8, |_, b, _, _| b),
    ("cas", "b16", 2, |a, b, c, _| if a == b { c } else { a }),
    ("cas", "b32", 4, |a, b, c, _| if a == b { c } else { a }),
    ("cas", "u32", 4, |a, b, c, _| if a == b { c } else { a }),
    ("cas", "s32", 4, |a, b, c, _| if a == b { c } else { a }),
    ("cas", "b64", 8, |a, b, c, _| if a == b { c } else { a }),
    ("cas", "u64", 8, |a, b, c, _| if a == b { c } else { a }),
    ("cas", "s64", 8, |a, b, c, _| if a == b { c } else { a }),
    ("exch", "f64", 8, |_, b, _, _| b),
];

/// Old values and operands: pairs that are equal occur often enough for compare-and-swap.
fn tuples(size: usize, random: usize) -> Vec<Vec<u64>> {
    let mut list = operands(&[size, size, size], random);
    for (n, tuple) in list.iter_mut().enumerate() {
        if n % 3 == 0 {
            tuple[1] = tuple[0];
        }
    }
    list
}

/// Every thread does one operation on a word of its own.
fn run_one(name: &str, case: Case, shared: bool, generic: bool, random: usize) {
    if note(name) {
        return;
    }
    let (_, ty, size, update) = case;
    let reduction = name.starts_with("red");
    let letter = match size {
        2 => "%h",
        4 => "%r",
        _ => "%d",
    };
    let bits = 8 * size;
    let tuples = tuples(size, random);
    let input: Vec<u64> = tuples.iter().flatten().copied().collect();
    let address = match (shared, generic) {
        (false, _) => "add.s64 %d40, %d31, 0;".to_owned(),
        (true, false) => "mov.u64 %d40, s; add.s64 %d40, %d40, %d33;".to_owned(),
        (true, true) => "cvta.shared.u64 %d40, s; add.s64 %d40, %d40, %d33;".to_owned(),
    };
    let space = match (shared, generic) {
        (_, true) => "",
        (true, false) => ".shared",
        (false, false) => ".global",
    };
    let result = if reduction {
        String::new()
    } else {
        format!("{letter}10, ")
    };
    let third = if name.contains("cas") {
        format!(", {letter}2")
    } else {
        String::new()
    };
    let keep = if reduction {
        String::new()
    } else {
        format!("st.global.b{bits} [%d31+8], {letter}10;")
    };
    let _ = ty;
    let body = format!(
        ".shared .align 8 .b8 s[2048]; .reg .pred %skip;\n\
         setp.ge.u32 %skip, %t, {}; @%skip ret;\n\
         mul.wide.u32 %d30, %t, 24; add.s64 %d30, %in, %d30;\n\
         mul.wide.u32 %d31, %t, 16; add.s64 %d31, %out, %d31;\n\
         mov.u32 %r30, %tid.x; mul.wide.u32 %d33, %r30, 8;\n\
         ld.global.b{bits} {letter}0, [%d30]; ld.global.b{bits} {letter}1, [%d30+8];\n\
         ld.global.b{bits} {letter}2, [%d30+16];\n{address}\n\
         st{space}.b{bits} [%d40], {letter}0;\n\
         {name} {result}[%d40], {letter}1{third};\n{keep}\n\
         ld{space}.b{bits} {letter}20, [%d40]; st.global.b{bits} [%d31], {letter}20;",
        tuples.len()
    );
    let found = Program::new(&body, bytemuck::cast_slice(&input), 16 * tuples.len())
        .threads(tuples.len() as u32)
        .run()
        .clean();
    for (tuple, out) in tuples.iter().zip(found.values::<u64>().chunks(2)) {
        let (a, b, c) = (tuple[0], tuple[1], tuple[2]);
        let expected = low(update(a, b, c, shared), size);
        if ty == "f64" && f64::from_bits(expected).is_nan() {
            assert!(f64::from_bits(out[0]).is_nan(), "{name} of {tuple:x?}");
        } else {
            assert_eq!(out[0], expected, "{name} of {tuple:x?}: {:#x}", out[0]);
        }
        if !reduction {
            assert_eq!(out[1], a, "{name} of {tuple:x?} gives the old value");
        }
    }
}

fn every_operation_of_every_type_in_every_space() {
    for case in CASES {
        let (op, ty, ..) = case;
        for (space, shared, generic) in [
            (".global", false, false),
            ("", false, true),
            (".shared", true, false),
            ("", true, true),
        ] {
            run_one(
                &format!("atom{space}.{op}.{ty}"),
                case,
                shared,
                generic,
                1500,
            );
            if !matches!(op, "cas" | "exch") {
                run_one(&format!("red{space}.{op}.{ty}"), case, shared, generic, 300);
            }
        }
    }
}

fn orders_and_scopes_change_no_value() {
    for order in ["relaxed", "acquire", "release", "acq_rel"] {
        for scope in ["cta", "cluster", "gpu", "sys"] {
            for case in [CASES[0], CASES[1], CASES[33]] {
                let (op, ty, ..) = case;
                let name = format!("atom.{op}.{order}.{scope}.{ty}");
                run_one(&name, case, false, true, 16);
                let name = format!("atom.{order}.{scope}.global.{op}.{ty}");
                run_one(&name, case, false, false, 16);
                if op != "cas" && matches!(order, "relaxed" | "release") {
                    let name = format!("red.{order}.{scope}.global.{op}.{ty}");
                    run_one(&name, case, false, false, 16);
                }
            }
        }
    }
    run_one("atom.global.sys.add.u32", CASES[0], false, false, 16);
    run_one("atom.global.gpu.add.u32", CASES[0], false, false, 16);
    run_one("atom.shared.cta.add.u32", CASES[0], true, false, 16);
}

/// All threads of several blocks on one word.
fn contend(instructions: &str, from: u32) -> (u32, Vec<u32>) {
    let body = format!(
        "mul.wide.u32 %d1, %t, 4; add.s64 %d1, %out, %d1; add.s64 %d2, %out, 3072;\n\
         {instructions}\nst.global.u32 [%d1], %r1;"
    );
    // The word stands in the output, behind the results; its first value comes with the input.
    let set = format!(
        ".reg .pred %first; setp.eq.u32 %first, %t, 0;\n\
         mov.u32 %r9, {from}; @%first atom.global.add.u32 %r8, [%out+3072], %r9;\n{body}"
    );
    let out = Program::new(&set, &[0], 3076).threads(768).run().clean();
    let values = out.values::<u32>();
    (values[768], values[..768].to_vec())
}

fn nothing_is_lost_among_many_threads() {
    let (sum, mut old) = contend("atom.global.add.u32 %r1, [%d2], 1;", 0);
    assert_eq!(sum, 768);
    old.sort_unstable();
    assert_eq!(old, (0..768).collect::<Vec<u32>>(), "every ticket once");
    let (last, mut old) = contend("atom.global.inc.u32 %r1, [%d2], 99;", 0);
    assert_eq!(last, 768 % 100);
    old.sort_unstable();
    let tickets: Vec<u32> = (0..768).map(|n| n % 100).collect();
    let mut expected = tickets.clone();
    expected.sort_unstable();
    assert_eq!(old, expected);
    let (high, _) = contend("atom.global.max.s32 %r1, [%d2], %t;", 0);
    assert_eq!(high, 767);
    let (bits, _) = contend(
        "and.b32 %r2, %t, 31; mov.u32 %r3, 1; shl.b32 %r3, %r3, %r2;\n\
         atom.global.or.b32 %r1, [%d2], %r3;",
        0,
    );
    assert_eq!(bits, u32::MAX);
    // A lock-free increment by compare-and-swap.
    let (sum, mut old) = contend(
        ".reg .pred %again; ld.relaxed.gpu.global.u32 %r1, [%d2];\n\
         loop: mov.u32 %r4, %r1; add.u32 %r5, %r4, 1;\n\
         atom.global.cas.b32 %r1, [%d2], %r4, %r5;\n\
         setp.ne.u32 %again, %r1, %r4; @%again bra loop;",
        0,
    );
    assert_eq!(sum, 768);
    old.sort_unstable();
    assert_eq!(old, (0..768).collect::<Vec<u32>>());
    let (sum, _) = contend(
        "red.relaxed.gpu.global.add.s32 [%d2], 2; mov.u32 %r1, 0;",
        5,
    );
    assert_eq!(sum, 5 + 2 * 768);
}

tests![
    every_operation_of_every_type_in_every_space,
    orders_and_scopes_change_no_value,
    nothing_is_lost_among_many_threads,
];
