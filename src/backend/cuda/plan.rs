//! A batch's metadata in device memory, put there once a step.

use std::ops::Range;

use super::abi::{self, AttentionItem};
use super::rope::{DeviceTables, no_tables};
use super::tensor::out_of_memory;
use super::view::RowLayout;
use super::{DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut, Stream};
use crate::backend::{HeadCounts, KvShape, RopeTables, StepSize};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::llama::{Batch, Limits};

/// Rows of partial results that a batch may leave in memory, each of a token and a chunk of its
/// context: enough blocks for any device, and little memory. It changes no bit of any result.
pub const SPLIT_ROWS: usize = 2048;

/// What the operations of one step need of its batch.
#[derive(Debug)]
pub struct CudaPlan {
    /// Everything, as words: see [`Words`].
    buffer: DeviceBuffer,
    words: Words,
    rows: usize,
    logits_rows: usize,
    /// Elements of all cosines, as many of all sines.
    angles: usize,
    /// Positions in a block.
    block_size: usize,
    /// Blocks that the pages must have: one more than the greatest named.
    blocks: usize,
    items: Items,
}

/// Where the parts of the buffer are, in words of 32 bits, each at a multiple of four.
#[derive(Debug, Default)]
struct Words {
    token_ids: Range<usize>,
    slots: Range<usize>,
    logits_rows: Range<usize>,
    tables: Range<usize>,
    items: Range<usize>,
    cos: Range<usize>,
    sin: Range<usize>,
}

/// What attention has to do for a batch, whatever its heads.
#[derive(Clone, Debug, Default)]
pub(super) struct Items {
    pub(super) list: Vec<AttentionItem>,
    /// Rows of the largest item.
    pub(super) most_rows: usize,
    /// Rows of partial results that split items leave.
    pub(super) partial_rows: usize,
    /// Splits: groups of items that one of them finishes.
    pub(super) splits: usize,
}

impl Items {
    /// No batch of up to this size has more, with [`SPLIT_ROWS`]; the list is left empty.
    pub(super) fn at_most(size: &StepSize) -> Self {
        let (most, chunk) = (abi::kAttentionRows as usize, abi::kAttentionChunk as usize);
        let chunks = size.context.div_ceil(chunk);
        let partial_rows = match chunks {
            0 | 1 => 0,
            _ => size.rows.saturating_mul(chunks).min(SPLIT_ROWS),
        };
        Self {
            list: Vec::new(),
            most_rows: size.rows.min(most),
            partial_rows,
            // A split leaves two rows at least.
            splits: size.sequences.min(partial_rows / 2),
        }
    }

    /// The items of a checked batch: up to [`abi::kAttentionRows`] rows each. A sequence with no
    /// more new rows than that is split by chunks of its context, the longest first, as long as
    /// no more than `split_rows` rows of results come of it.
    pub(super) fn new(batch: &Batch, split_rows: usize) -> Self {
        let (most, chunk) = (abi::kAttentionRows as usize, abi::kAttentionChunk as usize);
        let chunks_of = |sequence: usize| {
            let rows = batch.rows_of(sequence);
            let last = rows.clone().next_back();
            last.map_or(0, |row| (batch.positions[row] as usize + 1).div_ceil(chunk))
        };
        let mut by_length: Vec<usize> = (0..batch.sequences())
            .filter(|&s| batch.rows_of(s).len() <= most && chunks_of(s) > 1)
            .collect();
        by_length.sort_by_key(|&s| std::cmp::Reverse(chunks_of(s)));
        let mut is_split = vec![false; batch.sequences()];
        let mut left = split_rows;
        for sequence in by_length {
            let rows = batch.rows_of(sequence).len() * chunks_of(sequence);
            if rows <= left {
                left -= rows;
                is_split[sequence] = true;
            }
        }

        let mut items = Self::default();
        let mut table = 0;
        for (sequence, &is_split) in is_split.iter().enumerate() {
            let rows = batch.rows_of(sequence);
            for first in rows.clone().step_by(most) {
                let count = most.min(rows.end - first);
                let whole = AttentionItem {
                    table,
                    first_row: first as u32,
                    rows: count as u32,
                    position: batch.positions[first],
                    ..Default::default()
                };
                items.most_rows = items.most_rows.max(count);
                if !is_split {
                    items.list.push(whole);
                    continue;
                }
                let chunks = chunks_of(sequence);
                items
                    .list
                    .extend((0..chunks as u32).map(|chunk| AttentionItem {
                        chunks: chunks as u32,
                        chunk,
                        partials: items.partial_rows as u32,
                        tile: items.splits as u32,
                        ..whole
                    }));
                items.partial_rows += count * chunks;
                items.splits += 1;
            }
            table += batch.block_tables[sequence].len() as u32;
        }
        items
    }
}

impl CudaPlan {
    /// No plan of a step of up to this size takes more bytes.
    pub(super) fn bytes_at_most(size: &StepSize, head_dim: usize) -> usize {
        let most = Items::at_most(size);
        // Whole items have as many rows as they can, but for the last of each sequence; of those
        // that are split, each leaves a row at least.
        let whole = size.rows / abi::kAttentionRows as usize + size.sequences;
        let items = (whole + most.partial_rows) * size_of::<AttentionItem>();
        // Token and slot; two angles a pair.
        let a_row = 3 + 2 * (head_dim / 2);
        let words = size.rows.saturating_mul(a_row) + size.logits_rows + size.blocks;
        // Each of the parts but the first may begin up to three words later.
        words
            .saturating_add(6 * 3)
            .saturating_mul(4)
            .saturating_add(items)
    }

    /// Looks everything up, after checking that the batch fits together, whatever the model: the
    /// kernels index by it. `split_rows` is [`SPLIT_ROWS`], or anything else: results do not
    /// depend on it.
    ///
    /// # Errors
    /// A batch that does not fit together; [`Error::Shape`] for tables of different lengths or a
    /// block size of 0; memory.
    pub fn new(
        pool: &DevicePool,
        stream: &Stream,
        batch: &Batch,
        rope: &RopeTables,
        block_size: usize,
        split_rows: usize,
    ) -> Result<Self> {
        let send = |words: &[u32], to: &mut DeviceSliceMut<'_>| stream.upload(words, to);
        Self::sent(pool, batch, rope, block_size, split_rows, send)
    }

    /// As [`Self::new`], where `send` puts words into device memory.
    pub(super) fn sent(
        pool: &DevicePool,
        batch: &Batch,
        rope: &RopeTables,
        block_size: usize,
        split_rows: usize,
        send: impl FnOnce(&[u32], &mut DeviceSliceMut<'_>) -> Result<()>,
    ) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::shape("plan: block size", "at least 1", block_size));
        }
        if rope.cos.len() != rope.sin.len() {
            return Err(Error::shape(
                "plan: lengths of sines and cosines",
                rope.cos.len(),
                rope.sin.len(),
            ));
        }
        batch.check(&Limits {
            vocab_size: usize::MAX,
            max_model_len: usize::MAX,
            num_blocks: usize::MAX,
            block_size,
        })?;
        let named = batch.block_tables.iter().flatten().max();
        let blocks = named.map_or(0, |&block| block as usize + 1);
        let items = Items::new(batch, split_rows);

        let (image, words) = image(batch, rope, block_size, &items);
        let mut buffer = pool.buffer(size_of_val(image.as_slice())).map_err(|e| {
            let layout = RowLayout::contiguous(DType::F32, image.len(), 1);
            out_of_memory(e, "the plan of a batch", &layout, pool)
        })?;
        send(&image, &mut buffer.as_mut())?;
        Ok(Self {
            buffer,
            words,
            rows: batch.rows(),
            logits_rows: batch.logits_rows.len(),
            angles: rope.cos.len(),
            block_size,
            blocks,
            items,
        })
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows whose logits are wanted.
    pub fn logits_rows(&self) -> usize {
        self.logits_rows
    }

    fn address(&self, words: &Range<usize>) -> u64 {
        self.buffer.address() + 4 * words.start as u64
    }

    fn slice(&self, words: &Range<usize>) -> DeviceSlice<'_> {
        // SAFETY: a part of the buffer, which lives as long.
        unsafe { DeviceSlice::from_raw(self.address(words), 4 * words.len()) }
    }

    /// The token of each row, `[rows]` u32.
    pub fn token_ids(&self) -> DeviceSlice<'_> {
        self.slice(&self.words.token_ids)
    }

    /// The rows whose logits are wanted, `[logits_rows]` u32.
    pub fn wanted_rows(&self) -> DeviceSlice<'_> {
        self.slice(&self.words.logits_rows)
    }

    /// `[rows, 2]` u32: block and slot.
    pub(super) fn slots(&self) -> u64 {
        self.address(&self.words.slots)
    }

    pub(super) fn tables(&self) -> u64 {
        self.address(&self.words.tables)
    }

    pub(super) fn item_list(&self) -> u64 {
        self.address(&self.words.items)
    }

    pub(super) fn items(&self) -> &Items {
        &self.items
    }

    /// The angles, if they are for heads of this size.
    pub(super) fn rope(&self, head_dim: usize) -> Result<DeviceTables> {
        if self.rows.checked_mul(head_dim / 2) != Some(self.angles) {
            return Err(no_tables(self.rows, head_dim, self.angles));
        }
        Ok(DeviceTables {
            cos: self.address(&self.words.cos),
            sin: self.address(&self.words.sin),
        })
    }

    /// Whether queries, keys and values `qkv` of these heads and pages of this shape belong
    /// together and to this batch.
    pub(super) fn check_attention(
        &self,
        operation: &str,
        qkv: &RowLayout,
        heads: HeadCounts,
        pages: &KvShape,
    ) -> Result<()> {
        let check = |what: &str, expected: usize, found: usize| {
            if expected == found {
                return Ok(());
            }
            Err(Error::shape(
                format_args!("{operation}: {what}"),
                expected,
                found,
            ))
        };
        check("rows of qkv", self.rows, qkv.rows)?;
        // The pages first: their sizes are of things that exist, so products of them fit.
        check("KV heads of the pages", heads.kv, pages.num_kv_heads)?;
        check("head size of the pages", heads.head_dim, pages.head_dim)?;
        if heads.kv == 0 || !heads.q.is_multiple_of(heads.kv) || heads.q > qkv.cols {
            return Err(Error::shape(
                format_args!("{operation}: heads"),
                "at least one KV head, and a multiple of them of queries",
                format_args!("{} queries, {} KV", heads.q, heads.kv),
            ));
        }
        check("columns of qkv", heads.qkv_cols(), qkv.cols)?;
        check("block size of the pages", self.block_size, pages.block_size)?;
        if self.blocks > pages.num_blocks {
            return Err(Error::shape(
                format_args!("{operation}: blocks of the pages"),
                format_args!("the {} that the batch names", self.blocks),
                pages.num_blocks,
            ));
        }
        if qkv.dtype != pages.dtype {
            return Err(Error::shape(
                format_args!("{operation}: type of the pages"),
                qkv.dtype,
                pages.dtype,
            ));
        }
        Ok(())
    }
}

/// The words of a plan, and where its parts are in them.
fn image(batch: &Batch, rope: &RopeTables, block_size: usize, items: &Items) -> (Vec<u32>, Words) {
    let mut image: Vec<u32> = Vec::new();
    let mut put = |part: &[u32]| {
        image.resize(image.len().next_multiple_of(4), 0);
        let start = image.len();
        image.extend_from_slice(part);
        start..image.len()
    };
    let slots: Vec<u32> = (0..batch.sequences())
        .flat_map(|sequence| {
            let table = &batch.block_tables[sequence];
            batch.rows_of(sequence).flat_map(move |row| {
                let position = batch.positions[row] as usize;
                [table[position / block_size], (position % block_size) as u32]
            })
        })
        .collect();
    let words = Words {
        token_ids: put(&batch.token_ids),
        slots: put(&slots),
        logits_rows: put(&batch.logits_rows),
        tables: put(&batch.block_tables.concat()),
        items: put(&words_of(&items.list)),
        cos: put(bytemuck::cast_slice(&rope.cos)),
        sin: put(bytemuck::cast_slice(&rope.sin)),
    };
    (image, words)
}

/// The items as words.
fn words_of(items: &[AttentionItem]) -> Vec<u32> {
    let words = |i: &AttentionItem| {
        [
            i.table,
            i.first_row,
            i.rows,
            i.position,
            i.chunks,
            i.chunk,
            i.partials,
            i.tile,
        ]
    };
    items.iter().flat_map(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(parts: &[(usize, usize)]) -> Batch {
        let mut batch = Batch::new();
        for &(from, to) in parts {
            let blocks: Vec<u32> = (0..to.div_ceil(16) as u32).collect();
            batch.push(&vec![0; to - from], from as u32, to as u32, &blocks);
        }
        batch
    }

    /// Every row is in one item, or in one item of each of its chunks, whatever the budget.
    #[test]
    fn items_cover_every_row_and_chunk_once() {
        let batch = batch(&[
            (0, 40),
            (700, 701),
            (5, 5),
            (0, 3),
            (256, 257),
            (2000, 2010),
        ]);
        for budget in [0, 3, 12, 100, SPLIT_ROWS] {
            let items = Items::new(&batch, budget);
            assert!(items.partial_rows <= budget);
            let mut seen = vec![0; batch.rows()];
            let mut partials = vec![0; items.partial_rows];
            for item in &items.list {
                assert!(item.rows >= 1 && item.rows <= abi::kAttentionRows);
                assert!(item.rows as usize <= items.most_rows);
                for row in item.first_row..item.first_row + item.rows {
                    assert_eq!(
                        batch.positions[row as usize],
                        item.position + row - item.first_row
                    );
                    // A share of a row for each of its chunks.
                    seen[row as usize] += 5040_u32.checked_div(item.chunks).unwrap_or(5040);
                }
                if item.chunks > 0 {
                    let last = item.position + item.rows;
                    assert_eq!(item.chunks, last.div_ceil(abi::kAttentionChunk));
                    assert!((item.tile as usize) < items.splits);
                    let first = (item.partials + item.chunk * item.rows) as usize;
                    for partial in &mut partials[first..first + item.rows as usize] {
                        *partial += 1;
                    }
                }
            }
            assert_eq!(seen, vec![5040; batch.rows()], "budget {budget}");
            assert_eq!(partials, vec![1; items.partial_rows], "budget {budget}");
        }
    }

    /// What is taken before a step is enough for it, whatever its batch.
    #[test]
    fn no_plan_is_larger_than_its_size_allows() {
        let mut seed = 1_usize;
        let mut below = |n: usize| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        for _ in 0..500 {
            let parts: Vec<_> = (0..below(9))
                .map(|_| {
                    let (lengths, rows) = ([3, 20, 300, 3000][below(4)], [1, 17, 400][below(3)]);
                    let to = below(lengths);
                    (to - below(to + 1).min(rows), to)
                })
                .collect();
            let batch = batch(&parts);
            let (size, most) = (StepSize::of(&batch), Items::at_most(&StepSize::of(&batch)));
            let items = Items::new(&batch, SPLIT_ROWS);
            assert!(items.most_rows <= most.most_rows, "{parts:?}");
            assert!(items.partial_rows <= most.partial_rows, "{parts:?}");
            assert!(items.splits <= most.splits, "{parts:?}");
            let rope = RopeTables {
                cos: vec![0.0; batch.rows() * 5],
                sin: vec![0.0; batch.rows() * 5],
            };
            let (image, _) = image(&batch, &rope, 16, &items);
            let bytes = CudaPlan::bytes_at_most(&size, 10);
            assert!(
                4 * image.len() <= bytes,
                "{parts:?}: {} of {bytes}",
                4 * image.len()
            );
        }
    }
}
