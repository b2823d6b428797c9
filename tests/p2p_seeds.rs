//! Every collective gives the right bits, and the virtual GPU finds nothing, whatever the order in
//! which it lets warps, blocks and devices run, and whichever of the values that the memory model
//! allows its loads return. A seed chooses: turns at random or by priorities that change, a slow
//! device or a slow link, any value that is allowed or the oldest.
//!
//! `RINGTP_P2P_SEEDS=10000 cargo test --features cuda --test p2p_seeds` explores more than the 200 of
//! the ordinary run, and `RINGTP_P2P_FIRST_SEED` begins elsewhere.
#![cfg(feature = "cuda")]

mod p2p_support;

use p2p_support::calls::{Buffers, Case, Wiring, call_all, check_all, every_kind};
use p2p_support::random::Random;
use p2p_support::{Team, as_for_large_messages, options};
use ringtp::comm::p2p::P2pOptions;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |words| {
        let number = words.parse();
        number.unwrap_or_else(|e| panic!("{variable}: {words:?} is no number of seeds: {e}"))
    })
}

/// Calls every collective on `n` ranks, for each seed a share of `1 / shares` of the calls.
fn explore(n: usize, shares: usize, options: P2pOptions) {
    let Some(driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(n, options);
    let wiring = Wiring::of(&team.group);
    let mut random = Random::new(n as u64);
    // One that fits into a pass, and one that takes two.
    let cases = every_kind::<f32>(&mut random, &wiring, &[80, 13456]);
    let shares: Vec<_> = cases.chunks(cases.len().div_ceil(shares)).collect();
    let place = |cases: &&[Case<f32>]| -> Vec<Vec<Buffers>> {
        let of = |rank| cases.iter().map(|case| case.place(rank)).collect();
        team.ranks.iter().map(of).collect()
    };
    let mut buffers: Vec<_> = shares.iter().map(place).collect();
    let first = number("RINGTP_P2P_FIRST_SEED", 0);
    for seed in first..first + number("RINGTP_P2P_SEEDS", 200) {
        let share = seed as usize % shares.len();
        let (cases, buffers) = (shares[share], &mut buffers[share]);
        for (rank, buffers) in team.ranks.iter().zip(&mut *buffers) {
            for (case, buffers) in cases.iter().zip(buffers) {
                case.write(rank, buffers);
            }
        }
        // What was written is there, so that nothing is in progress when the choices begin anew.
        team.synchronize();
        driver.explore(seed, n as u32);
        call_all(&mut team, cases, buffers);
        team.synchronize();
        let context = format!("{n} ranks, seed {seed}");
        check_all(&team, cases, buffers, &context);
        assert_eq!(driver.findings(), [""; 0], "{context}");
    }
}

#[test]
fn of_two_ranks() {
    explore(2, 1, options());
}

/// Broadcasts in parts.
#[test]
fn of_three_ranks() {
    explore(3, 1, as_for_large_messages());
}

/// A seed makes a quarter of the calls, the next one another.
#[test]
fn of_eight_ranks() {
    explore(8, 4, as_for_large_messages());
}
