//! The list of kernel families: one line each.

use super::module::Family;
use super::norm;

/// Every family that is loaded on a device.
pub(super) const ALL: &[Family] = &[norm::FAMILY];
