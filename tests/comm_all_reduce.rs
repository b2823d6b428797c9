//! All-reduce gives the exact sum, or the contract's rounding of it, for every algorithm,
//! type, number of ranks and size.

#![allow(clippy::unwrap_used)] // helpers of tests, too

mod random;

use std::ops::RangeInclusive;

use half::{bf16, f16};
use random::Random;
use ringtp::comm::{
    ALL, AllReduce, Auto, CommError, GroupOptions, OneShot, Ring, Rounding, Staging, TwoShot, Wire,
    by_name, reduce, run_ranks,
};
use ringtp::dtype::{DType, Element};

const RANKS: RangeInclusive<usize> = 1..=8;

/// The chunk of the ring under test, small so that small messages have many.
const CHUNK: usize = 256;
const SMALL_RING: Ring = Ring { chunk: CHUNK };

fn algorithms() -> Vec<&'static dyn AllReduce> {
    let mut algorithms = ALL.to_vec();
    algorithms.push(&SMALL_RING);
    algorithms
}

fn sizes() -> Vec<usize> {
    let chunk = CHUNK / 4;
    vec![
        0,
        1,
        2,
        3,
        7,
        8,
        9,
        15,
        16,
        17,
        63,
        64,
        65,
        chunk - 1,
        chunk * 2,
        chunk * 8 + 1,
        511,
        512,
        513,
        1009,
        8191,
        8192,
        8193,
    ]
}

/// What every rank starts with.
fn inputs<T: Element>(
    world_size: usize,
    len: usize,
    mut value: impl FnMut() -> f32,
) -> Vec<Vec<T>> {
    (0..world_size)
        .map(|_| (0..len).map(|_| T::from_f32(value())).collect())
        .collect()
}

/// What every rank ends with.
fn reduced<T: Element>(algorithm: &dyn AllReduce, inputs: &[Vec<T>]) -> Vec<Vec<T>> {
    run_ranks(inputs.len(), GroupOptions::default(), |comm| {
        let mut data = inputs[comm.rank()].clone();
        comm.all_reduce_with(algorithm, &mut data)?;
        Ok(data)
    })
    .unwrap()
    .into_iter()
    .map(Result::unwrap)
    .collect()
}

/// The bits of each value, with all NaNs taken as one.
fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values
        .iter()
        .map(|value| match value.to_f32() {
            value if value.is_nan() => f32::NAN.to_bits(),
            value => value.to_bits(),
        })
        .collect()
}

/// The rank-order contract, one element at a time.
fn rank_order_oracle<T: Element>(inputs: &[Vec<T>]) -> Vec<T> {
    (0..inputs[0].len())
        .map(|i| {
            let sum = inputs[1..]
                .iter()
                .fold(inputs[0][i].to_f32(), |sum, input| sum + input[i].to_f32());
            match T::from_f32(sum) {
                zero if zero.to_f32() == 0.0 => T::from_f32(0.0),
                value => value,
            }
        })
        .collect()
}

/// Checks `outputs` against the contract of `rounding`; says what is wrong.
fn check<T: Element>(
    rounding: Rounding,
    inputs: &[Vec<T>],
    outputs: &[Vec<T>],
) -> Result<(), String> {
    for (rank, output) in outputs.iter().enumerate() {
        if bits(output) != bits(&outputs[0]) {
            return Err(format!("rank {rank} differs from rank 0"));
        }
    }
    let output = &outputs[0];
    if rounding == Rounding::RankOrder {
        let expected = rank_order_oracle(inputs);
        return match bits(output)
            .iter()
            .zip(bits(&expected))
            .position(|(a, b)| *a != b)
        {
            None => Ok(()),
            Some(i) => Err(format!(
                "element {i} is {:?}, expected {:?}",
                output[i], expected[i]
            )),
        };
    }
    (0..output.len()).try_for_each(|i| check_per_hop(inputs, i, output[i]))
}

/// Each of N-1 hops adds in f32 and rounds to T, so it errs by at most u (|partial sum|)
/// with u = ulp(T)/2 + ulp(f32)/2 relative, plus half the smallest subnormal; |partial sum| is
/// at most the sum S of magnitudes, grown by earlier roundings. N-1 hops: (N-1) u' S with
/// u' = 1.1 u to cover that growth. Where magnitudes may overflow on the way, anything
/// non-finite of a plausible kind will do.
fn check_per_hop<T: Element>(inputs: &[Vec<T>], i: usize, found: T) -> Result<(), String> {
    let terms: Vec<f64> = inputs
        .iter()
        .map(|input| f64::from(input[i].to_f32()))
        .collect();
    let (unit, tiny, max) = match T::DTYPE {
        DType::F32 => (
            f64::powi(2.0, -24),
            f64::powi(2.0, -150),
            f64::from(f32::MAX),
        ),
        DType::Bf16 => (
            f64::powi(2.0, -8),
            f64::powi(2.0, -134),
            f64::from(bf16::MAX.to_f32()),
        ),
        DType::F16 => (
            f64::powi(2.0, -11),
            f64::powi(2.0, -25),
            f64::from(f16::MAX.to_f32()),
        ),
    };
    let hops = (inputs.len() - 1) as f64;
    let sum: f64 = terms.iter().sum();
    let magnitude: f64 = terms.iter().map(|term| term.abs()).sum();
    let found = f64::from(found.to_f32());
    let nans = terms.iter().any(|term| term.is_nan());
    let infinite = |sign: f64| terms.contains(&(sign * f64::INFINITY));
    let fits = if nans || infinite(1.0) && infinite(-1.0) {
        found.is_nan()
    } else if magnitude.is_infinite() {
        found == sum || magnitude_may_overflow(&terms, max) && !found.is_finite()
    } else if magnitude > max * 0.99 {
        // May have passed through infinity, or not.
        true
    } else {
        let bound = hops * (1.1 * (unit + f64::powi(2.0, -24)) * magnitude + tiny);
        (found - sum).abs() <= bound && !(found == 0.0 && found.is_sign_negative())
    };
    if fits {
        Ok(())
    } else {
        Err(format!(
            "element {i} is {found}, the sum of {terms:?} is {sum}"
        ))
    }
}

fn magnitude_may_overflow(terms: &[f64], max: f64) -> bool {
    let finite = terms.iter().filter(|term| term.is_finite());
    finite.map(|term| term.abs()).sum::<f64>() > max * 0.99
}

fn exact_matrix<T: Element>() {
    for world_size in RANKS {
        for len in sizes() {
            // Integers up to 15: sums up to 120 are exact in every type.
            let mut random = Random::new(len as u64);
            let inputs: Vec<Vec<T>> = inputs(world_size, len, || random.below(31) as f32 - 15.0);
            let expected: Vec<i64> = (0..len)
                .map(|i| inputs.iter().map(|input| input[i].to_f32() as i64).sum())
                .collect();
            for algorithm in algorithms() {
                for (rank, output) in reduced(algorithm, &inputs).iter().enumerate() {
                    let found: Vec<i64> =
                        output.iter().map(|value| value.to_f32() as i64).collect();
                    assert_eq!(
                        found,
                        expected,
                        "{} of {len} {} on rank {rank} of {world_size}",
                        algorithm.name(),
                        T::DTYPE
                    );
                    assert!(output.iter().all(|value| {
                        value.to_f32() != 0.0 || value.to_f32().is_sign_positive()
                    }));
                }
            }
        }
    }
}

#[test]
fn sums_of_small_integers_are_exact_in_f32() {
    exact_matrix::<f32>();
}

#[test]
fn sums_of_small_integers_are_exact_in_bf16() {
    exact_matrix::<bf16>();
}

#[test]
fn sums_of_small_integers_are_exact_in_f16() {
    exact_matrix::<f16>();
}

fn random_matrix<T: Element>(seed: u64) {
    for world_size in RANKS {
        for len in [1, 17, 513, 1009, 9001] {
            let mut random = Random::new(seed ^ (world_size * 100_000 + len) as u64);
            let inputs: Vec<Vec<T>> = inputs(world_size, len, || random.awkward());
            for algorithm in algorithms() {
                let outputs = reduced(algorithm, &inputs);
                check(algorithm.rounding(), &inputs, &outputs).unwrap_or_else(|problem| {
                    panic!(
                        "{} of {len} {} over {world_size}, seed {seed}: {problem}",
                        algorithm.name(),
                        T::DTYPE
                    )
                });
            }
        }
    }
}

#[test]
fn random_and_awkward_values_keep_the_contract_in_f32() {
    random_matrix::<f32>(1);
}

#[test]
fn random_and_awkward_values_keep_the_contract_in_bf16() {
    random_matrix::<bf16>(2);
}

#[test]
fn random_and_awkward_values_keep_the_contract_in_f16() {
    random_matrix::<f16>(3);
}

/// Large enough for many chunks of every algorithm, and an odd number.
#[test]
fn a_message_of_a_mebibyte_keeps_the_contract() {
    for world_size in [2, 3, 8] {
        let mut random = Random::new(4);
        let inputs: Vec<Vec<f32>> = inputs(world_size, (1 << 18) + 3, || random.awkward());
        for algorithm in algorithms() {
            let outputs = reduced(algorithm, &inputs);
            check(algorithm.rounding(), &inputs, &outputs).unwrap();
        }
    }
}

#[test]
fn one_shot_two_shot_and_auto_give_the_same_bits() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let world_size = 2 + random.below(7);
        let len = random.below(40_000);
        let inputs: Vec<Vec<bf16>> = inputs(world_size, len, || random.awkward());
        let expected = reduced(&OneShot, &inputs);
        for algorithm in [&TwoShot as &dyn AllReduce, &Auto] {
            for (a, b) in reduced(algorithm, &inputs).iter().zip(&expected) {
                assert_eq!(bits(a), bits(b), "seed {seed}");
            }
        }
    }
}

#[test]
fn the_ring_gives_the_same_bits_from_run_to_run() {
    let mut random = Random::new(5);
    let inputs: Vec<Vec<f16>> = inputs(5, 1009, || random.awkward());
    let first = reduced(&SMALL_RING, &inputs);
    for _ in 0..20 {
        for (a, b) in reduced(&SMALL_RING, &inputs).iter().zip(&first) {
            assert_eq!(bits(a), bits(b));
        }
    }
}

/// Back to back in one group, so that logs of all sizes are reused and grown, with ranks
/// that race ahead as far as they may.
#[test]
fn a_thousand_calls_of_shrinking_and_growing_sizes_keep_apart() {
    for world_size in [2, 3, 8] {
        let results = run_ranks(world_size, GroupOptions::default(), |comm| {
            // The same on all ranks.
            let mut random = Random::new(6);
            let (n, rank) = (comm.world_size(), comm.rank());
            for call in 0..1000 {
                let most = 1 << random.below(13);
                let len = random.below(most);
                let algorithms = algorithms();
                let algorithm = algorithms[random.below(algorithms.len())];
                let base = random.below(1000);
                let mut data: Vec<f32> = (0..len)
                    .map(|i| (base + i % 97 + rank * 1000) as f32)
                    .collect();
                comm.all_reduce_with(algorithm, &mut data)?;
                for (i, &sum) in data.iter().enumerate() {
                    let expected = n * (base + i % 97) + 1000 * n * (n - 1) / 2;
                    assert_eq!(sum, expected as f32, "call {call}, element {i} of {len}");
                }
            }
            assert_eq!(comm.stats().calls, 1000);
            Ok(())
        });
        for result in results.unwrap() {
            result.unwrap();
        }
    }
}

#[test]
fn out_of_place_leaves_the_input_and_gives_the_same() {
    for world_size in [1, 2, 5] {
        for result in run_ranks(world_size, GroupOptions::default(), |comm| {
            let input: Vec<f32> = (0..1000).map(|i| (i * (comm.rank() + 1)) as f32).collect();
            let (mut out, mut in_place) = (vec![7.0; 1000], input.clone());
            comm.all_reduce_out(&input, &mut out)?;
            comm.all_reduce(&mut in_place)?;
            assert_eq!(out, in_place);
            assert_eq!(input[999], (999 * (comm.rank() + 1)) as f32);
            Ok(())
        })
        .unwrap()
        {
            result.unwrap();
        }
    }
}

#[test]
fn an_unknown_algorithm_is_an_error_that_lists_the_known() {
    let error = by_name("tree").unwrap_err().to_string();
    for algorithm in ALL {
        assert!(error.contains(algorithm.name()), "{error}");
        assert_eq!(by_name(algorithm.name()).unwrap().name(), algorithm.name());
    }
}

/// The mutants that the checks of this file have to find: one-shot with a defect.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutant {
    SkipsAPeer,
    AddsInReverse,
    ForgetsTheLastElement,
    RoundsAtEachHop,
    LeavesNegativeZero,
    OwnOrder,
}

impl AllReduce for Mutant {
    fn name(&self) -> &'static str {
        "mutant"
    }

    fn rounding(&self) -> Rounding {
        Rounding::RankOrder
    }

    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize {
        OneShot.bytes_sent(world_size, bytes)
    }

    fn hops(&self, _world_size: usize) -> usize {
        1
    }

    fn staging(&self, world_size: usize, dtype: DType, bytes: usize) -> Staging {
        OneShot.staging(world_size, dtype, bytes)
    }

    fn run(&self, wire: &Wire<'_>, dtype: DType, data: &mut [u8]) -> Result<(), CommError> {
        wire.publish(data)?;
        let mut sources = (0..wire.world_size())
            .map(|rank| wire.packet(rank, 0, data.len()))
            .collect::<Result<Vec<_>, _>>()?;
        match self {
            Self::SkipsAPeer => drop(sources.pop()),
            Self::AddsInReverse => sources.reverse(),
            Self::OwnOrder => sources.rotate_left(wire.rank()),
            Self::ForgetsTheLastElement => {
                let end = data.len() - dtype.size();
                let short: Vec<_> = sources.iter().map(|source| &source[..end]).collect();
                return reduce::sum(wire, dtype, &mut data[..end], &short);
            }
            Self::RoundsAtEachHop => {
                let mut sum = sources[0].to_vec();
                for source in &sources[1..] {
                    reduce::sum(wire, dtype, data, &[&sum, source])?;
                    sum.copy_from_slice(data);
                }
                return Ok(());
            }
            Self::LeavesNegativeZero => {
                reduce::sum(wire, dtype, data, &sources)?;
                if dtype == DType::Bf16 {
                    for value in wire.cast_mut::<bf16>(data)? {
                        if *value == bf16::ZERO {
                            *value = bf16::NEG_ZERO;
                        }
                    }
                }
                return Ok(());
            }
        }
        reduce::sum(wire, dtype, data, &sources)
    }
}

/// Whether [`check`] finds something wrong with `mutant` in type `T`.
fn rejects<T: Element>(mutant: Mutant, rounding: Rounding) -> bool {
    let mut random = Random::new(7);
    let mut inputs: Vec<Vec<T>> = inputs(5, 2000, || {
        (random.below(1 << 24) as f32 - (1 << 23) as f32) / 1000.0
    });
    for input in &mut inputs {
        input[77] = T::from_f32(-0.0);
    }
    check(Rounding::RankOrder, &inputs, &reduced(&OneShot, &inputs)).unwrap();
    check(rounding, &inputs, &reduced(&mutant, &inputs)).is_err()
}

#[test]
fn the_checks_reject_wrong_algorithms_passed_from_outside() {
    for mutant in [
        Mutant::SkipsAPeer,
        Mutant::AddsInReverse,
        Mutant::ForgetsTheLastElement,
        Mutant::RoundsAtEachHop,
        Mutant::LeavesNegativeZero,
        Mutant::OwnOrder,
    ] {
        // Sums of few bf16 are exact in f32, whatever the order; f32 rounds at each hop anyway.
        let found = rejects::<f32>(mutant, Rounding::RankOrder)
            || rejects::<bf16>(mutant, Rounding::RankOrder);
        assert!(found, "{mutant:?}");
    }
    // And the looser bound of the ring still finds a missing peer.
    assert!(rejects::<bf16>(Mutant::SkipsAPeer, Rounding::PerHop));
}
