//! Kernels without a fault give the right results, whatever order they run in, and no findings.

use crate::gpu::{Arg, Gpu, compile};
use vgpu::machine::{Command, Config, Progress};
use vgpu::race::Stale;

/// Runs a kernel, which must be right and clean, on many seeds: the results must be the same.
fn on_seeds<T: bytemuck::Pod + PartialEq + std::fmt::Debug>(
    seeds: u64,
    case: impl Fn(&mut Gpu) -> Vec<T>,
) -> Vec<T> {
    let module = compile("clean.cu");
    let mut first: Option<Vec<T>> = None;
    for seed in 0..seeds {
        // Any old value now and then, and the adversary that always has the oldest.
        for stale in [Stale::Random, Stale::Oldest] {
            let config = Config {
                seed,
                stale,
                ..Config::default()
            };
            let mut gpu = Gpu::with(&module, config);
            let out = case(&mut gpu);
            match &first {
                None => first = Some(out),
                Some(first) => {
                    assert!(
                        *first == out,
                        "seed {seed}, {stale:?}: {out:?}, not {first:?}"
                    );
                }
            }
        }
    }
    first.expect("there is at least one seed")
}

const SEEDS: u64 = 200;

fn clean(gpu: &mut Gpu, kernel: &str, grid: [u32; 3], block: u32, shared: u32, args: &[Arg]) {
    let (result, findings) = gpu.run(kernel, grid, [block, 1, 1], shared, args);
    let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(words.is_empty(), "{kernel}: {words:#?}");
    result.unwrap_or_else(|fault| panic!("{kernel}: {fault:?}"));
}

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 37 % 101) as f32).collect()
}

fn ints(n: usize) -> Vec<i32> {
    (0..n as i32).map(|i| i * 7919 % 1000).collect()
}

#[test]
fn saxpy() {
    let out: Vec<f32> = on_seeds(SEEDS, |gpu| {
        let (x, y) = (gpu.put(&floats(1000)), gpu.put(&floats(1000)));
        clean(gpu, "saxpy", [4, 1, 1], 256, 0, &[y, x, Arg::Int(1000)]);
        gpu.get(y, 1000)
    });
    let expected: Vec<f32> = floats(1000).iter().map(|x| 3.0 * x).collect();
    assert_eq!(out, expected);
}

#[test]
fn sums_of_a_block() {
    let total: f32 = floats(1000).iter().sum();
    for (kernel, shared) in [("block_sum", 4 * 128), ("warp_sum", 0)] {
        let out: Vec<f32> = on_seeds(SEEDS, |gpu| {
            let (x, out) = (gpu.put(&floats(1000)), gpu.room(4));
            clean(
                gpu,
                kernel,
                [1, 1, 1],
                128,
                shared,
                &[out, x, Arg::Int(1000)],
            );
            gpu.get(out, 1)
        });
        assert_eq!(out, [total], "{kernel}");
    }
}

#[test]
fn prefix_sums() {
    let prefix = |values: &[i32]| -> Vec<i32> {
        let mut sum = 0;
        let step = |v: &i32| {
            sum += v;
            sum
        };
        values.iter().map(step).collect()
    };
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let (x, out) = (gpu.put(&ints(200)), gpu.room(800));
        clean(gpu, "scan", [1, 1, 1], 256, 0, &[out, x, Arg::Int(200)]);
        gpu.get(out, 200)
    });
    assert_eq!(out, prefix(&ints(200)));
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let (x, out) = (gpu.put(&ints(32)), gpu.room(128));
        clean(gpu, "warp_scan", [1, 1, 1], 32, 0, &[out, x]);
        gpu.get(out, 32)
    });
    assert_eq!(out, prefix(&ints(32)));
}

#[test]
fn a_histogram() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let (x, bins) = (gpu.put(&ints(1000)), gpu.put(&[0i32; 16]));
        clean(
            gpu,
            "histogram",
            [3, 1, 1],
            64,
            0,
            &[bins, x, Arg::Int(1000)],
        );
        gpu.get(bins, 16)
    });
    let expected: Vec<i32> = (0..16)
        .map(|bin| ints(1000).iter().filter(|&&x| x & 15 == bin).count() as i32)
        .collect();
    assert_eq!(out, expected);
}

#[test]
fn a_transpose() {
    let n = 50;
    let out: Vec<f32> = on_seeds(20, |gpu| {
        let (x, out) = (gpu.put(&floats(n * n)), gpu.room(4 * 2500));
        let args = [out, x, Arg::Int(n as i32)];
        let (result, findings) = gpu.run("transpose", [2, 2, 1], [32, 8, 1], 0, &args);
        assert!(result.is_ok() && findings.is_empty(), "{findings:?}");
        gpu.get(out, n * n)
    });
    let x = floats(n * n);
    for row in 0..n {
        for column in 0..n {
            assert_eq!(out[column * n + row], x[row * n + column]);
        }
    }
}

#[test]
fn a_tiled_product() {
    let n = 32;
    let out: Vec<f32> = on_seeds(20, |gpu| {
        let (a, b) = (gpu.put(&floats(n * n)), gpu.put(&floats(n * n)));
        let c = gpu.room(4096);
        let args = [c, a, b, Arg::Int(n as i32)];
        let (result, findings) = gpu.run("matmul", [2, 2, 1], [16, 16, 1], 0, &args);
        assert!(result.is_ok() && findings.is_empty(), "{findings:?}");
        gpu.get(c, n * n)
    });
    let x = floats(n * n);
    for row in 0..n {
        for column in 0..n {
            // Whole numbers below 2^24: exact in any order.
            let sum: f32 = (0..n).map(|k| x[row * n + k] * x[k * n + column]).sum();
            assert_eq!(out[row * n + column], sum);
        }
    }
}

#[test]
fn the_last_block_adds_up() {
    let out: Vec<f32> = on_seeds(SEEDS, |gpu| {
        let (x, out, partial) = (gpu.put(&floats(1000)), gpu.room(4), gpu.room(20));
        let count = gpu.put(&[0i32]);
        let args = [out, partial, count, x, Arg::Int(1000)];
        clean(gpu, "last_block", [5, 1, 1], 32, 0, &args);
        gpu.get(out, 1)
    });
    assert_eq!(out, [floats(1000).iter().sum::<f32>()]);
}

#[test]
fn locks_between_warps_and_between_lanes() {
    for (kernel, expected) in [("spin_lock", 12), ("lane_lock", 384)] {
        let out: Vec<i32> = on_seeds(50, |gpu| {
            let (lock, value) = (gpu.put(&[0i32]), gpu.put(&[0i32]));
            clean(gpu, kernel, [3, 1, 1], 128, 0, &[lock, value]);
            gpu.get(value, 1)
        });
        assert_eq!(out, [expected], "{kernel}");
    }
}

#[test]
fn a_message_between_blocks() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let (data, flag, out) = (gpu.room(256), gpu.put(&[0i32]), gpu.room(256));
        clean(gpu, "message", [2, 1, 1], 64, 0, &[data, flag, out]);
        gpu.get(out, 64)
    });
    assert_eq!(out, (100..164).collect::<Vec<i32>>());
}

#[test]
fn a_barrier_of_the_grid() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let (count, data, out) = (gpu.put(&[0i32]), gpu.room(1536), gpu.room(1536));
        clean(gpu, "grid_barrier", [6, 1, 1], 64, 0, &[count, data, out]);
        gpu.get(out, 384)
    });
    let expected: Vec<i32> = (0..384).map(|i| (i / 64 + 1) % 6 + 1).collect();
    assert_eq!(out, expected);
}

#[test]
fn barriers_with_names_and_counts() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let out = gpu.room(4 * 160);
        clean(gpu, "named_barriers", [1, 1, 1], 64, 0, &[out, Arg::Int(5)]);
        gpu.get(out, 160)
    });
    let expected: Vec<i32> = (0..160).map(|i| 10 * (i / 32) + 31 - i % 32).collect();
    assert_eq!(out, expected);
}

#[test]
fn warp_synchronous_code() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let out = gpu.room(128);
        clean(gpu, "warp_synchronous", [1, 1, 1], 32, 0, &[out]);
        gpu.get(out, 32)
    });
    let s: Vec<i32> = (0..32).map(|l| (31 - l) * (31 - l) + 1).collect();
    let expected: Vec<i32> = (0..32).map(|l| s[(l + 1) % 32]).collect();
    assert_eq!(out, expected);
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let out = gpu.room(128);
        clean(gpu, "half_warps", [1, 1, 1], 32, 0, &[out]);
        gpu.get(out, 32)
    });
    assert_eq!(
        out,
        (0..16).rev().chain((16..32).rev()).collect::<Vec<i32>>()
    );
}

#[test]
fn ballots_and_matches() {
    let mut out: Vec<i32> = on_seeds(1, |gpu| {
        let (x, out, count) = (gpu.put(&ints(100)), gpu.room(512), gpu.put(&[0i32]));
        clean(
            gpu,
            "compact",
            [1, 1, 1],
            128,
            0,
            &[out, count, x, Arg::Int(100)],
        );
        let n = gpu.get::<i32>(count, 1)[0];
        gpu.get(out, n as usize)
    });
    let mut expected: Vec<i32> = ints(100).into_iter().filter(|x| x % 3 == 0).collect();
    expected.sort_unstable();
    out.sort_unstable();
    assert_eq!(out, expected);
    let keys: Vec<i32> = ints(96).iter().map(|x| x % 5).collect();
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let (keys, bins) = (gpu.put(&keys), gpu.put(&[0i32; 5]));
        clean(gpu, "aggregated", [1, 1, 1], 96, 0, &[bins, keys]);
        gpu.get(bins, 5)
    });
    let count = |bin: i32| keys.iter().filter(|&&k| k == bin).count() as i32;
    assert_eq!(out, (0..5).map(count).collect::<Vec<i32>>());
}

#[test]
fn a_sorting_network() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let data = gpu.put(&ints(128));
        clean(gpu, "bitonic", [1, 1, 1], 128, 0, &[data]);
        gpu.get(data, 128)
    });
    let mut expected = ints(128);
    expected.sort_unstable();
    assert_eq!(out, expected);
}

#[test]
fn neighbours_write_bytes_of_one_word() {
    let out: Vec<u8> = on_seeds(SEEDS, |gpu| {
        let out = gpu.room(100);
        clean(gpu, "bytes", [1, 1, 1], 100, 0, &[out]);
        gpu.get(out, 100)
    });
    assert_eq!(out, (0..100).map(|i| (3 * i) as u8).collect::<Vec<u8>>());
}

#[test]
fn vectors_of_four() {
    let out: Vec<f32> = on_seeds(SEEDS, |gpu| {
        let (x, out) = (gpu.put(&floats(400)), gpu.room(1600));
        clean(gpu, "vectors", [2, 1, 1], 64, 0, &[out, x, Arg::Int(100)]);
        gpu.get(out, 400)
    });
    let x = floats(400);
    let expected: Vec<f32> = (0..400).map(|i| x[i / 4 * 4 + 3 - i % 4]).collect();
    assert_eq!(out, expected);
}

#[test]
fn a_softmax() {
    let n = 70;
    let out: Vec<f32> = on_seeds(20, |gpu| {
        let x: Vec<f32> = floats(3 * n).iter().map(|x| x / 20.0).collect();
        let (x, out) = (gpu.put(&x), gpu.room(4 * 3 * 70));
        clean(
            gpu,
            "softmax",
            [3, 1, 1],
            32,
            0,
            &[out, x, Arg::Int(n as i32)],
        );
        gpu.get(out, 3 * n)
    });
    for row in 0..3 {
        let x = &floats(3 * n)[row * n..(row + 1) * n];
        let e: Vec<f64> = x.iter().map(|x| f64::from(x / 20.0).exp()).collect();
        let sum: f64 = e.iter().sum();
        for (found, e) in out[row * n..(row + 1) * n].iter().zip(&e) {
            // exp, sum and quotient each within a few steps of 2^-24.
            assert!((f64::from(*found) / (e / sum) - 1.0).abs() < 3e-6);
        }
    }
}

#[test]
fn calls_of_functions() {
    let out: Vec<i32> = on_seeds(20, |gpu| {
        let out = gpu.room(128);
        clean(gpu, "recursion", [1, 1, 1], 32, 0, &[out]);
        gpu.get(out, 32)
    });
    let fibonacci = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34];
    assert_eq!(
        out,
        (0..32).map(|i| fibonacci[i % 10]).collect::<Vec<i32>>()
    );
    let out: Vec<i32> = on_seeds(20, |gpu| {
        let out = gpu.room(128);
        clean(gpu, "pointers", [1, 1, 1], 32, 0, &[out]);
        gpu.get(out, 32)
    });
    let expected = |i: i32| if i % 2 == 0 { 2 * i } else { i * i };
    assert_eq!(out, (0..32).map(expected).collect::<Vec<i32>>());
}

#[test]
fn arrays_in_local_memory() {
    let order: Vec<i32> = (0..16).map(|i| i * 5 % 16).collect();
    let out: Vec<i32> = on_seeds(20, |gpu| {
        let (order, out) = (gpu.put(&order), gpu.room(160));
        clean(gpu, "local_array", [1, 1, 1], 40, 0, &[out, order]);
        gpu.get(out, 40)
    });
    for (t, &found) in out.iter().enumerate() {
        let mut a = [0i32; 16];
        for i in 0..16 {
            a[order[i] as usize] = i as i32 * t as i32;
        }
        let step =
            |sum: i32, i: usize| sum.wrapping_mul(31).wrapping_add(a[order[15 - i] as usize]);
        assert_eq!(found, (0..16).fold(0, step));
    }
}

#[test]
fn halves_of_both_kinds() {
    let a: Vec<half::f16> = (0..64)
        .map(|i| half::f16::from_f32(i as f32 / 8.0))
        .collect();
    let b: Vec<half::bf16> = (0..64).map(|i| half::bf16::from_f32(i as f32)).collect();
    let bits = |v: &[u16]| v.to_vec();
    let a_bits: Vec<u16> = a.iter().map(|x| x.to_bits()).collect();
    let b_bits: Vec<u16> = b.iter().map(|x| x.to_bits()).collect();
    let out: Vec<u16> = on_seeds(20, |gpu| {
        let (a, b) = (gpu.put(&bits(&a_bits)), gpu.put(&bits(&b_bits)));
        let out = gpu.room(128);
        clean(gpu, "halves", [1, 1, 1], 32, 0, &[out, a, b]);
        gpu.get(out, 64)
    });
    for i in 0..64 {
        let exact = a[i].to_f64() * a[i].to_f64() + b[i].to_f64();
        assert_eq!(half::f16::from_bits(out[i]), half::f16::from_f64(exact));
    }
}

#[test]
fn a_stencil_that_swaps_its_buffers() {
    let n = 100;
    let out: Vec<f32> = on_seeds(SEEDS, |gpu| {
        let (a, b) = (gpu.put(&floats(n)), gpu.room(400));
        clean(
            gpu,
            "stencil",
            [1, 1, 1],
            64,
            0,
            &[a, b, Arg::Int(n as i32), Arg::Int(4)],
        );
        gpu.get(a, n)
    });
    let mut x = floats(n);
    for _ in 0..4 {
        let at = |i: i64| {
            if (0..n as i64).contains(&i) {
                x[i as usize]
            } else {
                0.0
            }
        };
        x = (0..n as i64)
            .map(|i| 0.25 * at(i - 1) + 0.5 * at(i) + 0.25 * at(i + 1))
            .collect();
    }
    assert_eq!(out, x);
}

#[test]
fn threads_that_leave_early() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let out = gpu.room(160);
        clean(gpu, "early_exit", [1, 1, 1], 64, 0, &[out, Arg::Int(40)]);
        gpu.get(out, 40)
    });
    assert_eq!(out, [2; 40]);
}

#[test]
fn printf_formats_as_c_does() {
    let module = compile("clean.cu");
    let mut gpu = Gpu::new(&module, 3);
    clean(&mut gpu, "printing", [1, 1, 1], 32, 0, &[Arg::Int(3)]);
    let text = String::from_utf8_lossy(&gpu.rig.machine.world.output).into_owned();
    let expected = "thread 0 of block:  0.00 x%\nthread 1 of block:  0.50 x%\n\
                    thread 2 of block:  1.00 x%\n";
    assert_eq!(text, expected);
}

#[test]
fn a_spinner_is_released_by_a_later_copy_of_the_host() {
    let module = compile("clean.cu");
    for seed in 0..20 {
        let mut gpu = Gpu::new(&module, seed);
        let (flag, out) = (gpu.put(&[0i32]), gpu.room(4));
        gpu.start("spinner", [1, 1, 1], [1, 1, 1], 0, &[flag, out]);
        // The machine finds that nothing moves; the host still can.
        let mut steps = 0u64;
        while !matches!(gpu.rig.machine.step(), Progress::Stuck) {
            steps += 1;
            assert!(
                steps < 10_000_000,
                "a spinner that nobody releases is noticed"
            );
        }
        let Arg::Pointer(address) = flag else {
            panic!("no pointer");
        };
        let other = gpu.rig.machine.create_stream(0);
        let copy = Command::Work(Box::new(move |world| {
            let written = world.memory.write(address, &7i32.to_le_bytes());
            written.map_err(|_| vgpu::finding::Fault::IllegalAddress)
        }));
        gpu.rig.machine.enqueue(other, copy);
        gpu.rig.synchronise().expect("it ends");
        let findings = gpu.rig.findings();
        assert!(findings.is_empty(), "{findings:?}");
        assert_eq!(gpu.get::<i32>(out, 1), [7]);
    }
}

/// The rest of its warp waits for the sleeper, which is no deadlock: time brings it back.
#[test]
fn a_lane_that_sleeps_until_its_deadline_brings_its_block_on() {
    let out: Vec<i32> = on_seeds(SEEDS, |gpu| {
        let (flag, out) = (gpu.put(&[0i32]), gpu.room(4 * 96));
        // A millisecond, in a word as wide as a pointer.
        let args = [flag, out, Arg::Pointer(1_000_000)];
        clean(gpu, "deadline", [1, 1, 1], 96, 0, &args);
        gpu.get(out, 96)
    });
    assert_eq!(out, [1; 96]);
}

#[test]
fn the_speed_kernel_is_clean_and_its_rate_is_printed() {
    let module = compile("clean.cu");
    let mut gpu = Gpu::new(&module, 0);
    let (x, out) = (gpu.put(&floats(16 * 256)), gpu.room(4 * 16 * 256));
    let start = std::time::Instant::now();
    clean(
        &mut gpu,
        "speed",
        [16, 1, 1],
        256,
        0,
        &[out, x, Arg::Int(40)],
    );
    let seconds = start.elapsed().as_secs_f64();
    let lanes = gpu.rig.machine.world.lane_instructions as f64;
    println!(
        "{:.0} million lane-instructions a second",
        lanes / seconds / 1e6
    );
    let sum: f32 = gpu.get::<f32>(out, 16 * 256).iter().sum();
    assert!(sum.is_finite());
}
