//! Matrices in host memory, borrowed as a checkpoint has them.

use std::ops::Range;

use half::{bf16, f16};

use crate::dtype::DType;
use crate::error::{Error, Result};

/// A borrowed matrix `[rows, cols]` of little-endian elements, row-major, with a stride: a
/// whole tensor of a checkpoint or a slice of one. A vector is a matrix of one row.
///
/// The bytes need not be aligned to the element.
#[derive(Clone, Copy, Debug)]
pub struct HostMatrix<'a> {
    data: &'a [u8],
    dtype: DType,
    rows: usize,
    cols: usize,
    /// Elements from one row to the next.
    stride: usize,
}

impl<'a> HostMatrix<'a> {
    /// A dense matrix over `data`, which holds exactly `rows * cols` elements.
    pub fn new(data: &'a [u8], dtype: DType, rows: usize, cols: usize) -> Result<Self> {
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.size()));
        if bytes != Some(data.len()) {
            return Err(Error::shape(
                "HostMatrix::new",
                format_args!("[{rows}, {cols}] elements of {dtype}"),
                format_args!("{} bytes", data.len()),
            ));
        }
        Ok(Self {
            data,
            dtype,
            rows,
            cols,
            stride: cols,
        })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The part `[rows, cols]` of this matrix.
    pub fn slice(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Self> {
        let inside = rows.start <= rows.end
            && rows.end <= self.rows
            && cols.start <= cols.end
            && cols.end <= self.cols;
        if !inside {
            return Err(Error::shape(
                "HostMatrix::slice",
                format_args!("ranges within [{}, {}]", self.rows, self.cols),
                format_args!("{rows:?}, {cols:?}"),
            ));
        }
        let (count, width) = (rows.len(), cols.len());
        if count == 0 || width == 0 {
            return Ok(Self {
                data: &[],
                rows: count,
                cols: width,
                ..*self
            });
        }
        let first = rows.start * self.stride + cols.start;
        let last = (rows.end - 1) * self.stride + cols.end;
        let size = self.dtype.size();
        Ok(Self {
            data: &self.data[first * size..last * size],
            rows: count,
            cols: width,
            ..*self
        })
    }

    /// The bytes of row `row`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        assert!(
            row < self.rows,
            "row {row} of a matrix with {} rows",
            self.rows
        );
        let size = self.dtype.size();
        if self.cols == 0 {
            return &[];
        }
        &self.data[row * self.stride * size..][..self.cols * size]
    }

    /// Writes row `row` as f32, exactly, to `out[..cols]`.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) {
        let (bytes, out) = (self.row(row), &mut out[..self.cols]);
        match self.dtype {
            DType::F32 => widen::<4>(bytes, out, f32::from_le_bytes),
            DType::Bf16 => widen::<2>(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            DType::F16 => widen::<2>(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        }
    }
}

fn widen<const SIZE: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; SIZE]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = value(*bytes);
    }
}
