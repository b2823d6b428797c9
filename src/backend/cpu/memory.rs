//! Large zeroed memory on huge pages.

use memmap2::MmapMut;

use crate::error::{Error, Fault, Result};

/// Zeroed anonymous memory, page-aligned, that asks for huge pages: on weights they give
/// about a quarter more bandwidth. Pages that nobody touches cost nothing.
#[derive(Debug)]
pub(super) struct Memory {
    /// `None` for zero bytes, which cannot be mapped.
    map: Option<MmapMut>,
}

impl Memory {
    /// `bytes` zeroed bytes for `what`.
    pub(super) fn zeroed(bytes: usize, what: &str) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self { map: None });
        }
        let map = MmapMut::map_anon(bytes).map_err(|error| {
            Error::OutOfMemory(Fault::new(
                what,
                format_args!("{bytes} bytes"),
                error,
                "use a smaller dtype, context or number of blocks",
            ))
        })?;
        // Advice only: without huge pages everything works, a little slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
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
