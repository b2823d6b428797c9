//! Operands that do not fit each other are an error that names the operation and the operand:
//! never a panic, and nothing is written.

mod oracle;

use oracle::cpu::{backend, poisoned, tensor};
use oracle::random::Host;
use ringtp::backend::cpu::{CpuBackend, CpuKvPages, CpuMatrix, CpuPlan, CpuTensor};
use ringtp::backend::{Backend, Epilogue, HeadCounts, KvShape, Layout, RopeTables};
use ringtp::host::HostMatrix;
use ringtp::llama::Batch;
use ringtp::{DType, Error, Result};

#[track_caller]
fn refused<T>(result: Result<T>, operation: &str, operand: &str) {
    match result {
        Err(Error::Shape(fault)) => {
            let named = fault.what.contains(operation) && fault.what.contains(operand);
            assert!(named, "{operation}: {operand} is not named by: {fault}");
        }
        Err(error) => panic!("{operation}: {operand}: another error: {error}"),
        Ok(_) => panic!("{operation}: {operand}: accepted"),
    }
}

fn zeros(rows: usize, cols: usize) -> CpuTensor {
    tensor(&vec![0.0; rows * cols], rows, cols)
}

fn matrix(backend: &mut CpuBackend, rows: usize, cols: usize, layout: Layout) -> CpuMatrix {
    let part = Host::new(rows, cols, DType::F32, vec![0.0; rows * cols]);
    let parts = match layout {
        Layout::Rows => vec![part.view()],
        Layout::GateUp => vec![part.view(), part.view()],
    };
    backend
        .matrix(&parts, layout, DType::F32)
        .expect("one width")
}

fn batch() -> Batch {
    let mut batch = Batch::new();
    batch.push(&[1, 2, 3], 0, 3, &[2]);
    batch.push(&[4], 17, 18, &[0, 1]);
    batch.logits_rows = vec![2, 3];
    batch
}

fn plan(backend: &mut CpuBackend, angles: usize) -> CpuPlan {
    let rope = RopeTables {
        cos: vec![1.0; angles],
        sin: vec![0.0; angles],
    };
    backend.plan(&batch(), rope, 16).expect("a sound batch")
}

#[test]
fn of_a_product() {
    let mut b = backend();
    let rows = matrix(&mut b, 6, 5, Layout::Rows);
    let gate_up = matrix(&mut b, 6, 5, Layout::GateUp);
    for (w, bias_len) in [(&rows, 6), (&gate_up, 12)] {
        let mut out = poisoned(3, 6);
        let none = Epilogue::none;
        for x in [zeros(3, 4), zeros(3, 6), zeros(3, 0)] {
            refused(b.linear(&x, w, none(), &mut out), "linear", "columns of x");
        }
        let x = zeros(3, 5);
        let mut wrong = poisoned(2, 6);
        refused(
            b.linear(&x, w, none(), &mut wrong),
            "linear",
            "rows of the output",
        );
        for cols in [5, 7, 12] {
            let mut wrong = poisoned(3, cols);
            refused(
                b.linear(&x, w, none(), &mut wrong),
                "linear",
                "columns of the output",
            );
        }
        for len in [0, bias_len - 1, bias_len + 1, 18 - bias_len] {
            let bias = vec![0.0; len];
            let epilogue = Epilogue {
                bias: Some(&bias),
                residual: None,
            };
            refused(b.linear(&x, w, epilogue, &mut out), "linear", "bias");
        }
        for (rows, cols, what) in [(2, 6, "rows"), (4, 6, "rows"), (3, 5, "columns")] {
            let residual = zeros(rows, cols);
            let epilogue = Epilogue {
                bias: None,
                residual: Some(&residual),
            };
            let operand = format!("{what} of the residual");
            refused(b.linear(&x, w, epilogue, &mut out), "linear", &operand);
        }
        assert!(out.data().iter().all(|x| x.is_nan()), "written");
        b.linear(&x, w, none(), &mut out).expect("this fits");
    }
}

#[test]
fn of_weights() {
    let mut b = backend();
    let host = |rows, cols| Host::new(rows, cols, DType::Bf16, vec![0.0; rows * cols]);
    let (wide, narrow, high) = (host(2, 5), host(2, 4), host(3, 5));
    let mut pack = |parts: &[HostMatrix<'_>], layout| b.matrix(parts, layout, DType::Bf16);
    refused(
        pack(&[wide.view(), narrow.view()], Layout::Rows),
        "matrix",
        "columns",
    );
    refused(
        pack(&[wide.view(), narrow.view()], Layout::GateUp),
        "matrix",
        "columns",
    );
    refused(
        pack(&[wide.view(), high.view()], Layout::GateUp),
        "matrix",
        "gate and up",
    );
    refused(
        pack(&[wide.view()], Layout::GateUp),
        "matrix",
        "gate and up",
    );
    refused(pack(&[], Layout::GateUp), "matrix", "gate and up");
    refused(
        pack(&[wide.view(), wide.view(), wide.view()], Layout::GateUp),
        "matrix",
        "gate and up",
    );
    let parts = [host(1, 5), host(2, 5)];
    refused(
        b.vector(&[parts[0].view(), parts[1].view()]),
        "vector",
        "rows of a part",
    );
    // No row, and a width that no memory has.
    let empty = HostMatrix::new(&[], DType::F32, 0, 1 << 60).expect("no element");
    refused(b.vector(&[empty]), "vector", "rows of a part");
    for (parts, layout) in [
        (vec![empty], Layout::Rows),
        (vec![empty; 2], Layout::GateUp),
    ] {
        let w = b.matrix(&parts, layout, DType::F32).expect("no row");
        assert_eq!((w.rows(), w.bytes()), (0, 0));
    }
}

#[test]
fn of_norms() {
    let mut b = backend();
    let (x, weight) = (zeros(3, 5), vec![1.0; 5]);
    let mut out = poisoned(3, 5);
    for len in [0, 4, 6] {
        let weight = vec![1.0; len];
        refused(
            b.rms_norm(&x, &weight, 1e-5, &mut out),
            "rms_norm",
            "weight",
        );
        let mut residual = zeros(3, 5);
        refused(
            b.add_rms_norm(&x, None, &mut residual, &weight, 1e-5, &mut out),
            "add_rms_norm",
            "weight",
        );
        let bias = vec![1.0; len];
        refused(
            b.add_rms_norm(
                &x,
                Some(&bias),
                &mut residual,
                &vec![1.0; 5],
                1e-5,
                &mut out,
            ),
            "add_rms_norm",
            "bias",
        );
    }
    for (rows, cols, what) in [
        (2, 5, "rows of"),
        (3, 4, "columns of"),
        (3, 6, "columns of"),
    ] {
        let mut wrong = zeros(rows, cols);
        let of_output = format!("{what} the output");
        refused(
            b.rms_norm(&x, &weight, 1e-5, &mut wrong),
            "rms_norm",
            &of_output,
        );
        let mut residual = zeros(3, 5);
        refused(
            b.add_rms_norm(&x, None, &mut residual, &weight, 1e-5, &mut wrong),
            "add_rms_norm",
            &of_output,
        );
        refused(
            b.add_rms_norm(&x, None, &mut wrong, &weight, 1e-5, &mut out),
            "add_rms_norm",
            &format!("{what} the residual"),
        );
    }
    assert!(out.data().iter().all(|x| x.is_nan()), "written");
}

#[test]
fn of_embeddings_and_logits_rows() {
    let mut b = backend();
    let plan = plan(&mut b, 0);
    let table = matrix(&mut b, 6, 5, Layout::Rows);
    let gate_up = matrix(&mut b, 6, 5, Layout::GateUp);
    let (mut few, mut narrow, mut out) = (poisoned(3, 5), poisoned(4, 4), poisoned(4, 5));
    refused(
        b.embedding(&table, 0, &plan, &mut few),
        "embedding",
        "rows of the output",
    );
    refused(
        b.embedding(&table, 0, &plan, &mut narrow),
        "embedding",
        "columns of the output",
    );
    refused(
        b.embedding(&gate_up, 0, &plan, &mut out),
        "embedding",
        "layout",
    );
    b.embedding(&table, usize::MAX, &plan, &mut out)
        .expect("no id is that great");

    let x = zeros(4, 5);
    let mut out = poisoned(2, 5);
    refused(
        b.logits_rows(&zeros(3, 5), &plan, &mut out),
        "logits_rows",
        "rows of x",
    );
    refused(
        b.logits_rows(&x, &plan, &mut few),
        "logits_rows",
        "rows of the output",
    );
    refused(
        b.logits_rows(&x, &plan, &mut poisoned(2, 4)),
        "logits_rows",
        "columns of the output",
    );
    b.logits_rows(&x, &plan, &mut out).expect("this fits");
}

#[test]
fn of_plans() {
    let mut b = backend();
    let mut plan = |change: fn(&mut Batch), block_size| {
        let mut batch = batch();
        change(&mut batch);
        b.plan(&batch, RopeTables::default(), block_size)
    };
    refused(plan(|_| {}, 0), "plan", "block size");
    refused(
        plan(|b| b.block_tables[1] = vec![0], 16),
        "batch",
        "block table",
    );
    refused(plan(|b| b.positions[1] = 7, 16), "batch", "positions");
    refused(plan(|b| b.positions.clear(), 16), "batch", "positions");
    refused(plan(|b| b.cu_seqlens[1] = 5, 16), "batch", "row offsets");
    refused(plan(|b| b.cu_seqlens[2] = 5, 16), "batch", "row offset");
    refused(plan(|b| b.cu_seqlens.clear(), 16), "batch", "row offsets");
    assert!(plan(|b| b.logits_rows[0] = 4, 16).is_err());
    let rope = RopeTables {
        cos: vec![1.0; 8],
        sin: vec![1.0; 7],
    };
    refused(b.plan(&batch(), rope, 16), "plan", "sines and cosines");
}

fn pages(backend: &mut CpuBackend, shape: KvShape) -> CpuKvPages {
    backend.kv_pages(shape).expect("little memory")
}

#[test]
fn of_attention_and_of_what_it_attends_to() {
    let mut b = backend();
    let heads = HeadCounts {
        q: 4,
        kv: 2,
        head_dim: 8,
    };
    let shape = KvShape {
        num_layers: 2,
        num_blocks: 3,
        block_size: 16,
        num_kv_heads: 2,
        head_dim: 8,
        dtype: DType::F16,
    };
    let sound = plan(&mut b, 16);
    // Each with what should be named: of both operations, as they share their operands.
    let mut both = |heads: HeadCounts,
                    shape: KvShape,
                    plan: &CpuPlan,
                    size: (usize, usize),
                    layer,
                    what: &str| {
        let mut pages = pages(&mut b, shape);
        let mut qkv = zeros(size.0, size.1);
        refused(
            b.rope_append(&mut qkv, heads, plan, &mut pages, layer),
            "rope_append",
            what,
        );
        let mut out = poisoned(4, 32);
        refused(
            b.attention(&qkv, heads, plan, &pages, layer, 1.0, &mut out),
            "attention",
            what,
        );
        assert!(out.data().iter().all(|x| x.is_nan()), "written");
    };
    both(heads, shape, &sound, (3, 64), 0, "rows of qkv");
    both(heads, shape, &sound, (4, 63), 0, "columns of qkv");
    both(heads, shape, &sound, (4, 0), 0, "query heads");
    both(heads, shape, &sound, (4, 64), 2, "layer");
    both(heads, shape, &sound, (4, 64), usize::MAX, "layer");
    both(
        HeadCounts { kv: 0, ..heads },
        shape,
        &sound,
        (4, 64),
        0,
        "KV heads",
    );
    both(
        HeadCounts { kv: 0, ..heads },
        KvShape {
            num_kv_heads: 0,
            ..shape
        },
        &sound,
        (4, 64),
        0,
        "KV heads",
    );
    both(
        HeadCounts { q: 3, ..heads },
        shape,
        &sound,
        (4, 56),
        0,
        "query heads",
    );
    both(
        HeadCounts {
            q: usize::MAX - 1,
            ..heads
        },
        shape,
        &sound,
        (4, 64),
        0,
        "query heads",
    );
    both(
        heads,
        KvShape {
            num_kv_heads: 1,
            ..shape
        },
        &sound,
        (4, 64),
        0,
        "KV heads of the pages",
    );
    both(
        heads,
        KvShape {
            head_dim: 16,
            ..shape
        },
        &sound,
        (4, 64),
        0,
        "head size of the pages",
    );
    for head_dim in [0, 7] {
        both(
            HeadCounts { head_dim, ..heads },
            KvShape { head_dim, ..shape },
            &sound,
            (4, 8 * head_dim),
            0,
            "head size",
        );
    }
    both(
        heads,
        KvShape {
            block_size: 32,
            ..shape
        },
        &sound,
        (4, 64),
        0,
        "block size of the pages",
    );
    both(
        heads,
        KvShape {
            num_blocks: 2,
            ..shape
        },
        &sound,
        (4, 64),
        0,
        "blocks of the pages",
    );
    both(
        heads,
        KvShape {
            num_blocks: 0,
            ..shape
        },
        &sound,
        (4, 64),
        0,
        "blocks of the pages",
    );
    both(
        heads,
        KvShape {
            num_layers: 0,
            ..shape
        },
        &sound,
        (4, 64),
        0,
        "layer",
    );
    let few_angles = plan(&mut backend(), 12);
    both(heads, shape, &few_angles, (4, 64), 0, "sines and cosines");

    let mut pages = pages(&mut b, shape);
    let mut qkv = zeros(4, 64);
    b.rope_append(&mut qkv, heads, &sound, &mut pages, 1)
        .expect("this fits");
    for (rows, cols, what) in [(3, 32, "rows"), (4, 31, "columns"), (4, 64, "columns")] {
        let mut out = poisoned(rows, cols);
        refused(
            b.attention(&qkv, heads, &sound, &pages, 1, 1.0, &mut out),
            "attention",
            &format!("{what} of the output"),
        );
    }
    b.attention(&qkv, heads, &sound, &pages, 1, 1.0, &mut poisoned(4, 32))
        .expect("this fits");
}

#[test]
fn sizes_that_no_memory_has_are_errors() {
    let mut b = backend();
    for (rows, cols) in [(1 << 40, 1 << 40), (1, 1 << 60), (usize::MAX, 2)] {
        let error = b.tensor(rows, cols).expect_err("too large");
        assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    }
    let mut small = zeros(1, 1 << 20);
    let error = b.set_rows(&mut small, 1 << 50).expect_err("too large");
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    assert_eq!((small.rows(), small.data().len()), (1, 1 << 20));
    let shape = KvShape {
        num_layers: 1 << 30,
        num_blocks: 1 << 30,
        block_size: 16,
        num_kv_heads: 8,
        head_dim: 128,
        dtype: DType::F32,
    };
    let error = b.kv_pages(shape).expect_err("too large");
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    let endless = KvShape {
        head_dim: usize::MAX,
        ..shape
    };
    let error = b.kv_pages(endless).expect_err("too large");
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    for block_size in [0, 8, 17] {
        let error = b
            .kv_pages(KvShape {
                block_size,
                ..shape
            })
            .expect_err("odd");
        assert!(matches!(error, Error::Input(_)), "{error}");
    }
}
