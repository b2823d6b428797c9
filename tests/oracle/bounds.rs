//! How far an f32 result may be from the f64 oracle: no tolerance is chosen, all are derived.
//!
//! The model of rounding (Higham, *Accuracy and Stability of Numerical Algorithms*, ch. 3):
//! an f32 operation returns the exact result times `1 + δ`, `|δ| <= u = 2^-24`, and a term
//! that passes through n of them is off by at most `γ(n) = n u / (1 - n u)` of itself. Tiny
//! results may underflow instead, which adds at most 2^-149 each: [`UNDERFLOW`] covers the
//! operations of one element. The oracle's own error (2^-53) is far below and left out.

use ringtp::DType;

use super::{Rows, attention, dot, linear, rms_norm, silu};

/// Half a unit in the last place of 1 in f32.
pub(crate) const U: f64 = 1.0 / (1 << 24) as f64;

/// More than 2^16 operations that underflow (2^-149 each) can add.
pub(crate) const UNDERFLOW: f64 = 1e-39;

/// `n u / (1 - n u)`
pub(crate) fn gamma(n: usize) -> f64 {
    let nu = n as f64 * U;
    nu / (1.0 - nu)
}

fn map(rows: &Rows, f: impl Fn(f64) -> f64) -> Rows {
    rows.iter()
        .map(|row| row.iter().map(|&value| f(value)).collect())
        .collect()
}

fn map2(a: &Rows, b: &Rows, f: impl Fn(f64, f64) -> f64) -> Rows {
    let pair = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect();
    a.iter().zip(b).map(pair).collect()
}

/// Of [`linear`]: a product passes through at most K fused operations and the bias's
/// addition, the bias through one: `γ(K + 1) (|x| |w|ᵀ + |bias|)`; without a bias `γ(K)`.
pub(crate) fn linear_error(x: &Rows, w: &Rows, bias: Option<&[f64]>) -> Rows {
    let k = w.first().map_or(0, Vec::len);
    let bias: Option<Vec<f64>> = bias.map(|bias| bias.iter().map(|b| b.abs()).collect());
    let steps = k + usize::from(bias.is_some());
    let sizes = linear(&map(x, f64::abs), &map(w, f64::abs), bias.as_deref());
    map(&sizes, |size| gamma(steps) * size + UNDERFLOW)
}

/// Of `silu(gate) * up`, where gate and up are known to within `gate_error`, `up_error`.
///
/// |silu'| <= 1.1, so the gate's error becomes at most 1.1 times itself. The exponential is
/// within 2 ulp (4 u), 1 + it and the quotient round once each: 4 u + u + u <= γ(7). (Beyond
/// e^88 it is held there, which leaves `|gate| e^-88` of what should vanish: far below u
/// times the gate.) The product multiplies two inexact factors and rounds once.
pub(crate) fn swiglu_error(gate: &Rows, gate_error: &Rows, up: &Rows, up_error: &Rows) -> Rows {
    swiglu_error_in(7, gate, gate_error, up, up_error)
}

/// As [`swiglu_error`], with a silu that is within `γ(steps)` of what it is given.
pub(crate) fn swiglu_error_in(
    steps: usize,
    gate: &Rows,
    gate_error: &Rows,
    up: &Rows,
    up_error: &Rows,
) -> Rows {
    let factor = map2(gate, gate_error, |gate, error| {
        let error = 1.1 * error;
        error + gamma(steps) * (silu(gate).abs() + error) + gate.abs() * (-88.0_f64).exp()
    });
    let greatest = |value: f64, error: f64| value.abs() + error;
    let products = map2(
        &map2(gate, &factor, |gate, error| greatest(silu(gate), error)),
        &map2(up, up_error, greatest),
        |gate, up| gate * up,
    );
    let exact = map2(gate, up, |gate, up| (silu(gate) * up).abs());
    map2(&products, &exact, |product, exact| {
        (product - exact) + U * product + UNDERFLOW
    })
}

/// Of a value that is known to within `error` and then rounded to `dtype`: half a unit in its
/// last place, which for f16 is at least half of its smallest number.
pub(crate) fn rounded_error(values: &Rows, errors: &Rows, dtype: DType) -> Rows {
    let (relative, least) = match dtype {
        DType::F32 => return errors.clone(),
        // Eight and eleven bits of significand: half a unit is at most 2^-8, or 2^-11, of it.
        DType::Bf16 => (2f64.powi(-8), 0.0),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
    };
    map2(values, errors, |value, error| {
        error + (relative * (value.abs() + error)).max(least)
    })
}

/// Of `a + b`, where a is known to within `a_error` and b exactly: one rounding of the sum.
pub(crate) fn add_error(a: &Rows, a_error: &Rows, b: &Rows) -> Rows {
    let sum = map2(a, b, |a, b| (a + b).abs());
    map2(&sum, a_error, |sum, error| {
        error + U * (sum + error) + UNDERFLOW
    })
}

/// Of [`rms_norm`]: a square passes through the fused operations of its lane (one a sixteen
/// columns, rounded up, and one for the tail) and four levels of the tree; then come the
/// division by n, the sum with eps, the root, its inverse, and two products. All terms of
/// the sum are positive, so that is relative to the result; the root halves it.
pub(crate) fn rms_norm_error(x: &Rows, weight: &[f64], eps: f64) -> Rows {
    let steps = x.first().map_or(0, Vec::len).div_ceil(16) + 1 + 4 + 6;
    map(&rms_norm(x, weight, eps), |value| {
        gamma(steps) * value.abs() + UNDERFLOW
    })
}

/// Of [`super::rotate`]: each of the two products and their sum rounds.
pub(crate) fn rotate_error(head: &[f64], cos: &[f64], sin: &[f64]) -> Vec<f64> {
    let half = head.len() / 2;
    let size = |i: usize, other: usize| {
        let angle = i % half;
        (head[i] * cos[angle]).abs() + (head[other] * sin[angle]).abs()
    };
    (0..head.len())
        .map(|i| gamma(2) * size(i, (i + half) % head.len()) + UNDERFLOW)
        .collect()
}

/// Of [`attention`] over n positions with heads of d.
///
/// - A score is off by at most `a_j = γ(d) |q| . |k_j|`.
/// - Softmax does not change when all scores shift, so the computed greatest score m may
///   stand for the exact one. The exponent `scale * (s_j - m)` then is off by
///   `scale a_j + γ(2) |scale (s_j - m)|`, where the computed `|s_j - m|` is at most the exact
///   range plus the errors of both scores.
/// - An exponential is within 2 ulp (4 u), or held at e^-87 where it should be less. So the
///   weight, before division, is off by a factor within `1 ± r_j` with
///   `r_j = e^(exponent's error) (1 + 4 u) - 1`, plus e^-87.
/// - Numerator and denominator are sums of n terms: γ(n) of the sum of their sizes. With p
///   the exact weights, `dN = sum p_j |v_j| ((1 + r_j)(1 + γ(n)) - 1) + e^-87 sum |v_j|` and
///   dD the same without v: their quotient is off by at most `(dN + |N| dD) / (1 - dD)`.
///   (e^-87 is relative to a greatest weight of 1, which p_j is divided by at least.)
/// - The division rounds once.
pub(crate) fn attention_error(
    query: &[f64],
    keys: &[Vec<f64>],
    values: &Rows,
    scale: f64,
) -> Vec<f64> {
    folded_attention_error(query, keys, values, scale, 0)
}

/// As [`attention_error`], where positions are taken in parts that are then folded, `folds` times,
/// into what came before: both sides are multiplied by `e^(scale * (own greatest - common
/// greatest))`, numerators and denominators alike.
///
/// A term takes part in at most `folds` of these: as many exponentials more (each within 4 u, or
/// less than e^-87 where it should be less), as many products and sums more. The greatest only
/// grows, so the exponents of a term add up to at most the range that `attention_error` has, each
/// within γ(2) of itself.
pub(crate) fn folded_attention_error(
    query: &[f64],
    keys: &[Vec<f64>],
    values: &Rows,
    scale: f64,
    folds: usize,
) -> Vec<f64> {
    let abs = |v: &[f64]| -> Vec<f64> { v.iter().map(|x| x.abs()).collect() };
    let (n, size) = (keys.len(), abs(query));
    let scores: Vec<f64> = keys.iter().map(|key| dot(query, key)).collect();
    let errors: Vec<f64> = keys
        .iter()
        .map(|key| gamma(query.len()) * dot(&size, &abs(key)) + UNDERFLOW)
        .collect();
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let worst = errors.iter().copied().fold(0.0, f64::max);
    let scaled: Vec<f64> = scores.iter().map(|score| scale * score).collect();
    let weights = super::softmax(&scaled);
    let held = (-87.0_f64).exp() * 1.001 * (1 + folds) as f64;
    let exponentials = (1.0 + 4.0 * U).powi(1 + folds as i32);
    let factors: Vec<f64> = (0..n)
        .map(|j| {
            let range = scale * (greatest - scores[j] + errors[j] + worst);
            let exponent = scale * errors[j] + gamma(2) * range;
            (exponent.exp() * exponentials) * (1.0 + gamma(n + 2 * folds)) - 1.0
        })
        .collect();
    let denominator = dot(&weights, &factors) + held * n as f64;
    let exact = attention(query, keys, values, scale);
    (0..exact.len())
        .map(|i| {
            let column: Vec<f64> = values.iter().map(|value| value[i].abs()).collect();
            let numerator: f64 = (0..n)
                .map(|j| column[j] * (weights[j] * factors[j] + held))
                .sum();
            let quotient = (numerator + exact[i].abs() * denominator) / (1.0 - denominator);
            quotient + U * (exact[i].abs() + quotient) + UNDERFLOW
        })
        .collect()
}
