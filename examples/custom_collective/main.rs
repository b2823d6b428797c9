//! An all-reduce from outside the crate, beside those of the crate.
//!
//! `tree.cu` has the kernels, `tree.rs` the value that makes them an algorithm; this file only uses
//! it. It needs a device, or the virtual GPU: `cargo run --features cuda --example custom_collective
//! -- 4` takes the number of ranks, which share the devices that there are.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use ringtp::backend::cuda::{Context, DevicePool};
use ringtp::comm::p2p::{ALL, DeviceAllReduce, P2pComm, P2pGroup, P2pOptions};
use ringtp::{DType, Result};

pub(crate) mod tree;

use tree::TREE;

/// Calls whose time is measured together.
const CALLS: u32 = 20;

/// The algorithms to compare.
fn algorithms() -> Vec<&'static dyn DeviceAllReduce> {
    ALL.iter().copied().chain([&TREE as _]).collect()
}

/// What one rank found: by algorithm, the sum of its message's first element and the time of a call.
type Results = Vec<(f32, Duration)>;

fn rank(mut comm: P2pComm, elements: usize) -> Result<Results> {
    let stream = comm.stream().clone();
    let pool = DevicePool::new(stream.context(), 0);
    // Small integers, whose sums are exact in any order.
    let message = vec![comm.rank() as f32 + 1.0; elements];
    let mut data = Vec::new();
    for _ in algorithms() {
        data.push(pool.upload(&message, &stream)?);
    }
    let mut scratch = pool.upload(&vec![0.0_f32; elements], &stream)?;
    let mut results = Results::new();
    for (algorithm, data) in algorithms().into_iter().zip(&mut data) {
        comm.all_reduce_with(algorithm, DType::F32, &mut data.as_mut())?;
        comm.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            comm.all_reduce_with(algorithm, DType::F32, &mut scratch.as_mut())?;
        }
        comm.synchronize()?;
        let time = start.elapsed() / CALLS;
        let mut sum = vec![0.0_f32; elements];
        stream.download(data.as_ref(), &mut sum)?;
        let same = sum.iter().all(|&value| value == sum[0]);
        results.push((if same { sum[0] } else { f32::NAN }, time));
    }
    Ok(results)
}

/// Sums messages of `bytes` over `ranks` ranks by every algorithm, prints what each takes, and
/// returns each one's sum, from rank 0.
fn compare(ranks: usize, bytes: usize) -> Result<Vec<f32>> {
    let count = Context::device_count()?;
    let devices: Vec<usize> = (0..ranks).map(|rank| rank % count).collect();
    let options = P2pOptions {
        algorithms: vec![&TREE],
        ..P2pOptions::default()
    };
    let (group, comms) = P2pGroup::new(&devices, options)?;
    let results: Vec<Result<Results>> = std::thread::scope(|scope| {
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| scope.spawn(move || rank(comm, bytes / 4)))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join();
        let joined = threads.into_iter().map(join);
        joined
            .map(|result| result.expect("no rank panics"))
            .collect()
    });
    let results: Vec<Results> = results.into_iter().collect::<Result<_>>()?;
    println!("{ranks} ranks, {bytes} bytes");
    println!("algorithm   hops   bytes sent   by the model      here");
    for (index, algorithm) in algorithms().into_iter().enumerate() {
        let (hops, sent) = (algorithm.hops(ranks), algorithm.bytes_sent(ranks, bytes));
        let slowest = results.iter().map(|rank| rank[index].1).max();
        // The virtual GPU counts, and takes no time.
        let here = match slowest {
            Some(time) if !Context::is_virtual() => format!("{time:.1?}"),
            _ => "-".to_owned(),
        };
        println!(
            "{:9} {hops:6} {sent:12} {:11.1} us {here:>9}",
            algorithm.name(),
            group.wire().time_us(hops, sent),
        );
    }
    Ok(results[0].iter().map(|(sum, _)| *sum).collect())
}

/// Compares messages of some sizes.
pub(crate) fn run(ranks: usize, sizes: &[usize]) -> Result<()> {
    let expected = (ranks * (ranks + 1) / 2) as f32;
    for &bytes in sizes {
        for (algorithm, sum) in algorithms().iter().zip(compare(ranks, bytes)?) {
            assert_eq!(sum, expected, "{} is wrong", algorithm.name());
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let ranks = std::env::args().nth(1).and_then(|n| n.parse().ok());
    match run(ranks.unwrap_or(2), &[1 << 10, 16 << 10, 256 << 10]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("custom_collective: {error}");
            ExitCode::from(2)
        }
    }
}
