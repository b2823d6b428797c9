//! Words on their way between the host and a device that no host waits for: through pinned memory,
//! which a stream copies from and to in its order.

use super::{DeviceSlice, DeviceSliceMut, Event, Pinned, Stream};
use crate::error::Result;

/// Words to a device.
#[derive(Debug)]
pub(super) struct Outbox {
    memory: Pinned<u32>,
    /// When what was sent last has left.
    left: Event,
}

impl Outbox {
    /// With no room yet.
    pub(super) fn new(stream: &Stream) -> Result<Self> {
        Ok(Self {
            memory: Pinned::zeros(stream.context(), 0)?,
            left: Event::new(stream.context())?,
        })
    }

    /// Takes room for so many words. It pins memory, which waits for devices.
    pub(super) fn reserve(&mut self, stream: &Stream, words: usize) -> Result<()> {
        if words > self.memory.len() {
            self.left.synchronize()?;
            self.memory = Pinned::zeros(stream.context(), words)?;
        }
        Ok(())
    }

    /// Puts a copy of `words` to `to` into `stream`. The host waits where the words sent last have
    /// not left yet, or where there is no room for these.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        words: &[u32],
        to: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        if words.len() > self.memory.len() {
            return stream.upload(words, to);
        }
        if !self.left.is_done()? {
            stream.wait_until_past(&self.left)?;
        }
        for (index, &word) in words.iter().enumerate() {
            self.memory.write(index, word);
        }
        let bytes = size_of_val(words);
        let from = self.memory.as_device().range(0..bytes)?;
        stream.copy(from.as_ref(), to)?;
        self.left.record(stream)
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // A context that is lost copies nothing any more.
        let _ = self.left.synchronize();
    }
}

/// Words from a device.
#[derive(Debug)]
pub(super) struct Inbox {
    memory: Pinned<u32>,
}

impl Inbox {
    /// With no room yet.
    pub(super) fn new(stream: &Stream) -> Result<Self> {
        Ok(Self {
            memory: Pinned::zeros(stream.context(), 0)?,
        })
    }

    /// Takes room for so many words, while nothing is on the way. It pins memory, which waits for
    /// devices.
    pub(super) fn reserve(&mut self, stream: &Stream, words: usize) -> Result<()> {
        if words > self.memory.len() {
            self.memory = Pinned::zeros(stream.context(), words)?;
        }
        Ok(())
    }

    /// Puts a copy of `from` into `stream`: there once the stream has been waited for.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] where there is no room.
    pub(super) fn order(&mut self, stream: &Stream, from: DeviceSlice<'_>) -> Result<()> {
        let mut to = self.memory.as_device().range(0..from.len())?;
        stream.copy(from, &mut to)
    }

    /// The first `words` words of what came last.
    pub(super) fn read(&self, words: usize) -> Vec<u32> {
        (0..words).map(|index| self.memory.read(index)).collect()
    }
}
