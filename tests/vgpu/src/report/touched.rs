//! How often kernels read and wrote each byte.

use rustc_hash::FxHashMap;

use super::Touched;
use crate::memory::Memory;

/// What happened to a word of 4 bytes: in the low four bits which of them, above how many bytes
/// in all.
#[derive(Debug, Clone, Copy, Default)]
struct Word(u32);

const MOST: u32 = u32::MAX - (32 << 4);

impl Word {
    #[inline(always)]
    fn add(&mut self, mask: u32) {
        if self.0 < MOST {
            self.0 = (self.0 | mask) + (mask.count_ones() << 4);
        }
    }

    fn bytes(self) -> u64 {
        u64::from(self.0 >> 4)
    }

    fn distinct(self) -> u64 {
        u64::from((self.0 & 15).count_ones())
    }
}

/// An allocation that kernels touched.
#[derive(Debug)]
struct Bytes {
    address: u64,
    bytes: u64,
    device: Option<u32>,
    read: Vec<Word>,
    written: Vec<Word>,
}

/// All allocations that kernels touched. Addresses of devices are never handed out again; memory
/// of the host that is registered anew where other memory was before counts on.
#[derive(Debug, Default)]
pub(super) struct AllTouched {
    list: Vec<Bytes>,
    at: FxHashMap<u64, usize>,
}

/// An allocation found: most lanes of a warp are in the one of the lane before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    first: u64,
    bytes: u64,
    index: usize,
    /// Whose memory it is; none for the host's.
    pub(super) device: Option<u32>,
}

/// What is done to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Read,
    Write,
    Change,
}

impl AllTouched {
    /// The allocation of an address.
    #[inline(always)]
    pub(super) fn find(
        &mut self,
        memory: &Memory,
        last: Option<Found>,
        address: u64,
    ) -> Option<Found> {
        if let Some(found) = last
            && address.wrapping_sub(found.first) < found.bytes
        {
            return last;
        }
        self.look_up(memory, address)
    }

    fn look_up(&mut self, memory: &Memory, address: u64) -> Option<Found> {
        let (first, allocation) = memory.containing(address)?;
        let bytes = allocation.region.len() as u64;
        let device = (!allocation.region.is_host()).then_some(allocation.device);
        let index = *self.at.entry(first).or_insert_with(|| {
            self.list.push(Bytes {
                address: first,
                bytes,
                device,
                read: Vec::new(),
                written: Vec::new(),
            });
            self.list.len() - 1
        });
        let known = &mut self.list[index];
        known.bytes = known.bytes.max(bytes);
        Some(Found {
            first,
            bytes,
            index,
            device,
        })
    }

    /// A thread's access to `n` bytes, aligned to their number.
    #[inline(always)]
    pub(super) fn touch(&mut self, found: Found, address: u64, n: u32, doing: Doing) {
        let bytes = &mut self.list[found.index];
        let at = (address - found.first) as usize;
        let words = bytes.bytes.div_ceil(4) as usize;
        let count = |list: &mut Vec<Word>| {
            if list.len() < words {
                list.resize(words, Word::default());
            }
            if n < 4 {
                list[at / 4].add(((1 << n) - 1) << (at % 4));
            } else {
                let covered = &mut list[at / 4..at / 4 + n as usize / 4];
                covered.iter_mut().for_each(|word| word.add(15));
            }
        };
        if doing != Doing::Write {
            count(&mut bytes.read);
        }
        if doing != Doing::Read {
            count(&mut bytes.written);
        }
    }

    /// What was done to a part of one allocation that begins and ends at a multiple of 4 from its
    /// first byte (or ends where it ends); None for anything else.
    pub(super) fn part(&self, memory: &Memory, address: u64, bytes: u64) -> Option<Touched> {
        let (first, allocation) = memory.containing(address)?;
        let len = allocation.region.len() as u64;
        let from = address - first;
        let to = from.checked_add(bytes).filter(|&to| to <= len)?;
        if !from.is_multiple_of(4) || !(to.is_multiple_of(4) || to == len) {
            return None;
        }
        let range = from as usize / 4..to.div_ceil(4) as usize;
        let none = Touched {
            address,
            bytes,
            device: (!allocation.region.is_host()).then_some(allocation.device),
            ..Touched::default()
        };
        let known = self.at.get(&first).map(|&index| &self.list[index]);
        Some(known.map_or(none, |known| known.sum(range, none)))
    }

    pub(super) fn list(&self) -> Vec<Touched> {
        let mut list: Vec<Touched> = self
            .list
            .iter()
            .map(|known| {
                let whole = Touched {
                    address: known.address,
                    bytes: known.bytes,
                    device: known.device,
                    ..Touched::default()
                };
                known.sum(0..known.bytes.div_ceil(4) as usize, whole)
            })
            .filter(|t| t.read + t.written > 0)
            .collect();
        list.sort_unstable_by_key(|t| t.address);
        list
    }
}

impl Bytes {
    fn sum(&self, words: std::ops::Range<usize>, of: Touched) -> Touched {
        let sum = |list: &[Word], f: fn(Word) -> u64| -> u64 {
            let part = &list[words.start.min(list.len())..words.end.min(list.len())];
            part.iter().map(|&word| f(word)).sum()
        };
        Touched {
            read: sum(&self.read, Word::bytes),
            read_distinct: sum(&self.read, Word::distinct),
            written: sum(&self.written, Word::bytes),
            written_distinct: sum(&self.written, Word::distinct),
            ..of
        }
    }
}
