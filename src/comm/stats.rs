//! What a rank spent in collectives.

use std::time::Duration;

/// Counters of one rank's collectives since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommStats {
    /// Collectives called, failed ones included.
    pub calls: u64,
    /// Bytes that this rank sent, counted as the table of algorithms does: what would cross a
    /// link to another rank.
    pub bytes_sent: u64,
    /// Time inside collectives, waiting included.
    pub elapsed: Duration,
}
