//! Hosts that play ranks: they read and write flags past kernels that wait.

use std::sync::Arc;

use ringtp::backend::cuda::{DeviceSlice, DeviceSliceMut, Stream};

use super::{Outcome, words};
use crate::p2p_support::Rank;

/// Reads and writes the ranks' arenas past kernels that wait.
pub(super) struct Hosts {
    /// Of each rank a stream beside its own.
    pub(super) streams: Vec<Stream>,
    /// Where each rank's arena is.
    pub(super) arenas: Vec<u64>,
    /// Of a rank that is at work.
    busy: Arc<Stream>,
}

impl Hosts {
    pub(super) fn new(ranks: &[Rank], busy: usize) -> Result<Self, String> {
        let streams = ranks
            .iter()
            .map(|rank| Stream::new(rank.comm.stream().context()));
        Ok(Self {
            streams: streams.collect::<ringtp::Result<_>>().map_err(words)?,
            arenas: ranks.iter().map(|r| r.comm.arena_address()).collect(),
            busy: ranks[busy].comm.stream().clone(),
        })
    }

    pub(super) fn write(&self, rank: usize, at: usize, value: u64) -> Outcome {
        self.write_by(rank, self.arenas[rank] + at as u64, value)
    }

    /// The same, to an address anywhere, after all in a rank's stream here.
    pub(super) fn write_by(&self, rank: usize, address: u64, value: u64) -> Outcome {
        // SAFETY: a word of an arena, which lives as long as the group; kernels and host write it
        // whole.
        let mut to = unsafe { DeviceSliceMut::from_raw(address, 8) };
        let stream = &self.streams[rank];
        stream.upload(&[value], &mut to).map_err(words)?;
        stream.synchronize().map_err(words)
    }

    pub(super) fn write_blocks(
        &self,
        rank: usize,
        blocks: usize,
        at: usize,
        value: u64,
    ) -> Outcome {
        (0..blocks).try_for_each(|block| self.write(rank, at + 8 * block, value))
    }

    /// Long enough for whoever waits to do so at leisure.
    pub(super) fn pause(&self) -> Outcome {
        (0..3).try_for_each(|_| self.busy.is_idle().map(drop).map_err(words))
    }

    pub(super) fn read(&self, rank: usize, at: usize) -> Result<u64, String> {
        // SAFETY: as above.
        let from = unsafe { DeviceSlice::from_raw(self.arenas[rank] + at as u64, 8) };
        let mut word = [0u64];
        let stream = &self.streams[rank];
        stream.download(from, &mut word).map_err(words)?;
        Ok(word[0])
    }

    /// A word once it is as it should be.
    pub(super) fn wait_for(
        &self,
        rank: usize,
        at: usize,
        is: &dyn Fn(u64) -> bool,
    ) -> Result<u64, String> {
        let mut word = 0;
        for _ in 0..1000 {
            word = self.read(rank, at)?;
            if is(word) {
                return Ok(word);
            }
            // The devices go on while the host asks.
            self.busy.is_idle().map_err(words)?;
        }
        Err(format!(
            "the word at {at} of rank {rank} does not come: {word} is there"
        ))
    }
}
