//! The free list of the paged KV cache.
//!
//! Host-side and one for all ranks: block `b` is the same block on every rank, so ranks need
//! not talk about it.

use crate::error::{Error, Fault, Result};

/// Hands out blocks of a cache, each to one owner at a time.
#[derive(Clone, Debug)]
pub struct BlockAllocator {
    /// Free blocks; the last is the next to go.
    free: Vec<u32>,
    /// Whether block `b` is handed out.
    taken: Vec<bool>,
}

impl BlockAllocator {
    /// All of `num_blocks` blocks free.
    pub fn new(num_blocks: usize) -> Self {
        Self {
            free: (0..num_blocks as u32).rev().collect(),
            taken: vec![false; num_blocks],
        }
    }

    /// The number of blocks, free or not.
    pub fn num_blocks(&self) -> usize {
        self.taken.len()
    }

    /// The number of free blocks.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Appends `count` blocks to `table`, or none: then `OutOfMemory`, and nothing changes.
    pub fn allocate(&mut self, count: usize, table: &mut Vec<u32>) -> Result<()> {
        let Some(rest) = self.free.len().checked_sub(count) else {
            return Err(Error::OutOfMemory(Fault::new(
                "KV cache",
                format_args!("{count} free blocks"),
                format_args!("{} of {}", self.free.len(), self.taken.len()),
                "free sequences first, or make the cache larger",
            )));
        };
        for block in self.free.drain(rest..).rev() {
            self.taken[block as usize] = true;
            table.push(block);
        }
        Ok(())
    }

    /// Takes back the blocks of `table` and empties it. A block that is not handed out, or
    /// twice in the table, is an error; then nothing changes.
    pub fn free(&mut self, table: &mut Vec<u32>) -> Result<()> {
        for (i, &block) in table.iter().enumerate() {
            match self.taken.get_mut(block as usize) {
                Some(taken @ true) => *taken = false,
                _ => {
                    for &block in &table[..i] {
                        self.taken[block as usize] = true;
                    }
                    return Err(Error::shape(
                        "BlockAllocator::free",
                        "blocks that are handed out, each once",
                        format_args!("block {block}"),
                    ));
                }
            }
        }
        self.free.append(table);
        Ok(())
    }
}
