//! config.json and generation_config.json.

use crate::dtype::DType;
use crate::shard::Dims;

/// A validated `LlamaForCausalLM` configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// The sizes.
    pub dims: Dims,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// The type that the configuration names, if it names one.
    pub dtype: Option<DType>,
    /// Put before a prompt by tokenizers; informative here.
    pub bos_token_id: Option<u32>,
    /// Ids that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// The rotary embedding of a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// The rope types of Hugging Face transformers.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A base that grows with the length of the sequence.
    Dynamic {
        /// How much longer than `max_position_embeddings` a sequence may be.
        factor: f64,
    },
    /// YaRN, <https://arxiv.org/abs/2309.00071>.
    Yarn {
        /// Ratio of the new context to the original one.
        factor: f64,
        /// The context of the original training.
        original_max_position_embeddings: usize,
        /// Multiplies cos and sin; by default from `factor` and the two mscales.
        attention_factor: Option<f64>,
        /// Rotations above which a dimension is left as it is; 32 by default.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated; 1 by default.
        beta_slow: f64,
        /// See DeepSeek; enters the attention factor.
        mscale: Option<f64>,
        /// See DeepSeek; enters the attention factor.
        mscale_all_dim: Option<f64>,
        /// Whether the bounds of the ramp are rounded to whole dimensions; true by default.
        truncate: bool,
    },
    /// Llama 3.1 and later.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above original / this are divided.
        low_freq_factor: f64,
        /// Wavelengths below original / this are kept.
        high_freq_factor: f64,
        /// The context of the original training.
        original_max_position_embeddings: usize,
    },
}

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
