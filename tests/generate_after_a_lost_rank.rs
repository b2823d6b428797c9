//! A rank that dies in the middle of a generation: the caller gets the error, and a rebuilt
//! model gives the tokens that it gave before.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ringtp::Error;
use ringtp::generate::{Llm, SamplingParams};
use ringtp::llama::StepHook;

#[test]
fn the_error_reaches_the_caller_and_a_rebuilt_model_works() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama/gqa_8_2");
    let armed = Arc::new(AtomicBool::new(false));
    let trigger = armed.clone();
    let hook: StepHook = Arc::new(move |rank, _step| {
        if rank == 1 && trigger.swap(false, Ordering::SeqCst) {
            panic!("rank 1 was told to fail");
        }
    });
    let mut llm = Llm::builder(model)
        .tp(2)
        .threads(2)
        .deadline(Duration::from_secs(5))
        .on_step(hook)
        .build()
        .expect("a model");
    let params = SamplingParams::greedy().max_tokens(6).ignore_eos(true);
    let prompts = [vec![1_u32, 2, 3], vec![5, 4]];
    let before = llm.generate(&prompts, &params).expect("completions");

    armed.store(true, Ordering::SeqCst);
    let error = llm.generate(&prompts, &params).expect_err("rank 1 failed");
    assert!(
        matches!(error, Error::Comm(_)) && !error.is_input(),
        "{error}"
    );
    assert!(error.to_string().contains("rank 1"), "{error}");
    llm.generate(&prompts, &params)
        .expect_err("not before it is rebuilt");

    llm.rebuild().expect("rebuilt");
    assert_eq!(
        llm.generate(&prompts, &params).expect("completions"),
        before
    );
}
