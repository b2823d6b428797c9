//! Small problems for every kernel of the model, with the edges that a fault shows at: ragged and
//! whole widths, one row and several, gaps between rows, operands at any address.

use ringtp::backend::cuda::{
    self, AttentionScratch, CudaPlan, DeviceBuffer, DeviceSlice, DeviceSliceMut, GemmEpilogue,
    KvLayer, KvLayerMut, RowLayout, SPLIT_ROWS, abi,
};
use ringtp::backend::{HeadCounts, KvShape, RopeTables, WantedRecord};
use ringtp::llama::sampling::Record;
use ringtp::llama::{Batch, SampleRow};
use ringtp::{DType, Result};

use crate::cuda_support::{Gpu, Operand, Vector};

/// Launches the kernel, and puts down all bytes that it could have written, guards included.
pub(crate) type Problem = Box<dyn Fn(&Gpu, &mut Vec<u8>) -> Result<()>>;

/// The problems of a kernel, by its name.
pub(crate) fn problems_of(kernel: &str) -> Vec<Problem> {
    let (stem, dtype) = kernel.rsplit_once('_').unwrap_or((kernel, ""));
    let dtype = dtype.parse::<DType>().ok();
    match (stem, dtype) {
        ("rms_norm", Some(dtype)) => norms(dtype, false),
        ("add_rms_norm", Some(dtype)) => norms(dtype, true),
        ("gemm_few", Some(dtype)) => products(dtype, &[1, 3, abi::kGemmFewRows as usize]),
        ("gemm_many", Some(dtype)) => products(dtype, &[5, 70]),
        ("rope_append", Some(dtype)) => ropes(dtype),
        ("attention", Some(dtype)) => attentions(dtype),
        ("add_bias", Some(dtype)) => biases(dtype),
        ("gather_rows", None) if kernel.ends_with("b16") => gathers(DType::Bf16),
        ("gather_rows", None) if kernel.ends_with("b32") => gathers(DType::F32),
        ("sampling", None) => records(),
        _ => Vec::new(),
    }
}

/// Numbers in [-1, 1) that are the same every time.
fn values(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn download(gpu: &Gpu, buffer: &DeviceBuffer, out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    out.resize(start + buffer.len(), 0);
    gpu.stream.download(buffer.as_ref(), &mut out[start..])
}

/// Rows with so many elements between them, in guards of so many bytes.
fn operand(
    gpu: &Gpu,
    dtype: DType,
    [rows, cols]: [usize; 2],
    [gap, guard]: [usize; 2],
    seed: Option<u32>,
) -> Operand {
    let layout = RowLayout {
        stride: cols + gap,
        ..RowLayout::contiguous(dtype, rows, cols)
    };
    let values = seed.map(|seed| values(seed, rows * cols));
    Operand::new(gpu, layout, guard, values.as_deref())
}

fn norms(dtype: DType, adds: bool) -> Vec<Problem> {
    let size = dtype.size();
    // Wide rows, of which a thread keeps a part and reads the rest again.
    let long = 4 * 512 * (16 / size) + 40;
    let shapes = [
        ([3, 37], [1, size]),
        ([2, 64], [0, 16]),
        ([1, 1], [0, 0]),
        ([1, 520], [8, 0]),
        ([1, long], [0, 0]),
        ([1, long], [0, size]),
    ];
    let problem = move |(shape, place): ([usize; 2], [usize; 2])| -> Problem {
        Box::new(move |gpu, bytes| {
            // The end of a row weighs more than its beginning, where there is much of that.
            let mut numbers = values(1, shape[0] * shape[1]);
            let tail = numbers.len().saturating_sub(40);
            numbers[tail..].iter_mut().for_each(|x| *x *= 64.0);
            let layout = RowLayout {
                stride: shape[1] + place[0],
                ..RowLayout::contiguous(dtype, shape[0], shape[1])
            };
            let x = Operand::new(gpu, layout, place[1], Some(&numbers));
            let mut residual = operand(gpu, dtype, shape, place, Some(2));
            let mut out = operand(gpu, dtype, shape, place, None);
            let weight = Vector::new(gpu, &values(3, shape[1]), 0);
            let bias = Vector::new(gpu, &values(4, shape[1]), 0);
            let (kernels, stream) = (&gpu.kernels, &gpu.stream);
            if adds {
                let bias = (shape[0] > 1).then(|| bias.view());
                cuda::add_rms_norm(
                    kernels,
                    stream,
                    x.rows(),
                    bias,
                    residual.rows_mut(),
                    weight.view(),
                    1e-5,
                    out.rows_mut(),
                )?;
                download(gpu, &residual.buffer, bytes)?;
            } else {
                let weight = weight.view();
                cuda::rms_norm(kernels, stream, x.rows(), weight, 1e-5, out.rows_mut())?;
            }
            download(gpu, &out.buffer, bytes)
        })
    };
    shapes.into_iter().map(problem).collect()
}

fn products(dtype: DType, rows: &[usize]) -> Vec<Problem> {
    let mut problems: Vec<Problem> = Vec::new();
    // Columns of w, depth, gap and guard, and which epilogue.
    let cases = [
        (16, 64, 0, 16, 0),
        (6, 33, 1, dtype.size(), 1),
        (70, 40, 8, 0, 2),
        (17, 300, 0, 0, 3),
        (34, 8, 0, 0, 4),
        (5, 1, 0, 0, 5),
        (24, 72, 0, 16, 5),
    ];
    for &rows in rows {
        for (cols, depth, gap, guard, epilogue) in cases {
            let place = [gap, guard];
            problems.push(Box::new(move |gpu, bytes| {
                let gate_up = matches!(epilogue, 2 | 4);
                let wide = matches!(epilogue, 3 | 4);
                let width = if gate_up { cols / 2 } else { cols };
                let to = if wide { DType::F32 } else { dtype };
                let x = operand(gpu, dtype, [rows, depth], place, Some(1));
                let w = operand(gpu, dtype, [cols, depth], place, Some(2));
                let residual = operand(gpu, to, [rows, width], place, Some(3));
                let mut out = operand(gpu, to, [rows, width], place, None);
                let bias = Vector::new(gpu, &values(4, cols), 0);
                let ending = GemmEpilogue {
                    bias: matches!(epilogue, 1..=3).then(|| bias.view()),
                    gate_up,
                    residual: matches!(epilogue, 2 | 3 | 5).then(|| residual.rows()),
                };
                let (kernels, stream) = (&gpu.kernels, &gpu.stream);
                cuda::gemm(kernels, stream, x.rows(), w.rows(), ending, out.rows_mut())?;
                download(gpu, &out.buffer, bytes)
            }));
        }
    }
    problems
}

/// Sequences whose new rows are from one position to another, with scattered blocks.
fn batch(parts: &[(u32, u32)], block_size: u32) -> (Batch, usize) {
    let mut batch = Batch::new();
    let blocks: u32 = parts.iter().map(|(_, to)| to.div_ceil(block_size)).sum();
    // From the last to the first, so that no table is in order.
    let mut next = blocks;
    for &(from, to) in parts {
        let table: Vec<u32> = (0..to.div_ceil(block_size))
            .map(|_| {
                next -= 1;
                next
            })
            .collect();
        batch.push(&vec![7; (to - from) as usize], from, to, &table);
    }
    (batch, blocks as usize)
}

fn angles(rows: usize, head_dim: usize) -> RopeTables {
    let n = rows * head_dim / 2;
    RopeTables {
        cos: values(11, n).iter().map(|x| x.cos()).collect(),
        sin: values(11, n).iter().map(|x| x.sin()).collect(),
    }
}

/// One layer of pages: keys and values, poisoned or with numbers.
struct Pages {
    halves: [Operand; 2],
    shape: KvShape,
}

impl Pages {
    fn new(
        gpu: &Gpu,
        heads: HeadCounts,
        dtype: DType,
        [blocks, size]: [usize; 2],
        full: bool,
    ) -> Self {
        let shape = KvShape {
            num_layers: 1,
            num_blocks: blocks,
            block_size: size,
            num_kv_heads: heads.kv,
            head_dim: heads.head_dim,
            dtype,
        };
        let padded = heads.head_dim.next_multiple_of(8);
        let entries = blocks * heads.kv * size;
        let half = |seed| {
            let layout = RowLayout::contiguous(dtype, entries, padded);
            let mut numbers = values(seed, entries * padded);
            // The padding of an entry is zeros.
            let padding = |at: usize| at % padded >= heads.head_dim;
            (0..numbers.len())
                .filter(|&at| padding(at))
                .for_each(|at| numbers[at] = 0.0);
            Operand::new(gpu, layout, 32, full.then_some(&numbers))
        };
        Self {
            halves: [half(21), half(22)],
            shape,
        }
    }

    fn slices(&self) -> [DeviceSlice<'_>; 2] {
        self.halves.each_ref().map(|half| {
            let bytes = half.layout.bytes().expect("a size");
            // SAFETY: the operand's bytes, which live as long.
            unsafe { DeviceSlice::from_raw(half.rows().address(), bytes) }
        })
    }
}

fn ropes(dtype: DType) -> Vec<Problem> {
    // Heads whose halves are whole packs, and heads whose halves are not.
    let heads = [
        (3, 1, 16),
        (2, 2, 10),
        (4, 2, 80),
        (1, 1, 2),
        (2, 1, 40),
        (1, 1, 20),
    ];
    let problem = move |(q, kv, head_dim): (usize, usize, usize)| -> Problem {
        Box::new(move |gpu, bytes| {
            let heads = HeadCounts { q, kv, head_dim };
            let (batch, blocks) = batch(&[(0, 3), (6, 7)], 5);
            let rows = batch.rows();
            let plan = CudaPlan::new(
                &gpu.pool,
                &gpu.stream,
                &batch,
                &angles(rows, head_dim),
                5,
                SPLIT_ROWS,
            )?;
            let mut qkv = operand(gpu, dtype, [rows, heads.qkv_cols()], [0, 16], Some(1));
            let pages = Pages::new(gpu, heads, dtype, [blocks, 5], false);
            let [keys, values] = pages.slices().map(|s| {
                // SAFETY: nothing else uses the pages while this lives.
                unsafe { DeviceSliceMut::from_raw(s.address(), s.len()) }
            });
            let mut layer = KvLayerMut::new(keys, values, pages.shape)?;
            let (kernels, stream) = (&gpu.kernels, &gpu.stream);
            cuda::rope_append(kernels, stream, qkv.rows_mut(), heads, &plan, &mut layer)?;
            download(gpu, &qkv.buffer, bytes)?;
            let [keys, values] = &pages.halves;
            download(gpu, &keys.buffer, bytes)?;
            download(gpu, &values.buffer, bytes)
        })
    };
    heads.into_iter().map(problem).collect()
}

fn attentions(dtype: DType) -> Vec<Problem> {
    let chunk = abi::kAttentionChunk;
    // Heads, block size, the sequences, and rows of partial results that are allowed.
    type Case = ((usize, usize, usize), usize, &'static [(u32, u32)], usize);
    let cases: [Case; 7] = [
        // All query vectors of a tile, over a whole chunk and more; chunk after chunk, and split.
        (
            (8, 1, 8),
            32,
            &[(abi::kAttentionChunk, abi::kAttentionChunk + 2)],
            0,
        ),
        (
            (8, 1, 8),
            32,
            &[(2 * abi::kAttentionChunk - 2, 2 * abi::kAttentionChunk)],
            SPLIT_ROWS,
        ),
        ((4, 2, 16), 16, &[(0, 9), (20, 21)], SPLIT_ROWS),
        ((3, 1, 10), 5, &[(31, 33), (0, 1)], SPLIT_ROWS),
        ((8, 1, 40), 16, &[(37, 41)], SPLIT_ROWS),
        (
            (2, 1, 8),
            64,
            &[(2 * abi::kAttentionChunk + 8, 2 * abi::kAttentionChunk + 9)],
            SPLIT_ROWS,
        ),
        (
            (2, 1, 136),
            32,
            &[(abi::kAttentionChunk, abi::kAttentionChunk + 2)],
            0,
        ),
    ];
    assert_eq!(chunk % 64, 0, "whole blocks in a chunk");
    let problem = move |((q, kv, head_dim), size, parts, split): Case| -> Problem {
        Box::new(move |gpu, bytes| {
            let heads = HeadCounts { q, kv, head_dim };
            let (batch, blocks) = batch(parts, size as u32);
            let rows = batch.rows();
            let tables = angles(rows, head_dim);
            let plan = CudaPlan::new(&gpu.pool, &gpu.stream, &batch, &tables, size, split)?;
            let qkv = operand(gpu, dtype, [rows, heads.qkv_cols()], [0, 16], Some(1));
            let pages = Pages::new(gpu, heads, dtype, [blocks, size], true);
            let mut out = operand(gpu, dtype, [rows, q * head_dim], [1, 16], None);
            let mut scratch = AttentionScratch::new(&gpu.pool)?;
            let [keys, values] = pages.slices();
            let layer = KvLayer::new(keys, values, pages.shape)?;
            // Twice: what the first leaves in the scratch must be as it found it.
            for _ in 0..2 {
                cuda::attention(
                    &gpu.kernels,
                    &gpu.stream,
                    qkv.rows(),
                    heads,
                    &plan,
                    &layer,
                    // So that what a chunk weighs shows.
                    1.0,
                    &mut scratch,
                    out.rows_mut(),
                )?;
                download(gpu, &out.buffer, bytes)?;
            }
            Ok(())
        })
    };
    cases.into_iter().map(problem).collect()
}

fn biases(dtype: DType) -> Vec<Problem> {
    let shapes = [([3, 37], [1, 16]), ([2, 64], [0, 16]), ([1, 1100], [0, 0])];
    let problem = move |(shape, place): ([usize; 2], [usize; 2])| -> Problem {
        Box::new(move |gpu, bytes| {
            let mut x = operand(gpu, dtype, shape, place, Some(1));
            let bias = Vector::new(gpu, &values(2, shape[1]), 0);
            cuda::add_bias(&gpu.kernels, &gpu.stream, bias.view(), x.rows_mut())?;
            download(gpu, &x.buffer, bytes)
        })
    };
    shapes.into_iter().map(problem).collect()
}

fn gathers(dtype: DType) -> Vec<Problem> {
    let cases = [
        (37, 1, true),
        (64, 0, true),
        (1100, 0, true),
        (24, 8, false),
    ];
    let problem = move |(cols, gap, named): (usize, usize, bool)| -> Problem {
        Box::new(move |gpu, bytes| {
            let table = operand(gpu, dtype, [5, cols], [gap, 16], Some(1));
            let mut out = operand(gpu, dtype, [5, cols], [0, 16], None);
            // The first and the last of the table, and ids just outside.
            let ids = gpu
                .pool
                .upload(&[100_u32, 104, 99, 105, u32::MAX], &gpu.stream)?;
            let ids = named.then(|| ids.as_ref());
            let (kernels, stream) = (&gpu.kernels, &gpu.stream);
            cuda::gather_rows(kernels, stream, table.rows(), ids, 100, out.rows_mut())?;
            download(gpu, &out.buffer, bytes)
        })
    };
    cases.into_iter().map(problem).collect()
}

fn records() -> Vec<Problem> {
    let row = |seed: u64| SampleRow {
        temperature: 0.7,
        top_k: 5,
        top_p: 0.9,
        repetition_penalty: 1.3,
        penalized: vec![10, 12, 500],
        banned: vec![11, 40, 499],
        seed,
        draw: 3 + (seed << 33),
        ..SampleRow::greedy()
    };
    let plain = SampleRow {
        temperature: 1.0,
        ..SampleRow::greedy()
    };
    // Top-p without top-k needs the mass of all.
    let massive = SampleRow {
        temperature: 0.05,
        top_p: 0.8,
        ..SampleRow::greedy()
    };
    let wanted = [
        (0, row(1), Record::Best),
        (1, row(2), Record::Drawn),
        (0, row(3), Record::Candidates { count: 5 }),
        (1, plain.clone(), Record::Best),
        (1, plain.clone(), Record::Drawn),
        (1, row(4), Record::Candidates { count: 600 }),
        (0, plain.clone(), Record::Candidates { count: 64 }),
        (2, plain.clone(), Record::Best),
        (3, plain.clone(), Record::Drawn),
        (2, plain.clone(), Record::Candidates { count: 0 }),
        (0, massive.clone(), Record::Candidates { count: 9 }),
        (1, massive, Record::Candidates { count: 0 }),
    ];
    let problem = move |cols: usize, first_id: usize| -> Problem {
        let wanted = wanted.clone();
        Box::new(move |gpu, bytes| {
            let mut logits = values(9, 4 * cols);
            for (at, logit) in logits.iter_mut().enumerate() {
                // Ties, both zeros, numbers of either sign, and none.
                *logit = match at % 11 {
                    0 => f32::NEG_INFINITY,
                    1 => -0.0,
                    2 | 3 => 0.75,
                    _ => 6.0 * *logit,
                };
            }
            // One row has what is no number, one an infinity.
            logits[2 * cols + cols / 2] = f32::NAN;
            logits[3 * cols] = f32::INFINITY;
            let layout = RowLayout::contiguous(DType::F32, 4, cols);
            let logits = Operand::new(gpu, layout, 16, Some(&logits));
            let wanted: Vec<_> = wanted
                .iter()
                .map(|(row, sample, record)| WantedRecord {
                    row: *row,
                    sample,
                    record: *record,
                })
                .collect();
            let words = cuda::sampling_records(
                &gpu.kernels,
                &gpu.stream,
                &gpu.pool,
                logits.rows(),
                first_id,
                &wanted,
            )?;
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            download(gpu, &logits.buffer, bytes)
        })
    };
    vec![problem(700, 0), problem(37, 8), problem(512, 10)]
}
