//! Activations, and writing to them from several threads.

use crate::error::{Error, Fault, Result};

/// Activations `[rows, cols]`, dense f32.
#[derive(Clone, Debug, Default)]
pub struct CpuTensor {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
}

impl CpuTensor {
    /// Zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            data: vec![0.0; rows * cols],
            rows,
            cols,
        }
    }

    /// The rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Changes the number of rows; what they hold is unspecified.
    pub(super) fn set_rows(&mut self, rows: usize) -> Result<()> {
        // Elements that cannot be counted cannot be reserved either.
        let elements = rows.saturating_mul(self.cols);
        let more = elements.saturating_sub(self.data.len());
        self.data.try_reserve_exact(more).map_err(|error| {
            Error::OutOfMemory(Fault::new(
                "activations",
                format_args!("[{rows}, {}] elements", self.cols),
                error,
                "use smaller batches",
            ))
        })?;
        self.data.resize(elements, 0.0);
        self.rows = rows;
        Ok(())
    }

    /// Bytes of memory: those of the most rows that it ever had.
    pub(super) fn capacity_bytes(&self) -> usize {
        self.data.capacity() * size_of::<f32>()
    }

    /// The elements, row after row.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The elements, row after row.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    pub(super) fn shared(&mut self) -> SharedOut {
        SharedOut {
            start: self.data.as_mut_ptr(),
            len: self.data.len(),
        }
    }
}

/// An output that the tasks of one operation write, each its own elements.
#[derive(Clone, Copy)]
pub(super) struct SharedOut {
    start: *mut f32,
    len: usize,
}

// SAFETY: `write` demands that no two threads touch the same elements.
unsafe impl Send for SharedOut {}
// SAFETY: as above.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    /// Writes `values` at element `at`.
    ///
    /// # Safety
    /// The tensor this came from lives and is not otherwise used, and no other thread writes
    /// these elements.
    #[inline(always)]
    pub(super) unsafe fn write(self, at: usize, values: &[f32]) {
        assert!(
            at + values.len() <= self.len,
            "element {at} of {}",
            self.len
        );
        // SAFETY: within bounds by the check above; exclusive by the contract.
        unsafe {
            self.start
                .add(at)
                .copy_from_nonoverlapping(values.as_ptr(), values.len())
        };
    }

    /// The elements `at..at + len`, to write.
    ///
    /// # Safety
    /// As for [`Self::write`], for the lifetime of the slice.
    #[inline(always)]
    pub(super) unsafe fn slice_mut<'a>(self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(at + len <= self.len, "element {at} of {}", self.len);
        // SAFETY: within bounds by the check above; exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
