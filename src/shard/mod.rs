//! Which slice of which tensor belongs to which rank: pure arithmetic, no I/O, no device.
//!
//! | piece | rule |
//! |---|---|
//! | column-parallel (gate, up) | rows, [`split`] |
//! | row-parallel (down) | columns, [`split`] |
//! | q, k, v, o | whole heads: a KV head and its query heads stay together, [`HeadShard`] |
//! | embedding, LM head | rows of the padded vocabulary, [`VocabShard`] |
//! | norms, row-parallel biases | replicated |
//!
//! [`ShardPlan`] applies the rules to every tensor of a model.

mod plan;

use std::ops::Range;

pub use plan::{ShardPlan, TensorPlan};

use crate::error::{Error, InvalidTp, Result};

/// The sizes of a Llama that decide how it is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between gate/up and down.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Whether q, k, v and o have a bias.
    pub attention_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Whether the LM head is the embedding.
    pub tie_word_embeddings: bool,
}

impl Dims {
    /// Query heads that share a KV head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Every number of ranks that this model can be split over, ascending.
    ///
    /// Up to the number of KV heads any number will do; above it, a KV head is replicated on
    /// `tp / num_key_value_heads` ranks, which must be exact and divide its query heads. The
    /// intermediate size and the vocabulary never forbid one.
    pub fn valid_tp(&self) -> Vec<usize> {
        (1..=self.num_attention_heads)
            .filter(|&tp| self.tp_objection(tp).is_none())
            .collect()
    }

    /// An error that lists the valid numbers, if `tp` is not one of them.
    pub fn check_tp(&self, tp: usize) -> Result<()> {
        match self.tp_objection(tp) {
            None => Ok(()),
            Some(reason) => Err(Error::InvalidTp(InvalidTp {
                tp,
                reason,
                valid: self.valid_tp(),
            })),
        }
    }

    fn tp_objection(&self, tp: usize) -> Option<String> {
        let (kv, group) = (self.num_key_value_heads, self.group_size());
        if tp == 0 {
            Some("there must be at least one".into())
        } else if tp <= kv {
            None
        } else if !tp.is_multiple_of(kv) {
            Some(format!(
                "{tp} is above the {kv} KV heads and not a multiple of them"
            ))
        } else if !group.is_multiple_of(tp / kv) {
            Some(format!(
                "each KV head would be on {} ranks, which does not divide its {group} query heads",
                tp / kv
            ))
        } else {
            None
        }
    }
}

/// The part of `0..n` that rank `rank` of `tp` takes.
///
/// Equal parts where `tp` divides `n`; otherwise parts that differ by one granule: 16, or 1
/// where 16 does not divide `n` or there are fewer granules than ranks. Lower ranks take the
/// larger parts.
pub fn split(n: usize, tp: usize, rank: usize) -> Range<usize> {
    assert!(rank < tp, "rank {rank} of {tp}");
    let granule = match n {
        n if n.is_multiple_of(tp) => n / tp,
        n if n.is_multiple_of(16) && n / 16 >= tp => 16,
        _ => 1,
    };
    if granule == 0 {
        return 0..0;
    }
    let granules = n / granule;
    let start = |rank: usize| (rank * (granules / tp) + rank.min(granules % tp)) * granule;
    start(rank)..start(rank + 1)
}

/// The heads of one rank, as ranges of the model's heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadShard {
    /// Query heads.
    pub q: Range<usize>,
    /// KV heads.
    pub kv: Range<usize>,
}

impl HeadShard {
    /// The heads of `rank` of `tp`; `tp` must be valid for `dims`.
    pub fn new(dims: &Dims, tp: usize, rank: usize) -> Self {
        let (kv, group) = (dims.num_key_value_heads, dims.group_size());
        if tp <= kv {
            let start = |rank: usize| rank * (kv / tp) + rank.min(kv % tp);
            let kv = start(rank)..start(rank + 1);
            Self {
                q: kv.start * group..kv.end * group,
                kv,
            }
        } else {
            let replicas = tp / kv;
            let head = rank / replicas;
            let part = group / replicas;
            let first = head * group + rank % replicas * part;
            Self {
                q: first..first + part,
                kv: head..head + 1,
            }
        }
    }
}

/// The rows of the embedding and of the LM head that one rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabShard {
    /// The true ids of this rank; empty where the rank holds padding alone.
    pub ids: Range<usize>,
    /// Rows that each rank has, padding included: the same on all ranks.
    pub padded_rows: usize,
}

impl VocabShard {
    /// The rows of `rank` of `tp`: equal parts of the vocabulary padded to a multiple of
    /// lcm(64, tp), cut to the true vocabulary.
    pub fn new(vocab_size: usize, tp: usize, rank: usize) -> Self {
        let padded_rows = vocab_size.next_multiple_of(lcm(64, tp)) / tp;
        let clamp = |id: usize| id.min(vocab_size);
        Self {
            ids: clamp(rank * padded_rows)..clamp((rank + 1) * padded_rows),
            padded_rows,
        }
    }
}

fn lcm(a: usize, b: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    a / gcd(a, b) * b
}
