//! generation_config.json.

use std::cell::RefCell;
use std::path::Path;

use serde_json::Value;

use super::config::{MAX_BYTES, within};
use super::json::{Fields, parse_object, read_text};
use crate::error::{Error, Fault, Faults, Result};

/// What generation_config.json says of sampling; absent values are `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a text; they take precedence over those of config.json.
    pub eos_token_ids: Option<Vec<u32>>,
    /// Whether to sample at all.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keeps the k best.
    pub top_k: Option<usize>,
    /// Keeps the best whose probabilities sum to this.
    pub top_p: Option<f32>,
    /// Keeps those at least this times as probable as the best.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens already seen.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the text of a generation_config.json. `subject` names the text in the error,
    /// which lists every defect.
    pub fn from_json(subject: &str, text: &str) -> Result<Self> {
        Self::parse(text, None).map_err(|faults| Error::Model(Faults::new(subject, faults)))
    }

    /// Reads `dir`/generation_config.json; the default where there is no such file.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        Self::read_faults(dir.as_ref(), None)
            .map_err(|faults| Error::Model(Faults::new(dir.as_ref().display(), faults)))
    }

    /// As [`GenerationConfig::read`], for a vocabulary; each fault names the file.
    pub(super) fn read_faults(dir: &Path, vocab_size: Option<usize>) -> Result<Self, Vec<Fault>> {
        let name = "generation_config.json";
        match read_text(&dir.join(name), MAX_BYTES) {
            Ok(Some(text)) => Self::parse(&text, vocab_size).map_err(|faults| within(name, faults)),
            Ok(None) => Ok(Self::default()),
            Err(fault) => Err(vec![fault]),
        }
    }

    fn parse(text: &str, vocab_size: Option<usize>) -> Result<Self, Vec<Fault>> {
        let map = parse_object(text).map_err(|fault| vec![fault])?;
        let faults = RefCell::new(Vec::new());
        let fields = Fields::new(&map, &faults);
        let number = |name, expected, holds: fn(f64) -> bool| {
            fields.number(name, expected, holds).map(|n| n as f32)
        };
        let config = Self {
            eos_token_ids: fields.ids("eos_token_id", vocab_size),
            do_sample: fields.flag("do_sample"),
            temperature: number("temperature", "a number from 0 to 1e6", |n| {
                (0.0..=1e6).contains(&n)
            }),
            top_k: match fields.get("top_k").and_then(Value::as_u64) {
                // transformers: 0 keeps all.
                Some(0) => Some(0),
                _ => fields.size("top_k", u32::MAX as usize),
            },
            top_p: number("top_p", "a number from 0 to 1", |n| {
                (0.0..=1.0).contains(&n)
            }),
            min_p: number("min_p", "a number from 0 to 1", |n| {
                (0.0..=1.0).contains(&n)
            }),
            repetition_penalty: number("repetition_penalty", "a number from 1e-6 to 1e6", |n| {
                (1e-6..=1e6).contains(&n)
            }),
        };
        match faults.into_inner() {
            faults if faults.is_empty() => Ok(config),
            faults => Err(faults),
        }
    }
}
