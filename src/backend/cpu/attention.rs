//! Paged causal attention with grouped queries, prefill and decode rows mixed.
//!
//! The unit is a query vector: one head of one row. All query vectors of a KV head over a few
//! rows form a task; within it, tiles of up to [`Lanes::CHAINS`] share each load of keys and values. In
//! three steps: scores of all positions; softmax over them (f32, the greatest subtracted);
//! the weighted sum of the values, position after position. Each query vector does the same
//! operations in the same order whatever tile it is in, so its bits depend on its sequence
//! alone.

use super::kv::CpuKvPages;
use super::plan::CpuPlan;
use super::simd::{LANES, Lanes, dispatch, exp, reduce_add, reduce_max};
use super::stored::{Bf16, F16, F32, Stored};
use super::tensor::SharedOut;
use crate::backend::HeadCounts;
use crate::dtype::DType;

/// Rows of one task: enough to share loads, few enough to share out among threads.
const TASK_ROWS: usize = 16;

/// The operands of one attention; [`super::CpuBackend`] has checked their shapes.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a> {
    /// `[rows, (q + 2 kv) * head_dim]`, queries rotated.
    pub(super) qkv: &'a [f32],
    pub(super) heads: HeadCounts,
    pub(super) plan: &'a CpuPlan,
    pub(super) pages: &'a CpuKvPages,
    pub(super) layer: usize,
    pub(super) scale: f32,
    /// `[rows, q * head_dim]`.
    pub(super) out: SharedOut,
}

/// Some rows of one sequence, for one KV head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    sequence: usize,
    head: usize,
    first_row: usize,
    rows: usize,
}

/// The tasks of a batch; each writes its own part of the output.
pub(super) fn tasks(plan: &CpuPlan, heads: HeadCounts) -> Vec<Task> {
    let mut list = Vec::new();
    for sequence in 0..plan.batch.sequences() {
        let rows = plan.batch.rows_of(sequence);
        for first_row in rows.clone().step_by(TASK_ROWS) {
            let rows = TASK_ROWS.min(rows.end - first_row);
            list.extend((0..heads.kv).map(|head| Task {
                sequence,
                head,
                first_row,
                rows,
            }));
        }
    }
    list
}

dispatch!(pub(super) fn run = run_kernel(attention: &Attention<'_>, task: Task));

#[inline(always)]
unsafe fn run_kernel<V: Lanes>(attention: &Attention<'_>, task: Task) {
    // SAFETY: as for the callee.
    unsafe {
        match attention.pages.dtype() {
            DType::F32 => typed::<V, F32>(attention, task),
            DType::Bf16 => typed::<V, Bf16>(attention, task),
            DType::F16 => typed::<V, F16>(attention, task),
        }
    }
}

#[inline(always)]
unsafe fn typed<V: Lanes, E: Stored>(attention: &Attention<'_>, task: Task)
where
    E::Word: bytemuck::Pod,
{
    let (keys, values) = attention.pages.layer::<E::Word>(attention.layer);
    let table = &attention.plan.batch.block_tables[task.sequence];
    let cache = Cache::<E> {
        keys,
        values,
        table,
        attention,
        head: task.head,
    };
    let group = attention.heads.q / attention.heads.kv;
    let count = task.rows * group;
    let last = attention.plan.batch.positions[task.first_row + task.rows - 1] as usize;
    let mut scores = vec![0.0; V::CHAINS * (last + 1).next_multiple_of(LANES)];
    let mut first = 0;
    while first < count {
        let query = |i: usize| {
            let row = task.first_row + i / group;
            Query {
                row,
                head: task.head * group + i % group,
                len: attention.len_at(row),
            }
        };
        macro_rules! tile {
            ($queries:literal, $vectors:literal) => {
                tile::<V, E, $queries, $vectors>(
                    &cache,
                    std::array::from_fn(|i| query(first + i)),
                    &mut scores,
                )
            };
        }
        // SAFETY: `typed` runs on the processor that V is for.
        first += unsafe {
            if V::CHAINS == 8 {
                match count - first {
                    8.. => tile!(8, 1),
                    4.. => tile!(4, 2),
                    2.. => tile!(2, 4),
                    _ => tile!(1, 8),
                }
            } else {
                match count - first {
                    4.. => tile!(4, 1),
                    2.. => tile!(2, 2),
                    _ => tile!(1, 4),
                }
            }
        };
    }
}

impl Attention<'_> {
    /// Positions that `row` attends to.
    fn len_at(&self, row: usize) -> usize {
        self.plan.batch.positions[row] as usize + 1
    }
}

/// One head of one row, and the positions it attends to.
#[derive(Clone, Copy)]
struct Query {
    row: usize,
    head: usize,
    len: usize,
}

/// The entries of one KV head of one sequence.
struct Cache<'a, E: Stored> {
    keys: &'a [E::Word],
    values: &'a [E::Word],
    table: &'a [u32],
    attention: &'a Attention<'a>,
    head: usize,
}

impl<E: Stored> Cache<'_, E> {
    /// The keys of positions `position..position + 16`: `[head_dim, 16]`.
    #[inline(always)]
    fn keys(&self, position: usize) -> *const E::Word {
        let shape = self.attention.pages.shape();
        let block = self.table[position / shape.block_size] as usize;
        let at = shape.key_at(block, self.head, position % shape.block_size);
        self.keys[at..at + shape.head_dim * LANES].as_ptr()
    }

    /// The value of `position`: `[head_dim rounded up to 16]`.
    #[inline(always)]
    fn value(&self, position: usize) -> *const E::Word {
        let shape = self.attention.pages.shape();
        let block = self.table[position / shape.block_size] as usize;
        let at = shape.value_at(block, self.head, position % shape.block_size);
        self.values[at..at + shape.padded_head()].as_ptr()
    }
}

/// `T` query vectors, `S = CHAINS / T` vectors of keys or of value columns at a time. Lengths
/// do not fall from one query to the next. Returns T.
#[inline(always)]
unsafe fn tile<V: Lanes, E: Stored, const T: usize, const S: usize>(
    cache: &Cache<'_, E>,
    queries: [Query; T],
    scores: &mut [f32],
) -> usize {
    let attention = cache.attention;
    let d = attention.heads.head_dim;
    let (shortest, longest) = (queries[0].len, queries[T - 1].len);
    let stride = longest.next_multiple_of(LANES);
    let q: [&[f32]; T] = std::array::from_fn(|i| {
        let at = queries[i].row * attention.heads.qkv_cols() + queries[i].head * d;
        &attention.qkv[at..at + d]
    });

    // SAFETY: positions below `longest` have blocks (checked with the batch), a vector of
    // positions lies in one block since 16 divides the block size, and `scores` has
    // T * stride elements.
    unsafe {
        let mut position = 0;
        while position + S * LANES <= stride {
            score::<V, E, T, S>(cache, q, position, stride, scores);
            position += S * LANES;
        }
        while S > 1 && position < stride {
            score::<V, E, T, 1>(cache, q, position, stride, scores);
            position += LANES;
        }

        let mut norm = [0.0; T];
        for (i, query) in queries.iter().enumerate() {
            norm[i] = softmax(
                V::ISA,
                &mut scores[i * stride..][..stride],
                query.len,
                attention.scale,
            );
        }

        // Positions that all queries attend to, then those of the later ones alone.
        let columns = d.div_ceil(LANES);
        let mut column = 0;
        while column + S <= columns {
            output::<V, E, T, S>(cache, &queries, norm, shortest, column, stride, scores);
            column += S;
        }
        while S > 1 && column < columns {
            output::<V, E, T, 1>(cache, &queries, norm, shortest, column, stride, scores);
            column += 1;
        }
    }
    T
}

/// `scores[i][position..] = q[i] . k`, for S vectors of sixteen positions.
#[inline(always)]
unsafe fn score<V: Lanes, E: Stored, const T: usize, const S: usize>(
    cache: &Cache<'_, E>,
    q: [&[f32]; T],
    position: usize,
    stride: usize,
    scores: &mut [f32],
) {
    // SAFETY: as `tile` argues.
    unsafe {
        let mut keys = [cache.keys(position); S];
        for (s, keys) in keys.iter_mut().enumerate() {
            *keys = cache.keys(position + s * LANES);
        }
        let q = q.map(<[f32]>::as_ptr);
        let mut acc = [[V::splat(0.0); S]; T];
        for element in 0..cache.attention.heads.head_dim {
            for (s, keys) in keys.iter().enumerate() {
                let key = E::load::<V>(keys.add(element * LANES));
                for (q, acc) in q.iter().zip(&mut acc) {
                    acc[s] = V::splat(*q.add(element)).mul_add(key, acc[s]);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (s, acc) in acc.iter().enumerate() {
                let at = i * stride + position + s * LANES;
                acc.store(scores[at..at + LANES].as_mut_ptr());
            }
        }
    }
}

dispatch!(
    /// Turns `scores[..len]` into exp(scale * (score - greatest)), for a positive scale; returns
    /// their sum. What follows is unspecified: a tile's last queries may need more vectors than
    /// its first, whose sums must not notice.
    fn softmax = softmax_kernel(scores: &mut [f32], len: usize, scale: f32) -> f32
);

#[inline(always)]
unsafe fn softmax_kernel<V: Lanes>(scores: &mut [f32], len: usize, scale: f32) -> f32 {
    let scores = &mut scores[..len.next_multiple_of(LANES)];
    scores[len..].fill(f32::NEG_INFINITY);
    // SAFETY: `scores` is a whole number of vectors.
    unsafe {
        let (vectors, _) = scores.as_chunks_mut::<LANES>();
        let mut greatest = V::splat(f32::NEG_INFINITY);
        for vector in vectors.iter() {
            greatest = V::load(vector.as_ptr()).max(greatest);
        }
        let shift = V::splat(-reduce_max(greatest));
        let (scale, last) = (V::splat(scale), vectors.len() - 1);
        let mut sum = V::splat(0.0);
        for (i, vector) in vectors.iter_mut().enumerate() {
            exp(V::load(vector.as_ptr()).add(shift).mul(scale)).store(vector.as_mut_ptr());
            if i == last {
                // exp is clamped: what lies beyond the sequence is zero by decree.
                vector[len - i * LANES..].fill(0.0);
            }
            sum = sum.add(V::load(vector.as_ptr()));
        }
        reduce_add(sum)
    }
}

/// `out[i] = sum of p[i][position] * v[position] / norm[i]`, S vectors of columns.
#[inline(always)]
unsafe fn output<V: Lanes, E: Stored, const T: usize, const S: usize>(
    cache: &Cache<'_, E>,
    queries: &[Query; T],
    norm: [f32; T],
    shortest: usize,
    column: usize,
    stride: usize,
    scores: &[f32],
) {
    let attention = cache.attention;
    let d = attention.heads.head_dim;
    // SAFETY: as `tile` argues; a task alone writes its query vectors' outputs.
    unsafe {
        let mut acc = [[V::splat(0.0); S]; T];
        for position in 0..shortest {
            let value = cache.value(position).add(column * LANES);
            for s in 0..S {
                let value = E::load::<V>(value.add(s * LANES));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let p = V::splat(*scores.get_unchecked(i * stride + position));
                    acc[s] = p.mul_add(value, acc[s]);
                }
            }
        }
        for (i, query) in queries.iter().enumerate() {
            for position in shortest..query.len {
                let value = cache.value(position).add(column * LANES);
                let p = V::splat(scores[i * stride + position]);
                for (s, acc) in acc[i].iter_mut().enumerate() {
                    *acc = p.mul_add(E::load::<V>(value.add(s * LANES)), *acc);
                }
            }
            let at = query.row * attention.heads.q * d + query.head * d;
            for (s, acc) in acc[i].iter().enumerate() {
                let first = (column + s) * LANES;
                let width = LANES.min(d - first);
                let out = acc.div(V::splat(norm[i])).to_array();
                attention.out.write(at + first, &out[..width]);
            }
        }
    }
}
