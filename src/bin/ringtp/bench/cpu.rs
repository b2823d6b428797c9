//! Collectives between threads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use ringtp::DType;
use ringtp::comm::{ALL, AllReduce, CommError, CpuComm, GroupOptions, by_name, run_ranks};
use ringtp::dtype::Element;

use super::{Measured, Row, Setting, elements, median};
use crate::args::{BenchArgs, Operation};

/// Sizes that are measured where none are named.
const SIZES: [usize; 8] = [
    256,
    2 << 10,
    8 << 10,
    32 << 10,
    128 << 10,
    512 << 10,
    2 << 20,
    8 << 20,
];
/// Bytes moved per measurement, to choose the number of calls.
const BUDGET: usize = 64 << 20;
/// Calls before the first that counts: they grow what the group keeps.
const WARM: usize = 4;
/// Calls between two looks at the clock where one is too short for it.
const BATCH: usize = 10;

pub(super) fn run(args: &BenchArgs) -> ringtp::Result<(Setting, Vec<Row>)> {
    let ranks = args.tp.unwrap_or(2);
    let algorithms = match (args.operation, &args.all_reduce) {
        (Operation::AllReduce, None) => ALL.iter().map(|&a| Some(a)).collect(),
        (Operation::AllReduce, Some(name)) => vec![Some(by_name(name)?)],
        _ => vec![None],
    };
    let sizes = args.sizes.as_ref().map_or(&SIZES[..], |sizes| &sizes.0);
    let mut rows = Vec::new();
    for &size in sizes {
        let elements = elements(args, ranks.max(1), size);
        for &algorithm in &algorithms {
            let time = match args.elements() {
                DType::F32 => time::<f32>(args.operation, algorithm, ranks, elements)?,
                DType::Bf16 => time::<half::bf16>(args.operation, algorithm, ranks, elements)?,
                DType::F16 => time::<half::f16>(args.operation, algorithm, ranks, elements)?,
            };
            rows.push(Row {
                algorithm: algorithm.map_or("-", |a| a.name()),
                bytes: elements * args.elements().size(),
                measured: Measured::Time(time),
            });
        }
    }
    let how = if spin(ranks) { "spin" } else { "sleep" };
    let place = format!("threads on {} cores (they {how} while they wait)", cores());
    Ok((Setting { ranks, place }, rows))
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Whether ranks have a core each, and wait without sleeping.
fn spin(ranks: usize) -> bool {
    ranks <= cores()
}

/// The median of rank 0's times.
fn time<T: Element>(
    operation: Operation,
    algorithm: Option<&'static dyn AllReduce>,
    ranks: usize,
    elements: usize,
) -> ringtp::Result<Duration> {
    let bytes = elements * size_of::<T>();
    let batch = if bytes <= 32 << 10 { BATCH } else { 1 };
    // Ranks that sleep take a hundred times as long over a small message.
    let most = if spin(ranks) { 2000 } else { 50 };
    let rounds = (BUDGET / bytes / batch).clamp(9, most);
    let results = run_ranks(ranks, GroupOptions::default(), |comm| {
        // Zeros: no overflow however often they are summed.
        let mut whole = vec![T::zeroed(); elements];
        let mut part = vec![T::zeroed(); elements / ranks];
        let mut times = Vec::with_capacity(rounds);
        for round in 0..WARM + rounds {
            let begin = Instant::now();
            for _ in 0..batch {
                call(
                    operation,
                    algorithm,
                    comm,
                    black_box(&mut whole),
                    black_box(&mut part),
                )?;
            }
            if round >= WARM {
                times.push(begin.elapsed() / batch as u32);
            }
        }
        Ok(median(&mut times))
    })?;
    let times: Vec<Duration> = results.into_iter().collect::<ringtp::Result<_>>()?;
    Ok(times.first().copied().unwrap_or_default())
}

fn call<T: Element>(
    operation: Operation,
    algorithm: Option<&'static dyn AllReduce>,
    comm: &mut CpuComm,
    whole: &mut [T],
    part: &mut [T],
) -> Result<(), CommError> {
    match (operation, algorithm) {
        (Operation::AllReduce, Some(algorithm)) => comm.all_reduce_with(algorithm, whole),
        (Operation::AllReduce, None) => comm.all_reduce(whole),
        (Operation::ReduceScatter, _) => comm.reduce_scatter(whole, part),
        (Operation::AllGather, _) => comm.all_gather(part, whole),
        (Operation::Broadcast, _) => comm.broadcast(whole, 0),
    }
}
