//! A random generator for tests, whose seed they print.
#![allow(dead_code, reason = "each test file uses its part")]

use ringtp::dtype::Element;

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

    /// Of any magnitude that sums of a few values of 16 bits stand, and now and then what sums
    /// treat specially: zeros of both signs, subnormals, the largest, infinities, NaN.
    pub(crate) fn awkward(&mut self) -> f32 {
        const SPECIAL: [f32; 12] = [
            0.0,
            -0.0,
            1e-45,
            -1e-45,
            6e-8,
            -6e-8,
            f32::MAX,
            f32::MIN,
            65504.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
        ];
        match self.below(16) {
            0 => self.choose(&SPECIAL),
            1 => -(self.below(1000) as f32) * 1e-40,
            _ => {
                let value = self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0;
                value * 2f32.powi(self.below(20) as i32 - 10)
            }
        }
    }

    /// The same, rounded to an element type.
    pub(crate) fn awkward_values<T: Element>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::from_f32(self.awkward())).collect()
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
