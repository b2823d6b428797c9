//! The abort word, raised while a rank is on its way: it is looked at even where the flag is there.

use std::mem::offset_of;
use std::time::Duration;

use ringtp::backend::cuda::abi::{self, CollectiveArena};
use ringtp::comm::p2p::P2pOptions;
use ringtp::dtype::Element;

use super::flags::FlagWriter;
use super::hosts::Hosts;
use super::losses::{call, prepared, ranks, stretches};
use super::operation::for_type;
use super::stops::GENERATION;
use super::sums::put;
use super::{Outcome, Party, Target, options, with_oldest_values, words};

/// All peers have come to the second barrier while a rank waits at the first, and one of them has
/// raised the abort word before: that is known to whoever saw its flag. The rank leaves at the
/// second barrier at the latest, though all flags are there.
pub(super) fn a_raised_word(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    // So that the word is not seen before it must be.
    let seed = with_oldest_values(seed);
    for_type!(target, raised(party, target, seed))
}

fn raised<T: Element>(party: &Party<'_>, target: &Target, seed: u64) -> Outcome {
    const BLOCKS: usize = 2;
    let n = ranks(target);
    let options = P2pOptions {
        deadline: Duration::from_nanos(u64::MAX),
        blocks: BLOCKS as u32,
        ..options()
    };
    let (_group, mut ranks) = party.group(target, n, seed, options)?;
    let call = call(target, n, 2100 * stretches(target, n), size_of::<T>());
    let mut memory = prepared::<T>(&ranks, &call, 1);
    let own = FlagWriter::new(ranks[1].comm.stream().context())?;
    let hosts = Hosts::new(&ranks, 0)?;
    put::<T>(&mut ranks[0], &call, &mut memory[0][0])?;

    let told = |block: usize, by: usize| {
        offset_of!(CollectiveArena, barrier) + 8 * (block * abi::kMaxRanks as usize + by)
    };
    let flag = hosts.wait_for(1, told(0, 0), &|flag| flag != 0)?;
    let peers = (1..n).flat_map(|peer| (0..BLOCKS).map(move |block| (peer, block)));
    let head = size_of::<CollectiveArena>().next_multiple_of(128) as u64;
    let source = offset_of!(CollectiveArena, sources) - offset_of!(CollectiveArena, barrier);
    for (peer, block) in peers.clone() {
        hosts.write(0, source + told(block, peer), hosts.arenas[peer] + head)?;
    }
    let abort = hosts.arenas[0] + offset_of!(CollectiveArena, abort) as u64;
    own.write(&hosts.streams[1], abort, flag / GENERATION * GENERATION + 2)?;
    for (peer, block) in peers {
        let at = hosts.arenas[0] + told(block, peer) as u64;
        hosts.write_by(1, at, flag + 1)?;
    }
    ranks[0].comm.stream().synchronize().map_err(words)?;
    for block in 0..BLOCKS {
        let epoch = hosts.read(0, offset_of!(CollectiveArena, epochs) + 8 * block)?;
        if epoch != 0 {
            return Err(format!(
                "block {block} came to its end: its epoch is {epoch}"
            ));
        }
    }
    Ok(())
}
