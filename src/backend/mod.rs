//! What a device does for a model: one trait, implemented by [`cpu`] and, with the feature
//! `cuda`, by `cuda`.
//!
//! # Contract
//! - **Stream-ordered.** A call enqueues; its result is there for later calls on the same
//!   backend, and on the host after [`Backend::synchronize`] or a read. What a call can see
//!   on the host (shapes, ids) it refuses at once; what only the device can see surfaces at
//!   the next `synchronize` or read. The CPU runs every call at once.
//! - **The caller owns outputs.** Operations write to tensors they are given and allocate
//!   nothing that lives longer than the call.
//! - **Batch metadata is planned once a step** ([`Backend::plan`]); operations take the plan,
//!   never host slices.
//! - **Bits.** A row's result depends on that row's inputs alone: not on the other rows, nor
//!   on the number of threads. (On CUDA, products of up to `cuda::GEMM_FEW_ROWS` rows sum in
//!   another order than those of more: the bits of a row are the same within either class, and in
//!   both with `CudaBackend::batch_invariant`.)
//!
//! Shapes are `[rows, cols]`; rows of activations are tokens.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub(crate) mod driver_error;

pub use driver_error::DriverError;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::host::HostMatrix;
use crate::llama::sampling::Record;
use crate::llama::{Batch, SampleRow};

/// How the rows of a weight matrix are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// In order.
    Rows,
    /// Two equal parts, gate and up, interleaved so that a product can end in
    /// `silu(gate) * up`; its width is that of one part.
    GateUp,
}

impl Layout {
    /// Rows and columns of a matrix of `parts` stacked by rows.
    ///
    /// # Errors
    /// Parts of different width; with [`Layout::GateUp`] other than two equal parts.
    pub(crate) fn stacked(self, parts: &[HostMatrix<'_>]) -> Result<(usize, usize)> {
        let cols = parts.first().map_or(0, HostMatrix::cols);
        if let Some(part) = parts.iter().find(|part| part.cols() != cols) {
            return Err(Error::shape(
                "matrix: columns of its parts",
                cols,
                part.cols(),
            ));
        }
        if self == Self::GateUp && (parts.len() != 2 || parts[0].rows() != parts[1].rows()) {
            let found: Vec<_> = parts.iter().map(HostMatrix::rows).collect();
            return Err(Error::shape(
                "matrix: rows of gate and up",
                "two equal parts",
                format_args!("{found:?}"),
            ));
        }
        Ok((parts.iter().map(HostMatrix::rows).sum(), cols))
    }
}

/// The heads that one rank has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadCounts {
    /// Query heads.
    pub q: usize,
    /// KV heads; divides the query heads.
    pub kv: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl HeadCounts {
    /// Columns of a row of queries, keys and values.
    pub fn qkv_cols(&self) -> usize {
        (self.q + 2 * self.kv) * self.head_dim
    }
}

/// The sizes of one rank's paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub num_layers: usize,
    /// Blocks a layer.
    pub num_blocks: usize,
    /// Positions a block.
    pub block_size: usize,
    /// KV heads of the rank.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Storage type.
    pub dtype: DType,
}

/// The rotary angles of a batch's rows, `[rows, head_dim / 2]` each, scaled as the rope type
/// wants it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RopeTables {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// How large a step is: what decides, with the model, how much memory it needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSize {
    /// Rows of the batch.
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub logits_rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Blocks of the KV cache, named once for every sequence that uses them.
    pub blocks: usize,
    /// Positions of the longest context.
    pub context: usize,
}

impl StepSize {
    /// Of a checked batch.
    pub fn of(batch: &Batch) -> Self {
        let context = batch.positions.iter().max();
        Self {
            rows: batch.rows(),
            logits_rows: batch.logits_rows.len(),
            sequences: batch.sequences(),
            blocks: batch.block_tables.iter().map(Vec::len).sum(),
            context: context.map_or(0, |&position| position as usize + 1),
        }
    }

    /// As large, and somewhat larger: so that not every token that a sequence gets makes a size that
    /// was not seen before.
    pub(crate) fn rounded_up(self) -> Self {
        Self {
            rows: self.rows.next_multiple_of(16),
            logits_rows: self.logits_rows.next_multiple_of(16),
            // Little memory depends on these.
            sequences: self.sequences.next_power_of_two(),
            blocks: self.blocks.next_power_of_two(),
            context: self.context.next_power_of_two(),
        }
    }
}

/// Bytes of memory that a rank has, by what they are for. On a device they are those of the driver's
/// allocations, all of them; on the CPU a cache is counted whole, touched or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Weights, with the padding that they are stored with.
    pub weights: usize,
    /// The KV cache.
    pub kv_cache: usize,
    /// Activations, batches and what operations need between them; on a device also what is held for
    /// larger steps.
    pub steps: usize,
    /// What goes between the ranks.
    pub communicator: usize,
    /// What a device's memory was taken for weights and the cache, in whole slabs, and not used.
    pub spare: usize,
}

impl MemoryUse {
    /// The kinds with their names.
    pub fn by_kind(&self) -> [(&'static str, usize); 5] {
        [
            ("weights", self.weights),
            ("KV cache", self.kv_cache),
            ("steps", self.steps),
            ("communicator", self.communicator),
            ("spare", self.spare),
        ]
    }

    /// The sum.
    pub fn total(&self) -> usize {
        self.by_kind().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// A record that [`Backend::records`] is asked for.
#[derive(Clone, Copy, Debug)]
pub struct WantedRecord<'a> {
    /// The row of the logits.
    pub row: usize,
    /// What is to be chosen.
    pub sample: &'a SampleRow,
    /// The form of the record.
    pub record: Record,
}

/// What is added to a product.
#[derive(Debug)]
pub struct Epilogue<'a, B: Backend + ?Sized> {
    /// One a row of the weights, added before SwiGLU.
    pub bias: Option<&'a B::Vector>,
    /// Of the output's shape, added last.
    pub residual: Option<&'a B::Tensor>,
}

impl<B: Backend + ?Sized> Epilogue<'_, B> {
    /// Nothing.
    pub fn none() -> Self {
        Self {
            bias: None,
            residual: None,
        }
    }
}

/// A device, or the host, that runs the operations of a model for one rank.
pub trait Backend: Send {
    /// Activations `[rows, cols]`.
    type Tensor: Send;
    /// A weight matrix `[out, in]`.
    type Matrix: Send;
    /// Weights of a norm, or a bias, in f32.
    type Vector: Send;
    /// The pages of a KV cache.
    type KvPages: Send;
    /// A batch's metadata.
    type Plan: Send;

    /// A tensor of zeros.
    fn tensor(&mut self, rows: usize, cols: usize) -> Result<Self::Tensor>;

    /// A tensor of zeros for logits: in f32, whatever the activations are, so that the choice of a
    /// token sees what the sums came to.
    fn logits(&mut self, rows: usize, cols: usize) -> Result<Self::Tensor> {
        self.tensor(rows, cols)
    }

    /// Changes the number of rows; their contents become unspecified. May allocate when the
    /// tensor never had so many.
    fn set_rows(&mut self, tensor: &mut Self::Tensor, rows: usize) -> Result<()>;

    /// A weight matrix from `parts` stacked by rows, stored as `dtype`.
    ///
    /// # Errors
    /// Parts of different width; with [`Layout::GateUp`] other than two equal parts.
    fn matrix(
        &mut self,
        parts: &[HostMatrix<'_>],
        layout: Layout,
        dtype: DType,
    ) -> Result<Self::Matrix>;

    /// A vector from `parts`, each of one row, put one after another.
    fn vector(&mut self, parts: &[HostMatrix<'_>]) -> Result<Self::Vector>;

    /// The pages of a KV cache, zeroed.
    fn kv_pages(&mut self, shape: KvShape) -> Result<Self::KvPages>;

    /// Takes memory for steps of up to `size`, beside that of the tensors that they are given: for the
    /// plan, for what attention of these heads leaves on the way, and for new tensors of as many rows
    /// as the batch and of `columns` columns, which exist at one time. Steps that are no larger take
    /// none then. Only of use where taking memory waits for the device.
    fn reserve(&mut self, size: &StepSize, heads: HeadCounts, columns: &[usize]) -> Result<()> {
        let _ = (size, heads, columns);
        Ok(())
    }

    /// What memory the rank has beside what goes between ranks: the weights that were made here, and
    /// these tensors and pages.
    fn memory(&self, tensors: &[&Self::Tensor], pages: &Self::KvPages) -> MemoryUse;

    /// Puts a checked batch's metadata where the operations want it; `rope` has its angles.
    fn plan(&mut self, batch: &Batch, rope: RopeTables, block_size: usize) -> Result<Self::Plan>;

    /// `out[row] = table[id(row) - first_id]`, or zeros where the id is not in the table:
    /// `[rows, table columns]`.
    fn embedding(
        &mut self,
        table: &Self::Matrix,
        first_id: usize,
        plan: &Self::Plan,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = x wᵀ` and the epilogue: `[rows, width of w]` from `[rows, in]`. With
    /// [`Layout::GateUp`], `silu(x gateᵀ + bias) * (x upᵀ + bias) + residual`.
    fn linear(
        &mut self,
        x: &Self::Tensor,
        w: &Self::Matrix,
        epilogue: Epilogue<'_, Self>,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = x / sqrt(mean(x²) + eps) * weight`, row by row.
    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `residual += x (+ bias)`, then `out = rms_norm(residual)`.
    fn add_rms_norm(
        &mut self,
        x: &Self::Tensor,
        bias: Option<&Self::Vector>,
        residual: &mut Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// Rotates the queries of `qkv` in place, and writes each row's rotated key and its value
    /// to its slot of the pages.
    fn rope_append(
        &mut self,
        qkv: &mut Self::Tensor,
        heads: HeadCounts,
        plan: &Self::Plan,
        pages: &mut Self::KvPages,
        layer: usize,
    ) -> Result<()>;

    /// Causal attention of each row over its sequence's entries, up to its own position:
    /// `out` is `[rows, q * head_dim]`.
    #[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
    fn attention(
        &mut self,
        qkv: &Self::Tensor,
        heads: HeadCounts,
        plan: &Self::Plan,
        pages: &Self::KvPages,
        layer: usize,
        scale: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out[i] = x[i-th row whose logits are wanted]`.
    fn logits_rows(
        &mut self,
        x: &Self::Tensor,
        plan: &Self::Plan,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = x[:, first..first + columns of out]`.
    fn slice_columns(
        &mut self,
        x: &Self::Tensor,
        first: usize,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `x += bias`, row by row.
    fn add_bias(&mut self, bias: &Self::Vector, x: &mut Self::Tensor) -> Result<()>;

    /// The records from which ranks choose tokens together (see [`crate::llama::sampling`]), one
    /// after another: of rows of `logits`, this rank's part of the vocabulary from `first_id` on.
    /// A read: it waits for the logits.
    fn records(
        &mut self,
        logits: &Self::Tensor,
        first_id: usize,
        wanted: &[WantedRecord<'_>],
    ) -> Result<Vec<u32>>;

    /// Reads a tensor, waiting for all that was enqueued: `[rows, cols]`.
    fn read(&mut self, tensor: &Self::Tensor) -> Result<Vec<f32>>;

    /// Waits for all that was enqueued; errors of the device surface here.
    fn synchronize(&mut self) -> Result<()>;
}
