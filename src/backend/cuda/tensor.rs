//! What a [`CudaBackend`](super::CudaBackend) gives a model: activations and weights.

use std::ops::Range;

use super::view::{RowLayout, Rows, RowsMut};
use super::{DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut, Stream};
use crate::backend::Layout;
use crate::dtype::DType;
use crate::error::{Error, Fault, Result};

/// Activations `[rows, cols]` in device memory, without gaps.
#[derive(Debug)]
pub struct CudaTensor {
    buffer: DeviceBuffer,
    layout: RowLayout,
}

impl CudaTensor {
    /// Zeros; `stream` writes them.
    pub(super) fn zeros(
        pool: &DevicePool,
        stream: &Stream,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let layout = RowLayout::contiguous(dtype, rows, cols);
        let bytes = bytes_of("activations", &layout)?;
        let buffer = pool.zeros(bytes, stream);
        let buffer = buffer.map_err(|e| out_of_memory(e, "activations", &layout, pool))?;
        Ok(Self { buffer, layout })
    }

    /// Changes the number of rows; what they hold is unspecified.
    pub(super) fn set_rows(&mut self, pool: &DevicePool, rows: usize) -> Result<()> {
        let layout = RowLayout {
            rows,
            ..self.layout
        };
        let bytes = bytes_of("activations", &layout)?;
        if bytes > self.buffer.len() {
            let buffer = pool.buffer(bytes);
            self.buffer = buffer.map_err(|e| out_of_memory(e, "activations", &layout, pool))?;
        }
        self.layout = layout;
        Ok(())
    }

    /// How the rows lie.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }

    fn range(&self) -> Range<usize> {
        // Checked where the buffer was made.
        0..self.layout.bytes().unwrap_or(usize::MAX)
    }

    /// Its bytes, to read.
    pub fn as_ref(&self) -> Result<DeviceSlice<'_>> {
        self.buffer.as_ref().range(self.range())
    }

    /// Its bytes, to write.
    pub fn as_mut(&mut self) -> Result<DeviceSliceMut<'_>> {
        let range = self.range();
        self.buffer.as_mut().range(range)
    }

    /// Its rows, to read.
    pub fn rows(&self) -> Result<Rows<'_>> {
        Rows::new(self.as_ref()?, self.layout)
    }

    /// Its rows, to write.
    pub fn rows_mut(&mut self) -> Result<RowsMut<'_>> {
        let layout = self.layout;
        RowsMut::new(self.as_mut()?, layout)
    }

    /// How these rows of it lie, and in which of its bytes.
    fn part_of(&self, rows: Range<usize>) -> (RowLayout, Range<usize>) {
        let row = self.layout.cols * self.layout.dtype.size();
        let bytes = |rows: usize| rows.saturating_mul(row);
        let layout = RowLayout {
            rows: rows.len(),
            ..self.layout
        };
        (layout, bytes(rows.start)..bytes(rows.end))
    }

    /// These rows of it, to read.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are not all within.
    pub fn part(&self, rows: Range<usize>) -> Result<Rows<'_>> {
        let (layout, bytes) = self.part_of(rows);
        Rows::new(self.as_ref()?.range(bytes)?, layout)
    }

    /// These rows of it, to write.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are not all within.
    pub fn part_mut(&mut self, rows: Range<usize>) -> Result<RowsMut<'_>> {
        let (layout, bytes) = self.part_of(rows);
        RowsMut::new(self.as_mut()?.range(bytes)?, layout)
    }
}

/// A weight matrix `[rows, cols]` in device memory, as checkpoints have it: row after row, each at
/// a multiple of 16 bytes. With [`Layout::GateUp`] gate and up rows alternate.
#[derive(Debug)]
pub struct CudaMatrix {
    pub(super) buffer: DeviceBuffer,
    pub(super) rows: RowLayout,
    pub(super) layout: Layout,
}

impl CudaMatrix {
    /// Memory for a matrix, to be filled.
    pub(super) fn new(
        pool: &DevicePool,
        layout: Layout,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let rows = RowLayout {
            // Rows that cannot be padded have no memory either.
            stride: cols
                .checked_next_multiple_of(16 / dtype.size())
                .unwrap_or(cols),
            ..RowLayout::contiguous(dtype, rows, cols)
        };
        // The gaps too, so that rows can be copied many at a time.
        let all = RowLayout {
            cols: rows.stride,
            ..rows
        };
        let buffer = pool.buffer(bytes_of("weights", &all)?);
        Ok(Self {
            buffer: buffer.map_err(|e| out_of_memory(e, "weights", &all, pool))?,
            rows,
            layout,
        })
    }

    /// How the rows lie.
    pub fn rows(&self) -> &RowLayout {
        &self.rows
    }

    /// Placement of the rows.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes of device memory, gaps included.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// The rows, to read.
    pub fn view(&self) -> Result<Rows<'_>> {
        Rows::new(self.buffer.as_ref(), self.rows)
    }
}

fn bytes_of(what: &str, layout: &RowLayout) -> Result<usize> {
    layout.bytes().ok_or_else(|| {
        Error::OutOfMemory(Fault::new(
            what,
            "a size in memory",
            format_args!("[{}, {}] of {}", layout.rows, layout.cols, layout.dtype),
            "use smaller sizes or more ranks",
        ))
    })
}

/// An allocation that failed, with the arithmetic: what it was for, and what there is.
pub(super) fn out_of_memory(
    error: Error,
    what: &str,
    layout: &RowLayout,
    pool: &DevicePool,
) -> Error {
    let Error::OutOfMemory(_) = error else {
        return error;
    };
    let device = pool.context().ordinal();
    let found = match pool.context().memory() {
        Ok((free, total)) => format!("{free} bytes free of {total}"),
        Err(_) => "less than that free".to_owned(),
    };
    Error::OutOfMemory(Fault::new(
        format_args!("{what} on CUDA device {device}"),
        format_args!(
            "[{}, {}] of {}: {} bytes in one piece",
            layout.rows,
            layout.cols,
            layout.dtype,
            layout.bytes().unwrap_or(usize::MAX)
        ),
        found,
        "use smaller sizes, a narrower dtype or more ranks, or free memory on the device",
    ))
}
