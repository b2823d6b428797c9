//! Whatever happens to the bytes of a model directory, opening it gives a checkpoint whose
//! tensors can all be read, or an error: never a panic, never a long wait.
//!
//! `RINGTP_FUZZ_CASES=1000000 cargo test --test checkpoint_never_panics` runs for longer.

#![allow(clippy::unwrap_used)]

mod checkpoint_support;

use std::path::Path;
use std::time::{Duration, Instant};

use checkpoint_support::{Model, put};
use proptest::prelude::*;
use proptest::sample::Index;
use ringtp::Error;
use ringtp::checkpoint::{Checkpoint, GenerationConfig, LlamaConfig};
use ringtp::shard::ShardPlan;
use serde_json::json;

fn cases() -> u32 {
    let cases = std::env::var("RINGTP_FUZZ_CASES").ok();
    cases.and_then(|cases| cases.parse().ok()).unwrap_or(256)
}

/// One thing that happens to a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(Index, u8),
    Cut(Index),
    Remove(Index, u8),
    Insert(Index, Vec<u8>),
    /// Puts a token that means something in place of as many bytes as it has.
    Token(Index, &'static str),
    /// Writes the length of the header.
    Length(u64),
}

fn damage() -> impl Strategy<Value = Damage> {
    let tokens = [
        "null",
        "-1",
        "0",
        "1e999",
        "NaN",
        "18446744073709551615",
        "9999999",
        "{}",
        "[]",
        "\"\"",
        "{",
        "}",
        "[",
        "]",
        "\"",
        ",",
        ":",
        "true",
        "F64",
        "I8",
        "../",
        "\\u0000",
        "1.5",
    ];
    prop_oneof![
        1 => (any::<Index>(), any::<u8>()).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        1 => any::<Index>().prop_map(Damage::Cut),
        1 => (any::<Index>(), 1u8..40).prop_map(|(at, count)| Damage::Remove(at, count)),
        1 => (any::<Index>(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        4 => (any::<Index>(), prop::sample::select(tokens.to_vec())).prop_map(|(at, token)| Damage::Token(at, token)),
        1 => any::<u64>().prop_map(Damage::Length),
        1 => (0u64..4096).prop_map(Damage::Length),
    ]
}

/// Applies `damage` to the first `reach` bytes, where the structure is.
fn apply(bytes: &mut Vec<u8>, damage: &Damage, reach: usize, binary: bool) {
    let reach = reach.min(bytes.len());
    if reach == 0 {
        return;
    }
    match damage {
        Damage::Flip(at, mask) => bytes[at.index(reach)] ^= mask,
        Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Damage::Remove(at, count) => {
            let at = at.index(reach);
            let end = bytes.len().min(at + usize::from(*count));
            bytes.drain(at..end);
        }
        Damage::Insert(at, more) => {
            let at = at.index(reach);
            bytes.splice(at..at, more.iter().copied());
        }
        Damage::Token(at, token) => {
            let at = at.index(reach);
            let end = bytes.len().min(at + token.len());
            bytes.splice(at..end, token.bytes());
        }
        Damage::Length(length) if binary && bytes.len() >= 8 => {
            bytes[..8].copy_from_slice(&length.to_le_bytes())
        }
        Damage::Length(_) => {}
    }
}

/// Opens `dir` and reads every tensor of every rank if that works.
fn open_and_read(dir: &Path) -> Result<(), TestCaseError> {
    let start = Instant::now();
    match Checkpoint::open(dir) {
        Err(Error::Model(faults)) => {
            prop_assert!(!faults.list.is_empty());
            for fault in &faults.list {
                prop_assert!(
                    !fault.what.is_empty() && !fault.remedy.is_empty(),
                    "{fault}"
                );
            }
        }
        Err(other) => prop_assert!(false, "{other}"),
        Ok(checkpoint) => {
            for tp in checkpoint.config().dims.valid_tp() {
                let plan = ShardPlan::new(&checkpoint.config().dims, tp).unwrap();
                for tensor in plan.tensors() {
                    for rank in 0..tp {
                        let shard = checkpoint.shard(tensor, rank).unwrap();
                        let mut row = vec![0.0; shard.cols()];
                        (0..shard.rows()).for_each(|r| shard.row_f32(r, &mut row));
                    }
                }
            }
            for name in checkpoint.unused() {
                let _ = checkpoint.tensor(name);
            }
        }
    }
    prop_assert!(start.elapsed() < Duration::from_secs(2));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_weights(damages in prop::collection::vec(damage(), 1..4)) {
        let dir = Model::small().write();
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let header = 8 + usize::from(bytes[0]) + 256 * usize::from(bytes[1]);
        for damage in &damages {
            apply(&mut bytes, damage, header, true);
        }
        std::fs::write(&path, bytes).unwrap();
        open_and_read(dir.path())?;
    }

    #[test]
    fn damaged_index(damages in prop::collection::vec(damage(), 1..4)) {
        let dir = Model::small().write_indexed(2);
        let path = dir.path().join("model.safetensors.index.json");
        let mut bytes = std::fs::read(&path).unwrap();
        for damage in &damages {
            apply(&mut bytes, damage, usize::MAX, false);
        }
        std::fs::write(&path, bytes).unwrap();
        open_and_read(dir.path())?;
    }

    #[test]
    fn damaged_config(damages in prop::collection::vec(damage(), 1..4), rope in 0usize..5) {
        let mut model = Model::small();
        let ropes = [
            json!(null),
            json!({"rope_type": "linear", "factor": 2.0}),
            json!({"type": "dynamic", "factor": 2.0}),
            json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2,
                "mscale": 0.7, "mscale_all_dim": 0.8, "truncate": false, "original_max_position_embeddings": 16}),
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}),
        ];
        model.config["rope_scaling"] = ropes[rope].clone();
        model.config["eos_token_id"] = json!([1, 2]);
        let mut bytes = model.config.to_string().into_bytes();
        for damage in &damages {
            apply(&mut bytes, damage, usize::MAX, false);
        }
        let dir = model.write();
        if let Ok(text) = std::str::from_utf8(&bytes)
            && let Ok(config) = LlamaConfig::from_json("config.json", text)
        {
            prop_assert!(config.max_context() >= 1 && config.rms_norm_eps > 0.0);
            prop_assert!(config.rope.theta > 0.0 && config.rope.theta.is_finite());
            config.dims.check_tp(1).unwrap();
        }
        put(dir.path(), "config.json", bytes);
        open_and_read(dir.path())?;
    }

    #[test]
    fn damaged_generation_config(damages in prop::collection::vec(damage(), 1..4)) {
        let text = r#"{"eos_token_id": [1, 2], "do_sample": true, "temperature": 0.6, "top_k": 50, "top_p": 0.9}"#;
        let mut bytes = text.as_bytes().to_vec();
        for damage in &damages {
            apply(&mut bytes, damage, usize::MAX, false);
        }
        let dir = Model::small().write();
        put(dir.path(), "generation_config.json", &bytes);
        let _ = GenerationConfig::from_json("g", &String::from_utf8_lossy(&bytes));
        open_and_read(dir.path())?;
    }
}
