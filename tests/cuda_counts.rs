//! What a decode step costs, counted on the virtual GPU: every weight and every entry of the KV
//! cache is read exactly once, and launches and bytes of each kernel are as recorded.
//!
//! `RINGTP_UPDATE_GATES=1 cargo test --features cuda --test cuda_counts` writes the record
//! (tests/cuda_gates/decode.tsv) anew; its change then shows in the diff.
#![cfg(feature = "cuda")]

mod cuda_support;
mod model_support;
mod p2p_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cuda_support::{Gpu, Operand};
use model_support::{Result, open, some_ids};
use ringtp::DType;
use ringtp::backend::cuda::{
    self, AttentionScratch, CudaBackend, CudaKvPages, CudaPlan, DeviceBuffer, GEMM_FEW_ROWS,
    GemmEpilogue, RowLayout, SPLIT_ROWS,
};
use ringtp::backend::{Backend, HeadCounts, KvShape, RopeTables};
use ringtp::comm::p2p::P2pOptions;
use ringtp::layers::Rank;
use ringtp::llama::{Batch, LoadOptions, Model, SampleRow, select};
use test_driver::Taken;
use test_driver::report::{Report, Touched};

/// A barrier that does not wait for ever for who has panicked.
struct Meeting {
    parties: usize,
    arrived: AtomicUsize,
}

impl Meeting {
    fn wait(&self) {
        let mine = self.arrived.fetch_add(1, Ordering::SeqCst) + 1;
        let all = mine.next_multiple_of(self.parties);
        let begin = Instant::now();
        while self.arrived.load(Ordering::SeqCst) < all {
            assert!(
                begin.elapsed() < Duration::from_secs(120),
                "somebody is missing"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Blocks of the sequences of a step.
const TABLES: [[u32; 4]; 2] = [[5, 2, 7, 1], [0, 6, 3, 4]];

/// Counts what `ranks` ranks do in one decode step of a fixture: a row of each of so many sequences
/// at `position`, and the choice of its token.
fn decode_step(
    driver: &Taken,
    name: &str,
    dtype: DType,
    (ranks, options): (usize, P2pOptions),
    sequences: usize,
    position: usize,
) -> Result<Report> {
    let checkpoint = open(name)?;
    let vocab = checkpoint.config().dims.vocab_size;
    let (_group, comms) = p2p_support::group(ranks, options);
    // What comes before the step and after it is not counted: the ranks wait for each other, and
    // for who counts, between these.
    let meet = Meeting {
        parties: ranks + 1,
        arrived: AtomicUsize::new(0),
    };
    let report = std::thread::scope(|scope| {
        let counted = scope.spawn(|| {
            meet.wait();
            assert!(driver.count(), "on the virtual GPU");
            meet.wait();
            // The step.
            meet.wait();
            let report = driver.report();
            meet.wait();
            report
        });
        p2p_support::run(comms, |rank| {
            let stream = rank.comm.stream().clone();
            let mut backend = CudaBackend::new(stream, dtype).expect("a backend");
            let mut rank = Rank {
                backend: &mut backend,
                comm: &mut rank.comm,
            };
            let options = LoadOptions {
                dtype,
                tp_invariant: false,
            };
            let mut model = Model::load(&mut rank, &checkpoint, options, &|_| {}).expect("a model");
            let mut kv = model.kv_cache(rank.backend, 8, 16, dtype).expect("a cache");
            let ids = some_ids(vocab, 1, position + 1);
            let mut step = |from: usize, to: usize| {
                let mut rows = Batch::new();
                for table in &TABLES[..sequences] {
                    rows.push(&ids[from..to], from as u32, position as u32, table);
                }
                rows.logits_rows = (0..rows.rows() as u32).collect();
                let sample = vec![SampleRow::greedy(); rows.rows()];
                let (logits, head) = model.forward(&mut rank, &rows, &mut kv).expect("a step");
                select(&mut rank, head, logits, &sample).expect("tokens");
                rank.backend.synchronize().expect("a step");
            };
            step(0, position);
            meet.wait();
            meet.wait();
            step(position, position + 1);
            meet.wait();
            meet.wait();
        });
        counted.join()
    });
    report.map_err(|_| "counting failed".into())
}

#[test]
fn a_decode_step_reads_every_weight_and_entry_exactly_once() -> Result {
    let Some(driver) = test_driver::take() else {
        return Ok(());
    };
    if !test_driver::is_virtual() {
        test_driver::skipped("a real device does not count");
        return Ok(());
    }
    let position = 37;
    let alone = (1, p2p_support::options());
    let report = decode_step(&driver, "gqa_8_2", DType::F32, alone, 1, position)?;
    // Weights and cache are in a slab of their own.
    let slab = |memory: &&Touched| memory.bytes == 32 << 20;
    let slab: Vec<_> = report.memory.iter().filter(slab).collect();
    assert_eq!(
        slab.len(),
        1,
        "the slab of the weights: {:?}",
        report.memory
    );
    assert_eq!(slab[0].read, slab[0].read_distinct, "nothing is read twice");

    let checkpoint = open("gqa_8_2")?;
    let dims = &checkpoint.config().dims;
    let (hidden, d) = (dims.hidden_size, dims.head_dim);
    let (q, kv) = (dims.num_attention_heads * d, dims.num_key_value_heads * d);
    let layer = (q + 2 * kv) * hidden + q * hidden + 3 * dims.intermediate_size * hidden;
    let entries = 2 * kv * (position + 1);
    let norms = hidden * (2 * dims.num_hidden_layers + 1);
    // One row of the embedding, all of the head.
    let ends = hidden + dims.vocab_size * hidden;
    let elements = dims.num_hidden_layers * (layer + entries) + norms + ends;
    assert_eq!(
        slab[0].read,
        4 * elements as u64,
        "nothing is left out, or read besides"
    );
    assert_eq!(
        slab[0].written,
        4 * (dims.num_hidden_layers * 2 * kv) as u64,
        "one entry a layer"
    );
    Ok(())
}

/// By kernel of device 0: launches, bytes that its threads loaded, stored and changed atomically.
/// How often collectives look at a peer's flag depends on when it comes, so their loads are not
/// recorded.
fn table(report: &Report) -> String {
    let mut rows: BTreeMap<&str, [u64; 4]> = BTreeMap::new();
    let mut polls = BTreeSet::new();
    for launch in report.launches.iter().filter(|l| l.device == 0) {
        let row = rows.entry(&launch.kernel).or_default();
        let counts = &launch.counts;
        let all = [
            1,
            counts.global_loads.bytes,
            counts.global_stores.bytes,
            counts.global_atomics.bytes,
        ];
        row.iter_mut().zip(all).for_each(|(sum, n)| *sum += n);
        if counts.strong.keys().any(|kind| kind.starts_with("ld.")) {
            polls.insert(&launch.kernel);
        }
    }
    let mut text = String::from("kernel\tlaunches\tloaded\tstored\tatomics\n");
    for (kernel, [launches, loaded, stored, atomics]) in rows {
        let loaded = match polls.iter().any(|&name| name == kernel) {
            true => "polls".to_owned(),
            false => loaded.to_string(),
        };
        let _ = writeln!(text, "{kernel}\t{launches}\t{loaded}\t{stored}\t{atomics}");
    }
    text
}

/// A step of the shipped model, bf16, four layers, one of two ranks: of one sequence; and of two, of
/// which each rank normalises one.
#[test]
fn launches_and_bytes_of_a_decode_step_are_as_recorded() -> Result {
    let Some(driver) = test_driver::take() else {
        return Ok(());
    };
    if !test_driver::is_virtual() {
        test_driver::skipped("a real device does not count");
        return Ok(());
    }
    let sequence_parallel = P2pOptions {
        sequence_parallel: true,
        ..p2p_support::options()
    };
    for (name, options, sequences) in [
        ("decode", p2p_support::options(), 1),
        ("decode_sequence_parallel", sequence_parallel, 2),
    ] {
        let ranks = (2, options);
        let report = decode_step(&driver, "austen", DType::Bf16, ranks, sequences, 20)?;
        let found = table(&report);
        let records = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_gates");
        let record = records.join(format!("{name}.tsv"));
        if std::env::var_os("RINGTP_UPDATE_GATES").is_some() {
            std::fs::write(&record, &found)?;
        }
        let recorded = std::fs::read_to_string(&record)?;
        assert_eq!(
            found, recorded,
            "{name}, if that is meant: RINGTP_UPDATE_GATES=1 cargo test --features cuda --test \
             cuda_counts"
        );
    }
    Ok(())
}

/// The host of each rank waits for its device once in a step of decode, for the tokens, however they
/// are chosen, and whether ranks share its rows out or not.
#[test]
fn a_decode_step_waits_for_the_device_once() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    for sequence_parallel in [false, true] {
        let options = P2pOptions {
            sequence_parallel,
            ..p2p_support::options()
        };
        decode_steps_wait_once(options)?;
    }
    Ok(())
}

fn decode_steps_wait_once(options: P2pOptions) -> Result {
    let checkpoint = open("gqa_8_2")?;
    let (_group, comms) = p2p_support::group(2, options);
    let greedy = SampleRow::greedy();
    let drawn = SampleRow {
        temperature: 0.8,
        seed: 3,
        ..greedy.clone()
    };
    let filtered = SampleRow {
        top_k: 5,
        repetition_penalty: 1.2,
        penalized: vec![1, 2, 60],
        banned: vec![7],
        ..drawn.clone()
    };
    p2p_support::run(comms, |rank| {
        let stream = rank.comm.stream().clone();
        let mut backend = CudaBackend::new(stream.clone(), DType::F32).expect("a backend");
        let mut rank = Rank {
            backend: &mut backend,
            comm: &mut rank.comm,
        };
        let options = LoadOptions {
            dtype: DType::F32,
            tp_invariant: false,
        };
        let mut model = Model::load(&mut rank, &checkpoint, options, &|_| {}).expect("a model");
        let mut kv = model.kv_cache(rank.backend, 8, 16, DType::F32);
        let kv = kv.as_mut().expect("a cache");
        let mut waits = |ids: &[u32], from: usize, sample: &SampleRow| {
            let before = stream.waits();
            let mut batch = Batch::new();
            for table in &TABLES {
                let rows = batch.push(ids, from as u32, 17, table);
                batch.logits_rows.push(rows.end - 1);
            }
            let (logits, head) = model.forward(&mut rank, &batch, kv).expect("a step");
            let tokens = select(&mut rank, head, logits, &vec![sample.clone(); TABLES.len()]);
            tokens.expect("tokens");
            stream.waits() - before
        };
        // Memory is taken for the prompt, and for each way to choose.
        let first = waits(&some_ids(97, 1, 17), 0, &greedy);
        assert!(first > 1, "the ranks meet: {first} waits");
        for sample in [&drawn, &filtered] {
            waits(&[3], 17, sample);
        }
        for (position, sample) in [&greedy, &drawn, &filtered, &greedy].iter().enumerate() {
            assert_eq!(waits(&[4], 18 + position, sample), 1, "{sample:?}");
        }
    });
    Ok(())
}

/// What an operation says it costs at the least is what it reads and writes, each byte once.
#[test]
fn declared_bytes_are_those_that_are_touched() {
    let Some(gpu) = Gpu::take() else { return };
    if !test_driver::is_virtual() {
        test_driver::skipped("a real device does not count");
        return;
    }
    let (kernels, stream) = (&gpu.kernels, &gpu.stream);
    let distinct = |buffers: &[&DeviceBuffer]| -> u64 {
        let both = |buffer: &&DeviceBuffer| {
            let touched = gpu.driver.touched(buffer.address(), buffer.len() as u64);
            touched.read_distinct + touched.written_distinct
        };
        buffers.iter().map(both).sum()
    };
    for rows in [2, 9] {
        let (cols, depth) = (36, 264);
        let dense = |rows, cols| RowLayout::contiguous(DType::Bf16, rows, cols);
        let operand = |rows: usize, cols: usize| {
            Operand::new(&gpu, dense(rows, cols), 0, Some(&vec![1.0; rows * cols]))
        };
        let (x, w, mut out) = (
            operand(rows, depth),
            operand(cols, depth),
            operand(rows, cols),
        );
        assert!(gpu.driver.count());
        let (from, to) = (x.rows(), out.rows_mut());
        cuda::gemm(kernels, stream, from, w.rows(), GemmEpilogue::default(), to)
            .expect("a product");
        stream.synchronize().expect("it ran");
        let work = cuda::gemm_work(&x.layout, &w.layout, &out.layout);
        assert_eq!(
            distinct(&[&x.buffer, &w.buffer, &out.buffer]),
            work.bytes,
            "a product"
        );

        let (mut residual, mut normed) = (operand(rows, depth), operand(rows, depth));
        let weight = gpu
            .pool
            .upload(&vec![1.0_f32; depth], stream)
            .expect("an upload");
        assert!(gpu.driver.count());
        cuda::rms_norm(
            kernels,
            stream,
            x.rows(),
            weight.as_ref(),
            1e-5,
            normed.rows_mut(),
        )
        .expect("a norm");
        stream.synchronize().expect("it ran");
        let work = cuda::rms_norm_work(&x.layout, false);
        assert_eq!(
            distinct(&[&x.buffer, &normed.buffer, &weight]),
            work.bytes,
            "a norm"
        );
        assert!(gpu.driver.count());
        let to = residual.rows_mut();
        let out = normed.rows_mut();
        cuda::add_rms_norm(
            kernels,
            stream,
            x.rows(),
            None,
            to,
            weight.as_ref(),
            1e-5,
            out,
        )
        .expect("a sum and a norm");
        stream.synchronize().expect("it ran");
        let work = cuda::rms_norm_work(&x.layout, true);
        let all = [&x.buffer, &residual.buffer, &normed.buffer, &weight];
        assert_eq!(distinct(&all), work.bytes, "a sum and a norm");

        // Rows that are all different.
        let ids: Vec<u32> = (0..rows as u32).rev().collect();
        let ids = gpu.pool.upload(&ids, stream).expect("an upload");
        assert!(gpu.driver.count());
        let to = normed.rows_mut();
        cuda::gather_rows(kernels, stream, w.rows(), Some(ids.as_ref()), 0, to).expect("a gather");
        stream.synchronize().expect("it ran");
        let work = cuda::gather_rows_work(&normed.layout);
        assert_eq!(
            distinct(&[&w.buffer, &normed.buffer, &ids]),
            work.bytes,
            "a gather"
        );
    }
    gpu.driver.report();
}

/// The same of rope and attention: what all memory they touch comes to, and not their operands alone,
/// is within 2 % of the floor, and every entry of the cache is read once.
#[test]
fn declared_bytes_of_rope_and_attention_are_those_that_are_touched() {
    let Some(gpu) = Gpu::take() else { return };
    if !test_driver::is_virtual() {
        test_driver::skipped("a real device does not count");
        return;
    }
    // A decode of several sequences, one of them in more than one chunk; a part of a prompt, whose
    // rows make as many query vectors as share what a block reads.
    // What items of split contexts leave for each other is a row of f32 a query head and chunk, so
    // the floor is only near where a KV head serves few heads.
    for (dtype, q, parts) in [
        (
            DType::Bf16,
            8,
            &[(200, 201), (255, 256), (90, 91_usize)][..],
        ),
        (DType::F32, 8, &[(200, 201), (1000, 1001)]),
        (DType::Bf16, 4, &[(700, 701)]),
        (DType::F16, 8, &[(52, 60)]),
    ] {
        let heads = HeadCounts {
            q,
            kv: 4,
            head_dim: 64,
        };
        let (mut batch, mut blocks) = (Batch::new(), 0..);
        for &(from, to) in parts {
            let table: Vec<u32> = blocks.by_ref().take(to.div_ceil(16)).collect();
            batch.push(&vec![0; to - from], from as u32, to as u32, &table);
        }
        let rows = batch.rows();
        let angles = vec![0.5; rows * heads.head_dim / 2];
        let rope = RopeTables {
            cos: angles.clone(),
            sin: angles,
        };
        let shape = KvShape {
            num_layers: 1,
            num_blocks: blocks.start as usize,
            block_size: 16,
            num_kv_heads: heads.kv,
            head_dim: heads.head_dim,
            dtype,
        };
        let (kernels, stream, pool) = (&gpu.kernels, &gpu.stream, &gpu.pool);
        let mut pages = CudaKvPages::new(pool, stream, shape).expect("pages");
        let plan = CudaPlan::new(pool, stream, &batch, &rope, 16, SPLIT_ROWS).expect("a plan");
        let operand = |cols: usize| {
            let layout = RowLayout::contiguous(dtype, rows, cols);
            Operand::new(&gpu, layout, 0, Some(&vec![1.0; rows * cols]))
        };
        let (mut qkv, mut out) = (operand(heads.qkv_cols()), operand(q * heads.head_dim));
        let mut scratch = AttentionScratch::new(pool).expect("nothing yet");
        let what = format!("{dtype}, {q} heads, {parts:?}");

        assert!(gpu.driver.count());
        let mut layer = pages.layer_mut(0).expect("a layer");
        cuda::rope_append(kernels, stream, qkv.rows_mut(), heads, &plan, &mut layer).expect("rope");
        stream.synchronize().expect("it ran");
        let touched = |memory: &Touched| memory.read_distinct + memory.written_distinct;
        let report = gpu.driver.report();
        let all: u64 = report.memory.iter().map(touched).sum();
        let work = cuda::rope_append_work(rows, heads, dtype);
        assert_eq!(all, work.bytes, "rope: {what}");
        let entries = |memory: &Touched| memory.bytes as usize == qkv.buffer.len();
        let rotated = report.memory.iter().copied().find(entries).expect("rows");
        assert_eq!(rotated.read, rotated.read_distinct, "rope: {what}");

        assert!(gpu.driver.count());
        let layer = pages.layer(0).expect("a layer");
        let scale = 0.125;
        let to = out.rows_mut();
        cuda::attention(
            kernels,
            stream,
            qkv.rows(),
            heads,
            &plan,
            &layer,
            scale,
            &mut scratch,
            to,
        )
        .expect("attention");
        stream.synchronize().expect("it ran");
        let report = gpu.driver.report();
        let all: u64 = report.memory.iter().map(touched).sum();
        let work = cuda::attention_work(&batch, heads, dtype);
        println!("{what}: {all} bytes for a floor of {}", work.bytes);
        assert!(
            (work.bytes..=work.bytes + work.bytes / 50).contains(&all),
            "attention: {what}: {all} bytes for a floor of {}",
            work.bytes
        );
        let pages_of = |memory: &&Touched| memory.bytes as usize == pages.bytes();
        let cache = report.memory.iter().find(pages_of).expect("the pages");
        let entries: usize = parts.iter().map(|&(_, to)| to).sum();
        let bytes = (2 * entries * heads.kv * heads.head_dim * dtype.size()) as u64;
        assert_eq!(
            (cache.read, cache.read_distinct, cache.written),
            (bytes, bytes, 0),
            "every entry once: {what}"
        );
    }
}

/// In every type and for every number of few rows.
#[test]
fn a_product_of_few_rows_reads_each_weight_once() {
    let Some(gpu) = Gpu::take() else { return };
    for dtype in DType::ALL {
        for rows in 1..=GEMM_FEW_ROWS {
            let (cols, depth) = (37, 264);
            let operand = |rows: usize, cols: usize| {
                let layout = RowLayout::contiguous(dtype, rows, cols);
                Operand::new(&gpu, layout, 0, Some(&vec![0.5; rows * cols]))
            };
            let (x, w) = (operand(rows, depth), operand(cols, depth));
            let mut out = operand(rows, cols);
            if !gpu.driver.count() {
                test_driver::skipped("a real device does not count");
                return;
            }
            let epilogue = GemmEpilogue::default();
            let (kernels, stream) = (&gpu.kernels, &gpu.stream);
            cuda::gemm(
                kernels,
                stream,
                x.rows(),
                w.rows(),
                epilogue,
                out.rows_mut(),
            )
            .expect("a product");
            gpu.stream.synchronize().expect("it ran");
            let bytes = w.buffer.len() as u64;
            let touched = gpu.driver.touched(w.buffer.address(), bytes);
            assert_eq!(
                (touched.read, touched.read_distinct),
                (bytes, bytes),
                "{dtype}, {rows} rows"
            );
            let stores = gpu.driver.report().total.global_stores.bytes;
            assert_eq!(
                stores,
                out.buffer.len() as u64,
                "each result is stored once"
            );
        }
    }
}
