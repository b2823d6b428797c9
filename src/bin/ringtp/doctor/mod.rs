//! `ringtp doctor`.
//!
//! This process never calls the driver. A child does, and says a line after each step: whatever
//! a broken driver or link does to it, this one lives to tell what was found until then.

#[cfg(feature = "cuda")]
mod child;
mod report;

use std::io::{BufRead, BufReader, Write, stdout};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::args::DoctorArgs;
use report::{Line, Report};

/// Health as an exit code: 0 if a group of these devices can work, 1 if not.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    #[cfg(feature = "cuda")]
    if args.in_this_process {
        child::examine(args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = if cfg!(feature = "cuda") {
        examine_in_a_child(args)
    } else {
        let mut report = Report::default();
        report.problem(
            "this program was built without CUDA, so it sees no device; build it with cargo \
             build --release --features cuda"
                .into(),
        );
        report
    };
    let text = if args.json {
        format!("{}\n", report.to_json())
    } else {
        report.to_text()
    };
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(ExitCode::from(u8::from(!report.is_healthy())))
}

fn examine_in_a_child(args: &DoctorArgs) -> Report {
    let mut report = Report::default();
    let mut child = match start(args) {
        Ok(child) => child,
        Err(error) => {
            report.problem(format!(
                "the examination could not be started: {error}; is the program file still there?"
            ));
            return report;
        }
    };
    let (sender, lines) = mpsc::channel();
    let output = child.stdout.take();
    // Ends when the child's output does, at the latest when the child is killed.
    let reader = std::thread::spawn(move || {
        for line in output.into_iter().flat_map(|o| BufReader::new(o).lines()) {
            if line.is_ok_and(|line| sender.send(line).is_err()) {
                break;
            }
        }
    });
    let end = Instant::now() + args.timeout;
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => match serde_json::from_str::<Line>(&line) {
                Ok(line) => report.take(line),
                // A library that prints to standard output.
                Err(_) => continue,
            },
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                // If it has just ended by itself there is nothing to kill.
                let _ = child.kill();
                let _ = child.wait();
                let _ = reader.join();
                report.problem(format!(
                    "{} did not end within {} s and was given up; a device or a link hangs: look \
                     into the kernel log (dmesg), try fewer devices with --devices, or raise \
                     --timeout",
                    report.stage(),
                    args.timeout.as_secs_f64()
                ));
                return report;
            }
        }
    }
    let _ = reader.join();
    if let Some(status) = wait(&mut child, Duration::from_secs(10))
        && !status.success()
        && report.is_healthy()
    {
        report.problem(format!(
            "{} ended with {status}; the driver's words, if any, stand above",
            report.stage()
        ));
    }
    report.finish();
    report
}

fn start(args: &DoctorArgs) -> std::io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("doctor").arg("--in-this-process");
    command.arg(format!("--probe-seconds={}", args.probe.as_secs_f64()));
    for device in &args.devices {
        command.arg(format!("--devices={device}"));
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()
}

/// How the child ended, which it is about to; killed if it is not.
fn wait(child: &mut Child, most: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + most;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => {
                // Nobody is left to be told if that fails.
                let _ = child.kill();
                return child.wait().ok();
            }
        }
    }
}
