//! The matrix products agree with the f64 oracle within the bound of f32 rounding: any shape and
//! stride, aligned or not, in every type and with every epilogue, writing nothing else.
#![cfg(feature = "cuda")]

mod cuda_support;
mod oracle;

use cuda_support::{Gpu, Operand, Vector};
use oracle::bounds::{add_error, linear_error, rounded_error, swiglu_error_in};
use oracle::compare::{same_bits, within};
use oracle::random::{Host, Random, cases, round, rows, wide};
use oracle::{Rows, add, linear, swiglu};
use ringtp::backend::cuda::{self, GEMM_FEW_ROWS, GemmEpilogue, RowLayout};
use ringtp::backend::{Backend, Epilogue, Layout};
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();
test_driver::also_on_every_architecture!();

/// Both row classes, and both sides of a tile's edge.
const ROWS: [usize; 12] = [0, 1, 1, 2, 3, 4, 4, 5, 7, 33, 64, 70];
const WIDTHS: [usize; 12] = [0, 1, 2, 3, 4, 7, 15, 16, 17, 33, 64, 67];
const DEPTHS: [usize; 12] = [0, 1, 7, 8, 16, 31, 32, 33, 64, 100, 130, 264];

/// The exponential is within 2 ulp (4 u), 1 + it rounds once (u), the quotient is within 2 ulp
/// (4 u): the CUDA C programming guide's `expf` and `__fdividef`.
const SILU_STEPS: usize = 10;

/// One random problem.
#[derive(Clone)]
struct Case {
    dtype: DType,
    out: DType,
    rows: usize,
    /// Rows of w as the kernel has it: gate and up in turn, if that is how it ends.
    cols: usize,
    depth: usize,
    gate_up: bool,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
    /// Made as any number of rows is.
    batch_invariant: bool,
}

impl Case {
    fn random(random: &mut Random, values: fn(&mut Random, usize) -> Vec<f32>) -> Self {
        let dtype = random.choose(&DType::ALL);
        let out = random.choose(&[dtype, dtype, DType::F32]);
        let gate_up = random.flip();
        let (rows, depth) = (random.choose(&ROWS), random.choose(&DEPTHS));
        let width = random.choose(&WIDTHS);
        let cols = if gate_up { 2 * width } else { width };
        let mut typed = |n: usize, dtype: DType| -> Vec<f32> {
            values(random, n).iter().map(|&v| round(v, dtype)).collect()
        };
        let (x, w) = (typed(rows * depth, dtype), typed(cols * depth, dtype));
        let (bias, residual) = (typed(cols, DType::F32), typed(rows * width, out));
        Self {
            dtype,
            out,
            rows,
            cols,
            depth,
            gate_up,
            x,
            w,
            bias: random.flip().then_some(bias),
            residual: random.flip().then_some(residual),
            batch_invariant: random.flip(),
        }
    }

    fn width(&self) -> usize {
        if self.gate_up {
            self.cols / 2
        } else {
            self.cols
        }
    }

    /// Rows `range` of x and of the residual.
    fn part(&self, range: std::ops::Range<usize>) -> Self {
        let width = self.width();
        Self {
            rows: range.len(),
            x: self.x[range.start * self.depth..range.end * self.depth].to_vec(),
            residual: (self.residual.as_ref())
                .map(|r| r[range.start * width..range.end * width].to_vec()),
            ..self.clone()
        }
    }

    /// Runs it, with gaps and guards as `random` has them, or without any.
    fn run(&self, gpu: &Gpu, mut random: Option<&mut Random>) -> Vec<f32> {
        let mut operand = |dtype: DType, rows, cols, values: Option<&[f32]>| {
            let (mut gap, mut guard) = (0, 0);
            if let Some(random) = &mut random {
                gap = random.choose(&[0, 0, 1, 8]);
                let size = dtype.size();
                guard = random.choose(&[0, 0, 16, size, 16 + size]);
            }
            let layout = RowLayout {
                stride: cols + gap,
                ..RowLayout::contiguous(dtype, rows, cols)
            };
            Operand::new(gpu, layout, guard, values)
        };
        let x = operand(self.dtype, self.rows, self.depth, Some(&self.x));
        let w = operand(self.dtype, self.cols, self.depth, Some(&self.w));
        let residual =
            (self.residual.as_ref()).map(|r| operand(self.out, self.rows, self.width(), Some(r)));
        let mut out = operand(self.out, self.rows, self.width(), None);
        let bias = self.bias.as_ref().map(|bias| Vector::new(gpu, bias, 4));
        let epilogue = GemmEpilogue {
            bias: bias.as_ref().map(Vector::view),
            gate_up: self.gate_up,
            residual: residual.as_ref().map(Operand::rows),
        };
        let product = match self.batch_invariant {
            true => cuda::gemm_batch_invariant,
            false => cuda::gemm,
        };
        product(
            &gpu.kernels,
            &gpu.stream,
            x.rows(),
            w.rows(),
            epilogue,
            out.rows_mut(),
        )
        .expect("a product");
        same_bits(&x.values(gpu), &self.x).expect("x stays");
        out.values(gpu)
    }

    /// The exact result, and how far the kernel may be from it: the bound of `linear_error` holds
    /// for every order of summation.
    fn exact(&self) -> (Rows, Rows) {
        let x = rows(&self.x, self.rows, self.depth);
        let w = rows(&self.w, self.cols, self.depth);
        let bias = self.bias.as_ref().map(|bias| wide(bias));
        let (mut value, mut error);
        if self.gate_up {
            let every_other =
                |from: usize| -> Rows { w.iter().skip(from).step_by(2).cloned().collect() };
            let (gate, up) = (every_other(0), every_other(1));
            let parts = bias.as_ref().map(|bias| bias.split_at(self.width()));
            let (gate_bias, up_bias) = (parts.map(|p| p.0), parts.map(|p| p.1));
            let products = [linear(&x, &gate, gate_bias), linear(&x, &up, up_bias)];
            let errors = [
                linear_error(&x, &gate, gate_bias),
                linear_error(&x, &up, up_bias),
            ];
            value = swiglu(&products[0], &products[1]);
            error = swiglu_error_in(
                SILU_STEPS,
                &products[0],
                &errors[0],
                &products[1],
                &errors[1],
            );
        } else {
            value = linear(&x, &w, bias.as_deref());
            error = linear_error(&x, &w, bias.as_deref());
        }
        if let Some(residual) = &self.residual {
            let residual = rows(residual, self.rows, self.width());
            error = add_error(&value, &error, &residual);
            value = add(&value, &residual);
        }
        let error = rounded_error(&value, &error, self.out);
        (value, error)
    }

    fn name(&self) -> String {
        format!(
            "[{}, {}] x [{}, {}] {} to {}, gate_up {}",
            self.rows, self.depth, self.cols, self.depth, self.dtype, self.out, self.gate_up
        )
    }
}

#[test]
fn a_product_with_its_epilogue_is_within_the_bound_of_rounding() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(240), |random| {
        let case = Case::random(random, Random::values);
        let (value, error) = case.exact();
        within(&case.run(&gpu, Some(random)), &value, &error)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name()));
    });
}

#[test]
fn a_product_of_integers_is_exact_to_the_bit() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(60), |random| {
        let case = Case {
            gate_up: false,
            ..Case::random(random, Random::integers)
        };
        let case = Case {
            residual: None,
            ..case
        };
        let exact = case.exact().0.concat();
        let exact: Vec<f32> = exact.iter().map(|&v| round(v as f32, case.out)).collect();
        same_bits(&case.run(&gpu, Some(random)), &exact)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name()));
    });
}

/// Neither the rows beside it nor strides and alignment change a bit of a row, within its class; and
/// in no class where products are batch invariant.
#[test]
fn a_rows_bits_do_not_depend_on_the_batch() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(36), |random| {
        let (few, many) = (1..=GEMM_FEW_ROWS, GEMM_FEW_ROWS + 1..=usize::MAX);
        let class = random.choose(&["few", "many", "any"]);
        let case = loop {
            let case = Case::random(random, Random::values);
            let in_class = match class {
                "few" => few.contains(&case.rows),
                "many" => many.contains(&case.rows),
                _ => many.contains(&case.rows) && case.batch_invariant,
            };
            if in_class && case.rows > 1 && case.cols > 0 {
                break case;
            }
        };
        let whole = case.run(&gpu, None);
        let least = if class == "many" { *many.start() } else { 1 };
        let first = random.below(case.rows - least + 1);
        let part = case.part(first..first + least);
        let width = case.width();
        let expected = &whole[first * width..(first + least) * width];
        same_bits(&part.run(&gpu, Some(random)), expected)
            .unwrap_or_else(|e| panic!("rows {first}.. of {}: {e}", case.name()));
    });
}

/// Tiles sum in the order of K, as the CPU does: in f32 the same bits, but for the exponential.
#[test]
fn many_rows_have_the_bits_of_the_cpu_backend() {
    let Some(gpu) = Gpu::take() else { return };
    let mut cpu = oracle::cpu::backend();
    let mut seen = 0;
    cases(test_driver::cases_here(100), |random| {
        let mut case = Case::random(random, Random::values);
        case.gate_up = false;
        if (case.rows <= GEMM_FEW_ROWS && !case.batch_invariant) || case.dtype != DType::F32 {
            return;
        }
        case.residual = None;
        seen += 1;
        let host =
            |rows, cols, values: &Vec<f32>| Host::new(rows, cols, DType::F32, values.clone());
        let w = host(case.cols, case.depth, &case.w);
        let w = cpu
            .matrix(&[w.view()], Layout::Rows, DType::F32)
            .expect("one part");
        let bias = case.bias.as_ref().map(|b| host(1, case.cols, b));
        let bias = bias.map(|b| cpu.vector(&[b.view()]).expect("one row"));
        let x = oracle::cpu::tensor(&case.x, case.rows, case.depth);
        let mut out = oracle::cpu::poisoned(case.rows, case.cols);
        let epilogue = Epilogue {
            bias: bias.as_ref(),
            residual: None,
        };
        cpu.linear(&x, &w, epilogue, &mut out).expect("shapes fit");
        same_bits(&case.run(&gpu, Some(random)), out.data())
            .unwrap_or_else(|e| panic!("{}: {e}", case.name()));
    });
    assert!(seen > 0, "no case");
}

#[test]
fn the_comparison_sees_exchanged_gate_and_up_another_weight_and_a_missing_bias() {
    let Some(gpu) = Gpu::take() else { return };
    let mut random = Random::new(5);
    let mut halves = |n: usize| -> Vec<f32> {
        let values = random.values(n);
        values.iter().map(|&v| round(v, DType::Bf16)).collect()
    };
    let mut case = Case {
        dtype: DType::Bf16,
        out: DType::Bf16,
        rows: 6,
        cols: 8,
        depth: 40,
        gate_up: true,
        x: halves(240),
        w: halves(320),
        bias: Some(halves(8)),
        residual: None,
        batch_invariant: false,
    };
    let (value, error) = case.exact();
    let control = |case: &Case| within(&case.run(&gpu, None), &value, &error);
    control(&case).expect("right before it is made wrong");
    let right = case.clone();
    for pair in case.w.chunks_exact_mut(80) {
        let (gate, up) = pair.split_at_mut(40);
        gate.swap_with_slice(up);
    }
    control(&case).expect_err("gate for up");
    case = right.clone();
    case.w[7] += 1.0;
    control(&case).expect_err("another weight");
    case = right.clone();
    case.bias = None;
    control(&case).expect_err("no bias");
    case = right;
    case.rows = 4;
    case.x.truncate(160);
    control(&case).expect_err("fewer rows");
}

#[test]
fn a_nan_comes_out_as_nan_in_its_row_and_nowhere_else() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(24), |random| {
        let mut case = Case::random(random, Random::values);
        if case.depth == 0 || case.rows == 0 {
            return;
        }
        let clean = case.run(&gpu, None);
        let row = random.below(case.rows);
        case.x[row * case.depth + random.below(case.depth)] = f32::NAN;
        for (i, (out, clean)) in case.run(&gpu, None).iter().zip(&clean).enumerate() {
            if i / case.width() == row {
                assert!(out.is_nan(), "{}: {out} from NaN", case.name());
            } else {
                assert_eq!(out.to_bits(), clean.to_bits(), "{}", case.name());
            }
        }
    });
}

#[test]
fn operands_that_do_not_fit_are_errors_that_say_so() {
    let Some(gpu) = Gpu::take() else { return };
    type Change = fn(&mut [RowLayout; 4]);
    let refused = |what: &str, gate_up: bool, change: Change, bias: usize| {
        let layout = |rows, cols| RowLayout::contiguous(DType::F32, rows, cols);
        let mut layouts = [layout(3, 8), layout(6, 8), layout(3, 6), layout(3, 6)];
        if gate_up {
            layouts[2].cols = 3;
            layouts[3].cols = 3;
        }
        change(&mut layouts);
        let operand = |layout| Operand::new(&gpu, layout, 0, None);
        let [x, w, residual, mut out] = layouts.map(operand);
        let bias = Vector::new(&gpu, &vec![0.0; bias], 0);
        let epilogue = GemmEpilogue {
            bias: Some(bias.view()),
            gate_up,
            residual: Some(residual.rows()),
        };
        let result = cuda::gemm(
            &gpu.kernels,
            &gpu.stream,
            x.rows(),
            w.rows(),
            epilogue,
            out.rows_mut(),
        );
        let Err(Error::Shape(fault)) = result else {
            panic!("{what}: an error of shape, not {result:?}");
        };
        let words = fault.to_string();
        assert!(words.contains(what), "{words}");
    };
    refused("the weights of a product", false, |l| l[1].cols = 7, 6);
    refused(
        "the weights of a product",
        false,
        |l| l[1].dtype = DType::F16,
        6,
    );
    refused("an even number of rows", true, |l| l[1].rows = 5, 5);
    refused("the output of a product", false, |l| l[3].rows = 2, 6);
    refused("the output of a product", false, |l| l[3].cols = 5, 6);
    refused("the output of a product", true, |l| l[3].cols = 6, 6);
    refused(
        "the output of a product",
        false,
        |l| l[3].dtype = DType::Bf16,
        6,
    );
    refused("the residual of a product", false, |l| l[2].rows = 4, 6);
    refused(
        "the residual of a product",
        false,
        |l| l[2].dtype = DType::Bf16,
        6,
    );
    refused("the bias of a product", false, |_| {}, 5);
    refused("the bias of a product", true, |_| {}, 3);
}
