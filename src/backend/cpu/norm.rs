//! RMSNorm: `y = x / sqrt(mean(x²) + eps) * weight` (Zhang and Sennrich, 2019), with the
//! residual sum before it where there is one.

use super::simd::{LANES, Lanes, dispatch, reduce_add};

dispatch!(
    /// Normalises one row. With `residual`, first `residual += x (+ bias)` and the sum is
    /// what is normalised. All slices have the same length.
    pub(super) fn row = row_kernel(
        x: &[f32],
        bias: Option<&[f32]>,
        residual: Option<&mut [f32]>,
        weight: &[f32],
        eps: f32,
        out: &mut [f32],
    )
);

#[inline(always)]
unsafe fn row_kernel<V: Lanes>(
    x: &[f32],
    bias: Option<&[f32]>,
    residual: Option<&mut [f32]>,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let sum: &[f32] = match residual {
        None => x,
        Some(residual) => {
            if let Some(bias) = bias {
                for ((r, x), b) in residual.iter_mut().zip(x).zip(bias) {
                    *r += x + b;
                }
            } else {
                for (r, x) in residual.iter_mut().zip(x) {
                    *r += x;
                }
            }
            residual
        }
    };
    let scale = {
        // SAFETY: the loads stay within `sum`; the tail is padded on the stack.
        let squares = unsafe {
            let mut acc = V::splat(0.0);
            let (chunks, tail) = sum.as_chunks::<LANES>();
            for chunk in chunks {
                let v = V::load(chunk.as_ptr());
                acc = v.mul_add(v, acc);
            }
            let mut padded = [0.0; LANES];
            padded[..tail.len()].copy_from_slice(tail);
            let v = V::load(padded.as_ptr());
            reduce_add(v.mul_add(v, acc))
        };
        1.0 / (squares / sum.len() as f32 + eps).sqrt()
    };
    for ((out, x), weight) in out.iter_mut().zip(sum).zip(weight) {
        *out = x * scale * weight;
    }
}
