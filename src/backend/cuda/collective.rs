//! The kernels of `cuda/collective/`, which [`crate::comm::p2p`] launches.

use super::module::Family;

pub(super) const ONE_SHOT: Family = Family {
    name: "collective/one_shot",
    kernels: &["one_shot_f32", "one_shot_bf16", "one_shot_f16"],
};
pub(super) const TWO_SHOT: Family = Family {
    name: "collective/two_shot",
    kernels: &["two_shot_f32", "two_shot_bf16", "two_shot_f16"],
};
pub(super) const RING: Family = Family {
    name: "collective/ring",
    kernels: &[
        "ring_all_reduce_f32",
        "ring_all_reduce_bf16",
        "ring_all_reduce_f16",
        "ring_reduce_scatter_f32",
        "ring_reduce_scatter_bf16",
        "ring_reduce_scatter_f16",
        "ring_all_gather_b16",
        "ring_all_gather_b32",
    ],
};
pub(super) const REDUCE_SCATTER: Family = Family {
    name: "collective/reduce_scatter",
    kernels: &[
        "reduce_scatter_f32",
        "reduce_scatter_bf16",
        "reduce_scatter_f16",
    ],
};
pub(super) const ALL_GATHER: Family = Family {
    name: "collective/all_gather",
    kernels: &[
        "all_gather_b16",
        "all_gather_b32",
        "place_columns_b16",
        "place_columns_b32",
    ],
};
pub(super) const BROADCAST: Family = Family {
    name: "collective/broadcast",
    kernels: &[
        "broadcast_b16",
        "broadcast_b32",
        "broadcast_parts_b16",
        "broadcast_parts_b32",
    ],
};
pub(super) const PROBE: Family = Family {
    name: "collective/probe",
    kernels: &["probe"],
};
pub(super) const LEAVE: Family = Family {
    name: "collective/leave",
    kernels: &["leave"],
};
