//! What a collective costs: its time on real devices, what it does on the virtual GPU.

use std::sync::Barrier;
use std::time::Duration;

use serde_json::Value;

use super::comm::P2pComm;
use crate::backend::cuda::{Counters, Event};
use crate::error::Result;

/// Calls between two events, and how often they are measured after the first time.
const BATCH: u32 = 20;
const ROUNDS: usize = 20;

/// What a call of all ranks costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measured {
    /// The slowest rank's time for a call, the median of 20 rounds of 20 calls.
    Time(Duration),
    /// What one call did, where time means nothing.
    Counts(Counts),
}

/// What a call of all ranks did on the virtual GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes that all ranks together send, as the algorithm says.
    pub bytes_by_formula: u64,
    /// Bytes that went over all links between devices, flags and polls included.
    pub link_bytes: u64,
    /// Sectors of 32 bytes of global memory, the links' included.
    pub sectors: u64,
    /// Barriers of blocks.
    pub barriers: u64,
    /// Fences of any scope.
    pub fences: u64,
    /// Stores with release order.
    pub releases: u64,
    /// Loads with acquire order, the turns of polling loops included.
    pub acquires: u64,
}

/// Measures collectives: those of the crate, and those that are added to it.
///
/// ```no_run
/// use ringtp::DType;
/// use ringtp::backend::cuda::{DeviceBuffer, DevicePool};
/// use ringtp::comm::p2p::{ALL, Meter, P2pComm, P2pGroup, P2pOptions};
///
/// struct Rank(P2pComm, DeviceBuffer);
///
/// impl AsMut<P2pComm> for Rank {
///     fn as_mut(&mut self) -> &mut P2pComm {
///         &mut self.0
///     }
/// }
///
/// # fn main() -> ringtp::Result<()> {
/// let (_group, comms) = P2pGroup::new(&[0, 1], P2pOptions::default())?;
/// // What is allocated, is allocated before anything waits.
/// let mut ranks = comms
///     .into_iter()
///     .map(|comm| {
///         let stream = comm.stream().clone();
///         let data = DevicePool::new(stream.context(), 0).zeros(4096, &stream)?;
///         Ok(Rank(comm, data))
///     })
///     .collect::<ringtp::Result<Vec<_>>>()?;
/// let mut meter = Meter::new()?;
/// for algorithm in ALL {
///     let put = |rank: &mut Rank| {
///         let Rank(comm, data) = rank;
///         comm.all_reduce_with(*algorithm, DType::F32, &mut data.as_mut())
///     };
///     println!("{}: {:?}", algorithm.name(), meter.measure(&mut ranks, put)?);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Meter {
    counters: Option<Counters>,
}

impl Meter {
    /// One that counts on the virtual GPU, and takes times elsewhere.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn new() -> Result<Self> {
        Ok(Self {
            counters: Counters::begin()?,
        })
    }

    /// Whether it counts.
    pub fn counts(&self) -> bool {
        self.counters.is_some()
    }

    /// Measures what `put` puts into the streams of a group's `ranks`, all of them, the same on each.
    /// It must not allocate: other ranks' collectives wait meanwhile.
    ///
    /// # Errors
    /// The first rank's that failed, whose group has then failed with it.
    pub fn measure<R: AsMut<P2pComm> + Send>(
        &mut self,
        ranks: &mut [R],
        put: impl Fn(&mut R) -> Result<()> + Sync,
    ) -> Result<Measured> {
        Ok(match &mut self.counters {
            Some(counters) => Measured::Counts(count(ranks, put, counters)?),
            None => Measured::Time(time(ranks, put)?),
        })
    }
}

/// Runs `f` in a thread for each rank. One that fails ends the group, so that nobody waits for it.
fn each<R: AsMut<P2pComm> + Send, T: Send>(
    ranks: &mut [R],
    f: impl Fn(&mut R) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let run = |rank: &mut R| f(rank).inspect_err(|error| rank.as_mut().abort(&error.to_string()));
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

fn time<R: AsMut<P2pComm> + Send>(
    ranks: &mut [R],
    put: impl Fn(&mut R) -> Result<()> + Sync,
) -> Result<Duration> {
    let times = each(ranks, |rank| {
        let stream = rank.as_mut().stream().clone();
        let (begin, end) = (
            Event::timed(stream.context())?,
            Event::timed(stream.context())?,
        );
        let mut times = Vec::new();
        for round in 0..=ROUNDS {
            // The ranks start together, or a rank's first call would wait for the last to come.
            rank.as_mut().barrier()?;
            begin.record(&stream)?;
            for _ in 0..BATCH {
                put(rank)?;
            }
            end.record(&stream)?;
            rank.as_mut().synchronize()?;
            if round > 0 {
                times.push(end.elapsed_since(&begin)? / BATCH);
            }
        }
        times.sort_unstable();
        Ok(times[ROUNDS / 2])
    })?;
    Ok(times.into_iter().max().unwrap_or_default())
}

fn count<R: AsMut<P2pComm> + Send>(
    ranks: &mut [R],
    put: impl Fn(&mut R) -> Result<()> + Sync,
    counters: &mut Counters,
) -> Result<Counts> {
    let before = sent(ranks);
    let together = Barrier::new(ranks.len());
    counters.take()?;
    each(ranks, |rank| {
        together.wait();
        put(rank)?;
        rank.as_mut().synchronize()
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
    Ok(Counts {
        bytes_by_formula: sent(ranks) - before,
        link_bytes: link_bytes.sum(),
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
fn sent<R: AsMut<P2pComm>>(ranks: &mut [R]) -> u64 {
    let each = ranks
        .iter_mut()
        .map(|rank| rank.as_mut().stats().bytes_sent);
    each.sum()
}
