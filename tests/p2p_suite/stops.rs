//! A rank that stops on its way through a collective: at each of the waits of its peers, and in
//! each of the ways in which they can find out. It launches nothing; what it has done until then the
//! host writes into its peers' memory.

use std::mem::offset_of;
use std::time::Duration;

use ringtp::backend::cuda::abi::{self, CollectiveArena};
use ringtp::comm::p2p::P2pOptions;
use ringtp::comm::part;
use ringtp::dtype::Element;

use super::flags::FlagWriter;
use super::hosts::Hosts;
use super::losses::{call, is_untouched_but, prepared, ranks, stretches, watches_of};
use super::operation::{Operation, Order, for_type};
use super::sums::put;
use super::{Outcome, Party, Target, options, with_oldest_values, words};

/// As `kWindow` of `cuda/collective/collective.cuh`, and where flags have tag and generation.
const WINDOW: u64 = 1 << 20;
const TAG: u64 = 1 << 40;
pub(super) const GENERATION: u64 = 1 << 48;

/// A wait of the others for the rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Site {
    /// The first barrier of a pass, and the second.
    Barrier,
    SecondBarrier,
    /// For a message of the ring, and for a free slot.
    Message,
    Credit,
    /// For the total, which comes down the tree.
    Total,
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
    /// The flag, which is the rank's last, and then that word: the flag counts.
    LastWords,
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

pub(super) fn before_the_total(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let instead = INSTEAD[seed as usize % INSTEAD.len()];
    for_type!(target, stops(party, target, seed, Site::Total, instead))
}

pub(super) fn before_a_message(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let instead = INSTEAD[seed as usize % INSTEAD.len()];
    for_type!(target, stops(party, target, seed, Site::Message, instead))
}

pub(super) fn before_it_frees_a_slot(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let instead = INSTEAD[seed as usize % INSTEAD.len()];
    for_type!(target, stops(party, target, seed, Site::Credit, instead))
}

/// A rank has done all that it owed and left, while the others look at their leisure. They read the
/// oldest values that they may: whoever sees that the rank has left sees its last flag none the less.
pub(super) fn a_rank_that_has_left(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let site = match target.order {
        Order::Ring => Site::Message,
        Order::Tree => Site::Total,
        Order::Ranks if target.has_two_barriers() => Site::SecondBarrier,
        Order::Ranks => Site::Barrier,
    };
    let seed = with_oldest_values(seed);
    for_type!(target, stops(party, target, seed, site, Instead::LastWords))
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
    let n = ranks(target);
    // Where there is one, nobody gives up a second time.
    let blocks = 2 - seed as usize / INSTEAD.len() % 2;
    // In the last generation that is counted, a flag never written looks like one of the next. The
    // host counts from the first.
    let in_the_last = !seed.is_multiple_of(2) && instead != Instead::Abort;
    let ahead = if in_the_last { 0xfffe } else { 0 };
    let options = P2pOptions {
        deadline: if waits {
            Duration::from_millis(10)
        } else {
            Duration::from_nanos(u64::MAX)
        },
        blocks: blocks as u32,
        ahead: vec![ahead; n],
        ..options()
    };
    let lost = if site == Site::Total { 0 } else { n - 1 };
    let all_others = (0..n).filter(|&rank| rank != lost);
    let (group, mut ranks) = party.group(target, n, seed, options)?;
    let ring: Vec<usize> = group.ring().unwrap_or_default().to_vec();
    let place = ring.iter().position(|&rank| rank == lost).unwrap_or(0);
    let (previous, next) = (ring[(place + n - 1) % n], ring[(place + 1) % n]);
    let neighbours = |rank: usize| match (target.order, site) {
        (Order::Ranks, _) | (_, Site::Total) => true,
        (Order::Ring, _) => rank == previous || rank == next,
        // The root, whose child it is.
        (Order::Tree, _) => rank == 0,
    };
    // Messages of the ring that each block sends in a step.
    let messages = if site == Site::Credit { 5 } else { blocks };
    let message = usize::try_from(abi::kRingMessageBytes).unwrap_or(0);
    let least = if blocks == 1 { 1000 } else { 2100 };
    let bytes = least + usize::from(target.is_ring()) * (messages - 1) * message;
    let call = call(target, n, bytes * stretches(target, n), size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 2);
    let steps = match target.operation {
        Operation::AllReduce(_) => 2 * n - 2,
        _ => n - 1,
    };
    // Of the last message of each block.
    let last = |flag: u64| flag + 1 + (messages.div_ceil(blocks) * steps) as u64;
    // Nobody gives up where the flag counts and is the last that the rank owes.
    let goes_on = match instead {
        Instead::FarAhead => !(target.is_ring() && site == Site::Barrier),
        Instead::LastWords => true,
        _ => false,
    };
    // Who frees no slot keeps its predecessor waiting alone: what it sent is there.
    let waiting = match (goes_on, site) {
        (true, _) => 0..0,
        (_, Site::Credit) => previous..previous + 1,
        (_, Site::Total) => 1..n,
        _ => 0..lost,
    };
    let own = FlagWriter::new(ranks[lost].comm.stream().context())?;
    let watches = watches_of(&ranks, waiting)?;
    // What the others call, as they tell the rank.
    let others: Vec<usize> = all_others.clone().filter(|&r| neighbours(r)).collect();
    // Of the others, one that cannot come to its end by itself.
    let busy = if target.is_ring() {
        previous
    } else {
        others[0]
    };
    let hosts = Hosts::new(&ranks, busy)?;

    for rank in all_others {
        put::<T>(&mut ranks[rank], &call, &mut memory[rank][0])?;
    }
    let told = |block: usize, rank: usize| {
        offset_of!(CollectiveArena, barrier) + 8 * (block * abi::kMaxRanks as usize + rank)
    };
    // Up the tree it is told nothing, but its parent has another child.
    let flag = match (target.order, site) {
        (Order::Tree, Site::Barrier) => hosts.wait_for(0, told(0, 1), &|flag| flag != 0)?,
        _ => hosts.wait_for(lost, told(0, others[0]), &|flag| flag != 0)?,
    };
    let barrier = |value: u64| -> Outcome {
        for &rank in &others {
            for block in 0..blocks {
                hosts.write(rank, told(block, lost), value)?;
            }
        }
        Ok(())
    };
    let sent = |value: u64| {
        hosts.write_blocks(next, blocks, offset_of!(CollectiveArena, ring_sent), value)
    };
    let read = |value: u64| {
        hosts.write_blocks(
            previous,
            blocks,
            offset_of!(CollectiveArena, ring_read),
            value,
        )
    };

    // What the rank has done: it has staged zeros, say.
    let head = size_of::<CollectiveArena>().next_multiple_of(128) as u64;
    for (&rank, block) in others.iter().flat_map(|r| (0..blocks).map(move |b| (r, b))) {
        let source = offset_of!(CollectiveArena, sources) - offset_of!(CollectiveArena, barrier);
        hosts.write(rank, source + told(block, lost), hosts.arenas[lost] + head)?;
    }
    // Down the tree nothing comes before the total.
    if site != Site::Barrier && site != Site::Total {
        barrier(flag)?;
    }
    if site == Site::SecondBarrier {
        for (&rank, block) in others.iter().flat_map(|r| (0..blocks).map(move |b| (r, b))) {
            hosts.wait_for(lost, told(block, rank), &|seen| seen == flag + 1)?;
        }
    }
    if site == Site::Credit {
        sent(last(flag))?;
        // Its predecessor has filled all slots.
        for block in 0..blocks {
            let at = offset_of!(CollectiveArena, ring_sent) + 8 * block;
            hosts.wait_for(lost, at, &|sent| sent == flag + 1 + abi::kRingSlots as u64)?;
        }
    }
    if instead == Instead::LastWords {
        hosts.pause()?;
    }
    // And what comes instead of the next.
    let awaited = match site {
        Site::Barrier => flag,
        Site::SecondBarrier | Site::Total => flag + 1,
        Site::Message | Site::Credit => flag + 2,
    };
    let write = |value: u64| match site {
        Site::Barrier | Site::SecondBarrier | Site::Total => barrier(value),
        Site::Message => sent(value),
        Site::Credit => read(value),
    };
    let step = match site {
        Site::Barrier | Site::SecondBarrier | Site::Total => abi::kStepBarrier,
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
            // Of those that there are, 0 is left out.
            let by = if in_the_last { 2 } else { 1 };
            write(awaited.wrapping_add(by * GENERATION))?;
            abi::kReasonGeneration
        }
        Instead::Goodbye => {
            drop(ranks.remove(lost));
            abi::kReasonLeft
        }
        Instead::LastWords => {
            let leaving = ranks.remove(lost);
            let (to, first, value) = match site {
                Site::Message => (
                    vec![next],
                    offset_of!(CollectiveArena, ring_sent),
                    last(flag),
                ),
                _ => (others.clone(), told(0, lost), awaited),
            };
            let apart = match site {
                Site::Message => 8,
                _ => told(1, 0) - told(0, 0),
            };
            for (rank, block) in to
                .into_iter()
                .flat_map(|r| (0..blocks).map(move |b| (r, b)))
            {
                let flag = hosts.arenas[rank] + (first + block * apart) as u64;
                own.write(leaving.comm.stream(), flag, value)?;
            }
            // What comes next in its stream.
            drop(leaving);
            abi::kReasonLeft
        }
        Instead::Abort => {
            ranks[others[0]].comm.abort("it has had enough");
            abi::kReasonAborted
        }
    };
    // From here on the others alone; the rank leaves at the end, if it has not yet.
    let _lost = (ranks.len() == n).then(|| ranks.remove(lost));
    if goes_on {
        for rank in &mut ranks {
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
    // Around the ring, others than the neighbours may run out of time first, and tell them; so may
    // the other child of its parent.
    let late = expected == abi::kReasonTimeout;
    let anybody = target.is_ring() && late;
    let told = late && (site == Site::Credit || target.order == Order::Tree);
    let knows = seen.iter().any(|record| {
        let names = record.step == step && record.peer as usize == lost;
        let exact = names && record.epoch == awaited % TAG;
        let is_so = exact || anybody || expected == abi::kReasonAborted;
        (record.reason == expected && is_so) || (told && exact)
    });
    if !knows {
        return Err(format!(
            "{instead:?} at {site:?}: nobody says so, but {seen:?}"
        ));
    }
    for rank in &ranks {
        rank.comm.stream().synchronize().map_err(words)?;
    }
    if !target.is_ring() {
        // Ahead of the second barrier a rank writes its own part.
        let per_pack = 16 / size_of::<T>();
        let packs = call.elements.div_ceil(per_pack);
        for rank in &ranks {
            let index = rank.comm.rank();
            let own = match (site, target.operation) {
                (Site::SecondBarrier, Operation::AllReduce(_)) => part(packs, n, index),
                // The root has no part, and what it has is the result.
                (Site::SecondBarrier, _) if index > 0 => part(packs, n - 1, index - 1),
                _ => 0..0,
            };
            let own = own.start * per_pack..own.end * per_pack;
            if !is_untouched_but::<T>(own, rank, &call, &memory[index][0]) {
                return Err(format!(
                    "{instead:?} at {site:?}: rank {index} wrote output"
                ));
            }
        }
    }
    // After the abort no host lets its rank call again.
    if instead == Instead::Abort || target.order == Order::Ranks {
        return Ok(());
    }
    if site == Site::Total {
        // It comes too late: the next call does not take it for its own.
        write(awaited)?;
        for rank in &mut ranks {
            let index = rank.comm.rank();
            put::<T>(rank, &call, &mut memory[index][1])?;
            rank.comm.stream().synchronize().map_err(words)?;
            if !is_untouched_but::<T>(0..0, rank, &call, &memory[index][1]) {
                return Err(format!(
                    "{instead:?}: rank {index} took the total of another call"
                ));
            }
        }
    }
    if !target.is_ring() {
        return Ok(());
    }
    // Nothing is sent to a rank that has not come, nor in the next call: it may still be at work on
    // what came in the call before.
    let sent_to_it = || {
        let at = |block| offset_of!(CollectiveArena, ring_sent) + 8 * block;
        let sent = (0..blocks).map(|block| hosts.read(lost, at(block)));
        sent.collect::<Result<Vec<u64>, String>>()
    };
    let before = sent_to_it()?;
    for rank in &mut ranks {
        let index = rank.comm.rank();
        put::<T>(rank, &call, &mut memory[index][1])?;
    }
    for rank in &ranks {
        rank.comm.stream().synchronize().map_err(words)?;
    }
    let after = sent_to_it()?;
    let has_sent = after.iter().any(|&sent| sent != 0);
    let should = instead == Instead::FarAhead;
    if before != after || (site == Site::Barrier && has_sent != should) {
        return Err(format!(
            "{instead:?} at {site:?}: rank {previous} has sent {before:?}, and then {after:?}"
        ));
    }
    Ok(())
}
