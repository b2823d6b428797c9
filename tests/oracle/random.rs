//! Random inputs from printed seeds.

use half::{bf16, f16};
use ringtp::DType;
use ringtp::host::HostMatrix;

use super::Rows;

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn flip(&mut self) -> bool {
        self.below(2) == 1
    }

    pub(crate) fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// In [-1, 1), now and then a power of two smaller or larger, or zero.
    pub(crate) fn value(&mut self) -> f32 {
        let value = (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        match self.below(16) {
            0 => value * 8.0,
            1 => value / 1024.0,
            2 => 0.0,
            _ => value,
        }
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// From -3 to 3: in every type, and sums of their products in f32, exact.
    pub(crate) fn integers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.below(7) as f32 - 3.0).collect()
    }

    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

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
