//! Ranks on devices as a model sees them: collectives on tensors of the CUDA backend.

use super::P2pComm;
use crate::backend::cuda::{
    CudaBackend, CudaTensor, CudaVector, RecordsSize, RowLayout, Rows, RowsMut, words_of,
};
use crate::backend::{Backend, WantedRecord};
use crate::comm::Communicator;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::shard::VocabShard;

/// A backend whose stream is not the handle's would race with the collectives.
fn same_stream(comm: &P2pComm, backend: &CudaBackend) -> Result<()> {
    if backend.stream().as_raw() == comm.stream().as_raw() {
        return Ok(());
    }
    Err(Error::shape(
        "stream of the backend",
        "that of the rank's P2pComm",
        "another one",
    ))
}

impl Communicator<CudaBackend> for P2pComm {
    fn rank(&self) -> usize {
        P2pComm::rank(self)
    }

    fn world_size(&self) -> usize {
        P2pComm::world_size(self)
    }

    fn all_reduce(&mut self, backend: &mut CudaBackend, x: &mut CudaTensor) -> Result<()> {
        same_stream(self, backend)?;
        let dtype = x.layout().dtype;
        P2pComm::all_reduce(self, dtype, &mut x.as_mut()?)
    }

    fn all_reduce_add_rms_norm(
        &mut self,
        backend: &mut CudaBackend,
        x: &mut CudaTensor,
        bias: Option<&CudaVector>,
        residual: &mut CudaTensor,
        weight: &CudaVector,
        eps: f32,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let RowLayout {
            rows, cols, dtype, ..
        } = *x.layout();
        let each = self.rows_of_each(rows);
        if each == 0 {
            Communicator::all_reduce(self, backend, x)?;
            return backend.add_rms_norm(x, bias, residual, weight, eps, out);
        }
        same_stream(self, backend)?;
        for (what, other) in [("residual", &*residual), ("output", &*out)] {
            let other = other.layout();
            if other != x.layout() {
                return Err(Error::shape(
                    format_args!("all_reduce_add_rms_norm: {what}"),
                    format_args!("[{rows}, {cols}] of {dtype}"),
                    format_args!("[{}, {}] of {}", other.rows, other.cols, other.dtype),
                ));
            }
        }
        // The ranks' own rows, one rank after another, then those of all.
        let (me, shared) = (P2pComm::rank(self), each * P2pComm::world_size(self));
        let own = me * each..(me + 1) * each;
        let layout = RowLayout::contiguous(dtype, each, cols);
        let (pool, bytes) = (backend.passing(), each * cols * dtype.size());
        let (mut sum, mut normed) = (pool.buffer(bytes)?, pool.buffer(bytes)?);
        self.reduce_scatter(dtype, x.part(0..shared)?.data(), &mut sum.as_mut())?;
        let to = RowsMut::new(normed.as_mut(), layout)?;
        let from = Rows::new(sum.as_ref(), layout)?;
        backend.add_rms_norm_rows(from, bias, residual.part_mut(own)?, weight, eps, to)?;
        let mut gathered = out.part_mut(0..shared)?.into_data();
        self.all_gather(dtype, normed.as_ref(), &mut gathered)?;
        if shared == rows {
            return Ok(());
        }
        let rest = shared..rows;
        let mut left = x.part_mut(rest.clone())?.into_data();
        P2pComm::all_reduce(self, dtype, &mut left)?;
        let (from, to) = (x.part(rest.clone())?, out.part_mut(rest.clone())?);
        backend.add_rms_norm_rows(from, bias, residual.part_mut(rest)?, weight, eps, to)
    }

    fn passing_columns(&self, cols: usize) -> Vec<usize> {
        let ranks = P2pComm::world_size(self);
        match self.rows_of_each(ranks) {
            0 => Vec::new(),
            // A rank's rows in whole are no more than all rows' share of the columns.
            _ => vec![cols.div_ceil(ranks); 2],
        }
    }

    fn all_gather_columns(
        &mut self,
        backend: &mut CudaBackend,
        x: &CudaTensor,
        widths: &[usize],
        out: &mut CudaTensor,
    ) -> Result<()> {
        same_stream(self, backend)?;
        let (from, to) = (*x.layout(), *out.layout());
        let total: usize = widths.iter().sum();
        if (to.rows, to.cols, to.dtype) != (from.rows, total, from.dtype) {
            return Err(Error::shape(
                "all_gather_columns: output",
                format_args!("[{}, {total}] of {}", from.rows, from.dtype),
                format_args!("[{}, {}] of {}", to.rows, to.cols, to.dtype),
            ));
        }
        let input = x.as_ref()?;
        P2pComm::all_gather_columns(
            self,
            from.dtype,
            from.rows,
            widths,
            input,
            &mut out.as_mut()?,
        )
    }

    fn all_gather_words(&mut self, backend: &mut CudaBackend, words: &[u32]) -> Result<Vec<u32>> {
        same_stream(self, backend)?;
        let (stream, pool) = (backend.stream(), backend.passing());
        let input = pool.upload(words, stream)?;
        let mut all = vec![0; words.len() * P2pComm::world_size(self)];
        let mut out = pool.buffer(size_of_val(all.as_slice()))?;
        // As many bits as words have; nothing is computed with them.
        self.all_gather(DType::F32, input.as_ref(), &mut out.as_mut())?;
        // What went wrong on a device is said here; the copy that follows finds the stream idle.
        self.synchronize()?;
        stream.download(out.as_ref(), &mut all)?;
        Ok(all)
    }

    fn gather_records(
        &mut self,
        backend: &mut CudaBackend,
        logits: &CudaTensor,
        shard: &VocabShard,
        wanted: &[WantedRecord<'_>],
    ) -> Result<Vec<u32>> {
        same_stream(self, backend)?;
        backend.reserve_records(self, RecordsSize::of(wanted, shard))?;
        let bytes = size_of::<u32>() * words_of(wanted);
        let pool = backend.passing().clone();
        let (mut own, mut all) = (pool.buffer(bytes)?, pool.buffer(bytes * self.world_size())?);
        backend.put_records(logits, shard.ids.start, wanted, &mut own.as_mut())?;
        self.all_gather(DType::F32, own.as_ref(), &mut all.as_mut())?;
        backend.order_records(all.as_ref())?;
        // The one wait of a step.
        self.synchronize()?;
        Ok(backend.ordered_records(self.world_size(), wanted))
    }

    fn memory(&self) -> usize {
        P2pComm::memory(self)
    }

    fn generation(&self) -> u64 {
        self.rebuilds()
    }

    fn meet(&mut self, backend: &mut CudaBackend) -> Result<()> {
        same_stream(self, backend)?;
        P2pComm::meet(self)
    }

    fn abort(&mut self, cause: &str) {
        P2pComm::abort(self, cause);
    }
}
