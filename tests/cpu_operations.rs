//! Every operation of the CPU backend but attention agrees with the f64 oracle within the
//! bound of f32 rounding, and bit by bit where arithmetic is exact.

mod oracle;

use oracle::bounds::{add_error, linear_error, rms_norm_error, rotate_error, swiglu_error};
use oracle::compare::{same_bits, within};
use oracle::cpu::{backend, poisoned, tensor};
use oracle::random::{Host, Random, cases, round, rows, wide};
use oracle::{Rows, add, embedding, linear, rms_norm, rotate, swiglu};
use ringtp::DType;
use ringtp::backend::cpu::{CpuBackend, CpuPlan};
use ringtp::backend::{Backend, Epilogue, HeadCounts, KvShape, Layout, RopeTables};
use ringtp::llama::Batch;

const ROWS: [usize; 12] = [0, 1, 2, 3, 5, 7, 11, 12, 13, 14, 25, 30];
const WIDTHS: [usize; 12] = [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 70];
const DEPTHS: [usize; 12] = [0, 1, 2, 3, 7, 16, 17, 33, 64, 129, 300, 777];

/// A product with random shapes, parts, types and epilogue.
struct Product {
    rows: usize,
    x: Vec<f32>,
    parts: Vec<Host>,
    layout: Layout,
    dtype: DType,
    bias: Option<Host>,
    residual: Option<Vec<f32>>,
}

impl Product {
    fn random(
        random: &mut Random,
        dtype: DType,
        layout: Layout,
        values: fn(&mut Random, usize) -> Vec<f32>,
    ) -> Self {
        let (rows, k) = (random.choose(&ROWS), random.choose(&DEPTHS));
        let first = random.choose(&WIDTHS);
        let heights = match layout {
            Layout::GateUp => vec![first, first],
            Layout::Rows if random.flip() => vec![first],
            Layout::Rows => vec![first, random.below(40), random.choose(&WIDTHS)],
        };
        let stacked: usize = heights.iter().sum();
        let width = match layout {
            Layout::GateUp => first,
            Layout::Rows => stacked,
        };
        let part = |&height: &usize| {
            let source = random.choose(&DType::ALL);
            Host::new(height, k, source, values(random, height * k))
        };
        let parts = heights.iter().map(part).collect();
        let bias = random.flip().then(|| values(random, stacked));
        Self {
            rows,
            x: values(random, rows * k),
            parts,
            layout,
            dtype,
            bias: bias.map(|bias| Host::new(1, stacked, DType::F32, bias)),
            residual: random.flip().then(|| values(random, rows * width)),
        }
    }

    fn width(&self) -> usize {
        let stacked: usize = self.parts.iter().map(|part| part.rows).sum();
        match self.layout {
            Layout::GateUp => stacked / 2,
            Layout::Rows => stacked,
        }
    }

    fn run(&self, backend: &mut CpuBackend) -> Vec<f32> {
        let parts: Vec<_> = self.parts.iter().map(Host::view).collect();
        let w = backend
            .matrix(&parts, self.layout, self.dtype)
            .expect("parts of one width");
        let bias = self
            .bias
            .as_ref()
            .map(|bias| backend.vector(&[bias.view()]).expect("one row"));
        let residual = self.residual.as_ref();
        let residual = residual.map(|r| tensor(r, self.rows, self.width()));
        let epilogue = Epilogue {
            bias: bias.as_ref(),
            residual: residual.as_ref(),
        };
        let mut out = poisoned(self.rows, self.width());
        let x = tensor(&self.x, self.rows, self.parts[0].cols);
        backend
            .linear(&x, &w, epilogue, &mut out)
            .expect("shapes fit");
        backend.read(&out).expect("it is there")
    }

    /// The exact result, and how far f32 may be from it.
    fn exact(&self) -> (Rows, Rows) {
        let x = rows(&self.x, self.rows, self.parts[0].cols);
        let w: Rows = self
            .parts
            .iter()
            .flat_map(|part| part.stored(self.dtype))
            .collect();
        let bias = self
            .bias
            .as_ref()
            .map(|bias| bias.stored(DType::F32).concat());
        let product = |from: usize, to: usize| {
            let (w, bias) = (w[from..to].to_vec(), bias.as_ref().map(|b| &b[from..to]));
            (linear(&x, &w, bias), linear_error(&x, &w, bias))
        };
        let (value, error) = match self.layout {
            Layout::Rows => product(0, w.len()),
            Layout::GateUp => {
                let (gate, gate_error) = product(0, w.len() / 2);
                let (up, up_error) = product(w.len() / 2, w.len());
                let error = swiglu_error(&gate, &gate_error, &up, &up_error);
                (swiglu(&gate, &up), error)
            }
        };
        match &self.residual {
            None => (value, error),
            Some(residual) => {
                let residual = rows(residual, self.rows, self.width());
                let error = add_error(&value, &error, &residual);
                (add(&value, &residual), error)
            }
        }
    }
}

#[test]
fn a_product_with_its_epilogue_is_within_the_bound_of_rounding() {
    let mut backend = backend();
    for dtype in DType::ALL {
        for layout in [Layout::Rows, Layout::GateUp] {
            cases(120, |random| {
                let product = Product::random(random, dtype, layout, Random::values);
                let (value, error) = product.exact();
                within(&product.run(&mut backend), &value, &error)
                    .unwrap_or_else(|e| panic!("{dtype} {layout:?}: {e}"));
            });
        }
    }
}

#[test]
fn a_product_of_integers_is_exact_to_the_bit() {
    let mut backend = backend();
    for dtype in DType::ALL {
        cases(120, |random| {
            let product = Product::random(random, dtype, Layout::Rows, Random::integers);
            let exact: Vec<f32> = product
                .exact()
                .0
                .concat()
                .into_iter()
                .map(|v| v as f32)
                .collect();
            same_bits(&product.run(&mut backend), &exact)
                .unwrap_or_else(|e| panic!("{dtype}: {e}"));
        });
    }
}

#[test]
fn the_comparison_sees_one_wrong_element_and_exchanged_gate_and_up() {
    let mut backend = backend();
    let mut seen = 0;
    cases(60, |random| {
        let mut product = Product::random(random, DType::Bf16, Layout::GateUp, Random::values);
        if product.rows == 0 || product.parts[0].cols < 2 {
            return;
        }
        seen += 1;
        let (value, error) = product.exact();
        let mut out = product.run(&mut backend);
        within(&out, &value, &error).expect("right before it is made wrong");
        let at = random.below(out.len());
        let (value_at, error_at) = (value.concat()[at], error.concat()[at]);
        out[at] = (value_at + 1.1 * error_at + 1e-6 * value_at.abs()) as f32 + 1e-7;
        within(&out, &value, &error).expect_err("an element outside its bound");
        product.parts.swap(0, 1);
        within(&product.run(&mut backend), &value, &error).expect_err("gate for up");
        product.parts.swap(0, 1);
        product.x[0] += 1.0;
        within(&product.run(&mut backend), &value, &error).expect_err("another x");
    });
    assert!(seen > 20, "{seen} cases");
    let one = vec![vec![1.0]];
    within(&[f32::NAN], &one, &one).expect_err("NaN is near nothing");
    same_bits(&[0.0], &[-0.0]).expect_err("zeros differ in their sign");
}

#[test]
fn norms_are_within_the_bound_of_rounding_and_the_residual_sum_is_written_back() {
    let mut backend = backend();
    cases(300, |random| {
        let (n, cols) = (random.choose(&ROWS), 1 + random.below(300));
        let (x, residual) = (random.values(n * cols), random.values(n * cols));
        let dtype = random.choose(&DType::ALL);
        let weight = Host::new(1, cols, dtype, random.values(cols));
        let bias = random
            .flip()
            .then(|| Host::new(1, cols, dtype, random.values(cols)));
        let eps = random.choose(&[1e-5_f32, 1e-6, 0.5]);
        let (w, exact_eps) = (weight.stored(dtype).concat(), f64::from(eps));
        let weight = backend.vector(&[weight.view()]).expect("one row");

        let mut out = poisoned(n, cols);
        backend
            .rms_norm(&tensor(&x, n, cols), &weight, eps, &mut out)
            .expect("shapes fit");
        let exact = rows(&x, n, cols);
        let value = rms_norm(&exact, &w, exact_eps);
        within(out.data(), &value, &rms_norm_error(&exact, &w, exact_eps))
            .unwrap_or_else(|e| panic!("rms_norm [{n}, {cols}]: {e}"));

        // The sum: x (+ bias) rounds, then the residual is added to it.
        let (mut value, mut error) = (exact.clone(), vec![vec![0.0; cols]; n]);
        if let Some(bias) = &bias {
            let bias = vec![bias.stored(dtype).concat(); n];
            error = add_error(&value, &error, &bias);
            value = add(&value, &bias);
        }
        let exact = rows(&residual, n, cols);
        error = add_error(&value, &error, &exact);
        value = add(&value, &exact);
        let bias = bias.map(|bias| backend.vector(&[bias.view()]).expect("one row"));
        let mut sum = tensor(&residual, n, cols);
        let mut out = poisoned(n, cols);
        backend
            .add_rms_norm(
                &tensor(&x, n, cols),
                bias.as_ref(),
                &mut sum,
                &weight,
                eps,
                &mut out,
            )
            .expect("shapes fit");
        within(sum.data(), &value, &error).unwrap_or_else(|e| panic!("sum [{n}, {cols}]: {e}"));
        // The norm is of the sum as it was rounded.
        let exact = rows(sum.data(), n, cols);
        let value = rms_norm(&exact, &w, exact_eps);
        within(out.data(), &value, &rms_norm_error(&exact, &w, exact_eps))
            .unwrap_or_else(|e| panic!("add_rms_norm [{n}, {cols}]: {e}"));
    });
}

/// A plan of one sequence with these tokens, without angles.
fn plan_of(backend: &mut CpuBackend, ids: &[u32], logits_rows: &[u32]) -> CpuPlan {
    let mut batch = Batch::new();
    let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
    batch.push(ids, 0, ids.len() as u32, &blocks);
    batch.logits_rows = logits_rows.to_vec();
    backend
        .plan(&batch, RopeTables::default(), 16)
        .expect("a sound batch")
}

#[test]
fn an_embedding_is_the_stored_row_and_zeros_for_ids_of_other_ranks() {
    let mut backend = backend();
    for dtype in DType::ALL {
        cases(120, |random| {
            let (height, cols) = (random.choose(&WIDTHS), random.choose(&DEPTHS));
            let source = random.choose(&DType::ALL);
            let table = Host::new(height, cols, source, random.values(height * cols));
            let first = random.below(50);
            let n = random.choose(&ROWS);
            let ids: Vec<u32> = (0..n)
                .map(|_| random.below(first + height + 20) as u32)
                .collect();
            let w = backend
                .matrix(&[table.view()], Layout::Rows, dtype)
                .expect("one part");
            let plan = plan_of(&mut backend, &ids, &[]);
            let mut out = poisoned(n, cols);
            backend
                .embedding(&w, first, &plan, &mut out)
                .expect("shapes fit");
            let exact = embedding(&table.stored(dtype), cols, &ids, first).concat();
            let exact: Vec<f32> = exact.into_iter().map(|v| v as f32).collect();
            same_bits(out.data(), &exact).unwrap_or_else(|e| panic!("{dtype}: {e}"));
        });
    }
}

#[test]
fn logits_rows_are_copied_in_the_order_wanted() {
    let mut backend = backend();
    cases(100, |random| {
        let (n, cols) = (1 + random.below(30), random.below(40));
        let wanted: Vec<u32> = (0..random.below(40))
            .map(|_| random.below(n) as u32)
            .collect();
        let x = random.values(n * cols);
        let plan = plan_of(&mut backend, &vec![0; n], &wanted);
        let mut out = poisoned(wanted.len(), cols);
        backend
            .logits_rows(&tensor(&x, n, cols), &plan, &mut out)
            .expect("shapes fit");
        let rows = wanted.iter().map(|&row| &x[row as usize * cols..][..cols]);
        let exact: Vec<f32> = rows.flatten().copied().collect();
        same_bits(out.data(), &exact).expect("copies");
    });
}

#[test]
fn queries_are_rotated_within_the_bound_of_rounding() {
    let mut backend = backend();
    cases(150, |random| {
        let head_dim = random.choose(&[2, 8, 10, 16, 24, 64, 80, 128]);
        let kv = random.choose(&[1, 2, 3]);
        let q = kv * random.choose(&[0, 1, 2, 3, 4, 8]);
        let heads = HeadCounts { q, kv, head_dim };
        let n = random.choose(&ROWS);
        let mut batch = Batch::new();
        batch.push(&vec![0; n], 0, n as u32, &[1, 0]);
        let angles = random.values(n * head_dim / 2);
        let cos: Vec<f32> = angles.iter().map(|a| (a * 9.0).cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| (a * 9.0).sin()).collect();
        let rope = RopeTables {
            cos: cos.clone(),
            sin: sin.clone(),
        };
        let plan = backend.plan(&batch, rope, 16).expect("a sound batch");
        let shape = KvShape {
            num_layers: 1,
            num_blocks: 2,
            block_size: 16,
            num_kv_heads: kv,
            head_dim,
            dtype: random.choose(&DType::ALL),
        };
        let mut pages = backend.kv_pages(shape).expect("little memory");
        let input = random.values(n * heads.qkv_cols());
        let mut qkv = tensor(&input, n, heads.qkv_cols());
        backend
            .rope_append(&mut qkv, heads, &plan, &mut pages, 0)
            .expect("shapes fit");
        for row in 0..n {
            let cos = wide(&cos[row * head_dim / 2..][..head_dim / 2]);
            let sin = wide(&sin[row * head_dim / 2..][..head_dim / 2]);
            for head in 0..q {
                let at = row * heads.qkv_cols() + head * head_dim;
                let exact = wide(&input[at..][..head_dim]);
                let value = vec![rotate(&exact, &cos, &sin)];
                let error = vec![rotate_error(&exact, &cos, &sin)];
                within(&qkv.data()[at..][..head_dim], &value, &error)
                    .unwrap_or_else(|e| panic!("row {row} head {head}: {e}"));
            }
        }
    });
}

#[test]
fn a_nan_comes_out_as_nan_in_its_row_and_nowhere_else() {
    let mut backend = backend();
    for dtype in DType::ALL {
        for layout in [Layout::Rows, Layout::GateUp] {
            cases(40, |random| {
                let mut product = Product::random(random, dtype, layout, Random::values);
                let (k, width) = (product.parts[0].cols, product.width());
                if k == 0 || product.rows == 0 {
                    return;
                }
                let clean = product.run(&mut backend);
                let row = random.below(product.rows);
                product.x[row * k + random.below(k)] = f32::NAN;
                let out = product.run(&mut backend);
                for (i, (out, clean)) in out.iter().zip(&clean).enumerate() {
                    if i / width == row {
                        assert!(out.is_nan(), "{dtype} {layout:?}: {out} from NaN");
                    } else {
                        assert_eq!(out.to_bits(), clean.to_bits(), "{dtype} {layout:?}");
                    }
                }
            });
        }
    }
    let (mut x, weight) = (vec![0.5; 3 * 21], vec![1.0; 21]);
    x[21 + 20] = f32::NAN;
    let mut out = poisoned(3, 21);
    backend
        .rms_norm(&tensor(&x, 3, 21), &weight, 1e-5, &mut out)
        .expect("shapes fit");
    for (i, value) in out.data().iter().enumerate() {
        assert_eq!(value.is_nan(), i / 21 == 1, "element {i}: {value}");
    }
}

#[test]
fn weights_round_to_nearest_even_once() {
    // 1 + 2^-8 and 1 + 3 * 2^-8 are ties of bf16; 1 + 2^-11 and 1 + 3 * 2^-11 of f16.
    let mut backend = backend();
    for (dtype, half_ulp) in [
        (DType::Bf16, 2.0_f32.powi(-8)),
        (DType::F16, 2.0_f32.powi(-11)),
    ] {
        for (steps, expected) in [(1.0, 0.0), (3.0, 4.0), (1.5, 2.0), (2.5, 2.0)] {
            let value = 1.0 + steps * half_ulp;
            assert_eq!(round(value, dtype), 1.0 + expected * half_ulp);
            let w = Host::new(1, 1, DType::F32, vec![value]);
            let w = backend
                .matrix(&[w.view()], Layout::Rows, dtype)
                .expect("one part");
            let mut out = poisoned(1, 1);
            backend
                .linear(&tensor(&[1.0], 1, 1), &w, Epilogue::none(), &mut out)
                .expect("shapes fit");
            assert_eq!(out.data(), [1.0 + expected * half_ulp], "{dtype} {value}");
        }
    }
}
