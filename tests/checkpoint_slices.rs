//! What a checkpoint gives are the bytes that were written: whole tensors, and the slices of
//! every rank, in one file or several, in f32, bf16, f16 or a mix of them.

#![allow(clippy::unwrap_used)]

mod checkpoint_support;

use checkpoint_support::{Model, Raw, SMALL, put, put_index, safetensors};
use half::{bf16, f16};
use proptest::prelude::*;
use ringtp::DType;
use ringtp::checkpoint::Checkpoint;
use ringtp::host::HostMatrix;
use ringtp::shard::{Dims, ShardPlan};
use serde_json::json;

const TYPES: [&str; 3] = ["F32", "BF16", "F16"];

/// Element (`row`, `col`) of a raw tensor, by index arithmetic on the written bytes.
fn element(raw: &Raw, row: usize, col: usize) -> f32 {
    let at = row * raw.shape.last().unwrap() + col;
    let pair = |at: usize| [raw.bytes[2 * at], raw.bytes[2 * at + 1]];
    match raw.dtype {
        "F32" => f32::from_le_bytes(raw.bytes[4 * at..4 * at + 4].try_into().unwrap()),
        "BF16" => bf16::from_le_bytes(pair(at)).to_f32(),
        "F16" => f16::from_le_bytes(pair(at)).to_f32(),
        other => panic!("{other}"),
    }
}

/// Whether `matrix` is the part of `raw` from (`row`, `col`) on, bit for bit.
fn is_part(matrix: &HostMatrix<'_>, raw: &Raw, row: usize, col: usize) -> bool {
    let mut out = vec![0.0; matrix.cols()];
    (0..matrix.rows()).all(|r| {
        matrix.row_f32(r, &mut out);
        let expected = (0..out.len()).map(|c| element(raw, row + r, col + c));
        out.iter().zip(expected).all(|(found, expected)| {
            found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan())
        })
    })
}

fn check_all(checkpoint: &Checkpoint, model: &Model, tp: usize) {
    let plan = ShardPlan::new(&checkpoint.config().dims, tp).unwrap();
    assert_eq!(plan.tensors().len(), model.tensors.len());
    for (tensor, raw) in plan.tensors().iter().zip(&model.tensors) {
        assert_eq!(tensor.name, raw.name);
        let whole = checkpoint.tensor(&tensor.name).unwrap();
        assert!(is_part(&whole, raw, 0, 0), "{}", raw.name);
        for rank in 0..tp {
            let shard = checkpoint.shard(tensor, rank).unwrap();
            let slice = tensor.slice(rank);
            let (rows, cols) = match slice.as_slice() {
                [cols] => (0..1, cols.clone()),
                [rows, cols] => (rows.clone(), cols.clone()),
                more => panic!("{more:?}"),
            };
            assert_eq!([shard.rows(), shard.cols()], [rows.len(), cols.len()]);
            assert!(
                is_part(&shard, raw, rows.start, cols.start),
                "{} of {rank}",
                raw.name
            );
        }
    }
}

fn dims() -> impl Strategy<Value = Dims> {
    let sizes = (
        1usize..20,
        1usize..40,
        1usize..3,
        1usize..4,
        1usize..4,
        1usize..4,
        1usize..80,
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn all_slices_of_all_ranks(dims in dims(), types in prop::collection::vec(0usize..3, 1..9), files in 0usize..4) {
        let model = Model::new(&dims, |i| TYPES[types[i % types.len()]]);
        let dir = match files {
            0 => model.write(),
            files => model.write_indexed(files),
        };
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for tp in dims.valid_tp() {
            check_all(&checkpoint, &model, tp);
        }
    }
}

/// The comparison above notices a slice that begins one element too late.
#[test]
fn a_shifted_slice_is_noticed() {
    let model = Model::small();
    let dir = model.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let raw = model.tensors.iter().find(|raw| raw.name == name).unwrap();
    let whole = checkpoint.tensor(name).unwrap();
    let part = whole.slice(1..3, 2..4).unwrap();
    assert!(is_part(&part, raw, 1, 2));
    assert!(!is_part(&part, raw, 1, 1) && !is_part(&part, raw, 0, 2));
}

#[test]
fn a_wrong_rank_name_or_plan_is_an_error() {
    let dir = Model::small().write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let plan = ShardPlan::new(&SMALL, 2).unwrap();
    let tensor = &plan.tensors()[0];
    let text = checkpoint.shard(tensor, 2).unwrap_err().to_string();
    assert!(
        text.contains("rank of model.embed_tokens.weight: expected 0 to 1, found 2"),
        "{text}"
    );
    let text = checkpoint.tensor("none").unwrap_err().to_string();
    assert!(text.starts_with("none: expected a tensor"), "{text}");
    let other = ShardPlan::new(
        &Dims {
            vocab_size: 9,
            ..SMALL
        },
        2,
    )
    .unwrap();
    let text = checkpoint
        .shard(&other.tensors()[0], 1)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("[9, 8]") && text.contains("[11, 8]"),
        "{text}"
    );
}

#[test]
fn unknown_tensors_are_listed_and_old_rope_buffers_are_not() {
    let mut model = Model::small();
    model.tensors.push(Raw::new(
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "F32",
        &[2],
    ));
    model
        .tensors
        .push(Raw::new("vision.weight", "I64", &[2, 2, 2]));
    let dir = model.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.unused(), ["vision.weight"]);
    assert!(checkpoint.tensor("vision.weight").is_err());
}

#[test]
fn auto_is_the_type_of_the_config_or_of_most_weights() {
    let open = |model: &Model| Checkpoint::open(model.write().path()).unwrap().dtype();
    let mut model = Model::new(&SMALL, |i| if i == 1 { "F32" } else { "BF16" });
    assert_eq!(open(&model), DType::Bf16);
    model.config["torch_dtype"] = "float16".into();
    assert_eq!(open(&model), DType::F16);
    model.config["dtype"] = "torch.float32".into();
    assert_eq!(open(&model), DType::F32);
    model.config["dtype"] = "float64".into();
    assert_eq!(open(&model), DType::Bf16);
}

#[test]
fn one_file_goes_before_an_index_and_the_index_says_which_copy_counts() {
    let model = Model::small();
    let dir = model.write();
    put_index(dir.path(), &json!({"a": "missing.safetensors"}));
    Checkpoint::open(dir.path()).unwrap();

    let name = "model.norm.weight";
    let dir = model.write_indexed(1);
    let map: serde_json::Map<_, _> = model
        .tensors
        .iter()
        .map(|raw| (raw.name.clone(), "model-00001-of-00001.safetensors".into()))
        .chain([(name.to_string(), "norm.safetensors".into())])
        .collect();
    let mut norm = model.clone().tensor(name).clone();
    norm.bytes.fill(7);
    put(
        dir.path(),
        "norm.safetensors",
        safetensors(std::slice::from_ref(&norm)),
    );
    put_index(dir.path(), &map.into());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor(name).unwrap().row(0), norm.bytes);
}

#[test]
fn a_checkpoint_can_be_shared_by_the_threads_of_ranks() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
}
