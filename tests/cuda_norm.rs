//! The norm kernels agree with the f64 oracle within the bound of f32 rounding, and the residual
//! to the bit: any width and stride, aligned or not, in every type, writing nothing else.
#![cfg(feature = "cuda")]

mod cuda_support;
mod oracle;

use cuda_support::{Gpu, Operand, Vector};
use oracle::bounds::{UNDERFLOW, gamma, rms_norm_error};
use oracle::compare::{same_bits, within};
use oracle::random::{Random, cases, round, rows, wide};
use oracle::rms_norm;
use ringtp::backend::Backend;
use ringtp::backend::cuda::abi::NormParams;
use ringtp::backend::cuda::{self, Launch, RowLayout};
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();
test_driver::also_on_every_architecture!();

const ROWS: [usize; 6] = [0, 1, 1, 2, 3, 5];
const WIDTHS: [usize; 18] = [
    0, 1, 3, 7, 8, 9, 16, 31, 64, 100, 129, 255, 256, 520, 1000, 1024, 2048, 4096,
];
const EPS: f32 = 1e-5;

/// How far a result of the kernel may be from the oracle's. A square passes through the fused
/// operations of its thread and ten levels of two butterflies; then come the division by n, the
/// sum with eps, the root, its inverse, and two products; all terms are positive, so that is
/// relative to the result. Last, the result is rounded to the element type: half a unit in its
/// last place, which for f16 is at least half its smallest number.
fn error(x: &oracle::Rows, weight: &[f64], dtype: DType) -> oracle::Rows {
    let per_pack = 16 / dtype.size();
    let cols = x.first().map_or(0, Vec::len);
    // At least 32 threads, and at least half as many as packs up to 512.
    let packs = cols.div_ceil(per_pack);
    let threads = packs.div_ceil(2).next_multiple_of(32).clamp(32, 512);
    let steps = packs.div_ceil(threads) * per_pack + 10 + 6;
    let (relative, least) = match dtype {
        DType::F32 => (0.0, 0.0),
        // Eight and eleven bits of significand.
        DType::Bf16 => (2f64.powi(-8), 0.0),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
    };
    let bound = |&value: &f64| {
        let computed = gamma(steps) * value.abs() + UNDERFLOW;
        computed + (relative * (value.abs() + computed)).max(least)
    };
    let values = rms_norm(x, weight, f64::from(EPS));
    values
        .iter()
        .map(|row| row.iter().map(bound).collect())
        .collect()
}

/// One random problem in device memory.
struct Case {
    dtype: DType,
    rows: usize,
    cols: usize,
    x: Vec<f32>,
    bias: Option<Vec<f32>>,
    residual: Vec<f32>,
    weight: Vec<f32>,
}

impl Case {
    fn random(random: &mut Random, dtype: DType, width: usize) -> Self {
        let (rows, cols) = (random.choose(&ROWS), width);
        let mut values =
            |n: usize| -> Vec<f32> { random.values(n).iter().map(|&v| round(v, dtype)).collect() };
        let (x, residual) = (values(rows * cols), values(rows * cols));
        let bias = random.flip().then(|| random.values(cols));
        let weight = random.values(cols);
        Self {
            dtype,
            rows,
            cols,
            x,
            bias,
            residual,
            weight,
        }
    }

    /// A layout with a gap between rows, or none.
    fn layout(&self, random: &mut Random) -> RowLayout {
        RowLayout {
            stride: self.cols + random.choose(&[0, 0, 1, 8]),
            ..RowLayout::contiguous(self.dtype, self.rows, self.cols)
        }
    }

    /// The residual after the sum, to the bit.
    fn sum(&self) -> Vec<f32> {
        let bias = |col: usize| self.bias.as_ref().map(|bias| bias[col]);
        (0..self.x.len())
            .map(|i| {
                let x = bias(i % self.cols).map_or(self.x[i], |bias| self.x[i] + bias);
                round(self.residual[i] + x, self.dtype)
            })
            .collect()
    }

    fn check(&self, found: &[f32], normed: &[f32]) {
        let (x, weight) = (rows(normed, self.rows, self.cols), wide(&self.weight));
        let expected = rms_norm(&x, &weight, f64::from(EPS));
        within(found, &expected, &error(&x, &weight, self.dtype))
            .unwrap_or_else(|e| panic!("{} x {} {}: {e}", self.rows, self.cols, self.dtype));
    }
}

/// Bytes before an operand: where it is aligned, and where it is not.
fn guard(random: &mut Random, dtype: DType) -> usize {
    random.choose(&[0, 0, 16, 64, dtype.size(), 16 + dtype.size()])
}

#[test]
fn rms_norm_is_within_the_bound_of_the_oracle() {
    let Some(gpu) = Gpu::take() else { return };
    cases(150, |random| {
        let (dtype, width) = (random.choose(&DType::ALL), random.choose(&WIDTHS));
        let case = Case::random(random, dtype, width);
        let x = Operand::new(
            &gpu,
            case.layout(random),
            guard(random, dtype),
            Some(&case.x),
        );
        let mut out = Operand::new(&gpu, case.layout(random), guard(random, dtype), None);
        let weight = Vector::new(&gpu, &case.weight, random.choose(&[0, 0, 4]));
        cuda::rms_norm(
            &gpu.kernels,
            &gpu.stream,
            x.rows(),
            weight.view(),
            EPS,
            out.rows_mut(),
        )
        .expect("a norm");
        case.check(&out.values(&gpu), &case.x);
        same_bits(&x.values(&gpu), &case.x).expect("the input stays");
    });
}

#[test]
fn add_rms_norm_keeps_the_rounded_sum_and_norms_it() {
    let Some(gpu) = Gpu::take() else { return };
    cases(150, |random| {
        let (dtype, width) = (random.choose(&DType::ALL), random.choose(&WIDTHS));
        let case = Case::random(random, dtype, width);
        let x = Operand::new(
            &gpu,
            case.layout(random),
            guard(random, dtype),
            Some(&case.x),
        );
        let mut residual = Operand::new(
            &gpu,
            case.layout(random),
            guard(random, dtype),
            Some(&case.residual),
        );
        let mut out = Operand::new(&gpu, case.layout(random), guard(random, dtype), None);
        let weight = Vector::new(&gpu, &case.weight, random.choose(&[0, 0, 4]));
        let bias = case
            .bias
            .as_ref()
            .map(|b| Vector::new(&gpu, b, random.choose(&[0, 0, 4])));
        cuda::add_rms_norm(
            &gpu.kernels,
            &gpu.stream,
            x.rows(),
            bias.as_ref().map(Vector::view),
            residual.rows_mut(),
            weight.view(),
            EPS,
            out.rows_mut(),
        )
        .expect("a sum and a norm");
        let sum = case.sum();
        same_bits(&residual.values(&gpu), &sum).expect("the rounded sum");
        case.check(&out.values(&gpu), &sum);
    });
}

/// Wider than what threads keep in registers.
#[test]
fn rows_beyond_the_registers_are_read_again() {
    let Some(gpu) = Gpu::take() else { return };
    for (dtype, width) in [
        (DType::F32, 8200),
        (DType::Bf16, 16_392),
        (DType::F16, 16_393),
    ] {
        let case = Case::random(&mut Random::new(7), dtype, width);
        let case = Case {
            rows: 1,
            x: case.weight.iter().map(|&v| round(v, dtype)).collect(),
            residual: case.weight.iter().map(|&v| round(2.0 - v, dtype)).collect(),
            ..case
        };
        let layout = RowLayout::contiguous(dtype, 1, width);
        let x = Operand::new(&gpu, layout, 0, Some(&case.x));
        let mut residual = Operand::new(&gpu, layout, 0, Some(&case.residual));
        let mut out = Operand::new(&gpu, layout, 0, None);
        let weight = Vector::new(&gpu, &case.weight, 0);
        let bias = case.bias.as_ref().map(|bias| Vector::new(&gpu, bias, 0));
        cuda::rms_norm(
            &gpu.kernels,
            &gpu.stream,
            x.rows(),
            weight.view(),
            EPS,
            out.rows_mut(),
        )
        .expect("a norm");
        case.check(&out.values(&gpu), &case.x);
        cuda::add_rms_norm(
            &gpu.kernels,
            &gpu.stream,
            x.rows(),
            bias.as_ref().map(Vector::view),
            residual.rows_mut(),
            weight.view(),
            EPS,
            out.rows_mut(),
        )
        .expect("a sum and a norm");
        let sum = case.sum();
        same_bits(&residual.values(&gpu), &sum).expect("the rounded sum");
        case.check(&out.values(&gpu), &sum);
    }
}

/// Where a row lies, and what lies beside it, changes none of its bits.
#[test]
fn bits_do_not_depend_on_alignment_or_on_other_rows() {
    let Some(gpu) = Gpu::take() else { return };
    for dtype in DType::ALL {
        let mut random = Random::new(11);
        let (rows, cols) = (3, 264);
        let values: Vec<f32> = random
            .values(rows * cols)
            .iter()
            .map(|&v| round(v, dtype))
            .collect();
        let weight = Vector::new(&gpu, &random.values(cols), 0);
        let run = |values: &[f32], guard: usize, gap: usize| {
            let layout = RowLayout {
                stride: cols + gap,
                ..RowLayout::contiguous(dtype, values.len() / cols, cols)
            };
            let x = Operand::new(&gpu, layout, guard, Some(values));
            let mut out = Operand::new(&gpu, layout, guard, None);
            cuda::rms_norm(
                &gpu.kernels,
                &gpu.stream,
                x.rows(),
                weight.view(),
                EPS,
                out.rows_mut(),
            )
            .expect("a norm");
            out.values(&gpu)
        };
        let all = run(&values, 0, 0);
        same_bits(&run(&values, dtype.size(), 0), &all).expect("misaligned");
        same_bits(&run(&values, 0, 1), &all).expect("with a gap");
        for row in 0..rows {
            let range = row * cols..(row + 1) * cols;
            same_bits(&run(&values[range.clone()], 0, 0), &all[range]).expect("alone");
        }
    }
}

/// In f32, where the CPU has activations too: the same residual to the bit, and norms that
/// differ by no more than both bounds together.
#[test]
fn agrees_with_the_cpu_backend() {
    let Some(gpu) = Gpu::take() else { return };
    let mut cpu = oracle::cpu::backend();
    cases(100, |random| {
        let case = Case::random(random, DType::F32, random.clone().choose(&WIDTHS));
        let (n, cols) = (case.rows, case.cols);
        let layout = RowLayout::contiguous(DType::F32, n, cols);
        let x = Operand::new(&gpu, layout, 0, Some(&case.x));
        let mut residual = Operand::new(&gpu, layout, 0, Some(&case.residual));
        let mut out = Operand::new(&gpu, layout, 0, None);
        let weight = Vector::new(&gpu, &case.weight, 0);
        let bias = case.bias.as_ref().map(|bias| Vector::new(&gpu, bias, 0));
        cuda::add_rms_norm(
            &gpu.kernels,
            &gpu.stream,
            x.rows(),
            bias.as_ref().map(Vector::view),
            residual.rows_mut(),
            weight.view(),
            EPS,
            out.rows_mut(),
        )
        .expect("a sum and a norm");

        let vector = |cpu: &mut ringtp::backend::cpu::CpuBackend, values: &[f32]| {
            let host = oracle::random::Host::new(1, cols, DType::F32, values.to_vec());
            cpu.vector(&[host.view()]).expect("a vector")
        };
        let host_weight = vector(&mut cpu, &case.weight);
        let host_bias = case.bias.as_ref().map(|bias| vector(&mut cpu, bias));
        let host_x = oracle::cpu::tensor(&case.x, n, cols);
        let mut host_residual = oracle::cpu::tensor(&case.residual, n, cols);
        let mut host_out = oracle::cpu::poisoned(n, cols);
        let bias = host_bias.as_ref();
        cpu.add_rms_norm(
            &host_x,
            bias,
            &mut host_residual,
            &host_weight,
            EPS,
            &mut host_out,
        )
        .expect("a sum and a norm");

        same_bits(&residual.values(&gpu), host_residual.data()).expect("the residual");
        let (sum, weight) = (rows(host_residual.data(), n, cols), wide(&case.weight));
        let bounds: oracle::Rows = error(&sum, &weight, DType::F32)
            .iter()
            .zip(rms_norm_error(&sum, &weight, f64::from(EPS)))
            .map(|(gpu, cpu)| gpu.iter().zip(cpu).map(|(gpu, cpu)| gpu + cpu).collect())
            .collect();
        within(&out.values(&gpu), &rows(host_out.data(), n, cols), &bounds).expect("the norm");
    });
}

/// The negative control of all of the above: a launch that says one column too many is seen, with
/// the kernel, its line and the address; and its error is one after which the context is lost.
#[test]
fn a_column_too_many_is_found() {
    if !test_driver::is_virtual() {
        test_driver::skipped("a real device need not notice an access out of bounds");
        return;
    }
    let words = test_driver::in_a_child("a_column_too_many_is_found", || {
        let gpu = Gpu::take().expect("a driver");
        let layout = RowLayout::contiguous(DType::F32, 1, 31);
        let x = Operand::new(&gpu, layout, 0, Some(&[1.0; 31]));
        let weight = Vector::new(&gpu, &[1.0; 31], 0);
        let mut out = Operand::new(&gpu, layout, 0, None);
        let params = NormParams {
            x: x.rows().address() as *const _,
            bias: std::ptr::null(),
            residual: std::ptr::null_mut(),
            weight: weight.view().address() as *const _,
            out: out.rows_mut().address() as *mut _,
            x_stride: 31,
            residual_stride: 0,
            out_stride: 31,
            rows: 1,
            cols: 32,
            eps: EPS,
            aligned: 0,
        };
        let kernel = gpu.kernels.get("rms_norm_f32").expect("a kernel");
        // SAFETY: it is not: the virtual GPU is to say so.
        unsafe { gpu.stream.launch(kernel, Launch::linear(1, 32), &params) }.expect("it starts");
        let Err(Error::Driver(error)) = gpu.stream.synchronize() else {
            panic!("an error of the driver");
        };
        println!("sticky {}, {error}", error.sticky);
        for finding in gpu.driver.findings() {
            println!("finding: {finding}");
        }
        assert!(gpu.pool.buffer(16).is_err(), "the context is lost");
    });
    // In the child, whose output this is, there is nothing more to see.
    let Some(words) = words else { return };
    let finding = words.lines().find(|line| line.starts_with("finding: "));
    let finding = finding.unwrap_or_else(|| panic!("no finding in {words}"));
    for part in [
        "out-of-bounds",
        "a read of 4 bytes: 0 bytes beyond",
        "rms_norm_f32",
        "pack.cuh:",
    ] {
        assert!(finding.contains(part), "{part} in {finding}");
    }
    assert!(words.contains("sticky true"), "{words}");
    assert!(
        words.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        "{words}"
    );
}

/// Of a row that fits the registers, every element is read once, in whole sectors.
#[test]
fn a_row_is_read_once() {
    let Some(gpu) = Gpu::take() else { return };
    let (rows, cols) = (3, 1024);
    let bytes = (4 * rows * cols) as u64;
    let layout = RowLayout::contiguous(DType::F32, rows, cols);
    let x = Operand::new(&gpu, layout, 0, Some(&vec![2.0; rows * cols]));
    let weight = Vector::new(&gpu, &vec![1.0; cols], 0);
    let mut out = Operand::new(&gpu, layout, 0, None);
    gpu.stream.synchronize().expect("the uploads");
    if !gpu.driver.count() {
        test_driver::skipped("a real driver counts nothing");
        return;
    }
    let (from, to) = (x.buffer.address(), out.buffer.address());
    let target = out.rows_mut();
    cuda::rms_norm(
        &gpu.kernels,
        &gpu.stream,
        x.rows(),
        weight.view(),
        0.0,
        target,
    )
    .expect("a norm");
    gpu.stream.synchronize().expect("the norm");
    let read = gpu.driver.touched(from, bytes);
    assert_eq!(
        (read.read, read.read_distinct, read.written),
        (bytes, bytes, 0)
    );
    let written = gpu.driver.touched(to, bytes);
    let counts = (written.read, written.written, written.written_distinct);
    assert_eq!(counts, (0, bytes, bytes));
    let report = gpu.driver.report();
    assert_eq!(report.launches.len(), 1);
    let counts = &report.total;
    // The rows, and the weight for each of them.
    assert_eq!(counts.global_loads.bytes, 2 * bytes);
    assert_eq!(counts.global_loads.sectors, 2 * bytes / 32);
    assert_eq!(counts.global_stores.sectors, bytes / 32);
    assert_eq!(
        counts.shared_loads.conflicts + counts.shared_stores.conflicts,
        0
    );
    assert!(counts.links.is_empty(), "{:?}", counts.links);
}
