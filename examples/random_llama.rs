//! Writes a Llama checkpoint of any size with random weights: for benchmarks, where only the
//! sizes matter.
//!
//! ```text
//! cargo run --release --example random_llama -- --out DIR [--dtype bf16] [--layers 16] ..
//! ```
//!
//! Matrices `[out, in]` and the embedding are uniform with standard deviation `1 / sqrt(in)`, so
//! that activations keep their size from layer to layer; norms are one, biases zero. The numbers
//! depend on the seed and on the tensor's place alone. Tensors are streamed to the disk a piece
//! at a time.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use half::{bf16, f16};
use ringtp::dtype::Element;
use ringtp::llama::sampling::philox::philox4x32;
use ringtp::shard::{Dims, ShardPlan, TensorPlan};
use ringtp::{DType, Error, Result};
use serde_json::{Map, Value, json};

/// Write a random Llama checkpoint (config.json, model.safetensors).
#[derive(Parser)]
pub(crate) struct Args {
    /// The directory to write to; made if it is not there.
    #[arg(long)]
    out: PathBuf,
    /// The type of the weights: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    dtype: DType,
    /// Key of the random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 1024)]
    hidden: usize,
    /// Decoder layers.
    #[arg(long, default_value_t = 16)]
    layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = 16)]
    heads: usize,
    /// KV heads.
    #[arg(long, default_value_t = 4)]
    kv_heads: usize,
    /// Elements of a head; hidden / heads if not given.
    #[arg(long)]
    head_dim: Option<usize>,
    /// Width between gate/up and down.
    #[arg(long, default_value_t = 2816)]
    intermediate: usize,
    /// Vocabulary.
    #[arg(long, default_value_t = 32000)]
    vocab: usize,
    /// Positions of the context.
    #[arg(long, default_value_t = 2048)]
    positions: usize,
    /// Use the embedding as LM head.
    #[arg(long)]
    tied: bool,
    /// Biases on q, k, v and o.
    #[arg(long)]
    attention_bias: bool,
    /// Biases on gate, up and down.
    #[arg(long)]
    mlp_bias: bool,
}

// Safetensors are little-endian, and the elements are written as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"));

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if error.is_input() { 2 } else { 1 })
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let dims = dims(args)?;
    let plan = ShardPlan::new(&dims, 1)?;
    let header = header(plan.tensors(), args.dtype)?;
    let elements: usize = plan.tensors().iter().map(|t| t.elements(0)).sum();

    fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, "create as a directory", &e))?;
    let path = args.out.join("config.json");
    fs::write(&path, config(args, &dims)).map_err(|e| Error::io(&path, "write", &e))?;
    let path = args.out.join("model.safetensors");
    write_tensors(&path, &header, &plan, args).map_err(|e| {
        // A disk that is full should not stay so.
        let _ = fs::remove_file(&path);
        Error::io(&path, "write", &e)
    })?;

    let bytes = elements * args.dtype.size();
    println!(
        "{}: {elements} parameters ({:.1} M), {} tensors of {}, {:.1} MB",
        args.out.display(),
        elements as f64 / 1e6,
        plan.tensors().len(),
        args.dtype,
        bytes as f64 / 1e6,
    );
    Ok(())
}

fn dims(args: &Args) -> Result<Dims> {
    let sizes = [
        ("--hidden", args.hidden),
        ("--layers", args.layers),
        ("--heads", args.heads),
        ("--kv-heads", args.kv_heads),
        ("--head-dim", args.head_dim.unwrap_or(2)),
        ("--intermediate", args.intermediate),
        ("--vocab", args.vocab),
        ("--positions", args.positions),
    ];
    for (name, size) in sizes {
        // Far above any model: keeps the products of two sizes, and the list of tensors, small.
        let most = if name == "--layers" { 1 << 12 } else { 1 << 24 };
        if !(1..=most).contains(&size) {
            return Err(Error::input(
                name,
                format_args!("1 to {most}"),
                size,
                "name a size in between",
            ));
        }
    }
    if !args.heads.is_multiple_of(args.kv_heads) {
        return Err(Error::input(
            "--kv-heads",
            format_args!("a divisor of the {} heads", args.heads),
            args.kv_heads,
            "change one of them",
        ));
    }
    let head_dim = args.head_dim.unwrap_or(args.hidden / args.heads);
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(Error::input(
            "--head-dim",
            "an even number (hidden / heads unless given)",
            head_dim,
            "give one, or other --hidden and --heads",
        ));
    }
    Ok(Dims {
        hidden_size: args.hidden,
        intermediate_size: args.intermediate,
        num_hidden_layers: args.layers,
        num_attention_heads: args.heads,
        num_key_value_heads: args.kv_heads,
        head_dim,
        vocab_size: args.vocab,
        attention_bias: args.attention_bias,
        mlp_bias: args.mlp_bias,
        tie_word_embeddings: args.tied,
    })
}

fn config(args: &Args, dims: &Dims) -> String {
    let dtype = match args.dtype {
        DType::F32 => "float32",
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
    };
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_hidden_layers,
        "num_attention_heads": dims.num_attention_heads,
        "num_key_value_heads": dims.num_key_value_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab_size,
        "max_position_embeddings": args.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": dims.attention_bias,
        "mlp_bias": dims.mlp_bias,
        "tie_word_embeddings": dims.tie_word_embeddings,
        "torch_dtype": dtype,
    });
    format!("{config:#}\n")
}

/// The length and the JSON of the safetensors header, padded to 8 bytes.
fn header(tensors: &[TensorPlan], dtype: DType) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut start = 0usize;
    for tensor in tensors {
        let bytes = tensor
            .shape
            .iter()
            .try_fold(dtype.size(), |n, &size| n.checked_mul(size));
        let Some(end) = bytes.and_then(|bytes| start.checked_add(bytes)) else {
            return Err(Error::input(
                "checkpoint",
                "fewer than 2^64 bytes",
                "more",
                "choose smaller sizes",
            ));
        };
        let entry = json!({
            "dtype": dtype.name().to_uppercase(),
            "shape": tensor.shape,
            "data_offsets": [start, end],
        });
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

fn write_tensors(path: &Path, header: &[u8], plan: &ShardPlan, args: &Args) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(header)?;
    for (index, tensor) in (0..).zip(plan.tensors()) {
        let numbers = Numbers::of(tensor, index, args.seed);
        match args.dtype {
            DType::F32 => numbers.write::<f32>(&mut file)?,
            DType::Bf16 => numbers.write::<bf16>(&mut file)?,
            DType::F16 => numbers.write::<f16>(&mut file)?,
        }
    }
    file.into_inner()?.sync_all()
}

/// The elements of one tensor.
struct Numbers {
    elements: usize,
    /// All are this much plus a uniform number within the spread on either side.
    center: f32,
    spread: f32,
    tensor: u32,
    seed: u64,
}

impl Numbers {
    fn of(tensor: &TensorPlan, index: u32, seed: u64) -> Self {
        let (center, spread) = match tensor.shape.as_slice() {
            // A uniform number on [-a, a] has the standard deviation a / sqrt(3).
            [_, columns] => (0.0, (3.0 / *columns as f32).sqrt()),
            _ if tensor.name.ends_with("norm.weight") => (1.0, 0.0),
            _ => (0.0, 0.0),
        };
        Self {
            elements: tensor.elements(0),
            center,
            spread,
            tensor: index,
            seed,
        }
    }

    fn write<T: Element>(&self, out: &mut impl Write) -> std::io::Result<()> {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        for block in 0..self.elements.div_ceil(4) {
            let counter = [block as u32, (block as u64 >> 32) as u32, self.tensor, 0];
            let values = philox4x32(counter, key).map(|word| {
                // The upper 24 bits, centred: exact in f32.
                let unit = ((word >> 8) as f32 + 0.5) / (1 << 23) as f32 - 1.0;
                T::from_f32(self.center + self.spread * unit)
            });
            let count = (self.elements - 4 * block).min(4);
            out.write_all(bytemuck::cast_slice(&values[..count]))?;
        }
        Ok(())
    }
}
