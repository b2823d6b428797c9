//! Rows of logits that no token can be chosen from.

/// Why a row of logits has no next token. Concerns this row alone: others of the batch do not
/// suffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// Logits that are NaN or +inf.
    #[error(
        "logits of row {row}: expected finite numbers or -inf, found {count} that are NaN or \
         +inf; look for broken weights, or for overflow in a narrower dtype"
    )]
    NotANumber {
        /// The row, as the caller counts rows.
        row: usize,
        /// How many, over all ranks.
        count: u64,
    },
    /// Every logit is -inf, or its id banned.
    #[error(
        "logits of row {row}: expected at least one candidate, found every id at -inf or \
         banned; ban fewer ids"
    )]
    NoCandidate {
        /// The row, as the caller counts rows.
        row: usize,
    },
}
