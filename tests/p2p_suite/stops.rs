//! A rank that stops on its way through a collective: at each of the waits of its peers, and in
//! each of the ways in which they can find out. It launches nothing; what it has done until then the
//! host writes into its peers' memory.

use std::mem::offset_of;
use std::sync::Arc;
use std::time::Duration;

use ringtp::backend::cuda::abi::{self, CollectiveArena};
use ringtp::backend::cuda::{DeviceSlice, DeviceSliceMut, Stream};
use ringtp::comm::p2p::P2pOptions;
use ringtp::dtype::Element;

use super::losses::{call, prepared, ranks, stretches, watches_of};
use super::operation::{Operation, for_type};
use super::sums::put;
use super::{Outcome, Party, Target, options, words};
use crate::p2p_support::Rank;

/// Blocks of the grids.
const BLOCKS: usize = 2;

/// As `kWindow` of `cuda/collective/collective.cuh`, and where flags have tag and generation.
const WINDOW: u64 = 1 << 20;
const TAG: u64 = 1 << 40;
const GENERATION: u64 = 1 << 48;

/// A wait of the others for the rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Site {
    /// The first barrier of a pass, and the second.
    Barrier,
    SecondBarrier,
    /// For a message of the ring, and for a free slot.
    Message,
    Credit,
}

/// What comes instead of the flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instead {
    /// A flag as far ahead as one can be: it counts.
    FarAhead,
    /// One further: it has been left behind long ago.
    LeftBehind,
    Nothing,
    OtherCall,
    LaterGeneration,
    /// The word that the rank has left.
    Goodbye,
    /// The host ends the group.
    Abort,
}

const INSTEAD: [Instead; 7] = [
    Instead::Nothing,
    Instead::OtherCall,
    Instead::LaterGeneration,
    Instead::Goodbye,
    Instead::Abort,
    Instead::LeftBehind,
    Instead::FarAhead,
];

pub(super) fn at_a_barrier(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let instead = INSTEAD[seed as usize % INSTEAD.len()];
    for_type!(target, stops(party, target, seed, Site::Barrier, instead))
}

pub(super) fn at_the_second_barrier(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let instead = INSTEAD[seed as usize % INSTEAD.len()];
    for_type!(
        target,
        stops(party, target, seed, Site::SecondBarrier, instead)
    )
}

pub(super) fn before_a_message(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let instead = INSTEAD[seed as usize % INSTEAD.len()];
    for_type!(target, stops(party, target, seed, Site::Message, instead))
}

pub(super) fn before_it_frees_a_slot(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let instead = INSTEAD[seed as usize % INSTEAD.len()];
    for_type!(target, stops(party, target, seed, Site::Credit, instead))
}

fn stops<T: Element>(
    party: &Party<'_>,
    target: &Target,
    seed: u64,
    site: Site,
    instead: Instead,
) -> Outcome {
    let waits = matches!(
        instead,
        Instead::Nothing | Instead::LeftBehind | Instead::FarAhead
    );
    let options = P2pOptions {
        deadline: if waits {
            Duration::from_millis(200)
        } else {
            Duration::from_nanos(u64::MAX)
        },
        blocks: BLOCKS as u32,
        ..options()
    };
    let n = ranks(target);
    let lost = n - 1;
    let (group, mut ranks) = party.group(target, n, seed, options)?;
    let ring: Vec<usize> = group.ring().unwrap_or_default().to_vec();
    let place = ring.iter().position(|&rank| rank == lost).unwrap_or(0);
    let (previous, next) = (ring[(place + n - 1) % n], ring[(place + 1) % n]);
    let neighbours = |rank: usize| !target.is_ring() || rank == previous || rank == next;
    // Messages of the ring that each block sends in a step.
    let messages = if site == Site::Credit { 5 } else { 2 };
    let message = usize::try_from(abi::kRingMessageBytes).unwrap_or(0);
    let bytes = 2100 + usize::from(target.is_ring()) * (messages - 1) * message;
    let call = call(target, n, bytes * stretches(target, n), size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 1);
    let steps = match target.operation {
        Operation::AllReduce(_) => 2 * n - 2,
        _ => n - 1,
    };
    // Of the last message of each block.
    let last = |flag: u64| flag + 1 + (messages.div_ceil(BLOCKS) * steps) as u64;
    // Nobody gives up where the flag counts and is the last that the rank owes.
    let goes_on = instead == Instead::FarAhead && !(target.is_ring() && site == Site::Barrier);
    // Who frees no slot keeps its predecessor waiting alone: what it sent is there.
    let waiting = match (goes_on, site) {
        (true, _) => 0..0,
        (_, Site::Credit) => previous..previous + 1,
        _ => 0..lost,
    };
    let watches = watches_of(&ranks, waiting)?;
    let hosts = Hosts::new(&ranks)?;

    for rank in 0..lost {
        put::<T>(&mut ranks[rank], &call, &mut memory[rank][0])?;
    }
    // What the others call, as they tell the rank.
    let others: Vec<usize> = (0..lost).filter(|&rank| neighbours(rank)).collect();
    let told = |block: usize, rank: usize| {
        offset_of!(CollectiveArena, barrier) + 8 * (block * abi::kMaxRanks as usize + rank)
    };
    let flag = hosts.wait_for(lost, told(0, others[0]), &|flag| flag != 0)?;
    let barrier = |value: u64| -> Outcome {
        for &rank in &others {
            for block in 0..BLOCKS {
                hosts.write(rank, told(block, lost), value)?;
            }
        }
        Ok(())
    };
    let sent = |value: u64| hosts.write_blocks(next, offset_of!(CollectiveArena, ring_sent), value);
    let read =
        |value: u64| hosts.write_blocks(previous, offset_of!(CollectiveArena, ring_read), value);

    // What the rank has done: it has staged zeros, say.
    let head = size_of::<CollectiveArena>().next_multiple_of(128) as u64;
    for (&rank, block) in others.iter().flat_map(|r| (0..BLOCKS).map(move |b| (r, b))) {
        let source = offset_of!(CollectiveArena, sources) - offset_of!(CollectiveArena, barrier);
        hosts.write(rank, source + told(block, lost), hosts.arenas[lost] + head)?;
    }
    if site != Site::Barrier {
        barrier(flag)?;
    }
    if site == Site::SecondBarrier {
        for (&rank, block) in others.iter().flat_map(|r| (0..BLOCKS).map(move |b| (r, b))) {
            hosts.wait_for(lost, told(block, rank), &|seen| seen == flag + 1)?;
        }
    }
    if site == Site::Credit {
        sent(last(flag))?;
    }
    // And what comes instead of the next.
    let awaited = match site {
        Site::Barrier => flag,
        Site::SecondBarrier => flag + 1,
        Site::Message | Site::Credit => flag + 2,
    };
    let write = |value: u64| match site {
        Site::Barrier | Site::SecondBarrier => barrier(value),
        Site::Message => sent(value),
        Site::Credit => read(value),
    };
    let step = match site {
        Site::Barrier | Site::SecondBarrier => abi::kStepBarrier,
        Site::Message => abi::kStepRingMessage,
        Site::Credit => abi::kStepRingCredit,
    };
    let expected = match instead {
        Instead::Nothing => abi::kReasonTimeout,
        Instead::FarAhead => {
            write(awaited + WINDOW - 1)?;
            abi::kReasonTimeout
        }
        Instead::LeftBehind => {
            write(awaited + WINDOW)?;
            abi::kReasonTimeout
        }
        Instead::OtherCall => {
            write(awaited ^ TAG)?;
            abi::kReasonOtherCall
        }
        Instead::LaterGeneration => {
            write(awaited + GENERATION)?;
            abi::kReasonGeneration
        }
        Instead::Goodbye => {
            drop(ranks.pop());
            abi::kReasonLeft
        }
        Instead::Abort => {
            ranks[0].comm.abort("it has had enough");
            abi::kReasonAborted
        }
    };
    if goes_on {
        for rank in &mut ranks[..lost] {
            rank.comm.synchronize().map_err(words)?;
        }
        return Ok(());
    }
    let mut seen = Vec::new();
    for watch in &watches {
        let record = watch.record()?;
        if record.reason != expected && record.reason != abi::kReasonAborted {
            return Err(format!("{instead:?} at {site:?}: a rank says {record:?}"));
        }
        seen.push(record);
    }
    // Around the ring, others than the neighbours may run out of time first.
    let anybody = target.is_ring() && expected == abi::kReasonTimeout;
    let knows = seen.iter().any(|record| {
        let names = record.step == step && record.peer as usize == lost;
        let exact = names && record.epoch == awaited % TAG;
        record.reason == expected && (exact || anybody || expected == abi::kReasonAborted)
    });
    if !knows {
        return Err(format!(
            "{instead:?} at {site:?}: nobody says so, but {seen:?}"
        ));
    }
    for rank in ranks.iter().take(lost) {
        rank.comm.stream().synchronize().map_err(words)?;
    }
    Ok(())
}

/// Reads and writes the ranks' arenas past kernels that wait.
struct Hosts {
    streams: Vec<Stream>,
    arenas: Vec<u64>,
    /// Of a rank that is at work.
    busy: Arc<Stream>,
}

impl Hosts {
    fn new(ranks: &[Rank]) -> Result<Self, String> {
        let streams = ranks
            .iter()
            .map(|rank| Stream::new(rank.comm.stream().context()));
        Ok(Self {
            streams: streams.collect::<ringtp::Result<_>>().map_err(words)?,
            arenas: ranks.iter().map(|r| r.comm.arena_address()).collect(),
            busy: ranks[0].comm.stream().clone(),
        })
    }

    fn write(&self, rank: usize, at: usize, value: u64) -> Outcome {
        // SAFETY: a word of the arena, which lives as long as the group; kernels and host write it
        // whole.
        let mut to = unsafe { DeviceSliceMut::from_raw(self.arenas[rank] + at as u64, 8) };
        let stream = &self.streams[rank];
        stream.upload(&[value], &mut to).map_err(words)?;
        stream.synchronize().map_err(words)
    }

    fn write_blocks(&self, rank: usize, at: usize, value: u64) -> Outcome {
        (0..BLOCKS).try_for_each(|block| self.write(rank, at + 8 * block, value))
    }

    /// A word once it is as it should be.
    fn wait_for(&self, rank: usize, at: usize, is: &dyn Fn(u64) -> bool) -> Result<u64, String> {
        for _ in 0..1000 {
            // SAFETY: as above.
            let from = unsafe { DeviceSlice::from_raw(self.arenas[rank] + at as u64, 8) };
            let mut word = [0u64];
            let stream = &self.streams[rank];
            stream.download(from, &mut word).map_err(words)?;
            if is(word[0]) {
                return Ok(word[0]);
            }
            // The devices go on while the host asks.
            self.busy.is_idle().map_err(words)?;
        }
        Err(format!("the word at {at} of rank {rank} does not come"))
    }
}
