//! Bad input ends with exit code 2 within a second, and a line that names the thing and what
//! to do; nothing panics, nothing large is allocated.

mod cli_support;

use std::fs;
use std::time::Duration;

use cli_support::{CONTEXT, Model, Ran, VOCAB, ringtp, run};
use serde_json::json;

/// Asserts that a run was refused with a message that contains all of `words`.
fn refused(ran: &Ran, words: &[&str]) {
    let text = &ran.stderr;
    assert_eq!(ran.code, 2, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    assert!(
        ran.took < Duration::from_secs(1),
        "took {:?}: {text}",
        ran.took
    );
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
    assert_eq!(ran.stdout, "");
}

fn ids(model: &Model, args: &[&str]) -> Ran {
    ringtp("generate", model.path(), args)
}

/// Every subcommand refuses the model.
fn unusable(model: &Model, words: &[&str]) {
    refused(&ids(model, &["--ids", "1,2"]), words);
    refused(&ringtp("shards", model.path(), &["--json"]), words);
    let out = model.file("out.safetensors");
    let out_name = out.to_str().expect("UTF-8");
    let ran = ringtp("logits", model.path(), &["--ids", "1,2", "--out", out_name]);
    refused(&ran, words);
    assert!(!out.exists(), "no file for a model that is refused");
}

#[test]
fn the_model_itself_is_fine() {
    let ran = ringtp("shards", Model::new().path(), &["--tp", "2"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

#[test]
fn an_invalid_tp_lists_those_that_are_valid() {
    let model = Model::new();
    for tp in ["0", "3", "99"] {
        let valid = "choose one of 1, 2, 4";
        refused(
            &ids(&model, &["--ids", "1", "--tp", tp]),
            &["tp", tp, valid],
        );
        refused(
            &ringtp("shards", model.path(), &["--tp", tp]),
            &["tp", tp, valid],
        );
    }
}

#[test]
fn ids_outside_the_vocabulary() {
    let model = Model::new();
    let (last, first) = ((VOCAB - 1).to_string(), VOCAB.to_string());
    let ran = ids(&model, &["--ids", &last, "--ids", &format!("1,{first}")]);
    refused(&ran, &["prompt 1", &first, "vocabulary", "use ids"]);
    refused(
        &ids(&model, &["--ids", "4294967295"]),
        &["4294967295", "vocabulary"],
    );
    for odd in ["4294967296", "-1", "1,x", "1,,2"] {
        refused(
            &ids(&model, &["--ids", odd]),
            &["--ids", "expected numbers"],
        );
    }
    let out = model.file("out");
    let args = ["--ids", &first, "--out", out.to_str().expect("UTF-8")];
    refused(
        &ringtp("logits", model.path(), &args),
        &[&first, "vocabulary"],
    );
}

#[test]
fn an_empty_prompt() {
    let model = Model::new().with_tokenizer();
    refused(
        &ids(&model, &["--ids", ""]),
        &["prompt 0", "at least one token"],
    );
    refused(
        &ids(&model, &["--prompt", ""]),
        &["prompt 0", "at least one token"],
    );
    refused(&ids(&model, &["--ids", "1", "--prompt", ""]), &["prompt 1"]);
    refused(&ids(&model, &[]), &["--prompt", "--ids"]);
}

#[test]
fn a_prompt_longer_than_the_context() {
    let model = Model::new().with_tokenizer();
    let long = vec!["1"; CONTEXT + 1].join(",");
    let (context, length) = (CONTEXT.to_string(), (CONTEXT + 1).to_string());
    refused(
        &ids(&model, &["--ids", &long]),
        &["prompt 0", &context, &length, "shorten"],
    );
    // "<s>" makes it one longer.
    let text = "a".repeat(CONTEXT);
    refused(&ids(&model, &["--prompt", &text]), &[&context, &length]);
    refused(
        &ids(&model, &["--ids", "1,2,3", "--max-model-len", "2"]),
        &["2", "3"],
    );
    refused(
        &ids(&model, &["--ids", "1", "--max-model-len", "49"]),
        &["max_model_len", "48"],
    );
    refused(
        &ids(&model, &["--ids", "1", "--max-model-len", "0"]),
        &["max_model_len"],
    );
    let out = model.file("out");
    let args = ["--ids", &long, "--out", out.to_str().expect("UTF-8")];
    refused(&ringtp("logits", model.path(), &args), &[&context, &length]);
}

#[test]
fn settings_out_of_range() {
    let model = Model::new();
    for (name, value, word) in [
        ("--temperature", "-1", "temperature"),
        ("--temperature", "NaN", "temperature"),
        ("--temperature", "inf", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--top-p", "1.5", "top_p"),
        ("--top-p", "nan", "top_p"),
        ("--min-p", "-0.1", "min_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--repetition-penalty", "-2", "repetition_penalty"),
        ("--max-tokens", "0", "max_tokens"),
        ("--max-batch-tokens", "0", "max_batch_tokens"),
        ("--threads", "0", "threads"),
        ("--threads", "4097", "threads"),
        ("--threads", "18446744073709551615", "1 to 4096"),
        ("--tp", "-1", "--tp"),
        ("--seed", "-1", "--seed"),
        ("--stop-id", "-1", "--stop-id"),
        ("--max-tokens", "-1", "--max-tokens"),
        ("--deadline", "-1", "--deadline"),
        ("--top-k", "-1", "--top-k"),
        ("--top-k", "many", "--top-k"),
        ("--stop", "", "stop"),
        ("--stop", "x", "prompt of text"),
        ("--deadline", "0", "--deadline"),
        ("--deadline", "nan", "--deadline"),
        ("--dtype", "int4", "f32, bf16 or f16"),
        ("--system", "x", "--chat"),
    ] {
        refused(&ids(&model, &["--ids", "1", name, value]), &[word]);
    }
    let ran = ids(&model, &["--ids", "1", "--all-reduce", "nonsense"]);
    refused(&ran, &["all_reduce", "one of auto", "found \"nonsense\""]);
    assert_eq!(
        ran.stderr.matches("all_reduce").count(),
        1,
        "{}",
        ran.stderr
    );
    // There is no message that the template could be for.
    refused(&ids(&model, &["--ids", "1", "--chat"]), &["--prompt"]);
    refused(
        &ids(&model, &["--ids", "1", "--no-such-option"]),
        &["--no-such-option"],
    );
    refused(&run(&["no-such-command"]), &["no-such-command"]);
}

#[test]
fn text_without_a_tokenizer_and_chat_without_a_template() {
    let model = Model::new();
    refused(
        &ids(&model, &["--prompt", "hello"]),
        &["tokenizer.json", "--ids"],
    );
    fs::write(model.file("tokenizer.json"), "{\"version\":").expect("written");
    refused(
        &ids(&model, &["--prompt", "hello"]),
        &["tokenizer.json", "--ids"],
    );
    let model = Model::new().with_tokenizer();
    refused(
        &ids(&model, &["--prompt", "hello", "--chat"]),
        &["chat_template", "--chat"],
    );
    model.write_json(
        "tokenizer_config.json",
        &json!({"chat_template": "{% if %}"}),
    );
    refused(
        &ids(&model, &["--prompt", "hello", "--chat"]),
        &["tokenizer_config.json", "line 1"],
    );
}

#[test]
fn a_directory_that_is_not_there_or_not_a_model() {
    let model = Model::new();
    refused(
        &run(&["shards", "--model", "/no/such/model"]),
        &["/no/such/model"],
    );
    for name in ["config.json", "model.safetensors"] {
        let model = Model::new();
        fs::remove_file(model.file(name)).expect("removed");
        unusable(&model, &[name]);
    }
    fs::write(model.file("config.json"), "{\"hidden_size\": 32,").expect("written");
    unusable(&model, &["config.json"]);
}

#[test]
fn numbers_of_the_configuration() {
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("num_hidden_layers", json!(-1)),
        ("vocab_size", json!(0)),
        ("max_position_embeddings", json!(0)),
        ("intermediate_size", json!("many")),
        ("rms_norm_eps", json!("NaN")),
        ("rope_theta", json!(0)),
        ("hidden_size", json!(u64::MAX)),
    ] {
        unusable(&Model::new().with_config(key, value), &["config.json", key]);
    }
    let model = Model::new();
    let text = fs::read_to_string(model.file("config.json")).expect("read");
    let text = text.replace("\"rope_theta\":10000.0", "\"rope_theta\":NaN");
    assert!(text.contains("NaN"));
    fs::write(model.file("config.json"), text).expect("written");
    unusable(&model, &["config.json"]);
}

#[test]
fn unknown_architectures_and_activations() {
    let mistral = Model::new().with_config("architectures", json!(["MistralForCausalLM"]));
    unusable(
        &mistral,
        &["architectures", "MistralForCausalLM", "LlamaForCausalLM"],
    );
    let gelu = Model::new().with_config("hidden_act", json!("gelu"));
    unusable(&gelu, &["hidden_act", "gelu", "silu"]);
}

#[test]
fn all_missing_and_misshapen_tensors_are_listed() {
    let model = Model::new().with_weights(|shapes| {
        shapes.remove("model.layers.1.mlp.up_proj.weight");
        shapes.remove("model.norm.weight");
        shapes.insert("lm_head.weight".into(), vec![VOCAB, 31]);
    });
    let ran = ids(&model, &["--ids", "1"]);
    let names = [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ];
    refused(&ran, &names);
    for name in names {
        let lines = ran.stderr.lines().filter(|line| line.contains(name));
        assert_eq!(lines.count(), 1, "one line for {name}: {}", ran.stderr);
    }
    assert!(
        ran.stderr.lines().count() >= 4,
        "a summary and a line each: {}",
        ran.stderr
    );
}

#[test]
fn a_tensor_of_another_type() {
    let model = Model::new().with_header(|header| {
        header["model.norm.weight"]["dtype"] = json!("I32");
    });
    unusable(&model, &["model.norm.weight", "I32"]);
}

#[test]
fn truncated_files() {
    for keep in [0, 4, 8, 100, 3000] {
        let model = Model::new().with_bytes(|bytes| bytes.truncate(keep));
        unusable(&model, &["model.safetensors"]);
    }
    let model = Model::new().with_bytes(|bytes| bytes.truncate(bytes.len() - 1));
    unusable(&model, &["model.safetensors"]);
}

#[test]
fn a_huge_header() {
    for length in [u64::MAX, 1 << 40, 200_000_000] {
        let model = Model::new().with_bytes(|bytes| {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        });
        unusable(&model, &["model.safetensors"]);
    }
}

/// Valid JSON that would take the parser seconds and gigabytes.
#[test]
fn a_header_and_an_index_of_millions_of_entries() {
    let entries: Vec<_> = (0..1_200_000)
        .map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let model = Model::new().with_bytes(|bytes| {
        *bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
    });
    unusable(&model, &["model.safetensors", "header of at most"]);
    let model = Model::new();
    fs::remove_file(model.file("model.safetensors")).expect("removed");
    let index = model.file("model.safetensors.index.json");
    let entries = |range: std::ops::Range<u32>| {
        let entries: Vec<_> = range.map(|i| format!("\"{i}\":3")).collect();
        format!("{{\"weight_map\":{{{}}}}}", entries.join(","))
    };
    fs::write(&index, entries(0..2_000_000)).expect("written");
    unusable(&model, &["index.json", "at most"]);
    fs::write(&index, entries(0..100_000)).expect("written");
    unusable(&model, &["weight_map.0", "16 defects"]);
}

#[test]
fn a_list_of_bad_ids_is_one_defect() {
    let model = Model::new().with_config("eos_token_id", json!(vec![-1; 100_000]));
    unusable(&model, &["eos_token_id", "-1"]);
    assert_eq!(ids(&model, &["--ids", "1"]).stderr.lines().count(), 1);
}

/// Opening a pipe waits for its writer, and a device may have no end.
#[test]
fn pipes_and_devices_in_place_of_the_files_of_text() {
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
    ] {
        let model = Model::new().with_tokenizer();
        let path = model.file(name);
        let _ = fs::remove_file(&path);
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.expect("mkfifo").success());
        let chat = ["--prompt", "a", "--chat"];
        let args = if name == "tokenizer.json" {
            &chat[..2]
        } else {
            &chat[..]
        };
        refused(&ids(&model, args), &[name, "not a file"]);
        fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink("/dev/zero", &path).expect("linked");
        refused(&ids(&model, args), &[name, "not a file"]);
    }
}

#[test]
fn overlapping_and_out_of_range_offsets() {
    let overlapping = Model::new().with_header(|header| {
        let first = header["lm_head.weight"]["data_offsets"].clone();
        header["model.embed_tokens.weight"]["data_offsets"] = first;
    });
    unusable(&overlapping, &["model.safetensors"]);
    let outside = Model::new().with_header(|header| {
        header["model.norm.weight"]["data_offsets"] = json!([1 << 30, (1 << 30) + 128]);
    });
    unusable(&outside, &["model.safetensors"]);
    let backwards = Model::new().with_header(|header| {
        header["model.norm.weight"]["data_offsets"] = json!([128, 0]);
    });
    unusable(&backwards, &["model.safetensors"]);
}

#[test]
fn a_file_that_cannot_be_written() {
    let model = Model::new();
    let logits = |out: &str| ringtp("logits", model.path(), &["--ids", "1,2", "--out", out]);
    refused(&logits("/no/such/directory/x"), &["/no/such/directory/x"]);
    let directory = model.path().to_str().expect("UTF-8");
    refused(&logits(directory), &["a directory", "name a file"]);
    refused(&logits(""), &["--out"]);
}

/// NaN and inf in the weights, in the embedding of id 5 alone: the error comes when it is asked
/// for, with exit code 1, and counts prompts as the command line does, however they are batched.
#[test]
fn weights_that_are_no_numbers() {
    for bad in [f32::NAN, f32::INFINITY] {
        let model = Model::new().with_bytes(|bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
            let header: serde_json::Value =
                serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
            let start = header["model.embed_tokens.weight"]["data_offsets"][0].as_u64();
            let at = 8 + length + start.expect("an offset") as usize + 5 * 32 * 4;
            bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        });
        for tp in ["1", "2"] {
            for rows in ["512", "2"] {
                let args = ["--ids", "1,2", "--ids", "3,5", "--max-batch-tokens", rows];
                let more = ["--max-tokens", "1", "--tp", tp, "--json"];
                let ran = ids(&model, &[&args[..], &more[..]].concat());
                assert_eq!(ran.code, 1, "{}", ran.stderr);
                let expected = "error: logits of row 1: expected finite numbers";
                assert!(ran.stderr.starts_with(expected), "{}", ran.stderr);
                assert!(ran.stderr.contains("look for broken weights"));
            }
        }
        let ran = ids(&model, &["--ids", "1,2", "--max-tokens", "1"]);
        assert_eq!(ran.code, 0, "other ids do not suffer: {}", ran.stderr);
    }
}
