//! An all-reduce from outside the crate, beside those of the crate.
//!
//! `tree.cu` has the kernels, `tree.rs` the value that makes them an algorithm; this file only uses
//! it. It needs a device, or the virtual GPU: `cargo run --features cuda --example custom_collective
//! -- 4` takes the number of ranks, which share the devices that there are.

use std::process::ExitCode;

use ringtp::backend::cuda::{Context, DeviceBuffer, DevicePool};
use ringtp::comm::p2p::{ALL, DeviceAllReduce, Measured, Meter, P2pComm, P2pGroup, P2pOptions};
use ringtp::{DType, Result};

pub(crate) mod tree;

use tree::TREE;

/// The algorithms to compare.
fn algorithms() -> Vec<&'static dyn DeviceAllReduce> {
    ALL.iter().copied().chain([&TREE as _]).collect()
}

/// A rank and its message.
struct Rank {
    comm: P2pComm,
    data: DeviceBuffer,
}

impl AsMut<P2pComm> for Rank {
    fn as_mut(&mut self) -> &mut P2pComm {
        &mut self.comm
    }
}

impl Rank {
    /// With room for a message. Nothing may be allocated once collectives run.
    fn new(comm: P2pComm, elements: usize) -> Result<Self> {
        let stream = comm.stream().clone();
        let data = DevicePool::new(stream.context(), 0).zeros(4 * elements, &stream)?;
        stream.synchronize()?;
        Ok(Self { comm, data })
    }

    fn put(&mut self, algorithm: &'static dyn DeviceAllReduce) -> Result<()> {
        let mut data = self.data.as_mut();
        self.comm.all_reduce_with(algorithm, DType::F32, &mut data)
    }

    /// The sum of small integers, exact in any order: the same in every element, or this is NaN.
    fn sum(&mut self, algorithm: &'static dyn DeviceAllReduce, elements: usize) -> Result<f32> {
        let stream = self.comm.stream().clone();
        let mut values = vec![self.comm.rank() as f32 + 1.0; elements];
        stream.upload(&values, &mut self.data.as_mut())?;
        self.put(algorithm)?;
        self.comm.synchronize()?;
        stream.download(self.data.as_ref(), &mut values)?;
        let first = values[0];
        let is_same = values.iter().all(|&value| value == first);
        Ok(if is_same { first } else { f32::NAN })
    }
}

/// The sum that each rank has.
fn sums(
    ranks: &mut [Rank],
    algorithm: &'static dyn DeviceAllReduce,
    elements: usize,
) -> Result<Vec<f32>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter_mut()
            .map(|rank| scope.spawn(move || rank.sum(algorithm, elements)))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|sum| sum.expect("no rank panics")).collect()
    })
}

/// Sums messages of `bytes` over `ranks` ranks by every algorithm, and prints what each takes: on
/// the virtual GPU, what each does.
fn compare(ranks: usize, bytes: usize) -> Result<()> {
    let (count, elements) = (Context::device_count()?, bytes / 4);
    let devices: Vec<usize> = (0..ranks).map(|rank| rank % count).collect();
    let options = P2pOptions {
        algorithms: vec![&TREE],
        ..P2pOptions::default()
    };
    let (group, comms) = P2pGroup::new(&devices, options)?;
    let members = comms.into_iter().map(|comm| Rank::new(comm, elements));
    let mut members: Vec<Rank> = members.collect::<Result<_>>()?;
    let mut meter = Meter::new()?;
    println!("{ranks} ranks, {bytes} bytes");
    println!("algorithm   hops   bytes sent   by the model   here");
    for algorithm in algorithms() {
        let expected = (ranks * (ranks + 1) / 2) as f32;
        let sums = sums(&mut members, algorithm, elements)?;
        assert_eq!(sums, vec![expected; ranks], "{} is wrong", algorithm.name());
        let here = match meter.measure(&mut members, |rank| rank.put(algorithm))? {
            Measured::Time(time) => format!("{time:.1?}"),
            Measured::Counts(counts) => format!(
                "{} bytes over links, {} sectors, {} barriers, {} fences, {} releases, {} acquires",
                counts.link_bytes,
                counts.sectors,
                counts.barriers,
                counts.fences,
                counts.releases,
                counts.acquires,
            ),
        };
        let (hops, sent) = (algorithm.hops(ranks), algorithm.bytes_sent(ranks, bytes));
        println!(
            "{:9} {hops:6} {sent:12} {:11.1} us   {here}",
            algorithm.name(),
            group.wire().time_us(hops, sent),
        );
    }
    Ok(())
}

/// Compares messages of some sizes.
pub(crate) fn run(ranks: usize, sizes: &[usize]) -> Result<()> {
    sizes.iter().try_for_each(|&bytes| compare(ranks, bytes))
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
