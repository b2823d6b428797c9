//! A batch's metadata, looked up once a step.

use crate::backend::RopeTables;
use crate::error::{Error, Result};
use crate::llama::{Batch, Limits};

/// What the operations of one step need of its batch.
#[derive(Debug)]
pub struct CpuPlan {
    pub(super) batch: Batch,
    /// Where each row's KV entry goes: block and slot.
    pub(super) slots: Vec<(usize, usize)>,
    /// Positions in a block.
    pub(super) block_size: usize,
    /// Blocks that the pages must have: one more than the greatest named.
    pub(super) blocks: usize,
    /// `[rows, head_dim / 2]`
    pub(super) cos: Vec<f32>,
    /// `[rows, head_dim / 2]`
    pub(super) sin: Vec<f32>,
}

impl CpuPlan {
    /// Looks everything up, after checking that the batch fits together, whatever the model:
    /// the operations index by it.
    pub(super) fn new(batch: &Batch, rope: RopeTables, block_size: usize) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::shape("plan: block size", "at least 1", block_size));
        }
        batch.check(&Limits {
            vocab_size: usize::MAX,
            max_model_len: usize::MAX,
            num_blocks: usize::MAX,
            block_size,
        })?;
        let slots = (0..batch.sequences()).flat_map(|sequence| {
            batch.rows_of(sequence).map(move |row| {
                let position = batch.positions[row] as usize;
                let block = batch.block_tables[sequence][position / block_size];
                (block as usize, position % block_size)
            })
        });
        let named = batch.block_tables.iter().flatten();
        Ok(Self {
            slots: slots.collect(),
            block_size,
            blocks: named.max().map_or(0, |&block| block as usize + 1),
            batch: batch.clone(),
            cos: rope.cos,
            sin: rope.sin,
        })
    }
}
