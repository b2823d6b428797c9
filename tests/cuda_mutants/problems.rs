//! Small problems for every kernel of the model, with the edges that a fault shows at: ragged and
//! whole widths, one row and several, gaps between rows, operands at any address.

use ringtp::backend::cuda::{
    self, AttentionScratch, CudaPlan, DeviceBuffer, DeviceSlice, DeviceSliceMut, GemmEpilogue,
    KvLayer, KvLayerMut, RowLayout, SPLIT_ROWS, abi,
};
use ringtp::backend::{HeadCounts, KvShape, RopeTables};
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
        ("gemm_few", Some(dtype)) => products(dtype, 1),
        ("gemm_many", Some(dtype)) => products(dtype, abi::kGemmFewRows as usize + 1),
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
    let pack = 16 / size;
    let long = 4 * 512 * pack + 40;
    let mut shapes = vec![
        ([3, 37], [1, size]),
        ([2, 64], [0, 16]),
        ([1, 1], [0, 0]),
        ([1, 520], [8, 0]),
        ([1, long], [0, 0]),
        ([1, long], [0, size]),
    ];
    // Ends in each of the packs that a thread keeps, and beyond: after a whole pack that is read at
    // once, and after every number of elements.
    for packs in [0, 32, 2 * 512, 3 * 512, 4 * 512] {
        shapes.push(([1, (packs + 1) * pack], [0, 0]));
        shapes.extend((1..=pack).map(|rest| ([1, packs * pack + rest], [0, size])));
    }
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
                let bias = (place != [0, 0]).then(|| bias.view());
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

/// Products of the row class that begins at so many rows.
fn products(dtype: DType, first: usize) -> Vec<Problem> {
    let size = dtype.size();
    let many = first > abi::kGemmFewRows as usize;
    // Rows; columns of w, depth, gap and guard, and which epilogue.
    let mut cases = Vec::new();
    for rows in [first, if many { 70 } else { 3 }] {
        cases.extend([
            (rows, 16, 64, 0, 16, 0),
            (rows, 6, 33, 1, size, 1),
            (rows, 70, 40, 8, 0, 2),
            (rows, 17, 300, 0, 0, 3),
            (rows, 34, 8, 0, 0, 4),
            (rows, 5, 1, 0, 0, 5),
            (rows, 24, 72, 0, 16, 5),
        ]);
    }
    // Every end of what is summed, of a first tile and of a second, in rows at any address.
    let rows = if many { 40 } else { 4 };
    cases.extend([(rows, 40, 64, 0, 16, 0), (rows, 40, 0, 1, size, 1)]);
    for rest in 1..=16 / size {
        cases.extend([rest, 32 + rest].map(|depth| (rows, 40, depth, 1, size, 0)));
    }
    // Every end of what is written, four columns at a time or two; a thread has four rows.
    for rows in first..first + 4 {
        for epilogue in 2..=5 {
            for width in 1..=4 {
                let cols = if epilogue % 2 == 0 { 2 * width } else { width };
                cases.push((rows, cols, 8, 1, size, epilogue));
            }
            cases.push((rows, 8, 8, 0, 0, epilogue));
        }
    }
    let mut problems: Vec<Problem> = Vec::new();
    for (rows, cols, depth, gap, guard, epilogue) in cases {
        let place = [gap, guard];
        problems.push(Box::new(move |gpu, bytes| {
            let gate_up = matches!(epilogue, 2 | 4);
            let wide = matches!(epilogue, 3 | 4);
            let width = if gate_up { cols / 2 } else { cols };
            let to = if wide { DType::F32 } else { dtype };
            let x = operand(gpu, dtype, [rows, depth], place, Some(1));
            let w = operand(gpu, dtype, [cols, depth], place, Some(2));
            let own = [gap, guard / size * to.size()];
            let residual = operand(gpu, to, [rows, width], own, Some(3));
            let mut out = operand(gpu, to, [rows, width], own, None);
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
    let size = dtype.size();
    // Heads whose halves are whole packs, and heads whose halves are not; more of them, and of the
    // padding, than a block has threads. And where the rows start.
    let mut heads = vec![
        (3, 1, 16, 16),
        (3, 1, 16, size),
        (4, 2, 80, 16),
        (2, 1, 40, 16),
        (1, 1, 20, 16),
        (16, 16, 256, 16),
        (50, 50, 2, 16),
    ];
    // Every end of a half.
    heads.extend((1..=8).map(|half| (2, 2, 2 * half, 16)));
    let problem = move |(q, kv, head_dim, guard): (usize, usize, usize, usize)| -> Problem {
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
            let mut qkv = operand(gpu, dtype, [rows, heads.qkv_cols()], [0, guard], Some(1));
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
    let mut cases: Vec<Case> = vec![
        ((4, 2, 16), 16, &[(0, 9), (20, 21)], SPLIT_ROWS),
        ((3, 1, 10), 5, &[(31, 33), (0, 1)], SPLIT_ROWS),
    ];
    // Every number of query vectors in a tile, and every end of a head.
    cases.extend((1..=16).map(|n| ((n, 1, 2 * (n % 8 + 1)), 16, &[(3, 4)][..], SPLIT_ROWS)));
    cases.extend([
        // Four times a warp's lanes, more and less, for all query vectors of a tile.
        ((8, 1, 8), 16, &[(99, 101), (150, 152)][..], SPLIT_ROWS),
        ((8, 1, 40), 16, &[(37, 41)], SPLIT_ROWS),
        (
            (2, 1, 8),
            64,
            &[(2 * abi::kAttentionChunk + 8, 2 * abi::kAttentionChunk + 9)],
            SPLIT_ROWS,
        ),
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
        // A tile whose rows end before the last chunk of the others.
        (
            (8, 1, 8),
            32,
            &[(abi::kAttentionChunk - 3, abi::kAttentionChunk + 2)],
            SPLIT_ROWS,
        ),
        (
            (2, 1, 136),
            32,
            &[(abi::kAttentionChunk, abi::kAttentionChunk + 2)],
            0,
        ),
    ]);
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
    let mut shapes = vec![([3, 37], [1, 16]), ([2, 64], [0, 16]), ([1, 1100], [0, 0])];
    shapes.extend((1..=8).map(|cols| ([2, cols], [1, dtype.size()])));
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
    let mut cases = vec![
        (37, 1, true),
        (64, 0, true),
        (1100, 0, true),
        (24, 8, false),
    ];
    cases.extend((1..=8).map(|cols| (cols, 1, true)));
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
        penalized: vec![10, 12, 40, 500],
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
            records_of(gpu, &logits, cols, first_id, &wanted, bytes)
        })
    };
    let mut problems = vec![problem(700, 0), problem(37, 8), problem(512, 10)];
    problems.extend([
        lone_draws(),
        extreme_draws(),
        equal_draws(),
        lists(),
        many_ids(),
        masses(),
    ]);
    problems
}

/// The records of rows of logits, `[rows, cols]`.
fn records_of(
    gpu: &Gpu,
    logits: &[f32],
    cols: usize,
    first_id: usize,
    wanted: &[(usize, SampleRow, Record)],
    bytes: &mut Vec<u8>,
) -> Result<()> {
    let layout = RowLayout::contiguous(DType::F32, logits.len() / cols, cols);
    let logits = Operand::new(gpu, layout, 16, Some(logits));
    let words = gpu.records(&logits, first_id, wanted)?;
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    download(gpu, &logits.buffer, bytes)
}

/// Draws from one candidate, whose number then shows, whichever it is.
fn lone_draws() -> Problem {
    let draw = |seed| SampleRow {
        temperature: 1.0,
        seed,
        ..SampleRow::greedy()
    };
    let wanted: Vec<_> = (0..32).map(|seed| (0, draw(seed), Record::Drawn)).collect();
    Box::new(move |gpu, bytes| records_of(gpu, &[0.5], 1, 77, &wanted, bytes))
}

/// Draws whose random bits are all zeros, and all ones: Philox backwards has found them.
fn extreme_draws() -> Problem {
    let draws = [
        (4_253_125_945, 18_166_466_860_313_642_877),
        (1_069_949_546, 10_470_240_568_567_512_679),
    ];
    Box::new(move |gpu, bytes| {
        for (id, draw) in draws {
            let row = SampleRow {
                temperature: 1.0,
                seed: 1,
                draw,
                ..SampleRow::greedy()
            };
            records_of(gpu, &[0.0], 1, id, &[(0, row, Record::Drawn)], bytes)?;
        }
        Ok(())
    })
}

/// Draws between candidates so likely that their numbers make no difference: the lowest id.
fn equal_draws() -> Problem {
    let draw = SampleRow {
        temperature: 1.0,
        ..SampleRow::greedy()
    };
    let wanted = [(0, draw, Record::Drawn)];
    Box::new(move |gpu, bytes| records_of(gpu, &[3e38; 1100], 1100, 0, &wanted, bytes))
}

/// Lists of some of many equals, of just as many as there are, and of whole digits of the ids; the
/// best below zero.
fn lists() -> Problem {
    let plain = SampleRow {
        temperature: 1.0,
        ..SampleRow::greedy()
    };
    let counts = [1, 20, 253, 509, 599, 600, 601];
    let list = |count| (0, plain.clone(), Record::Candidates { count });
    let mut wanted: Vec<_> = counts.map(list).into();
    wanted.push((1, plain.clone(), Record::Best));
    wanted.push((1, plain.clone(), Record::Candidates { count: 7 }));
    Box::new(move |gpu, bytes| {
        let mut logits = vec![1.5; 600];
        logits.extend(values(8, 600).iter().map(|x| x - 1.5));
        records_of(gpu, &logits, 600, 3, &wanted, bytes)
    })
}

/// More penalties, bans and words of a record than a block has threads.
fn many_ids() -> Problem {
    let all = Record::Candidates { count: 1100 };
    let row = |penalized: &[u32], banned: &[u32]| SampleRow {
        temperature: 1.0,
        repetition_penalty: 1.3,
        penalized: penalized.to_vec(),
        banned: banned.to_vec(),
        ..SampleRow::greedy()
    };
    let many: Vec<u32> = (0..600).collect();
    // Whatever takes an id too many takes one that shows: the next list's.
    let wanted = [
        (0, row(&many, &[]), all),
        (0, row(&[], &[1000]), all),
        (0, row(&[1001], &many), all),
        (0, row(&[1002], &[]), all),
        (1, row(&[], &[]), all),
        (1, row(&[], &[]), Record::Best),
    ];
    Box::new(move |gpu, bytes| {
        let mut logits = values(5, 2 * 1100);
        logits[1100] = f32::NAN;
        records_of(gpu, &logits, 1100, 0, &wanted, bytes)
    })
}

/// Masses of two candidates, of one thread and of two, from six places below to six above.
fn masses() -> Problem {
    let row = SampleRow {
        temperature: 1.0,
        top_p: 0.9,
        ..SampleRow::greedy()
    };
    let (cols, mut logits, mut wanted) = (513, Vec::new(), Vec::new());
    for other in [1, 512] {
        for distance in -6..=6 {
            wanted.push((wanted.len(), row.clone(), Record::Candidates { count: 0 }));
            let start = logits.len();
            logits.resize(start + cols, f32::NEG_INFINITY);
            logits[start] = 0.0;
            // A place is 32 binary digits.
            logits[start + other] = 32.0 * std::f32::consts::LN_2 * distance as f32;
        }
    }
    Box::new(move |gpu, bytes| records_of(gpu, &logits, cols, 0, &wanted, bytes))
}
