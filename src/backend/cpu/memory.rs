//! Large zeroed memory.

use memmap2::{MmapMut, MmapOptions};

use crate::error::{Error, Fault, Result};

/// Zeroed anonymous memory, page-aligned. Pages that nobody touches cost nothing.
#[derive(Debug)]
pub(super) struct Memory {
    /// `None` for zero bytes, which cannot be mapped.
    map: Option<MmapMut>,
}

impl Memory {
    /// `bytes` zeroed bytes for `what`, on huge pages where the system gives them: on weights,
    /// which are read as a stream, they are worth about a quarter of the bandwidth.
    pub(super) fn huge(bytes: usize, what: &str) -> Result<Self> {
        let memory = Self::zeroed(bytes, what)?;
        // Advice only: without huge pages everything works, a little slower.
        #[cfg(target_os = "linux")]
        if let Some(map) = &memory.map {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(memory)
    }

    /// `bytes` zeroed bytes for `what`; not reserved, so that a large cache costs what is used
    /// of it.
    pub(super) fn zeroed(bytes: usize, what: &str) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self { map: None });
        }
        let map = MmapOptions::new()
            .len(bytes)
            .no_reserve_swap()
            .map_anon()
            .map_err(|error| {
                Error::OutOfMemory(Fault::new(
                    what,
                    format_args!("{bytes} bytes"),
                    error,
                    "use a smaller dtype, context or number of blocks",
                ))
            })?;
        Ok(Self { map: Some(map) })
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// The bytes, to write.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or(&mut [])
    }
}
