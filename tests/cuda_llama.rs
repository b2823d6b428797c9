//! Llama on virtual devices: the layers are the CPU's, the backend and the collectives are not. The
//! logits in f32 and the greedy ids are those of the CPU, at every number of ranks; in bf16 and
//! f16 the error is at most twice that of transformers in that type, and the ids are the reference's
//! where its margin exceeds what such an error can turn.
//!
//! CI takes some of the fixtures; `RINGTP_ALL_FIXTURES=1` takes all of them, at every number of
//! ranks that is valid; a list such as `bf16,sharded` takes these.
#![cfg(feature = "cuda")]

mod golden;
mod model_support;
mod p2p_support;

use std::fs;
use std::sync::Arc;

use golden::{Golden, choices_where_the_margin_decides, max_error, range};
use model_support::{Result, batch, fixture, open};
use ringtp::backend::Backend;
use ringtp::backend::cuda::{CudaBackend, CudaTensor};
use ringtp::checkpoint::Checkpoint;
use ringtp::comm::Communicator;
use ringtp::comm::p2p::{P2pComm, P2pOptions};
use ringtp::generate::Tokenizer;
use ringtp::host::HostMatrix;
use ringtp::layers::Rank;
use ringtp::llama::{Group, GroupOptions, LoadOptions, Model, SampleRow, select};
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();

/// Greatest error of f32 logits, over their range.
const TOLERANCE: f32 = 1e-4;

/// Biases, grouped and single heads, heads and widths that are no multiple of anything, tied
/// weights with an odd vocabulary, one kind of rope, the model that is shipped; each with the numbers
/// of ranks that CI runs.
const SELECTION: [(&str, &[usize]); 7] = [
    ("gqa_8_2", &[1, 2]),
    ("odd_sizes", &[1, 3]),
    ("biases_tied", &[2]),
    ("tied_odd_vocab", &[2]),
    ("mqa_24_1", &[4]),
    ("rope_llama3", &[1]),
    (SHIPPED, &[2]),
];
const RANKS: [usize; 6] = [1, 2, 3, 4, 6, 8];

/// The model that is shipped: it has no golden file, but a tokenizer, and text to go on.
const SHIPPED: &str = "austen";
const TEXT: &str = "It is a truth universally acknowledged, that a single man in possession of a";

/// Steps after the prompt.
const STEPS: usize = 4;
const BLOCK_SIZE: usize = 16;

/// What `RINGTP_ALL_FIXTURES` says.
fn wanted() -> Option<String> {
    std::env::var("RINGTP_ALL_FIXTURES").ok()
}

fn everything() -> bool {
    wanted().is_some()
}

/// Logits of all rows of the prompt, the greedy choice after each, and the greedy continuation.
#[derive(Clone, Debug, PartialEq)]
struct Run {
    logits: Vec<f32>,
    chosen: Vec<u32>,
    greedy: Vec<u32>,
}

/// Blocks in reverse, and not from the first: the tables are what counts.
fn table(positions: usize) -> Vec<u32> {
    (1..=positions.div_ceil(BLOCK_SIZE) as u32).rev().collect()
}

/// As an engine with threads of its own would: `Model::forward` on every rank.
fn on_devices(checkpoint: &Checkpoint, ids: &[u32], tp: usize, dtype: DType) -> Vec<Run> {
    let (_group, comms) = p2p_support::group(tp, p2p_support::options());
    let options = options(dtype);
    p2p_support::run(comms, |rank| {
        run_rank(checkpoint, ids, &mut rank.comm, options).expect("a rank runs")
    })
}

fn options(dtype: DType) -> LoadOptions {
    LoadOptions {
        dtype,
        tp_invariant: false,
    }
}

fn run_rank(
    checkpoint: &Checkpoint,
    ids: &[u32],
    comm: &mut P2pComm,
    options: LoadOptions,
) -> ringtp::Result<Run> {
    let dtype = options.dtype;
    let mut backend = CudaBackend::new(comm.stream().clone(), dtype)?;
    let mut rank = Rank {
        backend: &mut backend,
        comm,
    };
    let mut model = Model::load(&mut rank, checkpoint, options, &|_| {})?;
    let table = table(ids.len() + STEPS);
    let mut kv = model.kv_cache(rank.backend, table.len() + 2, BLOCK_SIZE, dtype)?;

    // The prompt in two chunks: the second attends to entries of the first.
    let cut = ids.len() / 2;
    let first = batch(&ids[..cut], 0, ids.len(), &table);
    let (local, head) = model.forward(&mut rank, &first, &mut kv)?;
    let mut chosen = select(&mut rank, head, local, &vec![SampleRow::greedy(); cut])?;
    let mut logits = model.gather_logits(&mut rank, cut)?;
    let mut next = batch(&ids[cut..], cut, ids.len(), &table);
    let mut greedy = Vec::new();
    for step in 0..=STEPS {
        let (local, head) = model.forward(&mut rank, &next, &mut kv)?;
        let rows = next.logits_rows.len();
        let sample = vec![SampleRow::greedy(); rows];
        let tokens = select(&mut rank, head, local, &sample)?;
        if step == 0 {
            logits.extend(model.gather_logits(&mut rank, rows)?);
            chosen.extend(&tokens);
        }
        let token = *tokens.last().expect("a row");
        greedy.push(token);
        next = batch(&[token], ids.len() + step, ids.len(), &table);
    }
    Ok(Run {
        logits,
        chosen,
        greedy,
    })
}

/// The same on the CPU, in f32.
fn on_the_cpu(checkpoint: &Arc<Checkpoint>, ids: &[u32]) -> Result<Run> {
    let options = GroupOptions {
        dtype: Some(DType::F32),
        ..Default::default()
    };
    let mut group = Group::load(checkpoint.clone(), options)?;
    let table = table(ids.len() + STEPS);
    let prompt = batch(ids, 0, ids.len(), &table);
    let logits = group.forward(&prompt)?;
    let (mut next, mut chosen, mut greedy) = (prompt, Vec::new(), Vec::new());
    for step in 0..=STEPS {
        let sample = vec![SampleRow::greedy(); next.logits_rows.len()];
        let tokens = group.step(&next, &sample)?;
        let token = *tokens.last().ok_or("no row")?;
        greedy.push(token);
        next = batch(&[token], ids.len() + step, ids.len(), &table);
        if step == 0 {
            chosen = tokens;
        }
    }
    Ok(Run {
        logits,
        chosen,
        greedy,
    })
}

/// What to run: a selection, or everything.
fn selection() -> Result<Vec<(String, Vec<usize>)>> {
    let Some(wanted) = wanted() else {
        let selected = SELECTION.iter();
        return Ok(selected
            .map(|(name, ranks)| (name.to_string(), ranks.to_vec()))
            .collect());
    };
    let mut names = vec![SHIPPED.to_owned()];
    for entry in fs::read_dir(fixture("gqa_8_2").join(".."))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if fixture(&name).join("golden.safetensors").is_file() {
            names.push(name);
        }
    }
    names.retain(|name| wanted == "1" || wanted.split(',').any(|wanted| wanted == name));
    let mut all = Vec::new();
    for name in names {
        let valid = open(&name)?.config().dims.valid_tp();
        let ranks = RANKS.into_iter().filter(|tp| valid.contains(tp));
        all.push((name, ranks.collect()));
    }
    assert!(
        !all.is_empty(),
        "RINGTP_ALL_FIXTURES: no fixture is {wanted}"
    );
    all.sort();
    Ok(all)
}

/// As many ids as CI has time for.
fn some(ids: &[u32]) -> &[u32] {
    &ids[..if everything() {
        ids.len()
    } else {
        ids.len().min(21)
    }]
}

/// What a fixture goes on from: fewer ids of the larger model.
fn prompt(name: &str) -> Result<Vec<u32>> {
    if name != SHIPPED {
        return Ok(some(&Golden::read(&fixture(name))?.ids).to_vec());
    }
    let mut ids = Tokenizer::open(&fixture(name))?.encode(TEXT)?;
    if !everything() {
        ids.truncate(7);
    }
    Ok(ids)
}

#[test]
fn f32_logits_and_greedy_ids_are_those_of_the_cpu() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    for (name, ranks) in selection()? {
        let checkpoint = open(&name)?;
        let ids = prompt(&name)?;
        let cpu = on_the_cpu(&checkpoint, &ids)?;
        for tp in ranks {
            let runs = on_devices(&checkpoint, &ids, tp, DType::F32);
            let error = max_error(&runs[0].logits, &cpu.logits) / range(&cpu.logits);
            println!("{name}, tp {tp}: error {error:.1e} of the range");
            assert!(error < TOLERANCE, "{name}, tp {tp}: {error:e} of the range");
            assert_eq!(runs[0].chosen, cpu.chosen, "{name}, tp {tp}");
            assert_eq!(runs[0].greedy, cpu.greedy, "{name}, tp {tp}");
            for run in &runs[1..] {
                assert_eq!(run, &runs[0], "{name}, tp {tp}: all ranks have the same");
            }
        }
    }
    Ok(())
}

#[test]
fn in_bf16_and_f16_errors_are_at_most_twice_those_of_transformers_and_ids_the_same() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    for (name, tp) in [("bf16", 2), ("f16", 1)] {
        let golden = Golden::read(&fixture(name))?;
        let ids = some(&golden.ids);
        let narrow = golden.narrow(ids.len()).ok_or("a narrow type")?;
        let runs = on_devices(&*open(name)?, ids, tp, narrow.dtype);
        let ours = max_error(&runs[0].logits, narrow.reference);
        assert!(
            ours <= narrow.bound,
            "{name}: {ours:e} for {:e}",
            narrow.theirs
        );
        let chosen = &runs[0].chosen;
        let decided = choices_where_the_margin_decides(chosen, narrow.reference, narrow.bound)
            .map_err(|wrong| format!("{name}, tp {tp}: {wrong}"))?;
        println!(
            "{name}, tp {tp}: error {ours:.1e}, transformers {:.1e}; {decided} of {} ids decided",
            narrow.theirs,
            ids.len()
        );
        assert!(
            4 * decided >= ids.len(),
            "{name}: a quarter must be decided, or nothing is compared"
        );
    }
    Ok(())
}

/// As on the CPU; and without it another number of ranks rounds differently.
#[test]
fn tp_invariant_gives_the_bits_of_one_rank() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    for (name, tp, dtype) in [("odd_sizes", 3, DType::F32), ("bf16", 2, DType::Bf16)] {
        let checkpoint = open(name)?;
        let ids = &prompt(name)?[..5];
        let run = |tp, tp_invariant| {
            let options = LoadOptions {
                dtype,
                tp_invariant,
            };
            let (_group, comms) = p2p_support::group(tp, p2p_support::options());
            p2p_support::run(comms, |rank| {
                run_rank(&checkpoint, ids, &mut rank.comm, options).expect("a rank runs")
            })
        };
        let one = run(1, false).swap_remove(0);
        for run in run(tp, true) {
            assert!(run == one, "{name}, tp {tp}");
        }
        assert!(run(tp, false)[0].logits != one.logits, "{name}, tp {tp}");
    }
    Ok(())
}

/// Rows that can be shared out equally and that cannot, fewer than ranks, and one: of a rank's own
/// it makes the sums and norms, another way, and all have the same bits.
#[test]
fn sequence_parallel_changes_no_bit() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    for (name, tp, dtype, rows) in [
        // Steps of 4, 5 and of 1.
        ("gqa_8_2", 2, DType::F32, 9),
        ("odd_sizes", 3, DType::F32, 9),
        // Of 2, 3 and of 1.
        ("bf16", 3, DType::Bf16, 5),
        ("biases_tied", 2, DType::F16, 5),
    ] {
        let checkpoint = open(name)?;
        let ids = &prompt(name)?[..rows];
        let run = |sequence_parallel| {
            let options = P2pOptions {
                sequence_parallel,
                ..p2p_support::options()
            };
            let (_group, comms) = p2p_support::group(tp, options);
            p2p_support::run(comms, |rank| {
                let run = run_rank(&checkpoint, ids, &mut rank.comm, self::options(dtype));
                (run.expect("a rank runs"), rank.comm.stats().calls)
            })
        };
        let (plain, parallel) = (run(false), run(true));
        for (run, calls) in &parallel {
            assert!(*run == plain[0].0, "{name}, tp {tp}");
            assert!(*calls > plain[0].1, "{name}, tp {tp}: it is another way");
        }
    }
    Ok(())
}

#[test]
fn rows_to_share_out_that_do_not_fit_are_refused_before_anything_is_sent() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let options = P2pOptions {
        sequence_parallel: true,
        ..p2p_support::options()
    };
    let (_group, comms) = p2p_support::group(2, options);
    p2p_support::run(comms, |rank| {
        let comm = &mut rank.comm;
        let stream = comm.stream().clone();
        let mut backend = CudaBackend::new(stream, DType::F32).expect("a backend");
        let mut tensor = |rows, cols| backend.tensor(rows, cols).expect("a tensor");
        let (mut x, mut fits, mut out) = (tensor(5, 8), tensor(5, 8), tensor(5, 8));
        let (mut short, mut wide) = (tensor(4, 8), tensor(5, 16));
        let ones = [1.0_f32; 8];
        let ones = HostMatrix::new(bytemuck::cast_slice(&ones), DType::F32, 1, 8);
        let weight = backend.vector(&[ones.expect("a row")]).expect("a vector");
        comm.meet().expect("all");
        let mut sum = |residual: &mut CudaTensor, out: &mut CudaTensor| {
            comm.all_reduce_add_rms_norm(&mut backend, &mut x, None, residual, &weight, 1e-5, out)
        };
        for (what, refused) in [
            ("residual", sum(&mut short, &mut out)),
            ("output", sum(&mut fits, &mut wide)),
        ] {
            let error = refused.expect_err(what).to_string();
            assert!(error.contains(what) && error.contains("[5, 8]"), "{error}");
        }
        sum(&mut fits, &mut out).expect("they fit");
        comm.synchronize().expect("a sum");
        // A part of the sum, the parts of all, and the sum of the row that is left over.
        assert_eq!(comm.stats().calls, 3);
        assert_eq!(backend.read(&out).expect("zeros"), [0.0; 40]);
    });
}

/// The control: another position of one chunk is seen.
#[test]
fn the_comparison_sees_another_token() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    let checkpoint = open("gqa_8_2")?;
    let golden = Golden::read(&fixture("gqa_8_2"))?;
    let mut ids = some(&golden.ids)[..6].to_vec();
    let cpu = on_the_cpu(&checkpoint, &ids)?;
    ids[1] = (ids[1] + 1) % 97;
    let runs = on_devices(&checkpoint, &ids, 1, DType::F32);
    let error = max_error(&runs[0].logits, &cpu.logits) / range(&cpu.logits);
    assert!(error > 100.0 * TOLERANCE, "{error:e}");
    Ok(())
}

#[test]
fn weights_of_another_type_and_a_cache_that_does_not_fit_are_errors_that_say_so() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    let (_group, comms) = p2p_support::group(1, p2p_support::options());
    let checkpoint = open("gqa_8_2")?;
    p2p_support::run(comms, |rank| {
        let stream = rank.comm.stream().clone();
        let mut backend = CudaBackend::new(stream, DType::Bf16).expect("a backend");
        let mut rank = Rank {
            backend: &mut backend,
            comm: &mut rank.comm,
        };
        let load = |rank: &mut Rank<'_, _, _>, dtype| {
            Model::load(rank, &checkpoint, options(dtype), &|_| {})
        };
        let error = load(&mut rank, DType::F32).expect_err("activations are bf16");
        assert!(error.to_string().contains("type of the weights"), "{error}");
        let model = load(&mut rank, DType::Bf16).expect("it loads");
        let cache = model.kv_cache(rank.backend, 1 << 40, 16, DType::Bf16);
        let Err(Error::OutOfMemory(fault)) = cache else {
            panic!("{cache:?}");
        };
        let words = fault.to_string();
        for part in [
            "KV cache",
            "2 layers x 2 x 1099511627776 blocks",
            "fewer blocks",
        ] {
            assert!(words.contains(part), "{part} in {words}");
        }
    });
    Ok(())
}
