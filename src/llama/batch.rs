//! One step's work, as an engine hands it to the model.

use std::ops::Range;

use crate::error::{Error, Result};

/// Rows of several sequences, prefill and decode mixed.
///
/// Sequence `s` owns the rows `cu_seqlens[s]..cu_seqlens[s + 1]`: consecutive tokens at
/// consecutive positions. Its KV entries of position `p` live in slot `p % block_size` of
/// block `block_tables[s][p / block_size]`; entries of earlier positions must be there from
/// earlier steps (or from earlier blocks of a shared prefix).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The token of each row.
    pub token_ids: Vec<u32>,
    /// The position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Row offsets, `[sequences + 1]`: first 0, last the number of rows.
    pub cu_seqlens: Vec<u32>,
    /// For each sequence the blocks of the KV cache it uses, in order of position.
    pub block_tables: Vec<Vec<u32>>,
    /// For each sequence the length of its prompt; only `dynamic` rope looks at it.
    pub prompt_lens: Vec<u32>,
    /// The rows whose logits are wanted, in the order wanted.
    pub logits_rows: Vec<u32>,
}

impl Batch {
    /// A batch with no sequence.
    pub fn new() -> Self {
        Self {
            cu_seqlens: vec![0],
            ..Self::default()
        }
    }

    /// Adds a sequence's next `token_ids`, which stand at `position` and on; returns its rows.
    pub fn push(
        &mut self,
        token_ids: &[u32],
        position: u32,
        prompt_len: u32,
        block_table: &[u32],
    ) -> Range<u32> {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        let start = self.token_ids.len() as u32;
        self.token_ids.extend_from_slice(token_ids);
        self.positions.extend((position..).take(token_ids.len()));
        self.cu_seqlens.push(self.token_ids.len() as u32);
        self.block_tables.push(block_table.to_vec());
        self.prompt_lens.push(prompt_len);
        start..self.token_ids.len() as u32
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.token_ids.len()
    }

    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.block_tables.len()
    }

    /// The rows of sequence `sequence`.
    pub fn rows_of(&self, sequence: usize) -> Range<usize> {
        self.cu_seqlens[sequence] as usize..self.cu_seqlens[sequence + 1] as usize
    }

    /// Checks everything that `forward` relies on.
    pub fn check(&self, limits: &Limits) -> Result<()> {
        let rows = self.rows();
        let count = |what: &str, expected: usize, found: usize| {
            if expected == found {
                return Ok(());
            }
            Err(Error::shape(format_args!("batch: {what}"), expected, found))
        };
        count("positions", rows, self.positions.len())?;
        count("row offsets", self.sequences() + 1, self.cu_seqlens.len())?;
        count("prompt lengths", self.sequences(), self.prompt_lens.len())?;
        count("first row offset", 0, self.cu_seqlens[0] as usize)?;
        count(
            "last row offset",
            rows,
            self.cu_seqlens[self.sequences()] as usize,
        )?;
        if let Some(id) = self
            .token_ids
            .iter()
            .find(|&&id| id as usize >= limits.vocab_size)
        {
            return Err(Error::input(
                "batch: token id",
                format_args!("below the vocabulary of {}", limits.vocab_size),
                id,
                "use ids of this model's tokenizer",
            ));
        }
        if let Some(row) = self.logits_rows.iter().find(|&&row| row as usize >= rows) {
            return Err(Error::input(
                "batch: logits row",
                format_args!("below the {rows} rows of the batch"),
                row,
                "ask for rows of this batch",
            ));
        }
        (0..self.sequences()).try_for_each(|sequence| self.check_sequence(sequence, limits))
    }

    fn check_sequence(&self, sequence: usize, limits: &Limits) -> Result<()> {
        let (start, end) = (self.cu_seqlens[sequence], self.cu_seqlens[sequence + 1]);
        if start > end || end as usize > self.rows() {
            return Err(Error::shape(
                format_args!("batch: row offsets of sequence {sequence}"),
                "ascending, within the rows",
                format_args!("{start}..{end}"),
            ));
        }
        let positions = &self.positions[start as usize..end as usize];
        let Some(&first) = positions.first() else {
            return Ok(());
        };
        let consecutive = positions
            .iter()
            .zip(first as usize..)
            .all(|(&p, i)| p as usize == i);
        if !consecutive {
            return Err(Error::shape(
                format_args!("batch: positions of sequence {sequence}"),
                format_args!("consecutive from {first}"),
                format_args!("{positions:?}"),
            ));
        }
        let length = first as usize + positions.len();
        if length > limits.max_model_len {
            return Err(Error::input(
                format_args!("batch: length of sequence {sequence}"),
                format_args!("at most the context of {}", limits.max_model_len),
                length,
                "shorten the prompt or raise the context where the model allows it",
            ));
        }
        let table = &self.block_tables[sequence];
        if table.len() * limits.block_size < length {
            return Err(Error::shape(
                format_args!("batch: block table of sequence {sequence}"),
                format_args!(
                    "{} blocks for {length} positions",
                    length.div_ceil(limits.block_size)
                ),
                table.len(),
            ));
        }
        match table
            .iter()
            .find(|&&block| block as usize >= limits.num_blocks)
        {
            None => Ok(()),
            Some(block) => Err(Error::input(
                format_args!("batch: block of sequence {sequence}"),
                format_args!("below the {} of the cache", limits.num_blocks),
                block,
                "take blocks from the allocator of this cache",
            )),
        }
    }
}

/// What a batch must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Ids below this exist.
    pub vocab_size: usize,
    /// Positions below this exist.
    pub max_model_len: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Positions in a block.
    pub block_size: usize,
}
