//! The backend of one rank on a CUDA device: the operations of a model as launches in one stream.

use std::sync::Arc;

use super::mail::{Inbox, Outbox};
use super::plan::SPLIT_ROWS;
use super::tensor::out_of_memory;
use super::upload::Staging;
use super::view::RowLayout;
use super::{
    AttentionScratch, BUFFER_ALIGN, Context, CudaKvPages, CudaMatrix, CudaPlan, CudaTensor,
    DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut, GemmEpilogue, Kernels, RecordsSize,
    Rows, RowsMut, Stream,
};
use crate::backend::{
    Backend, Epilogue, HeadCounts, KvShape, Layout, MemoryUse, RopeTables, StepSize, WantedRecord,
};
use crate::comm::Room;
use crate::comm::p2p::P2pComm;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::host::HostMatrix;
use crate::llama::Batch;

/// Bytes of the slabs that the memory of steps comes from: activations, which stay and grow, and
/// what comes and goes within a step. Both are taken at once: the driver may wait for every device
/// that reaches the memory when it allocates, and one of them may be spinning on this rank. Batches
/// that need more take more, before they run: [`Backend::reserve`].
const STEP_SLAB: usize = 112 << 20;
const PASSING_SLAB: usize = 16 << 20;

/// Bytes of a slab of weights; larger ones have slabs of their own.
const WEIGHT_SLAB: usize = 32 << 20;

/// A rank on a device.
///
/// Weights, KV cache and activations are of one type; logits, sums and statistics are f32. A call
/// enqueues; what fails on the device surfaces at [`Backend::synchronize`] or a read.
#[derive(Debug)]
pub struct CudaBackend {
    stream: Arc<Stream>,
    /// Of steps: what stays from one to the next.
    pool: DevicePool,
    /// Of steps: what comes and goes within one, the last first.
    passing: DevicePool,
    /// Of weights and KV cache.
    weights: DevicePool,
    kernels: Kernels,
    dtype: DType,
    batch_invariant: bool,
    scratch: AttentionScratch,
    /// For weights; made with the first.
    staging: Option<Staging>,
    /// For batches, for what is asked of logits, and for the answers of all ranks.
    batches: Outbox,
    questions: Outbox,
    answers: Inbox,
    /// What records all ranks have room for.
    records: Room<4>,
}

impl CudaBackend {
    /// A backend whose work goes into `stream`, with activations of `dtype`. It loads the kernels,
    /// which synchronises the device: before anything runs there.
    ///
    /// # Errors
    /// [`Error::Driver`]; memory.
    pub fn new(stream: Arc<Stream>, dtype: DType) -> Result<Self> {
        let kernels = Kernels::load(stream.context())?;
        Self::with_kernels(stream, kernels, dtype)
    }

    /// As [`Self::new`], with kernels of the stream's device that are loaded already: those of the
    /// rank's [`P2pComm`](crate::comm::p2p::P2pComm), say.
    ///
    /// # Errors
    /// As [`Self::with`].
    pub fn with_kernels(stream: Arc<Stream>, kernels: Kernels, dtype: DType) -> Result<Self> {
        let pool = DevicePool::new(stream.context(), STEP_SLAB);
        let passing = DevicePool::new(stream.context(), PASSING_SLAB);
        Self::of(stream, pool, passing, kernels, dtype)
    }

    /// As [`Self::new`], with activations from `pool`, what passes within a step from slabs of its
    /// length, and kernels that are loaded: all of the stream's device.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are of different devices; memory.
    pub fn with(
        stream: Arc<Stream>,
        pool: DevicePool,
        kernels: Kernels,
        dtype: DType,
    ) -> Result<Self> {
        let passing = DevicePool::new(stream.context(), pool.slab_len());
        Self::of(stream, pool, passing, kernels, dtype)
    }

    fn of(
        stream: Arc<Stream>,
        pool: DevicePool,
        passing: DevicePool,
        kernels: Kernels,
        dtype: DType,
    ) -> Result<Self> {
        let device = stream.context().ordinal();
        for (what, other) in [("pool", pool.context()), ("kernels", kernels.context())] {
            if other.ordinal() != device {
                return Err(Error::shape(
                    format_args!("CudaBackend: {what}"),
                    format_args!("of CUDA device {device}, as the stream"),
                    format_args!("of device {}", other.ordinal()),
                ));
            }
        }
        let scratch = AttentionScratch::new(&pool)?;
        passing.reserve(1)?;
        Ok(Self {
            batches: Outbox::new(&stream)?,
            questions: Outbox::new(&stream)?,
            answers: Inbox::new(&stream)?,
            weights: DevicePool::new(stream.context(), WEIGHT_SLAB),
            stream,
            pool,
            passing,
            kernels,
            dtype,
            batch_invariant: false,
            scratch,
            staging: None,
            records: Room::default(),
        })
    }

    /// Whether products of few rows are made as those of many are: slower, but then a row's bits are
    /// the same in every batch. All else is so anyway. Off by default.
    #[must_use]
    pub fn batch_invariant(mut self, on: bool) -> Self {
        self.batch_invariant = on;
        self
    }

    /// The stream of all work.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Where the memory of its steps comes from that stays from one to the next.
    pub fn pool(&self) -> &DevicePool {
        &self.pool
    }

    /// Where the memory of its steps comes from that goes before they end: the last first.
    pub fn passing(&self) -> &DevicePool {
        &self.passing
    }

    /// The device.
    pub fn context(&self) -> &Context {
        self.stream.context()
    }

    /// The type of activations, weights and KV cache.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Takes memory for records of this size, as all ranks of `comm` do.
    pub(crate) fn reserve_records(&mut self, comm: &mut P2pComm, size: RecordsSize) -> Result<()> {
        let ranks = comm.world_size();
        let mut room = self.records;
        let wanted = [size.records, size.words, size.ids, size.edited];
        let made = room.make(comm, self, wanted, |backend, sizes| {
            let [records, words, ids, edited] = sizes;
            let size = RecordsSize {
                records,
                words,
                ids,
                edited,
            };
            let bytes = size.bytes_at_most(ranks);
            backend.reserve_passing("records of candidates", bytes)?;
            let stream = &backend.stream;
            backend.questions.reserve(stream, size.sent_at_most())?;
            backend
                .answers
                .reserve(stream, size.words.saturating_mul(ranks))
        });
        self.records = room;
        made
    }

    /// Puts the kernel into the stream that leaves the records `wanted` in `out`; the host does not
    /// wait for it.
    pub(crate) fn put_records(
        &mut self,
        logits: &CudaTensor,
        first_id: usize,
        wanted: &[WantedRecord<'_>],
        out: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        let (kernels, stream, pool) = (&self.kernels, &self.stream, &self.passing);
        let questions = &mut self.questions;
        let send = |words: &[u32], to: &mut DeviceSliceMut<'_>| questions.send(stream, words, to);
        let logits = logits.rows()?;
        super::sampling::put_records(kernels, stream, pool, logits, first_id, wanted, send, out)
    }

    /// Puts a copy of the records of all ranks to the host into the stream.
    pub(crate) fn order_records(&mut self, all: DeviceSlice<'_>) -> Result<()> {
        self.answers.order(&self.stream, all)
    }

    /// What was ordered last, of so many ranks, once the stream has been waited for.
    pub(crate) fn ordered_records(&self, ranks: usize, wanted: &[WantedRecord<'_>]) -> Vec<u32> {
        let words = super::sampling::words_of(wanted);
        let mut all = self.answers.read(ranks * words);
        for of_rank in all.chunks_exact_mut(words.max(1)) {
            super::sampling::sort_lists(of_rank, wanted);
        }
        all
    }

    /// [`Backend::add_rms_norm`] of rows, which may be some of a tensor's.
    pub(crate) fn add_rms_norm_rows(
        &mut self,
        x: Rows<'_>,
        bias: Option<&CudaVector>,
        residual: RowsMut<'_>,
        weight: &CudaVector,
        eps: f32,
        out: RowsMut<'_>,
    ) -> Result<()> {
        super::add_rms_norm(
            &self.kernels,
            &self.stream,
            x,
            bias.map(|bias| self.vector_view(bias)),
            residual,
            self.vector_view(weight),
            eps,
            out,
        )
    }

    /// Takes so many bytes for what passes within a step.
    fn reserve_passing(&self, what: &str, bytes: usize) -> Result<()> {
        let taken = self.passing.reserve(bytes);
        let layout = RowLayout::contiguous(DType::F32, bytes.div_ceil(4), 1);
        taken.map_err(|e| out_of_memory(e, what, &layout, &self.passing))
    }

    fn check_dtype(&self, what: &str, dtype: DType) -> Result<()> {
        if dtype == self.dtype {
            return Ok(());
        }
        Err(Error::input(
            what,
            format_args!("the type of the activations, {}", self.dtype),
            dtype,
            "use one type for all, or make another backend",
        ))
    }

    fn vector_view<'a>(&self, vector: &'a CudaVector) -> DeviceSlice<'a> {
        vector.buffer.as_ref()
    }

    fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Result<CudaTensor> {
        CudaTensor::zeros(&self.passing, &self.stream, dtype, rows, cols)
    }
}

/// Weights of a norm, or a bias, in f32 in device memory.
#[derive(Debug)]
pub struct CudaVector {
    buffer: DeviceBuffer,
}

impl CudaVector {
    /// Elements.
    pub fn len(&self) -> usize {
        self.buffer.len() / size_of::<f32>()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Backend for CudaBackend {
    type Tensor = CudaTensor;
    type Matrix = CudaMatrix;
    type Vector = CudaVector;
    type KvPages = CudaKvPages;
    type Plan = CudaPlan;

    fn tensor(&mut self, rows: usize, cols: usize) -> Result<CudaTensor> {
        self.zeros(self.dtype, rows, cols)
    }

    fn logits(&mut self, rows: usize, cols: usize) -> Result<CudaTensor> {
        self.zeros(DType::F32, rows, cols)
    }

    fn set_rows(&mut self, tensor: &mut CudaTensor, rows: usize) -> Result<()> {
        tensor.set_rows(&self.pool, rows)
    }

    fn matrix(
        &mut self,
        parts: &[HostMatrix<'_>],
        layout: Layout,
        dtype: DType,
    ) -> Result<CudaMatrix> {
        self.check_dtype("type of the weights", dtype)?;
        let (rows, cols) = layout.stacked(parts)?;
        let mut matrix = CudaMatrix::new(&self.weights, layout, dtype, rows, cols)?;
        let staging = match &mut self.staging {
            Some(staging) => staging,
            none => none.insert(Staging::new(&self.stream)?),
        };
        staging.matrix(&self.stream, &mut matrix, parts)?;
        Ok(matrix)
    }

    fn vector(&mut self, parts: &[HostMatrix<'_>]) -> Result<CudaVector> {
        let mut values = Vec::new();
        for part in parts {
            if part.rows() != 1 {
                return Err(Error::shape("vector: rows of a part", 1, part.rows()));
            }
            let start = values.len();
            values.resize(start + part.cols(), 0.0_f32);
            part.row_f32(0, &mut values[start..]);
        }
        let layout = RowLayout::contiguous(DType::F32, 1, values.len());
        let buffer = self.weights.upload(&values, &self.stream);
        let buffer = buffer.map_err(|e| out_of_memory(e, "a vector", &layout, &self.weights))?;
        Ok(CudaVector { buffer })
    }

    /// All of it is in the pools; tensors grow in that of steps.
    fn memory(&self, _tensors: &[&CudaTensor], pages: &CudaKvPages) -> MemoryUse {
        let (weights, spare) = self.weights.usage();
        let kv_cache = self.weights.taken_by(pages.bytes());
        MemoryUse {
            weights: (weights - spare).saturating_sub(kv_cache),
            kv_cache,
            steps: self.pool.usage().0 + self.passing.usage().0,
            spare,
            ..Default::default()
        }
    }

    fn kv_pages(&mut self, shape: KvShape) -> Result<CudaKvPages> {
        self.check_dtype("type of the KV cache", shape.dtype)?;
        CudaKvPages::new(&self.weights, &self.stream, shape)
    }

    fn reserve(&mut self, size: &StepSize, heads: HeadCounts, columns: &[usize]) -> Result<()> {
        self.scratch.reserve(&self.stream, size, heads)?;
        let plan = CudaPlan::bytes_at_most(size, heads.head_dim);
        self.batches
            .reserve(&self.stream, plan.div_ceil(size_of::<u32>()))?;
        let mut bytes = plan.next_multiple_of(BUFFER_ALIGN);
        for &cols in columns {
            let tensor = RowLayout::contiguous(self.dtype, size.rows, cols);
            let tensor = tensor.bytes().unwrap_or(usize::MAX);
            bytes = bytes.saturating_add(tensor.saturating_add(BUFFER_ALIGN));
        }
        self.reserve_passing("what passes within a step", bytes)
    }

    fn plan(&mut self, batch: &Batch, rope: RopeTables, block_size: usize) -> Result<CudaPlan> {
        let (stream, batches) = (&self.stream, &mut self.batches);
        let send = |words: &[u32], to: &mut DeviceSliceMut<'_>| batches.send(stream, words, to);
        CudaPlan::sent(&self.passing, batch, &rope, block_size, SPLIT_ROWS, send)
    }

    fn embedding(
        &mut self,
        table: &CudaMatrix,
        first_id: usize,
        plan: &CudaPlan,
        out: &mut CudaTensor,
    ) -> Result<()> {
        if table.layout() != Layout::Rows {
            let found = format_args!("{:?}", table.layout()).to_string();
            return Err(Error::shape(
                "embedding: layout of the table",
                "Rows",
                found,
            ));
        }
        let ids = Some(plan.token_ids());
        let (kernels, stream) = (&self.kernels, &self.stream);
        super::gather_rows(
            kernels,
            stream,
            table.view()?,
            ids,
            first_id,
            out.rows_mut()?,
        )
    }

    fn linear(
        &mut self,
        x: &CudaTensor,
        w: &CudaMatrix,
        epilogue: Epilogue<'_, Self>,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let epilogue = GemmEpilogue {
            bias: epilogue.bias.map(|bias| self.vector_view(bias)),
            gate_up: w.layout() == Layout::GateUp,
            residual: epilogue.residual.map(CudaTensor::rows).transpose()?,
        };
        let product = match self.batch_invariant {
            true => super::gemm_batch_invariant,
            false => super::gemm,
        };
        let (kernels, stream) = (&self.kernels, &self.stream);
        product(
            kernels,
            stream,
            x.rows()?,
            w.view()?,
            epilogue,
            out.rows_mut()?,
        )
    }

    fn rms_norm(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        eps: f32,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let (x, weight) = (x.rows()?, self.vector_view(weight));
        super::rms_norm(&self.kernels, &self.stream, x, weight, eps, out.rows_mut()?)
    }

    fn add_rms_norm(
        &mut self,
        x: &CudaTensor,
        bias: Option<&CudaVector>,
        residual: &mut CudaTensor,
        weight: &CudaVector,
        eps: f32,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let (x, residual, out) = (x.rows()?, residual.rows_mut()?, out.rows_mut()?);
        self.add_rms_norm_rows(x, bias, residual, weight, eps, out)
    }

    fn rope_append(
        &mut self,
        qkv: &mut CudaTensor,
        heads: HeadCounts,
        plan: &CudaPlan,
        pages: &mut CudaKvPages,
        layer: usize,
    ) -> Result<()> {
        let (kernels, stream) = (&self.kernels, &self.stream);
        let mut layer = pages.layer_mut(layer)?;
        super::rope_append(kernels, stream, qkv.rows_mut()?, heads, plan, &mut layer)
    }

    fn attention(
        &mut self,
        qkv: &CudaTensor,
        heads: HeadCounts,
        plan: &CudaPlan,
        pages: &CudaKvPages,
        layer: usize,
        scale: f32,
        out: &mut CudaTensor,
    ) -> Result<()> {
        super::attention(
            &self.kernels,
            &self.stream,
            qkv.rows()?,
            heads,
            plan,
            &pages.layer(layer)?,
            scale,
            &mut self.scratch,
            out.rows_mut()?,
        )
    }

    fn logits_rows(&mut self, x: &CudaTensor, plan: &CudaPlan, out: &mut CudaTensor) -> Result<()> {
        if x.layout().rows != plan.rows() {
            let found = x.layout().rows;
            return Err(Error::shape("logits_rows: rows of x", plan.rows(), found));
        }
        let ids = Some(plan.wanted_rows());
        super::gather_rows(
            &self.kernels,
            &self.stream,
            x.rows()?,
            ids,
            0,
            out.rows_mut()?,
        )
    }

    fn slice_columns(&mut self, x: &CudaTensor, first: usize, out: &mut CudaTensor) -> Result<()> {
        let (from, to) = (*x.layout(), *out.layout());
        if from.rows != to.rows {
            return Err(Error::shape(
                "slice_columns: rows of the output",
                from.rows,
                to.rows,
            ));
        }
        let end = first.checked_add(to.cols).filter(|&end| end <= from.cols);
        let Some(end) = end else {
            return Err(Error::shape(
                "slice_columns",
                format_args!("columns within {}", from.cols),
                format_args!("{} from {first} on", to.cols),
            ));
        };
        if from.rows == 0 || to.cols == 0 {
            return Ok(());
        }
        let size = from.dtype.size();
        let last = ((from.rows - 1) * from.stride + end) * size;
        let part = RowLayout {
            cols: to.cols,
            ..from
        };
        let rows = Rows::new(x.as_ref()?.range(first * size..last)?, part)?;
        super::gather_rows(&self.kernels, &self.stream, rows, None, 0, out.rows_mut()?)
    }

    fn add_bias(&mut self, bias: &CudaVector, x: &mut CudaTensor) -> Result<()> {
        let bias = self.vector_view(bias);
        super::add_bias(&self.kernels, &self.stream, bias, x.rows_mut()?)
    }

    fn records(
        &mut self,
        logits: &CudaTensor,
        first_id: usize,
        wanted: &[WantedRecord<'_>],
    ) -> Result<Vec<u32>> {
        let (kernels, stream, pool) = (&self.kernels, &self.stream, &self.passing);
        super::sampling_records(kernels, stream, pool, logits.rows()?, first_id, wanted)
    }

    fn read(&mut self, tensor: &CudaTensor) -> Result<Vec<f32>> {
        let mut bytes = vec![0_u8; tensor.as_ref()?.len()];
        self.stream.download(tensor.as_ref()?, &mut bytes)?;
        let layout = tensor.layout();
        let host = HostMatrix::new(&bytes, layout.dtype, layout.rows, layout.cols)?;
        let mut values = vec![0.0; layout.rows * layout.cols];
        for (row, values) in values.chunks_exact_mut(layout.cols.max(1)).enumerate() {
            host.row_f32(row, values);
        }
        Ok(values)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.stream.synchronize()
    }
}
