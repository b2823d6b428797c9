//! Launches the kernels of `cuda/rope.cu`.

use super::abi::{self, RopeParams};
use super::kv::KvLayerMut;
use super::launch::Launch;
use super::module::{Family, Kernels};
use super::plan::CudaPlan;
use super::view::{RowsMut, count};
use super::{Stream, Work};
use crate::backend::HeadCounts;
use crate::error::{Error, Result};

pub(super) const FAMILY: Family = Family {
    name: "rope",
    kernels: &["rope_append_f32", "rope_append_f16", "rope_append_bf16"],
};

/// Rotates the queries of `qkv`, `[rows, (q + 2 kv) * head_dim]`, in place, and writes each row's
/// rotated key and its value to its slot of the pages. Angles and slots are the plan's. The pages
/// have the type of `qkv`; arithmetic is in f32 and rounds once to it.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; [`Error::Driver`].
pub fn rope_append(
    kernels: &Kernels,
    stream: &Stream,
    qkv: RowsMut<'_>,
    heads: HeadCounts,
    plan: &CudaPlan,
    pages: &mut KvLayerMut<'_>,
) -> Result<()> {
    let layout = *qkv.layout();
    let shape = pages.shape;
    plan.check_attention("rope_append", &layout, heads, &shape)?;
    let tables = plan.rope(heads.head_dim)?;
    let rows = count("rows of a batch", layout.rows, i32::MAX as u32)?;
    if rows == 0 {
        return Ok(());
    }
    let heads_aligned = (heads.head_dim * layout.dtype.size()).is_multiple_of(16);
    let params = RopeParams {
        qkv: qkv.address() as *mut _,
        cos: tables.cos as *const _,
        sin: tables.sin as *const _,
        slots: plan.slots() as *const _,
        keys: pages.keys.address() as *mut _,
        values: pages.values.address() as *mut _,
        qkv_stride: layout.stride as u64,
        q_heads: heads.q as u32,
        kv_heads: heads.kv as u32,
        head_dim: heads.head_dim as u32,
        page_size: shape.block_size as u32,
        aligned: u32::from(heads_aligned && layout.is_aligned(qkv.address())),
        tables_aligned: u32::from((heads.head_dim / 2).is_multiple_of(4)),
    };
    let kernel = kernels.get(&format!("rope_append_{}", layout.dtype))?;
    let shape = Launch::linear(rows, abi::kRopeThreads);
    // SAFETY: rows, tables, slots and pages have the sizes that the kernel goes by, and every slot
    // is within the pages, as checked above. One block a row.
    unsafe { stream.launch(kernel, shape, &params) }
}

/// The floor of [`rope_append`]: queries, keys and values read once and written once.
pub fn rope_append_work(rows: usize, heads: HeadCounts, dtype: crate::dtype::DType) -> Work {
    let (rows, size) = (rows as u64, dtype.size() as u64);
    let (q, kv, d) = (heads.q as u64, heads.kv as u64, heads.head_dim as u64);
    Work {
        // Angles in f32, and two words of the slot.
        bytes: rows * (2 * (q + 2 * kv) * d * size + 4 * d + 8),
        flops: rows * 3 * (q + kv) * d,
    }
}

/// The addresses of a batch's angles.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceTables {
    pub(super) cos: u64,
    pub(super) sin: u64,
}

pub(super) fn no_tables(rows: usize, head_dim: usize, found: usize) -> Error {
    Error::shape(
        "sines and cosines of a batch",
        rows.saturating_mul(head_dim / 2),
        found,
    )
}
