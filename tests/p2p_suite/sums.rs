//! Calls one after another, of many sizes, whose results are right to the bit.

use ringtp::dtype::Element;

use super::operation::{Call, Operation, for_type};
use super::{Outcome, Party, Target, options, words};
use crate::p2p_support::random::Random;
use crate::p2p_support::{Message, Rank, same};

/// Bytes of the messages: an element, some blocks, several passes.
const BYTES: [usize; 7] = [2, 1300, 28000, 40, 2064, 13500, 16];
/// Around the ring, where a block takes whole messages.
const RING_BYTES: [usize; 5] = [2, 1300, 40, 6000, 16];

/// Ranks of the groups.
fn groups(target: &Target) -> &'static [usize] {
    match target.operation {
        _ if target.is_ring() => &[4, 6],
        // With one reader there are no parts.
        Operation::Broadcast { in_parts: true } => &[3, 4],
        _ => &[3, 2],
    }
}

/// See the module.
pub(super) fn back_to_back(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let groups = groups(target);
    let n = groups[seed as usize % groups.len()];
    for_type!(target, calls(party, target, n, seed, None))
}

/// Calls whose epochs pass the last and begin again.
pub(super) fn as_epochs_wrap(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    let n = groups(target)[0];
    let first = (1 << 40) - 2 - 2 * (seed % 8);
    for_type!(target, calls(party, target, n, seed, Some(first)))
}

/// A rank's memory of a call.
type Prepared = (Message, Message);

fn calls<T: Element>(
    party: &Party<'_>,
    target: &Target,
    n: usize,
    seed: u64,
    first_epoch: Option<u64>,
) -> Outcome {
    let (group, mut ranks) = party.group(target, n, seed, options())?;
    if let Some(epoch) = first_epoch {
        group.set_epoch(epoch).map_err(words)?;
    }
    let ring: Vec<usize> = group.ring().unwrap_or_default().to_vec();
    let mut random = Random::new(seed);
    let mut sizes = if target.is_ring() {
        RING_BYTES.to_vec()
    } else {
        BYTES.to_vec()
    };
    random.shuffle(&mut sizes);
    let mut all = Vec::new();
    for bytes in sizes {
        let call = Call {
            operation: target.operation,
            ranks: n,
            elements: bytes.div_ceil(size_of::<T>()),
            in_place: random.flip(),
            root: random.below(n),
        };
        let messages: Vec<Vec<T>> = (0..n)
            .map(|rank| random.awkward_values(call.input(rank)))
            .collect();
        let memory: Vec<Prepared> = ranks
            .iter()
            .enumerate()
            .map(|(index, rank)| {
                let offset = random.choose(&[0, 0, 0, size_of::<T>()]);
                prepare(rank, &call, &messages[index], offset)
            })
            .collect();
        all.push((call, messages, memory));
    }
    // Either all ranks come to a call together, or one after another makes all of its calls.
    if seed.is_multiple_of(2) {
        for (call, _, memory) in &mut all {
            for (rank, memory) in ranks.iter_mut().zip(memory) {
                put::<T>(rank, call, memory)?;
            }
        }
    } else {
        for (index, rank) in ranks.iter_mut().enumerate() {
            for (call, _, memory) in &mut all {
                put::<T>(rank, call, &mut memory[index])?;
            }
        }
    }
    for rank in &mut ranks {
        rank.comm.synchronize().map_err(words)?;
    }
    for (number, (call, messages, memory)) in all.iter().enumerate() {
        for (rank, (input, output)) in memory.iter().enumerate() {
            let from = if call.replaces() { input } else { output };
            let found = ranks[rank].values::<T>(from);
            let expected = call.expected(target, messages, rank, &ring);
            let wrong = (0..expected.len()).find(|&i| !same(&found[i], &expected[i]));
            if let Some(i) = wrong {
                return Err(format!(
                    "call {number} ({call:?}): element {i} on rank {rank} is {:?}, expected {:?}",
                    found[i], expected[i]
                ));
            }
        }
    }
    Ok(())
}

/// A rank's message, and room for its result.
pub(super) fn prepare<T: Element>(
    rank: &Rank,
    call: &Call,
    message: &[T],
    offset: usize,
) -> Prepared {
    let me = rank.comm.rank();
    let input = rank.message(message, offset);
    let output = rank.poisoned::<T>(call.output(me), 0);
    (input, output)
}

/// Puts a rank's call into its stream.
pub(super) fn put<T: Element>(rank: &mut Rank, call: &Call, memory: &mut Prepared) -> Outcome {
    let (input, output) = memory;
    let done = call.put::<T>(
        &mut rank.comm,
        &mut input.view_mut(),
        &mut output.view_mut(),
    );
    done.map_err(words)
}
