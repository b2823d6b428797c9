//! The angles of the rotary embedding (Su et al., 2021) and its extensions for long contexts.
//!
//! Frequencies, angles and tables are f32 and rounded where Hugging Face transformers rounds:
//! an angle is the f32 product of the f32 frequency and the position, which at position 10^5
//! is several thousandths off the exact one, so anything else would disagree there.

use std::f64::consts::PI;

use super::Batch;
use crate::backend::RopeTables;
use crate::checkpoint::{LlamaConfig, RopeScaling};

/// What is needed to make the tables of a batch.
#[derive(Clone, Debug)]
pub struct Rope {
    head_dim: usize,
    theta: f64,
    max_position_embeddings: usize,
    /// Of `dynamic` rope, whose base grows with the sequence.
    dynamic_factor: Option<f64>,
    /// `[head_dim / 2]`
    frequencies: Vec<f32>,
    /// Multiplies cosines and sines.
    attention_factor: f32,
}

impl Rope {
    /// The rope of a configuration.
    pub fn new(config: &LlamaConfig) -> Self {
        let (dim, theta) = (config.dims.head_dim, config.rope.theta);
        let plain = frequencies(dim, theta);
        let mut attention_factor = 1.0;
        let mut dynamic_factor = None;
        let frequencies = match &config.rope.scaling {
            RopeScaling::Default => plain,
            RopeScaling::Linear { factor } => plain.iter().map(|&f| f / *factor as f32).collect(),
            RopeScaling::Dynamic { factor } => {
                dynamic_factor = Some(*factor);
                plain
            }
            RopeScaling::Llama3 { .. } => plain
                .iter()
                .map(|&f| llama3(f, &config.rope.scaling))
                .collect(),
            RopeScaling::Yarn { .. } => {
                attention_factor = yarn_attention_factor(&config.rope.scaling);
                yarn(dim, theta, &config.rope.scaling)
            }
        };
        Self {
            head_dim: dim,
            theta,
            max_position_embeddings: config.max_position_embeddings,
            dynamic_factor,
            frequencies,
            attention_factor: attention_factor as f32,
        }
    }

    /// Cosines and sines of a batch's rows.
    pub fn tables(&self, batch: &Batch) -> RopeTables {
        let len = batch.rows() * self.head_dim / 2;
        let mut tables = RopeTables {
            cos: Vec::with_capacity(len),
            sin: Vec::with_capacity(len),
        };
        for sequence in 0..batch.sequences() {
            for row in batch.rows_of(sequence) {
                let position = batch.positions[row];
                let length = batch.prompt_lens[sequence].max(position + 1);
                self.push_row(&mut tables, position, length as usize);
            }
        }
        tables
    }

    fn push_row(&self, tables: &mut RopeTables, position: u32, length: usize) {
        let grown;
        let frequencies = match self.dynamic_factor {
            Some(factor) if length > self.max_position_embeddings => {
                grown = frequencies(self.head_dim, self.dynamic_theta(factor, length));
                &grown
            }
            _ => &self.frequencies,
        };
        for &frequency in frequencies {
            let (sin, cos) = f64::from(frequency * position as f32).sin_cos();
            tables.cos.push(cos as f32 * self.attention_factor);
            tables.sin.push(sin as f32 * self.attention_factor);
        }
    }

    /// The base for a sequence of `length`: NTK-aware scaling. A row's length is that of its
    /// prompt or, past it, of the sequence up to the row: what transformers does with a
    /// cache, and it makes a row independent of how the prompt was chunked.
    fn dynamic_theta(&self, factor: f64, length: usize) -> f64 {
        let dim = self.head_dim as f64;
        let ratio = (factor * length as f64) as f32 / self.max_position_embeddings as f32;
        let grown = f64::from(ratio - (factor - 1.0) as f32).powf(dim / (dim - 2.0)) as f32;
        f64::from(self.theta as f32 * grown)
    }
}

/// theta^(2i/dim), of which the frequencies are the reciprocals.
fn wavelengths(dim: usize, theta: f64) -> impl Iterator<Item = f32> {
    let theta = f64::from(theta as f32);
    let power = move |i: usize| theta.powf(f64::from((2 * i) as f32 / dim as f32)) as f32;
    (0..dim / 2).map(power)
}

fn frequencies(dim: usize, theta: f64) -> Vec<f32> {
    wavelengths(dim, theta).map(f32::recip).collect()
}

/// Llama 3.1: long waves are divided by the factor, short ones kept, between is a ramp.
fn llama3(frequency: f32, scaling: &RopeScaling) -> f32 {
    let &RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    } = scaling
    else {
        unreachable!("called for llama3 alone")
    };
    let original = original_max_position_embeddings as f64;
    let wavelength = frequency.recip() * (2.0 * PI) as f32;
    if wavelength < (original / high_freq_factor) as f32 {
        frequency
    } else if wavelength > (original / low_freq_factor) as f32 {
        frequency / factor as f32
    } else {
        let turns = wavelength.recip() * original as f32;
        let ramp = (turns - low_freq_factor as f32) / (high_freq_factor - low_freq_factor) as f32;
        (1.0 - ramp) * frequency / factor as f32 + ramp * frequency
    }
}

/// YaRN: dimensions that turn often are kept, those that turn less than once over the
/// original context are interpolated, between is a ramp over the dimensions.
fn yarn(dim: usize, theta: f64, scaling: &RopeScaling) -> Vec<f32> {
    let &RopeScaling::Yarn {
        factor,
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        truncate,
        ..
    } = scaling
    else {
        unreachable!("called for yarn alone")
    };
    // The dimension that makes `rotations` turns over the original context.
    let dimension = |rotations: f64| {
        let turns = original_max_position_embeddings as f64 / (rotations * 2.0 * PI);
        dim as f64 * turns.ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min((dim - 1) as f64));
    if low == high {
        high += 0.001; // no ramp, and no division by zero
    }
    let blend = |(i, wavelength): (usize, f32)| {
        let ramp = (i as f32 - low as f32) / (high - low) as f32;
        let keep = 1.0 - ramp.clamp(0.0, 1.0);
        let interpolated = (factor as f32 * wavelength).recip();
        interpolated * (1.0 - keep) + wavelength.recip() * keep
    };
    wavelengths(dim, theta).enumerate().map(blend).collect()
}

fn yarn_attention_factor(scaling: &RopeScaling) -> f64 {
    let &RopeScaling::Yarn {
        factor,
        attention_factor,
        mscale,
        mscale_all_dim,
        ..
    } = scaling
    else {
        unreachable!("called for yarn alone")
    };
    let magnitude = |mscale: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * mscale * factor.ln() + 1.0,
    };
    match (attention_factor, mscale, mscale_all_dim) {
        (Some(given), ..) => given,
        // Zero counts as absent.
        (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => magnitude(m) / magnitude(all),
        _ => magnitude(1.0),
    }
}
