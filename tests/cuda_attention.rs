//! Rope, the append to the pages and paged causal attention on a device: rope and append to the
//! bit, attention within the bound of f32 rounding of the oracle, for mixed batches, grouped
//! queries, scattered blocks, any head and page size; reading and writing nothing else.
#![cfg(feature = "cuda")]

mod cuda_support;
mod oracle;

use cuda_support::{Gpu, Operand};
use oracle::bounds::rounded_error;
use oracle::compare::{same_bits, within};
use oracle::paged::World;
use oracle::random::{Random, cases, round};
use ringtp::backend::cuda::{
    self, AttentionScratch, CudaPlan, DeviceSlice, DeviceSliceMut, KvLayer, KvLayerMut, RowLayout,
    SPLIT_ROWS, abi,
};
use ringtp::backend::{HeadCounts, RopeTables};
use ringtp::llama::Batch;
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();
test_driver::also_on_every_architecture!();

const CHUNK: usize = abi::kAttentionChunk as usize;
const LENGTHS: [usize; 10] = [1, 2, 8, 15, 17, 31, 33, 48, 64, 100];
/// More than one chunk, and more than two.
const LONG: [usize; 3] = [CHUNK + 1, CHUNK + 44, 2 * CHUNK + 9];

/// A part of a sequence: which, and its positions from and to.
type Part = (usize, usize, usize);

fn heads(random: &mut Random) -> HeadCounts {
    let kv = random.choose(&[1, 2, 3]);
    HeadCounts {
        q: kv * random.choose(&[1, 1, 2, 3, 4, 4, 8]),
        kv,
        head_dim: random.choose(&[2, 6, 8, 10, 16, 24, 40, 64, 80]),
    }
}

fn world(random: &mut Random, heads: HeadCounts, lengths: &[usize]) -> World {
    let block_size = random.choose(&[1, 5, 16, 32, 64]);
    let dtype = random.choose(&DType::ALL);
    let mut world = World::random(random, heads, block_size, dtype, lengths);
    // Activations are of the storage type here.
    for value in world
        .sequences
        .iter_mut()
        .flat_map(|s| s.qkv.iter_mut().flatten())
    {
        *value = round(*value, dtype);
    }
    world
}

/// Some sequences, and for each the positions that are computed together at the end: a prefill, a
/// decode, or the last chunk. Long ones end in few rows, which keeps the oracle quick.
fn mixed(random: &mut Random) -> (World, Vec<Part>) {
    let length = |random: &mut Random| match random.below(8) {
        0 => random.choose(&LONG),
        _ => random.choose(&LENGTHS),
    };
    let lengths: Vec<usize> = (0..1 + random.below(3)).map(|_| length(random)).collect();
    let heads = heads(random);
    let world = world(random, heads, &lengths);
    let part = |(i, &len): (usize, &usize)| {
        let rows = match random.below(3) {
            0 => 1,
            1 => len.min(18),
            _ => 1 + random.below(len.min(9)),
        };
        let rows = if len >= 100 { rows.min(2) } else { rows };
        (i, len - rows, len)
    };
    let parts = lengths.iter().enumerate().map(part).collect();
    (world, parts)
}

fn batch(world: &World, parts: &[Part]) -> (Batch, RopeTables, Vec<f32>) {
    let (mut batch, mut rope, mut qkv) = (Batch::new(), RopeTables::default(), Vec::new());
    for &(index, from, to) in parts {
        let sequence = &world.sequences[index];
        batch.push(&vec![0; to - from], from as u32, to as u32, &sequence.table);
        rope.cos.extend(sequence.cos[from..to].concat());
        rope.sin.extend(sequence.sin[from..to].concat());
        qkv.extend(sequence.qkv[from..to].concat());
    }
    (batch, rope, qkv)
}

/// Elements of an entry: heads are rounded up to whole packs.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(8)
}

/// Keys and values of the layer in question, poisoned and with guards: `[blocks * heads *
/// positions, padded]` each.
struct Pages {
    keys: Operand,
    values: Operand,
}

impl Pages {
    fn new(gpu: &Gpu, world: &World) -> Self {
        let shape = &world.shape;
        let entries = shape.num_blocks * shape.num_kv_heads * shape.block_size;
        let layout = RowLayout::contiguous(shape.dtype, entries, padded(shape.head_dim));
        let half = || Operand::new(gpu, layout, 32, None);
        Self {
            keys: half(),
            values: half(),
        }
    }

    fn slices(&self) -> [DeviceSlice<'_>; 2] {
        [&self.keys, &self.values].map(|operand| {
            let bytes = operand.layout.bytes().expect("a size");
            // SAFETY: the operand's bytes, which live as long.
            unsafe { DeviceSlice::from_raw(operand.rows().address(), bytes) }
        })
    }

    fn layer(&self, world: &World) -> KvLayer<'_> {
        let [keys, values] = self.slices();
        KvLayer::new(keys, values, world.shape).expect("pages")
    }

    fn layer_mut(&mut self, world: &World) -> KvLayerMut<'_> {
        let part = |operand: &mut Operand| {
            let bytes = operand.layout.bytes().expect("a size");
            // SAFETY: the operand's bytes, which live as long and are borrowed.
            unsafe { DeviceSliceMut::from_raw(operand.rows_mut().address(), bytes) }
        };
        let (keys, values) = (part(&mut self.keys), part(&mut self.values));
        KvLayerMut::new(keys, values, world.shape).expect("pages")
    }
}

/// How a step lies in memory.
#[derive(Clone, Copy)]
struct Placement {
    gap: usize,
    guard: usize,
    split_rows: usize,
}

const PLAIN: Placement = Placement {
    gap: 0,
    guard: 0,
    split_rows: SPLIT_ROWS,
};

/// Appends the entries of these parts; returns their rotated rows.
fn append(gpu: &Gpu, world: &World, pages: &mut Pages, parts: &[Part], at: Placement) -> Vec<f32> {
    let (batch, rope, qkv) = batch(world, parts);
    let plan = plan(gpu, world, &batch, &rope, at);
    let mut qkv = operand(gpu, world, batch.rows(), at, Some(&qkv));
    let mut layer = pages.layer_mut(world);
    cuda::rope_append(
        &gpu.kernels,
        &gpu.stream,
        qkv.rows_mut(),
        world.heads,
        &plan,
        &mut layer,
    )
    .expect("rope");
    qkv.values(gpu)
}

/// Attends from these parts' rows, whose entries are there.
fn attend(
    gpu: &Gpu,
    world: &World,
    pages: &Pages,
    parts: &[Part],
    rotated: &[f32],
    at: Placement,
) -> Vec<f32> {
    let (batch, rope, _) = batch(world, parts);
    let plan = plan(gpu, world, &batch, &rope, at);
    let qkv = operand(gpu, world, batch.rows(), at, Some(rotated));
    let width = world.heads.q * world.heads.head_dim;
    let layout = RowLayout {
        stride: width + at.gap,
        ..RowLayout::contiguous(world.shape.dtype, batch.rows(), width)
    };
    let mut out = Operand::new(gpu, layout, at.guard, None);
    let mut scratch = AttentionScratch::new(&gpu.pool).expect("nothing yet");
    // Twice, since what one launch leaves in the scratch the next one uses.
    for _ in 0..2 {
        cuda::attention(
            &gpu.kernels,
            &gpu.stream,
            qkv.rows(),
            world.heads,
            &plan,
            &pages.layer(world),
            world.scale,
            &mut scratch,
            out.rows_mut(),
        )
        .expect("attention");
        if at.split_rows == 0 {
            break;
        }
    }
    out.values(gpu)
}

fn plan(gpu: &Gpu, world: &World, batch: &Batch, rope: &RopeTables, at: Placement) -> CudaPlan {
    let (size, split) = (world.shape.block_size, at.split_rows);
    CudaPlan::new(&gpu.pool, &gpu.stream, batch, rope, size, split).expect("a sound batch")
}

fn operand(
    gpu: &Gpu,
    world: &World,
    rows: usize,
    at: Placement,
    values: Option<&[f32]>,
) -> Operand {
    let cols = world.heads.qkv_cols();
    let layout = RowLayout {
        stride: cols + at.gap,
        ..RowLayout::contiguous(world.shape.dtype, rows, cols)
    };
    Operand::new(gpu, layout, at.guard, values)
}

/// Fills in what comes before `parts`, then runs them together.
fn run(gpu: &Gpu, world: &World, parts: &[Part], at: Placement) -> Vec<f32> {
    let mut pages = Pages::new(gpu, world);
    let before: Vec<Part> = parts.iter().map(|&(s, from, _)| (s, 0, from)).collect();
    append(gpu, world, &mut pages, &before, PLAIN);
    let rotated = append(gpu, world, &mut pages, parts, at);
    attend(gpu, world, &pages, parts, &rotated, at)
}

/// The oracle's rows of all parts, and the bounds.
fn exact(
    world: &World,
    parts: &[Part],
    visible: impl Fn(usize) -> usize + Copy,
) -> (oracle::Rows, oracle::Rows) {
    let (mut rows, mut errors) = (Vec::new(), Vec::new());
    for &part in parts {
        let (row, error) = world.exact_in_chunks(part, visible, CHUNK);
        rows.extend(row);
        errors.extend(error);
    }
    let errors = rounded_error(&rows, &errors, world.shape.dtype);
    (rows, errors)
}

fn placement(random: &mut Random, dtype: DType) -> Placement {
    Placement {
        gap: random.choose(&[0, 0, 1, 8]),
        guard: random.choose(&[0, 16, dtype.size()]),
        split_rows: random.choose(&[0, 5, SPLIT_ROWS]),
    }
}

#[test]
fn queries_and_keys_are_rotated_and_entries_are_where_they_belong_to_the_bit() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(120), |random| {
        let heads = heads(random);
        let len = random.choose(&[0, 1, 2, 7, 20]);
        let mut world = world(random, heads, &[len]);
        let (d, dtype) = (heads.head_dim, world.shape.dtype);
        let sequence = &mut world.sequences[0];
        // Angles that are not quarter turns.
        for (cos, sin) in sequence.cos.iter_mut().zip(&mut sequence.sin) {
            for (c, s) in cos.iter_mut().zip(sin) {
                let angle = 9.0 * random.value();
                (*c, *s) = (angle.cos(), angle.sin());
            }
        }
        let mut pages = Pages::new(&gpu, &world);
        let at = placement(random, dtype);
        let found = append(&gpu, &world, &mut pages, &[(0, 0, len)], at);

        let sequence = &world.sequences[0];
        let poison = vec![poisoned(dtype); pages.keys.layout.rows * padded(d)];
        let (mut keys, mut values) = (poison.clone(), poison);
        let mut expected = Vec::new();
        for position in 0..len {
            let mut row = sequence.qkv[position].clone();
            let (cos, sin) = (&sequence.cos[position], &sequence.sin[position]);
            for head in 0..heads.q + heads.kv {
                let at = head * d;
                let turned: Vec<f32> = (0..d)
                    .map(|i| {
                        let (j, low) = (i % (d / 2), i < d / 2);
                        let (a, b) = (row[at + j], row[at + j + d / 2]);
                        let value = if low {
                            a * cos[j] - b * sin[j]
                        } else {
                            b * cos[j] + a * sin[j]
                        };
                        round(value, dtype)
                    })
                    .collect();
                if head < heads.q {
                    row[at..at + d].copy_from_slice(&turned);
                } else {
                    let to = entry(&world, position, head - heads.q) * padded(d);
                    keys[to..to + padded(d)].fill(0.0);
                    keys[to..to + d].copy_from_slice(&turned);
                }
            }
            for head in 0..heads.kv {
                let to = entry(&world, position, head) * padded(d);
                values[to..to + padded(d)].fill(0.0);
                let from = (heads.q + heads.kv + head) * d;
                values[to..to + d].copy_from_slice(&row[from..from + d]);
            }
            expected.extend(row);
        }
        let name = format!("{heads:?} {:?}", world.shape);
        same_bits(&found, &expected).unwrap_or_else(|e| panic!("{name}: rows: {e}"));
        same_bits(&pages.keys.values(&gpu), &keys).unwrap_or_else(|e| panic!("{name}: keys: {e}"));
        same_bits(&pages.values.values(&gpu), &values)
            .unwrap_or_else(|e| panic!("{name}: values: {e}"));
    });
}

/// What an element of a poisoned operand reads as.
fn poisoned(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::from_bits(u32::MAX),
        DType::Bf16 => half::bf16::from_bits(u16::MAX).to_f32(),
        DType::F16 => half::f16::from_bits(u16::MAX).to_f32(),
    }
}

/// The row of the pages that has the entry of a position of the first sequence.
fn entry(world: &World, position: usize, head: usize) -> usize {
    let shape = &world.shape;
    let block = world.sequences[0].table[position / shape.block_size] as usize;
    (block * shape.num_kv_heads + head) * shape.block_size + position % shape.block_size
}

#[test]
fn mixed_batches_are_within_the_bound_of_rounding() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(110), |random| {
        let (world, parts) = mixed(random);
        let at = placement(random, world.shape.dtype);
        let out = run(&gpu, &world, &parts, at);
        let (value, error) = exact(&world, &parts, |position| position + 1);
        within(&out, &value, &error)
            .unwrap_or_else(|e| panic!("{:?} {:?} {parts:?}: {e}", world.heads, world.shape));
    });
}

/// The greatest head, whose block needs more shared memory than a kernel has unasked; and a group
/// of more heads than a tile has.
#[test]
fn the_greatest_head_and_a_large_group_fit() {
    let Some(gpu) = Gpu::take() else { return };
    cases(2, |random| {
        let heads = HeadCounts {
            q: 17,
            kv: 1,
            head_dim: 256,
        };
        let world = world(random, heads, &[37]);
        let parts = [(0, 36, 37)];
        let out = run(&gpu, &world, &parts, PLAIN);
        let (value, error) = exact(&world, &parts, |position| position + 1);
        within(&out, &value, &error).expect("within the bound");
    });
}

/// Neither the batch nor the split of the work changes a bit.
#[test]
fn a_rows_bits_depend_on_its_sequence_alone() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(12), |random| {
        let (world, parts) = mixed(random);
        let whole = run(
            &gpu,
            &world,
            &parts,
            Placement {
                split_rows: 0,
                ..PLAIN
            },
        );
        let split = run(&gpu, &world, &parts, PLAIN);
        same_bits(&split, &whole).expect("split");
        let cols = world.heads.q * world.heads.head_dim;
        let mut at = 0;
        for &(sequence, from, to) in &parts {
            // Alone, and only its last row.
            let found = run(&gpu, &world, &[(sequence, to - 1, to)], PLAIN);
            let last = at + to - from - 1;
            same_bits(&found, &whole[last * cols..(last + 1) * cols]).expect("alone");
            at += to - from;
        }
    });
}

#[test]
fn the_comparison_sees_a_causal_limit_off_by_one_and_a_wrong_head() {
    let Some(gpu) = Gpu::take() else { return };
    let mut seen = 0;
    cases(20, |random| {
        let (mut world, mut parts) = mixed(random);
        parts.retain(|&(_, from, to)| to > 1 && to < 100 && to - from > 1);
        if parts.is_empty() || world.shape.dtype != DType::F32 {
            return;
        }
        seen += 1;
        let out = run(&gpu, &world, &parts, PLAIN);
        let control = |world: &World, visible: fn(usize) -> usize| {
            let (value, error) = exact(world, &parts, visible);
            within(&out, &value, &error)
        };
        control(&world, |position| position + 1).expect("right before it is made wrong");
        control(&world, |position| position).expect_err("one position too few");
        control(&world, |position| position + 2).expect_err("one position too many");
        for row in world.sequences.iter_mut().flat_map(|s| s.qkv.iter_mut()) {
            row.rotate_left(world.heads.head_dim);
        }
        control(&world, |position| position + 1).expect_err("other heads");
    });
    assert!(seen > 0, "no case");
}

#[test]
fn a_nan_in_a_later_position_does_not_touch_earlier_rows() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(20), |random| {
        let heads = heads(random);
        let len = 2 + random.below(40);
        let mut world = world(random, heads, &[len]);
        let clean = run(&gpu, &world, &[(0, 0, len)], PLAIN);
        let (at, kv) = (random.below(len), random.below(heads.kv));
        let first = heads.q + kv + heads.kv * random.below(2);
        world.sequences[0].qkv[at][first * heads.head_dim] = f32::NAN;
        let out = run(&gpu, &world, &[(0, 0, len)], PLAIN);
        let cols = heads.q * heads.head_dim;
        same_bits(&out[..at * cols], &clean[..at * cols]).expect("earlier rows");
        // All later rows of this KV head's group attend to it: none hides it.
        let group = heads.q / heads.kv;
        for row in at..len {
            for head in 0..heads.q {
                let found = &out[row * cols + head * heads.head_dim..][..heads.head_dim];
                assert_eq!(found[0].is_nan(), head / group == kv, "{found:?}");
            }
        }
    });
}

#[test]
fn operands_that_do_not_fit_are_errors_that_say_so() {
    let Some(gpu) = Gpu::take() else { return };
    let heads = HeadCounts {
        q: 4,
        kv: 2,
        head_dim: 16,
    };
    let mut random = Random::new(3);
    let mut good = World::random(&mut random, heads, 16, DType::F32, &[20]);
    good.shape.num_layers = 1;
    let pages = Pages::new(&gpu, &good);
    let refused = |what: &str, change: &dyn Fn(&mut World, &mut Batch, &mut RopeTables)| {
        let mut world = good.clone();
        let (mut some, mut rope, qkv) = batch(&world, &[(0, 0, 20)]);
        change(&mut world, &mut some, &mut rope);
        let result = CudaPlan::new(&gpu.pool, &gpu.stream, &some, &rope, 16, 0).and_then(|plan| {
            let layout = RowLayout::contiguous(DType::F32, 20, qkv.len() / 20);
            let qkv = Operand::new(&gpu, layout, 0, Some(&qkv));
            let wide = RowLayout::contiguous(DType::F32, 20, 64);
            let mut out = Operand::new(&gpu, wide, 0, None);
            let mut scratch = AttentionScratch::new(&gpu.pool)?;
            let [keys, values] = pages.slices();
            let layer = KvLayer::new(keys, values, world.shape)?;
            cuda::attention(
                &gpu.kernels,
                &gpu.stream,
                qkv.rows(),
                world.heads,
                &plan,
                &layer,
                1.0,
                &mut scratch,
                out.rows_mut(),
            )
        });
        let Err(error @ (Error::Shape(_) | Error::Input(_))) = result else {
            panic!("{what}: an error, not {result:?}");
        };
        assert!(error.to_string().contains(what), "{error}");
    };
    refused("KV heads of the pages", &|w, _, _| w.heads.kv = 1);
    refused("columns of qkv", &|w, _, _| w.heads.q = 2);
    refused("heads", &|w, _, _| w.heads.q = 3);
    refused("head size of the pages", &|w, _, _| w.heads.head_dim = 8);
    refused("blocks of the pages", &|w, b, _| {
        b.block_tables[0][1] = w.shape.num_blocks as u32;
    });
    refused("block size of the pages", &|w, _, _| w.shape.block_size = 8);
    refused("keys of a layer", &|w, _, _| w.shape.num_blocks += 1);
    refused("head_dim", &|w, _, _| w.shape.head_dim = 7);
    refused("head_dim", &|w, _, _| w.shape.head_dim = 264);
    refused("sines and cosines", &|_, _, r| {
        r.sin.pop();
    });
    refused("block table of sequence 0", &|_, b, _| {
        b.block_tables[0].pop();
    });
    refused("rows of qkv", &|w, b, r| {
        let part = batch(w, &[(0, 0, 19)]);
        (*b, *r) = (part.0, part.1);
    });
}
