//! Protocols without a fault: whatever the seed, the schedule, slow devices and links and old
//! values, the same results and no finding.

use vgpu::machine::Config;

use crate::node::{CLEAN, Node, explore};

/// Seeds of each protocol; `VGPU_TEST_SEEDS` sets another number.
fn seeds() -> u64 {
    let asked = std::env::var("VGPU_TEST_SEEDS").ok();
    asked.map_or(1000, |n| n.parse().expect("VGPU_TEST_SEEDS is a number"))
}

/// Runs a protocol on a node of so many devices for every seed and compares what it gives.
fn on_devices(devices: u32, expected: &[u64], run: impl Fn(&mut Node) -> Vec<u64>) {
    let ranks: Vec<u32> = (0..devices).collect();
    on_ranks(devices, &ranks, expected, run);
}

/// The same with ranks on these devices.
fn on_ranks(devices: u32, ranks: &[u32], expected: &[u64], run: impl Fn(&mut Node) -> Vec<u64>) {
    for seed in 0..seeds() {
        let mut node = Node::with_ranks(&CLEAN, explore(devices, seed), ranks);
        let out = run(&mut node);
        let findings = node.findings();
        let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert!(words.is_empty(), "seed {seed}: {words:#?}");
        assert_eq!(out, expected, "seed {seed}");
    }
}

/// What `input` in clean.cu gives.
fn input(rank: u64, i: u64, step: u64) -> u64 {
    (rank + 1) * 1000 + i * 7 + step
}

/// The sums over `world` ranks of `n` words, for every rank.
fn sums(world: u64, n: u64, steps: std::ops::Range<u64>) -> Vec<u64> {
    let sum = |i| {
        (0..world)
            .flat_map(|r| steps.clone().map(move |s| input(r, i, s)))
            .sum()
    };
    let one: Vec<u64> = (0..n).map(sum).collect();
    one.repeat(world as usize)
}

/// Launches a kernel of all ranks once and gives what they put out, `words` each.
fn once(
    node: &mut Node,
    kernel: &str,
    (grid, block): (u32, u32),
    data: usize,
    fill: u64,
    words: usize,
    args: &[u64],
) -> Vec<u64> {
    let (_, ranks) = node.ranks(64, data, fill);
    let outs = node.outs(words);
    node.on_all(kernel, grid, block, &ranks, &outs, args);
    let faults = node.run();
    assert!(faults.iter().all(Option::is_none), "{kernel}: {faults:?}");
    outs.iter().flat_map(|&at| node.get(at, words)).collect()
}

#[test]
fn one_shot_all_reduce() {
    on_devices(3, &sums(3, 40, 0..1), |node| {
        once(node, "one_shot", (2, 32), 40, 0, 40, &[40, 0])
    });
}

#[test]
fn one_shot_all_reduce_in_packs() {
    // Two passes of the blocks' threads, the second not quite full.
    on_devices(3, &sums(3, 40, 0..1), |node| {
        once(node, "one_shot_packs", (2, 8), 40, 0, 40, &[40, 0])
    });
}

#[test]
fn a_kernel_launched_again_and_again() {
    on_devices(2, &sums(2, 8, 2..3), |node| {
        let (_, ranks) = node.ranks(64, 8, 0);
        let outs = node.outs(8);
        for step in 0..3 {
            node.on_all("one_shot", 1, 32, &ranks, &outs, &[8, step]);
        }
        node.run();
        outs.iter().flat_map(|&at| node.get(at, 8)).collect()
    });
}

#[test]
fn push_with_two_sets_of_slots() {
    on_devices(3, &sums(3, 5, 0..4), |node| {
        once(node, "push", (1, 32), 30, 0, 5, &[5, 4])
    });
}

#[test]
fn two_shot_all_reduce() {
    on_devices(3, &sums(3, 12, 0..1), |node| {
        once(node, "two_shot", (1, 32), 24, 0, 12, &[12, 0])
    });
}

#[test]
fn ring_all_reduce() {
    on_devices(4, &sums(4, 8, 0..1), |node| {
        once(node, "ring", (1, 32), 12, 0, 8, &[8])
    });
}

#[test]
fn packets_of_data_and_flag() {
    on_devices(3, &sums(3, 4, 0..3), |node| {
        once(node, "packets", (1, 32), 24, 0, 4, &[4, 3])
    });
}

#[test]
fn two_packets_to_a_vector() {
    let expected: Vec<u64> = (0..2u64)
        .flat_map(|r| (0..6).map(move |i| (1 - r + i) * 1000 + (1 - r) * 2 + i))
        .collect();
    on_devices(2, &expected, |node| {
        once(node, "packets_v2", (1, 32), 12, 0, 6, &[6])
    });
}

#[test]
fn words_that_are_their_own_flags() {
    on_devices(2, &sums(2, 4, 0..3), |node| {
        once(node, "sentinel", (1, 32), 8, u64::MAX, 4, &[4, 3])
    });
}

#[test]
fn mailbox() {
    let received: Vec<u64> = (0..4)
        .map(|i| (0..3).map(|s| input(0, i, s)).sum())
        .collect();
    on_devices(2, &[vec![0; 4], received].concat(), |node| {
        once(node, "mailbox", (1, 64), 4, 0, 4, &[4, 3])
    });
}

#[test]
fn fences_around_relaxed_flags() {
    on_devices(3, &sums(3, 8, 0..1), |node| {
        once(node, "fences", (1, 32), 8, 0, 8, &[8])
    });
}

#[test]
fn volatile_flags_and_threadfence() {
    on_devices(3, &sums(3, 8, 0..1), |node| {
        once(node, "volatiles", (1, 32), 8, 0, 8, &[8])
    });
}

#[test]
fn a_counter_for_all() {
    on_devices(3, &sums(3, 8, 0..1), |node| {
        once(node, "counter", (1, 32), 8, 0, 8, &[8])
    });
}

#[test]
fn a_barrier_at_second_hand() {
    on_devices(4, &sums(4, 8, 0..1), |node| {
        once(node, "dissemination", (1, 32), 8, 0, 8, &[8])
    });
}

#[test]
fn a_lock_across_devices() {
    // Each of three ranks adds its number three times.
    on_devices(3, &[18, 18, 18], |node| {
        let (_, mut ranks) = node.ranks(8, 1, 0);
        // A second set of flags for the barrier, whose table follows the first.
        let meet: Vec<u64> = (0..3).map(|r| node.put(r, &[0; 8])).collect();
        let locks: Vec<u64> = (0..3).map(|r| node.put(r, &[0; 8])).collect();
        for (rank, entry) in ranks.iter_mut().enumerate() {
            entry[2] = node.put(rank, &[locks.clone(), meet.clone()].concat());
        }
        let outs = node.outs(1);
        node.on_all("ticket_lock", 1, 32, &ranks, &outs, &[3]);
        node.run();
        outs.iter().flat_map(|&at| node.get(at, 1)).collect()
    });
}

#[test]
fn seqlock() {
    on_devices(3, &[0, 0, 0], |node| {
        once(node, "seqlock", (1, 32), 2, 0, 1, &[4])
    });
}

#[test]
fn broadcast() {
    let one: Vec<u64> = (0..8).map(|i| input(0, i, 0)).collect();
    on_devices(3, &one.repeat(3), |node| {
        once(node, "broadcast", (1, 32), 8, 0, 8, &[8])
    });
}

#[test]
fn all_gather() {
    let one: Vec<u64> = (0..3)
        .flat_map(|r| (0..4).map(move |i| input(r, i, 0)))
        .collect();
    on_devices(3, &one.repeat(3), |node| {
        once(node, "all_gather", (1, 32), 12, 0, 12, &[4])
    });
}

#[test]
fn several_ranks_on_a_device() {
    on_ranks(2, &[0, 0, 1, 1], &sums(4, 8, 0..1), |node| {
        once(node, "two_shot", (1, 32), 16, 0, 8, &[8, 0])
    });
}

#[test]
fn all_ranks_on_one_device() {
    on_ranks(1, &[0, 0, 0], &sums(3, 6, 0..1), |node| {
        once(node, "two_shot", (1, 32), 12, 0, 6, &[6, 0])
    });
}

#[test]
fn an_event_between_streams_of_two_devices() {
    let expected: Vec<u64> = (0..32).map(|i| 8 + i).collect();
    on_devices(2, &expected, |node| {
        let (data, out) = (node.room(0, 32), node.room(1, 32));
        node.launch(node.stream(0), "fill", 1, 32, &[data, 7]);
        let event = node.record(node.stream(0));
        node.wait(node.stream(1), event);
        node.launch(node.stream(1), "increment", 1, 32, &[data, out]);
        node.run();
        node.get(out, 32)
    });
}

#[test]
fn a_copy_between_two_kernels_of_two_devices() {
    let expected: Vec<u64> = (0..32).map(|i| 8 + i).collect();
    on_devices(2, &expected, |node| {
        let (data, landed, out) = (node.room(0, 32), node.room(1, 32), node.room(1, 32));
        node.launch(node.stream(0), "fill", 1, 32, &[data, 7]);
        node.copy(node.stream(0), landed, data, 32);
        let event = node.record(node.stream(0));
        node.wait(node.stream(1), event);
        node.launch(node.stream(1), "increment", 1, 32, &[landed, out]);
        node.run();
        node.get(out, 32)
    });
}

#[test]
fn a_spinner_released_by_a_copy() {
    let expected: Vec<u64> = (0..32).map(|i| 7 + i).collect();
    on_devices(2, &expected, |node| {
        let (flag, one) = (node.put(0, &[0]), node.put(1, &[1]));
        let (data, out) = (node.room(0, 32), node.room(0, 32));
        node.launch(node.stream(0), "fill", 1, 32, &[data, 7]);
        let filled = node.record(node.stream(0));
        node.launch(node.stream(0), "take", 1, 32, &[flag, 1, data, out]);
        node.wait(node.stream(1), filled);
        node.copy(node.stream(1), flag, one, 1);
        node.run();
        node.get(out, 32)
    });
}

#[test]
fn more_blocks_than_begin_at_once() {
    // Sixty-four blocks on each of two devices, each meeting its like.
    let config = Config {
        devices: 2,
        ..Config::default()
    };
    let mut node = Node::new(&CLEAN, config);
    let (_, ranks) = node.ranks(128, 64, 0);
    let outs = node.outs(64);
    node.on_all("one_shot", 64, 2, &ranks, &outs, &[64, 0]);
    node.run();
    assert!(node.findings().is_empty());
    let out: Vec<u64> = outs.iter().flat_map(|&at| node.get(at, 64)).collect();
    assert_eq!(out, sums(2, 64, 0..1));
}
