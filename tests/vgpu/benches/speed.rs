//! How fast kernels run with all checks on: `cargo bench -p vgpu --bench speed [-- name …]`.
//!
//! Prints lane-instructions a second (one instruction of one thread) on one core, the best of
//! several runs, for a mix of kernels; the same without the race check, which is where the time
//! goes; and with counting on top of all checks. Time is that of the thread, so that other tenants of the machine count little. The
//! results are compared with what they must be.

#[path = "../tests/kernels/gpu.rs"]
#[allow(dead_code)]
mod gpu;

use gpu::{Arg, Gpu, compile};
use vgpu::finding::Kind;
use vgpu::machine::Config;
use vgpu::ptx::ast::Module;

/// Runs of each kernel; the best counts, because the machine has other tenants.
const RUNS: usize = 5;

/// Runs a kernel on fresh data and checks what it made; the seconds of the launch alone.
type Case = fn(&mut Gpu) -> f64;

const CASES: [(&str, Case); 7] = [
    ("arithmetic", arithmetic),
    ("saxpy", saxpy),
    ("matmul", matmul),
    ("reduce", reduce),
    ("gemv", gemv),
    ("histogram", histogram),
    ("ring", ring),
];

/// Time this thread has had a processor: other tenants of the machine do not count.
fn seconds_of_this_thread() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec of our own.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0, "the system keeps the time of threads");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn launch(gpu: &mut Gpu, kernel: &str, grid: [u32; 3], block: u32, args: &[Arg]) -> f64 {
    let start = seconds_of_this_thread();
    let (result, findings) = gpu.run(kernel, grid, [block, 1, 1], 0, args);
    let seconds = seconds_of_this_thread() - start;
    assert_eq!(result, Ok(()), "{kernel}");
    let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(words.is_empty(), "{kernel}: {words:#?}");
    seconds
}

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 37 % 101) as f32).collect()
}

fn arithmetic(gpu: &mut Gpu) -> f64 {
    let out = gpu.room(4 * 16 * 256);
    let args = [out, Arg::Int(256)];
    let seconds = launch(gpu, "arithmetic", [16, 1, 1], 256, &args);
    assert!(gpu.get::<f32>(out, 16 * 256).iter().all(|x| x.is_finite()));
    seconds
}

fn saxpy(gpu: &mut Gpu) -> f64 {
    let n = 1 << 18;
    let x = floats(n);
    let (y, at) = (gpu.put(&x), gpu.put(&x));
    let seconds = launch(gpu, "saxpy", [32, 1, 1], 256, &[y, at, Arg::Int(n as i32)]);
    let expected: Vec<f32> = x.iter().map(|x| 4.0 * x).collect();
    assert!(gpu.get::<f32>(y, n) == expected);
    seconds
}

fn matmul(gpu: &mut Gpu) -> f64 {
    let n = 96;
    let (a, b) = (floats(n * n), floats(n * n));
    let (a_at, b_at, c) = (gpu.put(&a), gpu.put(&b), gpu.room((4 * n * n) as u64));
    let grid = [n as u32 / 16, n as u32 / 16, 1];
    let seconds = launch(
        gpu,
        "matmul",
        grid,
        256,
        &[c, a_at, b_at, Arg::Int(n as i32)],
    );
    let found: Vec<f32> = gpu.get(c, n * n);
    for (at, found) in found.into_iter().enumerate() {
        let (row, column) = (at / n, at % n);
        // Whole numbers below 2^24: exact in any order.
        let sum: f32 = (0..n).map(|k| a[row * n + k] * b[k * n + column]).sum();
        assert_eq!(found, sum);
    }
    seconds
}

fn reduce(gpu: &mut Gpu) -> f64 {
    let n = 1 << 18;
    let x = floats(n);
    let (out, at) = (gpu.room(4 * 32), gpu.put(&x));
    let args = [out, at, Arg::Int(n as i32)];
    let seconds = launch(gpu, "reduce", [32, 1, 1], 256, &args);
    let found: f64 = gpu.get::<f32>(out, 32).iter().map(|&x| f64::from(x)).sum();
    assert_eq!(found, x.iter().map(|&x| f64::from(x)).sum::<f64>());
    seconds
}

fn gemv(gpu: &mut Gpu) -> f64 {
    let (rows, n) = (256, 512);
    let (w, x) = (floats(rows * n), floats(n));
    let (w_at, x_at, y) = (gpu.put(&w), gpu.put(&x), gpu.room(4 * rows as u64));
    let args = [y, w_at, x_at, Arg::Int(n as i32)];
    let seconds = launch(gpu, "gemv", [rows as u32 / 8, 1, 1], 256, &args);
    let found: Vec<f32> = gpu.get(y, rows);
    for (row, found) in found.into_iter().enumerate() {
        // Whole numbers below 2^24: exact in any order.
        let sum: f32 = w[row * n..][..n].iter().zip(&x).map(|(w, x)| w * x).sum();
        assert_eq!(found, sum);
    }
    seconds
}

fn histogram(gpu: &mut Gpu) -> f64 {
    let n = 1 << 17;
    let x: Vec<u8> = (0..n)
        .map(|i: i32| (i.wrapping_mul(i) / 7 % 256) as u8)
        .collect();
    let (bins, at) = (gpu.put(&[0i32; 256]), gpu.put(&x));
    let args = [bins, at, Arg::Int(n)];
    let seconds = launch(gpu, "histogram", [16, 1, 1], 256, &args);
    let mut expected = [0i32; 256];
    x.iter().for_each(|&x| expected[usize::from(x)] += 1);
    assert_eq!(gpu.get::<i32>(bins, 256), expected);
    seconds
}

fn ring(gpu: &mut Gpu) -> f64 {
    let (blocks, threads, rounds) = (8, 256, 64);
    let rows = gpu.put(&vec![0f32; blocks * threads * (rounds + 1)]);
    let flags = gpu.put(&vec![0u32; blocks]);
    let args = [rows, flags, Arg::Int(rounds as i32)];
    let grid = [blocks as u32, 1, 1];
    let seconds = launch(gpu, "ring", grid, threads as u32, &args);
    let found: Vec<f32> = gpu.get(rows, blocks * threads * (rounds + 1));
    let last = &found[blocks * threads * rounds..];
    assert!(last.iter().all(|&x| x == rounds as f32));
    seconds
}

/// Millions of lane-instructions a second, the best of the runs, and how many there were.
fn rate(module: &Module, case: Case, checks: &[Kind], counted: bool) -> (f64, u64) {
    let mut best = 0f64;
    let mut count = 0;
    for _ in 0..RUNS {
        let config = Config {
            checks: checks.to_vec(),
            ..Config::default()
        };
        let mut gpu = Gpu::with(module, config);
        gpu.rig.machine.world.report = counted.then(Box::default);
        let seconds = case(&mut gpu);
        count = gpu.rig.machine.world.lane_instructions;
        best = best.max(count as f64 / seconds / 1e6);
    }
    (best, count)
}

fn main() {
    // `cargo bench` passes `--bench`.
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let module = compile("speed.cu");
    let without: Vec<Kind> = Kind::ALL.into_iter().filter(|&k| k != Kind::Race).collect();
    println!("million lane-instructions a second on one core, best of {RUNS}");
    println!(
        "{:12} {:>12} {:>14} {:>12} {:>12}",
        "kernel", "all checks", "without races", "counted too", "instructions"
    );
    let mut slowest = f64::INFINITY;
    for (name, case) in CASES {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == name) {
            continue;
        }
        let (all, count) = rate(&module, case, &Kind::ALL, false);
        let (some, _) = rate(&module, case, &without, false);
        let (counted, _) = rate(&module, case, &Kind::ALL, true);
        println!("{name:12} {all:12.0} {some:14.0} {counted:12.0} {count:12}");
        slowest = slowest.min(all);
    }
    println!("slowest: {slowest:.0}");
}
