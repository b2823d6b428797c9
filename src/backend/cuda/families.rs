//! The list of kernel families: one line each.

use super::module::Family;
use super::{attention, collective, gemm, norm, rope, rows, sampling};

/// Every family that is loaded on a device.
pub(super) const ALL: &[Family] = &[
    norm::FAMILY,
    gemm::FAMILY,
    rope::FAMILY,
    attention::FAMILY,
    rows::FAMILY,
    sampling::FAMILY,
    collective::ONE_SHOT,
    collective::TWO_SHOT,
    collective::RING,
    collective::REDUCE_SCATTER,
    collective::ALL_GATHER,
    collective::BROADCAST,
    collective::PROBE,
    collective::LEAVE,
];

/// The families that [`Kernels::load`](super::Kernels::load) loads.
pub fn families() -> &'static [Family] {
    ALL
}
