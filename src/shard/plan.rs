//! The slices of every tensor of a model.

use std::ops::Range;

use super::{Dims, HeadShard, VocabShard, split};
use crate::error::Result;

/// How one tensor of a checkpoint is split: along one dimension, or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlan {
    /// The name in the checkpoint.
    pub name: String,
    /// The whole shape: `[out, in]`, or `[n]`.
    pub shape: Vec<usize>,
    /// The dimension that is split; `None` where every rank holds the whole.
    pub dim: Option<usize>,
    /// For each rank, its range of that dimension (of dimension 0 where it is whole).
    pub ranges: Vec<Range<usize>>,
}

impl TensorPlan {
    /// The slice of `rank`, one range a dimension.
    pub fn slice(&self, rank: usize) -> Vec<Range<usize>> {
        let mut slice: Vec<_> = self.shape.iter().map(|&n| 0..n).collect();
        slice[self.dim.unwrap_or(0)] = self.ranges[rank].clone();
        slice
    }

    /// Elements of the slice of `rank`.
    pub fn elements(&self, rank: usize) -> usize {
        self.slice(rank)
            .iter()
            .map(ExactSizeIterator::len)
            .product()
    }
}

/// For each tensor of a model and each rank, the slice that the rank takes.
#[derive(Clone, Debug)]
pub struct ShardPlan {
    dims: Dims,
    tp: usize,
    tensors: Vec<TensorPlan>,
}

impl ShardPlan {
    /// The plan for `tp` ranks; an error that lists the valid numbers if `tp` is not one.
    pub fn new(dims: &Dims, tp: usize) -> Result<Self> {
        dims.check_tp(tp)?;
        let mut plan = Self {
            dims: *dims,
            tp,
            tensors: Vec::new(),
        };
        plan.vocabulary("model.embed_tokens.weight");
        for layer in 0..dims.num_hidden_layers {
            plan.layer(&format!("model.layers.{layer}"));
        }
        plan.whole("model.norm.weight".into(), dims.hidden_size);
        if !dims.tie_word_embeddings {
            plan.vocabulary("lm_head.weight");
        }
        Ok(plan)
    }

    /// The sizes that this plan is for.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// The number of ranks.
    pub fn tp(&self) -> usize {
        self.tp
    }

    /// The tensors, in the order of the forward pass.
    pub fn tensors(&self) -> &[TensorPlan] {
        &self.tensors
    }

    fn layer(&mut self, layer: &str) {
        let Dims {
            hidden_size,
            intermediate_size,
            head_dim,
            ..
        } = self.dims;
        let heads = |rank| HeadShard::new(&self.dims, self.tp, rank);
        let elements = |heads: Range<usize>| heads.start * head_dim..heads.end * head_dim;
        let q: Vec<_> = (0..self.tp).map(|rank| elements(heads(rank).q)).collect();
        let kv: Vec<_> = (0..self.tp).map(|rank| elements(heads(rank).kv)).collect();
        let inner: Vec<_> = (0..self.tp)
            .map(|rank| split(intermediate_size, self.tp, rank))
            .collect();
        let q_out = self.dims.num_attention_heads * head_dim;
        let kv_out = self.dims.num_key_value_heads * head_dim;

        let bias = self.dims.attention_bias;
        self.whole(format!("{layer}.input_layernorm.weight"), hidden_size);
        self.column(
            format!("{layer}.self_attn.q_proj"),
            [q_out, hidden_size],
            bias,
            &q,
        );
        self.column(
            format!("{layer}.self_attn.k_proj"),
            [kv_out, hidden_size],
            bias,
            &kv,
        );
        self.column(
            format!("{layer}.self_attn.v_proj"),
            [kv_out, hidden_size],
            bias,
            &kv,
        );
        self.row(
            format!("{layer}.self_attn.o_proj"),
            [hidden_size, q_out],
            bias,
            &q,
        );
        let bias = self.dims.mlp_bias;
        self.whole(
            format!("{layer}.post_attention_layernorm.weight"),
            hidden_size,
        );
        let shape = [intermediate_size, hidden_size];
        self.column(format!("{layer}.mlp.gate_proj"), shape, bias, &inner);
        self.column(format!("{layer}.mlp.up_proj"), shape, bias, &inner);
        self.row(
            format!("{layer}.mlp.down_proj"),
            [hidden_size, intermediate_size],
            bias,
            &inner,
        );
    }

    fn column(&mut self, name: String, shape: [usize; 2], bias: bool, ranges: &[Range<usize>]) {
        if bias {
            self.push(
                format!("{name}.bias"),
                vec![shape[0]],
                Some(0),
                ranges.to_vec(),
            );
        }
        self.push(
            format!("{name}.weight"),
            shape.to_vec(),
            Some(0),
            ranges.to_vec(),
        );
    }

    fn row(&mut self, name: String, shape: [usize; 2], bias: bool, ranges: &[Range<usize>]) {
        if bias {
            self.whole(format!("{name}.bias"), shape[0]);
        }
        self.push(
            format!("{name}.weight"),
            shape.to_vec(),
            Some(1),
            ranges.to_vec(),
        );
    }

    fn vocabulary(&mut self, name: &str) {
        let shape = vec![self.dims.vocab_size, self.dims.hidden_size];
        let shard = |rank| VocabShard::new(self.dims.vocab_size, self.tp, rank).ids;
        let ranges = (0..self.tp).map(shard).collect();
        self.push(name.into(), shape, Some(0), ranges);
    }

    fn whole(&mut self, name: String, length: usize) {
        self.push(name, vec![length], None, vec![0..length; self.tp]);
    }

    fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        dim: Option<usize>,
        ranges: Vec<Range<usize>>,
    ) {
        self.tensors.push(TensorPlan {
            name,
            shape,
            dim,
            ranges,
        });
    }
}
