//! Whether the links do what the driver says.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::group::lost;
use super::rank_device::{RankDevice, Settings};
use crate::backend::cuda::{Context, Launch, P2pAttribute, abi};
use crate::comm::{Link, Links};
use crate::error::Result;

/// Threads of a probe's block.
const THREADS: u32 = 128;

/// What the driver says of every pair.
pub(super) fn ask_driver(contexts: &[Context]) -> Result<Links> {
    let mut fault = None;
    let links = Links::new(contexts.len(), |from, to| {
        let (own, peer) = (&contexts[from], &contexts[to]);
        if own.ordinal() == peer.ordinal() {
            return Link::SameDevice;
        }
        let ask = || -> Result<Link> {
            if !own.can_access(peer)? {
                return Ok(Link::NoAccess);
            }
            // The bus carries no atomics between devices.
            let atomics = own.p2p_attribute(
                peer,
                P2pAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED,
            )?;
            Ok(if atomics != 0 {
                Link::Nvlink
            } else {
                Link::Pcie
            })
        };
        ask().unwrap_or_else(|error| {
            fault.get_or_insert(error);
            Link::NoAccess
        })
    });
    fault.map_or(Ok(links), Err)
}

/// Lets kernels of all ranks write to, wait for and read from each other, and marks the links
/// that fail.
pub(super) fn run(
    ranks: &mut [RankDevice],
    arenas: &[u64],
    links: &mut Links,
    limit: Duration,
) -> Result<()> {
    let world_size = ranks.len();
    if world_size == 1 {
        return Ok(());
    }
    // A word that no earlier probe has left in memory.
    let time = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let nonce = (time.as_nanos() as u64) << 1 | 1;
    let settings = Settings {
        generation: 1,
        deadline: limit,
        nonce,
    };
    let order: Vec<usize> = (0..world_size).collect();
    for (rank, device) in ranks.iter_mut().enumerate() {
        device.reset(rank, arenas, links, &order, settings)?;
    }
    let mask = |reaches: &dyn Fn(usize) -> bool| {
        (0..world_size).fold(0, |mask, peer| mask | u32::from(reaches(peer)) << peer)
    };
    for (rank, device) in ranks.iter().enumerate() {
        let args = abi::ProbeArgs {
            arena: device.arena(),
            results: device.probe_results(),
            nonce,
            deadline_ns: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
            reaches: mask(&|peer| links.get(rank, peer).is_good()),
            reached_by: mask(&|peer| links.get(peer, rank).is_good()),
        };
        let kernel = device.kernels.get("probe")?;
        let shape = Launch::linear(world_size as u32, THREADS).cooperative();
        // SAFETY: the arenas and the results are memory of the devices, which live as long as the
        // kernels run; ranks that are not reached are masked.
        unsafe { device.stream.launch(kernel, shape, &args)? };
    }
    let (mut failures, mut errors) = (Vec::new(), Vec::new());
    let most = limit
        .saturating_mul(4)
        .saturating_add(Duration::from_secs(2));
    for (rank, device) in ranks.iter().enumerate() {
        let idle = match device.stream.wait_until_idle(most) {
            Ok(idle) => idle,
            Err(error) => {
                errors.push(error);
                continue;
            }
        };
        for peer in (0..world_size).filter(|&peer| peer != rank) {
            let (written, read) = if idle {
                device.probe_result(peer)
            } else {
                (0, 0)
            };
            if links.get(peer, rank).is_good()
                && let Some(how) = problem("writes", written)
            {
                failures.push((peer, rank, how));
            }
            if links.get(rank, peer).is_good()
                && let Some(how) = problem("reads", read)
            {
                failures.push((rank, peer, how));
            }
        }
    }
    // The device that failed before those that could not reach it.
    let first = errors
        .into_iter()
        .min_by_key(|error| lost(error) == Some(true));
    if let Some(error) = first {
        return Err(error);
    }
    for (from, to, how) in failures {
        links.set(from, to, Link::Broken(how));
    }
    Ok(())
}

/// What a result of the probe says, if it is not right.
fn problem(what: &str, result: u32) -> Option<String> {
    match result {
        abi::kProbeRight => None,
        abi::kProbeMissing => Some(format!("{what} did not arrive in time")),
        abi::kProbeDamaged => Some(format!("{what} brought something else")),
        _ => Some(format!("the test of {what} did not end in time")),
    }
}
