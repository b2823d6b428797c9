//! What is counted: of kernels to the instruction, of copies to the byte; and how it is taken.

use vgpu::report::{Copied, Counts, Global, Launch, Link, Report, Shared, Touched};

use crate::cuda::{Cuda, child, passes};
use crate::{cu, fails, here};

const ILLEGAL_STATE: u32 = 401;

/// Kernels of which every count is known: `saxpy(x, y, n)`; `gather(to, from, step)` reads every
/// `step`th word and writes the words in order; `banks(step)` stores to and loads from every
/// `step`th word of shared memory, 2^12 of them; `wide(to, from)` moves 16 bytes a thread;
/// `strong(p, q)` does one of everything that orders memory; `await(p, v)` polls for a value;
/// `twice(p)` reads a word two times.
const KERNELS: &str = r#"
.version 8.0
.target sm_80
.address_size 64
.visible .entry saxpy(.param .u64 x, .param .u64 y, .param .u32 n)
{
    .reg .pred %p;
    .reg .b32 %r<5>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<4>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.s32 %r3, %r0, %r1, %r2;
    ld.param.u32 %r4, [n];
    setp.ge.u32 %p, %r3, %r4;
    @%p bra done;
    ld.param.u64 %rd0, [x];
    ld.param.u64 %rd1, [y];
    mul.wide.u32 %rd2, %r3, 4;
    add.s64 %rd0, %rd0, %rd2;
    add.s64 %rd1, %rd1, %rd2;
    ld.global.f32 %f0, [%rd0];
    ld.global.f32 %f1, [%rd1];
    fma.rn.f32 %f2, %f0, 0f40000000, %f1;
    st.global.f32 [%rd1], %f2;
done:
    ret;
}
.visible .entry gather(.param .u64 to, .param .u64 from, .param .u32 step)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd0, [to];
    ld.param.u64 %rd1, [from];
    ld.param.u32 %r1, [step];
    mov.u32 %r0, %tid.x;
    mul.lo.u32 %r2, %r0, %r1;
    mul.wide.u32 %rd2, %r0, 4;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd0, %rd0, %rd2;
    add.s64 %rd1, %rd1, %rd3;
    ld.global.u32 %r3, [%rd1];
    st.global.u32 [%rd0], %r3;
    ret;
}
.visible .entry banks(.param .u32 step)
{
    .reg .b32 %r<5>;
    .shared .align 4 .b8 words[16384];
    ld.param.u32 %r1, [step];
    mov.u32 %r0, %tid.x;
    mul.lo.u32 %r2, %r0, %r1;
    shl.b32 %r2, %r2, 2;
    mov.u32 %r3, words;
    add.u32 %r2, %r2, %r3;
    st.shared.u32 [%r2], %r0;
    bar.sync 0;
    ld.shared.u32 %r4, [%r2];
    bar.sync 0;
    ret;
}
.visible .entry wide(.param .u64 to, .param .u64 from)
{
    .reg .b32 %r<6>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd0, [to];
    ld.param.u64 %rd1, [from];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd2, %r0, 16;
    add.s64 %rd0, %rd0, %rd2;
    add.s64 %rd1, %rd1, %rd2;
    ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];
    st.global.v4.u32 [%rd0], {%r1, %r2, %r3, %r4};
    ret;
}
.visible .entry strong(.param .u64 p, .param .u64 q)
{
    .reg .pred %p;
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd0, [p];
    ld.param.u64 %rd1, [q];
    mov.u32 %r0, %tid.x;
    setp.ne.u32 %p, %r0, 0;
    fence.acq_rel.gpu;
    @%p bra done;
    fence.sc.sys;
    membar.gl;
    st.release.sys.global.u32 [%rd0], 1;
    ld.acquire.gpu.global.u32 %r1, [%rd0];
    ld.volatile.global.u32 %r1, [%rd0];
    st.relaxed.sys.global.u32 [%rd0], 2;
    atom.acq_rel.gpu.global.add.u32 %r2, [%rd1], 1;
    red.relaxed.sys.global.add.u32 [%rd1], 1;
done:
    ret;
}
.visible .entry await(.param .u64 p, .param .u32 v)
{
    .reg .pred %p;
    .reg .b32 %r<2>;
    .reg .b64 %rd;
    ld.param.u64 %rd, [p];
    ld.param.u32 %r1, [v];
again:
    ld.acquire.sys.global.u32 %r0, [%rd];
    setp.ne.u32 %p, %r0, %r1;
    @%p bra again;
    ret;
}
.visible .entry twice(.param .u64 p)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd;
    ld.param.u64 %rd, [p];
    ld.global.u32 %r0, [%rd];
    ld.global.u32 %r1, [%rd];
    ret;
}
"#;

impl Cuda {
    fn count(&self) {
        cu!(self, vgpuSetReport(1u32));
    }

    fn report(&self) -> Report {
        let (mut text, mut length) = (Vec::<u8>::new(), 1u64);
        // With too little room nothing is taken.
        while text.len() < length as usize {
            text.resize(length as usize, 0);
            cu!(self, vgpuTakeReport(&mut text[..], text.len(), &mut length));
        }
        serde_json::from_slice(&text[..length as usize - 1]).expect("a report")
    }

    /// Runs one block of a kernel alone; its counts.
    fn counts(&self, kernel: &str, threads: u32, params: &[u64]) -> Counts {
        self.count();
        let module = self.module(KERNELS);
        self.launch(self.function(module, kernel), 0, threads, params);
        cu!(self, cuCtxSynchronize());
        let mut report = self.report();
        assert_eq!(report.launches.len(), 1);
        let launch = report.launches.remove(0);
        assert_eq!(report.total, launch.counts);
        launch.counts
    }

    /// Device memory that holds words counted up from 0.
    fn words(&self, n: u32) -> u64 {
        self.put(&(0..n).collect::<Vec<_>>())
    }
}

#[test]
fn saxpy_counts_what_its_elements_need() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let n = 1000u32;
        let (x, y) = (cuda.words(n), cuda.words(n));
        let module = cuda.module(KERNELS);
        let saxpy = cuda.function(module, "saxpy");
        cuda.count();
        let params = [x, y, n.into()];
        let pointers = params.each_ref().map(|p| p as *const u64);
        let [gx, bx, one, none] = [8u32, 128, 1, 0];
        cu!(
            cuda,
            cuLaunchKernel(
                saxpy,
                gx,
                one,
                one,
                bx,
                one,
                one,
                none,
                0u64,
                &pointers[..],
                0u64
            )
        );
        cu!(cuda, cuCtxSynchronize());
        let report = cuda.report();
        let [launch] = &report.launches[..] else {
            panic!("{:?}", report.launches);
        };
        let Launch {
            kernel,
            device,
            grid,
            block,
            counts,
            ..
        } = launch;
        assert_eq!(
            (kernel.as_str(), *device, *grid, *block),
            ("saxpy", 0, [8, 1, 1], [128, 1, 1])
        );
        // 31 warps with all their threads, one with 8: n words lie in n / 8 sectors.
        let loads = Global {
            requests: 64,
            threads: 2000,
            bytes: 8000,
            sectors: 250,
        };
        let stores = Global {
            requests: 32,
            threads: 1000,
            bytes: 4000,
            sectors: 125,
        };
        assert_eq!(counts.global_loads, loads);
        assert_eq!(counts.global_stores, stores);
        assert_eq!(counts.global_atomics, Global::default());
        assert_eq!(counts.shared_loads, Shared::default());
        // Six instructions and the end in each of 1024 threads; the branch in the 24 that are too
        // many, nine more in the others.
        assert_eq!(counts.lane_instructions, 1024 * 7 + 24 + 1000 * 9);
        assert_eq!(counts.executed("fma.rn.f32"), 1000);
        assert_eq!(counts.executed("ld.global"), 2000);
        assert_eq!(counts.executed("bra"), 24);
        assert_eq!((counts.barriers, counts.spins, counts.fences()), (0, 0, 0));
        assert!(counts.links.is_empty() && counts.strong.is_empty());
        // Every element of x is read once and none written; y is read and written once.
        let of = |address, written| Touched {
            address,
            bytes: 4000,
            device: Some(0),
            read: 4000,
            read_distinct: 4000,
            written,
            written_distinct: written,
        };
        assert_eq!(report.memory, [of(x, 0), of(y, 4000)]);
        assert!(report.copies.is_empty());
    });
}

#[test]
fn sectors_tell_how_well_accesses_coalesce() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let (to, from) = (cuda.words(64), cuda.words(2048));
        for (step, sectors) in [(0, 2), (1, 8), (2, 16), (4, 32), (8, 64), (32, 64)] {
            let counts = cuda.counts("gather", 64, &[to, from, step]);
            let loads = counts.global_loads;
            assert_eq!(
                (loads.requests, loads.bytes, loads.sectors),
                (2, 256, sectors)
            );
            assert_eq!(counts.global_stores.sectors, 8);
        }
        // A word off: each warp touches a sector more than it asks for.
        let counts = cuda.counts("gather", 64, &[to, from + 4, 1]);
        assert_eq!(counts.global_loads.sectors, 10);
        // Wide accesses fill theirs.
        let counts = cuda.counts("wide", 16, &[to, from]);
        assert_eq!(counts.global_loads.bytes, 256);
        assert_eq!(counts.global_loads.sectors, 8);
    });
}

#[test]
fn bank_conflicts_are_passes_beyond_the_first() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        for (step, passes) in [(1u64, 1u64), (2, 2), (4, 4), (3, 1), (32, 32), (33, 1)] {
            let counts = cuda.counts("banks", 64, &[step]);
            let of_each = Shared {
                requests: 2,
                threads: 64,
                bytes: 256,
                wavefronts: 2 * passes,
                conflicts: 2 * (passes - 1),
            };
            assert_eq!(counts.shared_loads, of_each, "step {step}");
            assert_eq!(counts.shared_stores, of_each, "step {step}");
            assert_eq!(counts.barriers, 2);
            assert_eq!(counts.global_loads, Global::default());
        }
    });
}

#[test]
fn synchronisation_is_counted_by_order_and_scope() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let (p, q) = (cuda.put(&[0]), cuda.put(&[0]));
        let counts = cuda.counts("strong", 32, &[p, q]);
        let strong: Vec<(&str, u64)> = counts
            .strong
            .iter()
            .map(|(name, &n)| (name.as_str(), n))
            .collect();
        assert_eq!(
            strong,
            [
                ("atom.acq_rel.gpu", 1),
                ("atom.relaxed.sys", 1),
                ("fence.acq_rel.gpu", 32),
                ("fence.sc.gpu", 1),
                ("fence.sc.sys", 1),
                ("ld.acquire.gpu", 1),
                ("ld.volatile.sys", 1),
                ("st.relaxed.sys", 1),
                ("st.release.sys", 1),
            ]
        );
        assert_eq!(counts.fences(), 34);
        assert_eq!(counts.global_atomics.threads, 2);
        assert_eq!(counts.spins, 0);
    });
}

#[test]
fn a_wait_is_one_load_and_spins() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let flag = cuda.put(&[0]);
        let module = cuda.module(KERNELS);
        let (stream, other) = (cuda.stream(), cuda.stream());
        cuda.count();
        cuda.launch(cuda.function(module, "await"), stream, 1, &[flag, 7]);
        for _ in 0..10 {
            fails!(600, cuda, cuStreamQuery(stream));
        }
        cu!(cuda, cuMemsetD32Async(flag, 7u32, 1u64, other));
        cu!(cuda, cuStreamSynchronize(stream));
        let counts = cuda.report().total;
        assert!(counts.spins > 100, "{}", counts.spins);
        assert_eq!(counts.strong("ld.acquire.sys"), 1);
        assert_eq!(counts.global_loads.threads, 1);
        assert_eq!(
            counts.executed("ld.acquire.sys.global.u32"),
            1 + counts.spins
        );
        // One that finds what it waits for spins not at all.
        let counts = cuda.counts("await", 1, &[flag, 7]);
        assert_eq!((counts.spins, counts.global_loads.threads), (0, 1));
    });
}

#[test]
fn links_carry_what_kernels_ask_of_other_memories() {
    passes(here!(), &[("VGPU_DEVICES", "3")], |cuda| {
        let first = cuda.start();
        let here = cuda.words(256);
        let second = cuda.context(1);
        let there = cuda.words(256);
        cu!(cuda, cuCtxSetCurrent(first));
        cu!(cuda, cuCtxEnablePeerAccess(second, 0u32));
        let mut host = 0u64;
        cu!(cuda, cuMemHostAlloc(&mut host, 1024u64, 3u32));
        let link = |to, read, written, atomics| Link {
            from: 0,
            to,
            read,
            written,
            atomics,
            spun: 0,
        };
        let counts = cuda.counts("gather", 64, &[here, there, 2]);
        assert_eq!(counts.links, [link(Some(1), 256, 0, 0)]);
        let counts = cuda.counts("wide", 64, &[there, here]);
        assert_eq!(counts.links, [link(Some(1), 0, 1024, 0)]);
        let counts = cuda.counts("gather", 64, &[host, here, 1]);
        assert_eq!(counts.links, [link(None, 0, 256, 0)]);
        let counts = cuda.counts("strong", 32, &[there, there + 4]);
        assert_eq!(counts.links, [link(Some(1), 8, 8, 8)]);
        let counts = cuda.counts("gather", 64, &[here, here + 512, 1]);
        assert_eq!(counts.links, []);
    });
}

#[test]
fn copies_are_counted_by_where_from_and_where_to() {
    passes(here!(), &[("VGPU_DEVICES", "2")], |cuda| {
        let first = cuda.start();
        let here = cuda.words(256);
        let second = cuda.context(1);
        let there = cuda.words(256);
        let copied = |from, to, count, bytes| Copied {
            from,
            to,
            count,
            bytes,
        };
        let copies = |f: &dyn Fn()| {
            cuda.count();
            f();
            let report = cuda.report();
            assert!(report.launches.is_empty() && report.memory.is_empty());
            report
        };
        let peer = || cu!(cuda, cuMemcpyPeer(there, second, here, first, 100u64));
        // Without access a copy goes through the host.
        let report = copies(&|| {
            peer();
            peer();
            cuda.get(there, 8);
        });
        assert_eq!(
            report.copies,
            [
                copied(None, Some(1), 2, 200),
                copied(Some(0), None, 2, 200),
                copied(Some(1), None, 1, 32),
            ]
        );
        cu!(cuda, cuCtxSetCurrent(first));
        cu!(cuda, cuCtxEnablePeerAccess(second, 0u32));
        let report = copies(&|| {
            peer();
            cu!(cuda, cuMemcpyDtoD_v2(here + 512, here, 40u64));
            cuda.put(&[1, 2, 3]);
        });
        assert_eq!(
            report.copies,
            [
                copied(None, Some(0), 1, 12),
                copied(Some(0), Some(0), 1, 40),
                copied(Some(0), Some(1), 1, 100),
            ]
        );
        assert_eq!(report.moved(Some(0), Some(1)), 100);
        assert_eq!(report.moved(Some(1), Some(0)), 0);
    });
}

#[test]
fn bytes_read_more_than_once_show() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let at = cuda.words(16);
        let module = cuda.module(KERNELS);
        let twice = cuda.function(module, "twice");
        cuda.count();
        cuda.launch(twice, 0, 1, &[at + 8]);
        cu!(cuda, cuCtxSynchronize());
        let part = |from: u64, bytes: u64| {
            let mut counts = [0u64; 4];
            cu!(cuda, vgpuCountBytes(at + from, bytes, &mut counts[..]));
            counts
        };
        assert_eq!(part(0, 64), [8, 4, 0, 0]);
        assert_eq!(part(8, 4), [8, 4, 0, 0]);
        assert_eq!(part(0, 8), [0; 4]);
        assert_eq!(part(12, 52), [0; 4]);
        let mut counts = [0u64; 4];
        fails!(1, cuda, vgpuCountBytes(at, 65u64, &mut counts[..]));
        fails!(1, cuda, vgpuCountBytes(at + 2, 4u64, &mut counts[..]));
        let [touched] = cuda.report().memory[..] else {
            panic!("one allocation");
        };
        assert_eq!((touched.read, touched.read_distinct), (8, 4));
        // A part that nobody has touched, and none of a new count.
        assert_eq!(part(8, 4), [0; 4]);
    });
}

#[test]
fn nothing_is_counted_unless_asked_for() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let mut length = 0u64;
        fails!(ILLEGAL_STATE, cuda, vgpuTakeReport(0u64, 0u64, &mut length));
        let mut counts = [0u64; 4];
        fails!(
            ILLEGAL_STATE,
            cuda,
            vgpuCountBytes(0u64, 0u64, &mut counts[..])
        );
        cuda.count();
        assert_eq!(cuda.report(), Report::default());
        cu!(cuda, vgpuSetReport(0u32));
        fails!(ILLEGAL_STATE, cuda, vgpuTakeReport(0u64, 0u64, &mut length));
    });
}

/// Copies and a kernel whose counts the environment asks for.
fn some_work(cuda: &Cuda) {
    cuda.start();
    let (to, from) = (cuda.words(32), cuda.words(32));
    let module = cuda.module(KERNELS);
    cuda.launch(cuda.function(module, "gather"), 0, 32, &[to, from, 1]);
    cu!(cuda, cuCtxSynchronize());
}

#[test]
fn the_environment_asks_for_a_table_at_the_end() {
    if let Some(child) = child(here!(), &[("VGPU_REPORT", "-")], some_work) {
        assert_eq!(child.code, Some(0), "{}", child.errors);
        for words in [
            "gather on device 0, grid (1,1,1), block (32,1,1)",
            "128 bytes in 1 global loads of warps, 4 sectors (100 % asked for)",
            "copies from host to device 0: 2, 256 bytes",
            "32 ld.global.u32 (1 by warps)",
        ] {
            assert!(child.errors.contains(words), "{words}: {}", child.errors);
        }
    }
}

#[test]
fn the_environment_asks_for_json_in_a_file() {
    let name = format!("report.{}.json", std::process::id());
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let variable = path.to_str().expect("a path in UTF-8");
    if let Some(child) = child(here!(), &[("VGPU_REPORT", variable)], some_work) {
        assert_eq!(child.code, Some(0), "{}", child.errors);
        let text = std::fs::read_to_string(&path).expect("the report is written");
        let report: Report = serde_json::from_str(&text).expect("a report");
        assert_eq!(report.of("gather").count(), 1);
        assert_eq!(report.total.global_loads.bytes, 128);
        std::fs::remove_file(&path).expect("the report goes again");
    }
}
