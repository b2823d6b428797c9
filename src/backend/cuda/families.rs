//! The list of kernel families: one line each.

use super::module::Family;
use super::norm;

/// Every family that is loaded on a device.
pub(super) const ALL: &[Family] = &[norm::FAMILY];

/// The families that [`Kernels::load`](super::Kernels::load) loads.
pub fn families() -> &'static [Family] {
    ALL
}
