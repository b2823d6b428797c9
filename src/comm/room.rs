//! Memory that grows with what is asked, taken while no rank waits for another.
//!
//! To take memory of a device is to wait for it, and perhaps for every device that reaches it. A
//! collective there may be waiting for a peer, whose own part comes only once it has taken its
//! memory: then neither goes on until the deadline. So ranks take memory together, between two
//! meetings on the host. When that is due, each of them knows by itself, since all are asked for the
//! same sizes; who fails says so in place of the second meeting.

use super::Communicator;
use crate::backend::Backend;
use crate::error::Result;

/// Sizes that every rank has room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room<const N: usize> {
    /// The group that agreed on them: after a failure some of its ranks may have taken memory, and
    /// others not.
    generation: u64,
    sizes: [usize; N],
}

impl<const N: usize> Default for Room<N> {
    fn default() -> Self {
        Self {
            generation: 0,
            sizes: [0; N],
        }
    }
}

impl<const N: usize> Room<N> {
    /// Makes room for `wanted`. If that is more than before in any size, `take` is told sizes that
    /// are no smaller than any before, and takes memory for them. All ranks call this alike.
    ///
    /// # Errors
    /// What `take` says, on its rank; on the others that it failed there.
    pub(crate) fn make<B: Backend, C: Communicator<B>>(
        &mut self,
        comm: &mut C,
        backend: &mut B,
        wanted: [usize; N],
        take: impl FnOnce(&mut B, [usize; N]) -> Result<()>,
    ) -> Result<()> {
        if self.generation != comm.generation() {
            *self = Self {
                generation: comm.generation(),
                ..Self::default()
            };
        }
        let sizes = std::array::from_fn(|i| self.sizes[i].max(wanted[i]));
        if sizes == self.sizes {
            return Ok(());
        }
        comm.meet(backend)?;
        if let Err(error) = take(backend, sizes) {
            comm.abort(&error.to_string());
            return Err(error);
        }
        comm.meet(backend)?;
        self.sizes = sizes;
        Ok(())
    }
}
