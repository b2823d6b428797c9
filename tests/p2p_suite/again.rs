//! A call after one that failed, before anybody has asked how that ended.

use std::time::Duration;

use ringtp::backend::cuda::abi::CollectiveArena;
use ringtp::comm::p2p::P2pOptions;
use ringtp::dtype::Element;

use super::hosts::Hosts;
use super::losses::{call, prepared, ranks, stretches};
use super::operation::for_type;
use super::sums::put;
use super::{Outcome, Party, Target, options, words};
use crate::p2p_support::Rank;

/// What a rank has staged for a call that it gave up, a peer may still be reading, which had all flags
/// in time: the rank writes nothing there for a later call.
pub(super) fn a_call_after_one_that_failed(
    party: &Party<'_>,
    target: &Target,
    seed: u64,
) -> Outcome {
    for_type!(target, again(party, target, seed))
}

fn again<T: Element>(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    const STAGING: usize = 13440;
    const MARK: u64 = 0x5eed_0000_0000_5eed;
    let n = ranks(target);
    let options = P2pOptions {
        deadline: Duration::from_millis(1),
        staging_bytes: STAGING,
        ..options()
    };
    let (_group, mut ranks) = party.group(target, n, seed, options)?;
    // The last one never comes.
    let call = call(target, n, 2100 * stretches(target, n), size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 2);
    let mut put_all = |ranks: &mut [Rank], index: usize| -> Outcome {
        for (rank, memory) in ranks.iter_mut().zip(&mut memory) {
            put::<T>(rank, &call, &mut memory[index])?;
        }
        let mut streams = ranks.iter().map(|rank| rank.comm.stream());
        streams.try_for_each(|stream| stream.synchronize().map_err(words))
    };
    put_all(&mut ranks[..n - 1], 0)?;
    // The first packs of both staging buffers: of several threads.
    let head = size_of::<CollectiveArena>().next_multiple_of(128);
    let places = [head, head + STAGING].map(|buffer| (0..4).map(move |pack| buffer + 16 * pack));
    let hosts = Hosts::new(&ranks, 0)?;
    let places: Vec<(usize, usize)> = (0..n - 1)
        .flat_map(|rank| {
            places
                .clone()
                .into_iter()
                .flatten()
                .map(move |at| (rank, at))
        })
        .collect();
    for &(rank, at) in &places {
        hosts.write(rank, at, MARK)?;
    }
    put_all(&mut ranks[..n - 1], 1)?;
    for (rank, at) in places {
        if hosts.read(rank, at)? != MARK {
            return Err(format!(
                "rank {rank} staged after it had given up a call: {} bytes behind its head",
                at - head
            ));
        }
    }
    Ok(())
}
