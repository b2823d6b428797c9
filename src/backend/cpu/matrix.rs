//! Weights, packed for the matrix product.

use half::{bf16, f16};
use rayon::prelude::*;

use super::memory::Memory;
use super::simd::LANES;
use crate::backend::Layout;
use crate::dtype::DType;
use crate::error::Result;
use crate::host::HostMatrix;

/// Rows of a panel.
pub(super) const PANEL: usize = 2 * LANES;

/// A weight matrix `[rows, cols]` (`y = x Wᵀ`) in panels of 32 rows: a panel holds, for each
/// column in turn, its 32 elements side by side. So a product reads its weights as one
/// stream, a vector lane is an output column, and an element is summed over the columns in
/// their order, whatever the number of rows of x: the contract on the order of K.
///
/// A panel is two vectors, `first` and `second`. With [`Layout::Rows`] they are rows
/// `32 p..` and `32 p + 16..`; with [`Layout::GateUp`] they are rows `16 p..` of the gate
/// and of the up projection, so that SwiGLU is done on registers. In bf16 the two vectors
/// alternate element by element: a shift and a mask then widen both. Missing rows of the
/// last panel are zero.
#[derive(Debug)]
pub struct CpuMatrix {
    memory: Memory,
    rows: usize,
    cols: usize,
    dtype: DType,
    layout: Layout,
}

impl CpuMatrix {
    /// Packs `parts`, stacked by rows, converting to `dtype` (exactly, or to nearest even).
    pub(super) fn pack(parts: &[HostMatrix<'_>], layout: Layout, dtype: DType) -> Result<Self> {
        let (rows, cols) = layout.stacked(parts)?;
        let panels = match layout {
            Layout::Rows => rows.div_ceil(PANEL),
            Layout::GateUp => (rows / 2).div_ceil(LANES),
        };
        // A matrix of no rows may claim any width; one that has rows has it in memory.
        let panel_bytes = if panels == 0 {
            0
        } else {
            cols * PANEL * dtype.size()
        };
        let mut memory = Memory::huge(panels * panel_bytes, "weights")?;
        if panel_bytes > 0 {
            memory
                .bytes_mut()
                .par_chunks_mut(panel_bytes)
                .enumerate()
                .for_each_init(
                    || vec![0.0; cols],
                    |row, (panel, out)| {
                        for slot in 0..PANEL {
                            if let Some((part, index)) = source(parts, layout, panel, slot) {
                                part.row_f32(index, row);
                                scatter(row, out, slot, dtype);
                            }
                        }
                    },
                );
        }
        Ok(Self {
            memory,
            rows,
            cols,
            dtype,
            layout,
        })
    }

    /// Rows: the width of the product, twice that with [`Layout::GateUp`].
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the width of x.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Placement of the rows.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes of memory, padding included.
    pub fn bytes(&self) -> usize {
        self.memory.bytes().len()
    }

    /// Columns of a product with this matrix.
    pub(super) fn out_cols(&self) -> usize {
        match self.layout {
            Layout::Rows => self.rows,
            Layout::GateUp => self.rows / 2,
        }
    }

    /// Output columns that one panel makes.
    pub(super) fn panel_cols(&self) -> usize {
        match self.layout {
            Layout::Rows => PANEL,
            Layout::GateUp => LANES,
        }
    }

    /// Number of panels.
    pub(super) fn panels(&self) -> usize {
        self.out_cols().div_ceil(self.panel_cols())
    }

    /// The packed bytes, panel after panel.
    pub(super) fn packed(&self) -> &[u8] {
        self.memory.bytes()
    }

    /// Writes row `row` (of [`Layout::Rows`]) as f32 to `out[..cols]`: an embedding.
    pub(super) fn row_f32(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && self.layout == Layout::Rows,
            "row {row} of {}",
            self.rows
        );
        let step = PANEL * self.dtype.size();
        let panel = &self.packed()[row / PANEL * self.cols * step..][..self.cols * step];
        let at = position(row % PANEL, self.dtype) * self.dtype.size();
        let elements = panel.chunks_exact(step).map(|column| &column[at..]);
        for (out, bytes) in out[..self.cols].iter_mut().zip(elements) {
            *out = match self.dtype {
                DType::F32 => f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                DType::Bf16 => bf16::from_ne_bytes([bytes[0], bytes[1]]).to_f32(),
                DType::F16 => f16::from_ne_bytes([bytes[0], bytes[1]]).to_f32(),
            };
        }
    }
}

/// The row of the parts that belongs in `slot` of `panel`, unless that is padding.
fn source<'a, 'b>(
    parts: &'a [HostMatrix<'b>],
    layout: Layout,
    panel: usize,
    slot: usize,
) -> Option<(&'a HostMatrix<'b>, usize)> {
    match layout {
        Layout::Rows => {
            let mut row = panel * PANEL + slot;
            parts.iter().find_map(|part| {
                if row < part.rows() {
                    return Some((part, row));
                }
                row -= part.rows();
                None
            })
        }
        Layout::GateUp => {
            let row = panel * LANES + slot % LANES;
            let part = &parts[slot / LANES];
            (row < part.rows()).then_some((part, row))
        }
    }
}

/// Where `slot` stands among the 32 elements of a column.
fn position(slot: usize, dtype: DType) -> usize {
    match dtype {
        DType::F32 | DType::F16 => slot,
        DType::Bf16 => slot % LANES * 2 + slot / LANES,
    }
}

fn scatter(row: &[f32], panel: &mut [u8], slot: usize, dtype: DType) {
    let (size, at) = (dtype.size(), position(slot, dtype) * dtype.size());
    let columns = panel
        .chunks_exact_mut(PANEL * size)
        .map(|column| &mut column[at..at + size]);
    for (&value, out) in row.iter().zip(columns) {
        match dtype {
            DType::F32 => out.copy_from_slice(&value.to_ne_bytes()),
            DType::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
            DType::F16 => out.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
        }
    }
}
