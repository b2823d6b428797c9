//! The sixteen barriers of a block.
//!
//! Arrivals are counted in threads. An aligned operation counts a whole warp (its lanes that have
//! exited included), as the ISA has it; a barrier without a count waits for every thread of the
//! block that has not exited.

use crate::program::BarrierResult;

/// Barriers in a block.
pub(super) const BARRIERS: usize = 16;

/// The state of a block's barriers.
#[derive(Debug, Clone)]
pub struct Barriers {
    list: [Barrier; BARRIERS],
    /// The barriers at which somebody arrived since the scheduler last looked, as bits.
    pub(super) touched: u32,
}

#[derive(Debug, Clone, Default)]
struct Barrier {
    /// Of each warp, the lanes that arrived and wait.
    waiting: Vec<u32>,
    /// Of each warp, the lanes that arrived and went on.
    passed: Vec<u32>,
    /// The count the first arrival asked for; `Some(None)` is the whole block.
    expected: Option<Option<u32>>,
    population: u32,
}

/// A complete barrier: who takes part, warp by warp.
#[derive(Debug, Clone)]
pub struct Completed {
    /// Lanes that arrived (waiting or not).
    pub arrived: Vec<u32>,
    /// Lanes that wait and now go on.
    pub waiting: Vec<u32>,
    /// The predicates' sum.
    pub result: BarrierResult,
}

impl Barriers {
    /// For a block of so many warps.
    pub fn new(warps: usize) -> Self {
        let barrier = Barrier {
            waiting: vec![0; warps],
            passed: vec![0; warps],
            ..Barrier::default()
        };
        Self {
            list: std::array::from_fn(|_| barrier.clone()),
            touched: 0,
        }
    }

    /// The lanes of `mask` arrive. An error says, in words, how this disagrees with who came
    /// before.
    pub fn arrive(
        &mut self,
        id: u32,
        warp: usize,
        mask: u32,
        threads: Option<u32>,
        waits: bool,
        predicate: u32,
    ) -> Result<(), String> {
        let barrier = &mut self.list[id as usize];
        match barrier.expected {
            None => barrier.expected = Some(threads),
            Some(expected) if expected != threads => {
                let words = |t: Option<u32>| match t {
                    None => "the whole block".to_owned(),
                    Some(n) => format!("{n} threads"),
                };
                return Err(format!(
                    "barrier {id} waits for {} since its first arrival; this one says {}",
                    words(expected),
                    words(threads)
                ));
            }
            Some(_) => {}
        }
        if (barrier.waiting[warp] | barrier.passed[warp]) & mask != 0 {
            return Err(format!(
                "lanes {:#x} of the warp arrive at barrier {id} a second time before it completed",
                (barrier.waiting[warp] | barrier.passed[warp]) & mask
            ));
        }
        let target = if waits {
            &mut barrier.waiting
        } else {
            &mut barrier.passed
        };
        target[warp] |= mask;
        barrier.population += (predicate & mask).count_ones();
        Ok(())
    }

    /// Whether anybody stands at the barrier.
    pub fn in_use(&self, id: u32) -> bool {
        self.list[id as usize].expected.is_some()
    }

    /// What the barrier still waits for: threads arrived and threads expected.
    pub fn progress(&self, id: u32, existing: &[u32], live: &[u32]) -> (u32, u32) {
        let barrier = &self.list[id as usize];
        let arrived: Vec<u32> = (0..live.len())
            .map(|w| barrier.waiting[w] | barrier.passed[w])
            .collect();
        match barrier.expected.flatten() {
            // A count is a multiple of the warp size: lanes that exited, or never were, count
            // with the rest of their warp once one of it has arrived.
            Some(threads) => {
                let count: u32 = arrived
                    .iter()
                    .zip(live)
                    .map(|(&a, &l)| if a == 0 { 0 } else { (a | !l).count_ones() })
                    .sum();
                (count, threads)
            }
            None => {
                let count = |masks: &mut dyn Iterator<Item = u32>| masks.map(u32::count_ones).sum();
                (
                    count(&mut arrived.iter().copied()),
                    count(&mut live.iter().zip(existing).map(|(l, e)| l & e)),
                )
            }
        }
    }

    /// If the barrier is complete, resets it and says who took part. `existing` and `live` are
    /// the lanes of each warp that are threads of the block, and that have not exited.
    pub fn complete(&mut self, id: u32, existing: &[u32], live: &[u32]) -> Option<Completed> {
        self.list[id as usize].expected?;
        let (arrived, expected) = self.progress(id, existing, live);
        if arrived < expected {
            return None;
        }
        let barrier = &mut self.list[id as usize];
        let warps = live.len();
        let arrived: Vec<u32> = (0..warps)
            .map(|w| barrier.waiting[w] | barrier.passed[w])
            .collect();
        let result = BarrierResult {
            population: barrier.population,
            threads: arrived.iter().map(|a| a.count_ones()).sum(),
        };
        let waiting = std::mem::replace(&mut barrier.waiting, vec![0; warps]);
        barrier.passed = vec![0; warps];
        barrier.expected = None;
        barrier.population = 0;
        Some(Completed {
            arrived,
            waiting,
            result,
        })
    }
}
