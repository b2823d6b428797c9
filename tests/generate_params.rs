//! Parameters are checked, and the model's defaults fill in what the caller leaves out.

use ringtp::checkpoint::GenerationConfig;
use ringtp::generate::SamplingParams;

fn model() -> GenerationConfig {
    GenerationConfig {
        eos_token_ids: Some(vec![9, 2]),
        do_sample: Some(true),
        temperature: Some(0.6),
        top_k: Some(40),
        top_p: Some(0.9),
        min_p: None,
        repetition_penalty: Some(1.1),
    }
}

#[test]
fn the_model_fills_in_what_the_caller_leaves_out() {
    let sampling = SamplingParams::default()
        .resolve(&model(), &[5])
        .expect("valid");
    assert_eq!(
        (sampling.temperature, sampling.top_k, sampling.top_p),
        (0.6, 40, 0.9)
    );
    assert_eq!((sampling.min_p, sampling.repetition_penalty), (0.0, 1.1));
    assert_eq!(
        sampling.stop_ids,
        [2, 9],
        "generation_config.json before config.json"
    );

    let own = SamplingParams::default()
        .temperature(0.0)
        .top_k(3)
        .stop_id(4);
    let sampling = own.resolve(&model(), &[5]).expect("valid");
    assert_eq!((sampling.temperature, sampling.top_k), (0.0, 3));
    assert_eq!(sampling.stop_ids, [2, 4, 9]);
}

#[test]
fn a_model_that_does_not_ask_for_sampling_is_greedy() {
    for do_sample in [None, Some(false)] {
        let model = GenerationConfig {
            do_sample,
            ..model()
        };
        let sampling = SamplingParams::default()
            .resolve(&model, &[])
            .expect("valid");
        assert_eq!(sampling.temperature, 0.0);
    }
    let plain = GenerationConfig {
        do_sample: Some(true),
        ..GenerationConfig::default()
    };
    let sampling = SamplingParams::default()
        .resolve(&plain, &[5])
        .expect("valid");
    assert_eq!((sampling.temperature, sampling.stop_ids), (1.0, vec![5]));
}

#[test]
fn ignored_ends_leave_the_callers_own() {
    let params = SamplingParams::default().ignore_eos(true).stop_id(4);
    let sampling = params.resolve(&model(), &[5]).expect("valid");
    assert_eq!(sampling.stop_ids, [4]);
}

#[test]
fn without_a_seed_each_request_has_its_own() {
    let seed = || {
        let sampling = SamplingParams::default().resolve(&model(), &[]);
        sampling.expect("valid").seed
    };
    assert_ne!(seed(), seed());
    let fixed = SamplingParams::default().seed(3).resolve(&model(), &[]);
    assert_eq!(fixed.expect("valid").seed, 3);
}

#[test]
fn numbers_out_of_range_are_named() {
    let params = SamplingParams::default;
    for (bad, name) in [
        (params().temperature(-0.1), "temperature"),
        (params().temperature(f32::NAN), "temperature"),
        (params().temperature(f32::INFINITY), "temperature"),
        (params().temperature(1e-30), "temperature"),
        (params().top_p(0.0), "top_p"),
        (params().top_p(1.1), "top_p"),
        (params().top_p(f32::NAN), "top_p"),
        (params().min_p(-0.1), "min_p"),
        (params().min_p(f32::NAN), "min_p"),
        (params().repetition_penalty(0.0), "repetition_penalty"),
        (params().repetition_penalty(f32::NAN), "repetition_penalty"),
        (params().max_tokens(0), "max_tokens"),
        (params().max_tokens(3).min_tokens(4), "min_tokens"),
        (params().stop(""), "stop"),
    ] {
        let error = bad.resolve(&model(), &[]).expect_err("out of range");
        assert!(
            error.is_input() && error.to_string().starts_with(name),
            "{error}"
        );
    }
    let mut config = model();
    config.top_p = Some(7.0);
    let error = params().resolve(&config, &[]).expect_err("the model's own");
    assert!(
        error.to_string().contains("generation_config.json"),
        "{error}"
    );
}
