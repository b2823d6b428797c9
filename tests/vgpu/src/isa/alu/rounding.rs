//! Formats and rounding. Results of narrow formats are first computed exactly, or rounded to
//! odd, in f64, then rounded once to the format: with at least two spare bits, rounding to odd
//! first does not disturb the second rounding (S. Boldo and G. Melquiond, "Emulation of FMA and
//! correctly rounded sums", IEEE Trans. Computers 57 (2008)).

use std::cmp::Ordering;

/// A rounding mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// To nearest, ties to even: `.rn`
    Nearest,
    /// To nearest, ties away from zero: `.rna`
    Away,
    /// Towards zero: `.rz`
    Zero,
    /// Towards minus infinity: `.rm`
    Down,
    /// Towards plus infinity: `.rp`
    Up,
}

impl Round {
    pub(super) fn of(modifier: &str) -> Self {
        match modifier {
            "rz" | "rzi" => Round::Zero,
            "rm" | "rmi" => Round::Down,
            "rp" | "rpi" => Round::Up,
            "rna" => Round::Away,
            _ => Round::Nearest,
        }
    }
}

/// A binary format with subnormals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// Bits of the exponent.
    exponent: u32,
    /// Stored bits of the significand.
    mantissa: u32,
    /// What the largest exponent means: true is infinities and NaN; false is one NaN, all ones,
    /// and finite numbers beside it (e4m3).
    infinities: bool,
}

pub(super) const F16: Format = Format {
    exponent: 5,
    mantissa: 10,
    infinities: true,
};
pub(super) const BF16: Format = Format {
    exponent: 8,
    mantissa: 7,
    infinities: true,
};
pub(super) const TF32: Format = Format {
    exponent: 8,
    mantissa: 10,
    infinities: true,
};
pub(super) const F32: Format = Format {
    exponent: 8,
    mantissa: 23,
    infinities: true,
};
pub(super) const E5M2: Format = Format {
    exponent: 5,
    mantissa: 2,
    infinities: true,
};
pub(super) const E4M3: Format = Format {
    exponent: 4,
    mantissa: 3,
    infinities: false,
};

impl Format {
    fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }

    /// The bits of the largest finite number.
    pub(super) fn largest(self) -> u64 {
        let all = (1 << (self.exponent + self.mantissa)) - 1;
        if self.infinities {
            all - (1 << self.mantissa)
        } else {
            all - 1
        }
    }

    /// The bits of infinity, or of the NaN where there is none.
    fn beyond(self) -> u64 {
        self.largest() + 1
    }

    /// The NaN the hardware gives: 0x7fffffff, 0x7fff, 0x7f.
    pub(super) fn nan(self) -> u64 {
        (1 << (self.exponent + self.mantissa)) - 1
    }

    /// The bits of the sign.
    pub(super) fn sign(self) -> u64 {
        1 << (self.exponent + self.mantissa)
    }

    /// The unit of the last place of a number of this size.
    pub(super) fn ulp(self, value: f64) -> f64 {
        let exponent = (value.abs().to_bits() >> 52) as i32 - 1023;
        2f64.powi(exponent.max(1 - self.bias()) - self.mantissa as i32)
    }

    /// Rounds; overflow goes to infinity (or NaN), or to the largest number where the mode or
    /// `saturate` say so.
    pub(super) fn encode(self, value: f64, round: Round, saturate: bool) -> u64 {
        if value.is_nan() {
            return self.nan();
        }
        let negative = value.is_sign_negative();
        let sign = if negative { self.sign() } else { 0 };
        if value == 0.0 {
            return sign;
        }
        if value.is_infinite() {
            return sign
                | if saturate {
                    self.largest()
                } else {
                    self.beyond()
                };
        }
        let bits = value.to_bits();
        let field = (bits >> 52 & 0x7ff) as i32;
        let fraction = bits & ((1 << 52) - 1);
        let (significand, exponent) = if field == 0 {
            (fraction, -1022)
        } else {
            (fraction | 1 << 52, field - 1023)
        };
        // value = significand * 2^(exponent - 52); the result's last place is 2^place.
        let smallest = 1 - self.bias();
        let leading = exponent - (significand.leading_zeros() as i32 - 11);
        let place = leading.max(smallest) - self.mantissa as i32;
        let shift = place - (exponent - 52);
        let (kept, rest) = if shift <= 0 {
            (significand << -shift, Ordering::Less)
        } else if shift > 54 {
            (0, Ordering::Less)
        } else {
            let half = 1u64 << (shift - 1);
            let left = significand & ((1u64 << shift) - 1);
            (significand >> shift, left.cmp(&half))
        };
        let inexact = shift > 54 || (shift > 0 && significand & ((1u64 << shift.min(63)) - 1) != 0);
        let up = inexact
            && match round {
                Round::Nearest => match rest {
                    Ordering::Less => false,
                    Ordering::Equal => kept & 1 != 0,
                    Ordering::Greater => true,
                },
                Round::Away => rest != Ordering::Less,
                Round::Zero => false,
                Round::Down => negative,
                Round::Up => !negative,
            };
        // Counted in last places from zero, the encodings of a format are consecutive.
        let binade = (leading.max(smallest) - smallest) as u64;
        let magnitude = (binade << self.mantissa) + kept + u64::from(up);
        if magnitude > self.largest() {
            let stays = match round {
                Round::Nearest | Round::Away => false,
                Round::Zero => true,
                Round::Down => !negative,
                Round::Up => negative,
            };
            return sign
                | if stays || saturate {
                    self.largest()
                } else {
                    self.beyond()
                };
        }
        sign | magnitude
    }

    /// The value, exactly.
    pub(super) fn decode(self, bits: u64) -> f64 {
        let magnitude = bits & (self.sign() - 1);
        let negative = bits & self.sign() != 0;
        let value = if magnitude > self.largest() {
            if magnitude == self.beyond() && self.infinities {
                f64::INFINITY
            } else {
                f64::NAN
            }
        } else {
            let field = (magnitude >> self.mantissa) as i32;
            let fraction = magnitude & ((1 << self.mantissa) - 1);
            let (significand, exponent) = if field == 0 {
                (fraction, 1 - self.bias())
            } else {
                (fraction | 1 << self.mantissa, field - self.bias())
            };
            significand as f64 * 2f64.powi(exponent - self.mantissa as i32)
        };
        if negative { -value } else { value }
    }
}

/// `s + e` rounded to odd, where `s` is the sum rounded to nearest and `e` what that left out.
#[inline(always)]
fn to_odd(s: f64, e: f64) -> f64 {
    if e == 0.0 || !s.is_finite() || !e.is_finite() {
        return s;
    }
    let bits = s.to_bits();
    if bits & 1 != 0 {
        return s;
    }
    // The exact value lies on the side of `e`; its odd neighbour is one step that way.
    if (e > 0.0) == (s > 0.0) {
        f64::from_bits(bits + 1)
    } else {
        f64::from_bits(bits - 1)
    }
}

/// The sum of two doubles that come from narrow formats, rounded to odd (D. Knuth's TwoSum).
#[inline(always)]
pub(super) fn add_odd(a: f64, b: f64) -> f64 {
    let s = a + b;
    let t = s - a;
    let e = (a - (s - t)) + (b - t);
    to_odd(s, e)
}

/// `a * b + c` of narrow formats, whose products are exact in f64.
#[inline(always)]
pub(super) fn fma_odd(a: f64, b: f64, c: f64) -> f64 {
    add_odd(a * b, c)
}

/// A quotient of narrow formats, rounded to odd.
pub(super) fn div_odd(a: f64, b: f64) -> f64 {
    let q = a / b;
    if !q.is_finite() || q == 0.0 || b == 0.0 || b.is_infinite() {
        return q;
    }
    // The sign of what is left of the dividend tells on which side the quotient lies.
    let left = (-q).mul_add(b, a);
    to_odd(q, if b < 0.0 { -left } else { left })
}

/// A square root of a narrow format, rounded to odd.
pub(super) fn sqrt_odd(a: f64) -> f64 {
    let r = a.sqrt();
    if !r.is_finite() || r == 0.0 {
        return r;
    }
    to_odd(r, (-r).mul_add(r, a))
}

/// An integer rounded to odd.
pub(super) fn integer_odd(value: i128) -> f64 {
    let s = value as f64;
    let left = value - s as i128;
    to_odd(s, left as f64)
}

/// The sign of an exact zero sum: minus if both are, or if rounding down and they cancel.
pub(super) fn zero_sum(a: f64, b: f64, round: Round) -> f64 {
    let negative = if a.is_sign_negative() == b.is_sign_negative() {
        a.is_sign_negative()
    } else {
        round == Round::Down
    };
    if negative { -0.0 } else { 0.0 }
}

/// Directed rounding in f64, by the library.
pub(super) mod double {
    use rustc_apfloat::ieee::Double;
    use rustc_apfloat::{Float, Round as R};

    use super::Round;

    fn mode(round: Round) -> R {
        match round {
            Round::Nearest => R::NearestTiesToEven,
            Round::Away => R::NearestTiesToAway,
            Round::Zero => R::TowardZero,
            Round::Down => R::TowardNegative,
            Round::Up => R::TowardPositive,
        }
    }

    fn of(value: f64) -> Double {
        Double::from_bits(value.to_bits().into())
    }

    fn to(value: Double) -> f64 {
        f64::from_bits(value.to_bits() as u64)
    }

    pub(in super::super) fn add(a: f64, b: f64, round: Round) -> f64 {
        to(of(a).add_r(of(b), mode(round)).value)
    }

    pub(in super::super) fn mul(a: f64, b: f64, round: Round) -> f64 {
        to(of(a).mul_r(of(b), mode(round)).value)
    }

    pub(in super::super) fn fma(a: f64, b: f64, c: f64, round: Round) -> f64 {
        to(of(a).mul_add_r(of(b), of(c), mode(round)).value)
    }

    pub(in super::super) fn div(a: f64, b: f64, round: Round) -> f64 {
        to(of(a).div_r(of(b), mode(round)).value)
    }

    pub(in super::super) fn sqrt(a: f64, round: Round) -> f64 {
        let r = a.sqrt();
        if round == Round::Nearest || !r.is_finite() || r == 0.0 {
            return r;
        }
        // Scaled by an even power of two the residual cannot underflow; roots scale exactly.
        let scale = if a < 2f64.powi(-500) {
            2f64.powi(520)
        } else {
            1.0
        };
        let left = (-(r * scale.sqrt())).mul_add(r * scale.sqrt(), a * scale);
        match round {
            Round::Zero | Round::Down if left < 0.0 => r.next_down(),
            Round::Up if left > 0.0 => r.next_up(),
            _ => r,
        }
    }
}
