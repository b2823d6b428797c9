//! config.json.

use std::cell::RefCell;
use std::path::Path;

use serde_json::Value;

use super::json::{Fields, MAX_SIZE, brief, parse_object, read_text};
use super::rope::rope;
use crate::dtype::DType;
use crate::error::{Error, Fault, Faults, Result};
use crate::shard::Dims;

/// A configuration of more bytes is not one.
pub(super) const MAX_BYTES: u64 = 1 << 20;
/// More heads, or elements of a head, are taken for damage.
const MAX_HEADS: usize = 1 << 16;
/// More layers are taken for damage.
const MAX_LAYERS: usize = 4096;
/// More parameters are taken for damage; sizes in bytes stay far from overflow.
const MAX_PARAMETERS: u128 = 1 << 48;

/// Settings under which another model would be computed than the one implemented here.
const UNSUPPORTED: [&str; 4] = [
    "quantization_config",
    "compression_config",
    "sliding_window",
    "layer_types",
];

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

impl LlamaConfig {
    /// Reads the text of a config.json; absent fields take the defaults of transformers'
    /// `LlamaConfig`. `subject` names the text in the error, which lists every defect.
    pub fn from_json(subject: &str, text: &str) -> Result<Self> {
        Self::parse(text).map_err(|faults| Error::Model(Faults::new(subject, faults)))
    }

    /// Reads `dir`/config.json.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        Self::read_faults(dir.as_ref())
            .map_err(|faults| Error::Model(Faults::new(dir.as_ref().display(), faults)))
    }

    /// The longest sequence, in tokens: `max_position_embeddings`, times `factor` for
    /// `dynamic` rope.
    pub fn max_context(&self) -> usize {
        match self.rope.scaling {
            RopeScaling::Dynamic { factor } => {
                (self.max_position_embeddings as f64 * factor) as usize
            }
            _ => self.max_position_embeddings,
        }
    }

    /// As [`LlamaConfig::read`]; each fault names the file.
    pub(super) fn read_faults(dir: &Path) -> Result<Self, Vec<Fault>> {
        let name = "config.json";
        match read_text(&dir.join(name), MAX_BYTES) {
            Ok(Some(text)) => Self::parse(&text).map_err(|faults| within(name, faults)),
            Ok(None) => Err(vec![Fault::new(
                name,
                "a file",
                "none",
                "give the directory of a model as Hugging Face writes it, with config.json",
            )]),
            Err(fault) => Err(vec![fault]),
        }
    }

    fn parse(text: &str) -> Result<Self, Vec<Fault>> {
        let map = parse_object(text).map_err(|fault| vec![fault])?;
        let faults = RefCell::new(Vec::new());
        let fields = Fields::new(&map, &faults);
        check_architecture(&fields);
        check_supported(&fields);
        let dims = dims(&fields);
        let config = Self::with_dims(&fields, dims);
        match (config, faults.into_inner()) {
            (Some(config), faults) if faults.is_empty() => Ok(config),
            (_, faults) => Err(faults),
        }
    }

    fn with_dims(fields: &Fields<'_>, dims: Option<Dims>) -> Option<Self> {
        let max_position_embeddings = fields.size("max_position_embeddings", MAX_SIZE);
        let max_position_embeddings = match fields.get("max_position_embeddings") {
            None => Some(2048),
            Some(_) => max_position_embeddings,
        };
        let expected = "a number above 0 that f32 holds";
        let eps = fields.number("rms_norm_eps", expected, |n| {
            n as f32 > 0.0 && (n as f32).is_finite()
        });
        let rope = rope(
            fields,
            dims.map(|dims| dims.head_dim),
            max_position_embeddings,
        );
        let dtype = dtype(fields);
        let vocab_size = dims.map(|dims| dims.vocab_size);
        // transformers' own defaults, where the vocabulary has them.
        let default = |name: &str, id: u32| match fields.has(name) {
            true => None,
            false => Some(id).filter(|&id| (id as usize) < vocab_size.unwrap_or(0)),
        };
        let bos = fields.ids("bos_token_id", vocab_size);
        let bos_token_id = bos.and_then(|ids| ids.first().copied());
        let eos_token_ids = fields.ids("eos_token_id", vocab_size);
        Some(Self {
            dims: dims?,
            max_position_embeddings: max_position_embeddings?,
            rms_norm_eps: eps.unwrap_or(1e-6) as f32,
            rope,
            dtype,
            bos_token_id: bos_token_id.or(default("bos_token_id", 1)),
            eos_token_ids: eos_token_ids
                .unwrap_or_else(|| default("eos_token_id", 2).into_iter().collect()),
        })
    }
}

/// `faults` as faults of file `name`.
pub(super) fn within(name: &str, mut faults: Vec<Fault>) -> Vec<Fault> {
    for fault in &mut faults {
        fault.what = format!("{name}: {}", fault.what);
    }
    faults
}

fn check_architecture(fields: &Fields<'_>) {
    let remedy = "use a model of this architecture; others are not supported";
    let expected = "LlamaForCausalLM";
    match fields.get("architectures") {
        Some(Value::Array(list)) if !list.is_empty() => {
            if !list.iter().any(|name| name == expected) {
                let names: Vec<_> = list.iter().take(4).map(brief).collect();
                fields.fault("architectures", expected, names.join(", "), remedy);
            }
        }
        None | Some(Value::Array(_)) => {
            if fields.get("model_type").is_none() {
                let expected = "LlamaForCausalLM, or model_type `llama`";
                fields.fault("architectures", expected, "neither", remedy);
            }
        }
        Some(other) => fields.fault("architectures", "a list of names", brief(other), remedy),
    }
    if let Some(name) = fields.text("model_type")
        && name != "llama"
    {
        let found = format!("`{}`", brief(&name.into()).trim_matches('"'));
        fields.fault("model_type", "`llama`", found, remedy);
    }
    if let Some(name) = fields.text("hidden_act")
        // `swish` is another name for it.
        && !["silu", "swish"].contains(&name)
    {
        let found = format!("`{}`", brief(&name.into()).trim_matches('"'));
        let remedy = "use a model with this activation; others are not supported";
        fields.fault("hidden_act", "`silu`", found, remedy);
    }
}

fn check_supported(fields: &Fields<'_>) {
    for name in UNSUPPORTED {
        let Some(value) = fields.get(name) else {
            continue;
        };
        let harmless = match value {
            Value::Array(list) => list.iter().all(|kind| kind == "full_attention"),
            _ => false,
        };
        if !harmless {
            let remedy = "this setting changes the results and is not supported: choose a model \
                          without it";
            fields.fault(name, "no such setting", brief(value), remedy);
        }
    }
}

fn dims(fields: &Fields<'_>) -> Option<Dims> {
    let hidden_size = fields.required_size("hidden_size", MAX_SIZE);
    let intermediate_size = fields.required_size("intermediate_size", MAX_SIZE);
    let num_hidden_layers = fields.required_size("num_hidden_layers", MAX_LAYERS);
    let heads = fields.required_size("num_attention_heads", MAX_HEADS);
    let kv_heads = fields.size("num_key_value_heads", MAX_HEADS);
    let kv_heads = match fields.get("num_key_value_heads") {
        None => heads,
        Some(_) => kv_heads,
    };
    let head_dim = head_dim(fields, hidden_size, heads);
    let vocab_size = fields.required_size("vocab_size", MAX_SIZE);
    let attention_bias = fields.flag("attention_bias").unwrap_or(false);
    let mlp_bias = fields.flag("mlp_bias").unwrap_or(false);
    let tie_word_embeddings = fields.flag("tie_word_embeddings").unwrap_or(false);
    if let (Some(heads), Some(kv_heads)) = (heads, kv_heads)
        && !heads.is_multiple_of(kv_heads)
    {
        fields.fault(
            "num_key_value_heads",
            format_args!("a divisor of the {heads} attention heads"),
            kv_heads,
            "correct one of them",
        );
        return None;
    }
    let dims = Dims {
        hidden_size: hidden_size?,
        intermediate_size: intermediate_size?,
        num_hidden_layers: num_hidden_layers?,
        num_attention_heads: heads?,
        num_key_value_heads: kv_heads?,
        head_dim: head_dim?,
        vocab_size: vocab_size?,
        attention_bias,
        mlp_bias,
        tie_word_embeddings,
    };
    let parameters = parameters(&dims);
    if parameters > MAX_PARAMETERS {
        fields.fault(
            "hidden_size, intermediate_size, vocab_size, num_hidden_layers, heads",
            format_args!("a model of at most {MAX_PARAMETERS} parameters"),
            format_args!("sizes that give {parameters}"),
            "correct the sizes",
        );
        return None;
    }
    Some(dims)
}

fn head_dim(
    fields: &Fields<'_>,
    hidden_size: Option<usize>,
    heads: Option<usize>,
) -> Option<usize> {
    let (head_dim, origin) = match fields.get("head_dim") {
        Some(_) => (fields.size("head_dim", MAX_HEADS)?, ""),
        None => {
            let (hidden_size, heads) = (hidden_size?, heads?);
            if !hidden_size.is_multiple_of(heads) {
                fields.fault(
                    "hidden_size",
                    format_args!("a multiple of the {heads} attention heads, or a head_dim"),
                    hidden_size,
                    "correct it or add head_dim",
                );
                return None;
            }
            let origin = ", which is hidden_size / num_attention_heads";
            (hidden_size / heads, origin)
        }
    };
    if head_dim.is_multiple_of(2) && head_dim <= MAX_HEADS {
        return Some(head_dim);
    }
    fields.fault(
        "head_dim",
        format_args!("an even number up to {MAX_HEADS}"),
        format_args!("{head_dim}{origin}"),
        "correct it: rotary embedding takes elements in pairs",
    );
    None
}

/// Elements of all weight matrices.
fn parameters(dims: &Dims) -> u128 {
    let wide = |n: usize| n as u128;
    let heads = 2 * wide(dims.num_attention_heads) + 2 * wide(dims.num_key_value_heads);
    let attention = heads * wide(dims.head_dim);
    let mlp = 3 * wide(dims.intermediate_size);
    let layers = wide(dims.num_hidden_layers) * (attention + mlp);
    (layers + 2 * wide(dims.vocab_size)) * wide(dims.hidden_size)
}

/// The type that `dtype` or the older `torch_dtype` names, if it is one of ours.
fn dtype(fields: &Fields<'_>) -> Option<DType> {
    let name = match fields.get("dtype") {
        Some(_) => fields.text("dtype"),
        None => fields.text("torch_dtype"),
    };
    match name?.trim_start_matches("torch.") {
        "float32" => Some(DType::F32),
        "bfloat16" => Some(DType::Bf16),
        "float16" => Some(DType::F16),
        _ => None,
    }
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
