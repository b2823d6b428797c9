//! All-reduce algorithms on devices, as values.
//!
//! To add one: a kernel with the headers of `cuda/collective/`, and a value of
//! [`DeviceAllReduce`]. In the crate, put the value into [`ALL`]; outside, hand it to
//! [`P2pOptions::algorithms`](super::P2pOptions::algorithms), with the kernel's image:
//! `examples/custom_collective`.

use std::fmt;

use super::comm::mesh_threads;
use crate::backend::cuda::{Family, abi};
use crate::comm::all_reduce::named;
use crate::comm::cost::Wire;
use crate::comm::{self, AllReduce, CommError, Links, Rounding};
use crate::dtype::DType;

/// Every algorithm of this crate, in the order in which equals are preferred.
pub const ALL: &[&dyn DeviceAllReduce] = &[&OneShot, &TwoShot, &Ring];

/// Which ranks an algorithm lets talk to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Every rank with every other.
    Mesh,
    /// Each with its neighbours in the ring.
    Ring,
}

/// The code of an algorithm from outside the crate.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    pub(super) family: Family,
    pub(super) bytes: &'static [u8],
}

impl Image {
    /// The kernels of `family` are in `bytes`: a fatbin, or PTX that ends in zero.
    ///
    /// # Safety
    /// `bytes` is complete. Each kernel takes a `CollectiveArgs` and keeps to the protocol of
    /// `cuda/collective/collective.cuh`: it reads `input` and writes `output` within `elements`,
    /// with the threads and blocks that its [`DeviceAllReduce`] says, and touches of its peers only
    /// what they have told it to.
    pub const unsafe fn new(family: Family, bytes: &'static [u8]) -> Self {
        Self { family, bytes }
    }
}

/// A way to sum a message over all ranks by one kernel that takes `CollectiveArgs`.
pub trait DeviceAllReduce: Sync + fmt::Debug {
    /// The name on command lines and in reports.
    fn name(&self) -> &'static str;

    /// The kind of result.
    fn rounding(&self) -> Rounding;

    /// The bytes that each rank sends for a message of `bytes` (parts taken as equal).
    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize;

    /// How many messages must follow one another.
    fn hops(&self, world_size: usize) -> usize;

    /// Whom it talks to.
    fn reach(&self) -> Reach;

    /// The kernel for messages of this type.
    fn kernel(&self, dtype: DType) -> &'static str;

    /// Whether peers may read the message where it is, so that it needs no staging
    /// (`CollectiveArgs::direct`).
    fn reads_inputs(&self) -> bool {
        false
    }

    /// Threads of a block for a message of `packs` packs of 16 bytes: at least one a rank.
    fn threads(&self, world_size: usize, packs: u64) -> u32 {
        let _ = world_size;
        mesh_threads(packs)
    }

    /// Blocks that a message of `packs` packs of 16 bytes can keep busy, with as many threads a
    /// block; at most [`MAX_BLOCKS`](super::MAX_BLOCKS) run.
    fn blocks(&self, world_size: usize, packs: u64, threads: u32) -> u64 {
        let _ = world_size;
        packs.div_ceil(u64::from(threads))
    }

    /// The code, if it is not the crate's own.
    fn image(&self) -> Option<Image> {
        None
    }
}

/// The names of a kernel for every type.
macro_rules! kernels {
    ($name:literal, $dtype:expr) => {
        match $dtype {
            DType::F32 => concat!($name, "_f32"),
            DType::Bf16 => concat!($name, "_bf16"),
            DType::F16 => concat!($name, "_f16"),
        }
    };
}

/// What holds of an algorithm wherever it runs: as of the CPU's of the same name.
macro_rules! as_on_the_cpu {
    ($algorithm:expr) => {
        fn name(&self) -> &'static str {
            AllReduce::name(&$algorithm)
        }

        fn rounding(&self) -> Rounding {
            AllReduce::rounding(&$algorithm)
        }

        fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize {
            AllReduce::bytes_sent(&$algorithm, world_size, bytes)
        }

        fn hops(&self, world_size: usize) -> usize {
            AllReduce::hops(&$algorithm, world_size)
        }
    };
}

/// One hop: every rank reads every other's message (`cuda/collective/one_shot.cu`).
#[derive(Clone, Copy, Debug)]
pub struct OneShot;

impl DeviceAllReduce for OneShot {
    as_on_the_cpu!(comm::OneShot);

    fn reach(&self) -> Reach {
        Reach::Mesh
    }

    fn kernel(&self, dtype: DType) -> &'static str {
        kernels!("one_shot", dtype)
    }
}

/// Two hops: a part of the sum each, then all-gather (`cuda/collective/two_shot.cu`).
#[derive(Clone, Copy, Debug)]
pub struct TwoShot;

impl DeviceAllReduce for TwoShot {
    as_on_the_cpu!(comm::TwoShot);

    fn reach(&self) -> Reach {
        Reach::Mesh
    }

    fn kernel(&self, dtype: DType) -> &'static str {
        kernels!("two_shot", dtype)
    }

    fn reads_inputs(&self) -> bool {
        true
    }

    fn blocks(&self, world_size: usize, packs: u64, threads: u32) -> u64 {
        packs
            .div_ceil(world_size as u64)
            .div_ceil(u64::from(threads))
    }
}

/// Around the ring in chunks (`cuda/collective/ring.cu`): for partial meshes, and by name.
#[derive(Clone, Copy, Debug)]
pub struct Ring;

impl DeviceAllReduce for Ring {
    as_on_the_cpu!(comm::Ring::DEFAULT);

    fn reach(&self) -> Reach {
        Reach::Ring
    }

    fn kernel(&self, dtype: DType) -> &'static str {
        kernels!("ring_all_reduce", dtype)
    }

    fn threads(&self, _world_size: usize, _packs: u64) -> u32 {
        abi::kCollectiveThreads
    }

    fn blocks(&self, world_size: usize, packs: u64, _threads: u32) -> u64 {
        // Each block takes whole messages.
        let message = u64::from(abi::kRingMessageBytes / 16);
        packs.div_ceil(world_size as u64).div_ceil(message)
    }
}

/// Why an algorithm is not the one for a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    /// It would take this many microseconds by the cost model, more than the chosen one.
    Slower(f64),
    /// It needs links that are not there: those of these two ranks, for one.
    Links(usize, usize),
    /// There is no ring through all ranks.
    NoRing,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slower(us) => write!(f, "{us:.1} us by the cost model"),
            Self::Links(a, b) => write!(f, "ranks {a} and {b} cannot reach each other"),
            Self::NoRing => f.write_str("no ring goes through all ranks"),
        }
    }
}

/// The algorithm for a message, and why not the others.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The one with the least cost.
    pub algorithm: &'static dyn DeviceAllReduce,
    /// What it costs, in microseconds.
    pub time_us: f64,
    /// The others.
    pub refused: Vec<(&'static dyn DeviceAllReduce, Refusal)>,
}

/// Chooses among [`ALL`] by the alpha-beta model: [`Wire`].
///
/// # Errors
/// [`CommError::Argument`] if the links let none of them work.
pub fn choose(links: &Links, wire: Wire, bytes: usize) -> Result<Choice, CommError> {
    let n = links.world_size();
    let mut best: Option<(&'static dyn DeviceAllReduce, f64)> = None;
    let mut refused = Vec::new();
    for &algorithm in ALL {
        let lacks = match algorithm.reach() {
            Reach::Mesh => links.gaps().next().map(|(a, b)| Refusal::Links(a, b)),
            Reach::Ring => links.ring().is_none().then_some(Refusal::NoRing),
        };
        if let Some(lacks) = lacks {
            refused.push((algorithm, lacks));
            continue;
        }
        let time = wire.time_us(algorithm.hops(n), algorithm.bytes_sent(n, bytes));
        match best {
            Some((_, least)) if least <= time => refused.push((algorithm, Refusal::Slower(time))),
            before => {
                refused.extend(before.map(|(other, time)| (other, Refusal::Slower(time))));
                best = Some((algorithm, time));
            }
        }
    }
    let Some((algorithm, time_us)) = best else {
        let why: Vec<_> = refused
            .iter()
            .map(|(algorithm, why)| format!("{}: {why}", algorithm.name()))
            .collect();
        return Err(CommError::Argument {
            operation: "all_reduce",
            problem: format!(
                "no algorithm works over these links ({}); choose other devices \
                 (ringtp doctor shows the links)",
                why.join("; ")
            ),
        });
    };
    Ok(Choice {
        algorithm,
        time_us,
        refused,
    })
}

/// The algorithm called `name`, in [`ALL`].
///
/// # Errors
/// [`CommError::Argument`], which lists the names.
pub fn by_name(name: &str) -> Result<&'static dyn DeviceAllReduce, CommError> {
    named(ALL, |algorithm| algorithm.name(), name, "on devices")
}

#[cfg(test)]
mod tests {
    use super::{ALL, Refusal, choose};
    use crate::comm::cost::Wire;
    use crate::comm::{self, AllReduce, Link, Links};

    fn chosen(links: &Links, bytes: usize) -> &'static str {
        choose(links, Wire::of(links, 90), bytes)
            .expect("some algorithm works")
            .algorithm
            .name()
    }

    /// So that a setting means the same wherever ranks are; devices choose by size where none is
    /// named.
    #[test]
    fn names_are_those_of_the_cpu() {
        let cpu = comm::ALL.iter().map(|algorithm| algorithm.name());
        let devices = ALL.iter().map(|algorithm| algorithm.name());
        assert!(cpu.eq([comm::Auto.name()].into_iter().chain(devices)));
    }

    #[test]
    fn small_messages_take_one_hop_and_large_ones_two() {
        for n in 3..=8 {
            let links = Links::new(n, |_, _| Link::Nvlink);
            assert_eq!(chosen(&links, 64 << 10), "one-shot", "N = {n}");
            assert_eq!(chosen(&links, 64 << 20), "two-shot", "N = {n}");
        }
        // Two ranks move the same bytes either way.
        let pair = Links::new(2, |_, _| Link::Nvlink);
        assert_eq!(chosen(&pair, 64 << 20), "one-shot");
    }

    #[test]
    fn the_ring_is_for_meshes_with_gaps_alone() {
        let square = Links::new(4, |a, b| match a.abs_diff(b) {
            1 | 3 => Link::Nvlink,
            _ => Link::NoAccess,
        });
        let choice = choose(&square, Wire::of(&square, 90), 1 << 20).expect("the ring works");
        assert_eq!(choice.algorithm.name(), "ring");
        assert_eq!(choice.refused.len(), 2);
        assert!(
            choice
                .refused
                .iter()
                .all(|(_, why)| *why == Refusal::Links(0, 2))
        );
        let line = Links::new(3, |a, b| match a.abs_diff(b) {
            1 => Link::Nvlink,
            _ => Link::NoAccess,
        });
        let error = choose(&line, Wire::of(&line, 90), 1 << 20).expect_err("nothing works");
        assert!(error.to_string().contains("ranks 0 and 2"), "{error}");
    }
}
