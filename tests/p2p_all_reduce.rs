//! All-reduce on devices gives the contract's sum, to the bit, for every algorithm, type, number
//! of ranks and size: that of the CPU ranks where it is in rank order, that of its hops where it
//! is a ring.
#![cfg(feature = "cuda")]

mod p2p_support;

use half::{bf16, f16};
use p2p_support::calls::{Case, Kind, Wiring};
use p2p_support::random::Random;
use p2p_support::{Rank, dtype, group, options, run, same};
use ringtp::DType;
use ringtp::comm::p2p::{ALL, DeviceAllReduce, OneShot, P2pGroup, P2pOptions, TwoShot};
use ringtp::comm::{self, GroupOptions, run_ranks};
use ringtp::dtype::Element;

test_driver::also_on_a_real_driver!();

/// Bytes around every boundary: packs, blocks, passes of the staging buffer, messages of the ring.
const BYTES: [usize; 16] = [
    0, 1, 15, 16, 17, 31, 64, 496, 1008, 1040, 4096, 8192, 13440, 13456, 26896, 54002,
];

/// Sums of shrinking and growing sizes, back to back, by every algorithm.
fn sums_of<T: Element>(random: &mut Random, wiring: &Wiring, bytes: &[usize]) -> Vec<Case<T>> {
    let mut all = Vec::new();
    for &algorithm in ALL {
        for in_place in [false, true] {
            let mut sizes = bytes.to_vec();
            random.shuffle(&mut sizes);
            for bytes in sizes {
                let elements = bytes.div_ceil(size_of::<T>());
                let kind = Kind::AllReduce(algorithm);
                all.push(Case::new(random, wiring, kind, elements, in_place));
            }
        }
    }
    all
}

/// Sums of these sizes on a group over these devices, a thread a rank.
fn on_devices<T: Element>(devices: &[usize], bytes: &[usize], options: P2pOptions, seed: u64) {
    let (group, comms) = P2pGroup::new(devices, options).expect("a group");
    let sums = sums_of::<T>(&mut Random::new(seed), &Wiring::of(&group), bytes);
    // Ranks may share a device: nobody allocates or frees on it while another's kernels wait.
    let together = std::sync::Barrier::new(devices.len());
    run(comms, |rank| {
        let mut buffers: Vec<_> = sums.iter().map(|case| case.place(rank)).collect();
        together.wait();
        let mut each = sums.iter().zip(&mut buffers);
        let done = each
            .try_for_each(|(case, buffers)| case.call(rank, buffers))
            .and_then(|()| rank.comm.synchronize());
        together.wait();
        done.expect("the sums");
        for (case, buffers) in sums.iter().zip(&buffers) {
            case.check(rank, buffers, &format!("seed {seed}"));
        }
    });
}

fn every_size<T: Element>(ranks: impl Iterator<Item = usize>) {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    for n in ranks {
        let devices: Vec<usize> = (0..n).collect();
        on_devices::<T>(&devices, &BYTES, options(), n as u64);
    }
}

#[test]
fn f32_sums_are_exact_for_every_size_and_algorithm() {
    every_size::<f32>([1, 2, 3, 8].into_iter());
}

#[test]
fn bf16_sums_are_exact_for_every_size_and_algorithm() {
    every_size::<bf16>([2, 5].into_iter());
}

#[test]
fn f16_sums_are_exact_for_every_size_and_algorithm() {
    every_size::<f16>([3].into_iter());
}

/// A message of every rank, summed by the CPU's ranks.
fn on_cpu<T: Element>(message: &[Vec<T>]) -> Vec<T> {
    let results = run_ranks(message.len(), GroupOptions::default(), |comm| {
        let mut data = message[comm.rank()].clone();
        comm.all_reduce_with(&comm::TwoShot, &mut data)?;
        Ok(data)
    });
    let mut results = results.expect("ranks");
    results.swap_remove(0).expect("a sum")
}

fn one_shot_two_shot_and_the_cpu_agree<T: Element>() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let seed = 11;
    let mut random = Random::new(seed);
    for n in [2, 5, 8] {
        let message: Vec<Vec<T>> = (0..n).map(|_| random.awkward_values(3001)).collect();
        let expected = on_cpu(&message);
        let (_group, comms) = group(n, options());
        let results = run(comms, |rank| {
            let algorithms: [&dyn DeviceAllReduce; 2] = [&OneShot, &TwoShot];
            algorithms.map(|algorithm| {
                let mut data = rank.message(&message[rank.comm.rank()], 0);
                let view = &mut data.view_mut();
                let put = rank.comm.all_reduce_with(algorithm, T::DTYPE, view);
                put.expect("a call");
                rank.comm.synchronize().expect("a sum");
                rank.values::<T>(&data)
            })
        });
        for result in results.iter().flatten() {
            let equal = result.iter().zip(&expected).all(|(a, b)| same(a, b));
            assert!(equal, "seed {seed}: {n} ranks, {}", T::DTYPE);
        }
    }
}

#[test]
fn one_shot_and_two_shot_have_the_bits_of_the_cpu_ranks() {
    one_shot_two_shot_and_the_cpu_agree::<f32>();
    one_shot_two_shot_and_the_cpu_agree::<bf16>();
    one_shot_two_shot_and_the_cpu_agree::<f16>();
}

#[test]
fn ranks_may_share_devices() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    for devices in [vec![0; 4], vec![0, 0, 1], vec![2, 1, 2, 1]] {
        on_devices::<f32>(&devices, &[1, 1008, 26896], options(), 13);
    }
}

#[test]
fn two_groups_work_side_by_side_on_the_same_devices() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    std::thread::scope(|scope| {
        for seed in [17, 19] {
            scope.spawn(move || on_devices::<f32>(&[0, 1, 2], &[64, 8192], options(), seed));
        }
    });
}

#[test]
fn a_thousand_calls_in_a_row_give_a_thousand_right_sums() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let n = 3;
    let (_group, comms) = group(n, options());
    let results = run(comms, |rank| {
        let me = rank.comm.rank();
        let mut data = rank.message(&[me as f32 + 1.0; 40], 0);
        let mut wrong = 0;
        for call in 0..1000 {
            // Sums of small integers are exact: 1 + 2 + 3 = 6, and then 18.
            let algorithm = ALL[call % ALL.len()];
            let mut put = |rank: &mut Rank| {
                let view = &mut data.view_mut();
                rank.comm.all_reduce_with(algorithm, dtype::<f32>(), view)
            };
            put(rank).expect("a call");
            if call % 10 == 9 {
                rank.comm.synchronize().expect("sums");
                let values = rank.values::<f32>(&data);
                let expected = 6.0 * 3.0_f32.powi(9);
                wrong += usize::from(values.iter().any(|&v| v != expected));
                data = rank.message(&[me as f32 + 1.0; 40], 0);
            }
        }
        wrong
    });
    assert_eq!(results, vec![0; n]);
}

#[test]
fn arguments_that_cannot_be_are_refused_before_anything_is_sent() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let (_group, comms) = group(2, options());
    let results = run(comms, |rank| {
        let mut odd = rank.message(&[1.0_f32; 4], 2);
        let refused = rank.comm.all_reduce(DType::F32, &mut odd.view_mut());
        let first = refused.expect_err("it is not aligned").to_string();
        let mut three = rank.message(&[1.0_f32; 3], 0);
        let four = rank.message(&[1.0_f32; 4], 0);
        let refused = rank
            .comm
            .all_reduce_out(DType::F32, four.view(), &mut three.view_mut());
        let second = refused.expect_err("it is too short").to_string();
        // The group is as good as before.
        let sum = rank.comm.all_reduce(DType::F32, &mut three.view_mut());
        sum.expect("a call");
        rank.comm.synchronize().expect("a sum");
        (first, second, rank.values::<f32>(&three))
    });
    for (first, second, sum) in results {
        assert!(
            first.contains("no multiple of the 4 bytes of a f32"),
            "{first}"
        );
        assert!(
            second.contains("out has length 12, expected 16"),
            "{second}"
        );
        assert_eq!(sum, [2.0; 3]);
    }
}
