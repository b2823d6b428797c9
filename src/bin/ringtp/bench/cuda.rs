//! Collectives between devices: timed on real ones, counted on the virtual GPU.

use ringtp::backend::cuda::{Context, DeviceBuffer, DevicePool};
use ringtp::comm::p2p::{
    self, ALL, DeviceAllReduce, MAX_RANKS, Meter, P2pComm, P2pGroup, P2pOptions, Refusal, by_name,
};
use ringtp::{DType, Result};

use super::{Measured, Row, Setting, elements};
use crate::args::{BenchArgs, Operation};

/// Sizes that are measured where none are named, and those that are counted.
const SIZES: [usize; 9] = [
    1 << 10,
    8 << 10,
    32 << 10,
    128 << 10,
    512 << 10,
    2 << 20,
    8 << 20,
    32 << 20,
    128 << 20,
];
const COUNTED_SIZES: [usize; 3] = [1 << 10, 16 << 10, 128 << 10];
/// One rank: its handle, and a message and a part of one in its device's memory.
struct Rank {
    comm: P2pComm,
    whole: DeviceBuffer,
    part: DeviceBuffer,
}

impl AsMut<P2pComm> for Rank {
    fn as_mut(&mut self) -> &mut P2pComm {
        &mut self.comm
    }
}

pub(super) fn run(args: &BenchArgs) -> Result<(Setting, Vec<Row>)> {
    let devices: Vec<usize> = match (&args.devices, args.tp) {
        (devices, _) if !devices.is_empty() => devices.clone(),
        (_, Some(ranks)) => (0..ranks).collect(),
        _ => (0..Context::device_count()?.min(MAX_RANKS)).collect(),
    };
    let (group, comms) = P2pGroup::new(&devices, P2pOptions::default())?;
    let mut meter = Meter::new()?;
    let sizes = match &args.sizes {
        Some(sizes) => &sizes.0[..],
        None if meter.counts() => &COUNTED_SIZES[..],
        None => &SIZES[..],
    };
    let ranks = devices.len();
    let messages: Vec<usize> = sizes.iter().map(|&s| elements(args, ranks, s)).collect();
    // Nothing may be allocated once collectives run.
    let longest = messages.iter().copied().max().unwrap_or(0) * args.elements().size();
    let mut ranks: Vec<Rank> = comms
        .into_iter()
        .map(|comm| {
            let stream = comm.stream().clone();
            let pool = DevicePool::new(stream.context(), 0);
            let (whole, part) = (
                pool.zeros(longest, &stream)?,
                pool.zeros(longest / ranks, &stream)?,
            );
            stream.synchronize()?;
            Ok(Rank { comm, whole, part })
        })
        .collect::<Result<_>>()?;
    let mut place = format!("on devices {devices:?}");
    if meter.counts() {
        place.push_str(" of the virtual GPU: counts of one call, no times");
    }
    let mut rows = Vec::new();
    for elements in messages {
        let bytes = elements * args.elements().size();
        for algorithm in algorithms(args, &group, bytes)? {
            let call = Call {
                operation: args.operation,
                algorithm,
                dtype: args.elements(),
                bytes,
            };
            let measured = match meter.measure(&mut ranks, |rank| call.put(rank))? {
                p2p::Measured::Time(time) => Measured::Time(time),
                p2p::Measured::Counts(counts) => Measured::Counts {
                    counts,
                    hops: algorithm.map_or(1, |a| a.hops(ranks.len())),
                },
            };
            rows.push(Row {
                algorithm: algorithm.map_or("-", |a| a.name()),
                bytes,
                measured,
            });
        }
    }
    let ranks = ranks.len();
    Ok((Setting { ranks, place }, rows))
}

/// The all-reduces to measure: the one that is named, or all that work over these links.
fn algorithms(
    args: &BenchArgs,
    group: &P2pGroup,
    bytes: usize,
) -> Result<Vec<Option<&'static dyn DeviceAllReduce>>> {
    if args.operation != Operation::AllReduce {
        return Ok(vec![None]);
    }
    if let Some(name) = &args.all_reduce {
        return Ok(vec![Some(by_name(name)?)]);
    }
    let choice = p2p::choose(group.links(), group.wire(), bytes)?;
    let works = |a: &&'static dyn DeviceAllReduce| {
        let refused = choice
            .refused
            .iter()
            .find(|(other, _)| other.name() == a.name());
        refused.is_none_or(|(_, why)| matches!(why, Refusal::Slower(_)))
    };
    Ok(ALL.iter().copied().filter(works).map(Some).collect())
}

struct Call {
    operation: Operation,
    algorithm: Option<&'static dyn DeviceAllReduce>,
    dtype: DType,
    bytes: usize,
}

impl Call {
    /// Puts it into the rank's stream.
    fn put(&self, rank: &mut Rank) -> Result<()> {
        let dtype = self.dtype;
        let part_bytes = self.bytes / rank.comm.world_size();
        let mut whole = rank.whole.as_mut().range(0..self.bytes)?;
        match (self.operation, self.algorithm) {
            (Operation::AllReduce, Some(algorithm)) => {
                rank.comm.all_reduce_with(algorithm, dtype, &mut whole)
            }
            (Operation::AllReduce, None) => rank.comm.all_reduce(dtype, &mut whole),
            (Operation::ReduceScatter, _) => {
                let mut part = rank.part.as_mut().range(0..part_bytes)?;
                rank.comm.reduce_scatter(dtype, whole.as_ref(), &mut part)
            }
            (Operation::AllGather, _) => {
                let part = rank.part.as_ref().range(0..part_bytes)?;
                rank.comm.all_gather(dtype, part, &mut whole)
            }
            (Operation::Broadcast, _) => rank.comm.broadcast(dtype, &mut whole, 0),
        }
    }
}
