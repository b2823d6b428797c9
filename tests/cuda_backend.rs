//! The CUDA backend as a `Backend`: what moves or stores values gives the CPU's bits, whatever the
//! parts, types and layouts; operands that do not fit are errors and leave nothing behind.
#![cfg(feature = "cuda")]

mod cuda_support;
mod oracle;

use std::sync::Arc;

use cuda_support::Gpu;
use oracle::compare::same_bits;
use oracle::random::{Host, Random, cases};
use ringtp::backend::cuda::{CudaBackend, DevicePool, Stream};
use ringtp::backend::{Backend, Epilogue, HeadCounts, KvShape, Layout, RopeTables};
use ringtp::llama::Batch;
use ringtp::{DType, Error, Result};

test_driver::also_on_a_real_driver!();

/// A backend whose every buffer is an allocation of its own: its bounds are seen.
fn backend(gpu: &Gpu, dtype: DType) -> CudaBackend {
    let stream = Arc::new(Stream::new(&gpu.context).expect("a stream"));
    let pool = DevicePool::new(&gpu.context, 0);
    CudaBackend::with(stream, pool, gpu.kernels.clone(), dtype).expect("a backend")
}

/// A batch of one sequence with these tokens.
fn batch(ids: &[u32], logits_rows: &[u32]) -> Batch {
    let mut batch = Batch::new();
    let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
    batch.push(ids, 0, ids.len() as u32, &blocks);
    batch.logits_rows = logits_rows.to_vec();
    batch
}

/// One case of everything that copies, on any backend: what it came to.
fn copies<B: Backend>(b: &mut B, random: &mut Random, dtype: DType) -> Result<Vec<f32>> {
    let (height, cols) = (1 + random.below(40), 1 + random.below(70));
    let parts: Vec<_> = [height, random.below(9)]
        .iter()
        .map(|&rows| {
            let source = random.choose(&DType::ALL);
            Host::new(rows, cols, source, random.integers(rows * cols))
        })
        .collect();
    let views: Vec<_> = parts.iter().map(Host::view).collect();
    let table = b.matrix(&views, Layout::Rows, dtype)?;
    let (n, first) = (1 + random.below(20), random.below(9));
    let ids: Vec<u32> = (0..n).map(|_| random.below(60) as u32).collect();
    let wanted: Vec<u32> = (0..random.below(9))
        .map(|_| random.below(n) as u32)
        .collect();
    let plan = b.plan(&batch(&ids, &wanted), RopeTables::default(), 16)?;

    let mut all = Vec::new();
    // Grown from nothing, as a workspace is.
    let mut embedded = b.tensor(0, cols)?;
    b.set_rows(&mut embedded, n)?;
    b.embedding(&table, first, &plan, &mut embedded)?;
    all.extend(b.read(&embedded)?);
    let mut rows = b.tensor(wanted.len(), cols)?;
    b.logits_rows(&embedded, &plan, &mut rows)?;
    all.extend(b.read(&rows)?);
    let from = random.below(cols);
    let mut slice = b.tensor(n, random.below(cols - from + 1))?;
    b.slice_columns(&embedded, from, &mut slice)?;
    all.extend(b.read(&slice)?);
    let bias = Host::new(1, cols, random.choose(&DType::ALL), random.integers(cols));
    let bias = b.vector(&[bias.view()])?;
    b.add_bias(&bias, &mut embedded)?;
    all.extend(b.read(&embedded)?);
    let zeros = b.logits(2, 3)?;
    all.extend(b.read(&zeros)?);
    // Products of small integers are exact in every type; gate and up are told apart by the sign
    // of zeros alone where the gate is zero.
    let gate_up = b.matrix(&[views[0], views[0]], Layout::GateUp, dtype)?;
    let square = b.matrix(&[views[0]], Layout::Rows, dtype)?;
    for (w, residual) in [(&square, true), (&gate_up, false)] {
        let mut out = b.logits(n, height)?;
        let zero = b.logits(n, height)?;
        let epilogue = Epilogue {
            bias: None,
            residual: residual.then_some(&zero),
        };
        b.set_rows(&mut embedded, n)?;
        b.embedding(&table, 0, &plan, &mut embedded)?;
        b.linear(&embedded, w, epilogue, &mut out)?;
        if residual {
            all.extend(b.read(&out)?);
        } else {
            // silu rounds: its sign, and where there is anything to speak of (below e^-88 of the
            // gate the CPU's exponential is held).
            let sign = |v: &f32| if v.abs() < 1e-30 { 0.0 } else { v.signum() };
            all.extend(b.read(&out)?.iter().map(sign));
        }
    }
    b.synchronize()?;
    Ok(all)
}

#[test]
fn what_is_moved_or_exact_has_the_bits_of_the_cpu() {
    let Some(gpu) = Gpu::take() else { return };
    let mut cpu = oracle::cpu::backend();
    for dtype in DType::ALL {
        let mut cuda = backend(&gpu, dtype);
        cases(20, |random| {
            let expected = copies(&mut cpu, &mut random.clone(), dtype).expect("on the CPU");
            let found = copies(&mut cuda, random, dtype).expect("on a device");
            same_bits(&found, &expected).unwrap_or_else(|e| panic!("{dtype}: {e}"));
        });
    }
}

/// Longer than the memory they are staged in, in one row and in many.
#[test]
fn weights_longer_than_their_staging_arrive_whole() {
    let Some(gpu) = Gpu::take() else { return };
    let mut cuda = backend(&gpu, DType::Bf16);
    for (rows, cols) in [(3, 1_200_000), (3000, 400)] {
        let values = (0..rows * cols).map(|i| (i % 251) as f32).collect();
        let host = Host::new(rows, cols, DType::F32, values);
        let w = cuda
            .matrix(&[host.view()], Layout::Rows, DType::Bf16)
            .expect("it fits");
        let view = w.view().expect("rows");
        let mut bytes = vec![0_u8; w.bytes()];
        // SAFETY: the matrix has these bytes and lives.
        let all =
            unsafe { ringtp::backend::cuda::DeviceSlice::from_raw(view.address(), w.bytes()) };
        cuda.stream().download(all, &mut bytes).expect("a download");
        for (i, element) in bytes.chunks_exact(2).enumerate() {
            // Up to 250 is exact in bf16.
            let value = half::bf16::from_le_bytes([element[0], element[1]]).to_f32();
            assert_eq!(value, (i % 251) as f32, "element {i} of [{rows}, {cols}]");
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_errors_that_say_so() {
    let Some(gpu) = Gpu::take() else { return };
    let b = &mut backend(&gpu, DType::F32);
    #[track_caller]
    fn refused<T>(result: Result<T>, what: &str) {
        match result {
            Err(error @ (Error::Shape(_) | Error::Input(_) | Error::OutOfMemory(_))) => {
                assert!(error.to_string().contains(what), "{what} in {error}");
            }
            Err(error) => panic!("{what}: another error: {error}"),
            Ok(_) => panic!("{what}: accepted"),
        }
    }
    let host = |rows: usize, cols| Host::new(rows, cols, DType::F32, vec![0.0; rows * cols]);
    let (wide, narrow) = (host(2, 5), host(2, 4));
    let parts = [wide.view(), narrow.view()];
    refused(
        b.matrix(&parts, Layout::Rows, DType::F32),
        "columns of its parts",
    );
    refused(
        b.matrix(&parts[..1], Layout::GateUp, DType::F32),
        "gate and up",
    );
    refused(b.matrix(&[], Layout::GateUp, DType::F32), "gate and up");
    refused(
        b.matrix(&parts[..1], Layout::Rows, DType::F16),
        "type of the weights",
    );
    refused(b.vector(&parts[..1]), "rows of a part");
    let shape = KvShape {
        num_layers: 1,
        num_blocks: 2,
        block_size: 16,
        num_kv_heads: 1,
        head_dim: 8,
        dtype: DType::F32,
    };
    for (change, what) in [
        (
            KvShape {
                head_dim: 258,
                ..shape
            },
            "head_dim",
        ),
        (
            KvShape {
                head_dim: 5,
                ..shape
            },
            "head_dim",
        ),
        (
            KvShape {
                block_size: 0,
                ..shape
            },
            "block_size",
        ),
        (
            KvShape {
                dtype: DType::F16,
                ..shape
            },
            "type of the KV cache",
        ),
        (
            KvShape {
                num_blocks: usize::MAX,
                ..shape
            },
            "KV cache",
        ),
    ] {
        refused(b.kv_pages(change), what);
    }
    refused(b.tensor(usize::MAX, 3), "activations");
    let mut out = b.tensor(2, 5).expect("little");
    refused(b.set_rows(&mut out, usize::MAX), "activations");
    assert_eq!(out.layout().rows, 2, "it stays as it was");

    let plan = b
        .plan(&batch(&[1, 2], &[0]), RopeTables::default(), 16)
        .expect("sound");
    let table = b
        .matrix(&parts[..1], Layout::Rows, DType::F32)
        .expect("a matrix");
    let gate_up = b
        .matrix(&[parts[0]; 2], Layout::GateUp, DType::F32)
        .expect("a matrix");
    let mut short = b.tensor(1, 5).expect("little");
    let x = b.tensor(2, 5).expect("little");
    refused(
        b.embedding(&gate_up, 0, &plan, &mut out),
        "layout of the table",
    );
    refused(b.embedding(&table, 0, &plan, &mut short), "ids of a gather");
    refused(b.logits_rows(&short, &plan, &mut out), "rows of x");
    refused(b.logits_rows(&x, &plan, &mut out), "ids of a gather");
    refused(b.slice_columns(&x, 1, &mut out), "columns within 5");
    refused(
        b.slice_columns(&x, usize::MAX, &mut out),
        "columns within 5",
    );
    refused(b.slice_columns(&x, 0, &mut short), "rows of the output");
    let bias = b.vector(&[host(1, 4).view()]).expect("a vector");
    refused(b.add_bias(&bias, &mut out), "the bias");
    refused(
        b.rms_norm(&x, &bias, 1e-5, &mut out),
        "the weight of a norm",
    );
    let mut pages = b.kv_pages(shape).expect("little");
    let heads = HeadCounts {
        q: 1,
        kv: 1,
        head_dim: 8,
    };
    let mut qkv = b.tensor(2, 24).expect("little");
    let rope = b.rope_append(&mut qkv, heads, &plan, &mut pages, 0);
    refused(rope, "sines and cosines");
    refused(
        b.rope_append(&mut qkv, heads, &plan, &mut pages, 1),
        "layer",
    );
    let mut heads_out = b.tensor(2, 7).expect("little");
    let attention = b.attention(&qkv, heads, &plan, &pages, 0, 1.0, &mut heads_out);
    refused(attention, "the output of attention");
    refused(
        b.plan(&batch(&[1], &[1]), RopeTables::default(), 16),
        "logits row",
    );
    refused(
        b.plan(&batch(&[1], &[0]), RopeTables::default(), 0),
        "block size",
    );
    b.synchronize().expect("nothing went wrong on the device");
}
