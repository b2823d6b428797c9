//! Ranks that do not come, come too late, call something else, or end the group.

use std::ops::Range;
use std::time::Duration;

use ringtp::backend::cuda::abi;
use ringtp::comm::CommError;
use ringtp::comm::p2p::P2pOptions;
use ringtp::dtype::Element;

use super::operation::{Call, Operation, Order, for_type};
use super::sums::{prepare, put};
use super::watch::Watch;
use super::{Outcome, Party, Target, between_ranks, options, words};
use crate::p2p_support::{Message, Rank, same};

/// Bytes for which there are several blocks, of the stretch of a message that blocks share: see
/// [`stretches`].
const BYTES: usize = 2100;

/// Of a call that is not the one of the others.
const OTHER_BYTES: usize = 4236;

/// Bytes of a message of the ring, of which each block takes whole ones.
const RING_MESSAGE: usize = abi::kRingMessageBytes as usize;

/// How many stretches a message has: where each rank works on its own part, one for each.
pub(super) fn stretches(target: &Target, n: usize) -> usize {
    let name = match target.operation {
        Operation::AllReduce(algorithm) => algorithm.name(),
        Operation::ReduceScatter | Operation::Broadcast { in_parts: true } => return n,
        _ => return 1,
    };
    if matches!(name, "two-shot" | "ring") {
        n
    } else {
        1
    }
}

pub(super) fn ranks(target: &Target) -> usize {
    if target.is_ring() { 4 } else { 3 }
}

pub(super) fn call(target: &Target, n: usize, bytes: usize, size: usize) -> Call {
    Call {
        operation: target.operation,
        ranks: n,
        elements: bytes.div_ceil(size),
        in_place: false,
        root: 0,
    }
}

/// The same with several blocks.
fn wide_call(target: &Target, n: usize, bytes: usize, size: usize) -> Call {
    let least = if target.is_ring() { RING_MESSAGE } else { 0 };
    call(target, n, (least + bytes) * stretches(target, n), size)
}

/// What a rank brings, in each element.
fn brought<T: Element>(rank: &Rank) -> T {
    T::from_f32(1.0 + rank.comm.rank() as f32)
}

/// Calls of all ranks, with messages that differ from rank to rank.
pub(super) fn prepared<T: Element>(
    ranks: &[Rank],
    call: &Call,
    times: usize,
) -> Vec<Vec<(Message, Message)>> {
    let of = |rank: &Rank| {
        let message = vec![brought::<T>(rank); call.input(rank.comm.rank())];
        (0..times)
            .map(|_| prepare(rank, call, &message, 0))
            .collect()
    };
    ranks.iter().map(of).collect()
}

/// Whether a rank has no result, though it may have brought something that is replaced by one.
fn is_untouched<T: Element>(rank: &Rank, call: &Call, memory: &(Message, Message)) -> bool {
    is_untouched_but::<T>(0..0, rank, call, memory)
}

/// The same, but for some elements.
pub(super) fn is_untouched_but<T: Element>(
    some: Range<usize>,
    rank: &Rank,
    call: &Call,
    memory: &(Message, Message),
) -> bool {
    let (input, output) = memory;
    let values = rank.values::<T>(if call.replaces() { input } else { output });
    let brought = brought::<T>(rank);
    let mut others = values.iter().enumerate().filter(|(i, _)| !some.contains(i));
    others.all(|(_, value)| match call.replaces() {
        true => same(value, &brought),
        false => value.to_f32().is_nan(),
    })
}

/// A rank does not come in time: the others leave, say who it was, and write nothing. When it
/// comes after all, nothing goes on without them.
pub(super) fn a_rank_that_does_not_come(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    for_type!(target, late(party, target, seed))
}

fn late<T: Element>(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let n = ranks(target);
    let options = P2pOptions {
        deadline: Duration::from_millis(1),
        ..options()
    };
    let (_group, mut ranks) = party.group(target, n, seed, options)?;
    let call = wide_call(target, n, BYTES, size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 2);
    // What they say is read on other devices while they say it.
    let watches = watches(&ranks)?;
    let lost = seed as usize % n;
    let order: Vec<usize> = (0..n).filter(|&rank| rank != lost).chain([lost]).collect();
    for &rank in &order {
        for memory in &mut memory[rank] {
            put::<T>(&mut ranks[rank], &call, memory)?;
        }
        // The others have left before the last one comes.
        let last_of_the_others = order[n - 2];
        if rank == last_of_the_others {
            for &other in &order[..n - 1] {
                let idle = ranks[other].comm.stream().synchronize();
                idle.map_err(words)?;
            }
        }
    }
    for rank in &ranks {
        rank.comm.stream().synchronize().map_err(words)?;
    }
    for (rank, watch) in watches.iter().enumerate() {
        let reason = watch.reason()?;
        if reason != abi::kReasonTimeout && reason != abi::kReasonAborted {
            return Err(format!("rank {rank} gives {reason} for a reason"));
        }
    }
    for &rank in &order {
        let Err(error) = ranks[rank].comm.synchronize() else {
            return Err(format!("rank {rank} noticed nothing"));
        };
        // It came late, or what it wrote did.
        let named = match between_ranks(&error) {
            Some(CommError::RankFailed { rank, .. }) => *rank == lost,
            Some(CommError::Link { from, to, .. }) => *from == lost || *to == lost,
            _ => false,
        };
        if !named {
            return Err(format!("rank {rank}, where rank {lost} was late: {error}"));
        }
    }
    for &rank in &order {
        // In a ring parts pass through before anybody can know.
        let writes_early = target.is_ring();
        for memory in &memory[rank] {
            if !writes_early && !is_untouched::<T>(&ranks[rank], &call, memory) {
                return Err(format!("rank {rank} wrote output"));
            }
        }
    }
    Ok(())
}

/// One rank makes another call: all are told, with the right error.
pub(super) fn another_call(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    for_type!(target, other(party, target, seed))
}

fn other<T: Element>(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let n = ranks(target);
    let options = P2pOptions {
        deadline: Duration::from_nanos(u64::MAX),
        ..options()
    };
    let (_group, mut ranks) = party.group(target, n, seed, options)?;
    let odd = (seed + 1) as usize % n;
    let calls: Vec<Call> = (0..n)
        .map(|rank| {
            let bytes = if rank == odd { OTHER_BYTES } else { BYTES };
            wide_call(target, n, bytes, size_of::<T>())
        })
        .collect();
    let mut memory: Vec<_> = (0..n)
        .map(|rank| {
            let message = vec![T::from_f32(1.0); calls[rank].input(rank)];
            prepare(&ranks[rank], &calls[rank], &message, 0)
        })
        .collect();
    let watches = watches(&ranks)?;
    for rank in 0..n {
        put::<T>(&mut ranks[rank], &calls[rank], &mut memory[rank])?;
    }
    for (rank, watch) in watches.iter().enumerate() {
        let reason = watch.reason()?;
        if reason != abi::kReasonOtherCall && reason != abi::kReasonAborted {
            return Err(format!("rank {rank} gives {reason} for a reason"));
        }
    }
    for (index, rank) in ranks.iter_mut().enumerate() {
        match rank.comm.synchronize() {
            Ok(()) => return Err(format!("rank {index} noticed nothing")),
            Err(error) if matches!(between_ranks(&error), Some(CommError::Mismatch { .. })) => {}
            Err(error) => return Err(format!("rank {index}: {error}")),
        }
    }
    Ok(())
}

/// A rank ends the group while the others wait, who would wait for years.
pub(super) fn an_abort(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    for_type!(target, abort(party, target, seed))
}

fn abort<T: Element>(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let n = ranks(target);
    let options = P2pOptions {
        deadline: Duration::from_nanos(u64::MAX),
        ..options()
    };
    let (_group, mut ranks) = party.group(target, n, seed, options)?;
    let call = wide_call(target, n, BYTES, size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 1);
    let by = seed as usize % n;
    for rank in (0..n).filter(|&rank| rank != by) {
        put::<T>(&mut ranks[rank], &call, &mut memory[rank][0])?;
        // They are waiting by now.
        let idle = ranks[rank].comm.stream().is_idle().map_err(words)?;
        if idle && seed.is_multiple_of(2) {
            return Err(format!("rank {rank} did not wait"));
        }
    }
    ranks[by].comm.abort("it has had enough");
    for rank in (0..n).filter(|&rank| rank != by) {
        let stream = ranks[rank].comm.stream().clone();
        if !stream
            .wait_until_idle(Duration::from_secs(5))
            .map_err(words)?
        {
            return Err(format!("rank {rank} waits on"));
        }
        match ranks[rank].comm.synchronize() {
            Ok(()) => return Err(format!("rank {rank} noticed nothing")),
            Err(error) => match between_ranks(&error) {
                Some(CommError::RankFailed { rank: named, .. }) if *named == by => {}
                _ => return Err(format!("rank {rank}: {error}")),
            },
        }
    }
    Ok(())
}

/// Some ranks were rebuilt without the others, which see that and leave.
pub(super) fn a_rank_left_behind(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    for_type!(target, left_behind(party, target, seed))
}

fn left_behind<T: Element>(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let n = ranks(target);
    // Generations are counted in 16 bits: half of them are ahead of each.
    let by = [1, 0x7fff, 0x8000][seed as usize % 3];
    let first = [0, 0xfffe][seed as usize / 3 % 2];
    let parity = seed as usize / 6;
    let ahead = |rank: usize| first + by * ((rank + parity) % 2) as u64;
    // As the crate counts them: from 1 to 0xffff, and again.
    let generation = |rank: usize| (ahead(rank) % 0xffff + 1) as u16;
    let options = P2pOptions {
        deadline: Duration::from_millis(2),
        ahead: (0..n).map(ahead).collect(),
        ..options()
    };
    let (_group, mut ranks) = party.group(target, n, seed, options)?;
    let call = wide_call(target, n, BYTES, size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 1);
    let watches = watches(&ranks)?;
    for (rank, memory) in ranks.iter_mut().zip(&mut memory) {
        put::<T>(rank, &call, &mut memory[0])?;
    }
    for (rank, watch) in watches.iter().enumerate() {
        let reason = watch.reason()?;
        let newer = generation((rank + 1) % 2).wrapping_sub(generation(rank));
        let left_behind = newer < 0x8000;
        // Its peers of the same generation may have told it first.
        let expected = match reason {
            abi::kReasonGeneration => left_behind,
            abi::kReasonAborted => n > 2,
            // Up a tree nobody signals before all below have.
            abi::kReasonTimeout => !left_behind || target.order == Order::Tree,
            _ => false,
        };
        if !expected {
            return Err(format!(
                "rank {rank}, with others ahead by {newer}, gives {reason} for a reason"
            ));
        }
    }
    for (rank, memory) in ranks.iter().zip(&memory) {
        rank.comm.stream().synchronize().map_err(words)?;
        if !target.is_ring() && !is_untouched::<T>(rank, &call, &memory[0]) {
            return Err("a rank wrote output".into());
        }
    }
    Ok(())
}

/// A watch of each rank's record, on the next rank's device.
fn watches(ranks: &[Rank]) -> Result<Vec<Watch>, String> {
    watches_of(ranks, 0..ranks.len())
}

/// The same of some ranks.
pub(super) fn watches_of(ranks: &[Rank], some: Range<usize>) -> Result<Vec<Watch>, String> {
    let next = |rank: usize| ranks[(rank + 1) % ranks.len()].comm.stream().context();
    let watches = some.clone().map(|rank| Watch::new(next(rank)));
    let watches: Vec<Watch> = watches.collect::<Result<_, _>>()?;
    for (watch, rank) in watches.iter().zip(some) {
        watch.start(ranks[rank].comm.record_address())?;
    }
    Ok(watches)
}

/// A rank leaves for good: what it was called for before is done, and nobody waits for it after.
pub(super) fn a_rank_that_leaves(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    for_type!(target, leaves(party, target, seed))
}

fn leaves<T: Element>(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let n = ranks(target);
    let options = P2pOptions {
        deadline: Duration::from_nanos(u64::MAX),
        ..options()
    };
    let (_group, mut ranks) = party.group(target, n, seed, options)?;
    let call = wide_call(target, n, BYTES, size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 2);
    let gone = n - 1;
    let watches = watches(&ranks[..gone])?;
    for rank in 0..n {
        // The others have waited long enough to look at the flag but once between two looks at the
        // word that says that its writer has left.
        for _ in 0..3 * usize::from(rank == gone) {
            ranks[0].comm.stream().is_idle().map_err(words)?;
        }
        put::<T>(&mut ranks[rank], &call, &mut memory[rank][0])?;
    }
    // It does not come to the second call. The others know of nothing before that: whoever gives up
    // tells those who are still in the first.
    drop(ranks.pop());
    for rank in &ranks {
        rank.comm.stream().synchronize().map_err(words)?;
    }
    for (rank, memory) in ranks.iter_mut().zip(&mut memory) {
        put::<T>(rank, &call, &mut memory[1])?;
    }
    for (rank, watch) in watches.iter().enumerate() {
        let reason = watch.reason()?;
        if reason != abi::kReasonLeft && reason != abi::kReasonAborted {
            return Err(format!("rank {rank} gives {reason} for a reason"));
        }
    }
    for (index, (rank, memory)) in ranks.iter().zip(&memory).enumerate() {
        rank.comm.stream().synchronize().map_err(words)?;
        let [first, second] = &memory[..] else {
            return Err("two calls were prepared".into());
        };
        let brings_the_result = call.replaces() && index == call.root;
        let done = brings_the_result || !is_untouched::<T>(rank, &call, first);
        if !done {
            return Err(format!("rank {index} has no result of what all called"));
        }
        if !target.is_ring() && !is_untouched::<T>(rank, &call, second) {
            return Err(format!("rank {index} wrote output without rank {gone}"));
        }
    }
    Ok(())
}
