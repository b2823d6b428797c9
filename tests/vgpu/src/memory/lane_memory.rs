//! Bytes that every lane has for itself: local memory, and the parameters of function calls.

use crate::registers::{FULL, LANES, Lanes, Undef, lanes};

/// A byte array for each lane of a warp, kept word by word so that 32 lanes at the same offset
/// are one row. Everything is undefined at first.
#[derive(Clone, Default)]
pub struct LaneMemory {
    words: Vec<Lanes>,
    undef: Vec<Undef>,
}

impl LaneMemory {
    /// `bytes` for each lane.
    pub fn new(bytes: u32) -> Self {
        let mut memory = Self::default();
        memory.resize(bytes);
        memory
    }

    /// Bytes for each lane, rounded up to words.
    pub fn len(&self) -> u64 {
        4 * self.words.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Grows or shrinks to `bytes` for each lane; new bytes are undefined.
    pub fn resize(&mut self, bytes: u32) {
        let words = bytes.div_ceil(4) as usize;
        self.words.resize(words, [0; LANES]);
        self.undef.resize(words, [FULL; 4]);
    }

    /// Makes the bytes from `from` on undefined in the lanes of `mask`.
    pub fn forget(&mut self, from: u32, mask: u32) {
        for undef in self.undef.iter_mut().skip(from as usize / 4) {
            for plane in undef {
                *plane |= mask;
            }
        }
    }

    /// The word at a multiple of 4, in all lanes.
    #[inline]
    pub fn row(&self, offset: u32) -> Option<(&Lanes, Undef)> {
        let word = offset as usize / 4;
        Some((self.words.get(word)?, self.undef[word]))
    }

    /// Writes the word at a multiple of 4 in the lanes of `mask`; false if it lies outside.
    #[inline]
    pub fn set_row(&mut self, offset: u32, mask: u32, value: &Lanes, undef: Undef) -> bool {
        let word = offset as usize / 4;
        let Some(row) = self.words.get_mut(word) else {
            return false;
        };
        for lane in lanes(mask) {
            row[lane] = value[lane];
        }
        for (old, new) in self.undef[word].iter_mut().zip(undef) {
            *old = (*old & !mask) | (new & mask);
        }
        true
    }

    /// A byte of a lane and whether it is undefined; None outside.
    #[inline]
    pub fn byte(&self, lane: usize, offset: u64) -> Option<(u8, bool)> {
        let word = usize::try_from(offset / 4).ok()?;
        let at = (offset % 4) as usize;
        let value = (self.words.get(word)?[lane] >> (8 * at)) as u8;
        Some((value, self.undef[word][at] >> lane & 1 != 0))
    }

    /// Writes a byte of a lane; false if it lies outside.
    #[inline]
    pub fn set_byte(&mut self, lane: usize, offset: u64, value: u8, undef: bool) -> bool {
        let at = (offset % 4) as usize;
        let Some((row, planes)) = usize::try_from(offset / 4)
            .ok()
            .and_then(|word| self.words.get_mut(word).zip(self.undef.get_mut(word)))
        else {
            return false;
        };
        row[lane] = (row[lane] & !(0xff << (8 * at))) | u32::from(value) << (8 * at);
        planes[at] = (planes[at] & !(1 << lane)) | u32::from(undef) << lane;
        true
    }

    /// Copies `bytes` of the lanes of `mask` from `from` at `source` to `self` at `target`.
    pub fn copy_from(&mut self, target: u32, from: &Self, source: u32, bytes: u32, mask: u32) {
        for i in 0..u64::from(bytes) {
            for lane in lanes(mask) {
                if let Some((value, undef)) = from.byte(lane, u64::from(source) + i) {
                    self.set_byte(lane, u64::from(target) + i, value, undef);
                }
            }
        }
    }
}
