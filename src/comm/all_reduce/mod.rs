//! All-reduce algorithms, as values.
//!
//! To add one, write a file like `one_shot.rs` and add its value to [`ALL`]: the command
//! line, the tests and the benches pick it up. An algorithm from outside the crate is passed
//! to [`CpuComm::all_reduce_with`](super::CpuComm::all_reduce_with).

mod auto;
mod one_shot;
mod ring;
pub(crate) mod two_shot;

use std::fmt;

pub use auto::Auto;
pub use one_shot::OneShot;
pub use ring::Ring;
pub use two_shot::TwoShot;

use super::error::CommError;
use super::wire::Wire;
use crate::dtype::DType;

/// Every algorithm of this crate.
pub const ALL: &[&dyn AllReduce] = &[&Auto, &OneShot, &TwoShot, &Ring::DEFAULT];

/// How a sum is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Added in f32 in rank order 0..N-1 and rounded once. All algorithms of this kind give
    /// the same bits.
    RankOrder,
    /// Rounded to the message's type at each of N-1 hops. The same bits on all ranks and
    /// from run to run, but not those of another algorithm.
    PerHop,
}

/// The most that one rank publishes in one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staging {
    /// Packets, at most 65535.
    pub packets: usize,
    /// Bytes of all packets together.
    pub bytes: usize,
}

/// A way to sum `data` over all ranks.
///
/// What a rank publishes depends on its arguments alone. -0 in a result becomes +0, which
/// [`reduce`](super::reduce) sees to.
pub trait AllReduce: Sync + fmt::Debug {
    /// The name on command lines and in reports.
    fn name(&self) -> &'static str;

    /// The kind of result.
    fn rounding(&self) -> Rounding;

    /// The bytes that each rank sends for a message of `bytes` (parts taken as equal).
    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize;

    /// How many messages must follow one another.
    fn hops(&self, world_size: usize) -> usize;

    /// The most that a rank publishes for a message of `bytes`.
    fn staging(&self, world_size: usize, dtype: DType, bytes: usize) -> Staging;

    /// Replaces `data` by the sum over all ranks. Called with at least two ranks and one
    /// element.
    fn run(&self, wire: &Wire<'_>, dtype: DType, data: &mut [u8]) -> Result<(), CommError>;
}

/// The algorithm called `name`, in [`ALL`].
///
/// # Errors
/// [`CommError::Argument`], which lists the names.
pub fn by_name(name: &str) -> Result<&'static dyn AllReduce, CommError> {
    named(ALL, |algorithm| algorithm.name(), name, "on the CPU")
}

/// The one called `name` of `all` that there are `place`.
pub(crate) fn named<A: ?Sized>(
    all: &[&'static A],
    name_of: impl Fn(&A) -> &'static str,
    name: &str,
    place: &str,
) -> Result<&'static A, CommError> {
    let found = all.iter().find(|algorithm| name_of(algorithm) == name);
    found.copied().ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|algorithm| name_of(algorithm)).collect();
        CommError::Argument {
            operation: "all_reduce",
            problem: format!(
                "there is no algorithm {name:?} {place}; name one of {}",
                names.join(", ")
            ),
        }
    })
}
