//! Launches the kernels of `cuda/norm.cu`.

use super::abi::{self, NormParams};
use super::launch::Launch;
use super::module::{Family, Kernels};
use super::view::{RowLayout, Rows, RowsMut, check_vector, count};
use super::{DeviceSlice, Stream, Work};
use crate::dtype::DType;
use crate::error::{Error, Result};

pub(super) const FAMILY: Family = Family {
    name: "norm",
    kernels: &[
        "rms_norm_f32",
        "rms_norm_f16",
        "rms_norm_bf16",
        "add_rms_norm_f32",
        "add_rms_norm_f16",
        "add_rms_norm_bf16",
    ],
};

/// Threads of a block for rows of `cols` elements of `dtype`: whole warps, two packs of 16 bytes a
/// thread where that is possible. It depends on the width and the type alone, and so do bits.
fn threads(cols: usize, dtype: DType) -> u32 {
    let packs = (cols * dtype.size()).div_ceil(16);
    let warp = abi::kWarpThreads as usize;
    let most = abi::kNormThreads as usize;
    packs.div_ceil(2).next_multiple_of(warp).clamp(warp, most) as u32
}

fn same_layout(what: &str, x: &Rows<'_>, out: &RowsMut<'_>) -> Result<()> {
    let (x, out) = (x.layout(), out.layout());
    if (x.rows, x.cols, x.dtype) == (out.rows, out.cols, out.dtype) {
        return Ok(());
    }
    Err(Error::shape(
        what,
        format!("[{}, {}] of {}", x.rows, x.cols, x.dtype),
        format!("[{}, {}] of {}", out.rows, out.cols, out.dtype),
    ))
}

/// `out = x / sqrt(mean(x²) + eps) * weight`, row by row: `[rows, cols]` both, of one type, and
/// `weight` `[cols]` in f32. Arithmetic is in f32 and rounds once to the type.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; [`Error::Driver`].
pub fn rms_norm(
    kernels: &Kernels,
    stream: &Stream,
    x: Rows<'_>,
    weight: DeviceSlice<'_>,
    eps: f32,
    out: RowsMut<'_>,
) -> Result<()> {
    launch(kernels, stream, "rms_norm", x, None, None, weight, eps, out)
}

/// `residual += x (+ bias)`, rounded to its type, then `out = rms_norm(residual)`: the bits of
/// the sum followed by [`rms_norm`]. All `[rows, cols]` of one type; `bias` and `weight` are
/// `[cols]` in f32.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; [`Error::Driver`].
#[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
pub fn add_rms_norm(
    kernels: &Kernels,
    stream: &Stream,
    x: Rows<'_>,
    bias: Option<DeviceSlice<'_>>,
    residual: RowsMut<'_>,
    weight: DeviceSlice<'_>,
    eps: f32,
    out: RowsMut<'_>,
) -> Result<()> {
    launch(
        kernels,
        stream,
        "add_rms_norm",
        x,
        bias,
        Some(residual),
        weight,
        eps,
        out,
    )
}

/// The floor of [`rms_norm`] of rows that lie so; with `adds`, of [`add_rms_norm`] without a bias:
/// each input read once and each output written once, weights once for all rows.
pub fn rms_norm_work(x: &RowLayout, adds: bool) -> Work {
    let (elements, weights) = ((x.rows * x.cols) as u64, 4 * x.cols as u64);
    Work {
        // The residual is read and written.
        bytes: x.payload() * if adds { 4 } else { 2 } + weights,
        // A square and its sum, two products, and the sum before.
        flops: elements * if adds { 5 } else { 4 },
    }
}

#[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
fn launch(
    kernels: &Kernels,
    stream: &Stream,
    operation: &str,
    x: Rows<'_>,
    bias: Option<DeviceSlice<'_>>,
    residual: Option<RowsMut<'_>>,
    weight: DeviceSlice<'_>,
    eps: f32,
    out: RowsMut<'_>,
) -> Result<()> {
    let layout = *x.layout();
    same_layout("the output of a norm", &x, &out)?;
    if let Some(residual) = &residual {
        same_layout("the residual of a norm", &x, residual)?;
    }
    check_vector("the weight of a norm", weight, layout.cols)?;
    if let Some(bias) = bias {
        check_vector("the bias of a norm", bias, layout.cols)?;
    }
    let rows = count("rows of a norm", layout.rows, i32::MAX as u32)?;
    // So that the kernel's indices, up to a whole block further, fit 32 bits.
    let cols = count("columns of a norm", layout.cols, 1 << 30)?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let vector = |v: DeviceSlice<'_>| v.address().is_multiple_of(16);
    let aligned = layout.is_aligned(x.address())
        && out.layout().is_aligned(out.address())
        && residual
            .as_ref()
            .is_none_or(|r| r.layout().is_aligned(r.address()))
        && vector(weight)
        && bias.is_none_or(vector);
    let params = NormParams {
        x: x.address() as *const _,
        bias: bias.map_or(0, |bias| bias.address()) as *const _,
        residual: residual.as_ref().map_or(0, |r| r.address()) as *mut _,
        weight: weight.address() as *const _,
        out: out.address() as *mut _,
        x_stride: layout.stride as u64,
        residual_stride: residual.as_ref().map_or(0, |r| r.layout().stride) as u64,
        out_stride: out.layout().stride as u64,
        rows,
        cols,
        eps,
        aligned: u32::from(aligned),
    };
    let kernel = kernels.get(&format!("{operation}_{}", layout.dtype))?;
    let shape = Launch::linear(rows, threads(layout.cols, layout.dtype));
    // SAFETY: the views have the bytes that the kernel reads and writes, as checked above, and
    // outputs are borrowed for it alone. One block a row, of whole warps.
    unsafe { stream.launch(kernel, shape, &params) }
}
