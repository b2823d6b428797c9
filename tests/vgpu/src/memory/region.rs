//! A stretch of memory with everything the checks know of it.

use crate::race::{Flags, Shadow};

/// The bytes behind a region.
enum Bytes {
    Own(Box<[u8]>),
    /// Memory of the host that devices may access: it lives as long as the allocation does.
    Host(*mut u8, usize),
}

// SAFETY: the pointer is to memory that whoever registered it keeps alive and hands to the
// devices; all accesses through it go through the one owner of the region.
unsafe impl Send for Bytes {}

/// A mask of the low bits, at most 32 of them.
fn ones(n: usize) -> u32 {
    ((1u64 << n) - 1) as u32
}

/// See the module.
pub struct Region {
    bytes: Bytes,
    /// A bit for each byte that somebody has written; empty once all have been.
    written: Box<[u64]>,
    /// Bytes nobody has written.
    unwritten: usize,
    /// The memory of the race checks; None where they are off.
    pub shadow: Option<Shadow>,
    /// What strong accesses wrote to flags.
    pub flags: Flags,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("len", &self.len()).finish()
    }
}

impl Default for Region {
    fn default() -> Self {
        Self {
            bytes: Bytes::Own(Box::default()),
            written: Box::default(),
            unwritten: 0,
            shadow: None,
            flags: Flags::default(),
        }
    }
}

impl Region {
    /// `bytes` that nobody has written; None if the host has not that many.
    pub fn new(bytes: usize, races: bool) -> Option<Self> {
        let own = bytemuck::allocation::try_zeroed_slice_box(bytes).ok()?;
        let written = bytemuck::allocation::try_zeroed_slice_box(bytes.div_ceil(64)).ok()?;
        Some(Self {
            bytes: Bytes::Own(own),
            written,
            unwritten: bytes,
            shadow: races.then(|| Shadow::new(bytes)),
            flags: Flags::default(),
        })
    }

    /// `bytes` that nobody has written and one block uses; None if the host has not that many.
    pub fn of_block(bytes: usize, races: bool) -> Option<Self> {
        let region = Self::new(bytes, false)?;
        Some(Self {
            shadow: races.then(|| Shadow::of_block(bytes)),
            ..region
        })
    }

    /// Memory of the host, which may have been written by anybody.
    ///
    /// # Safety
    /// The memory must stay valid for reads and writes as long as the region exists.
    pub unsafe fn of_host(at: *mut u8, bytes: usize, races: bool) -> Self {
        Self {
            bytes: Bytes::Host(at, bytes),
            written: Box::default(),
            unwritten: 0,
            shadow: races.then(|| Shadow::new(bytes)),
            flags: Flags::default(),
        }
    }

    /// Bytes asked for.
    pub fn len(&self) -> usize {
        match &self.bytes {
            Bytes::Own(bytes) => bytes.len(),
            Bytes::Host(_, len) => *len,
        }
    }

    /// Whether the bytes are the host's.
    pub fn is_host(&self) -> bool {
        matches!(self.bytes, Bytes::Host(..))
    }

    /// The bytes.
    #[inline(always)]
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Own(bytes) => bytes,
            // SAFETY: `of_host` was promised that this stays valid.
            Bytes::Host(at, len) => unsafe { std::slice::from_raw_parts(*at, *len) },
        }
    }

    /// The bytes, to be written; see [`mark`](Self::mark).
    #[inline(always)]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.bytes {
            Bytes::Own(bytes) => bytes,
            // SAFETY: `of_host` was promised that this stays valid.
            Bytes::Host(at, len) => unsafe { std::slice::from_raw_parts_mut(*at, *len) },
        }
    }

    /// Whether every byte has been written.
    #[inline(always)]
    pub fn is_written(&self) -> bool {
        self.unwritten == 0
    }

    /// Of up to 32 bytes from `at`, a bit for each that nobody has written.
    #[inline]
    pub fn unwritten(&self, at: usize, bytes: usize) -> u32 {
        if self.unwritten == 0 {
            return 0;
        }
        let (word, bit) = (at / 64, at % 64);
        let mut written = self.written[word] >> bit;
        if bit + bytes > 64 {
            written |= self.written[word + 1] << (64 - bit);
        }
        !(written as u32) & ones(bytes)
    }

    /// Of up to 32 bytes from `at`, those whose bit in `undef` is 0 are written now, the others
    /// as good as never.
    #[inline]
    pub fn mark(&mut self, at: usize, bytes: usize, undef: u32) {
        if self.written.is_empty() || (self.unwritten == 0 && undef == 0) {
            return;
        }
        let (word, bit) = (at / 64, at % 64);
        let undef = undef & ones(bytes);
        let halves = [
            (word, u64::from(ones(bytes)) << bit, u64::from(undef) << bit),
            if bit + bytes > 64 {
                let gone = 64 - bit;
                (
                    word + 1,
                    u64::from(ones(bytes)) >> gone,
                    u64::from(undef) >> gone,
                )
            } else {
                (word, 0, 0)
            },
        ];
        for (word, mask, undef) in halves {
            let old = self.written[word];
            let new = (old | mask) & !undef;
            self.written[word] = new;
            self.unwritten = self.unwritten + old.count_ones() as usize - new.count_ones() as usize;
        }
    }

    /// A whole range is written, or (as a copy of something nobody wrote) made as good as never.
    pub fn mark_range(&mut self, from: usize, to: usize, written: bool) {
        if self.written.is_empty() || (self.unwritten == 0 && written) {
            return;
        }
        let mut at = from;
        while at < to {
            let (word, bit) = (at / 64, at % 64);
            let n = (64 - bit).min(to - at);
            let mask = if n == 64 {
                u64::MAX
            } else {
                ((1 << n) - 1) << bit
            };
            let before = self.written[word].count_ones();
            if written {
                self.written[word] |= mask;
            } else {
                self.written[word] &= !mask;
            }
            let after = self.written[word].count_ones();
            self.unwritten = self.unwritten + before as usize - after as usize;
            at += n;
        }
    }
}
