//! The algorithm of `examples/custom_collective` goes through what the crate's own go through, and
//! the example runs.
#![cfg(feature = "cuda")]

mod p2p_suite;
mod p2p_support;

#[allow(dead_code, reason = "its main is not run here")]
#[path = "../examples/custom_collective/main.rs"]
mod custom_collective;

use custom_collective::tree::TREE;
use p2p_suite::{Code, Devices, Operation, Order, Suite, Target, dtype_of};
use ringtp::DType;
use ringtp::comm::p2p::P2pOptions;

/// Runs of every scenario, each with a seed of its own. `RINGTP_SEEDS` changes the number.
const ROUNDS: u64 = 4;

#[test]
fn it_sums_along_the_tree_to_the_bit_and_survives_losses() {
    let Some(driver) = test_driver::take() else {
        return;
    };
    let rounds = std::env::var("RINGTP_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok());
    let mut devices = Devices::new(driver, 3);
    for kernel in ["tree_f32", "tree_bf16", "tree_f16"] {
        let target = Target {
            operation: Operation::AllReduce(&TREE),
            order: Order::Tree,
            dtype: dtype_of(kernel),
        };
        let mut suite = Suite::of(target, 0..rounds.unwrap_or(ROUNDS));
        if let Err((how, runs)) = devices.judge(&mut suite, Code::Shipped, usize::MAX) {
            panic!("{kernel}, run {runs}: {how}");
        }
    }
}

/// The group that has it for all calls loads its kernels, too.
#[test]
fn it_may_be_that_of_all_calls_that_name_none() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let options = P2pOptions {
        all_reduce: Some(&TREE),
        ..p2p_support::options()
    };
    let (_group, comms) = p2p_support::group(3, options);
    let sums = p2p_support::run(comms, |rank| {
        assert_eq!(rank.comm.choose(4).expect("it is named").name(), "tree");
        let mut data = rank.message(&[rank.comm.rank() as f32 + 1.0; 5], 0);
        let put = rank.comm.all_reduce(DType::F32, &mut data.view_mut());
        put.expect("a call");
        rank.comm.synchronize().expect("a sum");
        rank.values::<f32>(&data)
    });
    assert_eq!(sums, vec![[6.0; 5]; 3]);
}

#[test]
fn the_example_runs() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    for ranks in [1, 3, 8] {
        custom_collective::run(ranks, &[4, 1000]).expect("the sums");
    }
}

test_driver::also_on_a_real_driver!();
