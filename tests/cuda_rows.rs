//! Embeddings, rows of logits, slices of columns and biases on a device: copies to the bit, sums
//! rounded once, reading and writing nothing else.
#![cfg(feature = "cuda")]

mod cuda_support;
mod oracle;

use cuda_support::{Gpu, Operand, Vector};
use oracle::compare::same_bits;
use oracle::random::{Random, cases, round};
use ringtp::backend::cuda::{self, RowLayout};
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();
test_driver::also_on_every_architecture!();

const ROWS: [usize; 6] = [0, 1, 2, 3, 7, 40];
const WIDTHS: [usize; 12] = [0, 1, 2, 7, 8, 9, 16, 33, 64, 100, 1030, 2056];

fn values(random: &mut Random, n: usize, dtype: DType) -> Vec<f32> {
    random.values(n).iter().map(|&v| round(v, dtype)).collect()
}

fn layout(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> RowLayout {
    RowLayout {
        stride: cols + random.choose(&[0, 0, 1, 8]),
        ..RowLayout::contiguous(dtype, rows, cols)
    }
}

fn guard(random: &mut Random, dtype: DType) -> usize {
    random.choose(&[0, 16, 64, dtype.size()])
}

#[test]
fn an_embedding_is_the_tables_row_and_zeros_for_ids_of_other_ranks() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(120), |random| {
        let dtype = random.choose(&DType::ALL);
        let (height, cols) = (random.choose(&ROWS), random.choose(&WIDTHS));
        let (n, first) = (
            random.choose(&ROWS),
            random.choose(&[0, 1, 50, u32::MAX as usize - 3]),
        );
        let table = values(random, height * cols, dtype);
        let ids: Vec<u32> = (0..n)
            .map(|_| match random.below(8) {
                0 => u32::MAX,
                1 => 0,
                _ => (first + random.below(height + 3))
                    .saturating_sub(1)
                    .min(u32::MAX as usize) as u32,
            })
            .collect();
        let from = Operand::new(
            &gpu,
            layout(random, dtype, height, cols),
            guard(random, dtype),
            Some(&table),
        );
        let mut out = Operand::new(
            &gpu,
            layout(random, dtype, n, cols),
            guard(random, dtype),
            None,
        );
        let device_ids = gpu.pool.upload(&ids, &gpu.stream).expect("an upload");
        cuda::gather_rows(
            &gpu.kernels,
            &gpu.stream,
            from.rows(),
            Some(device_ids.as_ref()),
            first,
            out.rows_mut(),
        )
        .expect("a gather");
        let row = |&id: &u32| {
            let at = (id as usize).checked_sub(first).filter(|&at| at < height);
            at.map_or(vec![0.0; cols], |at| table[at * cols..][..cols].to_vec())
        };
        let expected: Vec<f32> = ids.iter().flat_map(row).collect();
        same_bits(&out.values(&gpu), &expected)
            .unwrap_or_else(|e| panic!("{n} of [{height}, {cols}] {dtype} from {first}: {e}"));
    });
}

#[test]
fn rows_without_ids_are_copied_in_order_from_any_column() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(60), |random| {
        let dtype = random.choose(&DType::ALL);
        let (n, cols) = (random.choose(&ROWS), 1 + random.choose(&WIDTHS));
        let (first, width) = (random.below(cols), random.below(cols));
        let width = width.min(cols - first);
        let x = values(random, n * cols, dtype);
        let from = Operand::new(&gpu, RowLayout::contiguous(dtype, n, cols), 16, Some(&x));
        let mut out = Operand::new(&gpu, layout(random, dtype, n, width), 16, None);
        let part = RowLayout {
            stride: cols,
            ..RowLayout::contiguous(dtype, n, width)
        };
        let start = 16
            + if n * width == 0 {
                0
            } else {
                first * dtype.size()
            };
        let bytes = part.bytes().expect("a size");
        let view = from
            .buffer
            .as_ref()
            .range(start..start + bytes)
            .expect("a part");
        let rows = cuda::Rows::new(view, part).expect("rows");
        cuda::gather_rows(&gpu.kernels, &gpu.stream, rows, None, 0, out.rows_mut())
            .expect("a copy");
        let expected: Vec<f32> = (0..n)
            .flat_map(|r| x[r * cols + first..][..width].to_vec())
            .collect();
        same_bits(&out.values(&gpu), &expected)
            .unwrap_or_else(|e| panic!("{first}..+{width} of {cols}: {e}"));
    });
}

#[test]
fn a_bias_is_added_to_every_row_and_rounded_once() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(60), |random| {
        let dtype = random.choose(&DType::ALL);
        let (n, cols) = (random.choose(&ROWS), random.choose(&WIDTHS));
        let (x, bias) = (values(random, n * cols, dtype), random.values(cols));
        let mut out = Operand::new(
            &gpu,
            layout(random, dtype, n, cols),
            guard(random, dtype),
            Some(&x),
        );
        let vector = Vector::new(&gpu, &bias, random.choose(&[0, 4]));
        cuda::add_bias(&gpu.kernels, &gpu.stream, vector.view(), out.rows_mut()).expect("a sum");
        let sum = |i: usize| round(x[i] + bias[i % cols], dtype);
        let expected: Vec<f32> = (0..n * cols).map(sum).collect();
        same_bits(&out.values(&gpu), &expected)
            .unwrap_or_else(|e| panic!("[{n}, {cols}] {dtype}: {e}"));
    });
}

#[test]
fn operands_that_do_not_fit_are_errors_that_say_so() {
    let Some(gpu) = Gpu::take() else { return };
    let operand = |dtype, rows, cols| {
        let layout = RowLayout::contiguous(dtype, rows, cols);
        Operand::new(&gpu, layout, 0, Some(&vec![0.0; rows * cols]))
    };
    let run = |from: Operand, ids: Option<usize>, mut to: Operand| {
        let ids = ids.map(|n| {
            gpu.pool
                .upload(&vec![0_u32; n], &gpu.stream)
                .expect("an upload")
        });
        let ids = ids.as_ref().map(|ids| ids.as_ref());
        cuda::gather_rows(
            &gpu.kernels,
            &gpu.stream,
            from.rows(),
            ids,
            0,
            to.rows_mut(),
        )
    };
    let f32s = |rows, cols| operand(DType::F32, rows, cols);
    run(f32s(2, 4), Some(3), f32s(3, 4)).expect("fits");
    let mut x = f32s(2, 4);
    let bias = Vector::new(&gpu, &[0.0; 3], 0);
    let results = [
        (
            "the output of a gather",
            run(f32s(2, 4), Some(3), f32s(3, 5)),
        ),
        (
            "the output of a gather",
            run(f32s(2, 4), Some(3), operand(DType::F16, 3, 4)),
        ),
        ("the ids of a gather", run(f32s(2, 4), Some(2), f32s(3, 4))),
        ("the rows to copy", run(f32s(2, 4), None, f32s(3, 4))),
        (
            "the bias",
            cuda::add_bias(&gpu.kernels, &gpu.stream, bias.view(), x.rows_mut()),
        ),
    ];
    for (what, result) in results {
        let Err(Error::Shape(fault)) = result else {
            panic!("{what}: an error of shape, not {result:?}");
        };
        assert!(fault.to_string().contains(what), "{fault}");
    }
}
