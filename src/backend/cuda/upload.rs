//! The way of weights from a checkpoint to the device: through two halves of pinned memory, one of
//! which is filled while the other is copied. So no tensor is in host memory twice, and the host
//! only waits where the device is slower.

use half::{bf16, f16};

use super::{CudaMatrix, DeviceBuffer, Event, Pinned, Stream};
use crate::backend::Layout;
use crate::dtype::DType;
use crate::error::Result;
use crate::host::HostMatrix;

/// Bytes of a half.
const HALF: usize = 2 << 20;

/// Pinned memory on the way to a device.
#[derive(Debug)]
pub(super) struct Staging {
    memory: Pinned<u8>,
    /// When each half has been copied.
    copied: [Event; 2],
    next: usize,
}

impl Staging {
    pub(super) fn new(stream: &Stream) -> Result<Self> {
        let context = stream.context();
        Ok(Self {
            memory: Pinned::zeros(context, 2 * HALF)?,
            copied: [Event::new(context)?, Event::new(context)?],
            next: 0,
        })
    }

    /// Fills `to`, rows of `row_bytes` bytes, with what `fill(row, bytes)` writes.
    fn copy_rows(
        &mut self,
        stream: &Stream,
        to: &mut DeviceBuffer,
        row_bytes: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        if 2 * row_bytes > self.memory.len() {
            self.drain()?;
            self.memory = Pinned::zeros(stream.context(), 2 * row_bytes)?;
        }
        let half = self.memory.len() / 2;
        let (rows, at_once) = (to.len() / row_bytes.max(1), half / row_bytes.max(1));
        for first in (0..rows).step_by(at_once) {
            let bytes = at_once.min(rows - first) * row_bytes;
            let which = self.next;
            self.next = 1 - which;
            self.copied[which].synchronize()?;
            // SAFETY: this half of the memory, which no copy reads any more, is borrowed with
            // `self`.
            let staged = unsafe {
                std::slice::from_raw_parts_mut(self.memory.as_ptr().add(which * half), bytes)
            };
            for (row, staged) in staged.chunks_exact_mut(row_bytes).enumerate() {
                fill(first + row, staged);
            }
            let from = self
                .memory
                .as_device()
                .range(which * half..which * half + bytes)?;
            let start = first * row_bytes;
            stream.copy(from.as_ref(), &mut to.as_mut().range(start..start + bytes)?)?;
            self.copied[which].record(stream)?;
        }
        Ok(())
    }

    /// Fills `matrix` with its parts, converted to its type (exactly, or to nearest even).
    pub(super) fn matrix(
        &mut self,
        stream: &Stream,
        matrix: &mut CudaMatrix,
        parts: &[HostMatrix<'_>],
    ) -> Result<()> {
        let (dtype, layout) = (matrix.rows.dtype, matrix.layout);
        let row_bytes = matrix.rows.stride * dtype.size();
        let payload = matrix.rows.cols * dtype.size();
        let mut wide = vec![0.0; matrix.rows.cols];
        self.copy_rows(stream, &mut matrix.buffer, row_bytes, |row, staged| {
            let (staged, gap) = staged.split_at_mut(payload);
            gap.fill(0);
            if let Some((part, index)) = source(parts, layout, row) {
                write_row(part, index, dtype, &mut wide, staged);
            }
        })
    }

    /// Waits until nothing is on the way.
    pub(super) fn drain(&self) -> Result<()> {
        self.copied.iter().try_for_each(Event::synchronize)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A context that is lost copies nothing any more.
        let _ = self.drain();
    }
}

/// The row of the parts that belongs in row `row` of the matrix.
fn source<'a, 'b>(
    parts: &'a [HostMatrix<'b>],
    layout: Layout,
    row: usize,
) -> Option<(&'a HostMatrix<'b>, usize)> {
    match layout {
        Layout::GateUp => Some((parts.get(row % 2)?, row / 2)),
        Layout::Rows => {
            let mut row = row;
            parts.iter().find_map(|part| {
                if row < part.rows() {
                    return Some((part, row));
                }
                row -= part.rows();
                None
            })
        }
    }
}

fn write_row(part: &HostMatrix<'_>, row: usize, dtype: DType, wide: &mut [f32], out: &mut [u8]) {
    if part.dtype() == dtype {
        out.copy_from_slice(part.row(row));
        return;
    }
    part.row_f32(row, wide);
    let elements = out.chunks_exact_mut(dtype.size());
    for (&value, out) in wide.iter().zip(elements) {
        match dtype {
            DType::F32 => out.copy_from_slice(&value.to_le_bytes()),
            DType::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            DType::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        }
    }
}
