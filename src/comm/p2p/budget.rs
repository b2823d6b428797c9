//! How many blocks may wait on a device at once, over all communicators of the process.
//!
//! The blocks of a collective wait for each other across devices, so all of them must be
//! resident. Occupancy tells what fits on an empty device; this keeps count of what is promised
//! already. It has to be one count for the process, since the device is one.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks promised on each device, by ordinal.
static PROMISED: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());

fn promised() -> MutexGuard<'static, BTreeMap<usize, u32>> {
    PROMISED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Room for so many blocks on a device, until it is dropped.
#[derive(Debug)]
pub(super) struct Lease {
    device: usize,
    blocks: u32,
}

impl Lease {
    /// `wanted` blocks of a device that holds `capacity`, or as many as are left for one of
    /// `sharers` that ask: at least one, or `None`.
    pub(super) fn take(device: usize, capacity: u32, wanted: u32, sharers: u32) -> Option<Self> {
        let mut promised = promised();
        let used = promised.entry(device).or_default();
        let left = capacity.saturating_sub(*used) / sharers.max(1);
        let blocks = wanted.min(left);
        if blocks == 0 {
            return None;
        }
        *used += blocks;
        Some(Self { device, blocks })
    }

    /// How many.
    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(used) = promised().get_mut(&self.device) {
            *used = used.saturating_sub(self.blocks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Lease;

    #[test]
    fn leases_never_add_up_to_more_than_the_device_holds() {
        let device = usize::MAX;
        // Four ranks share a device of 20 blocks.
        let leases: Vec<_> = (0..4)
            .filter_map(|i| Lease::take(device, 20, 32, 4 - i))
            .collect();
        assert_eq!(leases.iter().map(Lease::blocks).collect::<Vec<_>>(), [5; 4]);
        assert!(Lease::take(device, 20, 1, 1).is_none());
        drop(leases);
        let all = Lease::take(device, 20, 32, 1).expect("it is empty again");
        assert_eq!(all.blocks(), 20);
    }
}
