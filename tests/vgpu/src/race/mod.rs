//! Happens-before: who knows of whose accesses.

use std::collections::BTreeMap;

use crate::machine::{Block, Launch, Warp};
use crate::memory::Memory;

/// What a stream (or the host) knows: of each stream, how many of its pieces of work are done.
#[derive(Debug, Clone, Default)]
pub struct StreamClock {
    known: BTreeMap<u32, u64>,
}

impl StreamClock {
    /// A piece of work of the stream is done.
    pub fn tick(&mut self, stream: u32) {
        *self.known.entry(stream).or_default() += 1;
    }

    /// Learns what the other knows.
    pub fn join(&mut self, other: &Self) {
        for (&stream, &time) in &other.known {
            let known = self.known.entry(stream).or_default();
            *known = time.max(*known);
        }
    }
}

/// What a warp's lanes know.
#[derive(Debug, Default)]
pub struct WarpClock {}

/// What belongs to a block as a whole.
#[derive(Debug, Default)]
pub struct BlockClock {}

/// What a launch knows of other work: set when it starts.
#[derive(Debug, Default)]
pub struct LaunchClock {}

/// The clock of a launch that starts now in a stream.
pub fn launch_clock(_stream: u32, _clock: &StreamClock) -> LaunchClock {
    LaunchClock::default()
}

/// A block becomes resident.
pub fn start_block(
    _memory: &mut Memory,
    _launch: &Launch,
    _block: &mut Block,
    _warps: &mut [Warp],
) {
}

/// A block has ended.
pub fn end_block(_memory: &mut Memory, _launch: &Launch, _uid: u64) {}

/// The lanes of `members` met in an operation that orders memory between them.
pub fn warp_sync(_block: &mut Block, _warp: &mut Warp, _members: u32) {}

/// A barrier completed: of each warp, the lanes that arrived (their accesses are published) and
/// those that waited (they learn of what was published).
pub fn barrier(_block: &mut Block, _warps: &mut [Warp], _arrived: &[u32], _waited: &[u32]) {}
