//! How much processor time an all-reduce on eight devices takes with every check on: printed, and
//! its sums checked. `cargo test -p vgpu --test devices speed -- --nocapture`

use std::time::Duration;

use vgpu::machine::Config;

use crate::node::{CLEAN, Node};

/// Processor time of this thread: other processes do not count.
fn now() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time is written to a place of its own.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Kernel, bytes, blocks, threads and seeds.
const CASES: [(&str, usize, u32, u32, u64); 3] = [
    ("one_shot", 4 << 10, 4, 128, 3),
    ("one_shot_packs", 4 << 10, 1, 256, 3),
    ("one_shot_packs", 1 << 20, 32, 512, 1),
];

#[test]
fn one_shot_all_reduces_of_eight_devices() {
    for (kernel, bytes, grid, block, seeds) in CASES {
        let words = bytes / 8;
        let mut times: Vec<Duration> = (0..seeds)
            .map(|seed| {
                let config = Config {
                    devices: 8,
                    seed,
                    ..Config::default()
                };
                let mut node = Node::new(&CLEAN, config);
                let (_, ranks) = node.ranks(8 * grid as usize, words, 0);
                let outs = node.outs(words);
                node.on_all(kernel, grid, block, &ranks, &outs, &[words as u64, 0]);
                let start = now();
                let faults = node.run();
                let time = now() - start;
                assert!(faults.iter().all(Option::is_none), "{faults:?}");
                assert!(node.findings().is_empty());
                for &out in &outs {
                    let sums = node.get(out, words);
                    // The ranks put in (rank + 1) * 1000 + 7 i.
                    let right = |(i, &sum): (usize, &u64)| sum == 36_000 + 56 * i as u64;
                    assert!(sums.iter().enumerate().all(right));
                }
                time
            })
            .collect();
        times.sort_unstable();
        let middle = times[times.len() / 2];
        println!("{kernel}, {bytes} bytes on 8 devices: {middle:?}");
    }
}
