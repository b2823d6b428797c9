//! What an algorithm sees of its rank and its peers: packets.

use bytemuck::Pod;

use super::error::CommError;
use super::generation::Generation;
use super::mailbox::{Call, Endpoint, Lookup, MAX_PACKETS, Refused, progress_word};

/// One rank's view of one collective: it publishes packets and reads those of its peers.
///
/// Packets of a rank are numbered from 0 in the order of publication. A published packet
/// never changes and stays readable until the end of the call; its first byte is aligned to
/// 64 bytes. Reading a packet waits for it, up to the group's deadline; a packet can't be
/// read before it is complete.
///
/// ```
/// use ringtp::comm::{CommError, Wire};
///
/// /// The sum of one byte of each rank.
/// fn sum_of_bytes(wire: &Wire<'_>, mine: u8) -> Result<u32, CommError> {
///     wire.publish(&[mine])?;
///     (0..wire.world_size()).map(|rank| Ok(u32::from(wire.packet(rank, 0, 1)?[0]))).sum()
/// }
/// ```
pub struct Wire<'a> {
    pub(crate) generation: &'a Generation,
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) rank: usize,
    pub(crate) call: Call,
}

/// An error of `publish_with`, of either side.
enum PublishError {
    Refused(Refused),
    Fill(CommError),
}

impl From<Refused> for PublishError {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl<'a> Wire<'a> {
    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.generation.world_size()
    }

    /// Publishes a copy of `bytes` as this rank's next packet.
    pub fn publish(&self, bytes: &[u8]) -> Result<(), CommError> {
        self.publish_with(bytes.len(), |packet| {
            packet.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// Publishes `len` bytes that `fill` writes as this rank's next packet. `fill` finds
    /// arbitrary bytes there, may read packets of peers and must not publish.
    ///
    /// # Errors
    /// Those of `fill`; [`CommError::Argument`] if more is published than the algorithm's
    /// staging announced.
    pub fn publish_with(
        &self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        self.endpoint
            .publish_with(len, |packet| fill(packet).map_err(PublishError::Fill))
            .map_err(|error| match error {
                PublishError::Fill(error) => error,
                PublishError::Refused(refused) => self.refused(refused),
            })?;
        self.wake();
        Ok(())
    }

    /// Packet `index` of `rank`, which has `len` bytes; waits until it is there.
    ///
    /// # Errors
    /// As [`CpuComm`](super::CpuComm)'s collectives; [`CommError::Argument`] if that rank
    /// finished the call without such a packet or with one of another length.
    pub fn packet(&self, rank: usize, index: usize, len: usize) -> Result<&'a [u8], CommError> {
        if rank >= self.world_size() {
            return Err(self.argument(format!("there is no rank {rank}")));
        }
        if index >= MAX_PACKETS {
            return Err(self.argument(format!(
                "there is no packet {index}, as a rank publishes at most {MAX_PACKETS}; mend \
                 the algorithm"
            )));
        }
        if rank != self.rank {
            self.enter_and_wait(rank, progress_word(self.endpoint.epoch(), index + 1))?;
        }
        match self.endpoint.packet(rank, index) {
            Lookup::Packet(bytes) if bytes.len() == len => Ok(bytes),
            Lookup::Packet(bytes) => Err(self.argument(format!(
                "packet {index} of rank {rank} has {} bytes, not the {len} that rank {} \
                 expects; pass the same lengths on all ranks",
                bytes.len(),
                self.rank
            ))),
            Lookup::NotYet | Lookup::Never => Err(self.argument(format!(
                "rank {} asks for packet {index} of rank {rank}, which did not publish one; \
                 mend the algorithm",
                self.rank
            ))),
        }
    }

    /// Waits until every rank is in this call.
    pub fn barrier(&self) -> Result<(), CommError> {
        let target = progress_word(self.endpoint.epoch(), 0);
        (0..self.world_size())
            .filter(|&peer| peer != self.rank)
            .try_for_each(|peer| self.enter_and_wait(peer, target))
    }

    /// `bytes` as elements of type `T`.
    pub fn cast<'b, T: Pod>(&self, bytes: &'b [u8]) -> Result<&'b [T], CommError> {
        bytemuck::try_cast_slice(bytes).map_err(|error| self.cast_error::<T>(error))
    }

    /// `bytes` as elements of type `T`, to write.
    pub fn cast_mut<'b, T: Pod>(&self, bytes: &'b mut [u8]) -> Result<&'b mut [T], CommError> {
        bytemuck::try_cast_slice_mut(bytes).map_err(|error| self.cast_error::<T>(error))
    }

    fn cast_error<T>(&self, error: bytemuck::PodCastError) -> CommError {
        self.argument(format!(
            "these bytes are no elements of {}: {error}",
            std::any::type_name::<T>()
        ))
    }

    /// An error of this call's arguments or of its algorithm.
    pub fn argument(&self, problem: String) -> CommError {
        CommError::Argument {
            operation: self.call.operation,
            problem,
        }
    }

    /// Tells the peers that this rank is in this call, if no packet did.
    #[inline]
    pub(crate) fn announce(&self) {
        if self.endpoint.announce() {
            self.wake();
        }
    }

    #[inline]
    fn wake(&self) {
        self.generation
            .wake_early(self.rank, self.endpoint.own_progress());
    }

    fn enter_and_wait(&self, peer: usize, target: u64) -> Result<(), CommError> {
        // A rank that waits has to be seen in this call, or two would wait for each other.
        self.announce();
        self.generation
            .wait(self.endpoint, self.rank, peer, target, self.call.operation)?;
        match self.endpoint.call(peer) {
            Some(call) if *call == self.call => Ok(()),
            Some(call) => Err(self.mismatch(peer, call)),
            None => Err(self.argument(format!("rank {peer} is not in this call"))),
        }
    }

    #[cold]
    fn mismatch(&self, peer: usize, call: &Call) -> CommError {
        CommError::Mismatch {
            rank: self.rank,
            peer,
            epoch: self.endpoint.epoch(),
            expected: call.to_string(),
            found: self.call.to_string(),
        }
    }

    #[cold]
    pub(crate) fn refused(&self, refused: Refused) -> CommError {
        refused_error(self.call.operation, refused)
    }
}

/// A refusal of the mailbox in `operation`.
#[cold]
pub(crate) fn refused_error(operation: &'static str, refused: Refused) -> CommError {
    CommError::Argument {
        operation,
        problem: match refused {
            Refused::Busy => "a peer has not finished the call before the last".into(),
            Refused::Full => "more packets or bytes published than the algorithm's staging \
                              announced (at most 65535 packets); mend the algorithm"
                .into(),
            Refused::Memory => "there is no memory to stage this message; send it in parts".into(),
            Refused::Nested => "a packet is published inside another; mend the algorithm".into(),
        },
    }
}
