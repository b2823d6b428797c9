//! Every collective gives the right bits, and the virtual GPU finds nothing, whatever the order in
//! which it lets warps, blocks and devices run, and whichever of the values that the memory model
//! allows its loads return: over many seeds, with schedules at random and by priorities, with a slow
//! device and a slow link, and with the oldest values that are allowed.
//!
//! `RINGTP_P2P_SEEDS=200 cargo test --features cuda --test p2p_seeds` explores more.
#![cfg(feature = "cuda")]

mod p2p_support;

use p2p_support::calls::{Buffers, Wiring, call_all, check_all, every_kind};
use p2p_support::random::Random;
use p2p_support::{Team, as_for_large_messages, options};
use test_driver::in_a_child_with;

/// Seeds of each setting, for each number of ranks.
fn seeds() -> u64 {
    let words = std::env::var("RINGTP_P2P_SEEDS").unwrap_or_else(|_| "6".into());
    words.parse().expect("RINGTP_P2P_SEEDS is a number")
}

fn explore(this: &str, settings: &[(&str, &str)]) {
    in_a_child_with(this, settings, || {
        let Some(driver) = test_driver::take() else {
            return;
        };
        // Broadcasts in one hop, and in parts.
        for (n, options) in [(2, options()), (3, as_for_large_messages())] {
            let mut team = Team::of(n, options);
            let wiring = Wiring::of(&team.group);
            let mut random = Random::new(n as u64);
            // One that fits into a pass, and one that takes two.
            let cases = every_kind::<f32>(&mut random, &wiring, &[80, 13456]);
            let mut buffers: Vec<Vec<Buffers>> = team
                .ranks
                .iter()
                .map(|rank| cases.iter().map(|case| case.place(rank)).collect())
                .collect();
            for seed in 0..seeds() {
                driver.set_seed(seed);
                for (rank, buffers) in team.ranks.iter().zip(&mut buffers) {
                    for (case, buffers) in cases.iter().zip(buffers) {
                        case.write(rank, buffers);
                    }
                }
                call_all(&mut team, &cases, &mut buffers);
                team.synchronize();
                let context = format!("seed {seed}, {settings:?}");
                check_all(&team, &cases, &buffers, &context);
                assert_eq!(driver.findings(), [""; 0], "{context}");
            }
        }
    });
}

#[test]
fn at_random_with_any_values_that_the_memory_model_allows() {
    explore(
        "at_random_with_any_values_that_the_memory_model_allows",
        &[],
    );
}

#[test]
fn with_the_oldest_values_and_a_slow_device() {
    let settings = [("VGPU_STALE", "oldest"), ("VGPU_TOPOLOGY", "slow:1")];
    explore("with_the_oldest_values_and_a_slow_device", &settings);
}

#[test]
fn by_priorities_that_change_and_over_a_slow_link() {
    let settings = [("VGPU_SCHEDULE", "pct:3"), ("VGPU_TOPOLOGY", "slow:0>1")];
    explore("by_priorities_that_change_and_over_a_slow_link", &settings);
}
