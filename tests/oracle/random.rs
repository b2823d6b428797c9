//! Random inputs from printed seeds.

use half::{bf16, f16};
use ringtp::DType;
use ringtp::host::HostMatrix;

use super::Rows;

#[allow(
    clippy::duplicate_mod,
    reason = "a test may use this and p2p_support, which has it too"
)]
#[path = "../random/mod.rs"]
mod generator;
pub(crate) use generator::Random;

/// Runs `case` for `count` seeds; a panic is preceded by the seed.
pub(crate) fn cases(count: u64, mut case: impl FnMut(&mut Random)) {
    struct Seed(u64);
    impl Drop for Seed {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed with seed {}", self.0);
            }
        }
    }
    for seed in 0..count {
        let seed = Seed(seed);
        case(&mut Random::new(seed.0));
    }
}

/// The nearest value of `dtype`, ties to even.
pub(crate) fn round(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::Bf16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
    }
}

/// A matrix in host memory, stored as a checkpoint would.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) dtype: DType,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl Host {
    pub(crate) fn new(rows: usize, cols: usize, dtype: DType, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), rows * cols);
        let bytes = values.iter().flat_map(|&value| match dtype {
            DType::F32 => value.to_le_bytes().to_vec(),
            DType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        });
        Self {
            rows,
            cols,
            dtype,
            bytes: bytes.collect(),
            values: values.iter().map(|&value| round(value, dtype)).collect(),
        }
    }

    pub(crate) fn view(&self) -> HostMatrix<'_> {
        HostMatrix::new(&self.bytes, self.dtype, self.rows, self.cols).expect("sizes agree")
    }

    /// What a backend that stores it as `dtype` computes with.
    pub(crate) fn stored(&self, dtype: DType) -> Rows {
        let values: Vec<f32> = self.values.iter().map(|&v| round(v, dtype)).collect();
        rows(&values, self.rows, self.cols)
    }
}

/// `[rows][cols]` in f64.
pub(crate) fn rows(values: &[f32], rows: usize, cols: usize) -> Rows {
    assert_eq!(values.len(), rows * cols);
    (0..rows)
        .map(|row| wide(&values[row * cols..][..cols]))
        .collect()
}

/// In f64.
pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}
