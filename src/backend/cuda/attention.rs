//! Launches the kernels of `cuda/attention.cu`.

use super::abi::{self, AttentionParams};
use super::kv::{KvLayer, padded};
use super::launch::Launch;
use super::module::{Family, Kernels};
use super::plan::{CudaPlan, Items};
use super::tensor::out_of_memory;
use super::view::{RowLayout, Rows, RowsMut, count};
use super::{DeviceBuffer, DevicePool, Stream, Work};
use crate::backend::{HeadCounts, StepSize};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::llama::Batch;

pub(super) const FAMILY: Family = Family {
    name: "attention",
    kernels: &["attention_f32", "attention_f16", "attention_bf16"],
};

/// Memory for the partial results of split contexts; grows to the largest batch seen.
#[derive(Debug)]
pub struct AttentionScratch {
    pool: DevicePool,
    /// Results, then their statistics.
    partials: DeviceBuffer,
    /// Zeros between launches.
    arrivals: DeviceBuffer,
}

impl AttentionScratch {
    /// None yet; `pool` is where it will come from.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(pool: &DevicePool) -> Result<Self> {
        Ok(Self {
            pool: pool.clone(),
            partials: pool.buffer(0)?,
            arrivals: pool.buffer(0)?,
        })
    }

    /// Room for any batch of up to this size.
    pub(super) fn reserve(
        &mut self,
        stream: &Stream,
        size: &StepSize,
        heads: HeadCounts,
    ) -> Result<()> {
        let most = Items::at_most(size);
        let partials = partial_bytes(most.partial_rows * heads.q, padded(heads.head_dim));
        self.grow(stream, partials, arrival_bytes(&most, heads))
    }

    fn grow(&mut self, stream: &Stream, partials: usize, arrivals: usize) -> Result<()> {
        let full = |e, bytes: usize| {
            let layout = RowLayout::contiguous(DType::F32, bytes / size_of::<f32>(), 1);
            out_of_memory(e, "partial results of attention", &layout, &self.pool)
        };
        if self.partials.len() < partials {
            self.partials = self.pool.buffer(partials).map_err(|e| full(e, partials))?;
        }
        if self.arrivals.len() < arrivals {
            let zeros = self.pool.zeros(arrivals, stream);
            self.arrivals = zeros.map_err(|e| full(e, arrivals))?;
        }
        Ok(())
    }
}

/// Bytes of so many partial results, each of a query vector, and their two statistics.
fn partial_bytes(results: usize, padded: usize) -> usize {
    size_of::<f32>() * results * (padded + 2)
}

/// Tiles of query vectors that the largest item has for a KV head.
fn tiles(items: &Items, heads: HeadCounts) -> usize {
    let group = heads.q / heads.kv.max(1);
    (items.most_rows * group).div_ceil(abi::kAttentionQueries as usize)
}

fn arrival_bytes(items: &Items, heads: HeadCounts) -> usize {
    size_of::<u32>() * items.splits * heads.kv * tiles(items, heads)
}

/// Bytes of dynamic shared memory of a block: the parts of `Shared` in the kernel.
fn attention_shared_bytes(padded: usize) -> usize {
    let (queries, chunk) = (
        abi::kAttentionQueries as usize,
        abi::kAttentionChunk as usize,
    );
    let entries = abi::kWarpThreads as usize;
    let floats = queries * padded + entries * (padded + 4) + queries * chunk;
    size_of::<u64>() * chunk + size_of::<f32>() * floats
}

/// Causal attention of each row over its sequence's entries, up to its own position: `out` is
/// `[rows, q * head_dim]`, of the type of `qkv` and of the pages. Sums are in f32 and round once.
/// A row's bits depend on its sequence alone. `scale` is positive.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; memory for the scratch;
/// [`Error::Driver`].
#[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
pub fn attention(
    kernels: &Kernels,
    stream: &Stream,
    qkv: Rows<'_>,
    heads: HeadCounts,
    plan: &CudaPlan,
    pages: &KvLayer<'_>,
    scale: f32,
    scratch: &mut AttentionScratch,
    out: RowsMut<'_>,
) -> Result<()> {
    let (layout, to, d) = (*qkv.layout(), *out.layout(), heads.head_dim);
    plan.check_attention("attention", &layout, heads, &pages.shape)?;
    if (to.rows, to.cols, to.dtype) != (layout.rows, heads.q * d, layout.dtype) {
        return Err(Error::shape(
            "the output of attention",
            format!("[{}, {}] of {}", layout.rows, heads.q * d, layout.dtype),
            format!("[{}, {}] of {}", to.rows, to.cols, to.dtype),
        ));
    }
    let items = plan.items();
    if items.list.is_empty() || heads.q == 0 {
        return Ok(());
    }
    let (tiles, wide) = (tiles(items, heads), padded(d));
    let results = items.partial_rows * heads.q;
    scratch.grow(
        stream,
        partial_bytes(results, wide),
        arrival_bytes(items, heads),
    )?;
    let head_aligned = (d * layout.dtype.size()).is_multiple_of(16);
    let params = AttentionParams {
        qkv: qkv.address() as *const _,
        keys: pages.keys.address() as *const _,
        values: pages.values.address() as *const _,
        out: out.address() as *mut _,
        items: plan.item_list() as *const _,
        tables: plan.tables() as *const _,
        partials: scratch.partials.address() as *mut _,
        stats: (scratch.partials.address() + (size_of::<f32>() * results * wide) as u64) as *mut _,
        arrivals: scratch.arrivals.address() as *mut _,
        qkv_stride: layout.stride as u64,
        out_stride: to.stride as u64,
        q_heads: count("query heads", heads.q, u16::MAX.into())?,
        kv_heads: count("KV heads", heads.kv, u16::MAX.into())?,
        head_dim: count("head_dim", d, abi::kAttentionHeadDim)?,
        page_size: count("positions of a block", pages.shape.block_size, 1 << 30)?,
        scale,
        qkv_aligned: u32::from(head_aligned && layout.is_aligned(qkv.address())),
        out_aligned: u32::from(head_aligned && to.is_aligned(out.address())),
        pad: 0,
    };
    let launch = Launch {
        grid: [
            count("items of attention", items.list.len(), i32::MAX as u32)?,
            params.kv_heads,
            count("tiles of attention", tiles, u16::MAX.into())?,
        ],
        ..Launch::linear(1, abi::kAttentionThreads)
    };
    let shared = count(
        "shared memory",
        attention_shared_bytes(wide),
        i32::MAX as u32,
    )?;
    let kernel = kernels.get(&format!("attention_{}", layout.dtype))?;
    // SAFETY: rows, pages and the plan's tables have the sizes that the kernel goes by, and every
    // position has a block within the pages, as checked above; the scratch has room for what split
    // items leave, and the output is borrowed for the kernel alone.
    unsafe { stream.launch(kernel, launch.shared(shared), &params) }
}

/// The floor of [`attention`] for a batch: queries, and each sequence's entries up to its last row,
/// read once, results written once; two products of a head for each query head and position.
pub fn attention_work(batch: &Batch, heads: HeadCounts, dtype: DType) -> Work {
    let (d, size) = (heads.head_dim as u64, dtype.size() as u64);
    let (q, kv) = (heads.q as u64, heads.kv as u64);
    let entries: u64 = (0..batch.sequences())
        .filter_map(|sequence| batch.rows_of(sequence).next_back())
        .map(|row| u64::from(batch.positions[row]) + 1)
        .sum();
    let attended: u64 = batch.positions.iter().map(|&p| u64::from(p) + 1).sum();
    Work {
        bytes: size * d * (2 * kv * entries + 2 * q * batch.rows() as u64),
        flops: 4 * d * q * attended,
    }
}
