//! A damaged, incomplete or hostile model directory is refused at once, by one error that
//! names each thing that is wrong and what to do.

#![allow(clippy::unwrap_used)]

mod checkpoint_support;

use checkpoint_support::{Model, Raw, SMALL, put, put_index, raw_file, refused, safetensors, says};
use ringtp::checkpoint::Checkpoint;
use ringtp::shard::Dims;
use serde_json::json;

const WEIGHTS: &str = "model.safetensors";

/// The error for the small model with `bytes` as its weights.
fn refused_weights(bytes: impl AsRef<[u8]>) -> String {
    let dir = Model::small().write();
    put(dir.path(), WEIGHTS, bytes);
    refused(dir.path())
}

#[test]
fn the_undamaged_model_opens() {
    Checkpoint::open(Model::small().write().path()).unwrap();
    Checkpoint::open(Model::small().write_indexed(3).path()).unwrap();
}

#[test]
fn no_directory() {
    let dir = tempfile::tempdir().unwrap();
    let remedy = "give the directory that holds config.json";
    says(
        &refused(&dir.path().join("none")),
        &["none: model directory", "No such file", remedy],
    );
    put(dir.path(), "file", "");
    says(
        &refused(&dir.path().join("file")),
        &["found a file", remedy],
    );
}

#[test]
fn an_empty_directory() {
    let dir = tempfile::tempdir().unwrap();
    let parts = [
        "2 defects",
        "config.json: expected a file, found none",
        "fetch them",
    ];
    says(&refused(dir.path()), &parts);
}

#[test]
fn only_weights_of_another_format() {
    let dir = Model::small().write();
    std::fs::rename(
        dir.path().join(WEIGHTS),
        dir.path().join("pytorch_model.bin"),
    )
    .unwrap();
    says(
        &refused(dir.path()),
        &["only pytorch_model.bin", "convert to safetensors"],
    );
}

#[test]
fn shards_without_their_index() {
    let dir = Model::small().write_indexed(2);
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    says(
        &refused(dir.path()),
        &["only model-00001-of-00002.safetensors", "fetch the index"],
    );
}

#[test]
fn a_directory_in_place_of_a_file() {
    for name in ["config.json", "generation_config.json", WEIGHTS] {
        let dir = Model::small().write();
        let _ = std::fs::remove_file(dir.path().join(name));
        std::fs::create_dir(dir.path().join(name)).unwrap();
        says(&refused(dir.path()), &[name, "not a file"]);
    }
}

#[test]
fn an_empty_file() {
    says(
        &refused_weights([]),
        &[WEIGHTS, "an empty file", "fetch the file again"],
    );
}

#[test]
fn a_file_shorter_than_a_length() {
    says(
        &refused_weights([1, 2, 3]),
        &[WEIGHTS, "3 bytes", "fetch the file again"],
    );
}

#[test]
fn a_huge_header() {
    for length in [1u64 << 60, u64::MAX, 100_000_000, (1 << 22) + 1] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        let parts = [
            WEIGHTS,
            "header of at most 4194304",
            &length.to_string(),
            "fetch",
        ];
        says(&refused_weights(bytes), &parts);
    }
}

#[test]
fn a_header_longer_than_the_file() {
    let mut bytes = 4_194_304u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{}");
    says(
        &refused_weights(bytes),
        &[
            "a header of 4194304 bytes",
            "a file of 10 bytes",
            "incomplete",
        ],
    );
}

#[test]
fn a_header_that_is_no_json() {
    for (header, part) in [("{\"a\": ", "EOF"), ("[1]", "a list of 1"), ("", "EOF")] {
        says(
            &refused_weights(raw_file(header, &[])),
            &["model.safetensors: header", part, ";"],
        );
    }
    let mut bytes = 2u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0xff, 0xfe]);
    says(
        &refused_weights(bytes),
        &["header", "UTF-8", "fetch the file again"],
    );
}

#[test]
fn a_truncated_file() {
    let whole = safetensors(&Model::small().tensors);
    for cut in [1, 4, 100] {
        let text = refused_weights(&whole[..whole.len() - cut]);
        says(&text, &[WEIGHTS, "offsets within", "fetch the file again"]);
    }
    // Inside the header, and inside its length.
    says(
        &refused_weights(&whole[..50]),
        &["a file of 50 bytes", "incomplete"],
    );
    says(&refused_weights(&whole[..7]), &["7 bytes", "incomplete"]);
}

#[test]
fn trailing_bytes() {
    let mut bytes = safetensors(&Model::small().tensors);
    bytes.push(0);
    says(
        &refused_weights(bytes),
        &[WEIGHTS, "bytes of data, as the header says"],
    );
}

#[test]
fn offsets_that_overlap_leave_gaps_run_backwards_or_out() {
    let entry =
        |start: u64, end: u64| json!({"dtype": "F32", "shape": [2], "data_offsets": [start, end]});
    let file = |a, b| raw_file(&json!({"a": a, "b": b}).to_string(), &[0; 16]);
    says(
        &refused_weights(file(entry(0, 8), entry(4, 12))),
        &["b: expected offsets from 8", "[4, 12], an overlap", "fetch"],
    );
    says(
        &refused_weights(file(entry(0, 8), entry(0, 8))),
        &["[0, 8], an overlap", "fetch"],
    );
    says(
        &refused_weights(file(entry(0, 8), entry(12, 20))),
        &["b: expected offsets within the 16 bytes", "[12, 20], a gap"],
    );
    says(
        &refused_weights(file(entry(0, 8), entry(16, 8))),
        &["b: expected a start and an end"],
    );
    let huge = u64::MAX;
    says(
        &refused_weights(file(entry(0, 8), entry(huge - 8, huge))),
        &["b: expected offsets within the 16 bytes"],
    );
}

#[test]
fn shapes_that_do_not_fit_their_bytes() {
    let file = |shape: serde_json::Value| {
        let header = json!({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}});
        refused_weights(raw_file(&header.to_string(), &[0; 16]))
    };
    says(
        &file(json!([3])),
        &["a: expected 12 bytes for shape [3]", "found 16 bytes"],
    );
    says(
        &file(json!([1u64 << 40, 1u64 << 40])),
        &["a: expected a shape that can be in memory"],
    );
    says(
        &file(json!([-1])),
        &["a: expected a list of sizes as shape"],
    );
    says(
        &file(json!("big")),
        &["a: expected a list of sizes as shape", "big"],
    );
}

#[test]
fn an_element_type_nobody_knows() {
    let header = json!({"a": {"dtype": "F128", "shape": [1], "data_offsets": [0, 16]}});
    says(
        &refused_weights(raw_file(&header.to_string(), &[0; 16])),
        &["a: expected a known element type as dtype", "F128"],
    );
}

#[test]
fn a_header_whose_metadata_are_no_strings() {
    let text = refused_weights(raw_file(r#"{"__metadata__": {"a": 1}}"#, &[]));
    says(
        &text,
        &[WEIGHTS, "invalid JSON in header", "fetch the file again"],
    );
}

/// A file with thousands of defects is summed up.
#[test]
fn a_header_that_is_wrong_throughout() {
    let entry = json!({"dtype": "F32", "shape": [9], "data_offsets": [0, 4]});
    let header: serde_json::Map<_, _> = (0..5000)
        .map(|i| (format!("t{i}"), entry.clone()))
        .collect();
    let text = refused_weights(raw_file(
        &serde_json::Value::Object(header).to_string(),
        &[0; 4],
    ));
    says(
        &text,
        &["16 defects", "t0: expected 36 bytes", "4985 more defects"],
    );
}

#[test]
fn a_tensor_named_twice() {
    let one = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    says(
        &refused_weights(raw_file(one, &[0; 8])),
        &["a: expected offsets from 0"],
    );
}

#[test]
fn missing_misshapen_and_wrongly_typed_tensors_are_listed_together() {
    let mut model = Model::small();
    model
        .tensors
        .retain(|tensor| tensor.name != "model.norm.weight");
    let q = "model.layers.0.self_attn.q_proj.weight";
    *model.tensor(q) = Raw::new(q, "F32", &[8, 16]);
    let k = "model.layers.0.self_attn.k_proj.weight";
    *model.tensor(k) = Raw::new(k, "I32", &[8, 8]);
    let v = "model.layers.0.self_attn.v_proj.weight";
    *model.tensor(v) = Raw::new(v, "F8_E4M3", &[8]);
    let text = refused(model.write().path());
    says(
        &text,
        &[
            "5 defects",
            "model.norm.weight: expected a tensor of shape [8], found none; fetch",
            "q_proj.weight: expected shape [16, 8], by config.json, found [8, 16]; use the config",
            "k_proj.weight: expected element type F32, F16 or BF16, found I32; convert",
            "v_proj.weight: expected shape [8, 8], by config.json, found [8]",
            "v_proj.weight: expected element type F32, F16 or BF16, found F8_E4M3",
        ],
    );
    assert_eq!(
        text.lines().count(),
        6,
        "a summary and one line a defect:\n{text}"
    );
}

#[test]
fn defects_of_all_files_are_reported_together() {
    let mut model = Model::small();
    model.config["hidden_act"] = "gelu".into();
    model.config["rms_norm_eps"] = 0.into();
    let dir = model.write();
    put(dir.path(), "generation_config.json", r#"{"top_p": 2}"#);
    put(dir.path(), WEIGHTS, []);
    says(
        &refused(dir.path()),
        &[
            "4 defects",
            "config.json: hidden_act: expected `silu`, found `gelu`",
            "config.json: rms_norm_eps",
            "generation_config.json: top_p",
            "model.safetensors: expected a safetensors file, found an empty file",
        ],
    );
}

#[test]
fn missing_shards_are_all_named() {
    let dir = Model::small().write_indexed(4);
    for file in [2, 4] {
        let name = format!("model-{file:05}-of-00004.safetensors");
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    says(
        &refused(dir.path()),
        &[
            "2 defects",
            "model-00002-of-00004.safetensors",
            "model-00004-of-00004.safetensors",
            "fetch the missing file",
        ],
    );
}

#[test]
fn an_index_that_leads_out_of_the_directory() {
    for file in [
        "../model.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "./x",
        "x/",
        "a\\b",
        "a\0",
    ] {
        let dir = Model::small().write();
        std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
        put_index(dir.path(), &json!({"model.norm.weight": file}));
        let text = refused(dir.path());
        says(
            &text,
            &["weight_map.model.norm.weight", "plain name", "do not trust"],
        );
    }
}

#[test]
fn an_index_of_tensors_that_its_files_lack() {
    let dir = Model::small().write();
    std::fs::rename(dir.path().join(WEIGHTS), dir.path().join("all.safetensors")).unwrap();
    put_index(
        dir.path(),
        &json!({"lm_head.weight": "all.safetensors", "ghost": "all.safetensors"}),
    );
    says(
        &refused(dir.path()),
        &[
            "ghost: expected a tensor of all.safetensors",
            "do not belong together",
        ],
    );
}

#[test]
fn an_index_without_a_map() {
    for (index, part) in [
        ("{}", "found none"),
        (r#"{"weight_map": 3}"#, "found 3"),
        (r#"{"weight_map": {"a": 3}}"#, "weight_map.a"),
        ("{", "EOF"),
        ("[]", "a list of 0"),
    ] {
        let dir = Model::small().write();
        std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
        put(dir.path(), "model.safetensors.index.json", index);
        says(
            &refused(dir.path()),
            &["model.safetensors.index.json", part],
        );
    }
}

#[test]
fn a_tied_head_that_differs_from_the_embedding_is_not_guessed_about() {
    let dims = Dims {
        tie_word_embeddings: true,
        ..SMALL
    };
    let mut model = Model::new(&dims, |_| "F32");
    let mut head = model.tensor("model.embed_tokens.weight").clone();
    head.name = "lm_head.weight".into();
    model.tensors.push(head);
    let dir = model.write();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.unused().is_empty());
    model.tensor("lm_head.weight").bytes[5] ^= 1;
    says(
        &refused(model.write().path()),
        &[
            "lm_head.weight",
            "tie_word_embeddings",
            "set tie_word_embeddings to false",
        ],
    );
}

/// 4096 layers asked of a file that has none: every tensor is in the error, and quickly; its
/// text names the first, and counts the rest.
#[test]
fn a_config_far_larger_than_its_weights() {
    let mut model = Model::small();
    model.config["num_hidden_layers"] = 4096.into();
    model.config["vocab_size"] = (1 << 24).into();
    let Err(ringtp::Error::Model(faults)) = Checkpoint::open(model.write().path()) else {
        panic!("refused");
    };
    let last = "model.layers.4095.mlp.down_proj.weight";
    assert!(faults.list.iter().any(|fault| fault.what == last));
    let text = faults.to_string();
    says(&text, &["defects", "[16777216, 8]"]);
    let more = format!("and {} more", faults.list.len() - 64);
    assert_eq!(text.lines().last().map(str::trim), Some(more.as_str()));
}
