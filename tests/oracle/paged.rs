//! Sequences in a paged cache, and what attention over them must give.

use ringtp::DType;
use ringtp::backend::cpu::{CpuBackend, CpuKvPages, CpuPlan, CpuTensor};
use ringtp::backend::{Backend, HeadCounts, KvShape, RopeTables};
use ringtp::llama::Batch;

use super::bounds::folded_attention_error;
use super::cpu::{poisoned, tensor};
use super::random::{Random, round, wide};
use super::{Rows, attention, kv_head, rotate};

/// A sequence: all its rows of queries, keys and values as they come from the projection,
/// and the quarter turns of its angles (exact in f32, so that keys are known to the bit).
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// `[positions][qkv columns]`
    pub(crate) qkv: Vec<Vec<f32>>,
    /// `[positions][head_dim / 2]`
    pub(crate) cos: Vec<Vec<f32>>,
    pub(crate) sin: Vec<Vec<f32>>,
    pub(crate) table: Vec<u32>,
}

/// Sequences that share a cache.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) heads: HeadCounts,
    pub(crate) shape: KvShape,
    pub(crate) layer: usize,
    pub(crate) scale: f32,
    pub(crate) sequences: Vec<Sequence>,
}

impl World {
    /// Sequences of these lengths in blocks of a random permutation.
    pub(crate) fn random(
        random: &mut Random,
        heads: HeadCounts,
        block_size: usize,
        dtype: DType,
        lengths: &[usize],
    ) -> Self {
        let needed: usize = lengths.iter().map(|len| len.div_ceil(block_size)).sum();
        let num_blocks = needed + random.below(4);
        let mut blocks: Vec<u32> = (0..num_blocks as u32).collect();
        random.shuffle(&mut blocks);
        let sequences = lengths
            .iter()
            .map(|&len| {
                let turns: Vec<Vec<usize>> = (0..len)
                    .map(|_| (0..heads.head_dim / 2).map(|_| random.below(4)).collect())
                    .collect();
                let of = |values: [f32; 4]| {
                    let row = |row: &Vec<usize>| row.iter().map(|&turn| values[turn]).collect();
                    turns.iter().map(row).collect()
                };
                Sequence {
                    cos: of([1.0, 0.0, -1.0, 0.0]),
                    sin: of([0.0, 1.0, 0.0, -1.0]),
                    qkv: (0..len).map(|_| random.values(heads.qkv_cols())).collect(),
                    table: blocks.split_off(blocks.len() - len.div_ceil(block_size)),
                }
            })
            .collect();
        Self {
            heads,
            shape: KvShape {
                num_layers: 2,
                num_blocks,
                block_size,
                num_kv_heads: heads.kv,
                head_dim: heads.head_dim,
                dtype,
            },
            layer: random.below(2),
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            sequences,
        }
    }

    /// Pages whose every entry is NaN.
    pub(crate) fn poisoned_pages(&self, backend: &mut CpuBackend) -> CpuKvPages {
        let mut pages = backend.kv_pages(self.shape).expect("little memory");
        let blocks: Vec<u32> = (0..self.shape.num_blocks as u32).collect();
        let n = self.shape.num_blocks * self.shape.block_size;
        let mut batch = Batch::new();
        batch.push(&vec![0; n], 0, n as u32, &blocks);
        let rope = RopeTables {
            cos: vec![1.0; n * self.heads.head_dim / 2],
            sin: vec![0.0; n * self.heads.head_dim / 2],
        };
        let plan = backend
            .plan(&batch, rope, self.shape.block_size)
            .expect("sound");
        for layer in 0..self.shape.num_layers {
            let mut qkv = poisoned(n, self.heads.qkv_cols());
            backend
                .rope_append(&mut qkv, self.heads, &plan, &mut pages, layer)
                .expect("shapes fit");
        }
        pages
    }

    /// The batch of some sequences' positions `from..to`, and its input.
    pub(crate) fn batch(
        &self,
        backend: &mut CpuBackend,
        parts: &[(usize, usize, usize)],
    ) -> (CpuPlan, CpuTensor) {
        let (mut batch, mut rope, mut qkv) = (Batch::new(), RopeTables::default(), Vec::new());
        for &(index, from, to) in parts {
            let sequence = &self.sequences[index];
            let ids = vec![0; to - from];
            batch.push(&ids, from as u32, to as u32, &sequence.table);
            rope.cos.extend(sequence.cos[from..to].concat());
            rope.sin.extend(sequence.sin[from..to].concat());
            qkv.extend(sequence.qkv[from..to].concat());
        }
        let qkv = tensor(&qkv, batch.rows(), self.heads.qkv_cols());
        let plan = backend
            .plan(&batch, rope, self.shape.block_size)
            .expect("a sound batch");
        (plan, qkv)
    }

    /// Appends the entries of these parts and attends from their rows.
    pub(crate) fn step(
        &self,
        backend: &mut CpuBackend,
        pages: &mut CpuKvPages,
        parts: &[(usize, usize, usize)],
    ) -> Vec<f32> {
        let (plan, mut qkv) = self.batch(backend, parts);
        let mut out = poisoned(qkv.rows(), self.heads.q * self.heads.head_dim);
        backend
            .rope_append(&mut qkv, self.heads, &plan, pages, self.layer)
            .expect("shapes fit");
        backend
            .attention(
                &qkv, self.heads, &plan, pages, self.layer, self.scale, &mut out,
            )
            .expect("shapes fit");
        backend.read(&out).expect("it is there")
    }

    /// A head of a row, rotated; `head` counts queries, then keys.
    fn rotated(&self, sequence: usize, position: usize, head: usize) -> Vec<f64> {
        let (d, s) = (self.heads.head_dim, &self.sequences[sequence]);
        let head = wide(&s.qkv[position][head * d..][..d]);
        rotate(&head, &wide(&s.cos[position]), &wide(&s.sin[position]))
    }

    /// Rows of attention from positions `from..to` of a sequence, and their bounds. `visible`
    /// is how many positions the row at a position sees: its own and those before.
    pub(crate) fn exact(
        &self,
        part: (usize, usize, usize),
        visible: impl Fn(usize) -> usize,
    ) -> (Rows, Rows) {
        self.exact_in_chunks(part, visible, usize::MAX)
    }

    /// As [`Self::exact`], with the bound for contexts that are taken in chunks of so many
    /// positions and folded.
    pub(crate) fn exact_in_chunks(
        &self,
        (sequence, from, to): (usize, usize, usize),
        visible: impl Fn(usize) -> usize,
        chunk: usize,
    ) -> (Rows, Rows) {
        let (d, heads, s) = (self.heads.head_dim, self.heads, &self.sequences[sequence]);
        let stored = |v: f64| f64::from(round(v as f32, self.shape.dtype));
        let entries = |kv: usize| {
            let at = (heads.q + heads.kv + kv) * d;
            let keys: Rows = (0..s.qkv.len())
                .map(|p| self.rotated(sequence, p, heads.q + kv))
                .map(|key| key.into_iter().map(stored).collect())
                .collect();
            let values: Rows = s
                .qkv
                .iter()
                .map(|row| wide(&row[at..][..d]).into_iter().map(stored).collect())
                .collect();
            (keys, values)
        };
        let entries: Vec<(Rows, Rows)> = (0..heads.kv).map(entries).collect();
        let (scale, mut rows, mut errors) = (f64::from(self.scale), Vec::new(), Vec::new());
        for position in from..to {
            let (mut row, mut error) = (Vec::new(), Vec::new());
            for head in 0..heads.q {
                let query = self.rotated(sequence, position, head);
                let (keys, values) = &entries[kv_head(head, heads.q, heads.kv)];
                let n = visible(position).clamp(1, keys.len());
                let values = values[..n].to_vec();
                row.extend(attention(&query, &keys[..n], &values, scale));
                let folds = match chunk {
                    usize::MAX => 0,
                    chunk => n.div_ceil(chunk),
                };
                error.extend(folded_attention_error(
                    &query,
                    &keys[..n],
                    &values,
                    scale,
                    folds,
                ));
            }
            rows.push(row);
            errors.push(error);
        }
        (rows, errors)
    }
}
