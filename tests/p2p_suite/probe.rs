//! What the kernel that tests links says of each of them: those that work, those over which
//! nothing comes, and those over which something else comes.

use ringtp::backend::cuda::{
    Context, DeviceBuffer, DevicePool, Kernels, Launch, Pinned, Stream, abi,
};

use super::{Outcome, Party, words};
use crate::p2p_support::random::Random;

/// Threads of a block: two warps.
const THREADS: u32 = 64;

/// How long the kernels wait for what does not come.
const DEADLINE_NS: u64 = 1_000_000;

/// The way from one rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Sound,
    /// The driver says that there is none.
    None,
    /// Nothing comes.
    Silent,
    /// What comes differs in one word.
    Damaged,
}

/// See the module. Half of the seeds have sound links alone.
pub(super) fn links(party: &Party<'_>, seed: u64) -> Outcome {
    let mut random = Random::new(seed);
    let contexts: Vec<&Context> = party.kernels.iter().map(Kernels::context).collect();
    let n = contexts.len();
    for (own, peer) in contexts
        .iter()
        .flat_map(|own| contexts.iter().map(move |peer| (own, peer)))
    {
        if own.ordinal() != peer.ordinal() {
            own.enable_access(peer).map_err(words)?;
        }
    }
    let all_sound = seed.is_multiple_of(2);
    let ways: Vec<Vec<Way>> = (0..n)
        .map(|_| {
            let ways = [Way::Sound, Way::None, Way::Silent, Way::Damaged];
            let way = |random: &mut Random| match all_sound {
                true => Way::Sound,
                false => random.choose(&ways),
            };
            (0..n).map(|_| way(&mut random)).collect()
        })
        .collect();
    // What a rank has for others to read, with one word that is not as it should be.
    let unreadable: Vec<bool> = (0..n).map(|_| !all_sound && random.flip()).collect();
    let nonce = (random.below(1 << 30) as u64) << 24 | seed << 1 | 1;
    let ranks = contexts.iter().map(|context| Rank::new(context));
    let mut ranks: Vec<Rank> = ranks.collect::<ringtp::Result<_>>().map_err(words)?;
    let arenas: Vec<u64> = ranks.iter().map(|rank| rank.arena.address()).collect();
    for rank in 0..n {
        let mut head = empty();
        head.control.rank = rank as u32;
        head.control.world_size = n as u32;
        head.control.arenas[..n].copy_from_slice(&arenas);
        let own = &mut head.probe[rank];
        write_pattern(own, nonce, rank);
        if unreadable[rank] {
            spoil(own, &mut random);
        }
        for peer in (0..n).filter(|&peer| peer != rank) {
            // What an earlier probe has left.
            let earlier = [0, nonce - 2, nonce ^ 1 << 40];
            head.probe_flags[peer] = random.choose(&earlier);
            if ways[peer][rank] == Way::Damaged {
                write_pattern(&mut head.probe[peer], nonce, peer);
                spoil(&mut head.probe[peer], &mut random);
                head.probe_flags[peer] = nonce;
            }
        }
        ranks[rank].fill(&head).map_err(words)?;
    }
    party.driver.explore(seed, n as u32);
    let first = random.below(n);
    for rank in (0..n).map(|rank| (rank + first) % n) {
        let mask = |has: &dyn Fn(usize) -> bool| {
            (0..n).fold(0, |mask, peer| mask | u32::from(has(peer)) << peer)
        };
        let own = &ranks[rank];
        let args = abi::ProbeArgs {
            arena: arenas[rank],
            results: own.results.device_address(),
            nonce,
            deadline_ns: if all_sound { u64::MAX } else { DEADLINE_NS },
            reaches: mask(&|peer| ways[rank][peer] == Way::Sound),
            reached_by: mask(&|peer| ways[peer][rank] != Way::None),
        };
        let kernel = party.kernels[rank].get("probe").map_err(words)?;
        let shape = Launch::linear(n as u32, THREADS).cooperative();
        // SAFETY: the arenas and the results live until the kernels have ended, below.
        unsafe { own.stream.launch(kernel, shape, &args) }.map_err(words)?;
    }
    for rank in &ranks {
        rank.stream.synchronize().map_err(words)?;
    }
    for rank in 0..n {
        for peer in (0..n).filter(|&peer| peer != rank) {
            let written = match ways[peer][rank] {
                Way::Sound => abi::kProbeRight,
                Way::None => abi::kProbeUntried,
                Way::Silent => abi::kProbeMissing,
                Way::Damaged => abi::kProbeDamaged,
            };
            let read = match (ways[rank][peer], unreadable[peer]) {
                (Way::Sound, false) => abi::kProbeRight,
                (Way::Sound, true) => abi::kProbeDamaged,
                _ => abi::kProbeUntried,
            };
            let found = ranks[rank].results.read(peer);
            if found != u64::from(read) << 32 | u64::from(written) {
                return Err(format!(
                    "rank {rank} says {found:#x} of rank {peer}, expected {written} of its writes \
                     ({:?}) and {read} of what is read there",
                    ways[peer][rank]
                ));
            }
        }
    }
    Ok(())
}

/// One rank: its arena, what its kernel found, and a stream.
struct Rank {
    stream: Stream,
    arena: DeviceBuffer,
    results: Pinned<u64>,
}

impl Rank {
    fn new(context: &Context) -> ringtp::Result<Self> {
        let stream = Stream::new(context)?;
        Ok(Self {
            arena: DevicePool::new(context, 0).zeros(size_of::<abi::CollectiveArena>(), &stream)?,
            results: Pinned::zeros(context, abi::kMaxRanks as usize)?,
            stream,
        })
    }

    fn fill(&mut self, head: &abi::CollectiveArena) -> ringtp::Result<()> {
        // SAFETY: a repr(C) struct of integers; what lies between its fields was zeroed with it.
        let bytes = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(head).cast::<u8>(), size_of_val(head))
        };
        self.stream.upload(bytes, &mut self.arena.as_mut())?;
        self.stream.synchronize()
    }
}

fn empty() -> Box<abi::CollectiveArena> {
    // SAFETY: a repr(C) struct of integers, for which zeros are values.
    Box::new(unsafe { std::mem::zeroed() })
}

/// As in `cuda/collective/probe.cu`.
fn write_pattern(words: &mut [u8], nonce: u64, rank: usize) {
    for (index, word) in words.chunks_exact_mut(4).enumerate() {
        let x = (nonce as u32)
            .wrapping_mul(0x9e37_79b9)
            .wrapping_add((rank as u32).wrapping_mul(0x85eb_ca6b))
            .wrapping_add(index as u32);
        let x = (x ^ x >> 16).wrapping_mul(0x7feb_352d);
        word.copy_from_slice(&(x ^ x >> 15).to_le_bytes());
    }
}

fn spoil(words: &mut [u8], random: &mut Random) {
    let byte = random.below(words.len());
    words[byte] ^= 1 << random.below(8);
}
