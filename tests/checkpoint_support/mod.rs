//! Small model directories, right and wrong, written by the tests themselves.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test takes what it needs"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use ringtp::Error;
use ringtp::checkpoint::Checkpoint;
use ringtp::shard::{Dims, ShardPlan};
use serde_json::{Value, json};
use tempfile::TempDir;

/// One tensor, as a safetensors file has it.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Raw {
    /// Bytes that differ from place to place.
    pub(crate) fn new(name: &str, dtype: &'static str, shape: &[usize]) -> Self {
        let size = match dtype {
            "F64" | "I64" => 8,
            "F32" | "I32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        let count = shape.iter().product::<usize>() * size;
        let mut state = name.bytes().fold(0x9e37_79b9u32, |state, byte| {
            state.rotate_left(5) ^ u32::from(byte)
        });
        let bytes = (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        Self {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
            bytes,
        }
    }
}

/// A model directory to be.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) config: Value,
    pub(crate) tensors: Vec<Raw>,
}

pub(crate) const SMALL: Dims = Dims {
    hidden_size: 8,
    intermediate_size: 6,
    num_hidden_layers: 1,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    head_dim: 4,
    vocab_size: 11,
    attention_bias: false,
    mlp_bias: false,
    tie_word_embeddings: false,
};

impl Model {
    pub(crate) fn small() -> Self {
        Self::new(&SMALL, |_| "F32")
    }

    pub(crate) fn new(dims: &Dims, dtype: impl Fn(usize) -> &'static str) -> Self {
        let plan = ShardPlan::new(dims, 1).unwrap();
        let tensors = plan.tensors().iter().enumerate();
        Self {
            config: config(dims),
            tensors: tensors
                .map(|(i, tensor)| Raw::new(&tensor.name, dtype(i), &tensor.shape))
                .collect(),
        }
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Raw {
        let mut tensors = self.tensors.iter_mut();
        tensors.find(|tensor| tensor.name == name).unwrap()
    }

    /// The directory, with all weights in model.safetensors.
    pub(crate) fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "config.json", self.config.to_string());
        put(dir.path(), "model.safetensors", safetensors(&self.tensors));
        dir
    }

    /// The directory, with the weights in `files` files and an index.
    pub(crate) fn write_indexed(&self, files: usize) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "config.json", self.config.to_string());
        let mut map = serde_json::Map::new();
        for file in 0..files {
            let name = format!("model-{:05}-of-{files:05}.safetensors", file + 1);
            let part: Vec<_> = self
                .tensors
                .iter()
                .skip(file)
                .step_by(files)
                .cloned()
                .collect();
            for tensor in &part {
                map.insert(tensor.name.clone(), name.clone().into());
            }
            put(dir.path(), &name, safetensors(&part));
        }
        put_index(dir.path(), &Value::Object(map));
        dir
    }
}

pub(crate) fn config(dims: &Dims) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_hidden_layers,
        "num_attention_heads": dims.num_attention_heads,
        "num_key_value_heads": dims.num_key_value_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab_size,
        "max_position_embeddings": 64,
        "attention_bias": dims.attention_bias,
        "mlp_bias": dims.mlp_bias,
        "tie_word_embeddings": dims.tie_word_embeddings,
    })
}

pub(crate) fn put(dir: &Path, name: &str, content: impl AsRef<[u8]>) {
    std::fs::write(dir.join(name), content).unwrap();
}

pub(crate) fn put_index(dir: &Path, weight_map: &Value) {
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    put(dir, "model.safetensors.index.json", index.to_string());
}

/// A safetensors file of `tensors`.
pub(crate) fn safetensors(tensors: &[Raw]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry = json!({
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, data.len()],
        });
        header.insert(tensor.name.clone(), entry);
    }
    raw_file(&Value::Object(header).to_string(), &data)
}

/// A file of this header, right or wrong, and these data.
pub(crate) fn raw_file(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

/// The error of opening `dir`, which must come at once and be the caller's.
pub(crate) fn refused(dir: &Path) -> String {
    let start = Instant::now();
    let error = Checkpoint::open(dir).unwrap_err();
    let elapsed = start.elapsed();
    assert!(elapsed < Duration::from_secs(1), "took {elapsed:?}");
    assert!(matches!(error, Error::Model(_)) && error.is_input());
    error.to_string()
}

/// Asserts that `text` has all of `parts`.
#[track_caller]
pub(crate) fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in:\n{text}");
    }
}
