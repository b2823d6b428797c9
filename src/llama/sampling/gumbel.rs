//! Standard Gumbel numbers, one for each (seed, draw, token id).

use super::elementary::{ln, neg_ln_1m};
use super::philox::philox4x32;

/// No Gumbel number of this crate is greater: `-ln(2^-65)` is 45.05.
pub const GUMBEL_MAX: f64 = 45.06;

/// The Gumbel numbers of one draw: `g(id) = -ln(-ln u)`, `u` uniform in the open (0, 1).
///
/// `u` comes from 64 random bits `n` as `1 - w`, `w = (n + 1/2) / 2^64`: the largest `g`, which
/// decide draws, belong to the smallest `w`, where floating point is finest. So the upper tail is
/// right down to probabilities of 2^-64, and no `g` is infinite.
#[derive(Clone, Copy, Debug)]
pub struct Gumbel {
    key: [u32; 2],
    draw: [u32; 2],
}

impl Gumbel {
    /// The numbers of draw `draw` under key `seed`.
    pub fn new(seed: u64, draw: u64) -> Self {
        let halves = |n: u64| [n as u32, (n >> 32) as u32];
        Self {
            key: halves(seed),
            draw: halves(draw),
        }
    }

    /// The number of token `id`.
    pub fn of(&self, id: u32) -> f64 {
        from_bits(self.bits(id))
    }

    /// `l + g(id)` for a logit `l` (divided by its temperature), or `None` if it is certainly
    /// below `best`. Most tokens of a vocabulary are, and cost no logarithm.
    pub fn perturb_above(&self, l: f64, id: u32, best: f64) -> Option<f64> {
        if l + GUMBEL_MAX < best {
            return None;
        }
        let bits = self.bits(id);
        // g <= -ln w, and w >= 2^-(leading zeros + 1); 0.7 is above ln 2, which leaves room for
        // the rounding of the logarithms and of the sum.
        let bound = f64::from(bits.leading_zeros() + 1) * 0.7;
        (l + bound >= best).then(|| l + from_bits(bits))
    }

    fn bits(&self, id: u32) -> u64 {
        let [low, high, ..] = philox4x32([id, 0, self.draw[0], self.draw[1]], self.key);
        u64::from(high) << 32 | u64::from(low)
    }
}

/// The Gumbel number of 64 uniform bits; decreasing in them.
fn from_bits(bits: u64) -> f64 {
    const SCALE: f64 = 1.0 / 18_446_744_073_709_551_616.0;
    let fraction = |n: u64| (n as f64 + 0.5) * SCALE;
    // -ln u is exponentially distributed; each half is computed from the end of (0, 1) that it is
    // nearer to, so that neither rounds to 0 or 1.
    let exponential = if bits >> 63 == 0 {
        neg_ln_1m(fraction(bits).min(0.5))
    } else {
        -ln(fraction(!bits))
    };
    -ln(exponential)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tails_are_finite_and_right() {
        assert!((from_bits(0) - 65.0 * std::f64::consts::LN_2).abs() < 1e-12);
        assert!(from_bits(0) < GUMBEL_MAX);
        let lowest = -(65.0 * std::f64::consts::LN_2).ln();
        assert!((from_bits(u64::MAX) - lowest).abs() < 1e-12);
        // Both halves meet at the median, -ln(ln 2).
        let median = -std::f64::consts::LN_2.ln();
        assert!((from_bits((1 << 63) - 1) - median).abs() < 1e-12);
        assert!((from_bits(1 << 63) - median).abs() < 1e-12);
    }

    /// Kolmogorov's bound in the form of Dvoretzky, Kiefer, Wolfowitz and Massart: the empirical
    /// distribution of n numbers strays by more than d with probability below 2 exp(-2 n d^2).
    fn strays(numbers: &mut [f64]) -> f64 {
        numbers.sort_by(f64::total_cmp);
        let n = numbers.len() as f64;
        let cdf = |g: f64| (-(-g).exp()).exp();
        (0..).zip(numbers.iter()).fold(0.0, |worst, (i, &g)| {
            let (below, above) = (f64::from(i) / n, f64::from(i + 1) / n);
            f64::max(worst, (cdf(g) - below).abs().max((cdf(g) - above).abs()))
        })
    }

    #[test]
    fn the_numbers_are_gumbel() {
        let n = 100_000u32;
        // False alarm below 1e-6.
        let limit = ((2.0f64 / 1e-6).ln() / (2.0 * f64::from(n))).sqrt();
        let gumbel = Gumbel::new(7, 3);
        let mut numbers: Vec<_> = (0..n).map(|id| gumbel.of(id)).collect();
        assert!(strays(&mut numbers) < limit);
        let mut draws: Vec<_> = (0..n).map(|d| Gumbel::new(7, d.into()).of(3)).collect();
        assert!(strays(&mut draws) < limit);
        let mut seeds: Vec<_> = (0..n).map(|s| Gumbel::new(s.into(), 1).of(3)).collect();
        assert!(strays(&mut seeds) < limit);
        let mut shifted: Vec<_> = numbers.iter().map(|g| g + 0.05).collect();
        assert!(strays(&mut shifted) > limit, "the control must be caught");
    }

    proptest! {
        #[test]
        fn pruning_drops_only_losers(seed: u64, draw: u64, id: u32, l in -60f64..60.0, best in -60f64..60.0) {
            let gumbel = Gumbel::new(seed, draw);
            let perturbed = l + gumbel.of(id);
            match gumbel.perturb_above(l, id, best) {
                Some(found) => prop_assert_eq!(found, perturbed),
                None => prop_assert!(perturbed < best),
            }
        }

        #[test]
        fn pruning_knows_extreme_numbers(bits: u64, shift in 0u32..64) {
            let bits = bits >> shift;
            prop_assert!(from_bits(bits) < f64::from(bits.leading_zeros() + 1) * 0.7);
        }
    }
}
