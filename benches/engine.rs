//! How near inference comes to what the machine can do: decode to the rate at which its cores
//! read memory, prefill to the multiply-adds they do.
//!
//! - decode: one sequence, context 128 and on. A step reads the weights of the layers and of the
//!   LM head once, and the KV cache; of the embedding one row. Limit: bytes / read bandwidth.
//! - prefill: 128 tokens. Two operations a token and weight of the layers, and the LM head for
//!   the last token alone; attention and all else not counted. Limit: operations / FMA peak
//!   (bf16 is widened to f32, so the peak is that of f32).
//!
//! A round measures the limits, then each model at each number of ranks, one after another; all
//! cores work in every case. Figures are medians over the rounds, of medians over the steps of a
//! round; a ratio is taken within its round, since other tenants of the machine come and go.
//!
//! ```text
//! cargo bench --bench engine [-- ROUNDS]
//! ```
//!
//! The models (246 M random weights, 1 GB in f32, 0.5 GB in bf16) are written to the `tmp` of
//! cargo's target directory at the first run; they may be deleted.

#[path = "common/limits.rs"]
mod limits;
#[allow(dead_code)] // its `main`
#[path = "../examples/random_llama.rs"]
mod random_llama;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use ringtp::checkpoint::Checkpoint;
use ringtp::llama::{Batch, Group, GroupOptions, SampleRow};
use ringtp::shard::ShardPlan;
use ringtp::{DType, Result};

const PROMPT: usize = 128;
const TP: [usize; 2] = [1, 2];
const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// How much is measured.
struct Effort {
    rounds: usize,
    prefills: usize,
    decode_steps: usize,
    /// Bytes to measure the read bandwidth with: beyond the caches of today's servers.
    limit_bytes: usize,
    /// What `random_llama` is told; its defaults are the model of 246 M.
    model: &'static [&'static str],
    name: &'static str,
}

const FULL: Effort = Effort {
    rounds: 5,
    prefills: 5,
    decode_steps: 48,
    limit_bytes: 1 << 30,
    model: &[],
    name: "246m",
};

/// `cargo test --benches` only sees whether it runs.
const TRIAL: Effort = Effort {
    rounds: 1,
    prefills: 1,
    decode_steps: 2,
    limit_bytes: 4 << 20,
    model: &[
        "--hidden=64",
        "--layers=2",
        "--intermediate=128",
        "--vocab=512",
    ],
    name: "tiny",
};

/// What one round found for one model at one number of ranks: seconds.
#[derive(Clone, Copy)]
struct Sample {
    decode: f64,
    decode_limit: f64,
    prefill: f64,
    prefill_limit: f64,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let mut effort = if args.iter().any(|arg| arg == "--bench") {
        FULL
    } else {
        TRIAL
    };
    if let Some(rounds) = args.iter().find_map(|arg| arg.parse().ok()) {
        effort.rounds = 1.max(rounds);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let models: Vec<_> = DTYPES
        .into_iter()
        .map(|dtype| Ok(Arc::new(Checkpoint::open(model(&effort, dtype)?)?)))
        .collect::<Result<_>>()?;

    let mut samples = [const { [const { Vec::new() }; TP.len()] }; DTYPES.len()];
    let mut limits_seen = Vec::new();
    for _ in 0..effort.rounds {
        for (checkpoint, samples) in models.iter().zip(&mut samples) {
            let read = limits::read_bandwidth(cores, effort.limit_bytes);
            let fma = limits::fma_peak(cores);
            limits_seen.push((read, fma));
            let work = Work::of(checkpoint, &effort)?;
            for (tp, samples) in TP.into_iter().zip(samples) {
                let (decode, prefill) = measure(checkpoint, tp, &effort)?;
                samples.push(Sample {
                    decode,
                    decode_limit: work.decode_bytes / read.giga_per_second / 1e9,
                    prefill,
                    prefill_limit: work.prefill_flops / fma.giga_per_second / 1e9,
                });
            }
        }
    }

    let (read, fma) = limits_seen[0];
    println!(
        "{cores} cores, {} rounds; read {:.1} GB/s ({}), f32 FMA {:.0} GFLOP/s ({})",
        effort.rounds,
        median(limits_seen.iter().map(|limit| limit.0.giga_per_second)),
        read.how,
        median(limits_seen.iter().map(|limit| limit.1.giga_per_second)),
        fma.how,
    );
    println!(
        "{:>5} {:>3} | {:>12} {:>8} {:>5} | {:>14} {:>8} {:>5}",
        "", "tp", "decode tok/s", "limit", "%", "prefill 128 ms", "limit", "%"
    );
    for (checkpoint, samples) in models.iter().zip(&samples) {
        for (tp, samples) in TP.into_iter().zip(samples) {
            let all = |of: fn(&Sample) -> f64| median(samples.iter().map(of));
            println!(
                "{:>5} {tp:>3} | {:>12.1} {:>8.1} {:>5.1} | {:>14.1} {:>8.1} {:>5.1}",
                checkpoint.dtype(),
                1.0 / all(|s| s.decode),
                1.0 / all(|s| s.decode_limit),
                100.0 * all(|s| s.decode_limit / s.decode),
                1e3 * all(|s| s.prefill),
                1e3 * all(|s| s.prefill_limit),
                100.0 * all(|s| s.prefill_limit / s.prefill),
            );
        }
        let ratio = |of: fn(&Sample) -> f64| {
            let pairs = samples[0].iter().zip(&samples[1]);
            median(pairs.map(|(one, two)| of(one) / of(two)))
        };
        println!(
            "{:>5} tp 2 / tp 1: decode {:.2}, prefill {:.2} times as fast",
            checkpoint.dtype(),
            ratio(|s| s.decode),
            ratio(|s| s.prefill),
        );
    }
    Ok(())
}

/// What a step has to read and to compute.
struct Work {
    decode_bytes: f64,
    prefill_flops: f64,
}

impl Work {
    fn of(checkpoint: &Checkpoint, effort: &Effort) -> Result<Self> {
        let dims = checkpoint.config().dims;
        let plan = ShardPlan::new(&dims, 1)?;
        let weights = |prefix: &str| -> usize {
            let tensors = plan.tensors().iter();
            let matrices = tensors.filter(|t| t.shape.len() == 2 && t.name.starts_with(prefix));
            matrices.map(|t| t.elements(0)).sum()
        };
        let (layers, head) = (weights("model.layers."), weights("lm_head."));
        // K and V of every position, in the middle of the steps.
        let context = PROMPT + effort.decode_steps / 2;
        let kv = 2 * context * dims.num_hidden_layers * dims.num_key_value_heads * dims.head_dim;
        Ok(Self {
            decode_bytes: ((layers + head + kv) * checkpoint.dtype().size()) as f64,
            prefill_flops: (2 * PROMPT * layers + 2 * head) as f64,
        })
    }
}

/// Median seconds of a decode step and of a prefill.
fn measure(checkpoint: &Arc<Checkpoint>, tp: usize, effort: &Effort) -> Result<(f64, f64)> {
    let options = GroupOptions {
        tp,
        max_model_len: Some(PROMPT + effort.decode_steps + 1),
        ..GroupOptions::default()
    };
    let mut group = Group::load(checkpoint.clone(), options)?;
    let vocab = checkpoint.config().dims.vocab_size as u32;
    let blocks: Vec<u32> = (0..group.limits().num_blocks as u32).collect();
    // One sequence, which may use every block; timed as an engine's step is.
    let mut step = |tokens: &[u32], position: usize| -> Result<(u32, Duration)> {
        let mut batch = Batch::new();
        let rows = batch.push(tokens, position as u32, PROMPT as u32, &blocks);
        batch.logits_rows.push(rows.end - 1);
        let start = Instant::now();
        let token = group.step(&batch, &[SampleRow::greedy()])?[0];
        Ok((token, start.elapsed()))
    };
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7919 % vocab).collect();
    let (mut token, _) = step(&prompt, 0)?;
    let prefills = (0..effort.prefills)
        .map(|_| Ok(step(&prompt, 0)?.1))
        .collect::<Result<Vec<_>>>()?;
    let mut decodes = Vec::new();
    for position in PROMPT..PROMPT + effort.decode_steps {
        let (next, time) = step(&[token], position)?;
        token = next;
        decodes.push(time);
    }
    let median = |times: Vec<Duration>| median(times.iter().map(Duration::as_secs_f64));
    Ok((median(decodes), median(prefills)))
}

/// The directory of the random model; written if it is not there.
fn model(effort: &Effort, dtype: DType) -> Result<PathBuf> {
    let name = format!("random-llama-{}-{dtype}", effort.name);
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if !dir.exists() {
        // Under another name until it is whole.
        let partial = dir.with_extension("partial");
        let [out, dtype] = [
            format!("--out={}", partial.display()),
            format!("--dtype={dtype}"),
        ];
        let args = ["random_llama", &out, &dtype];
        random_llama::run(&random_llama::Args::parse_from(
            args.iter().chain(effort.model),
        ))?;
        fs::rename(&partial, &dir).map_err(|error| ringtp::Error::io(&dir, "write", &error))?;
    }
    Ok(dir)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
