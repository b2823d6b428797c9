//! CPU ranks as a model sees them: collectives on tensors of the CPU backend.

use super::AllReduce;
use super::cpu::CpuComm;
use super::stats::CommStats;
use super::{Auto, Communicator};
use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, CpuTensor};
use crate::error::{Error, Result};

/// A [`CpuComm`] and how it reduces activations.
#[derive(Debug)]
pub struct TensorComm {
    comm: CpuComm,
    algorithm: &'static dyn AllReduce,
    sequence_parallel: bool,
}

impl TensorComm {
    /// Uses `auto`, which chooses by size.
    pub fn new(comm: CpuComm) -> Self {
        Self {
            comm,
            algorithm: &Auto,
            sequence_parallel: false,
        }
    }

    /// Uses the given all-reduce; all ranks must name the same.
    pub fn with_algorithm(comm: CpuComm, algorithm: &'static dyn AllReduce) -> Self {
        Self {
            algorithm,
            ..Self::new(comm)
        }
    }

    /// Sequence parallelism (Korthikanti et al., 2022): in
    /// [`Communicator::all_reduce_add_rms_norm`] each rank reduces, adds and normalises its part
    /// of the rows, which are then gathered: the same bytes, the bits of the all-reduces that sum in
    /// rank order, a share of the work. The rows of `residual` that belong to other ranks are left
    /// as they are, and not read again. All ranks must say the same.
    #[must_use]
    pub fn sequence_parallel(mut self, on: bool) -> Self {
        self.sequence_parallel = on;
        self
    }

    /// What this rank spent in collectives.
    pub fn stats(&self) -> CommStats {
        self.comm.stats()
    }
}

impl Communicator<CpuBackend> for TensorComm {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world_size(&self) -> usize {
        self.comm.world_size()
    }

    fn all_reduce(&mut self, _: &mut CpuBackend, x: &mut CpuTensor) -> Result<()> {
        Ok(self.comm.all_reduce_with(self.algorithm, x.data_mut())?)
    }

    fn all_reduce_add_rms_norm(
        &mut self,
        backend: &mut CpuBackend,
        x: &mut CpuTensor,
        bias: Option<&Vec<f32>>,
        residual: &mut CpuTensor,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut CpuTensor,
    ) -> Result<()> {
        if !self.sequence_parallel {
            self.all_reduce(backend, x)?;
            return backend.add_rms_norm(x, bias, residual, weight, eps, out);
        }
        let (rows, cols, world_size) = (x.rows(), x.cols(), self.world_size());
        // Equal parts: rows that are missing from the last are zeros.
        let each = rows.div_ceil(world_size);
        backend.set_rows(x, each * world_size)?;
        x.data_mut()[rows * cols..].fill(0.0);
        let mut sum = backend.tensor(each, cols)?;
        self.comm.reduce_scatter(x.data(), sum.data_mut())?;
        backend.set_rows(x, rows)?;

        let first = (self.rank() * each).min(rows);
        let mine = first * cols..(first + each).min(rows) * cols;
        let mut part = backend.tensor(each, cols)?;
        part.data_mut()[..mine.len()].copy_from_slice(&residual.data()[mine.clone()]);
        let mut normed = backend.tensor(each, cols)?;
        backend.add_rms_norm(&sum, bias, &mut part, weight, eps, &mut normed)?;
        residual.data_mut()[mine.clone()].copy_from_slice(&part.data()[..mine.len()]);

        backend.set_rows(out, each * world_size)?;
        self.comm.all_gather(normed.data(), out.data_mut())?;
        backend.set_rows(out, rows)
    }

    fn all_gather_columns(
        &mut self,
        backend: &mut CpuBackend,
        x: &CpuTensor,
        widths: &[usize],
        out: &mut CpuTensor,
    ) -> Result<()> {
        let (rows, total) = (x.rows(), widths.iter().sum::<usize>());
        if widths.len() != self.world_size() || out.rows() != rows || out.cols() != total {
            return Err(Error::shape(
                "all_gather_columns: output",
                format_args!("[{rows}, {total}] from {} ranks", self.world_size()),
                format_args!("[{}, {}] from {}", out.rows(), out.cols(), widths.len()),
            ));
        }
        // Gathered by rank, then laid side by side.
        let counts: Vec<_> = widths.iter().map(|width| width * rows).collect();
        let mut gathered = backend.tensor(rows, total)?;
        self.comm
            .all_gather_v(x.data(), &counts, gathered.data_mut())?;
        let mut parts = gathered.data();
        let mut first = 0;
        for &width in widths {
            let (part, rest) = parts.split_at(width * rows);
            if width > 0 {
                let out = out.data_mut().chunks_exact_mut(total);
                for (out, row) in out.zip(part.chunks_exact(width)) {
                    out[first..first + width].copy_from_slice(row);
                }
            }
            (parts, first) = (rest, first + width);
        }
        Ok(())
    }

    fn memory(&self) -> usize {
        self.comm.memory()
    }

    fn all_gather_words(&mut self, _: &mut CpuBackend, words: &[u32]) -> Result<Vec<u32>> {
        let mut out = vec![0; words.len() * self.world_size()];
        self.comm.all_gather(words, &mut out)?;
        Ok(out)
    }

    fn abort(&mut self, cause: &str) {
        self.comm.abort(cause);
    }
}
