//! Barriers: who waits for whom, by what comes through shared memory without a race, and that
//! the race checks do find one where the barrier is missing or too small.

use vgpu::finding::{Fault, Kind};

use crate::bench::{Outcome, Program};

fn block(body: &str, threads: u32) -> Outcome {
    Program {
        block: [threads, 1, 1],
        ..Program::new(body, &[0], 4 * threads as usize)
    }
    .run()
}

/// Every thread writes its word; after the barrier it reads that of a thread of another warp.
fn exchange(barrier: &str) -> String {
    format!(
        ".shared .align 4 .b8 s[512]; mov.u32 %r1, s; shl.b32 %r2, %t, 2; add.u32 %r3, %r1, %r2;\n\
         mul.lo.u32 %r4, %t, 3; st.shared.u32 [%r3], %r4;\n{barrier}\n\
         add.u32 %r5, %t, 37; and.b32 %r5, %r5, 127; shl.b32 %r5, %r5, 2; add.u32 %r5, %r1, %r5;\n\
         ld.shared.u32 %r6, [%r5]; cvt.u64.u32 %d1, %r2; add.s64 %d1, %out, %d1;\n\
         st.global.u32 [%d1], %r6;"
    )
}

fn all_threads_of_the_block_meet() {
    let expected: Vec<u32> = (0..128).map(|t| (t + 37) % 128 * 3).collect();
    let mut forms: Vec<String> = [
        "bar.sync 0;",
        "bar.sync 0, 128;",
        "bar.cta.sync 0;",
        "barrier.sync 0;",
        "barrier.sync.aligned 0;",
        "barrier.cta.sync 0, 128;",
        "barrier.cta.sync.aligned 0;",
        "mov.u32 %r20, 3; mov.u32 %r21, 128; bar.sync %r20, %r21;",
    ]
    .map(str::to_owned)
    .to_vec();
    forms.extend((0..16).map(|id| format!("bar.sync {id};")));
    for form in forms {
        let found = block(&exchange(&form), 128).clean();
        assert_eq!(found.values::<u32>(), expected, "{form}");
    }
    // Without it, or with one for the warp only, it is a race.
    for form in ["", "bar.warp.sync 0xffffffff;"] {
        let kinds: Vec<Kind> = block(&exchange(form), 128)
            .findings
            .iter()
            .map(|f| f.kind)
            .collect();
        assert!(kinds.contains(&Kind::Race), "{form}: {kinds:?}");
    }
}

fn a_part_of_the_block_meets_at_a_barrier_of_its_own() {
    // Warps 0 and 1 at barrier 1, warps 2 and 3 at barrier 2; each reads from its partner warp.
    let body = ".shared .align 4 .b8 s[512]; mov.u32 %r1, s; shl.b32 %r2, %t, 2;\n\
        add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %t; shr.u32 %r7, %t, 6; add.u32 %r7, %r7, 1;\n\
        bar.sync %r7, 64;\n\
        xor.b32 %r5, %t, 32; shl.b32 %r5, %r5, 2; add.u32 %r5, %r1, %r5;\n\
        ld.shared.u32 %r6, [%r5]; cvt.u64.u32 %d1, %r2; add.s64 %d1, %out, %d1;\n\
        st.global.u32 [%d1], %r6;";
    let found = block(body, 128).clean();
    let expected: Vec<u32> = (0..128).map(|t| t ^ 32).collect();
    assert_eq!(found.values::<u32>(), expected);
    // Reading from the other pair is a race.
    let other = body.replace("xor.b32 %r5, %t, 32", "xor.b32 %r5, %t, 64");
    let kinds: Vec<Kind> = block(&other, 128).findings.iter().map(|f| f.kind).collect();
    assert!(kinds.contains(&Kind::Race), "{kinds:?}");
}

fn producers_arrive_and_consumers_wait() {
    for (arrive, sync) in [
        ("bar.arrive 1, 64;", "bar.sync 1, 64;"),
        ("barrier.arrive 1, 64;", "barrier.sync 1, 64;"),
        (
            "barrier.cta.arrive.aligned 1, 64;",
            "barrier.cta.sync.aligned 1, 64;",
        ),
        ("bar.cta.arrive 1, 64;", "bar.cta.sync 1, 64;"),
    ] {
        let body = format!(
            ".shared .align 4 .b8 s[128]; .reg .pred %consumer; mov.u32 %r1, s;\n\
             and.b32 %r2, %t, 31; shl.b32 %r2, %r2, 2; add.u32 %r3, %r1, %r2;\n\
             setp.ge.u32 %consumer, %t, 32; @%consumer bra consume;\n\
             add.u32 %r4, %t, 1000; st.shared.u32 [%r3], %r4; {arrive} ret;\n\
             consume: {sync} ld.shared.u32 %r6, [%r3]; mul.wide.u32 %d1, %t, 4;\n\
             add.s64 %d1, %out, %d1; st.global.u32 [%d1], %r6;"
        );
        let found = block(&body, 64).clean().values::<u32>();
        assert_eq!(found[32..], (1000..1032).collect::<Vec<u32>>(), "{arrive}");
    }
}

fn barriers_reduce_predicates() {
    for threads in [32u32, 96, 256] {
        for modulus in [1u32, 2, 3, 1000] {
            // True where t % modulus == 0.
            let yes = (0..threads).filter(|t| t % modulus == 0).count() as u32;
            let cases = [
                ("bar.red.popc.u32 %r5, 0, %p1;", yes),
                ("bar.red.popc.u32 %r5, 2, %block_size, %p1;", yes),
                ("bar.red.popc.u32 %r5, 0, !%p1;", threads - yes),
                (
                    "bar.red.and.pred %p2, 0, %p1; selp.u32 %r5, 1, 0, %p2;",
                    u32::from(yes == threads),
                ),
                (
                    "bar.red.or.pred %p2, 0, %p1; selp.u32 %r5, 1, 0, %p2;",
                    u32::from(yes != 0),
                ),
                (
                    "bar.red.or.pred %p2, 0, !%p1; selp.u32 %r5, 1, 0, %p2;",
                    u32::from(yes != threads),
                ),
                ("barrier.red.popc.u32 %r5, 0, %p1;", yes),
                (
                    "barrier.cta.red.and.aligned.pred %p2, 0, %p1; selp.u32 %r5, 1, 0, %p2;",
                    u32::from(yes == threads),
                ),
            ];
            for (form, expected) in cases {
                let body = format!(
                    ".reg .b32 %block_size; mov.u32 %block_size, %ntid.x; rem.u32 %r4, %t, {modulus};\n\
                     setp.eq.u32 %p1, %r4, 0;\n{form}\n\
                     mul.wide.u32 %d1, %t, 4; add.s64 %d1, %out, %d1; st.global.u32 [%d1], %r5;"
                );
                let found = block(&body, threads).clean().values::<u32>();
                assert!(
                    found.iter().all(|&n| n == expected),
                    "{form} of {threads}, {modulus}: {found:?}"
                );
            }
        }
    }
}

fn lanes_of_a_warp_meet() {
    // Lane l reads what lane l ^ 5 wrote; among all, and among the lanes of a mask only.
    let body = |mask: u32| {
        format!(
            ".shared .align 4 .b8 s[128]; .reg .pred %out_of_mask; mov.u32 %r1, s;\n\
             shr.u32 %r7, {mask}, %t; and.b32 %r7, %r7, 1; setp.eq.u32 %out_of_mask, %r7, 0;\n\
             @%out_of_mask bra done;\n\
             shl.b32 %r2, %t, 2; add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %t;\n\
             bar.warp.sync {mask};\n\
             xor.b32 %r5, %t, 5; shl.b32 %r5, %r5, 2; add.u32 %r5, %r1, %r5;\n\
             ld.shared.u32 %r6, [%r5]; mul.wide.u32 %d1, %t, 4; add.s64 %d1, %out, %d1;\n\
             st.global.u32 [%d1], %r6;\ndone: ret;"
        )
    };
    for mask in [u32::MAX, 0xff, 0xff00_ff00] {
        let found = block(&body(mask), 32).clean().values::<u32>();
        for lane in (0..32).filter(|l| mask >> l & 1 != 0) {
            assert_eq!(found[lane as usize], lane ^ 5);
        }
    }
    let missing = body(u32::MAX).replace("bar.warp.sync 4294967295;", "");
    let kinds: Vec<Kind> = block(&missing, 32)
        .findings
        .iter()
        .map(|f| f.kind)
        .collect();
    assert!(kinds.contains(&Kind::Race), "{kinds:?}");
}

fn warps_may_be_divided_at_barriers_that_are_not_aligned() {
    let body = ".shared .align 4 .b8 s[256]; .reg .pred %odd; mov.u32 %r1, s; shl.b32 %r2, %t, 2;\n\
        add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %t; and.b32 %r4, %t, 1;\n\
        setp.eq.u32 %odd, %r4, 1; @%odd bra other; barrier.sync 0; bra join;\n\
        other: barrier.sync 0;\n\
        join: xor.b32 %r5, %t, 63; shl.b32 %r5, %r5, 2; add.u32 %r5, %r1, %r5;\n\
        ld.shared.u32 %r6, [%r5]; mul.wide.u32 %d1, %t, 4; add.s64 %d1, %out, %d1;\n\
        st.global.u32 [%d1], %r6;";
    let found = block(body, 64).clean();
    assert_eq!(
        found.values::<u32>(),
        (0..64).map(|t| t ^ 63).collect::<Vec<u32>>()
    );
    // The aligned one may not.
    let aligned = body.replace("barrier.sync", "bar.sync");
    let outcome = block(&aligned, 64);
    assert_eq!(outcome.result, Err(Fault::LaunchFailed));
    assert_eq!(outcome.findings[0].kind, Kind::Barrier);
}

fn barriers_that_make_no_sense_are_found() {
    for (body, kind) in [
        ("mov.u32 %r1, 16; bar.sync %r1;", Kind::Barrier),
        ("bar.sync 1, 33;", Kind::Barrier),
        ("bar.sync %t;", Kind::Barrier),
        ("bar.sync 1, 96;", Kind::Deadlock),
        (
            ".reg .pred %q; setp.lt.u32 %q, %t, 32; @%q bar.sync 1, 64; bar.sync 1, 96;",
            Kind::Barrier,
        ),
    ] {
        let outcome = block(body, 64);
        assert!(outcome.result.is_err(), "{body}");
        assert_eq!(
            outcome.findings[0].kind, kind,
            "{body}: {}",
            outcome.findings[0]
        );
    }
}

tests![
    all_threads_of_the_block_meet,
    a_part_of_the_block_meets_at_a_barrier_of_its_own,
    producers_arrive_and_consumers_wait,
    barriers_reduce_predicates,
    lanes_of_a_warp_meet,
    warps_may_be_divided_at_barriers_that_are_not_aligned,
    barriers_that_make_no_sense_are_found,
];
