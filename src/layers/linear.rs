//! Linear layers split by rows or by columns.

use std::ops::Range;

use super::Rank;
use crate::backend::{Backend, Epilogue, HeadCounts, Layout};
use crate::comm::Communicator;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::host::HostMatrix;
use crate::shard::{Dims, HeadShard, split};

/// One of `tp` equal roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Number of ranks.
    pub tp: usize,
    /// This rank, below `tp`.
    pub rank: usize,
}

impl Partition {
    /// This rank's part of `0..n`, by [`split`].
    pub fn of(self, n: usize) -> Range<usize> {
        split(n, self.tp, self.rank)
    }

    /// All ranks' widths of a dimension of `n`.
    fn widths(self, n: usize) -> Vec<usize> {
        (0..self.tp)
            .map(|rank| split(n, self.tp, rank).len())
            .collect()
    }
}

/// Rows `range` of a whole weight; of a whole bias the same elements.
pub(super) fn rows<'a>(weight: &HostMatrix<'a>, range: Range<usize>) -> Result<HostMatrix<'a>> {
    weight.slice(range, 0..weight.cols())
}

fn elements<'a>(bias: &HostMatrix<'a>, range: Range<usize>) -> Result<HostMatrix<'a>> {
    bias.slice(0..1, range)
}

/// What a layer split over output features holds: of each whole part the rows `ranges[i]` of
/// the weight and the same elements of the bias, stacked.
fn stack<B: Backend, const N: usize>(
    backend: &mut B,
    weights: &[HostMatrix<'_>; N],
    bias: Option<[HostMatrix<'_>; N]>,
    ranges: &[Range<usize>; N],
    layout: Layout,
    dtype: DType,
) -> Result<(B::Matrix, Option<B::Vector>)> {
    let weights: Vec<_> = (weights.iter().zip(ranges))
        .map(|(weight, range)| rows(weight, range.clone()))
        .collect::<Result<_>>()?;
    let bias = bias
        .map(|bias| {
            let bias: Vec<_> = (bias.iter().zip(ranges))
                .map(|(bias, range)| elements(bias, range.clone()))
                .collect::<Result<_>>()?;
            backend.vector(&bias)
        })
        .transpose()?;
    Ok((backend.matrix(&weights, layout, dtype)?, bias))
}

/// `y = x Wᵀ + b`, split over the rows of W: each rank makes some columns of y.
pub struct ColumnParallelLinear<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Vector>,
    part: Partition,
    out_features: usize,
    /// All-gather the output, so that every rank has all of y.
    pub gather_output: bool,
    /// Leave the bias to the caller: see [`Self::bias`].
    pub skip_bias_add: bool,
}

impl<B: Backend> ColumnParallelLinear<B> {
    /// The rank's rows of `weight` `[out, in]` and of `bias` `[out]`, stored as `dtype`.
    pub fn new(
        backend: &mut B,
        weight: HostMatrix<'_>,
        bias: Option<HostMatrix<'_>>,
        part: Partition,
        dtype: DType,
    ) -> Result<Self> {
        let ranges = [part.of(weight.rows())];
        let bias = bias.map(|bias| [bias]);
        let (weight_part, bias) = stack(backend, &[weight], bias, &ranges, Layout::Rows, dtype)?;
        Ok(Self {
            weight: weight_part,
            bias,
            part,
            out_features: weight.rows(),
            gather_output: false,
            skip_bias_add: false,
        })
    }

    /// The rank's part of the bias, for callers that add it themselves.
    pub fn bias(&self) -> Option<&B::Vector> {
        self.bias.as_ref()
    }

    /// Columns that this rank makes.
    pub fn local_features(&self) -> usize {
        self.part.of(self.out_features).len()
    }

    /// `out` is `[rows, local_features]`; all of them with `gather_output`.
    pub fn forward<C: Communicator<B>>(
        &self,
        rank: &mut Rank<'_, B, C>,
        x: &B::Tensor,
        rows: usize,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let bias = self.bias.as_ref().filter(|_| !self.skip_bias_add);
        let epilogue = Epilogue {
            bias,
            residual: None,
        };
        if !self.gather_output {
            return rank.backend.linear(x, &self.weight, epilogue, out);
        }
        let mut local = rank.backend.tensor(rows, self.local_features())?;
        rank.backend.linear(x, &self.weight, epilogue, &mut local)?;
        let widths = self.part.widths(self.out_features);
        rank.comm
            .all_gather_columns(rank.backend, &local, &widths, out)
    }
}

/// Gate and up projections as one product that ends in `silu(gate) * up`. Each part is split
/// by itself, so a rank's gate and up columns belong together.
pub struct MergedColumnParallelLinear<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Vector>,
}

impl<B: Backend> MergedColumnParallelLinear<B> {
    /// The rank's rows of gate and up, `[intermediate, hidden]` each, with their biases.
    pub fn new(
        backend: &mut B,
        gate_up: [HostMatrix<'_>; 2],
        bias: Option<[HostMatrix<'_>; 2]>,
        part: Partition,
        dtype: DType,
    ) -> Result<Self> {
        let ranges = [0, 1].map(|i| part.of(gate_up[i].rows()));
        let (weight, bias) = stack(backend, &gate_up, bias, &ranges, Layout::GateUp, dtype)?;
        Ok(Self { weight, bias })
    }

    /// As [`Self::new`], of a checkpoint that stores gate and up fused: `[2 intermediate,
    /// hidden]`. The fused tensor is cut into its global parts before either is split.
    pub fn from_fused(
        backend: &mut B,
        fused: HostMatrix<'_>,
        bias: Option<HostMatrix<'_>>,
        part: Partition,
        dtype: DType,
    ) -> Result<Self> {
        let (half, all) = (fused.rows() / 2, fused.rows());
        let parts = [rows(&fused, 0..half)?, rows(&fused, half..all)?];
        let bias = bias
            .map(|bias| Ok::<_, Error>([elements(&bias, 0..half)?, elements(&bias, half..all)?]))
            .transpose()?;
        Self::new(backend, parts, bias, part, dtype)
    }

    /// `out` is `[rows, the rank's part of intermediate]`.
    pub fn forward(&self, backend: &mut B, x: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        let epilogue = Epilogue {
            bias: self.bias.as_ref(),
            residual: None,
        };
        backend.linear(x, &self.weight, epilogue, out)
    }
}

/// The projections to queries, keys and values as one product, split by whole heads; where
/// there are more ranks than KV heads, a KV head is on several.
pub struct QkvParallelLinear<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Vector>,
    heads: HeadCounts,
}

impl<B: Backend> QkvParallelLinear<B> {
    /// The rank's heads of q, k and v, `[heads * head_dim, hidden]` each, with their biases.
    pub fn new(
        backend: &mut B,
        dims: &Dims,
        weights: [HostMatrix<'_>; 3],
        bias: Option<[HostMatrix<'_>; 3]>,
        part: Partition,
        dtype: DType,
    ) -> Result<Self> {
        dims.check_tp(part.tp)?;
        let heads = HeadShard::new(dims, part.tp, part.rank);
        let d = dims.head_dim;
        let range = |heads: &Range<usize>| heads.start * d..heads.end * d;
        let ranges = [range(&heads.q), range(&heads.kv), range(&heads.kv)];
        let (weight, bias) = stack(backend, &weights, bias, &ranges, Layout::Rows, dtype)?;
        Ok(Self {
            weight,
            bias,
            heads: HeadCounts {
                q: heads.q.len(),
                kv: heads.kv.len(),
                head_dim: d,
            },
        })
    }

    /// The heads of this rank.
    pub fn heads(&self) -> HeadCounts {
        self.heads
    }

    /// `out` is `[rows, (q + 2 kv) * head_dim]`: queries, keys, values.
    pub fn forward(&self, backend: &mut B, x: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        let epilogue = Epilogue {
            bias: self.bias.as_ref(),
            residual: None,
        };
        backend.linear(x, &self.weight, epilogue, out)
    }
}

/// `y = x Wᵀ + b`, split over the columns of W: each rank adds a part of every sum.
pub struct RowParallelLinear<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Vector>,
    range: Range<usize>,
    /// x is this rank's slice of the input; otherwise all of it, of which the slice is taken.
    pub input_is_parallel: bool,
    /// Sum over the ranks; otherwise the caller does, and adds the bias.
    pub reduce_results: bool,
    /// Leave the bias to the caller: see [`Self::bias`].
    pub skip_bias_add: bool,
}

impl<B: Backend> RowParallelLinear<B> {
    /// Columns `range` of `weight` `[out, in]`; all of `bias` `[out]`.
    pub fn new(
        backend: &mut B,
        weight: HostMatrix<'_>,
        bias: Option<HostMatrix<'_>>,
        range: Range<usize>,
        dtype: DType,
    ) -> Result<Self> {
        let slice = weight.slice(0..weight.rows(), range.clone())?;
        Ok(Self {
            weight: backend.matrix(&[slice], Layout::Rows, dtype)?,
            bias: bias.map(|bias| backend.vector(&[bias])).transpose()?,
            range,
            input_is_parallel: true,
            reduce_results: true,
            skip_bias_add: false,
        })
    }

    /// The bias, for callers that add it themselves.
    pub fn bias(&self) -> Option<&B::Vector> {
        self.bias.as_ref()
    }

    /// This rank's summands alone, without bias: `out` is `[rows, out]`.
    pub fn partial(&self, backend: &mut B, x: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        backend.linear(x, &self.weight, Epilogue::none(), out)
    }

    /// `out` is `[rows, out]`: the sum over the ranks and the bias, once, in f32.
    ///
    /// # Errors
    /// `reduce_results = false` with a bias that is not skipped: it would be added on every
    /// rank.
    pub fn forward<C: Communicator<B>>(
        &self,
        rank: &mut Rank<'_, B, C>,
        x: &B::Tensor,
        rows: usize,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let bias = self.bias.as_ref().filter(|_| !self.skip_bias_add);
        if bias.is_some() && !self.reduce_results {
            return Err(Error::input(
                "RowParallelLinear: reduce_results",
                "true where a bias is to be added",
                "false",
                "set skip_bias_add and add the bias after your own reduction",
            ));
        }
        if self.input_is_parallel {
            self.partial(rank.backend, x, out)?;
        } else {
            let mut slice = rank.backend.tensor(rows, self.range.len())?;
            rank.backend
                .slice_columns(x, self.range.start, &mut slice)?;
            self.partial(rank.backend, &slice, out)?;
        }
        if self.reduce_results {
            rank.comm.all_reduce(rank.backend, out)?;
        }
        match bias {
            Some(bias) => rank.backend.add_bias(bias, out),
            None => Ok(()),
        }
    }
}

/// Weights are not for printing.
macro_rules! opaque_debug {
    ($($layer:ident),*) => {$(
        impl<B: $crate::backend::Backend> std::fmt::Debug for $layer<B> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($layer)).finish_non_exhaustive()
            }
        }
    )*};
}
pub(crate) use opaque_debug;

opaque_debug!(
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QkvParallelLinear,
    RowParallelLinear
);
