//! Ranks, groups and collectives.

mod error;

pub use error::CommError;
