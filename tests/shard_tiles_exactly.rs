//! For any sizes and any valid number of ranks, the slices of all ranks tile each tensor
//! exactly; only whole KV heads are held by several ranks, each by the same number.

#![allow(clippy::unwrap_used)]

use std::ops::Range;

use proptest::prelude::*;
use ringtp::Error;
use ringtp::shard::{Dims, HeadShard, ShardPlan, TensorPlan, VocabShard, split};

fn dims() -> impl Strategy<Value = Dims> {
    let sizes = (
        1usize..300,
        1usize..700,
        1usize..3,
        1usize..10,
        1usize..10,
        1usize..9,
        1usize..3000,
    );
    (sizes, any::<[bool; 3]>()).prop_map(
        |((hidden, inner, layers, kv, group, half, vocab), [a, m, t])| Dims {
            hidden_size: hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: kv * group,
            num_key_value_heads: kv,
            head_dim: 2 * half,
            vocab_size: vocab,
            attention_bias: a,
            mlp_bias: m,
            tie_word_embeddings: t,
        },
    )
}

/// How many of `ranges` hold each of `0..n`; an error where one leaves it.
fn coverage(ranges: &[Range<usize>], n: usize) -> Result<Vec<usize>, String> {
    let mut count = vec![0; n];
    for range in ranges {
        if range.start > range.end || range.end > n {
            return Err(format!("{range:?} of 0..{n}"));
        }
        count[range.clone()]
            .iter_mut()
            .for_each(|count| *count += 1);
    }
    Ok(count)
}

/// Checks that the slices of a plan hold each element `times` times.
fn tiles(plan: &TensorPlan, times: usize) -> Result<(), String> {
    let dim = plan.dim.unwrap_or(0);
    for rank in 0..plan.ranges.len() {
        let slice = plan.slice(rank);
        for (d, range) in slice.iter().enumerate() {
            if d != dim && *range != (0..plan.shape[d]) {
                return Err(format!("{}: rank {rank} has {slice:?}", plan.name));
            }
        }
        if slice[dim] != plan.ranges[rank] {
            return Err(format!("{}: rank {rank} has {slice:?}", plan.name));
        }
    }
    let count = coverage(&plan.ranges, plan.shape[dim])?;
    match count.iter().position(|&count| count != times) {
        None => Ok(()),
        Some(at) => Err(format!(
            "{}: {at} held {} times, not {times}",
            plan.name, count[at]
        )),
    }
}

/// How many ranks hold each element of a tensor.
fn holders(plan: &TensorPlan, dims: &Dims, tp: usize) -> usize {
    let kv = ["k_proj", "v_proj"]
        .iter()
        .any(|name| plan.name.contains(name));
    match plan.dim {
        None => tp,
        Some(_) if kv => (tp / dims.num_key_value_heads).max(1),
        Some(_) => 1,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slices_tile_every_tensor(dims in dims()) {
        for tp in dims.valid_tp() {
            let plan = ShardPlan::new(&dims, tp).unwrap();
            prop_assert_eq!(plan.tp(), tp);
            for tensor in plan.tensors() {
                prop_assert_eq!(tensor.ranges.len(), tp);
                let result = tiles(tensor, holders(tensor, &dims, tp));
                prop_assert!(result.is_ok(), "tp {}: {:?}", tp, result);
                let held: usize = (0..tp).map(|rank| tensor.elements(rank)).sum();
                let size: usize = tensor.shape.iter().product();
                prop_assert_eq!(held, size * holders(tensor, &dims, tp));
            }
        }
    }

    #[test]
    fn each_rank_has_the_kv_heads_of_its_query_heads(dims in dims()) {
        let group = dims.num_attention_heads / dims.num_key_value_heads;
        for tp in dims.valid_tp() {
            let shards: Vec<_> = (0..tp).map(|rank| HeadShard::new(&dims, tp, rank)).collect();
            for shard in &shards {
                prop_assert!(!shard.q.is_empty() && !shard.kv.is_empty());
                let needed = shard.q.start / group..(shard.q.end - 1) / group + 1;
                prop_assert_eq!(&needed, &shard.kv, "tp {}: {:?}", tp, shard);
                prop_assert_eq!(shard.q.len() % shard.kv.len(), 0);
            }
            let sizes = shards.iter().map(|shard| shard.kv.len());
            prop_assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
        }
    }

    #[test]
    fn one_rank_takes_everything(dims in dims()) {
        for tensor in ShardPlan::new(&dims, 1).unwrap().tensors() {
            let whole: Vec<_> = tensor.shape.iter().map(|&n| 0..n).collect();
            prop_assert_eq!(tensor.slice(0), whole);
        }
    }

    /// The parts that pair up in a product are the same: gate with up and with the columns of
    /// down, the heads of q with the columns of o, the embedding with the LM head.
    #[test]
    fn paired_tensors_are_split_alike(dims in dims()) {
        for tp in dims.valid_tp() {
            let plan = ShardPlan::new(&dims, tp).unwrap();
            let ranges = |name: &str| {
                let mut tensors = plan.tensors().iter();
                tensors.find(|tensor| tensor.name.ends_with(name)).map(|tensor| &tensor.ranges)
            };
            prop_assert_eq!(ranges("gate_proj.weight"), ranges("up_proj.weight"));
            prop_assert_eq!(ranges("gate_proj.weight"), ranges("down_proj.weight"));
            prop_assert_eq!(ranges("q_proj.weight"), ranges("o_proj.weight"));
            prop_assert_eq!(ranges("k_proj.weight"), ranges("v_proj.weight"));
            if dims.attention_bias {
                prop_assert_eq!(ranges("q_proj.weight"), ranges("q_proj.bias"));
                prop_assert_eq!(ranges("k_proj.weight"), ranges("k_proj.bias"));
            }
            if !dims.tie_word_embeddings {
                prop_assert_eq!(ranges("embed_tokens.weight"), ranges("lm_head.weight"));
            }
        }
    }

    #[test]
    fn parts_differ_by_one_granule_and_descend(n in 0usize..5000, tp in 1usize..65) {
        let parts: Vec<_> = (0..tp).map(|rank| split(n, tp, rank)).collect();
        prop_assert_eq!(parts[0].start, 0);
        prop_assert_eq!(parts[tp - 1].end, n);
        for pair in parts.windows(2) {
            prop_assert_eq!(pair[0].end, pair[1].start);
            prop_assert!(pair[0].len() >= pair[1].len());
        }
        let granule = if n % 16 == 0 && n / 16 >= tp { 16 } else { 1 };
        let spread = parts[0].len() - parts[tp - 1].len();
        prop_assert!(spread == 0 || (n % tp != 0 && spread == granule), "{spread}");
        if n % tp != 0 {
            prop_assert!(parts.iter().all(|part| part.len() % granule == 0));
        }
    }

    #[test]
    fn the_vocabulary_is_tiled_and_padded_alike(vocab in 1usize..200_000, tp in 1usize..65) {
        let shards: Vec<_> = (0..tp).map(|rank| VocabShard::new(vocab, tp, rank)).collect();
        let rows = shards[0].padded_rows;
        prop_assert!(rows * tp >= vocab && (rows * tp).is_multiple_of(64));
        // No more padding than alignment to 64 and to tp needs.
        prop_assert!(rows * tp - vocab < 64 * tp);
        let mut next = 0;
        for (rank, shard) in shards.iter().enumerate() {
            prop_assert_eq!(shard.padded_rows, rows);
            prop_assert!(shard.ids.len() <= rows);
            prop_assert!(shard.ids.is_empty() || shard.ids.start == rank * rows);
            prop_assert_eq!(shard.ids.start, next);
            next = shard.ids.end;
        }
        prop_assert_eq!(next, vocab);
    }

    #[test]
    fn an_invalid_number_of_ranks_lists_the_valid_ones(dims in dims(), tp in 0usize..100) {
        let valid = dims.valid_tp();
        // By the definition: whole KV heads each, or each KV head shared evenly.
        let (kv, heads) = (dims.num_key_value_heads, dims.num_attention_heads);
        let fits = (1..=kv).contains(&tp) || (tp > kv && tp % kv == 0 && heads % tp == 0);
        prop_assert_eq!(valid.contains(&tp), fits);
        match ShardPlan::new(&dims, tp) {
            Ok(_) => prop_assert!(fits),
            Err(Error::InvalidTp(error)) => {
                prop_assert!(!fits);
                prop_assert_eq!(error.tp, tp);
                let list: Vec<_> = valid.iter().map(ToString::to_string).collect();
                let text = error.to_string();
                prop_assert!(text.contains(&format!("{tp} ranks")), "{}", text);
                prop_assert!(text.ends_with(&format!("choose one of {}", list.join(", "))), "{}", text);
                prop_assert_eq!(error.valid, valid);
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}

/// The checker rejects what it is there to reject.
#[test]
fn wrong_splits_are_noticed() {
    let plan = |ranges: &[Range<usize>]| TensorPlan {
        name: "t".into(),
        shape: vec![8, 3],
        dim: Some(0),
        ranges: ranges.to_vec(),
    };
    assert_eq!(tiles(&plan(&[0..4, 4..8]), 1), Ok(()));
    assert!(tiles(&plan(&[0..4, 5..8]), 1).is_err(), "a gap");
    assert!(tiles(&plan(&[0..5, 4..8]), 1).is_err(), "an overlap");
    assert!(tiles(&plan(&[0..4, 4..9]), 1).is_err(), "beyond the end");
    assert!(tiles(&plan(&[0..4, 4..7]), 1).is_err(), "too short");
    assert!(tiles(&plan(&[0..8, 0..8]), 1).is_err(), "held twice");
    assert_eq!(tiles(&plan(&[0..8, 0..8]), 2), Ok(()));
    assert!(
        tiles(&plan(&[0..8, 0..4, 4..8]), 1).is_err(),
        "unevenly replicated"
    );
}

/// Examples anyone can check by eye.
#[test]
fn eight_kv_heads_on_three_ranks_are_three_three_two() {
    let dims = Dims {
        hidden_size: 64,
        intermediate_size: 176,
        num_hidden_layers: 1,
        num_attention_heads: 16,
        num_key_value_heads: 8,
        head_dim: 4,
        vocab_size: 100,
        attention_bias: false,
        mlp_bias: false,
        tie_word_embeddings: true,
    };
    let heads = |tp: usize| -> Vec<_> {
        (0..tp)
            .map(|rank| HeadShard::new(&dims, tp, rank))
            .map(|shard| (shard.q, shard.kv))
            .collect()
    };
    assert_eq!(heads(3), [(0..6, 0..3), (6..12, 3..6), (12..16, 6..8)]);
    assert_eq!(heads(16)[5], (5..6, 2..3));
    // 176 is 11 granules of 16.
    assert_eq!(
        [0, 1, 2].map(|rank| split(176, 3, rank)),
        [0..64, 64..128, 128..176]
    );
    assert_eq!(dims.valid_tp(), [1, 2, 3, 4, 5, 6, 7, 8, 16]);
}
