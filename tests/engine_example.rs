//! The example engine, on threads of its own, gives what the library's own gives.

#[allow(dead_code, reason = "its main is not run here")]
#[path = "../examples/engine.rs"]
mod engine;

use std::path::PathBuf;
use std::sync::Arc;

use engine::{Request, logits, requests, run};
use ringtp::checkpoint::Checkpoint;
use ringtp::generate::{Llm, Prompt, SamplingParams, Tokenizer};
use ringtp::{Error, Result};

const TEXTS: [&str; 3] = ["It is a truth universally", "My dear Mr. Bennet", "The"];
const STEPS: usize = 20;

fn dir() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/austen").into()
}

#[test]
fn it_gives_the_texts_of_the_librarys_own_engine() -> Result<()> {
    let checkpoint = Arc::new(Checkpoint::open(dir())?);
    let requests = requests(&Tokenizer::open(&dir())?, &TEXTS)?;
    for tp in [1, 2, 3, 4] {
        let served = run(&checkpoint, tp, &requests, STEPS)?;
        let mut llm = Llm::builder(dir()).tp(tp).threads(tp).build()?;
        for (request, served) in requests.iter().zip(&served) {
            let (prompt, generated) = served.tokens.split_at(request.tokens.len());
            assert_eq!(prompt, request.tokens);
            assert_eq!(generated.len(), STEPS - request.joins, "it joined late");
            let params = SamplingParams::greedy().ignore_eos(true);
            let params = params.max_tokens(generated.len());
            let expected = llm.generate(&[Prompt::Ids(prompt.to_vec())], &params)?;
            assert_eq!(generated, expected[0].ids, "tp {tp}");

            let logits = logits(checkpoint.clone(), tp, request)?;
            let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let best = logits.iter().position(|&logit| logit == greatest);
            assert_eq!(best, Some(generated[0] as usize));
        }
    }
    Ok(())
}

/// What one rank cannot do ends all, with its reason.
#[test]
fn a_request_that_cannot_be_served_is_an_error_and_no_hang() -> Result<()> {
    let checkpoint = Checkpoint::open(dir())?;
    let stray = Request {
        joins: 0,
        prompt_len: 1,
        tokens: vec![1_000_000],
        computed: 0,
        blocks: vec![0],
    };
    let refused = run(&checkpoint, 3, &[stray], 1).map(|_| ());
    assert!(matches!(refused, Err(Error::Input(_))), "{refused:?}");
    let refused = run(&checkpoint, 7, &[], 1).map(|_| ());
    assert!(refused.is_ok(), "7 ranks for 8 KV heads: {refused:?}");
    let refused = run(&checkpoint, 17, &[], 1).map(|_| ());
    assert!(matches!(refused, Err(Error::InvalidTp(_))), "{refused:?}");
    Ok(())
}
