//! How a block ends: its output projection, the sum over the ranks, the residual, the next norm.

use std::ops::Range;

use super::linear::opaque_debug;
use super::{ColumnParallelLinear, Partition, Rank, RmsNorm, RowParallelLinear};
use crate::backend::Backend;
use crate::comm::Communicator;
use crate::dtype::DType;
use crate::error::Result;
use crate::host::HostMatrix;

/// The activations that run through the decoder, `[rows, hidden]` each, the same on all ranks.
#[derive(Debug)]
pub struct Stream<'a, T> {
    /// Rows of the batch.
    pub rows: usize,
    /// The sum of all blocks so far.
    pub residual: &'a mut T,
    /// Its norm: what a block reads, and what it leaves for the next.
    pub hidden: &'a mut T,
    /// Scratch: a block's output before it joins the residual.
    pub output: &'a mut T,
}

/// The projection back to the hidden size, `o` of attention and `down` of the MLP, whose input
/// is spread over the ranks.
pub enum OutputProjection<B: Backend> {
    /// Each rank multiplies its part of the input: one all-reduce, whose sums are ordered by
    /// rank, so that another number of ranks rounds differently.
    RowParallel(RowParallelLinear<B>),
    /// Each rank gathers the whole input and makes some columns of the output, which are
    /// gathered too: about one and a half times the bytes, and each element is summed on one
    /// rank over all of K, so that the bits are those of one rank.
    Gathered {
        /// Some columns of the output; gathers them.
        linear: ColumnParallelLinear<B>,
        /// The width of each rank's part of the input.
        widths: Vec<usize>,
    },
}

impl<B: Backend> OutputProjection<B> {
    /// Of `weight` `[hidden, in]`, of whose columns rank r's input is `ranges[r]`. With
    /// `tp_invariant` the bits of the output do not depend on the number of ranks.
    pub fn new(
        backend: &mut B,
        weight: HostMatrix<'_>,
        bias: Option<HostMatrix<'_>>,
        part: Partition,
        ranges: &[Range<usize>],
        dtype: DType,
        tp_invariant: bool,
    ) -> Result<Self> {
        if tp_invariant && part.tp > 1 {
            let mut linear = ColumnParallelLinear::new(backend, weight, bias, part, dtype)?;
            linear.gather_output = true;
            let widths = ranges.iter().map(ExactSizeIterator::len).collect();
            return Ok(Self::Gathered { linear, widths });
        }
        let range = ranges[part.rank].clone();
        let linear = RowParallelLinear::new(backend, weight, bias, range, dtype)?;
        Ok(Self::RowParallel(linear))
    }

    /// `residual += projection of x, over all ranks`, then `hidden = norm(residual)`. x is
    /// `[rows, this rank's part of the input]`.
    pub fn forward_add_norm<C: Communicator<B>>(
        &self,
        rank: &mut Rank<'_, B, C>,
        x: &B::Tensor,
        stream: &mut Stream<'_, B::Tensor>,
        norm: &RmsNorm<B>,
    ) -> Result<()> {
        let Stream {
            rows,
            residual,
            hidden,
            output,
        } = stream;
        match self {
            Self::RowParallel(linear) => {
                linear.partial(rank.backend, x, output)?;
                rank.comm.all_reduce_add_rms_norm(
                    rank.backend,
                    output,
                    linear.bias(),
                    residual,
                    &norm.weight,
                    norm.eps,
                    hidden,
                )
            }
            Self::Gathered { linear, widths } => {
                let mut whole = rank.backend.tensor(*rows, widths.iter().sum())?;
                rank.comm
                    .all_gather_columns(rank.backend, x, widths, &mut whole)?;
                linear.forward(rank, &whole, *rows, output)?;
                let (weight, eps) = (&norm.weight, norm.eps);
                rank.backend
                    .add_rms_norm(output, None, residual, weight, eps, hidden)
            }
        }
    }
}

opaque_debug!(OutputProjection);
