//! What there is to see before a group is made: devices, the ways between them, and what they
//! carry. `ringtp doctor` prints it.

use super::group::contexts;
use super::probe;
use crate::backend::cuda::{Context, DevicePool, Event, Stream};
use crate::comm::Links;
use crate::error::Result;

/// Bytes of a copy whose time is taken: long enough for its start not to matter.
const COPY: usize = 64 << 20;
/// Copies after the first, of which the fastest counts: others may use the link as well.
const COPIES: usize = 3;

/// The devices of ranks to be, as the driver describes them. Nothing runs on them for it.
#[derive(Debug)]
pub struct Survey {
    contexts: Vec<Context>,
    links: Links,
}

impl Survey {
    /// Asks the driver about these devices, one for each rank; they may repeat.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) if one is not there;
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn new(devices: &[usize]) -> Result<Self> {
        let contexts = contexts(devices)?;
        let links = probe::ask_driver(&contexts)?;
        Ok(Self { contexts, links })
    }

    /// The context of each rank.
    pub fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    /// The ways between the ranks, as the driver has them: whether they work only
    /// [`P2pGroup::links`](super::P2pGroup::links) knows.
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Bytes a second that a copy from the memory of rank `from` into that of rank `to` reaches,
    /// by the clock of the devices (a virtual one's is no measure of anything).
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver), also if `to` cannot be reached;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn bandwidth(&self, from: usize, to: usize) -> Result<f64> {
        let (source, target) = (&self.contexts[from], &self.contexts[to]);
        source.enable_access(target)?;
        let stream = Stream::new(source)?;
        let input = DevicePool::new(source, 0).zeros(COPY, &stream)?;
        stream.synchronize()?;
        let filled = Stream::new(target)?;
        let mut output = DevicePool::new(target, 0).zeros(COPY, &filled)?;
        filled.synchronize()?;
        let (begin, end) = (Event::timed(source)?, Event::timed(source)?);
        let mut fastest = f64::INFINITY;
        for _ in 0..=COPIES {
            begin.record(&stream)?;
            stream.copy(input.as_ref(), &mut output.as_mut())?;
            end.record(&stream)?;
            end.synchronize()?;
            fastest = fastest.min(end.elapsed_since(&begin)?.as_secs_f64());
        }
        Ok(COPY as f64 / fastest)
    }
}
