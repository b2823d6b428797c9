//! The logits and the greedy texts are those of Hugging Face transformers, for every kind of
//! Llama, at every number of ranks: tests/fixtures/README.md says what the fixtures are.

mod golden;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use golden::{Golden, choices_where_the_margin_decides, max_error, range};
use ringtp::DType;
use ringtp::checkpoint::Checkpoint;
use ringtp::llama::{Batch, Group, GroupOptions, SampleRow};
use serde_json::{Value, json};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Greatest error of f32 logits, over their range.
const TOLERANCE: f32 = 1e-4;
const RANKS: [usize; 6] = [1, 2, 3, 4, 6, 8];

fn fixtures() -> Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama");
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        if path.join("golden.safetensors").is_file() {
            found.push(path);
        }
    }
    found.sort();
    assert!(found.len() >= 30, "only {} fixtures", found.len());
    Ok(found)
}

/// Logits of all rows of the prompt, and the greedy continuation.
struct Run {
    logits: Vec<f32>,
    /// The greedy choice after each position of the prompt.
    chosen: Vec<u32>,
    greedy: Vec<u32>,
}

fn run(dir: &Path, tp: usize, dtype: Option<DType>, golden: &Golden) -> Result<Run> {
    let options = GroupOptions {
        tp,
        dtype,
        ..Default::default()
    };
    let mut group = Group::load(Arc::new(Checkpoint::open(dir)?), options)?;
    let limits = group.limits();
    let length = golden.ids.len() + golden.greedy.len();
    let blocks = length.div_ceil(limits.block_size);
    assert!(blocks < limits.num_blocks && length <= limits.max_model_len);
    // Not in order, and not from the first block: the tables are what counts.
    let table: Vec<u32> = (1..=blocks as u32).rev().collect();
    let prompt_len = golden.ids.len() as u32;

    let mut prompt = Batch::new();
    let rows = prompt.push(&golden.ids, 0, prompt_len, &table);
    prompt.logits_rows = rows.collect();
    let logits = group.forward(&prompt)?;
    let chosen = group.step(&prompt, &vec![SampleRow::greedy(); golden.ids.len()])?;

    prompt.logits_rows = vec![prompt_len - 1];
    let mut next = group.step(&prompt, &[SampleRow::greedy()])?;
    let mut greedy = next.clone();
    for position in (prompt_len..).take(golden.greedy.len() - 1) {
        let mut batch = Batch::new();
        let rows = batch.push(&next, position, prompt_len, &table);
        batch.logits_rows = rows.collect();
        next = group.step(&batch, &[SampleRow::greedy()])?;
        greedy.extend(&next);
    }
    Ok(Run {
        logits,
        chosen,
        greedy,
    })
}

fn valid_ranks(dir: &Path) -> Result<Vec<usize>> {
    let valid = Checkpoint::open(dir)?.config().dims.valid_tp();
    Ok(RANKS.into_iter().filter(|tp| valid.contains(tp)).collect())
}

#[test]
fn f32_logits_and_greedy_ids_are_those_of_transformers_at_every_tp() -> Result {
    let mut failures = Vec::new();
    let mut worst = (0.0, String::new());
    let mut uneven_or_replicated = 0;
    for dir in fixtures()? {
        let golden = Golden::read(&dir)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let kv_heads = Checkpoint::open(&dir)?.config().dims.num_key_value_heads;
        for tp in valid_ranks(&dir)? {
            uneven_or_replicated += usize::from(!kv_heads.is_multiple_of(tp));
            let run = match run(&dir, tp, Some(DType::F32), &golden) {
                Ok(run) => run,
                Err(error) => {
                    failures.push(format!("{name}, tp {tp}: {error}"));
                    continue;
                }
            };
            let error = max_error(&run.logits, &golden.logits) / range(&golden.logits);
            if error > worst.0 {
                worst = (error, format!("{name}, tp {tp}"));
            }
            if error >= TOLERANCE {
                failures.push(format!("{name}, tp {tp}: error {error:.1e} of the range"));
            }
            if run.greedy != golden.greedy {
                failures.push(format!(
                    "{name}, tp {tp}: greedy {:?}, expected {:?}, margins {:?}",
                    run.greedy, golden.greedy, golden.margins
                ));
            }
        }
    }
    println!("worst error {:.1e} of the range: {}", worst.0, worst.1);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(uneven_or_replicated >= 30, "{uneven_or_replicated}");
    Ok(())
}

#[test]
fn in_bf16_and_f16_errors_are_at_most_twice_those_of_transformers_and_ids_the_same() -> Result {
    let mut types = Vec::new();
    for dir in fixtures()? {
        let golden = Golden::read(&dir)?;
        let Some(narrow) = golden.narrow(golden.ids.len()) else {
            continue;
        };
        let (name, bound) = (dir.display(), narrow.bound);
        types.push(narrow.dtype);
        for tp in valid_ranks(&dir)? {
            // The type of the file is the default.
            let run = run(&dir, tp, None, &golden)?;
            let error = max_error(&run.logits, narrow.reference);
            assert!(error <= bound, "{name}, tp {tp}: {error:e} > {bound:e}");
            let decided = choices_where_the_margin_decides(&run.chosen, narrow.reference, bound);
            let decided = decided.map_err(|wrong| format!("{name}, tp {tp}: {wrong}"))?;
            println!(
                "{}, tp {tp}: error {error:.1e}, bound {bound:.1e}, {decided} of {} ids decided",
                narrow.dtype,
                golden.ids.len()
            );
            assert!(
                4 * decided >= golden.ids.len(),
                "{name}: a quarter must be decided, or nothing is compared"
            );
        }
    }
    assert!(types.contains(&DType::Bf16) && types.contains(&DType::F16));
    Ok(())
}

/// The control: where two ids that the margin decides are exchanged, the comparison names one.
#[test]
fn another_choice_than_the_margin_decides_is_seen() -> Result {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama/bf16");
    let golden = Golden::read(&dir)?;
    let narrow = golden.narrow(golden.ids.len()).ok_or("a narrow type")?;
    let mut chosen = run(&dir, 1, None, &golden)?.chosen;
    let compare =
        |chosen: &[u32]| choices_where_the_margin_decides(chosen, narrow.reference, narrow.bound);
    let decided = compare(&chosen)?;
    let vocab = narrow.reference.len() / chosen.len();
    let mut seen = 0;
    for position in 0..chosen.len() {
        let right = chosen[position];
        chosen[position] = (right + 1) % vocab as u32;
        if let Err(wrong) = compare(&chosen) {
            assert!(wrong.contains(&format!("position {position}:")), "{wrong}");
            seen += 1;
        }
        chosen[position] = right;
    }
    assert_eq!(seen, decided, "each of the positions that are decided");
    Ok(())
}

/// The control: were a rope setting ignored, the first test would see it.
#[test]
fn without_its_rope_settings_a_model_fails_the_comparison() -> Result {
    let mut count = 0;
    for dir in fixtures()? {
        let config = fs::read_to_string(dir.join("config.json"))?;
        let mut config: Value = serde_json::from_str(&config)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("rope_") {
            continue;
        }
        count += 1;
        let plain = tempfile::tempdir()?;
        for file in ["model.safetensors", "generation_config.json"] {
            fs::copy(dir.join(file), plain.path().join(file))?;
        }
        let fields = config.as_object_mut().ok_or("config.json: no object")?;
        for field in ["rope_parameters", "rope_scaling", "rope_theta"] {
            fields.remove(field);
        }
        // `dynamic` allows more than this.
        fields.insert("max_position_embeddings".into(), json!(256));
        fs::write(plain.path().join("config.json"), config.to_string())?;

        let golden = Golden::read(&dir)?;
        let run = run(plain.path(), 1, Some(DType::F32), &golden)?;
        let error = max_error(&run.logits, &golden.logits) / range(&golden.logits);
        assert!(
            error > 100.0 * TOLERANCE || run.greedy != golden.greedy,
            "{name}: {error:e}"
        );
    }
    assert!(count >= 10, "{count}");
    Ok(())
}
