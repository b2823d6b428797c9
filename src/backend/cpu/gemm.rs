//! The matrix product: `out = epilogue(x Wᵀ)`, f32 accumulation.
//!
//! A tile is some rows of x by one panel of W (32 lanes: two vectors a row). Its
//! accumulators stay in registers over the whole of K, one fused multiply-add an element and
//! column, in the order of the columns. So a row's bits depend neither on the tile it fell
//! into, nor on how the panels were shared out among threads.
//!
//! Floors: one row reads the weights once, as a stream; many rows run 24 (AVX-512: 12 rows
//! by two vectors) fused operations against two weight loads.

use super::matrix::CpuMatrix;
use super::simd::{LANES, Lanes, dispatch, exp};
use super::stored::{Bf16, F16, F32, Stored};
use super::tensor::SharedOut;
use crate::backend::Layout;
use crate::dtype::DType;

/// The operands of a product; [`super::CpuBackend`] has checked their shapes.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    /// `[rows, w.cols()]`, dense.
    pub(super) x: &'a [f32],
    pub(super) rows: usize,
    pub(super) w: &'a CpuMatrix,
    /// One a row of `w`, in its order (gate, then up).
    pub(super) bias: Option<&'a [f32]>,
    /// `[rows, w.out_cols()]`, added last.
    pub(super) residual: Option<&'a [f32]>,
    /// `[rows, w.out_cols()]`.
    pub(super) out: SharedOut,
}

dispatch!(
    /// Computes the output columns of panels `first..end`.
    fn panels = panels_kernel(product: &Product<'_>, first: usize, end: usize)
);

#[inline(always)]
unsafe fn panels_kernel<V: Lanes>(product: &Product<'_>, first: usize, end: usize) {
    // SAFETY: as for the callee.
    unsafe {
        match product.w.dtype() {
            DType::F32 => typed::<V, F32>(product, first, end),
            DType::Bf16 => typed::<V, Bf16>(product, first, end),
            DType::F16 => typed::<V, F16>(product, first, end),
        }
    }
}

#[inline(always)]
unsafe fn typed<V: Lanes, W: Stored>(product: &Product<'_>, first: usize, end: usize) {
    for panel in first..end {
        let mut row = 0;
        // Whole tiles, then ever smaller ones for the rest.
        // SAFETY: `row + R <= rows` in each arm.
        unsafe {
            while row < product.rows {
                row += match product.rows - row {
                    n if n >= 12 && V::TILE_ROWS >= 12 => tile::<V, W, 12>(product, panel, row),
                    n if n >= 8 && V::TILE_ROWS >= 12 => tile::<V, W, 8>(product, panel, row),
                    n if n >= 4 && V::TILE_ROWS >= 12 => tile::<V, W, 4>(product, panel, row),
                    n if n >= 2 => tile::<V, W, 2>(product, panel, row),
                    _ => tile::<V, W, 1>(product, panel, row),
                };
            }
        }
    }
}

/// Computes rows `row..row + R` of one panel; returns R.
#[inline(always)]
unsafe fn tile<V: Lanes, W: Stored, const R: usize>(
    product: &Product<'_>,
    panel: usize,
    row: usize,
) -> usize {
    let k = product.w.cols();
    let panel_bytes = k * 2 * LANES * W::DTYPE.size();
    let weights = &product.w.packed()[panel * panel_bytes..][..panel_bytes];
    let x = &product.x[row * k..(row + R) * k];
    // SAFETY: `weights` has k columns of 32 elements, `x` has R rows of k.
    unsafe {
        let mut acc = [[V::splat(0.0); 2]; R];
        let (mut w, x) = (weights.as_ptr().cast::<W::Word>(), x.as_ptr());
        for column in 0..k {
            let (first, second) = W::load_pair::<V>(w);
            w = w.add(2 * LANES);
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*x.add(r * k + column));
                acc[0] = x.mul_add(first, acc[0]);
                acc[1] = x.mul_add(second, acc[1]);
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            epilogue(product, panel, row + r, acc);
        }
    }
    R
}

/// Bias, SwiGLU, residual; then stores the columns that exist.
#[inline(always)]
unsafe fn epilogue<V: Lanes>(product: &Product<'_>, panel: usize, row: usize, acc: [V; 2]) {
    let (w, cols) = (product.w, product.w.out_cols());
    let first_col = panel * w.panel_cols();
    let width = (cols - first_col).min(w.panel_cols());
    // SAFETY: the stack buffers have two vectors of lanes; the output has `cols` columns,
    // and this tile is the only writer of these.
    unsafe {
        let mut values = [0.0_f32; 2 * LANES];
        match w.layout() {
            Layout::Rows => {
                let [mut first, mut second] = acc;
                if let Some(bias) = product.bias {
                    values[..width].copy_from_slice(&bias[first_col..first_col + width]);
                    first = first.add(V::load(values.as_ptr()));
                    second = second.add(V::load(values.as_ptr().add(LANES)));
                }
                first.store(values.as_mut_ptr());
                second.store(values.as_mut_ptr().add(LANES));
            }
            Layout::GateUp => {
                let [mut gate, mut up] = acc;
                if let Some(bias) = product.bias {
                    let (gate_bias, up_bias) = bias.split_at(cols);
                    values[..width].copy_from_slice(&gate_bias[first_col..first_col + width]);
                    gate = gate.add(V::load(values.as_ptr()));
                    values[..width].copy_from_slice(&up_bias[first_col..first_col + width]);
                    up = up.add(V::load(values.as_ptr()));
                }
                silu(gate).mul(up).store(values.as_mut_ptr());
            }
        }
        let at = row * cols + first_col;
        if let Some(residual) = product.residual {
            for (value, residual) in values.iter_mut().zip(&residual[at..at + width]) {
                *value += residual;
            }
        }
        product.out.write(at, &values[..width]);
    }
}

/// x / (1 + e^-x).
#[inline(always)]
unsafe fn silu<V: Lanes>(x: V) -> V {
    // SAFETY: the caller runs on the processor that V is for.
    unsafe { x.div(V::splat(1.0).add(exp(x.mul(V::splat(-1.0))))) }
}
