//! Exact sums of `e^x`, for the mass of top-p.
//!
//! Floating-point sums depend on their order, hence on how a vocabulary is split. Here each
//! weight `e^x` becomes a fixed-point number of 32-bit digits whose places are the same for all
//! weights, and each place is summed as an integer: any order and any split give the same bits.

use super::elementary::exp_parts;

/// Places kept, from the greatest weight's down: what is dropped of any weight is below 2^-95 of
/// the greatest weight.
const PLACES: usize = 4;

/// A sum of weights: `sum(digits[i] * 2^(32 * (place - i)))`, without carries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mass {
    /// A whole number, held as f64 since logits over tiny temperatures need the range; -inf in
    /// an empty sum.
    place: f64,
    /// Sums of 32-bit digits: room for 2^32 weights.
    digits: [u64; PLACES],
}

impl Mass {
    /// The words of [`Mass::to_words`].
    pub const WORDS: usize = 2 + 2 * PLACES;

    /// The empty sum.
    pub const EMPTY: Self = Self {
        place: f64::NEG_INFINITY,
        digits: [0; PLACES],
    };

    /// Adds `e^x`, `x` finite.
    pub fn add_exp(&mut self, x: f64) {
        let (exponent, mantissa) = exp_parts(x);
        let place = (exponent / 32.0).floor();
        let shift = (exponent - 32.0 * place) as u32;
        // mantissa * 2^53 is whole; the weight is below 2^32 in units of its place, and two more
        // places hold the rest of its 53 bits.
        let fixed = u128::from((mantissa * (1u64 << 53) as f64) as u64) << (shift + 11);
        let digit = |i: u32| u64::from((fixed >> (64 - 32 * i)) as u32);
        self.add(&Self {
            place,
            digits: [digit(0), digit(1), digit(2), 0],
        });
    }

    /// Adds the sum `other`.
    pub fn add(&mut self, other: &Self) {
        if other.place > self.place {
            let places = (other.place - self.place) as usize;
            self.digits = lowered(&self.digits, places);
            self.place = other.place;
        }
        let other = match other.place == self.place {
            true => other.digits,
            false => lowered(&other.digits, (self.place - other.place) as usize),
        };
        for (sum, digit) in self.digits.iter_mut().zip(other) {
            *sum += digit;
        }
    }

    /// Whether this reaches the share `p` of `total`, a sum whose greatest weight this one has
    /// too.
    pub fn reaches(&self, p: f64, total: &Self) -> bool {
        debug_assert!(
            self.place == total.place,
            "{self:?} is no head of {total:?}"
        );
        self.in_units_of_place() >= p * total.in_units_of_place()
    }

    fn in_units_of_place(&self) -> f64 {
        const DIGIT: f64 = 1.0 / (1u64 << 32) as f64;
        self.digits
            .iter()
            .rev()
            .fold(0.0, |sum, &digit| sum * DIGIT + digit as f64)
    }

    /// The sum as words for the wire.
    pub fn to_words(&self) -> [u32; Self::WORDS] {
        let mut words = [0; Self::WORDS];
        let numbers = std::iter::once(self.place.to_bits()).chain(self.digits);
        for (pair, number) in words.as_chunks_mut::<2>().0.iter_mut().zip(numbers) {
            *pair = [number as u32, (number >> 32) as u32];
        }
        words
    }

    /// The sum of [`Mass::to_words`].
    pub fn from_words(words: &[u32; Self::WORDS]) -> Self {
        let number = |i: usize| u64::from(words[2 * i]) | u64::from(words[2 * i + 1]) << 32;
        Self {
            place: f64::from_bits(number(0)),
            digits: std::array::from_fn(|i| number(i + 1)),
        }
    }
}

/// `digits` as seen from `places` higher up.
fn lowered(digits: &[u64; PLACES], places: usize) -> [u64; PLACES] {
    std::array::from_fn(|i| i.checked_sub(places).map_or(0, |i| digits[i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mass(xs: &[f64]) -> Mass {
        xs.iter().fold(Mass::EMPTY, |mut mass, &x| {
            mass.add_exp(x);
            mass
        })
    }

    fn exponents() -> impl Strategy<Value = Vec<f64>> {
        let x = prop_oneof![-30.0..30.0f64, -1e4..1e4f64, -1e83..1e83f64];
        proptest::collection::vec(x, 1..60)
    }

    proptest! {
        #[test]
        fn no_order_and_no_split_changes_a_bit(xs in exponents(), cut in 0usize..60) {
            let whole = mass(&xs);
            let mut reversed = xs.clone();
            reversed.reverse();
            prop_assert_eq!(mass(&reversed), whole);
            let (left, right) = xs.split_at(cut.min(xs.len()));
            for (mut first, second) in [(mass(left), mass(right)), (mass(right), mass(left))] {
                first.add(&second);
                prop_assert_eq!(first, whole);
            }
            prop_assert_eq!(Mass::from_words(&whole.to_words()), whole);
        }

        #[test]
        fn it_is_the_sum(xs in proptest::collection::vec(-300f64..300.0, 1..60)) {
            let expected: f64 = xs.iter().map(|x| x.exp()).sum();
            let found = mass(&xs);
            let found = found.in_units_of_place() * (32.0 * found.place).exp2();
            // 300 * 2^-53 from the product with log2(e), and the f64 sum of the oracle.
            prop_assert!((found - expected).abs() <= 2e-13 * expected);
        }
    }

    #[test]
    fn equal_weights_are_exact_shares() {
        let (half, whole) = (mass(&[3.3; 4]), mass(&[3.3; 8]));
        assert!(half.reaches(0.5, &whole));
        assert!(!half.reaches(0.5 + 1e-15, &whole));
        assert!(whole.reaches(1.0, &whole));
    }
}
