//! How ranks lose each other.

use std::time::Duration;

/// Why a collective did not finish. Every rank of the group gets one; the group is unusable
/// until it is rebuilt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// A peer did not arrive in time.
    #[error(
        "rank {rank} waited {waited:?} for rank {peer} in {operation} number {epoch} \
         (packets seen {seen}, expected {expected}); look at what rank {peer} does, then \
         rebuild the group"
    )]
    Timeout {
        /// The rank that waited.
        rank: usize,
        /// The rank that it waited for.
        peer: usize,
        /// The collective, by name.
        operation: &'static str,
        /// Which call of this group it was, from 1.
        epoch: u64,
        /// The peer's progress as last seen.
        seen: u64,
        /// The progress waited for.
        expected: u64,
        /// How long it waited: the deadline.
        waited: Duration,
    },
    /// A rank ended (an error of its own, a panic, a dropped handle) and ended the others.
    #[error("rank {rank} failed: {cause}; the group was aborted: mend the cause, then rebuild it")]
    RankFailed {
        /// The rank that failed first.
        rank: usize,
        /// What it said.
        cause: String,
    },
    /// The ranks called different collectives, or the same with different sizes.
    #[error(
        "rank {rank} called {found} where rank {peer} called {expected} (number {epoch}); all \
         ranks must make the same calls in the same order"
    )]
    Mismatch {
        /// The rank that noticed.
        rank: usize,
        /// The rank that it disagrees with.
        peer: usize,
        /// Which call of this group it was, from 1.
        epoch: u64,
        /// The peer's call.
        expected: String,
        /// This rank's call.
        found: String,
    },
    /// What one rank wrote did not reach another, although the driver gives access.
    #[error(
        "the link from rank {from} to rank {to} loses writes: {problem}; ringtp doctor probes the \
         links: disable the IOMMU or PCIe access control, or choose other devices"
    )]
    Link {
        /// The rank that wrote.
        from: usize,
        /// The rank that did not see it.
        to: usize,
        /// What was seen instead.
        problem: String,
    },
    /// A device failed in a way that only a new process mends; the group can't be rebuilt.
    #[error("rank {rank} failed for good: {cause}; end this process and start another")]
    Poisoned {
        /// The rank of the device.
        rank: usize,
        /// What the driver said.
        cause: String,
    },
    /// Arguments that no collective can take.
    #[error("{operation}: {problem}")]
    Argument {
        /// The collective, by name.
        operation: &'static str,
        /// What is wrong, and the remedy.
        problem: String,
    },
}
