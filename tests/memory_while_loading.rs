//! Loading a model takes the memory of its shards, about: each rank copies its slices straight
//! from the file's map, and never holds a whole checkpoint, nor a second copy of its part.
//!
//! A child process (this test binary again) loads a checkpoint of about 32 million weights while
//! a thread of it samples its anonymous memory (RssAnon: heap and copies, not the file's map).

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use half::bf16;
use ringtp::DType;
use ringtp::checkpoint::Checkpoint;
use ringtp::llama::{Group, GroupOptions};
use ringtp::shard::{Dims, ShardPlan};
use serde_json::{Map, json};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;
/// What a rank may take beside its shard (stacks, norms in f32, a few huge pages that are not
/// full), and as much for the process: less than the largest tensor, and so little that a second
/// copy of the weights shows at every number of ranks.
const SLACK_A_RANK: u64 = 8 * MIB;
/// What the child is told: directory, dtype, tp, how often to load.
const CHILD: &str = "RINGTP_MEMORY_CHILD";

const DIMS: Dims = Dims {
    hidden_size: 512,
    intermediate_size: 1408,
    num_hidden_layers: 8,
    num_attention_heads: 16,
    num_key_value_heads: 8,
    head_dim: 32,
    vocab_size: 8000,
    attention_bias: false,
    mlp_bias: false,
    tie_word_embeddings: false,
};

/// Writes a checkpoint of random weights of `dtype`, a tensor's piece at a time.
fn write_checkpoint(dir: &Path, dtype: DType) -> Result {
    let (mut header, mut at) = (Map::new(), 0);
    let plan = ShardPlan::new(&DIMS, 1)?;
    for tensor in plan.tensors() {
        let end = at + tensor.elements(0) * dtype.size();
        let name = dtype.name().to_uppercase();
        let entry = json!({"dtype": name, "shape": tensor.shape, "data_offsets": [at, end]});
        header.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(dir.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    // Numbers in [-1/16, 1/16) from a linear congruential generator (Knuth's MMIX).
    let mut state = 1_u64;
    for _ in 0..at / dtype.size() {
        state = state.wrapping_mul(6_364_136_223_846_793_005);
        state = state.wrapping_add(1_442_695_040_888_963_407);
        let value = (state >> 40) as f32 / (1 << 27) as f32 - 0.0625;
        match dtype {
            DType::F32 => file.write_all(&value.to_le_bytes())?,
            _ => file.write_all(&bf16::from_f32(value).to_le_bytes())?,
        }
    }
    file.into_inner()?.sync_all()?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": DIMS.hidden_size,
        "intermediate_size": DIMS.intermediate_size,
        "num_hidden_layers": DIMS.num_hidden_layers,
        "num_attention_heads": DIMS.num_attention_heads,
        "num_key_value_heads": DIMS.num_key_value_heads,
        "head_dim": DIMS.head_dim,
        "vocab_size": DIMS.vocab_size,
        "max_position_embeddings": 64,
        "tie_word_embeddings": false,
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    Ok(())
}

/// The bytes of all ranks' shards, stored as `dtype`.
fn shard_bytes(tp: usize, dtype: DType) -> Result<u64> {
    let plan = ShardPlan::new(&DIMS, tp)?;
    let of_rank = |rank| {
        plan.tensors()
            .iter()
            .map(move |tensor| tensor.elements(rank))
    };
    let elements: usize = (0..tp).flat_map(of_rank).sum();
    Ok((elements * dtype.size()) as u64)
}

/// This process's anonymous memory, in bytes.
fn rss_anon() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.ok_or("no RssAnon")?.parse::<u64>()? * 1024)
}

/// What [`CHILD`] asks for; does nothing in the parent.
#[test]
fn child() -> Result {
    let Ok(asked) = std::env::var(CHILD) else {
        return Ok(());
    };
    let mut asked = asked.split('|');
    let mut next = || asked.next().ok_or("an argument");
    let (dir, dtype) = (next()?, next()?.parse::<DType>()?);
    let (tp, copies): (usize, usize) = (next()?.parse()?, next()?.parse()?);

    let checkpoint = Arc::new(Checkpoint::open(dir)?);
    let before = rss_anon()?;
    let (peak, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut groups = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                peak.fetch_max(rss_anon().unwrap_or(u64::MAX), Ordering::SeqCst);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let options = GroupOptions {
            tp,
            threads: Some(tp),
            dtype: Some(dtype),
            num_blocks: Some(4),
            ..Default::default()
        };
        let load = || Group::load(checkpoint.clone(), options.clone());
        let loaded = (0..copies).try_for_each(|_| load().map(|group| groups.push(group)));
        done.store(true, Ordering::SeqCst);
        loaded
    })?;
    let peak = peak.into_inner().max(rss_anon()?);
    let memory = groups.iter().flat_map(Group::memory);
    let weights: usize = memory.map(|rank| rank.weights).sum();
    println!("FIGURES {before} {peak} {} {weights}", rss_anon()?);
    Ok(())
}

/// Anonymous memory before, at its peak, and after; what the ranks say that they have of weights.
struct Figures {
    before: u64,
    peak: u64,
    after: u64,
    weights: u64,
}

/// Loads in a process of its own.
fn measure(dir: &Path, dtype: DType, tp: usize, copies: usize) -> Result<Figures> {
    let asked = format!("{}|{dtype}|{tp}|{copies}", dir.display());
    let output = Command::new(std::env::current_exe()?)
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .env(CHILD, asked)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = || format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}", complaint());
    let start = text.find("FIGURES").ok_or_else(complaint)?;
    let words = text[start..].split_whitespace().skip(1).take(4);
    let numbers: Vec<u64> = words
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    let [before, peak, after, weights] = numbers[..] else {
        return Err(complaint().into());
    };
    Ok(Figures {
        before,
        peak,
        after,
        weights,
    })
}

/// What loading onto `tp` ranks may take at its peak.
fn allowed(before: u64, shards: u64, tp: usize) -> u64 {
    before + shards + SLACK_A_RANK * (1 + tp as u64)
}

#[test]
fn the_peak_is_the_shards_and_a_little() -> Result {
    if !cfg!(target_os = "linux") {
        println!("SKIPPED: RssAnon is of Linux");
        return Ok(());
    }
    for (file, stores) in [
        (DType::F32, [DType::F32, DType::Bf16]),
        (DType::Bf16, [DType::Bf16, DType::F32]),
    ] {
        let dir = tempfile::tempdir()?;
        write_checkpoint(dir.path(), file)?;
        for dtype in stores {
            for tp in [1, 2, 4] {
                let shards = shard_bytes(tp, dtype)?;
                let figures = measure(dir.path(), dtype, tp, 1)?;
                let Figures {
                    before,
                    peak,
                    after,
                    weights,
                } = figures;
                let mib = |bytes: u64| bytes as f64 / MIB as f64;
                println!(
                    "{file} file as {dtype} on {tp}: shards {:.1} MiB, before {:.1}, peak {:.1} \
                     (shards + {:.1}), after {:.1}",
                    mib(shards),
                    mib(before),
                    mib(peak),
                    mib(peak) - mib(before) - mib(shards),
                    mib(after),
                );
                let allowed = allowed(before, shards, tp);
                assert!(peak < allowed, "peak {peak}, allowed {allowed}");
                // The shards are there, so it was they that were measured.
                assert!(peak > shards, "peak {peak}, shards {shards}");
                // Padding, and vectors in f32, make a few hundredths.
                assert!(
                    (shards..shards + shards / 20).contains(&weights),
                    "ranks say {weights}, shards {shards}"
                );
            }
        }
        // A second copy would be seen.
        for tp in [1, 4] {
            let shards = shard_bytes(tp, file)?;
            let Figures { before, peak, .. } = measure(dir.path(), file, tp, 2)?;
            assert!(peak > allowed(before, shards, tp), "{peak}");
        }
    }
    Ok(())
}
