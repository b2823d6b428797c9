//! Text from a model directory: `cargo run --release --example generate -- DIR "It is a truth"`.
//!
//! The prompt is continued on two ranks and printed as it comes; then two prompts at once.

use std::io::{Write, stdout};
use std::ops::ControlFlow;

use ringtp::generate::{Event, Llm, SamplingParams};

fn main() -> ringtp::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(prompt)) = (args.next(), args.next()) else {
        eprintln!("usage: generate DIR PROMPT");
        return Ok(());
    };
    let mut llm = Llm::builder(dir).tp(2).build()?;
    let params = SamplingParams::default()
        .temperature(0.7)
        .max_tokens(64)
        .seed(1);

    // One prompt, streamed.
    llm.generate_with(&[prompt.as_str()], &params, |event| {
        if let Event::Token { text, .. } = event {
            print!("{text}");
            let _ = stdout().flush();
        }
        ControlFlow::Continue(())
    })?;
    println!();

    // The same prompt in company: with the same seed the same text.
    for completion in llm.generate(&[prompt.as_str(), "My dear"], &params)? {
        let text = completion.text.unwrap_or_default();
        println!("[{}] {text}", completion.finish_reason);
    }
    println!("{:.0} tokens/s", llm.timing().decode_rate());
    Ok(())
}
