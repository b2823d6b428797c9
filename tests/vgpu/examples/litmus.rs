//! Runs litmus tests: `cargo run -p vgpu --example litmus -- FILE… [--seeds N] [--stale MODE]`.
//!
//! The form of the files is described in `vgpu::litmus`. Prints, for each test, the final states
//! with their shares and what becomes of each claim; fails if one does not hold.

use std::process::ExitCode;

use vgpu::litmus::{Compiled, Test};
use vgpu::race::Stale;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(words) => {
            eprintln!("{words}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool, String> {
    let (mut files, mut seeds, mut stale) = (Vec::new(), 10_000, Stale::default());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seeds" => {
                let number = arguments.next().and_then(|n| n.parse().ok());
                seeds = number.ok_or("--seeds wants a number")?;
            }
            "--stale" => {
                let mode = arguments.next();
                let mode = mode.and_then(|m| Stale::by_name(&m));
                stale = mode.ok_or("--stale wants newest, random or oldest")?;
            }
            _ => files.push(argument),
        }
    }
    if files.is_empty() {
        return Err("usage: litmus FILE… [--seeds N] [--stale newest|random|oldest]".to_owned());
    }
    let mut good = true;
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(|e| format!("{file}: {e}"))?;
        let test: Test = text.parse().map_err(|e| format!("{file}: {e}"))?;
        let compiled = Compiled::new(test).map_err(|e| format!("{file}: {e}"))?;
        let summary = compiled.judge(0..seeds, stale, stale == Stale::default());
        let summary = summary.map_err(|e| format!("{file}: {e}"))?;
        println!("{}", compiled.test);
        for (state, count) in &summary.states {
            let share = 100.0 * *count as f64 / summary.runs as f64;
            println!("  {share:6.2} %  {}", compiled.test.show(state));
        }
        for (reason, words) in &summary.reasons {
            println!(
                "  {} of {} runs race, {}: {words}",
                summary.racy,
                summary.runs,
                reason.name()
            );
        }
        for failure in &summary.failures {
            println!("  WRONG: {failure}");
        }
        good &= summary.failures.is_empty();
    }
    Ok(good)
}
