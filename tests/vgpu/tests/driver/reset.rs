//! `vgpuReset`: everything begins anew, and the same seed gives what a new process gives.

use crate::cuda::{Child, Cuda, KERNELS, child, passes};
use crate::{cu, fails, here};

/// Threads of 16 blocks take tickets in the order of the schedule.
const TICKETS: &str = r#"
.version 8.0
.target sm_80
.address_size 64
.visible .entry tickets(.param .u64 next, .param .u64 to)
{
    .reg .b32 %r<5>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd0, [next];
    ld.param.u64 %rd1, [to];
    mov.u32 %r0, %ctaid.x;
    atom.relaxed.gpu.global.add.u32 %r1, [%rd0], 1;
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd1, %rd1, %rd2;
    st.global.u32 [%rd1], %r1;
    ret;
}
"#;

/// What a run from here on comes to: tickets, addresses, virtual time.
fn run(cuda: &Cuda) -> String {
    cuda.start();
    let module = cuda.module(TICKETS);
    let tickets = cuda.function(module, "tickets");
    let (next, to) = (cuda.put(&[0]), cuda.put(&[0; 16]));
    let mut host = 0u64;
    cu!(cuda, cuMemHostAlloc(&mut host, 64u64, 3u32));
    let (mut start, mut end) = (0u64, 0u64);
    cu!(cuda, cuEventCreate(&mut start, 0u32));
    cu!(cuda, cuEventCreate(&mut end, 0u32));
    cu!(cuda, cuEventRecord(start, 0u64));
    let params = [&next as *const u64, &to as *const u64];
    let [blocks, one, none] = [16u32, 1, 0];
    cu!(
        cuda,
        cuLaunchKernel(
            tickets,
            blocks,
            one,
            one,
            one,
            one,
            one,
            none,
            0u64,
            &params[..],
            0u64
        )
    );
    cu!(cuda, cuEventRecord(end, 0u64));
    cu!(cuda, cuCtxSynchronize());
    let mut time = 0f32;
    let at = &raw mut time;
    cu!(cuda, cuEventElapsedTime(at.cast_const(), start, end));
    format!("{:?} {next:#x} {host:#x} {time}", cuda.get(to, 16))
}

/// Set to the seeds to begin anew with, one after the other.
const SEEDS: &str = "VGPU_TEST_SEEDS";

#[test]
fn the_same_seed_gives_what_a_new_process_gives() {
    let name = here!();
    let run = |variables: &[(&str, &str)]| {
        let Child {
            code,
            output,
            errors,
        } = child(name, variables, |cuda| match std::env::var(SEEDS) {
            Ok(seeds) => {
                cu!(cuda, cuInit(0u32));
                for seed in seeds.split(',') {
                    let seed: u64 = seed.parse().expect("a seed");
                    cu!(cuda, vgpuReset(seed));
                    println!("\nout {}", run(cuda));
                }
            }
            Err(_) => println!("\nout {}", run(cuda)),
        })?;
        assert_eq!(code, Some(0), "{errors}");
        let lines = output.lines().filter(|l| l.starts_with("out "));
        Some(lines.map(str::to_owned).collect::<Vec<String>>())
    };
    let Some(one) = run(&[("VGPU_SEED", "1")]) else {
        return;
    };
    let two = run(&[("VGPU_SEED", "2")]).expect("the parent");
    assert_ne!(one, two, "the seeds differ");
    let all = run(&[("VGPU_SEED", "77"), (SEEDS, "1,2,1")]).expect("the parent");
    assert_eq!(all, [one.clone(), two, one].concat());
}

#[test]
fn nothing_of_what_was_there_is_known_afterwards() {
    passes(here!(), &[("VGPU_MEMORY", "65536")], |cuda| {
        let context = cuda.start();
        let at = cuda.put(&[1; 1024]);
        let mut host = 0u64;
        cu!(cuda, cuMemHostAlloc(&mut host, 64u64, 3u32));
        let module = cuda.module(KERNELS);
        let stream = cuda.stream();
        // It ends in a fault, with a finding.
        cuda.launch(cuda.function(module, "fault"), 0, 1, &[0x1000]);
        fails!(700, cuda, cuCtxSynchronize());
        cu!(cuda, vgpuReset(3u64));
        assert_eq!(cuda.findings(), "");
        let mut new = 0u64;
        fails!(709, cuda, cuMemAlloc_v2(&mut new, 64u64));
        fails!(201, cuda, cuCtxSetCurrent(context));
        fails!(400, cuda, cuModuleUnload(module));
        fails!(400, cuda, cuStreamSynchronize(stream));
        assert_ne!(cuda.context(0), context);
        let (mut free, mut total) = (0u64, 0u64);
        cu!(cuda, cuMemGetInfo_v2(&mut free, &mut total));
        assert_eq!((free, total), (65_536, 65_536));
        fails!(1, cuda, cuMemFree_v2(at));
        fails!(1, cuda, cuMemFreeHost(host));
        // It all works, at the addresses of before.
        assert_eq!(cuda.put(&[1; 4]), at);
        assert_eq!(cuda.get(at, 4), [1; 4]);
        // What is free lay where it does now: freeing it was an error, no second free.
        assert_eq!(cuda.findings(), "");
    });
}

#[test]
fn it_is_refused_while_there_is_work() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let flag = cuda.put(&[0]);
        let module = cuda.module(KERNELS);
        let (stream, other) = (cuda.stream(), cuda.stream());
        cuda.launch(cuda.function(module, "spin"), stream, 1, &[flag]);
        fails!(600, cuda, vgpuReset(1u64));
        cu!(cuda, cuMemsetD32Async(flag, 1u32, 1u64, other));
        cu!(cuda, cuCtxSynchronize());
        cu!(cuda, vgpuReset(1u64));
    });
}
