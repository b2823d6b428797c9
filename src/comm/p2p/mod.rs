//! Collectives on devices that reach each other's memory: over NVLink or the PCI bus, without
//! NCCL.
//!
//! | piece | what |
//! |---|---|
//! | [`P2pGroup`], [`P2pOptions`] | ranks on devices: links, probe, rebuild |
//! | [`P2pComm`] | one rank's handle: the collectives, put into its stream |
//! | [`DeviceAllReduce`], [`ALL`] | all-reduce algorithms as values: [`OneShot`], [`TwoShot`], [`Ring`] |
//! | [`Meter`] | what a collective costs: times, or on the virtual GPU what it does |
//! | [`choose`] | the choice by size and links, and why not the others |
//! | [`Survey`] | devices and links as the driver has them, before a group is made |
//!
//! What holds for [`CpuComm`](super::CpuComm) holds here: the same sums to the bit (rank order, f32,
//! rounded once, -0 as +0; the ring by hops), deadlines, errors that name the culprit, rebuild. The
//! kernels are in `cuda/collective/`, where `collective.cuh` has the argument of the protocol.
//!
//! A rank is a thread of one process with a device, or a share of one: a device may hold several
//! ranks. Between the threads a [`CpuComm`](super::CpuComm) passes what the host has to say.
//!
//! ```no_run
//! use ringtp::DType;
//! use ringtp::backend::cuda::DevicePool;
//! use ringtp::comm::p2p::{P2pGroup, P2pOptions};
//!
//! # fn main() -> ringtp::Result<()> {
//! let (_group, comms) = P2pGroup::new(&[0, 1], P2pOptions::default())?;
//! std::thread::scope(|scope| {
//!     for mut comm in comms {
//!         scope.spawn(move || -> ringtp::Result<()> {
//!             let stream = comm.stream().clone();
//!             let pool = DevicePool::new(stream.context(), 1 << 20);
//!             let mut data = pool.upload(&[1.0_f32; 1000], &stream)?;
//!             comm.all_reduce(DType::F32, &mut data.as_mut())?;
//!             comm.synchronize()
//!         });
//!     }
//! });
//! # Ok(())
//! # }
//! ```

//!
//! # An algorithm of your own
//!
//! A kernel in a `.cu` file, a value of [`DeviceAllReduce`] in a `.rs` file; `examples/custom_collective`
//! has both for sums along a binary tree. `cuda/collective/collective.cuh` gives the kernel its peers,
//! flags, epochs, deadline and abort:
//!
//! ```cuda
//! Collective c(args);
//! if (!c.begin()) return;                    // somebody was lost before
//! if (!c.wait_for(children, 0)) return;      // somebody is lost
//! ...                                        // read c.staging(child), write c.staging(c.rank)
//! c.signal(parent, 0);
//! ```
//!
//! The kernels of an example of this repository are compiled with the crate's own. Another crate has a
//! build script, to which cargo gives the compiler and its flags, so that machine code and PTX are made
//! as the crate makes them:
//!
//! ```no_run
//! # fn main() {
//! let var = |name: &str| std::env::var(name).expect("a dependency on ringtp with feature cuda");
//! let fatbin = format!("{}/tree.fatbin", var("OUT_DIR"));
//! let status = std::process::Command::new(var("DEP_RINGTP_CUDA_NVCC"))
//!     .args(var("DEP_RINGTP_CUDA_NVCC_FLAGS").split(' '))
//!     .args(["-I", &var("DEP_RINGTP_CUDA_INCLUDE"), "-fatbin", "-o", &fatbin, "src/tree.cu"])
//!     .status();
//! assert!(status.is_ok_and(|status| status.success()), "nvcc failed");
//! println!("cargo::rerun-if-changed=src/tree.cu");
//! # }
//! ```
//!
//! The value names the kernels and holds the fatbin ([`Image`]); [`P2pOptions::algorithms`] loads it,
//! [`P2pComm::all_reduce_with`] runs it. `tests/p2p_suite` is what the crate's own algorithms go
//! through, and takes others: sums to the bit, losses, aborts, other calls, over many schedules of the
//! virtual GPU; `tests/p2p_mutants.rs` then shows that the suite would notice a fault. [`Meter`] measures
//! it as `ringtp bench` does the crate's own: `cargo run --features cuda --example custom_collective`.

mod algorithm;
mod budget;
mod comm;
mod diagnosis;
mod group;
mod meter;
mod probe;
mod rank_device;
mod survey;
mod tensors;

pub use algorithm::{
    ALL, Choice, DeviceAllReduce, Image, OneShot, Reach, Refusal, Ring, TwoShot, by_name, choose,
};
pub use comm::P2pComm;
pub use group::{MAX_BLOCKS, MAX_RANKS, P2pGroup, P2pOptions};
pub use meter::{Counts, Measured, Meter};
pub use survey::Survey;
