//! Launches the kernels of `cuda/rows.cu`.

use super::abi::{self, RowsParams};
use super::launch::Launch;
use super::module::{Family, Kernels};
use super::view::{RowLayout, Rows, RowsMut, check_vector, count};
use super::{DeviceSlice, Stream, Work};
use crate::error::{Error, Result};

pub(super) const FAMILY: Family = Family {
    name: "rows",
    kernels: &[
        "gather_rows_b16",
        "gather_rows_b32",
        "add_bias_f32",
        "add_bias_f16",
        "add_bias_bf16",
    ],
};

/// Blocks over rows beyond which a block takes several.
const MAX_GRID_ROWS: u32 = 65_535;

fn launch_shape(rows: u32, layout: &RowLayout) -> Launch {
    let packs = (layout.cols * layout.dtype.size()).div_ceil(16);
    let blocks = packs.div_ceil(abi::kRowsThreads as usize);
    Launch {
        grid: [blocks as u32, rows.min(MAX_GRID_ROWS), 1],
        ..Launch::linear(1, abi::kRowsThreads)
    }
}

/// `out[i] = table[ids[i] - first_id]`, or zeros where the table has no such row; without `ids`,
/// `out[i] = table[i]`. `ids` are u32, one a row of `out`, `[rows, cols]`; the table is `[_,
/// cols]` of the same type. It is a part of a vocabulary (`first_id` its first id), or rows to
/// choose from.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; [`Error::Driver`].
pub fn gather_rows(
    kernels: &Kernels,
    stream: &Stream,
    table: Rows<'_>,
    ids: Option<DeviceSlice<'_>>,
    first_id: usize,
    out: RowsMut<'_>,
) -> Result<()> {
    let (from, to) = (*table.layout(), *out.layout());
    if (from.cols, from.dtype) != (to.cols, to.dtype) {
        return Err(Error::shape(
            "the output of a gather",
            format!("rows of {} {}", from.cols, from.dtype),
            format!("rows of {} {}", to.cols, to.dtype),
        ));
    }
    match ids {
        Some(ids) if ids.len() != 4 * to.rows || !ids.address().is_multiple_of(4) => {
            return Err(Error::shape(
                "the ids of a gather",
                format!("{} u32 at a multiple of 4", to.rows),
                format!("{} bytes at {:#x}", ids.len(), ids.address()),
            ));
        }
        None if from.rows < to.rows => {
            return Err(Error::shape(
                "the rows to copy",
                format!("at least {}", to.rows),
                from.rows,
            ));
        }
        _ => {}
    }
    let rows = count("rows of a gather", to.rows, i32::MAX as u32)?;
    let cols = count("columns of a gather", to.cols, 1 << 30)?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let params = RowsParams {
        table: table.address() as *const _,
        ids: ids.map_or(0, |ids| ids.address()) as *const _,
        out: out.address() as *mut _,
        table_stride: from.stride as u64,
        out_stride: to.stride as u64,
        first_id: first_id as u64,
        table_rows: from.rows as u64,
        rows,
        cols,
        aligned: u32::from(from.is_aligned(table.address()) && to.is_aligned(out.address())),
        pad: 0,
    };
    let kernel = kernels.get(&format!("gather_rows_b{}", 8 * to.dtype.size()))?;
    // SAFETY: the views have the bytes that the kernel reads and writes, as checked above; it reads
    // no row beyond the table's. The grid covers the output.
    unsafe { stream.launch(kernel, launch_shape(rows, &to), &params) }
}

/// The floor of [`gather_rows`]: every row read and written once, and its id.
pub fn gather_rows_work(out: &RowLayout) -> Work {
    Work {
        bytes: 2 * out.payload() + 4 * out.rows as u64,
        flops: 0,
    }
}

/// `x += bias`, row by row: `[rows, cols]`, rounded to its type, and `[cols]` in f32.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; [`Error::Driver`].
pub fn add_bias(
    kernels: &Kernels,
    stream: &Stream,
    bias: DeviceSlice<'_>,
    x: RowsMut<'_>,
) -> Result<()> {
    let layout = *x.layout();
    check_vector("the bias", bias, layout.cols)?;
    let rows = count("rows of a sum", layout.rows, i32::MAX as u32)?;
    let cols = count("columns of a sum", layout.cols, 1 << 30)?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let aligned = bias.address().is_multiple_of(16) && layout.is_aligned(x.address());
    let params = RowsParams {
        table: bias.address() as *const _,
        ids: std::ptr::null(),
        out: x.address() as *mut _,
        table_stride: 0,
        out_stride: layout.stride as u64,
        first_id: 0,
        table_rows: 1,
        rows,
        cols,
        aligned: aligned.into(),
        pad: 0,
    };
    let kernel = kernels.get(&format!("add_bias_{}", layout.dtype))?;
    // SAFETY: the views have the bytes that the kernel reads and writes, as checked above. The grid
    // covers the rows.
    unsafe { stream.launch(kernel, launch_shape(rows, &layout), &params) }
}
