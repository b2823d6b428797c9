//! Tests of the driver run in processes of their own: it is one to a process, and reads its
//! settings once.

use std::process::{Command, Output};

/// Runs one of these tests in a process of its own, where `child` says so.
pub(crate) fn child(test: &str, settings: &[(&str, &str)]) -> Output {
    // A child that hangs is a failure of its test, not of everything after it.
    let mut command = Command::new("timeout");
    command
        .arg("120")
        .arg(std::env::current_exe().expect("this test"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("VGPU_TEST_CHILD", test);
    for (name, value) in settings {
        command.env(name, value);
    }
    command.output().expect("the child runs")
}

pub(crate) fn is_child(test: &str) -> bool {
    std::env::var("VGPU_TEST_CHILD").is_ok_and(|name| name == test)
}

/// The lines a child marked for its parent.
pub(crate) fn marked(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|l| l.starts_with("out "));
    lines.map(str::to_owned).collect()
}

/// The parent's side of a test: the child must succeed with these settings.
pub(crate) fn passes(test: &str, settings: &[(&str, &str)]) -> Output {
    let output = child(test, settings);
    let (out, err) = (&output.stdout, &output.stderr);
    let words = [String::from_utf8_lossy(out), String::from_utf8_lossy(err)].concat();
    assert!(output.status.success(), "{test} with {settings:?}: {words}");
    output
}
