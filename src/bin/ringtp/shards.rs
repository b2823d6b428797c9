//! `ringtp shards`.

use std::collections::HashMap;
use std::io::{Write, stdout};
use std::ops::Range;

use ringtp::checkpoint::Checkpoint;
use ringtp::shard::{Dims, ShardPlan, TensorPlan};
use ringtp::{DType, Error};
use serde_json::{Value, json};

use crate::Failure;
use crate::args::ShardsArgs;
use crate::table::{Side, table};

pub(crate) fn shards(args: &ShardsArgs) -> Result<(), Failure> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let plan = ShardPlan::new(&checkpoint.config().dims, args.tp)?;
    let dtype = args.dtype.0.unwrap_or(checkpoint.dtype());
    check(&plan, &checkpoint)?;
    let text = match args.json {
        true => format!("{}\n", to_json(&plan, dtype)),
        false => to_text(&plan, dtype),
    };
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// The layers whose biases are split as their weights are.
const COLUMNS: [&str; 5] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
];

/// Checks that the slices of all ranks make up the tensors of the checkpoint, and that every
/// rank's slices fit each other.
fn check(plan: &ShardPlan, checkpoint: &Checkpoint) -> ringtp::Result<()> {
    agree(plan.dims(), plan.tensors())?;
    for tensor in plan.tensors() {
        for rank in 0..plan.tp() {
            let part = checkpoint.shard(tensor, rank)?;
            let elements = part.rows() * part.cols();
            if elements != tensor.elements(rank) {
                return Err(disagree(tensor, rank, tensor.elements(rank), elements));
            }
        }
    }
    Ok(())
}

/// Checks the slices against each other: each tensor is covered, and what one product puts out
/// the next one takes in.
fn agree(dims: &Dims, tensors: &[TensorPlan]) -> ringtp::Result<()> {
    tensors.iter().try_for_each(tiles)?;
    let by_name: HashMap<&str, &TensorPlan> = tensors
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor))
        .collect();
    let find = |name: &str| by_name.get(name).copied();
    for layer in 0..dims.num_hidden_layers {
        let part = |name: &str| find(&format!("model.layers.{layer}.{name}.weight"));
        for column in COLUMNS {
            let bias = find(&format!("model.layers.{layer}.{column}.bias"));
            same(part(column), bias)?;
        }
        same(part("self_attn.q_proj"), part("self_attn.o_proj"))?;
        same(part("self_attn.k_proj"), part("self_attn.v_proj"))?;
        same(part("mlp.gate_proj"), part("mlp.up_proj"))?;
        same(part("mlp.gate_proj"), part("mlp.down_proj"))?;
        if let (Some(q), Some(k)) = (part("self_attn.q_proj"), part("self_attn.k_proj")) {
            heads(dims, q, k)?;
        }
    }
    if let Some(head) = find("lm_head.weight") {
        same(find("model.embed_tokens.weight"), Some(head))?;
    }
    Ok(())
}

/// The ranges cover the dimension; two are the same, or do not overlap.
fn tiles(tensor: &TensorPlan) -> ringtp::Result<()> {
    let length = tensor.shape[tensor.dim.unwrap_or(0)];
    let mut ranges: Vec<(Range<usize>, usize)> = tensor.ranges.iter().cloned().zip(0..).collect();
    ranges.sort_by_key(|(range, _)| (range.start, range.end));
    let mut last = 0..0;
    for (range, rank) in ranges {
        let follows = range.start == last.end || range == last || range.is_empty();
        if !follows {
            let expected = format!("a slice from {}", last.end);
            return Err(disagree(tensor, rank, expected, format_args!("{range:?}")));
        }
        if !range.is_empty() {
            last = range;
        }
    }
    if last.end != length {
        let expected = format!("slices up to {length}");
        return Err(disagree(
            tensor,
            tensor.ranges.len() - 1,
            expected,
            last.end,
        ));
    }
    Ok(())
}

/// Two tensors have the same ranges on every rank.
fn same(a: Option<&TensorPlan>, b: Option<&TensorPlan>) -> ringtp::Result<()> {
    let (Some(a), Some(b)) = (a, b) else {
        return Ok(());
    };
    for (rank, (left, right)) in a.ranges.iter().zip(&b.ranges).enumerate() {
        if left != right {
            let expected = format!("{left:?}, as of {}", a.name);
            return Err(disagree(b, rank, expected, format_args!("{right:?}")));
        }
    }
    Ok(())
}

/// Every rank has the KV heads of its query heads, and no others.
fn heads(dims: &Dims, q: &TensorPlan, k: &TensorPlan) -> ringtp::Result<()> {
    for (rank, (q, kv)) in q.ranges.iter().zip(&k.ranges).enumerate() {
        let group = dims.group_size();
        let first = q.start / dims.head_dim / group;
        let end = (q.end / dims.head_dim).div_ceil(group);
        let expected = first * dims.head_dim..end * dims.head_dim;
        if *kv != expected {
            let expected = format!("{expected:?}, the heads of its queries");
            return Err(disagree(k, rank, expected, format_args!("{kv:?}")));
        }
    }
    Ok(())
}

fn disagree(
    tensor: &TensorPlan,
    rank: usize,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> Error {
    Error::shape(
        format_args!("{} on rank {rank}", tensor.name),
        expected,
        found,
    )
}

fn rank_bytes(plan: &ShardPlan, rank: usize, dtype: DType) -> usize {
    let elements: usize = plan.tensors().iter().map(|t| t.elements(rank)).sum();
    elements * dtype.size()
}

fn to_json(plan: &ShardPlan, dtype: DType) -> Value {
    let rank = |tensor: &TensorPlan, rank: usize| {
        let slice = tensor.slice(rank);
        let slice: Vec<_> = slice.iter().map(|range| [range.start, range.end]).collect();
        json!({
            "rank": rank,
            "slice": slice,
            "bytes": tensor.elements(rank) * dtype.size(),
        })
    };
    let tensor = |tensor: &TensorPlan| {
        json!({
            "name": tensor.name,
            "shape": tensor.shape,
            "split_dim": tensor.dim,
            "ranks": (0..plan.tp()).map(|r| rank(tensor, r)).collect::<Vec<_>>(),
        })
    };
    let total = |rank| json!({ "rank": rank, "bytes": rank_bytes(plan, rank, dtype) });
    json!({
        "tp": plan.tp(),
        "valid_tp": plan.dims().valid_tp(),
        "dtype": dtype.name(),
        "tensors": plan.tensors().iter().map(tensor).collect::<Vec<_>>(),
        "ranks": (0..plan.tp()).map(total).collect::<Vec<_>>(),
        "ranks_agree": true,
    })
}

fn to_text(plan: &ShardPlan, dtype: DType) -> String {
    let mut rows = vec![["tensor", "shape", "rank", "slice", "bytes"].map(String::from)];
    for tensor in plan.tensors() {
        for rank in 0..plan.tp() {
            let slice = tensor.slice(rank);
            let slice: Vec<_> = slice
                .iter()
                .map(|r| format!("{}..{}", r.start, r.end))
                .collect();
            let shape: Vec<_> = tensor.shape.iter().map(usize::to_string).collect();
            rows.push([
                tensor.name.clone(),
                format!("[{}]", shape.join(", ")),
                rank.to_string(),
                format!("[{}]", slice.join(", ")),
                (tensor.elements(rank) * dtype.size()).to_string(),
            ]);
        }
    }
    use Side::{Left, Right};
    let mut out = table([Left, Left, Right, Left, Right], &rows);
    out.push('\n');
    for rank in 0..plan.tp() {
        let bytes = rank_bytes(plan, rank, dtype);
        out.push_str(&format!("rank {rank}: {bytes} bytes of {dtype}\n"));
    }
    out.push_str(&format!(
        "check: {} tensors, {} ranks: the slices make up the checkpoint and every rank agrees\n",
        plan.tensors().len(),
        plan.tp()
    ));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIMS: Dims = Dims {
        hidden_size: 32,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 12,
        num_key_value_heads: 4,
        head_dim: 4,
        vocab_size: 61,
        attention_bias: true,
        mlp_bias: true,
        tie_word_embeddings: false,
    };

    #[test]
    fn right_slices_agree() {
        for tp in DIMS.valid_tp() {
            let plan = ShardPlan::new(&DIMS, tp).unwrap();
            agree(&DIMS, plan.tensors()).unwrap();
        }
    }

    /// One slice of one split tensor, moved, shortened, lengthened or swapped with another's.
    #[test]
    fn any_wrong_slice_is_found_and_named() {
        for tp in DIMS.valid_tp().into_iter().filter(|&tp| tp > 1) {
            let plan = ShardPlan::new(&DIMS, tp).unwrap();
            let split = plan.tensors().iter().enumerate();
            for (index, tensor) in split.filter(|(_, tensor)| tensor.dim.is_some()) {
                let right = tensor.ranges[tp - 1].clone();
                let moved = right.start + 1..right.end + 1;
                let short = right.start..right.end - 1;
                let long = right.start - 1..right.end;
                for wrong in [moved, short, long, 0..0] {
                    let mut tensors = plan.tensors().to_vec();
                    tensors[index].ranges[tp - 1] = wrong.clone();
                    let error = agree(&DIMS, &tensors).expect_err(&tensor.name).to_string();
                    assert!(error.contains(" on rank "), "{wrong:?}: {error}");
                }
                // Still tiles, but no longer fits the tensors it is multiplied with.
                if tensor.ranges[0] != right {
                    let mut tensors = plan.tensors().to_vec();
                    tensors[index].ranges.swap(0, tp - 1);
                    assert!(agree(&DIMS, &tensors).is_err(), "tp {tp}: {}", tensor.name);
                }
            }
        }
    }
}
