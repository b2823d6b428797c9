//! Generation on virtual devices, one thread a rank: the texts are those of the CPU, greedy and
//! drawn; a rank that dies is a named error on all of them, and a rebuilt model answers as before.
#![cfg(feature = "cuda")]

mod cli_support;
mod model_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ::ringtp::backend::cuda::{Context, DevicePool};
use cli_support::ringtp;
use model_support::{Result, batch, bits, fixture, load, open, some_ids};
use ringtp::comm::p2p::{DeviceAllReduce, OneShot, Ring, TwoShot};
use ringtp::generate::{Completion, Llm, LlmBuilder, SamplingParams};
use ringtp::llama::{GroupOptions, StepHook};
use ringtp::{DType, Error};
use safetensors::SafeTensors;
use serde_json::Value;

test_driver::also_on_a_real_driver!();

/// Little of everything: the deadline is long, as the virtual clock may leap while a busy host
/// keeps a rank waiting.
fn builder(name: &str) -> LlmBuilder {
    Llm::builder(fixture(name))
        .dtype(DType::F32)
        .num_blocks(16)
        .deadline(Duration::from_secs(60))
}

fn prompts() -> [Vec<u32>; 3] {
    [vec![1, 2, 3], vec![5, 4], vec![9; 20]]
}

fn drawn() -> SamplingParams {
    SamplingParams::greedy()
        .temperature(0.8)
        .top_p(0.9)
        .seed(7)
        .max_tokens(4)
        .ignore_eos(true)
}

fn ids(completions: &[Completion]) -> Vec<Vec<u32>> {
    completions.iter().map(|c| c.ids.clone()).collect()
}

#[test]
fn texts_are_those_of_the_cpu_greedy_and_drawn() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    // Two ranks share a device.
    for (name, devices) in [("gqa_8_2", vec![0, 1]), ("tied_odd_vocab", vec![0, 0, 1])] {
        let tp = devices.len();
        let mut cpu = builder(name).tp(tp).build()?;
        let mut cuda = builder(name).tp(tp).devices(devices).build()?;
        let greedy = SamplingParams::greedy().max_tokens(5).ignore_eos(true);
        for params in [greedy, drawn()] {
            let expected = cpu.generate(&prompts(), &params)?;
            let found = cuda.generate(&prompts(), &params)?;
            assert_eq!(ids(&found), ids(&expected), "{name} {params:?}");
        }
    }
    Ok(())
}

#[test]
fn a_rank_that_dies_is_named_and_a_rebuilt_model_answers_as_before() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    let armed = Arc::new(AtomicBool::new(false));
    let trigger = armed.clone();
    let hook: StepHook = Arc::new(move |rank, _step| {
        if rank == 1 && trigger.swap(false, Ordering::SeqCst) {
            panic!("rank 1 was told to fail");
        }
    });
    let mut llm = builder("gqa_8_2")
        .tp(2)
        .devices(vec![0, 1])
        .on_step(hook)
        .build()?;
    let params = SamplingParams::greedy().max_tokens(3).ignore_eos(true);
    let before = llm.generate(&prompts(), &params)?;

    armed.store(true, Ordering::SeqCst);
    let error = llm
        .generate(&prompts(), &params)
        .expect_err("rank 1 failed");
    assert!(matches!(error, Error::Comm(_)), "{error}");
    assert!(error.to_string().contains("rank 1"), "{error}");
    llm.generate(&prompts(), &params)
        .expect_err("not before it is rebuilt");

    llm.rebuild()?;
    assert_eq!(llm.generate(&prompts(), &params)?, before);
    Ok(())
}

#[test]
fn the_command_line_names_devices() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let model = fixture("gqa_8_2");
    let run = |more: &[&str]| {
        let common = [
            "--ids",
            "1,2,3",
            "--max-tokens",
            "4",
            "--ignore-eos",
            "--dtype",
            "f32",
        ];
        let args: Vec<_> = common.iter().chain(more).copied().collect();
        ringtp("generate", &model, &args)
    };
    let cpu = run(&["--tp", "2"]);
    assert_eq!(cpu.code, 0, "{}", cpu.stderr);
    for more in [
        &["--devices", "0,1"][..],
        &["--devices", "1,1"],
        &["--device", "cuda", "--tp", "2"],
        &["--devices", "0,1", "--all-reduce", "two-shot"],
        &["--devices", "0,1", "--sequence-parallel"],
        &["--devices", "0,1", "--batch-invariant"],
    ] {
        let cuda = run(more);
        assert_eq!(cuda.code, 0, "{more:?}: {}", cuda.stderr);
        assert_eq!(cuda.stdout, cpu.stdout, "{more:?}");
        let last = if more.contains(&"1,1") { 1 } else { 0 };
        let words = format!("memory of rank 0 (CUDA device {last}): weights ");
        assert!(cuda.stderr.contains(&words), "{words} in {}", cuda.stderr);
    }
    for (more, words) in [
        (&["--devices", "0,999"][..], "CUDA device"),
        (&["--devices", "0", "--tp", "2"], "cannot be used with"),
        (
            &["--device", "cuda", "--tp", "2", "--all-reduce", "tree"],
            "one of auto, one-shot, two-shot, ring",
        ),
    ] {
        let refused = run(more);
        assert_eq!(refused.code, 2, "{more:?}: {}", refused.stderr);
        assert!(
            refused.stderr.contains(words),
            "{words} in {}",
            refused.stderr
        );
    }
}

/// Those that sum in rank order have the same bits, the ring has others; and it is the one that is
/// named which runs, by the bytes that it sends.
#[test]
fn a_named_all_reduce_is_the_one_that_runs() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    let (name, tp, rows) = ("bf16", 3, 9);
    let dims = open(name)?.config().dims;
    let run = |all_reduce: Option<&str>| -> Result<(Vec<u32>, u64)> {
        let options = GroupOptions {
            tp,
            devices: Some(vec![0, 1, 2]),
            num_blocks: Some(4),
            all_reduce: all_reduce.map(str::to_owned),
            ..Default::default()
        };
        let mut group = load(name, options)?;
        let ids = some_ids(dims.vocab_size, 1, rows);
        let logits = bits(&group.forward(&batch(&ids, 0, rows, &[2]))?);
        Ok((logits, group.stats().comm_bytes))
    };
    let (expected, one_shot_bytes) = run(Some("one-shot"))?;
    let message = rows * dims.hidden_size * DType::Bf16.size();
    let sums = tp * (1 + 2 * dims.num_hidden_layers);
    let sent = |algorithm: &dyn DeviceAllReduce| (sums * algorithm.bytes_sent(tp, message)) as u64;
    for (named, algorithm) in [
        (None, &OneShot as &dyn DeviceAllReduce),
        (Some("auto"), &OneShot),
        (Some("two-shot"), &TwoShot),
        (Some("ring"), &Ring),
    ] {
        let (logits, bytes) = run(named)?;
        assert_eq!(logits == expected, named != Some("ring"), "{named:?}");
        let rest = one_shot_bytes - sent(&OneShot);
        assert_eq!(bytes, rest + sent(algorithm), "{named:?}");
    }
    Ok(())
}

#[test]
fn logits_of_the_command_line_are_those_of_the_cpu() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let logits = |name: &str, more: &[&str]| -> Result<(Value, Vec<f32>)> {
        let out = dir.path().join(name);
        let file = out.to_str().ok_or("UTF-8")?;
        let common = [
            "--ids",
            "1,2,3,4,5",
            "--dtype",
            "f32",
            "--json",
            "--out",
            file,
        ];
        let args: Vec<_> = common.iter().chain(more).copied().collect();
        let ran = ringtp("logits", &fixture("mha"), &args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let bytes = std::fs::read(&out)?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let values = bytemuck::pod_collect_to_vec(tensors.tensor("logits")?.data());
        Ok((serde_json::from_str(&ran.stdout)?, values))
    };
    let (_, cpu) = logits("cpu", &["--tp", "3"])?;
    let (told, cuda) = logits("cuda", &["--devices", "0,0,1"])?;
    assert_eq!(told["tp"], 3);
    assert_eq!(cuda.len(), cpu.len());
    let least = cpu.iter().copied().fold(f32::INFINITY, f32::min);
    let range = cpu.iter().copied().fold(f32::NEG_INFINITY, f32::max) - least;
    let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4 * range;
    assert!(cuda.iter().zip(&cpu).all(close));
    Ok(())
}

/// Device 1 has no room: an error of the whole group that names it, before anything hangs; with the
/// memory back, all is well.
#[test]
fn a_device_without_memory_is_an_error_of_all_with_the_arithmetic() {
    if !test_driver::is_virtual() {
        test_driver::skipped("takes all memory of a device");
        return;
    }
    let this = "a_device_without_memory_is_an_error_of_all_with_the_arithmetic";
    test_driver::in_a_child_with(this, &[("VGPU_MEMORY", "700000000")], || {
        let _driver = test_driver::take().expect("a driver");
        let context = Context::new(1).expect("device 1");
        let pool = DevicePool::new(&context, 0);
        // What is left takes the ranks' workspace and weights, and no more than 100 MiB of cache.
        let free = context.memory().expect("it says").0;
        let hog = pool.buffer(free - (260 << 20)).expect("that much is free");
        let on = |num_blocks: Option<usize>| GroupOptions {
            tp: 2,
            devices: Some(vec![0, 1]),
            dtype: Some(DType::F32),
            num_blocks,
            ..Default::default()
        };
        let refused = |num_blocks, parts: &[&str]| {
            let error = load("gqa_8_2", on(num_blocks)).expect_err("no room");
            assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
            for part in parts {
                assert!(error.to_string().contains(part), "{part} in {error}");
            }
        };
        // By what is free, before anything is loaded.
        let arithmetic = [
            "KV cache on CUDA device 1",
            "bytes free",
            "of weights",
            "max_model_len",
        ];
        refused(None, &arithmetic);
        // So many fit on device 0 alone, and the ranks find out while they load.
        let found_out = ["KV cache of CUDA device 1", "65536 blocks", "fewer blocks"];
        refused(Some(1 << 16), &found_out);
        drop(hog);
        let mut group = load("gqa_8_2", on(None)).expect("now there is room");
        group
            .forward(&batch(&[1, 2, 3], 0, 3, &[0]))
            .expect("logits");
    });
}

#[test]
fn devices_that_cannot_be_are_errors_that_say_so() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let refused = |what: &str, options: GroupOptions| {
        let error = load("gqa_8_2", options).expect_err(what);
        assert!(error.is_input(), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    };
    let on = |devices: Vec<usize>| GroupOptions {
        tp: 2,
        devices: Some(devices),
        ..Default::default()
    };
    refused("one for each of 2 ranks", on(vec![0, 1, 2]));
    refused("CUDA device", on(vec![0, 999]));
    refused(
        "batch_invariant",
        GroupOptions {
            batch_invariant: true,
            all_reduce: Some("ring".into()),
            ..on(vec![0, 1])
        },
    );
    refused(
        "all_reduce: expected one of auto, one-shot, two-shot, ring, found \"tree\"",
        GroupOptions {
            all_reduce: Some("tree".into()),
            ..on(vec![0, 1])
        },
    );
}
