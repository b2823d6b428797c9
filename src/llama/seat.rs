//! What a rank of a [`super::Group`] runs on: its end of the ranks' group, and with it its backend.
//! The only place of the decoder that knows which devices there are.

use super::worker::Setup;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::comm::{CommStats, Communicator, TensorComm};
use crate::error::Result;

#[cfg(feature = "cuda")]
use crate::backend::cuda::CudaBackend;
#[cfg(feature = "cuda")]
use crate::comm::p2p::P2pComm;

/// A rank's end of its group.
pub(super) enum Seat {
    /// Threads of this process.
    Cpu(Box<TensorComm>),
    /// A device.
    #[cfg(feature = "cuda")]
    Cuda(Box<P2pComm>),
}

/// What a rank's thread asks of its end of the group beside the collectives.
pub(super) trait Member: Communicator<Self::Backend> + Sized {
    type Backend: Backend;

    /// What the rank computes on.
    fn backend(&self, setup: &Setup) -> Result<Self::Backend>;

    fn stats(&self) -> CommStats;

    /// Goes on after a failure, with a new end of the group where the old one is of no more use.
    fn rejoin(&mut self, seat: Option<Seat>) -> Result<()>;
}

impl Member for TensorComm {
    type Backend = CpuBackend;

    fn backend(&self, setup: &Setup) -> Result<CpuBackend> {
        CpuBackend::new(setup.threads)
    }

    fn stats(&self) -> CommStats {
        TensorComm::stats(self)
    }

    fn rejoin(&mut self, seat: Option<Seat>) -> Result<()> {
        if let Some(Seat::Cpu(comm)) = seat {
            *self = *comm;
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl Member for P2pComm {
    type Backend = CudaBackend;

    fn backend(&self, setup: &Setup) -> Result<CudaBackend> {
        let backend =
            CudaBackend::with_kernels(self.stream().clone(), self.kernels(), setup.dtype)?;
        Ok(backend.batch_invariant(setup.batch_invariant))
    }

    fn stats(&self) -> CommStats {
        P2pComm::stats(self)
    }

    fn rejoin(&mut self, seat: Option<Seat>) -> Result<()> {
        if let Some(Seat::Cuda(comm)) = seat {
            *self = *comm;
        }
        self.rebuild()
    }
}
