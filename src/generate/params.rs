//! How tokens are chosen and when to stop.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use crate::checkpoint::GenerationConfig;
use crate::error::{Error, Result};

/// What a caller says about choosing tokens; `None` leaves it to the model.
///
/// | field | where it is `None` |
/// |---|---|
/// | `temperature` | generation_config.json if it says `do_sample` (1 if it says no more), else 0: greedy |
/// | `top_k`, `top_p`, `min_p` | generation_config.json, else off |
/// | `repetition_penalty` | generation_config.json, else off |
/// | `max_tokens` | as many as context and KV cache hold |
/// | `seed` | a fresh one a request, reported in its completion; 0 where it is greedy |
///
/// The tokens of a request depend on its prompt, these and the seed, never on what else is in
/// the batch. Requests with one seed draw the same random numbers at the same positions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the greatest.
    pub temperature: Option<f32>,
    /// Keeps the k greatest logits; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keeps the fewest most probable tokens whose probabilities reach this, in (0, 1].
    pub top_p: Option<f32>,
    /// Keeps tokens at least this times as probable as the best, in [0, 1].
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens already in the prompt or the
    /// completion; above 0, and 1 does nothing.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_tokens: Option<usize>,
    /// Before this many tokens neither the ids that end a text nor `stop_ids` are chosen.
    pub min_tokens: usize,
    /// Texts that end the completion; they are not part of its text.
    pub stop: Vec<String>,
    /// Ids that end the completion, beside those of the model.
    pub stop_ids: Vec<u32>,
    /// Whether the model's own end-of-text ids are tokens like others.
    pub ignore_eos: bool,
    /// Key of the random numbers.
    pub seed: Option<u64>,
}

impl SamplingParams {
    /// The greatest logit, whatever generation_config.json says.
    pub fn greedy() -> Self {
        Self {
            temperature: Some(0.0),
            top_k: Some(0),
            top_p: Some(1.0),
            min_p: Some(0.0),
            repetition_penalty: Some(1.0),
            ..Self::default()
        }
    }

    /// Sets the temperature.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = Some(temperature);
        self
    }

    /// Sets the number of tokens to keep.
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// Sets the probability mass to keep.
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.top_p = Some(top_p);
        self
    }

    /// Sets the least probability relative to the best.
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.min_p = Some(min_p);
        self
    }

    /// Sets the repetition penalty.
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = Some(penalty);
        self
    }

    /// Sets the number of tokens to generate at most.
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// Sets the number of tokens to generate at least.
    pub fn min_tokens(mut self, min_tokens: usize) -> Self {
        self.min_tokens = min_tokens;
        self
    }

    /// Adds a text that ends the completion.
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Adds an id that ends the completion.
    pub fn stop_id(mut self, id: u32) -> Self {
        self.stop_ids.push(id);
        self
    }

    /// Sets whether the model's end-of-text ids are tokens like others.
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.ignore_eos = ignore;
        self
    }

    /// Sets the key of the random numbers.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Fills in what is left to the model and checks all of it. `eos_token_ids` are those of
    /// config.json, which generation_config.json overrides.
    pub fn resolve(&self, model: &GenerationConfig, eos_token_ids: &[u32]) -> Result<Sampling> {
        let sampled = model.do_sample == Some(true);
        let default_temperature = match sampled {
            true => model.temperature.unwrap_or(1.0),
            false => 0.0,
        };
        let temperature = self.temperature.unwrap_or(default_temperature);
        let eos = model.eos_token_ids.as_deref().unwrap_or(eos_token_ids);
        let sampling = Sampling {
            temperature,
            top_k: self.top_k.or(model.top_k).unwrap_or(0),
            top_p: self.top_p.or(model.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(model.min_p).unwrap_or(0.0),
            repetition_penalty: self
                .repetition_penalty
                .or(model.repetition_penalty)
                .unwrap_or(1.0),
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop: self.stop.clone(),
            stop_ids: sorted(self.stop_ids.iter().copied().chain(match self.ignore_eos {
                true => [].iter().copied(),
                false => eos.iter().copied(),
            })),
            seed: match temperature {
                0.0 => self.seed.unwrap_or(0),
                _ => self.seed.unwrap_or_else(|| RandomState::new().hash_one(0)),
            },
        };
        sampling.check()?;
        Ok(sampling)
    }
}

fn sorted(ids: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut ids: Vec<_> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Temperatures below this, zero apart, would overflow the logits they divide.
const LEAST_TEMPERATURE: f32 = 1e-4;

/// [`SamplingParams`] with the model's defaults filled in, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0, or at least 0.0001.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// In (0, 1].
    pub top_p: f32,
    /// In [0, 1].
    pub min_p: f32,
    /// Above 0.
    pub repetition_penalty: f32,
    /// Tokens to generate at most, at least 1; `None` is what fits.
    pub max_tokens: Option<usize>,
    /// At most `max_tokens`.
    pub min_tokens: usize,
    /// Texts that end the completion, none empty.
    pub stop: Vec<String>,
    /// All ids that end the completion, ascending and distinct.
    pub stop_ids: Vec<u32>,
    /// Key of the random numbers.
    pub seed: u64,
}

impl Sampling {
    fn check(&self) -> Result<()> {
        let number = |name: &str, value: f32, inside: bool, expected: &str| {
            if inside {
                return Ok(());
            }
            Err(Error::input(
                name,
                expected,
                value,
                "change the setting, or generation_config.json where it comes from there",
            ))
        };
        let t = self.temperature;
        number(
            "temperature",
            t,
            t == 0.0 || (t.is_finite() && t >= LEAST_TEMPERATURE),
            "0 (greedy) or a finite number of at least 0.0001",
        )?;
        let p = self.top_p;
        number("top_p", p, p > 0.0 && p <= 1.0, "a number in (0, 1]")?;
        let p = self.min_p;
        number("min_p", p, (0.0..=1.0).contains(&p), "a number in [0, 1]")?;
        let penalty = self.repetition_penalty;
        number(
            "repetition_penalty",
            penalty,
            penalty.is_finite() && penalty > 0.0,
            "a finite number above 0",
        )?;
        if self.max_tokens == Some(0) {
            return Err(Error::input(
                "max_tokens",
                "at least 1",
                0,
                "ask for a token",
            ));
        }
        if let Some(max) = self.max_tokens.filter(|&max| self.min_tokens > max) {
            return Err(Error::input(
                "min_tokens",
                format_args!("at most max_tokens, {max}"),
                self.min_tokens,
                "lower it or raise max_tokens",
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::input(
                "stop",
                "texts of at least one character",
                "an empty one",
                "leave it out",
            ));
        }
        Ok(())
    }
}
