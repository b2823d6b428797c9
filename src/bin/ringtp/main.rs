//! The command line.
//!
//! Exit codes: 0 done, 1 something failed while running (or is not well, for `doctor`), 2 bad input. Results go to standard
//! output, everything else to standard error; a reader that goes away ends the program quietly.

mod args;
mod bench;
mod doctor;
mod generate;
mod logits;
mod memory;
mod progress;
mod shards;
mod table;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use args::{Cli, Command};

/// Why a command ended early.
enum Failure {
    /// An error of the library.
    Ringtp(ringtp::Error),
    /// Standard output could not be written.
    Output(std::io::Error),
}

impl From<ringtp::Error> for Failure {
    fn from(error: ringtp::Error) -> Self {
        Self::Ringtp(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Output(error)
    }
}

/// Writes an error to standard error. Where that cannot be written (`eprintln!` would panic),
/// the exit code still tells.
fn tell(error: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "error: {error}");
}

fn main() -> ExitCode {
    // Usage errors are clap's: a line on standard error, exit code 2.
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let done = |()| ExitCode::SUCCESS;
    let result = match (&cli.command, matches.subcommand()) {
        (Command::Generate(args), Some((_, matches))) => {
            generate::generate(args, &args.prompts.in_order(matches)).map(done)
        }
        (Command::Generate(args), None) => generate::generate(args, &[]).map(done),
        (Command::Logits(args), _) => logits::logits(args).map(done),
        (Command::Shards(args), _) => shards::shards(args).map(done),
        (Command::Doctor(args), _) => doctor::doctor(args),
        (Command::Bench(args), _) => bench::bench(args).map(done),
    };
    match result {
        Ok(code) => code,
        Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Output(error)) => {
            tell(&format!(
                "standard output: {error}; free some space or redirect it"
            ));
            ExitCode::from(1)
        }
        Err(Failure::Ringtp(error)) => {
            tell(&error);
            ExitCode::from(if error.is_input() { 2 } else { 1 })
        }
    }
}
