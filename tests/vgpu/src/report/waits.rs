//! Which loads are the turns of a polling loop after the first.
//!
//! A thread's strong load repeats an earlier one if it is by the same instruction from the same
//! address, and the thread has done nothing to memory in between but other strong loads (a loop
//! may look at several flags). So of every wait exactly one load is no repetition, however long
//! the wait is.

use crate::memory::{Access, Order};
use crate::registers::{LANES, lanes};

/// Loads remembered of each thread: a loop that looks at more than these counts as loads.
const MOST: usize = 32;

/// What the lanes of a warp have loaded strongly since they last did anything else.
#[derive(Debug, Default)]
pub struct Waits {
    /// Of each lane, operations and addresses; nothing until there is a strong load.
    lanes: Vec<Vec<(u32, u64)>>,
}

impl Waits {
    /// Lanes do something else.
    #[inline(always)]
    pub(crate) fn forget(&mut self, mask: u32) {
        if !self.lanes.is_empty() {
            lanes(mask).for_each(|lane| self.lanes[lane].clear());
        }
    }

    /// Lanes load strongly; which of them repeat themselves.
    pub(super) fn repeated(&mut self, op: u32, access: &Access) -> u32 {
        debug_assert!(access.order != Order::Weak);
        self.lanes.resize(LANES, Vec::new());
        let mut repeated = 0;
        for lane in lanes(access.mask) {
            let known = &mut self.lanes[lane];
            let load = (op, access.addresses[lane]);
            if known.contains(&load) {
                repeated |= 1 << lane;
            } else if known.len() < MOST {
                known.push(load);
            }
        }
        repeated
    }
}
