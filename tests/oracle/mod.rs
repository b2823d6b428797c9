//! The operations of a model in f64, as loops that can be checked by eye, and beside each the
//! bound on what f32 arithmetic may differ from it ([`bounds`]).
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::needless_range_loop, reason = "formulas have indices")]

pub(crate) mod bounds;
pub(crate) mod compare;
pub(crate) mod cpu;
pub(crate) mod paged;
pub(crate) mod random;

/// `[rows][cols]`
pub(crate) type Rows = Vec<Vec<f64>>;

/// `x wᵀ (+ bias)`: `[rows][n]` of x `[rows][k]` and w `[n][k]`.
pub(crate) fn linear(x: &Rows, w: &Rows, bias: Option<&[f64]>) -> Rows {
    let mut out = vec![vec![0.0; w.len()]; x.len()];
    for row in 0..x.len() {
        for n in 0..w.len() {
            for k in 0..w[n].len() {
                out[row][n] += x[row][k] * w[n][k];
            }
            if let Some(bias) = bias {
                out[row][n] += bias[n];
            }
        }
    }
    out
}

/// `x / (1 + e^-x)`
pub(crate) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `silu(gate) * up`
pub(crate) fn swiglu(gate: &Rows, up: &Rows) -> Rows {
    let mut out = gate.clone();
    for row in 0..gate.len() {
        for n in 0..gate[row].len() {
            out[row][n] = silu(gate[row][n]) * up[row][n];
        }
    }
    out
}

/// `a + b`
pub(crate) fn add(a: &Rows, b: &Rows) -> Rows {
    let mut out = a.clone();
    for row in 0..a.len() {
        for n in 0..a[row].len() {
            out[row][n] += b[row][n];
        }
    }
    out
}

/// `x / sqrt(mean(x²) + eps) * weight`, row by row.
pub(crate) fn rms_norm(x: &Rows, weight: &[f64], eps: f64) -> Rows {
    let mut out = x.clone();
    for row in 0..x.len() {
        let mut squares = 0.0;
        for &value in &x[row] {
            squares += value * value;
        }
        let rms = (squares / x[row].len() as f64 + eps).sqrt();
        for n in 0..x[row].len() {
            out[row][n] = x[row][n] / rms * weight[n];
        }
    }
    out
}

/// One head, its pairs (i, i + d/2) turned by the angles with these cosines and sines.
pub(crate) fn rotate(head: &[f64], cos: &[f64], sin: &[f64]) -> Vec<f64> {
    let half = head.len() / 2;
    let mut out = head.to_vec();
    for i in 0..half {
        out[i] = head[i] * cos[i] - head[i + half] * sin[i];
        out[i + half] = head[i + half] * cos[i] + head[i] * sin[i];
    }
    out
}

/// `e^score / sum of e^score`
pub(crate) fn softmax(scores: &[f64]) -> Vec<f64> {
    let mut greatest = f64::NEG_INFINITY;
    for &score in scores {
        greatest = greatest.max(score);
    }
    let mut sum = 0.0;
    for &score in scores {
        sum += (score - greatest).exp();
    }
    let mut out = Vec::new();
    for &score in scores {
        out.push((score - greatest).exp() / sum);
    }
    out
}

/// `a . b`
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sum = 0.0;
    for i in 0..a.len() {
        sum += a[i] * b[i];
    }
    sum
}

/// `softmax(scale * q kᵀ) v` of one query head over the entries of one KV head, all of them:
/// the caller passes positions `0..=p` for the row at position p.
pub(crate) fn attention(query: &[f64], keys: &[Vec<f64>], values: &Rows, scale: f64) -> Vec<f64> {
    let mut scores = Vec::new();
    for key in keys {
        scores.push(scale * dot(query, key));
    }
    let weights = softmax(&scores);
    let mut out = vec![0.0; values[0].len()];
    for position in 0..values.len() {
        for i in 0..out.len() {
            out[i] += weights[position] * values[position][i];
        }
    }
    out
}

/// The KV head of query head `head`.
pub(crate) fn kv_head(head: usize, q_heads: usize, kv_heads: usize) -> usize {
    head / (q_heads / kv_heads)
}

/// `table[id - first_id]`, zeros where the id is not in the table.
pub(crate) fn embedding(table: &Rows, cols: usize, ids: &[u32], first_id: usize) -> Rows {
    let mut out = Vec::new();
    for &id in ids {
        let id = id as usize;
        if id >= first_id && id - first_id < table.len() {
            out.push(table[id - first_id].clone());
        } else {
            out.push(vec![0.0; cols]);
        }
    }
    out
}
