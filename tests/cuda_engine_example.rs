//! The example engine on devices, in streams of its own, gives the tokens that it gives on the CPU;
//! and its kernels and collectives, used alone, what they should.
#![cfg(feature = "cuda")]

#[allow(dead_code, reason = "its main is not run here")]
#[path = "../examples/engine.rs"]
mod engine;

use engine::{devices, requests};
use ringtp::checkpoint::Checkpoint;
use ringtp::generate::{Llm, Prompt, SamplingParams, Tokenizer};
use ringtp::{DType, Result};

test_driver::also_on_a_real_driver!();

#[test]
fn it_gives_the_tokens_of_the_cpu() -> Result<()> {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/austen");
    let checkpoint = Checkpoint::open(dir)?;
    let tokenizer = Tokenizer::open(std::path::Path::new(dir))?;
    // The second joins when the first has three tokens.
    let requests = requests(&tokenizer, &["The", "My"])?;
    let served = devices::run(&checkpoint, &[0, 1], DType::F32, &requests, 5)?;
    let mut llm = Llm::builder(dir).dtype(DType::F32).build()?;
    for (request, served) in requests.iter().zip(&served) {
        let (prompt, generated) = served.tokens.split_at(request.tokens.len());
        let params = SamplingParams::greedy().ignore_eos(true);
        let params = params.max_tokens(generated.len());
        let expected = llm.generate(&[Prompt::Ids(prompt.to_vec())], &params)?;
        assert_eq!(generated, expected[0].ids);
    }
    Ok(())
}

#[test]
fn its_kernels_and_collectives_alone_give_what_they_should() -> Result<()> {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    // Small integers: the products are exact, and of the norm only a scale is not.
    let (k, n) = (16, 24);
    let value = |i: usize| (i * 7 % 5) as f32 - 2.0;
    let x: Vec<f32> = (0..k).map(value).collect();
    let w: Vec<f32> = (0..n * k).map(|i| value(i + i / 3)).collect();
    let product = |row: &[f32]| -> f32 { row.iter().zip(&x).map(|(w, x)| w * x).sum() };
    let products: Vec<f32> = w.chunks_exact(k).map(product).collect();
    let squares: f32 = products.iter().map(|p| p * p).sum();
    let scale = 1.0 / (squares / n as f32 + 1e-5).sqrt();
    for (found, product) in devices::alone(&x, &w, &[0, 1])?.iter().zip(&products) {
        // The mean, the sum, the root, its inverse and the product round: 5 u, and u for ours.
        let error = 1e-6 * (product * scale).abs();
        assert!(
            (found - product * scale).abs() <= error,
            "{found} for {}",
            product * scale
        );
    }
    Ok(())
}
