//! Collectives between devices: timed on real ones, counted on the virtual GPU.

use std::sync::Barrier;
use std::time::Duration;

use ringtp::backend::cuda::{Context, Counters, DeviceBuffer, DevicePool, Event};
use ringtp::comm::p2p::{ALL, DeviceAllReduce, MAX_RANKS, P2pComm, P2pGroup, P2pOptions, by_name};
use ringtp::{DType, Result};
use serde_json::Value;

use super::{Counts, Measured, Row, Setting, elements, median};
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
/// Calls between two events, and how often they are measured after the first time.
const BATCH: u32 = 20;
const ROUNDS: usize = 20;

/// One rank: its handle, and a message and a part of one in its device's memory.
struct Rank {
    comm: P2pComm,
    whole: DeviceBuffer,
    part: DeviceBuffer,
}

pub(super) fn run(args: &BenchArgs) -> Result<(Setting, Vec<Row>)> {
    let devices: Vec<usize> = match (&args.devices, args.tp) {
        (devices, _) if !devices.is_empty() => devices.clone(),
        (_, Some(ranks)) => (0..ranks).collect(),
        _ => (0..Context::device_count()?.min(MAX_RANKS)).collect(),
    };
    let (group, comms) = P2pGroup::new(&devices, P2pOptions::default())?;
    let counters = Counters::begin()?;
    let sizes = match (&args.sizes, &counters) {
        (Some(sizes), _) => &sizes.0[..],
        (None, Some(_)) => &COUNTED_SIZES[..],
        (None, None) => &SIZES[..],
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
    let mut counters = counters;
    if counters.is_some() {
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
            let measured = match &mut counters {
                Some(counters) => Measured::Counts(count(&mut ranks, &call, counters)?),
                None => Measured::Time(time(&mut ranks, &call)?),
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
    let choice = ringtp::comm::p2p::choose(group.links(), group.wire(), bytes)?;
    let works = |a: &&'static dyn DeviceAllReduce| {
        let refused = choice
            .refused
            .iter()
            .find(|(other, _)| other.name() == a.name());
        refused.is_none_or(|(_, why)| matches!(why, ringtp::comm::p2p::Refusal::Slower(_)))
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

/// Runs `f` in a thread for each rank. One that fails ends the group, so that nobody waits for it.
fn each<R: Send>(ranks: &mut [Rank], f: impl Fn(&mut Rank) -> Result<R> + Sync) -> Result<Vec<R>> {
    let run = |rank: &mut Rank| f(rank).inspect_err(|error| rank.comm.abort(&error.to_string()));
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter_mut()
            .map(|rank| scope.spawn(|| run(rank)))
            .collect();
        let ends = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ends.collect()
    })
}

/// The slowest rank's median.
fn time(ranks: &mut [Rank], call: &Call) -> Result<Duration> {
    let times = each(ranks, |rank| {
        let stream = rank.comm.stream().clone();
        let (begin, end) = (
            Event::timed(stream.context())?,
            Event::timed(stream.context())?,
        );
        let mut times = Vec::new();
        for round in 0..=ROUNDS {
            // The ranks start together, or a rank's first call would wait for the last to come.
            rank.comm.barrier()?;
            begin.record(&stream)?;
            for _ in 0..BATCH {
                call.put(rank)?;
            }
            end.record(&stream)?;
            rank.comm.synchronize()?;
            if round > 0 {
                times.push(end.elapsed_since(&begin)? / BATCH);
            }
        }
        Ok(median(&mut times))
    })?;
    Ok(times.into_iter().max().unwrap_or_default())
}

fn count(ranks: &mut [Rank], call: &Call, counters: &mut Counters) -> Result<Counts> {
    let before: u64 = sent(ranks);
    let together = Barrier::new(ranks.len());
    counters.take()?;
    each(ranks, |rank| {
        together.wait();
        call.put(rank)?;
        rank.comm.synchronize()
    })?;
    let report = counters.take()?;
    let total = &report["total"];
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let strong = |begins: &str| -> u64 {
        let all = total["strong"].as_object().into_iter().flatten();
        let fitting = all.filter(|(name, _)| name.starts_with(begins));
        fitting.map(|(_, n)| number(n)).sum()
    };
    let links = total["links"].as_array().into_iter().flatten();
    // Not what goes to the host's memory: a rank's record of how far it is.
    let between_devices = links.filter(|link| !link["to"].is_null());
    let link_bytes = between_devices.map(|link| {
        let part = |name: &str| number(&link[name]);
        part("read") + part("written") + part("atomics") + part("spun")
    });
    let sectors = ["global_loads", "global_stores", "global_atomics"];
    let n = ranks.len();
    Ok(Counts {
        bytes_by_formula: sent(ranks) - before,
        link_bytes: link_bytes.sum(),
        hops: call.algorithm.map_or(1, |a| a.hops(n)),
        sectors: sectors
            .iter()
            .map(|kind| number(&total[kind]["sectors"]))
            .sum(),
        barriers: number(&total["barriers"]),
        fences: strong("fence."),
        releases: strong("st.release"),
        acquires: strong("ld.acquire"),
    })
}

/// Bytes that all ranks have sent so far, as the algorithms say.
fn sent(ranks: &[Rank]) -> u64 {
    ranks.iter().map(|rank| rank.comm.stats().bytes_sent).sum()
}
