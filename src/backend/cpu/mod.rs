//! The CPU backend: threads and SIMD.
//!
//! Activations are f32; weights and KV entries keep their storage type in memory and are
//! widened in registers. The bits of a result depend neither on the number of threads nor on
//! the instruction set (`simd/mod.rs`).

mod attention;
mod gemm;
mod kv;
mod matrix;
mod memory;
mod norm;
mod plan;
mod rope;
pub mod sampling;
pub(crate) mod simd;
mod stored;
mod team;
mod tensor;

pub use kv::CpuKvPages;
pub use matrix::CpuMatrix;
pub use plan::CpuPlan;
pub use simd::Isa;
use team::Team;
pub use tensor::CpuTensor;

use rayon::prelude::*;

use super::{Backend, Epilogue, HeadCounts, KvShape, Layout, MemoryUse, RopeTables, WantedRecord};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::host::HostMatrix;
use crate::llama::Batch;

/// Multiply-adds below which a product is not worth waking other threads for.
const PARALLEL_WORK: usize = 1 << 15;

/// A rank's share of the host: some threads and an instruction set.
///
/// Operations may be called from any thread, which does its part of the work.
#[derive(Debug)]
pub struct CpuBackend {
    isa: Isa,
    threads: usize,
    /// For the operations of a step.
    team: Team,
    /// For loading and sampling, whose tasks are large and uneven. Absent for one thread.
    pool: Option<rayon::ThreadPool>,
    /// Bytes of all matrices and vectors made here.
    weights: usize,
}

impl CpuBackend {
    /// A backend of `threads` threads, at least one; the caller's is one of them.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`Self::new`], on a given instruction set (of [`Isa::available`]).
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self> {
        let threads = threads.max(1);
        let build = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|index| format!("ringtp-load-{index}"))
                .build()
                .map_err(|e| Error::input("threads", "threads that start", e, "use fewer"))
        };
        let pool = if threads > 1 { Some(build()?) } else { None };
        Ok(Self {
            isa,
            threads,
            team: Team::new(threads)?,
            pool,
            weights: 0,
        })
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `task(0..count)`, on several threads if `work` multiply-adds are worth it.
    fn parallel(&self, count: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
        if work >= PARALLEL_WORK {
            self.team.run(count, &task);
        } else {
            (0..count).for_each(task);
        }
    }

    /// Shares `0..count` out in a few runs a thread: long enough to be streams, short enough
    /// to balance.
    fn parallel_runs(&self, count: usize, work: usize, task: impl Fn(usize, usize) + Sync + Send) {
        let runs = if self.threads == 1 {
            1
        } else {
            count.min(self.threads * 4)
        };
        self.parallel(runs, work, |run| {
            task(run * count / runs, (run + 1) * count / runs)
        });
    }
}

fn check(op: &str, what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::shape(format_args!("{op}: {what}"), expected, found))
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;
    type KvPages = CpuKvPages;
    type Plan = CpuPlan;

    fn tensor(&mut self, rows: usize, cols: usize) -> Result<CpuTensor> {
        let mut tensor = CpuTensor::zeros(0, cols);
        tensor.set_rows(rows)?;
        Ok(tensor)
    }

    fn set_rows(&mut self, tensor: &mut CpuTensor, rows: usize) -> Result<()> {
        tensor.set_rows(rows)
    }

    fn matrix(
        &mut self,
        parts: &[HostMatrix<'_>],
        layout: Layout,
        dtype: DType,
    ) -> Result<CpuMatrix> {
        let matrix = match &self.pool {
            Some(pool) => pool.install(|| CpuMatrix::pack(parts, layout, dtype)),
            None => CpuMatrix::pack(parts, layout, dtype),
        }?;
        self.weights += matrix.bytes();
        Ok(matrix)
    }

    fn vector(&mut self, parts: &[HostMatrix<'_>]) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        for part in parts {
            check("vector", "rows of a part", 1, part.rows())?;
            let start = out.len();
            out.resize(start + part.cols(), 0.0);
            part.row_f32(0, &mut out[start..]);
        }
        self.weights += size_of_val(out.as_slice());
        Ok(out)
    }

    fn memory(&self, tensors: &[&CpuTensor], pages: &CpuKvPages) -> MemoryUse {
        MemoryUse {
            weights: self.weights,
            kv_cache: pages.bytes(),
            steps: tensors.iter().map(|tensor| tensor.capacity_bytes()).sum(),
            ..Default::default()
        }
    }

    fn kv_pages(&mut self, shape: KvShape) -> Result<CpuKvPages> {
        CpuKvPages::new(shape)
    }

    fn plan(&mut self, batch: &Batch, rope: RopeTables, block_size: usize) -> Result<CpuPlan> {
        check(
            "plan",
            "lengths of sines and cosines",
            rope.cos.len(),
            rope.sin.len(),
        )?;
        CpuPlan::new(batch, rope, block_size)
    }

    fn embedding(
        &mut self,
        table: &CpuMatrix,
        first_id: usize,
        plan: &CpuPlan,
        out: &mut CpuTensor,
    ) -> Result<()> {
        check(
            "embedding",
            "rows of the output",
            plan.batch.rows(),
            out.rows(),
        )?;
        check(
            "embedding",
            "columns of the output",
            table.cols(),
            out.cols(),
        )?;
        if table.layout() != Layout::Rows {
            let found = format_args!("{:?}", table.layout());
            return Err(Error::shape(
                "embedding: layout of the table",
                "Rows",
                found,
            ));
        }
        // A row of no columns has no chunk to be.
        let rows = out.data_mut().chunks_exact_mut(table.cols().max(1));
        for (out, &id) in rows.zip(&plan.batch.token_ids) {
            match (id as usize).checked_sub(first_id) {
                Some(row) if row < table.rows() => table.row_f32(row, out),
                _ => out.fill(0.0),
            }
        }
        Ok(())
    }

    fn linear(
        &mut self,
        x: &CpuTensor,
        w: &CpuMatrix,
        epilogue: Epilogue<'_, Self>,
        out: &mut CpuTensor,
    ) -> Result<()> {
        check("linear", "columns of x", w.cols(), x.cols())?;
        check("linear", "rows of the output", x.rows(), out.rows())?;
        check("linear", "columns of the output", w.out_cols(), out.cols())?;
        if let Some(bias) = epilogue.bias {
            check("linear", "length of the bias", w.rows(), bias.len())?;
        }
        if let Some(residual) = epilogue.residual {
            check(
                "linear",
                "rows of the residual",
                out.rows(),
                residual.rows(),
            )?;
            check(
                "linear",
                "columns of the residual",
                out.cols(),
                residual.cols(),
            )?;
        }
        let product = gemm::Product {
            x: x.data(),
            rows: x.rows(),
            w,
            bias: epilogue.bias.map(Vec::as_slice),
            residual: epilogue.residual.map(CpuTensor::data),
            out: out.shared(),
        };
        let work = x.rows() * w.rows() * w.cols();
        self.parallel_runs(w.panels(), work, |first, end| {
            gemm::panels(self.isa, &product, first, end);
        });
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &CpuTensor,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut CpuTensor,
    ) -> Result<()> {
        check("rms_norm", "length of the weight", x.cols(), weight.len())?;
        check("rms_norm", "rows of the output", x.rows(), out.rows())?;
        check("rms_norm", "columns of the output", x.cols(), out.cols())?;
        let (cols, shared) = (x.cols(), out.shared());
        self.parallel(x.rows(), x.rows() * cols, |row| {
            // SAFETY: each task writes its own row.
            let out = unsafe { shared.slice_mut(row * cols, cols) };
            norm::row(
                self.isa,
                &x.data()[row * cols..][..cols],
                None,
                None,
                weight,
                eps,
                out,
            );
        });
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        x: &CpuTensor,
        bias: Option<&Vec<f32>>,
        residual: &mut CpuTensor,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut CpuTensor,
    ) -> Result<()> {
        check(
            "add_rms_norm",
            "length of the weight",
            x.cols(),
            weight.len(),
        )?;
        for (what, other) in [("residual", &*residual), ("output", &*out)] {
            check(
                "add_rms_norm",
                &format!("rows of the {what}"),
                x.rows(),
                other.rows(),
            )?;
            check(
                "add_rms_norm",
                &format!("columns of the {what}"),
                x.cols(),
                other.cols(),
            )?;
        }
        if let Some(bias) = bias {
            check("add_rms_norm", "length of the bias", x.cols(), bias.len())?;
        }
        let (cols, out, residual) = (x.cols(), out.shared(), residual.shared());
        self.parallel(x.rows(), x.rows() * cols, |row| {
            let x = &x.data()[row * cols..][..cols];
            // SAFETY: each task writes its own row of both.
            let (out, residual) = unsafe {
                (
                    out.slice_mut(row * cols, cols),
                    residual.slice_mut(row * cols, cols),
                )
            };
            let bias = bias.map(Vec::as_slice);
            norm::row(self.isa, x, bias, Some(residual), weight, eps, out);
        });
        Ok(())
    }

    fn rope_append(
        &mut self,
        qkv: &mut CpuTensor,
        heads: HeadCounts,
        plan: &CpuPlan,
        pages: &mut CpuKvPages,
        layer: usize,
    ) -> Result<()> {
        check_attention("rope_append", qkv, heads, plan, pages, layer)?;
        if plan.batch.rows() > 0 {
            rope::rope_append(qkv.data_mut(), heads, plan, pages, layer);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &CpuTensor,
        heads: HeadCounts,
        plan: &CpuPlan,
        pages: &CpuKvPages,
        layer: usize,
        scale: f32,
        out: &mut CpuTensor,
    ) -> Result<()> {
        check_attention("attention", qkv, heads, plan, pages, layer)?;
        check("attention", "rows of the output", qkv.rows(), out.rows())?;
        check(
            "attention",
            "columns of the output",
            heads.q * heads.head_dim,
            out.cols(),
        )?;
        let out = out.shared();
        let attention = attention::Attention {
            qkv: qkv.data(),
            heads,
            plan,
            pages,
            layer,
            scale,
            out,
        };
        let tasks = attention::tasks(plan, heads);
        let positions: usize = plan.batch.positions.iter().map(|&p| p as usize + 1).sum();
        let work = 2 * positions * heads.q * heads.head_dim;
        self.parallel(tasks.len(), work, |i| {
            attention::run(self.isa, &attention, tasks[i])
        });
        Ok(())
    }

    fn logits_rows(&mut self, x: &CpuTensor, plan: &CpuPlan, out: &mut CpuTensor) -> Result<()> {
        check("logits_rows", "rows of x", plan.batch.rows(), x.rows())?;
        check(
            "logits_rows",
            "rows of the output",
            plan.batch.logits_rows.len(),
            out.rows(),
        )?;
        check("logits_rows", "columns of the output", x.cols(), out.cols())?;
        let cols = x.cols();
        for (out, &row) in out
            .data_mut()
            .chunks_exact_mut(cols.max(1))
            .zip(&plan.batch.logits_rows)
        {
            out.copy_from_slice(&x.data()[row as usize * cols..][..cols]);
        }
        Ok(())
    }

    fn slice_columns(&mut self, x: &CpuTensor, first: usize, out: &mut CpuTensor) -> Result<()> {
        check("slice_columns", "rows of the output", x.rows(), out.rows())?;
        let (width, cols) = (out.cols(), x.cols());
        if first + width > cols {
            return Err(Error::shape(
                "slice_columns",
                format_args!("columns within {cols}"),
                format_args!("{first}..{}", first + width),
            ));
        }
        if width > 0 {
            let rows = out
                .data_mut()
                .chunks_exact_mut(width)
                .zip(x.data().chunks_exact(cols));
            rows.for_each(|(out, x)| out.copy_from_slice(&x[first..first + width]));
        }
        Ok(())
    }

    fn add_bias(&mut self, bias: &Vec<f32>, x: &mut CpuTensor) -> Result<()> {
        check("add_bias", "length of the bias", x.cols(), bias.len())?;
        for row in x.data_mut().chunks_exact_mut(bias.len().max(1)) {
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
        Ok(())
    }

    fn records(
        &mut self,
        logits: &CpuTensor,
        first_id: usize,
        wanted: &[WantedRecord<'_>],
    ) -> Result<Vec<u32>> {
        if let Some(wanted) = wanted.iter().find(|wanted| wanted.row >= logits.rows()) {
            let rows = format_args!("a row below {}", logits.rows()).to_string();
            return Err(Error::shape("records: logits", rows, wanted.row));
        }
        let cols = logits.cols();
        let sizes: Vec<_> = wanted.iter().map(|wanted| wanted.record.words()).collect();
        let mut words = vec![0; sizes.iter().sum()];
        let mut rest = words.as_mut_slice();
        let mut tasks = Vec::with_capacity(wanted.len());
        for (wanted, size) in wanted.iter().zip(sizes) {
            let (record, tail) = rest.split_at_mut(size);
            tasks.push((&logits.data()[wanted.row * cols..][..cols], wanted, record));
            rest = tail;
        }
        let run = |(logits, wanted, out): (&[f32], &WantedRecord<'_>, &mut [u32])| {
            sampling::record(logits, first_id, wanted.sample, wanted.record, out);
        };
        match &self.pool {
            Some(pool) if tasks.len() > 1 => {
                pool.install(|| tasks.into_par_iter().for_each(run));
            }
            _ => tasks.into_iter().for_each(run),
        }
        Ok(words)
    }

    fn read(&mut self, tensor: &CpuTensor) -> Result<Vec<f32>> {
        Ok(tensor.data().to_vec())
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }
}

fn check_attention(
    op: &str,
    qkv: &CpuTensor,
    heads: HeadCounts,
    plan: &CpuPlan,
    pages: &CpuKvPages,
    layer: usize,
) -> Result<()> {
    let shape = pages.shape();
    let refuse = |what: &str, expected: &str, found: usize| {
        Err(Error::shape(format_args!("{op}: {what}"), expected, found))
    };
    check(op, "rows of qkv", plan.batch.rows(), qkv.rows())?;
    if heads.kv == 0 {
        return refuse("KV heads", "at least one", heads.kv);
    }
    if heads.head_dim == 0 || heads.head_dim % 2 == 1 {
        return refuse("head size", "even, at least 2", heads.head_dim);
    }
    // The pages first: their sizes are of things that exist, so products of them fit.
    check(op, "KV heads of the pages", heads.kv, shape.num_kv_heads)?;
    check(op, "head size of the pages", heads.head_dim, shape.head_dim)?;
    check(
        op,
        "remainder of query heads by KV heads",
        0,
        heads.q % heads.kv,
    )?;
    if heads.q > qkv.cols() {
        return refuse("query heads", "no more than columns of qkv", heads.q);
    }
    check(op, "columns of qkv", heads.qkv_cols(), qkv.cols())?;
    check(
        op,
        "sines and cosines",
        plan.batch.rows() * (heads.head_dim / 2),
        plan.cos.len(),
    )?;
    check(
        op,
        "block size of the pages",
        plan.block_size,
        shape.block_size,
    )?;
    if plan.blocks > shape.num_blocks {
        return refuse(
            "blocks of the pages",
            &format!("the {} that the batch names", plan.blocks),
            shape.num_blocks,
        );
    }
    if layer >= shape.num_layers {
        return refuse("layer", &format!("below {}", shape.num_layers), layer);
    }
    Ok(())
}
