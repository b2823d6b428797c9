//! Generation on virtual devices, one thread a rank: the texts are those of the CPU, greedy and
//! drawn; a rank that dies is a named error on all of them, and a rebuilt model answers as before.
#![cfg(feature = "cuda")]

mod model_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use model_support::{Result, fixture, load};
use ringtp::generate::{Completion, Llm, LlmBuilder, SamplingParams};
use ringtp::llama::{GroupOptions, StepHook};
use ringtp::{DType, Error};

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
        "all_reduce",
        GroupOptions {
            all_reduce: Some("ring".into()),
            ..on(vec![0, 1])
        },
    );
    refused(
        "sequence_parallel",
        GroupOptions {
            sequence_parallel: true,
            ..on(vec![0, 1])
        },
    );
}
