//! config.json and generation_config.json are read as transformers 4 and 5 write them; every
//! field that is wrong is named, with all others, and no setting is silently ignored that
//! would change the results.

#![allow(clippy::unwrap_used)]

mod checkpoint_support;

use std::time::{Duration, Instant};

use checkpoint_support::{Model, SMALL, config, put, refused, says};
use ringtp::checkpoint::{Checkpoint, GenerationConfig, LlamaConfig, RopeScaling};
use ringtp::shard::Dims;
use ringtp::{DType, Error};
use serde_json::{Value, json};

/// The small configuration with `changes`; a change to null removes the field.
fn with(changes: Value) -> Value {
    let mut config = config(&SMALL);
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(name)),
            value => config[name] = value.clone(),
        }
    }
    config
}

fn read(changes: Value) -> LlamaConfig {
    LlamaConfig::from_json("config.json", &with(changes).to_string()).unwrap()
}

fn error_of(text: &str) -> String {
    let start = Instant::now();
    let error = LlamaConfig::from_json("config.json", text).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(matches!(error, Error::Model(_)));
    error.to_string()
}

/// Asserts that each of `values` for `name` is refused by that name and with a remedy, alone.
#[track_caller]
fn refuses(name: &str, values: Value) {
    for value in values.as_array().unwrap() {
        let text = error_of(&with(json!({ name: value })).to_string());
        says(&text, &[&format!("{name}: expected "), ", found ", "; "]);
        assert_eq!(text.lines().count(), 1, "more than one defect:\n{text}");
    }
}

/// As [`refuses`], for a field of a rope that is right but for it.
#[track_caller]
fn rope_refuses(rope: &Value, name: &str, values: Value) {
    read(json!({"rope_scaling": rope}));
    for value in values.as_array().unwrap() {
        let mut rope = rope.clone();
        rope[name] = value.clone();
        for spelling in ["rope_scaling", "rope_parameters"] {
            let text = error_of(&with(json!({ spelling: rope })).to_string());
            says(
                &text,
                &[&format!("{spelling}.{name}: expected "), ", found "],
            );
            assert_eq!(text.lines().count(), 1, "more than one defect:\n{text}");
        }
    }
}

fn scaling(rope: Value) -> RopeScaling {
    let old = read(json!({"rope_scaling": rope}));
    let new = read(json!({"rope_parameters": rope}));
    assert_eq!(old, new);
    old.rope.scaling
}

#[test]
fn absent_fields_take_the_defaults_of_transformers() {
    let text = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100}"#;
    let config = LlamaConfig::from_json("config.json", text).unwrap();
    let dims = Dims {
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        head_dim: 8,
        vocab_size: 100,
        attention_bias: false,
        mlp_bias: false,
        tie_word_embeddings: false,
    };
    assert_eq!(config.dims, dims);
    assert_eq!(config.max_position_embeddings, 2048);
    assert_eq!(config.rms_norm_eps, 1e-6);
    assert_eq!(config.rope.theta, 10_000.0);
    assert_eq!(config.rope.scaling, RopeScaling::Default);
    assert_eq!(config.dtype, None);
    assert_eq!(
        (config.bos_token_id, config.eos_token_ids),
        (Some(1), vec![2])
    );
}

#[test]
fn every_field_is_read() {
    let config = read(json!({
        "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 5e5,
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true,
        "bos_token_id": 3, "eos_token_id": [4, 5], "torch_dtype": "bfloat16",
        "attention_dropout": 0.1, "pretraining_tp": 2, "hidden_act": "silu",
        "initializer_range": 0.02, "use_cache": true, "transformers_version": "5.0.0",
    }));
    assert!(config.dims.attention_bias && config.dims.mlp_bias && config.dims.tie_word_embeddings);
    assert_eq!(config.rms_norm_eps, 1e-5);
    assert_eq!(config.max_context(), 128);
    assert_eq!(config.rope.theta, 5e5);
    assert_eq!(config.bos_token_id, Some(3));
    assert_eq!(config.eos_token_ids, [4, 5]);
    assert_eq!(config.dtype, Some(DType::Bf16));
}

#[test]
fn null_is_absent_and_a_null_end_of_text_is_none() {
    let mut config = with(json!({}));
    for name in [
        "head_dim",
        "num_key_value_heads",
        "rope_scaling",
        "rms_norm_eps",
        "dtype",
        "eos_token_id",
    ] {
        config[name] = Value::Null;
    }
    config["hidden_size"] = 16.into();
    let config = LlamaConfig::from_json("config.json", &config.to_string()).unwrap();
    assert_eq!(
        (config.dims.head_dim, config.dims.num_key_value_heads),
        (4, 4)
    );
    assert!(config.eos_token_ids.is_empty());
}

#[test]
fn both_spellings_of_rope_are_read() {
    let theta = |changes| read(changes).rope.theta;
    assert_eq!(
        theta(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}})),
        7e5
    );
    assert_eq!(
        theta(json!({"rope_theta": 6e5, "rope_parameters": {"rope_type": "default"}})),
        6e5
    );
    assert_eq!(
        theta(json!({"rope_theta": 6e5, "rope_parameters": {"rope_theta": 7e5}})),
        7e5
    );
    let linear = RopeScaling::Linear { factor: 2.0 };
    assert_eq!(scaling(json!({"type": "linear", "factor": 2})), linear);
    assert_eq!(
        scaling(json!({"rope_type": "linear", "factor": 2.0})),
        linear
    );
    assert_eq!(
        scaling(json!({"rope_type": "linear", "type": "dynamic", "factor": 2.0})),
        linear
    );
    assert_eq!(scaling(json!({})), RopeScaling::Default);
    assert_eq!(
        scaling(json!({"rope_type": "default"})),
        RopeScaling::Default
    );
}

#[test]
fn dynamic_rope_lengthens_the_context() {
    let config = read(json!({"rope_scaling": {"type": "dynamic", "factor": 2.5}}));
    assert_eq!(config.rope.scaling, RopeScaling::Dynamic { factor: 2.5 });
    assert_eq!(
        (config.max_position_embeddings, config.max_context()),
        (64, 160)
    );
    let config = read(json!({"rope_scaling": {"type": "linear", "factor": 2.5}}));
    assert_eq!(config.max_context(), 64);
}

#[test]
fn yarn_takes_its_fields_or_their_defaults() {
    let yarn = |rope| match scaling(rope) {
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            truncate,
        } => (
            (factor, original_max_position_embeddings, attention_factor),
            (beta_fast, beta_slow),
            (mscale, mscale_all_dim, truncate),
        ),
        other => panic!("{other:?}"),
    };
    let bare = ((4.0, 64, None), (32.0, 1.0), (None, None, true));
    assert_eq!(yarn(json!({"rope_type": "yarn", "factor": 4})), bare);
    // transformers takes these zeros for absent.
    let zeros =
        json!({"rope_type": "yarn", "factor": 4, "beta_fast": 0, "beta_slow": 0, "mscale": 0});
    assert_eq!(yarn(zeros), bare);
    let all = json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16,
        "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7,
        "mscale_all_dim": 0.8, "truncate": false});
    let expected = (
        (4.0, 16, Some(1.5)),
        (16.0, 2.0),
        (Some(0.7), Some(0.8), false),
    );
    assert_eq!(yarn(all), expected);
    let ratio =
        json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 16});
    assert_eq!(yarn(ratio).0, (4.0, 16, None));
    let beside = read(json!({"original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "yarn", "factor": 2}}));
    assert!(matches!(
        beside.rope.scaling,
        RopeScaling::Yarn {
            original_max_position_embeddings: 32,
            ..
        }
    ));
}

#[test]
fn llama3_takes_its_fields() {
    let rope = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(scaling(rope), expected);
}

#[test]
fn sizes_must_be_whole_positive_and_credible() {
    let wrong = json!([0, -1, 1.5, 64.0, "64", true, [], {}, 1u64 << 40, 1e30]);
    for name in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ] {
        refuses(name, wrong.clone());
    }
    refuses("num_hidden_layers", json!([4097]));
}

#[test]
fn sizes_whose_product_is_absurd_are_refused() {
    let max = 1 << 24;
    let text = error_of(
        &with(json!({"hidden_size": max, "intermediate_size": max,
        "vocab_size": max, "num_hidden_layers": 4096}))
        .to_string(),
    );
    says(
        &text,
        &[
            "hidden_size, intermediate_size",
            "parameters",
            "correct the sizes",
        ],
    );
}

#[test]
fn heads_must_divide() {
    refuses("num_key_value_heads", json!([3, 8]));
    refuses("head_dim", json!([3]));
    let text = error_of(&with(json!({"head_dim": null, "hidden_size": 10})).to_string());
    says(
        &text,
        &[
            "hidden_size: expected a multiple of the 4 attention heads",
            "add head_dim",
        ],
    );
    let text = error_of(&with(json!({"head_dim": null, "hidden_size": 12})).to_string());
    says(
        &text,
        &[
            "head_dim: expected an even number",
            "3, which is hidden_size / num_attention_heads",
        ],
    );
}

#[test]
fn numbers_must_be_positive() {
    refuses(
        "rms_norm_eps",
        json!([0, -1e-6, "1e-6", 1e-60, 1e300, true]),
    );
    refuses("rope_theta", json!([0, -1, "x"]));
}

#[test]
fn nan_and_infinity_are_named_with_their_line() {
    let line = |value: &str| {
        let text = format!(
            "{{\n  \"model_type\": \"llama\",\n  \"rms_norm_eps\": {value},\n  \"vocab_size\": 9\n}}"
        );
        error_of(&text)
    };
    for value in ["NaN", "Infinity", "-Infinity"] {
        says(
            &line(value),
            &["line 3", "rms_norm_eps", value, "write a finite number"],
        );
    }
    says(
        &line("1e999"),
        &["line 3", "rms_norm_eps", "write a finite number"],
    );
}

#[test]
fn text_that_is_no_object_is_refused() {
    for (text, part) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "a list of 0"),
        ("3", "found 3"),
        ("{}x", "trailing"),
    ] {
        says(&error_of(text), &["config.json: JSON", part]);
    }
    says(&error_of(&"[".repeat(100_000)), &["recursion limit"]);
    let dir = Model::small().write();
    put(dir.path(), "config.json", [b'{', 0xff]);
    says(
        &refused(dir.path()),
        &["config.json", "UTF-8", "fetch the file again"],
    );
    put(dir.path(), "config.json", " ".repeat((1 << 20) + 1));
    says(
        &refused(dir.path()),
        &["config.json", "at most 1048576 bytes"],
    );
}

#[test]
fn an_empty_object_lacks_every_required_field_at_once() {
    let text = error_of("{}");
    for name in [
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ] {
        says(&text, &[&format!("{name}: expected")]);
    }
    assert_eq!(text.lines().count(), 7, "{text}");
}

#[test]
fn other_architectures_and_activations_are_refused_by_name() {
    refuses(
        "architectures",
        json!([["MistralForCausalLM"], "LlamaForCausalLM", 3]),
    );
    refuses("model_type", json!(["mistral", 3]));
    refuses("hidden_act", json!(["gelu", "relu", 3]));
    let text = error_of(&with(json!({"architectures": ["Qwen2ForCausalLM"]})).to_string());
    says(
        &text,
        &["expected LlamaForCausalLM, found \"Qwen2ForCausalLM\""],
    );
    read(json!({"architectures": null}));
    let text = error_of(&with(json!({"architectures": null, "model_type": null})).to_string());
    says(&text, &["architectures: expected LlamaForCausalLM"]);
}

#[test]
fn settings_that_would_change_results_are_refused() {
    refuses("quantization_config", json!([{"quant_method": "gptq"}, {}]));
    refuses("sliding_window", json!([4096]));
    refuses("partial_rotary_factor", json!([0.5, "1"]));
    refuses("layer_types", json!([["sliding_attention"]]));
    read(json!({"partial_rotary_factor": 1.0, "layer_types": ["full_attention"]}));
    let mut config = with(json!({}));
    config["sliding_window"] = Value::Null;
    config["quantization_config"] = Value::Null;
    LlamaConfig::from_json("config.json", &config.to_string()).unwrap();
}

#[test]
fn wrong_ropes_are_refused_field_by_field() {
    let factors = json!([0, 0.5, -1, "2", 1e9]);
    let linear = json!({"rope_type": "linear", "factor": 2});
    rope_refuses(&linear, "factor", factors.clone());
    rope_refuses(&linear, "factor", json!([null]));
    rope_refuses(
        &linear,
        "rope_type",
        json!(["longrope", "su", "mrope", "", 3]),
    );
    rope_refuses(&linear, "rope_theta", json!([0, "x"]));
    rope_refuses(&linear, "partial_rotary_factor", json!([0.5]));
    rope_refuses(
        &json!({"rope_type": "dynamic", "factor": 2}),
        "factor",
        factors.clone(),
    );

    let yarn = json!({"rope_type": "yarn", "factor": 2, "beta_slow": 4});
    rope_refuses(&yarn, "factor", factors.clone());
    rope_refuses(&yarn, "attention_factor", json!([0, -1, "1"]));
    rope_refuses(&yarn, "beta_fast", json!([-1, 3, "32"]));
    rope_refuses(&yarn, "mscale", json!([-1, "1"]));
    rope_refuses(&yarn, "mscale_all_dim", json!([-1, "1"]));
    rope_refuses(&yarn, "truncate", json!([1, "no"]));
    rope_refuses(
        &yarn,
        "original_max_position_embeddings",
        json!([0, -1, 1.5, 1u64 << 40]),
    );

    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 32});
    rope_refuses(&llama3, "factor", factors);
    rope_refuses(&llama3, "low_freq_factor", json!([0, -1, 4, 5, "1", null]));
    rope_refuses(&llama3, "high_freq_factor", json!([0, -1, "4", null]));
    rope_refuses(&llama3, "original_max_position_embeddings", json!([0, "x"]));

    refuses("rope_scaling", json!([3, "linear", []]));
    let text = error_of(&with(json!({"rope_scaling": {"factor": 2}})).to_string());
    says(&text, &["rope_scaling.rope_type", "none, but a factor"]);
    let text = error_of(&with(json!({"rope_parameters": {"full_attention": {}}})).to_string());
    says(&text, &["rope_parameters.full_attention", "not supported"]);
    let text = error_of(
        &with(json!({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}})).to_string(),
    );
    says(&text, &["head_dim above 2"]);
    let text = error_of(
        &with(json!({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}})).to_string(),
    );
    says(&text, &["rope_theta above 1"]);
}

#[test]
fn ids_outside_the_vocabulary_are_refused() {
    refuses("eos_token_id", json!([11, -1, 1.5, "2", [2, 11], true]));
    refuses("bos_token_id", json!([11, -1]));
    assert_eq!(read(json!({"eos_token_id": 10})).eos_token_ids, [10]);
    let dir = Model::small().write();
    put(
        dir.path(),
        "generation_config.json",
        r#"{"eos_token_id": [2, 11]}"#,
    );
    says(
        &refused(dir.path()),
        &["generation_config.json: eos_token_id: expected token ids from 0 to 10, found 11"],
    );
}

#[test]
fn defects_are_reported_together() {
    let text = error_of(
        &with(
            json!({"hidden_size": 0, "rope_theta": -1, "hidden_act": "gelu",
        "sliding_window": 5, "rope_scaling": {"type": "linear", "factor": 0}, "mlp_bias": 1}),
        )
        .to_string(),
    );
    says(
        &text,
        &[
            "config.json: 6 defects",
            "hidden_size",
            "rope_theta",
            "gelu",
            "sliding_window",
            "rope_scaling.factor",
            "mlp_bias",
        ],
    );
    assert_eq!(text.lines().count(), 7);
}

#[test]
fn generation_settings_are_read_and_checked() {
    let text = r#"{"eos_token_id": 2, "do_sample": true, "temperature": 0.6, "top_k": 50,
        "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "transformers_version": "5"}"#;
    let expected = GenerationConfig {
        eos_token_ids: Some(vec![2]),
        do_sample: Some(true),
        temperature: Some(0.6),
        top_k: Some(50),
        top_p: Some(0.9),
        min_p: Some(0.05),
        repetition_penalty: Some(1.1),
    };
    assert_eq!(GenerationConfig::from_json("g", text).unwrap(), expected);
    let none = r#"{"eos_token_id": null, "top_k": 0}"#;
    let config = GenerationConfig::from_json("g", none).unwrap();
    assert_eq!((config.eos_token_ids, config.top_k), (None, Some(0)));

    let text = r#"{"eos_token_id": "2", "do_sample": 1, "temperature": -1, "top_k": -1,
        "top_p": 1.5, "min_p": "0", "repetition_penalty": 0}"#;
    let error = GenerationConfig::from_json("g.json", text)
        .unwrap_err()
        .to_string();
    says(
        &error,
        &[
            "g.json: 7 defects",
            "eos_token_id: ",
            "do_sample: ",
            "temperature: ",
            "top_k: ",
            "top_p: ",
            "min_p: ",
            "repetition_penalty: ",
        ],
    );
    says(
        &GenerationConfig::from_json("g", "[")
            .unwrap_err()
            .to_string(),
        &["g: JSON"],
    );
}

#[test]
fn an_absent_generation_config_is_the_default() {
    let dir = Model::small().write();
    assert_eq!(
        GenerationConfig::read(dir.path()).unwrap(),
        GenerationConfig::default()
    );
    assert_eq!(LlamaConfig::read(dir.path()).unwrap().dims, SMALL);
    put(
        dir.path(),
        "generation_config.json",
        r#"{"temperature": 0.5}"#,
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.generation_config().temperature, Some(0.5));
    assert_eq!(checkpoint.dir(), dir.path());
    assert_eq!(checkpoint.max_context(), 64);
}
