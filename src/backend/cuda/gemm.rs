//! Launches the kernels of `cuda/gemm.cu`.

use super::abi::{self, GemmParams};
use super::launch::Launch;
use super::module::{Family, Kernels};
use super::view::{RowLayout, Rows, RowsMut, check_vector, count};
use super::{DeviceSlice, Stream, Work};
use crate::dtype::DType;
use crate::error::{Error, Result};

pub(super) const FAMILY: Family = Family {
    name: "gemm",
    kernels: &[
        "gemm_few_f32",
        "gemm_few_f16",
        "gemm_few_bf16",
        "gemm_many_f32",
        "gemm_many_f16",
        "gemm_many_bf16",
    ],
};

/// Rows up to which a product streams its weights. A row's bits are the same in every batch on
/// the same side of it.
pub const GEMM_FEW_ROWS: usize = abi::kGemmFewRows as usize;

/// What a product ends in, in this order; each may be absent.
#[derive(Clone, Copy, Debug, Default)]
pub struct GemmEpilogue<'a> {
    /// `[rows of w]` in f32; with `gate_up` first all of the gate's, then all of the up's.
    pub bias: Option<DeviceSlice<'a>>,
    /// The rows of w alternate, gate and up, and the product is `silu(gate) * up`.
    pub gate_up: bool,
    /// Added last: of the output's shape and type.
    pub residual: Option<Rows<'a>>,
}

/// As [`gemm_batch_invariant`], for few rows by the faster kernel: the bits of a row are the same in
/// every batch on the same side of [`GEMM_FEW_ROWS`].
///
/// # Errors
/// As [`gemm_batch_invariant`].
pub fn gemm(
    kernels: &Kernels,
    stream: &Stream,
    x: Rows<'_>,
    w: Rows<'_>,
    epilogue: GemmEpilogue<'_>,
    out: RowsMut<'_>,
) -> Result<()> {
    let few = x.layout().rows <= GEMM_FEW_ROWS;
    product(kernels, stream, x, w, epilogue, out, few)
}

/// `out = x wᵀ` and the epilogue: `[rows, cols]` of x `[rows, depth]` and w `[cols, depth]`, or
/// `[rows, cols / 2]` with [`GemmEpilogue::gate_up`]. x and w are of one type, the output of that
/// type or f32. Sums and the epilogue are in f32 and round once. The bits of a row are the same in
/// every batch: it is the kernel for many rows, however few there are.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; [`Error::Driver`].
pub fn gemm_batch_invariant(
    kernels: &Kernels,
    stream: &Stream,
    x: Rows<'_>,
    w: Rows<'_>,
    epilogue: GemmEpilogue<'_>,
    out: RowsMut<'_>,
) -> Result<()> {
    product(kernels, stream, x, w, epilogue, out, false)
}

/// The product, by the kernel for `few` rows or for many.
fn product(
    kernels: &Kernels,
    stream: &Stream,
    x: Rows<'_>,
    w: Rows<'_>,
    epilogue: GemmEpilogue<'_>,
    out: RowsMut<'_>,
    few: bool,
) -> Result<()> {
    let (x_layout, w_layout, to) = (*x.layout(), *w.layout(), *out.layout());
    let width = check(&x_layout, &w_layout, epilogue.gate_up, &to)?;
    if let Some(bias) = epilogue.bias {
        check_vector("the bias of a product", bias, w_layout.rows)?;
    }
    if let Some(residual) = &epilogue.residual {
        let r = residual.layout();
        if (r.rows, r.cols, r.dtype) != (to.rows, to.cols, to.dtype) {
            return Err(Error::shape(
                "the residual of a product",
                format!("[{}, {}] of {}", to.rows, to.cols, to.dtype),
                format!("[{}, {}] of {}", r.rows, r.cols, r.dtype),
            ));
        }
    }
    // So that the kernels' indices, up to a whole tile further, fit 32 bits.
    let rows = count("rows of a product", x_layout.rows, 1 << 30)?;
    let cols = count("columns of a product", w_layout.rows, 1 << 30)?;
    let depth = count("summands of a product", x_layout.cols, 1 << 30)?;
    if rows == 0 || width == 0 {
        return Ok(());
    }
    let residual = epilogue.residual.as_ref();
    let aligned = |layout: &RowLayout, address| u32::from(layout.is_aligned(address));
    let params = GemmParams {
        x: x.address() as *const _,
        w: w.address() as *const _,
        bias: epilogue.bias.map_or(0, |bias| bias.address()) as *const _,
        residual: residual.map_or(0, Rows::address) as *const _,
        out: out.address() as *mut _,
        x_stride: x_layout.stride as u64,
        w_stride: w_layout.stride as u64,
        residual_stride: residual.map_or(0, |r| r.layout().stride) as u64,
        out_stride: to.stride as u64,
        rows,
        cols,
        depth,
        gate_up: epilogue.gate_up.into(),
        wide_out: u32::from(to.dtype != x_layout.dtype),
        x_aligned: aligned(&x_layout, x.address()),
        w_aligned: aligned(&w_layout, w.address()),
        out_aligned: aligned(&to, out.address())
            & residual.map_or(1, |r| aligned(r.layout(), r.address())),
    };
    let (kind, shape) = if few {
        let blocks = cols.div_ceil(abi::kGemmFewCols);
        ("few", Launch::linear(blocks, abi::kGemmFewThreads))
    } else {
        let tiles = [cols, rows].map(|n| n.div_ceil(abi::kGemmTile));
        let shape = Launch {
            grid: [tiles[0], tiles[1], 1],
            ..Launch::linear(1, abi::kGemmThreads)
        };
        ("many", shape)
    };
    let kernel = kernels.get(&format!("gemm_{kind}_{}", x_layout.dtype))?;
    // SAFETY: the views have the bytes that the kernel reads and writes, as checked above, and the
    // output is borrowed for it alone. The grid covers the output; the block is the kernel's.
    unsafe { stream.launch(kernel, shape, &params) }
}

/// The width of the product, if the operands fit each other.
fn check(x: &RowLayout, w: &RowLayout, gate_up: bool, out: &RowLayout) -> Result<usize> {
    if (w.cols, w.dtype) != (x.cols, x.dtype) {
        return Err(Error::shape(
            "the weights of a product",
            format!("rows of {} {}, as x has", x.cols, x.dtype),
            format!("rows of {} {}", w.cols, w.dtype),
        ));
    }
    if gate_up && !w.rows.is_multiple_of(2) {
        return Err(Error::shape(
            "the weights of a gated product",
            "an even number of rows, gate and up in turn",
            w.rows,
        ));
    }
    let width = if gate_up { w.rows / 2 } else { w.rows };
    let typed = out.dtype == x.dtype || out.dtype == DType::F32;
    if (out.rows, out.cols) != (x.rows, width) || !typed {
        let or_f32 = if x.dtype == DType::F32 { "" } else { " or f32" };
        return Err(Error::shape(
            "the output of a product",
            format!("[{}, {width}] of {}{or_f32}", x.rows, x.dtype),
            format!("[{}, {}] of {}", out.rows, out.cols, out.dtype),
        ));
    }
    Ok(width)
}

/// The floor of [`gemm`] without its epilogue's vectors: two operations for each element of `w`
/// and row of `x`, each operand read once and the output written once.
pub fn gemm_work(x: &RowLayout, w: &RowLayout, out: &RowLayout) -> Work {
    Work {
        flops: 2 * x.rows as u64 * w.rows as u64 * w.cols as u64,
        bytes: [x, w, out].iter().map(|l| l.payload()).sum(),
    }
}
