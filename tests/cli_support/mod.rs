//! A model directory made on the spot, and the command line run on it.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const VOCAB: usize = 61;
pub(crate) const CONTEXT: usize = 48;

/// A directory with a tiny Llama of pseudo-random f32 weights and no tokenizer.
pub(crate) struct Model {
    dir: TempDir,
}

impl Model {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let model = Self { dir };
        model.write_json("config.json", &config());
        model.write_weights(&shapes());
        model
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write_json(&self, name: &str, value: &Value) {
        fs::write(self.file(name), value.to_string()).expect("written");
    }

    /// config.json with one entry changed.
    pub(crate) fn with_config(self, key: &str, value: Value) -> Self {
        let mut config = config();
        config[key] = value;
        self.write_json("config.json", &config);
        self
    }

    pub(crate) fn with_weights(
        self,
        change: impl FnOnce(&mut BTreeMap<String, Vec<usize>>),
    ) -> Self {
        let mut shapes = shapes();
        change(&mut shapes);
        self.write_weights(&shapes);
        self
    }

    /// Changes the bytes of model.safetensors.
    pub(crate) fn with_bytes(self, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let path = self.file("model.safetensors");
        let mut bytes = fs::read(&path).expect("read");
        change(&mut bytes);
        fs::write(path, bytes).expect("written");
        self
    }

    /// Changes the header of model.safetensors, as text of the same data.
    pub(crate) fn with_header(self, change: impl FnOnce(&mut Value)) -> Self {
        self.with_bytes(|bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            let data = bytes.split_off(8 + length as usize);
            let mut header = serde_json::from_slice(&bytes[8..]).expect("a header");
            change(&mut header);
            let header = header.to_string();
            bytes.clear();
            bytes.extend((header.len() as u64).to_le_bytes());
            bytes.extend(header.into_bytes());
            bytes.extend(data);
        })
    }

    /// A byte-level tokenizer of single letters; "<s>" is 60 and put before a text.
    pub(crate) fn with_tokenizer(self) -> Self {
        let letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.!?'-Ġ";
        let vocab: BTreeMap<String, usize> = letters.chars().map(String::from).zip(0..).collect();
        self.write_json(
            "tokenizer.json",
            &json!({
                "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
                "added_tokens": [{"id": 60, "content": "<s>", "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
                    "trim_offsets": true, "use_regex": true},
                "post_processor": {"type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [60], "tokens": ["<s>"]}}},
                "decoder": {"type": "ByteLevel", "add_prefix_space": true,
                    "trim_offsets": true, "use_regex": true},
                "model": {"type": "BPE", "dropout": null, "unk_token": null,
                    "continuing_subword_prefix": null, "end_of_word_suffix": null,
                    "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                    "vocab": vocab, "merges": []}
            }),
        );
        self
    }

    fn write_weights(&self, shapes: &BTreeMap<String, Vec<usize>>) {
        let mut state = 1_u32;
        let tensors: Vec<_> = shapes
            .iter()
            .map(|(name, shape)| {
                let values = (0..shape.iter().product()).flat_map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let unit = (state >> 8) as f32 / (1 << 24) as f32;
                    (unit - 0.5).to_le_bytes()
                });
                (name, shape, values.collect::<Vec<u8>>())
            })
            .collect();
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, shape, bytes)| {
                let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes);
                (name.as_str(), view.expect("bytes of that shape"))
            })
            .collect();
        let bytes = safetensors::serialize(views, None).expect("a file");
        fs::write(self.file("model.safetensors"), bytes).expect("written");
    }
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float32",
        "bos_token_id": 60, "eos_token_id": 7,
    })
}

fn shapes() -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        shapes.insert(name, shape.to_vec());
    };
    add("model.embed_tokens.weight".into(), &[VOCAB, 32]);
    add("model.norm.weight".into(), &[32]);
    add("lm_head.weight".into(), &[VOCAB, 32]);
    for layer in 0..2 {
        let layer = format!("model.layers.{layer}");
        for (name, shape) in [
            ("input_layernorm", &[32][..]),
            ("post_attention_layernorm", &[32]),
            ("self_attn.q_proj", &[32, 32]),
            ("self_attn.k_proj", &[16, 32]),
            ("self_attn.v_proj", &[16, 32]),
            ("self_attn.o_proj", &[32, 32]),
            ("mlp.gate_proj", &[40, 32]),
            ("mlp.up_proj", &[40, 32]),
            ("mlp.down_proj", &[32, 40]),
        ] {
            add(format!("{layer}.{name}.weight"), shape);
        }
    }
    shapes
}

/// What a run of the command line came to.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

/// Runs `ringtp COMMAND --model MODEL ARGS`.
pub(crate) fn ringtp(command: &str, model: &Path, args: &[&str]) -> Ran {
    let mut all = vec![command, "--model", model.to_str().expect("UTF-8")];
    all.extend(args);
    run(&all)
}

pub(crate) fn run(args: &[&str]) -> Ran {
    let start = Instant::now();
    let output: Output = Command::new(env!("CARGO_BIN_EXE_ringtp"))
        .args(args)
        .output()
        .expect("ringtp starts");
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: start.elapsed(),
    }
}
