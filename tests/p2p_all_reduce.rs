//! All-reduce on devices gives the contract's sum, to the bit, for every algorithm, type, number
//! of ranks and size: that of the CPU ranks where it is in rank order, that of its hops where it
//! is a ring.
#![cfg(feature = "cuda")]

mod p2p_support;

use half::{bf16, f16};
use p2p_support::{Random, group, options, ring_sum, run, same, sum};
use ringtp::comm::p2p::{ALL, DeviceAllReduce, Ring, TwoShot};
use ringtp::comm::{self, CommError, Rounding, run_ranks};
use ringtp::dtype::Element;

test_driver::also_on_a_real_driver!();

/// Bytes around every boundary: packs, blocks, passes of the staging buffer, messages of the ring.
const BYTES: [usize; 16] = [
    0, 1, 15, 16, 17, 31, 64, 496, 1008, 1040, 4096, 8192, 13440, 13456, 26896, 54002,
];

/// The whole elements in so many bytes, one at least where there are any.
fn elements<T>(bytes: usize) -> usize {
    bytes.div_ceil(size_of::<T>())
}

/// Every rank's result of summing these messages on devices.
fn on_devices<T: Element>(
    seed: u64,
    n: usize,
    algorithm: &dyn DeviceAllReduce,
    messages: &[Vec<Vec<T>>],
    in_place: bool,
) {
    let (_group, comms) = group(n, options());
    let results = run(comms, |rank| {
        let me = rank.comm.rank();
        let mut random = Random(seed);
        let mut out = Vec::new();
        for message in messages {
            // Now and then at an address that no pack can be read from.
            let offset = if random.below(4) == 0 { size_of::<T>() } else { 0 };
            let mut input = rank.message(&message[me], offset);
            let mut output = rank.poisoned::<T>(message[me].len(), 0);
            if in_place {
                let done =
                    rank.comm
                        .all_reduce_with(algorithm, T::DTYPE, &mut input.view_mut());
                done.expect("a call");
            } else {
                let done = rank.comm.all_reduce_out_with(
                    algorithm,
                    T::DTYPE,
                    input.view(),
                    &mut output.view_mut(),
                );
                done.expect("a call");
            }
            out.push((input, output));
        }
        rank.comm.synchronize().expect("the sums");
        let read = |(input, output)| rank.values::<T>(if in_place { input } else { output });
        out.iter().map(|(i, o)| read((i, o))).collect::<Vec<_>>()
    });
    let ring: Vec<usize> = (0..n).collect();
    for (index, message) in messages.iter().enumerate() {
        let expected: Vec<T> = match algorithm.rounding() {
            Rounding::RankOrder => (0..message[0].len())
                .map(|i| sum((0..n).map(|rank| message[rank][i])))
                .collect(),
            Rounding::PerHop if n > 1 => ring_sum(message, &ring),
            Rounding::PerHop => message[0].iter().map(|&v| sum(std::iter::once(v))).collect(),
        };
        for (rank, result) in results.iter().enumerate() {
            let wrong = (0..expected.len()).find(|&i| !same(&result[index][i], &expected[i]));
            if let Some(i) = wrong {
                panic!(
                    "seed {seed}: {} of {} elements of {} over {n} ranks, in place {in_place}: \
                     element {i} on rank {rank} is {:?}, expected {:?}",
                    algorithm.name(),
                    expected.len(),
                    T::DTYPE,
                    result[index][i],
                    expected[i]
                );
            }
        }
    }
}

fn messages<T: Element>(random: &mut Random, n: usize, bytes: &[usize]) -> Vec<Vec<Vec<T>>> {
    bytes
        .iter()
        .map(|&b| (0..n).map(|_| random.values::<T>(elements::<T>(b))).collect())
        .collect()
}

fn every_size<T: Element>() {
    let seed = 7;
    let mut random = Random(seed);
    for n in 1..=8 {
        for algorithm in ALL {
            for in_place in [false, true] {
                // Shrinking and growing sizes, back to back.
                let mut sizes = BYTES;
                for i in (1..sizes.len()).rev() {
                    sizes.swap(i, random.below(i as u64 + 1) as usize);
                }
                let messages = messages::<T>(&mut random, n, &sizes);
                on_devices(seed, n, *algorithm, &messages, in_place);
            }
        }
    }
}

#[test]
fn f32_sums_are_exact_for_every_size_algorithm_and_number_of_ranks() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    every_size::<f32>();
}
