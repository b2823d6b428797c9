//! What the lanes of a warp do together: shuffles, votes, matches, reductions.

use crate::bench::{Program, Random, note};

/// One warp's turn: the lanes that take part, and three values of each lane.
struct Trial {
    members: u32,
    a: [u64; 32],
    b: [u32; 32],
    c: [u32; 32],
}

/// Runs an instruction in one warp for each trial. It finds `%r1` the members, `%d1` and `%r2`
/// the first value (64 and 32 bits), `%p1` its lowest bit, `%r3` and `%r4` the others; it leaves
/// its results in `%r0` and `%p0`.
fn run(instruction: &str, trials: &[Trial]) -> Vec<[(u32, bool); 32]> {
    note(instruction);
    let mut input: Vec<u64> = Vec::new();
    for trial in trials {
        for lane in 0..32 {
            let others = u64::from(trial.c[lane]) << 32 | u64::from(trial.b[lane]);
            input.extend([trial.members.into(), trial.a[lane], others]);
        }
    }
    let body = format!(
        ".reg .pred %in_mask; mul.wide.u32 %d30, %t, 24; add.s64 %d30, %in, %d30;\n\
         mul.wide.u32 %d31, %t, 8; add.s64 %d31, %out, %d31;\n\
         ld.global.u32 %r1, [%d30]; ld.global.u64 %d1, [%d30+8]; cvt.u32.u64 %r2, %d1;\n\
         ld.global.u32 %r3, [%d30+16]; ld.global.u32 %r4, [%d30+20];\n\
         and.b32 %r5, %r2, 1; setp.ne.u32 %p1, %r5, 0; mov.u32 %r0, 0; mov.pred %p0, 0;\n\
         mov.u32 %r6, %laneid; shr.u32 %r7, %r1, %r6; and.b32 %r7, %r7, 1;\n\
         setp.ne.u32 %in_mask, %r7, 0; @!%in_mask bra done;\n{instruction}\n\
         selp.u32 %r8, 1, 0, %p0; st.global.v2.u32 [%d31], {{%r0, %r8}};\ndone: ret;"
    );
    let n = trials.len();
    let found = Program::new(&body, bytemuck::cast_slice(&input), 256 * n)
        .threads(32 * n as u32)
        .run()
        .clean();
    let values = found.values::<u32>();
    (0..n)
        .map(|trial| {
            std::array::from_fn(|lane| {
                let at = 64 * trial + 2 * lane;
                (values[at], values[at + 1] != 0)
            })
        })
        .collect()
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}

/// Member masks: all lanes, one, halves, and random ones.
fn masks(r: &mut Random) -> Vec<u32> {
    let mut list = vec![
        u32::MAX,
        1,
        1 << 31,
        0xffff,
        0xffff_0000,
        0x5555_5555,
        0x8000_0001,
    ];
    list.extend((0..25).map(|_| r.next() as u32 | 1 << (r.next() % 32)));
    list
}

fn shuffles_read_from_the_lane_the_isa_names() {
    let mut r = Random(7);
    let mut trials = Vec::new();
    // Every distance, and what CUDA makes of every width: the segment mask and the clamp.
    for width in [32u32, 16, 8, 4, 2, 1] {
        for b in 0..40 {
            for clamp in [0, 0x1f] {
                trials.push(Trial {
                    members: u32::MAX,
                    a: std::array::from_fn(|_| r.next()),
                    b: [b; 32],
                    c: [(32 - width) << 8 | clamp; 32],
                });
            }
        }
    }
    // Anything in every lane.
    for _ in 0..200 {
        trials.push(Trial {
            members: u32::MAX,
            a: std::array::from_fn(|_| r.next()),
            b: std::array::from_fn(|_| r.next() as u32),
            c: std::array::from_fn(|_| r.next() as u32),
        });
    }
    for mode in ["up", "down", "bfly", "idx"] {
        let name = format!("shfl.sync.{mode}.b32 %r0|%p0, %r2, %r3, %r4, %r1;");
        let found = run(&name, &trials);
        for (trial, found) in trials.iter().zip(&found) {
            for lane in 0..32i64 {
                let (b, c) = (trial.b[lane as usize], trial.c[lane as usize]);
                let (distance, clamp) = (i64::from(b & 31), i64::from(c & 31));
                let segment = i64::from(c >> 8 & 31);
                let highest = lane & segment | clamp & !segment;
                let lowest = lane & segment;
                let (from, inside) = match mode {
                    "up" => (lane - distance, lane - distance >= highest),
                    "down" => (lane + distance, lane + distance <= highest),
                    "bfly" => (lane ^ distance, lane ^ distance <= highest),
                    _ => {
                        let from = lowest | distance & !segment;
                        (from, from <= highest)
                    }
                };
                let from = if inside { from } else { lane };
                let value = trial.a[from as usize] as u32;
                assert_eq!(
                    found[lane as usize],
                    (value, inside),
                    "{name} in lane {lane} of b {b:#x}, c {c:#x}"
                );
            }
        }
    }
    // Without the predicate, among some of the lanes.
    let mut trials = Vec::new();
    for members in masks(&mut r) {
        let list: Vec<usize> = lanes(members).collect();
        trials.push(Trial {
            members,
            a: std::array::from_fn(|_| r.next()),
            b: std::array::from_fn(|_| list[r.next() as usize % list.len()] as u32),
            c: [31; 32],
        });
    }
    let found = run("shfl.sync.idx.b32 %r0, %r2, %r3, %r4, %r1;", &trials);
    for (trial, found) in trials.iter().zip(&found) {
        for lane in lanes(trial.members) {
            assert_eq!(found[lane].0, trial.a[trial.b[lane] as usize] as u32);
        }
    }
}

fn trials_of_values(values: impl Fn(&mut Random) -> u64) -> Vec<Trial> {
    let mut r = Random(11);
    let mut trials = Vec::new();
    for round in 0..8 {
        for members in masks(&mut r) {
            let common = values(&mut r);
            trials.push(Trial {
                members,
                // All the same, all different, and mixtures.
                a: std::array::from_fn(|_| match round % 4 {
                    0 => common,
                    1 => values(&mut r),
                    _ if r.next().is_multiple_of(8) => values(&mut r),
                    _ => common,
                }),
                b: [0; 32],
                c: [0; 32],
            });
        }
    }
    trials
}

fn votes_count_the_members() {
    let trials = trials_of_values(Random::next);
    for (mode, holds) in [
        ("all", (|yes, of| yes == of) as fn(u32, u32) -> bool),
        ("any", |yes, _| yes != 0),
        ("uni", |yes, of| yes == 0 || yes == of),
    ] {
        for negate in ["", "!"] {
            let name = format!("vote.sync.{mode}.pred %p0, {negate}%p1, %r1;");
            for (trial, found) in trials.iter().zip(run(&name, &trials)) {
                let of = trial.members.count_ones();
                let yes = lanes(trial.members)
                    .filter(|&l| (trial.a[l] & 1 != 0) != (negate == "!"))
                    .count() as u32;
                for lane in lanes(trial.members) {
                    assert_eq!(found[lane].1, holds(yes, of), "{name}: {yes} of {of}");
                }
            }
        }
    }
    let name = "vote.sync.ballot.b32 %r0, %p1, %r1;";
    for (trial, found) in trials.iter().zip(run(name, &trials)) {
        let expected = lanes(trial.members).fold(0, |m, l| m | (trial.a[l] as u32 & 1) << l);
        assert!(lanes(trial.members).all(|l| found[l].0 == expected));
    }
}

fn matches_find_the_lanes_with_the_same_value() {
    // The upper half alone tells some apart.
    let trials = trials_of_values(|r| (r.next() % 3) | (r.next() % 2) << 40);
    for (ty, register, keep) in [
        ("b32", "%r2", u64::from(u32::MAX)),
        ("b64", "%d1", u64::MAX),
    ] {
        let any = format!("match.any.sync.{ty} %r0, {register}, %r1;");
        let all = format!("match.all.sync.{ty} %r0|%p0, {register}, %r1;");
        let (any, all) = (run(&any, &trials), run(&all, &trials));
        for (n, trial) in trials.iter().enumerate() {
            let value = |l: usize| trial.a[l] & keep;
            for lane in lanes(trial.members) {
                let same = lanes(trial.members)
                    .filter(|&l| value(l) == value(lane))
                    .fold(0u32, |m, l| m | 1 << l);
                assert_eq!(any[n][lane].0, same);
                let everyone = same == trial.members;
                assert_eq!(all[n][lane], (if everyone { same } else { 0 }, everyone));
            }
        }
    }
}

fn reductions_combine_all_members() {
    type Op = fn(u32, u32) -> u32;
    let cases: [(&str, Op); 9] = [
        ("add.u32", |a, b| a.wrapping_add(b)),
        ("add.s32", |a, b| a.wrapping_add(b)),
        ("min.u32", |a, b| if a < b { a } else { b }),
        ("max.u32", |a, b| if a > b { a } else { b }),
        ("min.s32", |a, b| if (a as i32) < b as i32 { a } else { b }),
        ("max.s32", |a, b| if (a as i32) > b as i32 { a } else { b }),
        ("and.b32", |a, b| a & b),
        ("or.b32", |a, b| a | b),
        ("xor.b32", |a, b| a ^ b),
    ];
    let trials = trials_of_values(Random::next);
    for (name, op) in cases {
        let name = format!("redux.sync.{name} %r0, %r2, %r1;");
        for (trial, found) in trials.iter().zip(run(&name, &trials)) {
            let expected = lanes(trial.members).map(|l| trial.a[l] as u32).reduce(op);
            assert!(
                lanes(trial.members).all(|l| Some(found[l].0) == expected),
                "{name}"
            );
        }
    }
    // Floats of every kind, NaN and zeros of both signs among them.
    let trials = trials_of_values(|r| {
        u64::from(match r.next() % 8 {
            0 => f32::NAN.to_bits(),
            1 => (-0.0f32).to_bits(),
            2 => 0,
            3 => f32::NEG_INFINITY.to_bits(),
            _ => r.next() as u32,
        })
    });
    let key = |x: f32| {
        let bits = x.to_bits() as i32;
        if bits < 0 {
            i32::MIN.wrapping_sub(bits).wrapping_sub(1)
        } else {
            bits
        }
    };
    for (op, max) in [("min", false), ("max", true)] {
        for (modifiers, absolute, nan) in [
            ("", false, false),
            (".abs", true, false),
            (".NaN", false, true),
            (".abs.NaN", true, true),
        ] {
            let name = format!("redux.sync.{op}{modifiers}.f32 %r0, %r2, %r1;");
            for (trial, found) in trials.iter().zip(run(&name, &trials)) {
                let values: Vec<f32> = lanes(trial.members)
                    .map(|l| f32::from_bits(trial.a[l] as u32))
                    .map(|x| if absolute { x.abs() } else { x })
                    .collect();
                let numbers = values.iter().copied().filter(|x| !x.is_nan());
                let best = if max {
                    numbers.max_by_key(|&x| key(x))
                } else {
                    numbers.min_by_key(|&x| key(x))
                };
                let poisoned = nan && values.iter().any(|x| x.is_nan());
                let expected = match best {
                    Some(best) if !poisoned => best.to_bits(),
                    _ => 0x7fff_ffff,
                };
                assert!(
                    lanes(trial.members).all(|l| found[l].0 == expected),
                    "{name}: {values:?}"
                );
            }
        }
    }
}

fn one_member_is_elected_and_all_know_who() {
    let trials = trials_of_values(Random::next);
    for (trial, found) in trials.iter().zip(run("elect.sync %r0|%p0, %r1;", &trials)) {
        let leader = found[trial.members.trailing_zeros() as usize].0;
        assert_ne!(trial.members >> leader & 1, 0, "the leader is a member");
        for lane in lanes(trial.members) {
            assert_eq!(found[lane], (leader, lane as u32 == leader));
        }
    }
}

fn the_active_mask_is_who_is_here() {
    let trials = trials_of_values(Random::next);
    for (trial, found) in trials.iter().zip(run("activemask.b32 %r0;", &trials)) {
        for lane in lanes(trial.members) {
            assert_eq!(found[lane].0, trial.members);
        }
    }
}

fn a_mask_that_leaves_the_lane_out_is_found() {
    use vgpu::finding::Kind;
    let body = "shfl.sync.idx.b32 %r0, %t, 0, 31, 0x7fffffff;";
    let outcome = Program::new(body, &[0], 4).run();
    let kinds: Vec<Kind> = outcome.findings.iter().map(|f| f.kind).collect();
    assert_eq!(kinds, [Kind::WrongMask]);
}

tests![
    shuffles_read_from_the_lane_the_isa_names,
    votes_count_the_members,
    matches_find_the_lanes_with_the_same_value,
    reductions_combine_all_members,
    one_member_is_elected_and_all_know_who,
    the_active_mask_is_who_is_here,
    a_mask_that_leaves_the_lane_out_is_found,
];
