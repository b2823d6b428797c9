//! The logits of a row depend on its sequence alone, to the last bit: not on what else is in the
//! batch, how the prompt is cut, which blocks it has, whether it was computed before, or how
//! many threads compute it. So a request's tokens depend on its prompt, parameters and seed.

mod model_support;

use std::fs;
use std::ops::Range;
use std::path::Path;

use model_support::{Result, bits, fixture, load, open, some_ids};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use ringtp::checkpoint::Checkpoint;
use ringtp::generate::{Completion, Llm, LlmBuilder, Prompt, SamplingParams};
use ringtp::llama::{Batch, Group, GroupOptions, SampleRow};
use safetensors::SafeTensors;

/// Every kind of attention, rope, bias and storage type.
const MODELS: [&str; 9] = [
    "gqa_8_2",
    "gqa_16_8",
    "mqa_24_1",
    "odd_sizes",
    "biases_tied",
    "bf16",
    "mixed_types",
    "rope_dynamic_crossing",
    "austen",
];
const BLOCKS: usize = 24;

/// Three sequences, of as many tokens and of prompts as long; `dynamic` rope is crossed by the
/// second and third.
const LENGTHS: [(usize, usize); 3] = [(20, 11), (33, 27), (40, 31)];

/// Steps: in each, how many rows of which sequences, in the order of the batch.
type Schedule = Vec<Vec<(usize, usize)>>;

fn group(name: &str, tp: usize, threads: usize) -> ringtp::Result<Group> {
    let options = GroupOptions {
        tp,
        threads: Some(threads * tp),
        num_blocks: Some(BLOCKS),
        ..Default::default()
    };
    load(name, options)
}

/// Ids of the sequence; those of its prompt come first.
fn ids(group: &Group, sequence: usize) -> Vec<u32> {
    some_ids(
        group.limits().vocab_size,
        50 * sequence,
        LENGTHS[sequence].0,
    )
}

/// The blocks of a sequence: three, none of another's, not in order; those of another `turn`
/// are others.
fn table(sequence: usize, turn: usize) -> Vec<u32> {
    let block = |i: usize| 9 * turn + 3 * sequence + (2 * i + turn) % 3;
    (0..3).map(|i| block(i) as u32).collect()
}

/// Runs the schedule; the logits of every row of every sequence, as bits.
fn run(group: &mut Group, schedule: &Schedule, turn: usize) -> ringtp::Result<Vec<Vec<u32>>> {
    let mut done = [0; LENGTHS.len()];
    let mut logits = vec![Vec::new(); LENGTHS.len()];
    for step in schedule {
        let mut batch = Batch::new();
        let mut rows: Vec<(usize, Range<u32>)> = Vec::new();
        for &(sequence, count) in step {
            let ids = &ids(group, sequence)[done[sequence]..][..count];
            let (position, prompt_len) = (done[sequence] as u32, LENGTHS[sequence].1 as u32);
            let range = batch.push(ids, position, prompt_len, &table(sequence, turn));
            rows.push((sequence, range));
            done[sequence] += count;
        }
        // The rows are asked for in another order than they stand in.
        rows.reverse();
        batch.logits_rows = rows.iter().flat_map(|(_, range)| range.clone()).collect();
        let found = group.forward(&batch)?;
        let mut rest = found.as_slice();
        for (sequence, range) in rows {
            let count = range.len() * group.limits().vocab_size;
            logits[sequence].extend(bits(&rest[..count]));
            rest = &rest[count..];
        }
    }
    Ok(logits)
}

/// Each sequence in one step, alone.
fn alone() -> Schedule {
    (0..LENGTHS.len())
        .map(|s| vec![(s, LENGTHS[s].0)])
        .collect()
}

/// Each sequence alone, in chunks of `chunk` rows.
fn chunked(chunk: usize) -> Schedule {
    let chunks = |s: usize| {
        let length = LENGTHS[s].0;
        (0..length)
            .step_by(chunk)
            .map(move |start| vec![(s, chunk.min(length - start))])
    };
    (0..LENGTHS.len()).flat_map(chunks).collect()
}

/// All at once; and prompts while others decode, the order turning.
fn mixed() -> [Schedule; 3] {
    let whole = |s: usize| (s, LENGTHS[s].0);
    let decodes = |from: usize| {
        let rows = (from..LENGTHS[0].0).map(|_| vec![(0, 1), (2, 2), (1, 3)]);
        rows.collect::<Schedule>()
    };
    let mut turning = vec![vec![(0, 11)], vec![(2, 20), (0, 1)], vec![(0, 1), (1, 3)]];
    turning.extend(decodes(13));
    turning.push(vec![(1, 33 - 3 - 21), (2, 40 - 20 - 14)]);
    [
        vec![vec![whole(0), whole(1), whole(2)]],
        vec![vec![whole(2), whole(0)], vec![whole(1)]],
        turning,
    ]
}

fn ranks(name: &str) -> Result<Vec<usize>> {
    let valid = open(name)?.config().dims.valid_tp();
    Ok([1, 2, 3]
        .into_iter()
        .filter(|tp| valid.contains(tp))
        .collect())
}

#[test]
fn a_row_has_the_same_logits_alone_in_company_and_in_chunks() -> Result {
    for name in MODELS {
        for tp in ranks(name)? {
            let mut group = group(name, tp, 1)?;
            let expected = run(&mut group, &alone(), 0)?;
            let mut check = |what: &str, schedule: &Schedule, turn| -> Result {
                let found = run(&mut group, schedule, turn)?;
                for sequence in 0..LENGTHS.len() {
                    let same = found[sequence] == expected[sequence];
                    assert!(same, "{name}, tp {tp}, {what}: sequence {sequence}");
                }
                Ok(())
            };
            for chunk in [1, 2, 3, 5, 16] {
                check(&format!("chunks of {chunk}"), &chunked(chunk), 0)?;
            }
            for (i, schedule) in mixed().iter().enumerate() {
                check(&format!("mixed {i}"), schedule, 0)?;
            }
            check("computed again, into other blocks", &alone(), 1)?;
            check("the same, in chunks", &chunked(7), 1)?;
        }
    }
    Ok(())
}

/// Long enough that attention splits its positions and products are shared out.
#[test]
fn a_long_sequence_has_the_same_logits_in_any_chunks_on_any_number_of_threads() -> Result {
    for name in ["long", "austen"] {
        for tp in [1, 2] {
            let mut expected = None;
            for (threads, chunk) in [(1, 150), (1, 64), (2, 150), (2, 1), (3, 37), (3, 16)] {
                let mut group = group(name, tp, threads)?;
                let ids = some_ids(group.limits().vocab_size, 1, 150);
                let table: Vec<u32> = (4..14).rev().collect();
                let mut found = Vec::new();
                for start in (0..150).step_by(chunk) {
                    let rows = &ids[start..(start + chunk).min(150)];
                    let step = model_support::batch(rows, start, 150, &table);
                    found.extend(bits(&group.forward(&step)?));
                }
                let same = *expected.get_or_insert_with(|| found.clone()) == found;
                assert!(
                    same,
                    "{name}, tp {tp}: {threads} threads, chunks of {chunk}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn the_number_of_threads_changes_no_bit() -> Result {
    for name in MODELS {
        let expected = run(&mut group(name, 2.min(ranks(name)?.len()), 1)?, &alone(), 0)?;
        for threads in [2, 3] {
            let mut group = group(name, 2.min(ranks(name)?.len()), threads)?;
            for schedule in mixed().iter().chain([&alone()]) {
                let same = run(&mut group, schedule, 0)? == expected;
                assert!(same, "{name}, {threads} threads");
            }
        }
    }
    Ok(())
}

/// The ring rounds at each hop, and says so; the others sum in rank order.
#[test]
fn the_all_reduce_that_sums_in_rank_order_changes_no_bit() -> Result {
    for (name, tp) in [("gqa_16_8", 4), ("biases_tied", 3), ("bf16", 3)] {
        let expected = run(&mut group(name, tp, 1)?, &alone(), 0)?;
        let mut differs = false;
        for all_reduce in ["one-shot", "two-shot", "ring"] {
            let options = GroupOptions {
                tp,
                all_reduce: Some(all_reduce.into()),
                num_blocks: Some(BLOCKS),
                ..Default::default()
            };
            let found = run(&mut load(name, options)?, &alone(), 0)?;
            match all_reduce {
                "ring" => differs = found != expected,
                _ => assert!(found == expected, "{name}: {all_reduce}"),
            }
        }
        assert!(differs, "{name}: the comparison sees the ring's rounding");
    }
    Ok(())
}

/// What no batch can be to it is said, and where it is no matter nothing is refused.
#[test]
fn batch_invariant_refuses_the_ring_and_changes_nothing_else_on_the_cpu() -> Result {
    let options = |all_reduce: &str, tp_invariant| GroupOptions {
        tp: 2,
        all_reduce: Some(all_reduce.into()),
        tp_invariant,
        batch_invariant: true,
        num_blocks: Some(BLOCKS),
        ..Default::default()
    };
    let expected = run(&mut group("gqa_8_2", 2, 1)?, &alone(), 0)?;
    let found = run(&mut load("gqa_8_2", options("auto", false))?, &alone(), 0)?;
    assert!(found == expected);
    let error = load("gqa_8_2", options("ring", false)).expect_err("it rounds at each hop");
    assert!(error.is_input(), "{error}");
    for part in [
        "batch_invariant",
        "rank order",
        "found ring",
        "another all_reduce",
    ] {
        assert!(error.to_string().contains(part), "{part} in {error}");
    }
    load("gqa_8_2", options("ring", true))?;
    Ok(())
}

/// Any way to cut the sequences into steps.
fn any_schedule() -> impl Strategy<Value = Schedule> {
    let piece = (0..LENGTHS.len(), 1..17_usize);
    let step = prop::collection::vec(piece, 1..=LENGTHS.len());
    prop::collection::vec(step, 1..12).prop_map(|steps| {
        let mut rest = LENGTHS.map(|(length, _)| length);
        let mut schedule = Schedule::new();
        for step in steps {
            let mut cut: Vec<(usize, usize)> = Vec::new();
            for (sequence, count) in step {
                let count = count.min(rest[sequence]);
                if count > 0 && cut.iter().all(|&(other, _)| other != sequence) {
                    rest[sequence] -= count;
                    cut.push((sequence, count));
                }
            }
            schedule.push(cut);
        }
        let last = (0..LENGTHS.len())
            .filter(|&s| rest[s] > 0)
            .map(|s| (s, rest[s]));
        schedule.push(last.collect());
        schedule.retain(|step| !step.is_empty());
        schedule
    })
}

#[test]
fn no_schedule_changes_a_bit() -> Result {
    for (name, tp) in [("gqa_8_2", 2), ("bf16", 3), ("rope_dynamic_crossing", 2)] {
        let mut first = group(name, tp, 1)?;
        let expected = run(&mut first, &alone(), 0)?;
        let group = std::cell::RefCell::new(first);
        let config = Config {
            cases: 48,
            failure_persistence: None,
            ..Config::default()
        };
        TestRunner::new(config).run(&(any_schedule(), 0..2_usize), |(schedule, turn)| {
            let found = run(&mut group.borrow_mut(), &schedule, turn)
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(found == expected, "{name}, tp {tp}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The tokens chosen are those of the logits: a step chooses what a forward shows.
#[test]
fn a_step_chooses_the_greatest_of_the_logits() -> Result {
    for (name, tp) in [("odd_sizes", 3), ("tied_odd_vocab", 4), ("bf16", 2)] {
        let mut group = group(name, tp, 1)?;
        let vocab_size = group.limits().vocab_size;
        let ids = some_ids(vocab_size, 4, 12);
        let batch = model_support::batch(&ids, 0, 12, &[3]);
        let logits = group.forward(&batch)?;
        let chosen = group.step(&batch, &vec![SampleRow::greedy(); 12])?;
        for (row, id) in logits.chunks_exact(vocab_size).zip(chosen) {
            let greatest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let first = row.iter().position(|&logit| logit == greatest);
            assert_eq!(first, Some(id as usize), "{name}");
        }
    }
    Ok(())
}

const PROMPTS: [&str; 5] = [
    "It is a truth universally acknowledged, that",
    "Elizabeth",
    "Mr. Darcy had at first scarcely allowed her to be pretty; he had looked at her without",
    "\"My dear Mr. Bennet,\" said his lady to him one day,",
    "The",
];

fn austen() -> LlmBuilder {
    Llm::builder(fixture("austen")).threads(2)
}

fn sampled(seed: u64) -> SamplingParams {
    let params = SamplingParams::default().temperature(0.8).top_p(0.95);
    params.max_tokens(24).ignore_eos(true).seed(seed)
}

fn greedy() -> SamplingParams {
    SamplingParams::greedy().max_tokens(24).ignore_eos(true)
}

fn texts(completions: &[Completion]) -> Vec<(Vec<u32>, Option<String>)> {
    let text = |c: &Completion| (c.ids.clone(), c.text.clone());
    completions.iter().map(text).collect()
}

#[test]
fn a_prompt_and_its_seed_give_the_same_text_in_any_company() -> Result {
    for tp in [1, 2, 3] {
        for params in [greedy(), sampled(7)] {
            let mut llm = austen().tp(tp).build()?;
            let mut expected = Vec::new();
            for prompt in PROMPTS {
                expected.extend(texts(&llm.generate(&[prompt], &params)?));
            }
            assert_eq!(
                texts(&llm.generate(&PROMPTS, &params)?),
                expected,
                "together"
            );

            let mut reversed = PROMPTS;
            reversed.reverse();
            let mut found = texts(&llm.generate(&reversed, &params)?);
            found.reverse();
            assert_eq!(found, expected, "in the other order");

            for rows in [1, 3, 8] {
                let mut llm = austen().tp(tp).max_batch_tokens(rows).build()?;
                let found = texts(&llm.generate(&PROMPTS, &params)?);
                assert_eq!(found, expected, "{rows} rows a step");
            }

            // Room for the longest, and hardly more: others lose their blocks and start again.
            let mut llm = austen().tp(tp).num_blocks(5).build()?;
            let found = texts(&llm.generate(&PROMPTS, &params)?);
            assert!(llm.timing().preemptions > 0, "the cache was not too small");
            assert_eq!(found, expected, "with few blocks");

            let mut llm = austen().tp(tp).threads(3 * tp).build()?;
            assert_eq!(
                texts(&llm.generate(&PROMPTS, &params)?),
                expected,
                "threads"
            );
        }
    }
    Ok(())
}

/// In the same batch each has its own parameters, and takes nothing from its neighbour.
#[test]
fn requests_with_different_parameters_do_not_mix() -> Result {
    let mut llm = austen().tp(2).build()?;
    let each: Vec<(Prompt, SamplingParams)> = vec![
        (PROMPTS[0].into(), sampled(1)),
        (PROMPTS[0].into(), greedy()),
        (PROMPTS[0].into(), sampled(2).top_k(5)),
        (PROMPTS[0].into(), greedy().repetition_penalty(1.3)),
        (PROMPTS[0].into(), sampled(1).min_p(0.2)),
    ];
    let go_on = |_: ringtp::generate::Event<'_>| std::ops::ControlFlow::Continue(());
    let together = texts(&llm.generate_each(&each, go_on)?);
    for (one, expected) in each.into_iter().zip(&together) {
        assert_eq!(&texts(&llm.generate_each(&[one], go_on)?)[0], expected);
    }
    Ok(())
}

/// Between numbers of ranks only rounding differs; the margins of these texts are far above.
#[test]
fn the_number_of_ranks_does_not_change_a_text_with_margins() -> Result {
    for name in [
        "gqa_16_8",
        "attention_bias",
        "rope_dynamic_crossing",
        "long",
        "bf16",
    ] {
        let dir = fixture(name);
        let golden = fs::read(dir.join("golden.safetensors"))?;
        let golden = SafeTensors::deserialize(&golden)?;
        let integers = |tensor: &str| -> Result<Vec<u32>> {
            let view = golden.tensor(tensor)?;
            let values = view.data().as_chunks::<8>().0.iter();
            Ok(values
                .map(|&bytes| i64::from_le_bytes(bytes) as u32)
                .collect())
        };
        let prompt = integers("ids")?;
        let expected = integers("greedy")?;
        let params = SamplingParams::greedy().ignore_eos(true);
        let params = params.max_tokens(expected.len());
        for tp in Checkpoint::open(&dir)?.config().dims.valid_tp() {
            let build = Llm::builder(&dir).tp(tp).dtype(ringtp::DType::F32);
            let found = build
                .build()?
                .generate(std::slice::from_ref(&prompt), &params)?;
            assert_eq!(found[0].ids, expected, "{name}, tp {tp}");
        }
    }
    Ok(())
}

/// What the comparisons above can see.
#[test]
fn another_seed_gives_another_text() -> Result {
    let mut llm = austen().tp(2).build()?;
    let first = texts(&llm.generate(&PROMPTS, &sampled(7))?);
    assert_eq!(first, texts(&llm.generate(&PROMPTS, &sampled(7))?));
    let other = texts(&llm.generate(&PROMPTS, &sampled(8))?);
    for (first, other) in first.iter().zip(&other) {
        assert_ne!(first, other);
    }
    Ok(())
}

/// A copy of a model with one f32 weight changed by 2^-11 of itself or less. (The last bit would
/// do for most, but may be rounded away with the rest of a sum.)
fn perturbed(dir: &Path, weight: &str) -> Result<tempfile::TempDir> {
    let copy = tempfile::tempdir()?;
    fs::copy(dir.join("config.json"), copy.path().join("config.json"))?;
    let mut bytes = fs::read(dir.join("model.safetensors"))?;
    let at = {
        let tensors = SafeTensors::deserialize(&bytes)?;
        let data = tensors.tensor(weight)?.data().as_ptr_range();
        data.start as usize - bytes.as_ptr() as usize
    };
    bytes[at + 1] ^= 1 << 4;
    fs::write(copy.path().join("model.safetensors"), bytes)?;
    Ok(copy)
}

#[test]
fn one_bit_of_one_weight_changes_bits() -> Result {
    let dir = fixture("gqa_8_2");
    let options = || GroupOptions {
        tp: 2,
        num_blocks: Some(BLOCKS),
        ..Default::default()
    };
    let expected = run(&mut load("gqa_8_2", options())?, &alone(), 0)?;
    for weight in ["mlp.down_proj", "self_attn.k_proj", "mlp.gate_proj"] {
        let copy = perturbed(&dir, &format!("model.layers.0.{weight}.weight"))?;
        let checkpoint = std::sync::Arc::new(Checkpoint::open(copy.path())?);
        let found = run(&mut Group::load(checkpoint, options())?, &alone(), 0)?;
        assert!(found != expected, "{weight}");
    }
    Ok(())
}

/// On devices a row's bits are the same among steps of few rows, and among those of more; with
/// `batch_invariant` in all.
#[cfg(feature = "cuda")]
mod on_devices {
    use super::{BLOCKS, GroupOptions, Result, Schedule, alone, chunked, load, mixed, run};

    #[test]
    fn with_batch_invariant_a_row_has_the_same_logits_alone_in_company_and_in_chunks() -> Result {
        let Some(_driver) = test_driver::take() else {
            return Ok(());
        };
        let [together, _, turning] = mixed();
        let schedules = [turning, chunked(15), together];
        let (name, tp) = ("bf16", 2);
        // Sequences of other bits than alone, over all of the schedules.
        let differences = |batch_invariant, schedules: &[Schedule]| -> Result<usize> {
            let options = GroupOptions {
                tp,
                devices: Some((0..tp).collect()),
                batch_invariant,
                num_blocks: Some(BLOCKS),
                ..Default::default()
            };
            let mut group = load(name, options)?;
            let expected = run(&mut group, &alone(), 0)?;
            let mut differ = 0;
            for schedule in schedules {
                let found = run(&mut group, schedule, 1)?;
                let all = found.iter().zip(&expected);
                differ += all.filter(|(found, expected)| found != expected).count();
            }
            Ok(differ)
        };
        assert_eq!(differences(true, &schedules)?, 0, "{name}, tp {tp}");
        // The control: steps of few rows are seen.
        assert!(differences(false, &schedules[..1])? > 0, "{name}, tp {tp}");
        Ok(())
    }
}
