//! All-reduce over CPU ranks: a table per number of ranks, as nccl-tests prints them.
//!
//! `algbw` is message bytes / time; `busbw` is algbw × 2(N-1)/N, what a link carries in the
//! best algorithm. A row's time is the median over rank 0's calls; the collective itself keeps
//! the ranks in step. Beside it stands, from the same run, what it cannot do without: `hand-over`,
//! the time in which two threads that do nothing else pass a message of that size one way, the
//! one by a `memcpy` and a flag, the other by waiting for the flag and a `memcpy`; half of a
//! round trip. An all-reduce passes messages both ways, and adds.
//!
//! `cargo bench --bench comm [-- RANKS…]`; by default 2 and 4 ranks.

use std::cell::UnsafeCell;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringtp::comm::{ALL, AllReduce, GroupOptions, run_ranks};

const SIZES: [usize; 9] = [
    256,
    2 << 10,
    8 << 10,
    32 << 10,
    128 << 10,
    512 << 10,
    2 << 20,
    8 << 20,
    32 << 20,
];

/// Bytes moved per measurement, to choose the number of calls.
const BUDGET: usize = 64 << 20;

fn main() -> Result<(), ringtp::Error> {
    let ranks: Vec<usize> = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .collect();
    let ranks = if ranks.is_empty() { vec![2, 4] } else { ranks };
    // `cargo test --benches` only sees whether it runs.
    let measure = std::env::args().any(|arg| arg == "--bench");
    let sizes = if measure {
        SIZES.as_slice()
    } else {
        &SIZES[..2]
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for world_size in ranks {
        let how = if world_size <= cores { "spin" } else { "sleep" };
        println!("\n# all_reduce, f32, {world_size} ranks on {cores} cores: they {how}");
        println!(
            "{:>10}  {:>9}  {:>10}  {:>8}  {:>8}  {:>12}",
            "bytes", "algorithm", "time us", "algbw", "busbw", "hand-over us"
        );
        for &bytes in sizes {
            let limit = hand_over(bytes);
            for &algorithm in ALL {
                let time = all_reduce(world_size, algorithm, bytes)?.as_secs_f64();
                let algbw = bytes as f64 / time / 1e9;
                let busbw = algbw * 2.0 * (world_size - 1) as f64 / world_size as f64;
                println!(
                    "{bytes:>10}  {:>9}  {:>10.2}  {algbw:>8.2}  {busbw:>8.2}  {:>12.2}",
                    algorithm.name(),
                    time * 1e6,
                    limit.as_secs_f64() * 1e6,
                );
            }
        }
    }
    Ok(())
}

fn repetitions(world_size: usize, bytes: usize) -> usize {
    let most = if world_size <= 2 { 20_000 } else { 2_000 };
    (BUDGET / bytes).clamp(9, most)
}

/// The median of rank 0's times, each of a few calls where one is too short for the clock.
fn all_reduce(
    world_size: usize,
    algorithm: &dyn AllReduce,
    bytes: usize,
) -> Result<Duration, ringtp::Error> {
    let results = run_ranks(world_size, GroupOptions::default(), |comm| {
        pin(comm.rank(), world_size);
        // Zeros: no overflow however often they are summed.
        let mut data = vec![0_f32; bytes / 4];
        let mut times = Vec::new();
        let batch = if bytes <= 32 << 10 { 10 } else { 1 };
        for _ in 0..repetitions(world_size, bytes) {
            let start = Instant::now();
            for _ in 0..batch {
                comm.all_reduce_with(algorithm, black_box(&mut data))?;
            }
            times.push(start.elapsed() / batch);
        }
        // The first calls grow the logs.
        Ok(median(&mut times[4..]))
    })?;
    let times: Vec<Duration> = results.into_iter().collect::<Result<_, _>>()?;
    Ok(times[0])
}

/// Keeps this thread on a core of its own, where there is one for every rank.
fn pin(rank: usize, world_size: usize) {
    if world_size > std::thread::available_parallelism().map_or(1, usize::from) {
        return;
    }
    #[cfg(target_os = "linux")]
    // SAFETY: an all-zero `cpu_set_t` is an empty set; the calls only read and write it.
    unsafe {
        let mut cores: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of_val(&cores), &mut cores) != 0 {
            return;
        }
        let mine = (0..libc::CPU_SETSIZE as usize)
            .filter(|&core| libc::CPU_ISSET(core, &cores))
            .nth(rank);
        if let Some(mine) = mine {
            libc::CPU_ZERO(&mut cores);
            libc::CPU_SET(mine, &mut cores);
            // If refused, the rank runs where it may.
            libc::sched_setaffinity(0, size_of_val(&cores), &cores);
        }
    }
}

/// A message on its way from one thread to another.
struct Passage {
    /// Hand-overs so far, written by the sender.
    sent: Line,
    bytes: UnsafeCell<Vec<u8>>,
}

/// On cache lines of its own.
#[repr(align(128))]
struct Line(AtomicUsize);

// SAFETY: `hand_over` has the two threads take turns, ordered by `sent`.
unsafe impl Sync for Passage {}

fn hand_over(bytes: usize) -> Duration {
    let passages = [(); 2].map(|()| Passage {
        sent: Line(AtomicUsize::new(0)),
        bytes: UnsafeCell::new(vec![1; bytes]),
    });
    let rounds = repetitions(2, bytes);
    let thread = |me: usize| {
        pin(me, 2);
        let (out, back) = (&passages[me], &passages[1 - me]);
        let mut message = vec![me as u8; bytes];
        let mut times = Vec::new();
        for round in 1..=rounds {
            let start = Instant::now();
            for turn in 0..2 {
                if turn == me {
                    // SAFETY: the other thread reads it only once `sent` says so, and has done
                    // with what was sent before, or it would not have answered.
                    unsafe { (&mut *out.bytes.get()).copy_from_slice(black_box(&message)) };
                    out.sent.0.store(round, Ordering::Release);
                } else {
                    while back.sent.0.load(Ordering::Acquire) < round {
                        std::hint::spin_loop();
                    }
                    // SAFETY: it has been sent, and is sent again only after an answer.
                    black_box(&mut message).copy_from_slice(unsafe { &*back.bytes.get() });
                }
            }
            times.push(start.elapsed() / 2);
        }
        median(&mut times)
    };
    std::thread::scope(|scope| {
        scope.spawn(|| thread(1));
        scope
            .spawn(|| thread(0))
            .join()
            .expect("passing messages does not panic")
    })
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
