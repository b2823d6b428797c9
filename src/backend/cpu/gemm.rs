//! The matrix product: `out = epilogue(x Wᵀ)`, f32 accumulation.
//!
//! A tile is some rows of x by one panel of W (32 lanes: two vectors a row), with its
//! accumulators in registers: one fused multiply-add an element and column, in the order of
//! the columns. For many rows K goes in blocks: a block of the panel is widened once into
//! the first-level cache, used by every tile, and the accumulators wait in memory between
//! blocks, which changes no bit. So a row's bits depend neither on the tile it fell into, nor
//! on how the panels were shared out among threads.
//!
//! Floors: few rows read the weights once, as a stream, and ask for what comes [`AHEAD`] of
//! use; many rows run 24 (AVX-512: 12 rows by two vectors) fused operations against two
//! weight loads, while the next block is asked for.

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
    pub(super) fn panels = panels_kernel(product: &Product<'_>, first: usize, end: usize)
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

/// Rows from which K goes in blocks: from here on computing takes longer than reading.
const MANY: usize = 12;

/// Rows whose accumulators wait on the stack between blocks of K.
const ROW_BLOCK: usize = 144;

/// Columns of a block of K: its weights (24 KiB) and a tile's part of x share the first level.
const K_BLOCK: usize = 192;

/// Bytes between a weight being asked for and being used.
const AHEAD: usize = 4096;

const LINE: usize = 64;

/// A value for each element of a panel's column: the accumulators of a row, or a column widened.
type Sums = [f32; 2 * LANES];

#[inline(always)]
unsafe fn typed<V: Lanes, W: Stored>(product: &Product<'_>, first: usize, end: usize) {
    // SAFETY: the callees stay within the panel and the rows that they are given.
    unsafe {
        for panel in first..end {
            if product.rows < MANY {
                few_rows::<V, W>(product, panel);
            } else {
                for row in (0..product.rows).step_by(ROW_BLOCK) {
                    let rows = ROW_BLOCK.min(product.rows - row);
                    many_rows::<V, W>(product, panel, row, rows);
                }
            }
        }
    }
}

/// Calls `$tile::<.., R>(row)` for whole tiles, then ever smaller ones, until all rows are done.
macro_rules! for_tiles {
    ($V:ident, $rows:expr, |$row:ident, $R:ident| $tile:expr) => {
        let mut $row = 0;
        while $row < $rows {
            let wide = $V::TILE_ROWS >= 12;
            $row += match $rows - $row {
                n if n >= 12 && wide => {
                    const $R: usize = 12;
                    $tile;
                    $R
                }
                n if n >= 8 && wide => {
                    const $R: usize = 8;
                    $tile;
                    $R
                }
                n if n >= 4 && wide => {
                    const $R: usize = 4;
                    $tile;
                    $R
                }
                n if n >= 2 => {
                    const $R: usize = 2;
                    $tile;
                    $R
                }
                _ => {
                    const $R: usize = 1;
                    $tile;
                    $R
                }
            };
        }
    };
}

/// All of K at once, straight from memory.
#[inline(always)]
unsafe fn few_rows<V: Lanes, W: Stored>(product: &Product<'_>, panel: usize) {
    let k = product.w.cols();
    let weights = panel_bytes(product, panel);
    // SAFETY: a panel is k columns of 32 elements; x has `rows` rows of k.
    unsafe {
        for_tiles!(V, product.rows, |row, R| {
            let x = product.x[row * k..(row + R) * k].as_ptr();
            let mut acc = [[V::splat(0.0); 2]; R];
            for column in 0..k {
                let at = column * 2 * LANES * W::DTYPE.size();
                // An address only: what lies there need not be ours.
                V::prefetch(weights.as_ptr().wrapping_add(at + AHEAD));
                if W::DTYPE.size() == 4 {
                    V::prefetch(weights.as_ptr().wrapping_add(at + AHEAD + LINE));
                }
                let (first, second) = W::load_pair::<V>(weights.as_ptr().add(at).cast());
                multiply_add(&mut acc, x.add(column), k, first, second);
            }
            for (r, acc) in acc.into_iter().enumerate() {
                let mut sums: Sums = [0.0; 2 * LANES];
                acc[0].store(sums.as_mut_ptr());
                acc[1].store(sums.as_mut_ptr().add(LANES));
                epilogue(V::ISA, product, panel, row + r, &sums);
            }
        });
    }
}

/// `rows` rows from `first_row` on, at most [`ROW_BLOCK`].
#[inline(always)]
unsafe fn many_rows<V: Lanes, W: Stored>(
    product: &Product<'_>,
    panel: usize,
    first_row: usize,
    rows: usize,
) {
    let k = product.w.cols();
    let weights = panel_bytes(product, panel);
    let x = &product.x[first_row * k..(first_row + rows) * k];
    let mut sums: [Sums; ROW_BLOCK] = [[0.0; 2 * LANES]; ROW_BLOCK];
    let mut block: [Sums; K_BLOCK] = [[0.0; 2 * LANES]; K_BLOCK];
    // SAFETY: a panel is k columns of 32 elements.
    unsafe {
        for start in (0..k).step_by(K_BLOCK) {
            let columns = K_BLOCK.min(k - start);
            let bytes = 2 * LANES * W::DTYPE.size();
            let from = weights.as_ptr().add(start * bytes);
            for (column, out) in block[..columns].iter_mut().enumerate() {
                let (first, second) = W::load_pair::<V>(from.add(column * bytes).cast());
                first.store(out.as_mut_ptr());
                second.store(out.as_mut_ptr().add(LANES));
            }
            // The next block (of this panel, or the next one's first) comes while the tiles
            // compute.
            let next = Next {
                address: from.wrapping_add(columns * bytes),
                bytes: K_BLOCK * bytes,
            };
            let x = &x[start..];
            multiply_block(V::ISA, &block[..columns], x, k, &mut sums[..rows], next);
        }
    }
    for (row, sums) in sums[..rows].iter().enumerate() {
        epilogue(V::ISA, product, panel, first_row + row, sums);
    }
}

/// What will be read next.
#[derive(Clone, Copy)]
struct Next {
    address: *const u8,
    bytes: usize,
}

dispatch!(
    /// Adds to each row's sums its part of x times the block. Rows of x are `stride` apart; `next` is
    /// asked for, one line a column, until all of it was.
    fn multiply_block = multiply_block_kernel(
        block: &[Sums],
        x: &[f32],
        stride: usize,
        sums: &mut [Sums],
        next: Next,
    )
);

#[inline(always)]
unsafe fn multiply_block_kernel<V: Lanes>(
    block: &[Sums],
    x: &[f32],
    stride: usize,
    sums: &mut [Sums],
    next: Next,
) {
    let mut asked = 0;
    // SAFETY: x has, for each of `sums`, as many columns as the block.
    unsafe {
        for_tiles!(V, sums.len(), |row, R| {
            let x = x[row * stride..].as_ptr();
            let sums = &mut sums[row..row + R];
            let mut acc = [[V::splat(0.0); 2]; R];
            for (acc, sums) in acc.iter_mut().zip(sums.iter()) {
                *acc = [V::load(sums.as_ptr()), V::load(sums.as_ptr().add(LANES))];
            }
            let ask = asked < next.bytes;
            for (column, w) in block.iter().enumerate() {
                if ask {
                    V::prefetch(next.address.wrapping_add(asked + column * LINE));
                }
                let (first, second) = (V::load(w.as_ptr()), V::load(w.as_ptr().add(LANES)));
                multiply_add(&mut acc, x.add(column), stride, first, second);
            }
            asked += block.len() * LINE;
            for (acc, sums) in acc.into_iter().zip(sums) {
                acc[0].store(sums.as_mut_ptr());
                acc[1].store(sums.as_mut_ptr().add(LANES));
            }
        });
    }
}

fn panel_bytes<'a>(product: &Product<'a>, panel: usize) -> &'a [u8] {
    let bytes = product.w.cols() * 2 * LANES * product.w.dtype().size();
    &product.w.packed()[panel * bytes..][..bytes]
}

/// One column: `acc[r] += x[r] * w`, with x's rows `stride` apart.
#[inline(always)]
unsafe fn multiply_add<V: Lanes, const R: usize>(
    acc: &mut [[V; 2]; R],
    x: *const f32,
    stride: usize,
    first: V,
    second: V,
) {
    for (r, acc) in acc.iter_mut().enumerate() {
        // SAFETY: the caller vouches for R rows of x.
        unsafe {
            let x = V::splat(*x.add(r * stride));
            acc[0] = x.mul_add(first, acc[0]);
            acc[1] = x.mul_add(second, acc[1]);
        }
    }
}

dispatch!(
    /// Bias, SwiGLU, residual; then stores the columns that exist.
    fn epilogue = epilogue_kernel(product: &Product<'_>, panel: usize, row: usize, sums: &Sums)
);

#[inline(always)]
unsafe fn epilogue_kernel<V: Lanes>(product: &Product<'_>, panel: usize, row: usize, sums: &Sums) {
    let (w, cols) = (product.w, product.w.out_cols());
    let first_col = panel * w.panel_cols();
    let width = (cols - first_col).min(w.panel_cols());
    // SAFETY: the stack buffers have two vectors of lanes; the output has `cols` columns,
    // and this tile is the only writer of these.
    unsafe {
        let mut values = [0.0_f32; 2 * LANES];
        let (mut first, mut second) = (V::load(sums.as_ptr()), V::load(sums.as_ptr().add(LANES)));
        match w.layout() {
            Layout::Rows => {
                if let Some(bias) = product.bias {
                    values[..width].copy_from_slice(&bias[first_col..first_col + width]);
                    first = first.add(V::load(values.as_ptr()));
                    second = second.add(V::load(values.as_ptr().add(LANES)));
                }
                first.store(values.as_mut_ptr());
                second.store(values.as_mut_ptr().add(LANES));
            }
            Layout::GateUp => {
                if let Some(bias) = product.bias {
                    let (gate_bias, up_bias) = bias.split_at(cols);
                    values[..width].copy_from_slice(&gate_bias[first_col..first_col + width]);
                    first = first.add(V::load(values.as_ptr()));
                    values[..width].copy_from_slice(&up_bias[first_col..first_col + width]);
                    second = second.add(V::load(values.as_ptr()));
                }
                silu(first).mul(second).store(values.as_mut_ptr());
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
