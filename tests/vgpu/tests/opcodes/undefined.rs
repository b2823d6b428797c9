//! Values that nobody wrote, on their way through registers.
//!
//! Registers get bytes that nobody wrote, at random; an instruction works on them. Then the same
//! instruction works on the same values with those bytes filled in several ways. A byte of the
//! result that comes out differently depends on what nobody wrote and must count as undefined;
//! and for what moves and masks bits, one that comes out the same must count as defined.

use vgpu::machine::Config;
use vgpu::rig::Rig;

use crate::bench::{B16, B32, B64, PRED, Random, Ty, low, note, run};

/// Fillings of the undefined bytes.
const FILLINGS: usize = 24;
const TUPLES: usize = 160;

/// Runs `body` on registers whose bytes in `holes` nobody wrote; the bytes of each result that
/// count as undefined.
fn undefined(body: &str, d: Ty, sources: &[Ty], tuples: &[Vec<u64>], holes: &[Vec<u8>]) -> Vec<u8> {
    let names = ["%a", "%b", "%c", "%e", "%f"];
    let register = |ty: Ty, name: &str| format!(".reg .{} {name};\n", ty.0);
    let mut text = String::from(
        ".version 8.7\n.target sm_90\n.address_size 64\n\
         .visible .entry k(.param .u64 out, .param .u64 in)\n{\n\
         .shared .align 8 .b8 s[1280]; .reg .b64 %po, %pi, %off; .reg .b32 %i, %sh, %hole, %bit;\n\
         .reg .b16 %byte; .reg .pred %skip;\n",
    );
    text += &register(d, "%d");
    for (ty, name) in sources.iter().zip(names) {
        text += &register(*ty, name);
    }
    let stride = 16 * sources.len();
    text += &format!(
        "ld.param.u64 %po, [out]; ld.param.u64 %pi, [in]; mov.u32 %i, %ctaid.x;\n\
         mov.u32 %sh, %ntid.x; mul.lo.u32 %i, %i, %sh; mov.u32 %sh, %tid.x; add.u32 %i, %i, %sh;\n\
         mul.lo.u32 %sh, %sh, 40; mov.u32 %bit, s; add.u32 %sh, %sh, %bit;\n\
         mul.wide.u32 %off, %i, {stride}; add.u64 %pi, %pi, %off;\n\
         mul.wide.u32 %off, %i, 8; add.u64 %po, %po, %off;\n"
    );
    for (n, (ty, name)) in sources.iter().zip(names).enumerate() {
        // Only the bytes outside the holes are written; then the register is loaded whole.
        let bytes = ty.1.max(4);
        text += &format!("ld.global.u32 %hole, [%pi+{}];\n", 16 * n + 8);
        for byte in 0..bytes {
            text += &format!(
                "shr.u32 %bit, %hole, {byte}; and.b32 %bit, %bit, 1; setp.ne.u32 %skip, %bit, 0;\n\
                 ld.global.u8 %byte, [%pi+{}]; @!%skip st.shared.u8 [%sh+{}], %byte;\n",
                16 * n + byte,
                8 * n + byte
            );
        }
        if *ty == PRED {
            text += &format!(
                "{{ .reg .b32 %v; ld.shared.b32 %v, [%sh+{}]; and.b32 %v, %v, 1;\n\
                 setp.ne.b32 {name}, %v, 0; }}\n",
                8 * n
            );
        } else {
            text += &format!("ld.shared.{} {name}, [%sh+{}];\n", ty.0, 8 * n);
        }
    }
    text += body;
    text += &match d {
        PRED => "\n{ .reg .b32 %v; selp.b32 %v, 1, 0, %d; st.global.b32 [%po], %v; }\n".to_owned(),
        ty => format!("\nst.global.{} [%po], %d;\n", ty.0),
    };
    text += "ret;\n}\n";
    let module = vgpu::ptx::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut rig = Rig::new(Config::default());
    let loaded = rig.load(&module).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut input: Vec<u64> = Vec::new();
    for (tuple, holes) in tuples.iter().zip(holes) {
        for (&value, &hole) in tuple.iter().zip(holes) {
            input.extend([value, hole.into()]);
        }
    }
    let n = tuples.len();
    let at = rig.upload(bytemuck::cast_slice(&input));
    let output = rig.upload(&vec![0; 8 * n]);
    let mut params = output.to_le_bytes().to_vec();
    params.extend(at.to_le_bytes());
    rig.launch(
        &loaded.kernels["k"],
        [n as u32 / 32, 1, 1],
        [32, 1, 1],
        0,
        &params,
    );
    rig.synchronise().expect("the kernel runs");
    let memory = &rig.machine.world.memory;
    let (base, allocation) = memory.containing(output).expect("it is there");
    (0..n)
        .map(|i| {
            let at = (output - base) as usize + 8 * i;
            allocation.region.unwritten(at, d.1.max(1)) as u8
        })
        .collect()
}

fn spread(hole: u8) -> u64 {
    (0..8).fold(0, |bits, byte| {
        bits | (0xff * u64::from(hole >> byte & 1)) << (8 * byte)
    })
}

/// Follows undefined bytes through an instruction. `controls` says which operands must be small
/// (shift amounts, selectors). With `exact`, nothing may count as undefined that is not.
fn follow(body: &str, d: Ty, sources: &[Ty], small: &[u64], exact: bool) {
    if note(body) {
        return;
    }
    let mut r = Random(0xde ^ body.len() as u64);
    let mut tuples = Vec::new();
    let mut holes = Vec::new();
    for _ in 0..TUPLES {
        let mut tuple = Vec::new();
        let mut hole = Vec::new();
        for (n, ty) in sources.iter().enumerate() {
            let limit = small.get(n).copied().unwrap_or(0);
            let value = match (limit, r.next() % 3) {
                (0, 0) => low(r.next(), ty.1),
                // Bytes of all zeros and ones, as masks have them.
                (0, 1) => low(spread(r.next() as u8), ty.1),
                (0, _) => low(r.next() & spread(r.next() as u8), ty.1),
                (limit, _) => r.next() % limit,
            };
            tuple.push(value);
            // What directs the movement is undefined now and then only.
            let often = if limit > 0 {
                r.next().is_multiple_of(8)
            } else {
                !r.next().is_multiple_of(4)
            };
            let all = ((1u32 << ty.1.max(1)) - 1) as u8;
            hole.push(if often { r.next() as u8 & all } else { 0 });
        }
        tuples.push(tuple);
        holes.push(hole);
    }
    let found = undefined(body, d, sources, &tuples, &holes);
    let mut ones = vec![u64::MAX; TUPLES];
    let mut zeros = vec![u64::MAX; TUPLES];
    for _ in 0..FILLINGS {
        let filled: Vec<Vec<u64>> = tuples
            .iter()
            .zip(&holes)
            .map(|(tuple, holes)| {
                let pairs = tuple.iter().zip(holes);
                pairs
                    .zip(sources)
                    .map(|((value, hole), ty)| {
                        let mask = spread(*hole);
                        low(value & !mask | r.next() & mask, ty.1)
                    })
                    .collect()
            })
            .collect();
        for (n, value) in run(body, d, sources, &filled).into_iter().enumerate() {
            ones[n] &= value;
            zeros[n] &= !value;
        }
    }
    let mut carried = 0;
    for n in 0..TUPLES {
        let varies = !(ones[n] | zeros[n]);
        let expected = (0..d.1.max(1)).fold(0u8, |m, byte| {
            m | u8::from(varies >> (8 * byte) & 0xff != 0) << byte
        });
        let context = || format!("{body} of {:x?}, holes {:x?}", tuples[n], holes[n]);
        assert_eq!(
            expected & !found[n],
            0,
            "bytes {expected:#b} depend on it: {}",
            context()
        );
        if exact {
            assert_eq!(found[n], expected, "{}", context());
        }
        carried += u32::from(found[n] != 0);
    }
    assert!(carried > 0, "{body}: nothing was undefined");
}

fn masks_and_moves_carry_it_to_the_byte() {
    for (ty, bits) in [(B16, 16), (B32, 32), (B64, 64)] {
        for op in ["and", "or", "xor"] {
            follow(
                &format!("{op}.b{bits} %d, %a, %b;"),
                ty,
                &[ty, ty],
                &[],
                true,
            );
        }
        follow(&format!("not.b{bits} %d, %a;"), ty, &[ty], &[], true);
        follow(&format!("mov.b{bits} %d, %a;"), ty, &[ty], &[], true);
        follow(&format!("shl.b{bits} %d, %a, 8;"), ty, &[ty], &[], true);
        follow(&format!("shr.u{bits} %d, %a, 8;"), ty, &[ty], &[], true);
        follow(&format!("shr.s{bits} %d, %a, 3;"), ty, &[ty], &[], true);
        follow(
            &format!("selp.b{bits} %d, %a, %b, 1;"),
            ty,
            &[ty, ty],
            &[],
            true,
        );
    }
    for table in [0x80, 0xfe, 0x96, 0xca, 0xe8, 0x1b, 0x40] {
        let body = format!("lop3.b32 %d, %a, %b, %c, {table:#x};");
        follow(&body, B32, &[B32, B32, B32], &[], true);
    }
    follow("prmt.b32 %d, %a, %b, 0x7531;", B32, &[B32, B32], &[], true);
    follow("prmt.b32 %d, %a, %b, 0xb1a2;", B32, &[B32, B32], &[], true);
    follow("prmt.b32.rc8 %d, %a, %b, 2;", B32, &[B32, B32], &[], true);
    follow("brev.b32 %d, %a;", B32, &[B32], &[], true);
    follow("brev.b64 %d, %a;", B64, &[B64], &[], true);
    for (pos, len) in [(8, 8), (3, 9), (0, 32), (20, 30)] {
        follow(
            &format!("bfe.u32 %d, %a, {pos}, {len};"),
            B32,
            &[B32],
            &[],
            true,
        );
        follow(
            &format!("bfe.s32 %d, %a, {pos}, {len};"),
            B32,
            &[B32],
            &[],
            true,
        );
        follow(
            &format!("bfi.b32 %d, %a, %b, {pos}, {len};"),
            B32,
            &[B32, B32],
            &[],
            true,
        );
        follow(
            &format!("bfi.b64 %d, %a, %b, {pos}, {len};"),
            B64,
            &[B64, B64],
            &[],
            true,
        );
        follow(
            &format!("szext.clamp.s32 %d, %a, {len};"),
            B32,
            &[B32],
            &[],
            true,
        );
        follow(
            &format!("shf.l.wrap.b32 %d, %a, %b, {pos};"),
            B32,
            &[B32, B32],
            &[],
            true,
        );
        follow(
            &format!("shf.r.clamp.b32 %d, %a, %b, {len};"),
            B32,
            &[B32, B32],
            &[],
            true,
        );
    }
    follow("mov.b64 %d, {%a, %b};", B64, &[B32, B32], &[], true);
    follow("mov.b32 %d, {%a, %b};", B32, &[B16, B16], &[], true);
    follow(
        "{ .reg .b16 %x; mov.b32 {%x, %d}, %a; }",
        B16,
        &[B32],
        &[],
        true,
    );
    follow(
        "{ .reg .b32 %x; mov.b64 {%d, %x}, %a; }",
        B32,
        &[B64],
        &[],
        true,
    );
    follow("and.pred %d, %a, %b;", PRED, &[PRED, PRED], &[2, 2], true);
    follow("or.pred %d, %a, %b;", PRED, &[PRED, PRED], &[2, 2], true);
}

fn conversions_of_integers_carry_it_to_the_byte() {
    let register = |bits: u32| match bits {
        8 | 16 => B16,
        32 => B32,
        _ => B64,
    };
    for from in [8u32, 16, 32, 64] {
        for to in [8u32, 16, 32, 64] {
            for letters in ["uu", "su", "us", "ss"] {
                let (a, b) = letters.split_at(1);
                let body = format!("cvt.{a}{to}.{b}{from} %d, %a;");
                follow(&body, register(to), &[register(from)], &[], true);
            }
        }
    }
}

fn what_directs_a_movement_spoils_all_of_it() {
    follow(
        "selp.b32 %d, %a, %b, %c;",
        B32,
        &[B32, B32, PRED],
        &[0, 0, 2],
        false,
    );
    follow(
        "selp.b64 %d, %a, %b, %c;",
        B64,
        &[B64, B64, PRED],
        &[0, 0, 2],
        false,
    );
    follow(
        "slct.b32.s32 %d, %a, %b, %c;",
        B32,
        &[B32, B32, B32],
        &[],
        false,
    );
    follow("shl.b32 %d, %a, %b;", B32, &[B32, B32], &[0, 40], false);
    follow("shr.s64 %d, %a, %b;", B64, &[B64, B32], &[0, 70], false);
    follow(
        "prmt.b32 %d, %a, %b, %c;",
        B32,
        &[B32, B32, B32],
        &[0, 0, 0x10000],
        false,
    );
    follow(
        "bfe.u32 %d, %a, %b, %c;",
        B32,
        &[B32, B32, B32],
        &[0, 32, 32],
        false,
    );
    follow(
        "bfi.b32 %d, %a, %b, %c, %e;",
        B32,
        &[B32, B32, B32, B32],
        &[0, 0, 32, 32],
        false,
    );
    follow(
        "shf.l.wrap.b32 %d, %a, %b, %c;",
        B32,
        &[B32, B32, B32],
        &[0, 0, 32],
        false,
    );
    follow(
        "bmsk.clamp.b32 %d, %a, %b;",
        B32,
        &[B32, B32],
        &[32, 32],
        false,
    );
}

fn arithmetic_spoils_what_may_depend_on_it() {
    for op in [
        "add.s32",
        "sub.s32",
        "mul.lo.s32",
        "mul.hi.u32",
        "min.s32",
        "max.u32",
        "div.u32",
        "rem.s32",
        "add.f32",
        "mul.f32",
        "div.rn.f32",
        "min.f32",
        "add.f16x2",
        "mul.bf16x2",
        "min.f16x2",
        "add.u16x2",
        "max.s16x2",
        "copysign.f32",
        "mul24.lo.u32",
        "add.sat.s32",
    ] {
        follow(&format!("{op} %d, %a, %b;"), B32, &[B32, B32], &[], false);
    }
    for op in [
        "mad.lo.s32",
        "fma.rn.f32",
        "fma.rn.f16x2",
        "sad.u32",
        "dp4a.u32.u32",
        "dp2a.lo.s32.s32",
        "fns.b32",
        "mad24.lo.u32",
    ] {
        follow(
            &format!("{op} %d, %a, %b, %c;"),
            B32,
            &[B32, B32, B32],
            &[],
            false,
        );
    }
    for op in [
        "neg.s32",
        "abs.s32",
        "popc.b32",
        "clz.b32",
        "bfind.u32",
        "cnot.b32",
        "neg.f32",
        "abs.f32",
        "sqrt.rn.f32",
        "rcp.approx.f32",
        "ex2.approx.f32",
        "neg.f16x2",
        "abs.bf16x2",
        "cvt.rn.f32.s32",
        "cvt.rzi.s32.f32",
        "cvt.rna.tf32.f32",
        "cvt.sat.s32.u32",
        "tanh.approx.f32",
    ] {
        follow(&format!("{op} %d, %a;"), B32, &[B32], &[], false);
    }
    for op in ["add.s64", "mul.lo.u64", "add.f64", "min.s64"] {
        follow(&format!("{op} %d, %a, %b;"), B64, &[B64, B64], &[], false);
    }
    for op in ["add.s16", "mul.lo.u16", "add.f16", "mul.bf16", "max.s16"] {
        follow(&format!("{op} %d, %a, %b;"), B16, &[B16, B16], &[], false);
    }
    follow("mul.wide.u32 %d, %a, %b;", B64, &[B32, B32], &[], false);
    follow("cvt.rn.f16x2.f32 %d, %a, %b;", B32, &[B32, B32], &[], false);
    follow("cvt.f32.f16 %d, %a;", B32, &[B16], &[], false);
    follow(
        "cvt.rn.satfinite.e5m2x2.f32 %d, %a, %b;",
        B16,
        &[B32, B32],
        &[],
        false,
    );
    follow("cvt.rn.f16x2.e4m3x2 %d, %a;", B32, &[B16], &[], false);
    follow(
        "cvt.pack.sat.u8.s32.b32 %d, %a, %b, %c;",
        B32,
        &[B32, B32, B32],
        &[],
        false,
    );
    follow("setp.lt.s32 %d, %a, %b;", PRED, &[B32, B32], &[], false);
    follow("setp.gtu.f32 %d, %a, %b;", PRED, &[B32, B32], &[], false);
    follow(
        "{ .reg .pred %x; setp.eq.and.s32 %x|%d, %a, %b, %c; }",
        PRED,
        &[B32, B32, PRED],
        &[0, 0, 2],
        false,
    );
    follow("set.lt.u32.s32 %d, %a, %b;", B32, &[B32, B32], &[], false);
    follow("testp.normal.f32 %d, %a;", PRED, &[B32], &[], false);
    follow(
        "{ .reg .b32 %x; add.cc.u32 %x, %a, %b; addc.u32 %d, %c, 0; }",
        B32,
        &[B32, B32, B32],
        &[],
        false,
    );
}

fn packed_halves_carry_it_apart() {
    // The lower half of the result does not know of the upper half of the operand.
    for op in ["add.f16x2", "mul.bf16x2", "fma.rn.f16x2"] {
        let sources = [B32; 3];
        let n = if op.starts_with("fma") { 3 } else { 2 };
        let tuples = vec![vec![0x3c00_3c00; n]; 32];
        let holes = vec![[vec![0b1100], vec![0; n - 1]].concat(); 32];
        let body = crate::bench::plain(op, n);
        let found = undefined(&body, B32, &sources[..n], &tuples, &holes);
        assert_eq!(found, [0b1100; 32], "{op}");
    }
}

fn shuffles_and_votes_carry_it_from_lane_to_lane() {
    // Lane l reads lane l ^ 1; only odd lanes hold something undefined.
    let tuples = vec![vec![7u64]; 32];
    let holes: Vec<Vec<u8>> = (0..32)
        .map(|l| vec![if l % 2 == 1 { 0b0100 } else { 0 }])
        .collect();
    let found = undefined(
        "shfl.sync.bfly.b32 %d, %a, 1, 31, 0xffffffff;",
        B32,
        &[B32],
        &tuples,
        &holes,
    );
    let expected: Vec<u8> = (0..32)
        .map(|l| if l % 2 == 0 { 0b0100 } else { 0 })
        .collect();
    assert_eq!(found, expected);
    // A vote, a match, a reduction depend on every lane.
    for body in [
        "{ .reg .pred %q; setp.ne.b32 %q, %a, 0; vote.sync.ballot.b32 %d, %q, 0xffffffff; }",
        "match.any.sync.b32 %d, %a, 0xffffffff;",
        "redux.sync.add.u32 %d, %a, 0xffffffff;",
    ] {
        assert!(
            undefined(body, B32, &[B32], &tuples, &holes)
                .iter()
                .all(|&u| u == 0b1111),
            "{body}"
        );
        let none = vec![vec![0u8]; 32];
        assert!(
            undefined(body, B32, &[B32], &tuples, &none)
                .iter()
                .all(|&u| u == 0),
            "{body}"
        );
    }
}

tests![
    masks_and_moves_carry_it_to_the_byte,
    conversions_of_integers_carry_it_to_the_byte,
    what_directs_a_movement_spoils_all_of_it,
    arithmetic_spoils_what_may_depend_on_it,
    packed_halves_carry_it_apart,
    shuffles_and_votes_carry_it_from_lane_to_lane,
];
