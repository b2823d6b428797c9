//! The CPU backend's operands, made for tests.

use ringtp::backend::cpu::{CpuBackend, CpuTensor, Isa};

/// One thread.
pub(crate) fn backend() -> CpuBackend {
    CpuBackend::new(1).expect("one thread starts")
}

/// 1, 2 and 3 threads on each instruction set.
pub(crate) fn all_backends() -> Vec<(String, CpuBackend)> {
    let pairs = Isa::available()
        .into_iter()
        .flat_map(|isa| (1..=3).map(move |threads| (isa, threads)));
    pairs
        .map(|(isa, threads)| {
            let backend = CpuBackend::with_isa(threads, isa).expect("threads start");
            (format!("{isa:?}, {threads} threads"), backend)
        })
        .collect()
}

/// `[rows, cols]` of `values`.
pub(crate) fn tensor(values: &[f32], rows: usize, cols: usize) -> CpuTensor {
    let mut tensor = CpuTensor::zeros(rows, cols);
    tensor.data_mut().copy_from_slice(values);
    tensor
}

/// `[rows, cols]` of NaN: an output that must be written everywhere.
pub(crate) fn poisoned(rows: usize, cols: usize) -> CpuTensor {
    tensor(&vec![f32::NAN; rows * cols], rows, cols)
}
