//! Ranks, groups and collectives.

mod communicator;
mod error;

pub use communicator::Communicator;
pub use error::CommError;
