//! The special registers, over a grid of several blocks with three dimensions and a last warp
//! that is not full.

use crate::bench::Program;

const GRID: [u32; 3] = [3, 2, 2];
const BLOCK: [u32; 3] = [8, 5, 2];
const THREADS: u32 = 80;
const BLOCKS: u32 = 12;

/// Where a thread is.
struct Where {
    block: u32,
    thread: u32,
}

/// The value of a register in every thread; blocks follow each other.
fn read(register: &str, bits: u32) -> Vec<u64> {
    let (name, store) = match bits {
        64 => ("%d1", "st.global.u64 [%d9], %d1;"),
        _ => ("%r1", "cvt.u64.u32 %d1, %r1; st.global.u64 [%d9], %d1;"),
    };
    let body = format!(
        ".reg .b32 %a, %b, %c, %x, %y; mov.u32 %a, %tid.x; mov.u32 %b, %tid.y; mov.u32 %c, %tid.z;\n\
         mad.lo.u32 %x, %c, 5, %b; mad.lo.u32 %x, %x, 8, %a;\n\
         mov.u32 %a, %ctaid.x; mov.u32 %b, %ctaid.y; mov.u32 %c, %ctaid.z;\n\
         mad.lo.u32 %y, %c, 2, %b; mad.lo.u32 %y, %y, 3, %a; mad.lo.u32 %x, %y, {THREADS}, %x;\n\
         mul.wide.u32 %d9, %x, 8; add.s64 %d9, %out, %d9;\n\
         mov.u{bits} {name}, {register};\n{store}"
    );
    let program = Program {
        grid: GRID,
        block: BLOCK,
        dynamic_shared: 48,
        module: ".shared .align 4 .b8 fixed[100];",
        ..Program::new(&body, &[0], (8 * THREADS * BLOCKS) as usize)
    };
    program.run().clean().values()
}

fn check(register: &str, bits: u32, reference: impl Fn(&Where) -> u64) {
    for (at, found) in read(register, bits).into_iter().enumerate() {
        let place = Where {
            block: at as u32 / THREADS,
            thread: at as u32 % THREADS,
        };
        let expected = reference(&place);
        assert_eq!(found, expected, "{register} of thread {at}");
    }
}

fn threads_know_where_they_are() {
    let axes = ["x", "y", "z"];
    let axis = |flat: u32, shape: [u32; 3], n: usize| match n {
        0 => flat % shape[0],
        1 => flat / shape[0] % shape[1],
        _ => flat / shape[0] / shape[1],
    };
    for (n, name) in axes.iter().enumerate() {
        check(&format!("%tid.{name}"), 32, |w| {
            axis(w.thread, BLOCK, n).into()
        });
        check(&format!("%ntid.{name}"), 32, |_| BLOCK[n].into());
        check(&format!("%ctaid.{name}"), 32, |w| {
            axis(w.block, GRID, n).into()
        });
        check(&format!("%nctaid.{name}"), 32, |_| GRID[n].into());
        // Every block is a cluster of one.
        check(&format!("%clusterid.{name}"), 32, |w| {
            axis(w.block, GRID, n).into()
        });
        check(&format!("%nclusterid.{name}"), 32, |_| GRID[n].into());
        check(&format!("%cluster_ctaid.{name}"), 32, |_| 0);
        check(&format!("%cluster_nctaid.{name}"), 32, |_| 1);
    }
    check("%cluster_ctarank", 32, |_| 0);
    check("%cluster_nctarank", 32, |_| 1);
}

fn lanes_know_their_warp() {
    check("%laneid", 32, |w| u64::from(w.thread % 32));
    check("%warpid", 32, |w| u64::from(w.thread / 32));
    check("%nwarpid", 32, |_| 3);
    check("WARP_SZ", 32, |_| 32);
    let lanes = |w: &Where, holds: fn(u32, u32) -> bool| {
        (0..32)
            .filter(|&l| holds(l, w.thread % 32))
            .map(|l| 1u64 << l)
            .sum()
    };
    check("%lanemask_eq", 32, |w| lanes(w, |l, own| l == own));
    check("%lanemask_le", 32, |w| lanes(w, |l, own| l <= own));
    check("%lanemask_lt", 32, |w| lanes(w, |l, own| l < own));
    check("%lanemask_ge", 32, |w| lanes(w, |l, own| l >= own));
    check("%lanemask_gt", 32, |w| lanes(w, |l, own| l > own));
}

fn sizes_and_numbers_of_the_machine() {
    let multiprocessors = read("%nsmid", 32)[0];
    assert_eq!(multiprocessors, 132, "an H100 unless told otherwise");
    let places = read("%smid", 32);
    assert!(places.iter().all(|&sm| sm < multiprocessors));
    for block in places.chunks(THREADS as usize) {
        assert!(
            block.iter().all(|sm| *sm == block[0]),
            "a block has one place"
        );
    }
    check("%dynamic_smem_size", 32, |_| 48);
    let id = read("%gridid", 64);
    assert!(id.iter().all(|n| *n == id[0] && *n != 0));
    for n in [0, 1, 2, 3, 16, 31] {
        check(&format!("%envreg{n}"), 32, |_| 0);
    }
    check("%current_graph_exec", 64, |_| 0);
    // A variable of 100 bytes that the kernel names, and 48 dynamic ones.
    let body = "mov.u32 %r1, fixed; mov.u32 %r1, %total_smem_size; st.global.u32 [%out], %r1;\n\
                mov.u32 %r1, %aggr_smem_size; st.global.u32 [%out+4], %r1;";
    let program = Program {
        block: [1, 1, 1],
        dynamic_shared: 48,
        module: ".shared .align 4 .b8 fixed[100];",
        ..Program::new(body, &[0], 8)
    };
    assert_eq!(program.run().clean().values::<u32>(), [148, 148]);
}

fn clocks_advance() {
    for (register, bits) in [
        ("%clock", 32),
        ("%clock64", 64),
        ("%globaltimer", 64),
        ("%globaltimer_lo", 32),
    ] {
        let r = if bits == 64 { "%d" } else { "%r" };
        let body = format!(
            "mov.u{bits} {r}1, {register}; mov.u32 %r5, 0;\n\
             again: add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 50; @%p1 bra again;\n\
             nanosleep.u32 1000; mov.u{bits} {r}2, {register}; sub.s{bits} {r}3, {r}2, {r}1;\n\
             st.global.u{bits} [%out], {r}3;"
        );
        let program = Program {
            block: [1, 1, 1],
            ..Program::new(&body, &[0], 8)
        };
        let passed = program.run().clean().values::<u64>()[0];
        assert!((1000..100_000).contains(&passed), "{register}: {passed}");
    }
    for register in ["%clock_hi", "%globaltimer_hi"] {
        assert!(read(register, 32).iter().all(|&n| n < 1000));
    }
}

fn an_unknown_register_is_refused() {
    let program = Program::new("mov.u32 %r1, %frob;", &[0], 4);
    let module = vgpu::ptx::parse(&program.text()).expect("the syntax is right");
    let mut rig = vgpu::rig::Rig::new(vgpu::machine::Config::default());
    let error = rig.load(&module).err().expect("it is refused");
    assert!(error.to_string().contains("%frob"), "{error}");
}

tests![
    threads_know_where_they_are,
    lanes_know_their_warp,
    sizes_and_numbers_of_the_machine,
    clocks_advance,
    an_unknown_register_is_refused,
];
