//! All-reduce on devices gives the contract's sum, to the bit, for every algorithm, type, number
//! of ranks and size: that of the CPU ranks where it is in rank order, that of its hops where it
//! is a ring.
#![cfg(feature = "cuda")]

mod p2p_support;

use half::{bf16, f16};
use p2p_support::{Message, Random, Rank, dtype, group, options, ring_sum, run, same, sum};
use ringtp::DType;
use ringtp::comm::p2p::{ALL, DeviceAllReduce, OneShot, P2pGroup, P2pOptions, TwoShot};
use ringtp::comm::{self, GroupOptions, Rounding, run_ranks};
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

/// Messages to sum one after another: of every rank, by an algorithm.
struct Sums<T> {
    algorithm: &'static dyn DeviceAllReduce,
    in_place: bool,
    messages: Vec<Vec<Vec<T>>>,
}

impl<T: Element> Sums<T> {
    fn new(
        random: &mut Random,
        n: usize,
        algorithm: &'static dyn DeviceAllReduce,
        in_place: bool,
        bytes: &[usize],
    ) -> Self {
        let message = |&b: &usize| {
            (0..n)
                .map(|_| random.values::<T>(elements::<T>(b)))
                .collect()
        };
        Self {
            algorithm,
            in_place,
            messages: bytes.iter().map(message).collect(),
        }
    }

    /// One rank's messages and outputs. Allocation waits for the device, so all of it comes before
    /// any rank's first call.
    fn prepare(&self, rank: &Rank, seed: u64) -> Vec<(Message, Message)> {
        let me = rank.comm.rank();
        let mut random = Random(seed + me as u64);
        let mut prepared = Vec::new();
        for message in &self.messages {
            // Now and then at an address that no pack can be read from, on some ranks.
            let offset = if random.below(4) == 0 {
                size_of::<T>()
            } else {
                0
            };
            let input = rank.message(&message[me], offset);
            let output = rank.poisoned::<T>(message[me].len(), 0);
            prepared.push((input, output));
        }
        prepared
    }

    /// Puts one rank's calls into its stream.
    fn call(&self, rank: &mut Rank, prepared: &mut [(Message, Message)]) -> ringtp::Result<()> {
        for (input, output) in prepared {
            let done = if self.in_place {
                let data = &mut input.view_mut();
                rank.comm.all_reduce_with(self.algorithm, T::DTYPE, data)
            } else {
                let out = &mut output.view_mut();
                rank.comm
                    .all_reduce_out_with(self.algorithm, T::DTYPE, input.view(), out)
            };
            done?;
        }
        Ok(())
    }

    /// One rank's results.
    fn results(&self, rank: &Rank, prepared: &[(Message, Message)]) -> Vec<Vec<T>> {
        let read = |(input, output)| rank.values(if self.in_place { input } else { output });
        prepared.iter().map(|(i, o)| read((i, o))).collect()
    }

    /// Checks every rank's results against the contract.
    fn check(&self, results: &[&Vec<Vec<T>>], ring: &[usize], seed: u64) {
        let n = results.len();
        for (index, message) in self.messages.iter().enumerate() {
            let expected: Vec<T> = match self.algorithm.rounding() {
                Rounding::PerHop if n > 1 => ring_sum(message, ring),
                _ => (0..message[0].len())
                    .map(|i| sum((0..n).map(|rank| message[rank][i])))
                    .collect(),
            };
            for (rank, result) in results.iter().enumerate() {
                let found = &result[index];
                let wrong = (0..expected.len()).find(|&i| !same(&found[i], &expected[i]));
                if let Some(i) = wrong {
                    panic!(
                        "seed {seed}: {} of {} elements of {} over {n} ranks, in place {}: \
                         element {i} on rank {rank} is {:?}, expected {:?}",
                        self.algorithm.name(),
                        expected.len(),
                        T::DTYPE,
                        self.in_place,
                        found[i],
                        expected[i]
                    );
                }
            }
        }
    }
}

/// Sums of shrinking and growing sizes, back to back, by every algorithm.
fn sums_of<T: Element>(random: &mut Random, n: usize, bytes: &[usize]) -> Vec<Sums<T>> {
    let mut all = Vec::new();
    for &algorithm in ALL {
        for in_place in [false, true] {
            let mut sizes = bytes.to_vec();
            for i in (1..sizes.len()).rev() {
                sizes.swap(i, random.below(i as u64 + 1) as usize);
            }
            all.push(Sums::new(random, n, algorithm, in_place, &sizes));
        }
    }
    all
}

/// Every sum on a group over these devices.
fn on_devices<T: Element>(devices: &[usize], sums: &[Sums<T>], options: P2pOptions, seed: u64) {
    let (group, comms) = P2pGroup::new(devices, options).expect("a group");
    // Ranks may share a device: nobody allocates or frees on it while another's kernels wait.
    let together = std::sync::Barrier::new(devices.len());
    let results = run(comms, |rank| {
        let mut prepared: Vec<_> = sums.iter().map(|s| s.prepare(rank, seed)).collect();
        together.wait();
        let mut each = sums.iter().zip(&mut prepared);
        let done = each
            .try_for_each(|(sums, prepared)| sums.call(rank, prepared))
            .and_then(|()| rank.comm.synchronize());
        together.wait();
        done.expect("the sums");
        let each = sums.iter().zip(&prepared);
        each.map(|(sums, prepared)| sums.results(rank, prepared))
            .collect::<Vec<_>>()
    });
    let ring = group.ring().expect("a ring").to_vec();
    for (index, sums) in sums.iter().enumerate() {
        let of_ranks: Vec<_> = results.iter().map(|result| &result[index]).collect();
        sums.check(&of_ranks, &ring, seed);
    }
}

fn every_size<T: Element>(ranks: impl Iterator<Item = usize>) {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let seed = 7;
    let mut random = Random(seed);
    for n in ranks {
        let devices: Vec<usize> = (0..n).collect();
        let sums = sums_of::<T>(&mut random, n, &BYTES);
        on_devices(&devices, &sums, options(), seed);
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
    let mut random = Random(seed);
    for n in [2, 5, 8] {
        let message: Vec<Vec<T>> = (0..n).map(|_| random.values(3001)).collect();
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
    let mut random = Random(13);
    for devices in [vec![0; 4], vec![0, 0, 1], vec![2, 1, 2, 1]] {
        let sums = sums_of::<f32>(&mut random, devices.len(), &[1, 1008, 26896]);
        on_devices(&devices, &sums, options(), 13);
    }
}

#[test]
fn two_groups_work_side_by_side_on_the_same_devices() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let both = [17, 19].map(|seed| (seed, sums_of::<f32>(&mut Random(seed), 3, &[64, 8192])));
    std::thread::scope(|scope| {
        for (seed, sums) in &both {
            scope.spawn(|| on_devices(&[0, 1, 2], sums, options(), *seed));
        }
    });
}

#[test]
fn epochs_wrap() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut random = Random(23);
    for before in [2, 4, 40] {
        let options = P2pOptions {
            first_epoch: (1 << 40) - before,
            ..options()
        };
        let sums = sums_of::<f32>(&mut random, 3, &[16, 1008, 26896]);
        on_devices(&[0, 1, 2], &sums, options, 23);
    }
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
