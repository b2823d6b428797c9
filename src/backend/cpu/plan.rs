//! A batch's metadata, looked up once a step.

use crate::backend::RopeTables;
use crate::llama::Batch;

/// What the operations of one step need of its batch.
#[derive(Debug)]
pub struct CpuPlan {
    pub(super) batch: Batch,
    /// Where each row's KV entry goes: block and slot.
    pub(super) slots: Vec<(usize, usize)>,
    /// `[rows, head_dim / 2]`
    pub(super) cos: Vec<f32>,
    /// `[rows, head_dim / 2]`
    pub(super) sin: Vec<f32>,
}

impl CpuPlan {
    pub(super) fn new(batch: &Batch, rope: RopeTables, block_size: usize) -> Self {
        let slots = (0..batch.sequences()).flat_map(|sequence| {
            batch.rows_of(sequence).map(move |row| {
                let position = batch.positions[row] as usize;
                let block = batch.block_tables[sequence][position / block_size];
                (block as usize, position % block_size)
            })
        });
        Self {
            slots: slots.collect(),
            batch: batch.clone(),
            cos: rope.cos,
            sin: rope.sin,
        }
    }
}
