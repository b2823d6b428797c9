//! `ringtp doctor` tells a machine whose links work from one whose links do not, and never hangs.
//!
//! On the virtual GPU alone: it has the broken links.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Runs it on `devices` virtual devices with these links between them. `None` (SKIPPED is printed)
/// where the driver is a real one.
fn doctor(devices: usize, topology: &str, args: &[&str]) -> Option<Output> {
    let _driver = test_driver::take()?;
    if !test_driver::is_virtual() {
        test_driver::skipped("needs links that break on request");
        return None;
    }
    let begin = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_ringtp"))
        .arg("doctor")
        .args(args)
        .env("VGPU_DEVICES", devices.to_string())
        .env("VGPU_TOPOLOGY", topology)
        .output()
        .expect("the program starts");
    assert!(begin.elapsed() < Duration::from_secs(300), "{output:?}");
    Some(output)
}

fn examined(devices: usize, topology: &str) -> Option<(i32, Value)> {
    let output = doctor(devices, topology, &["--json"])?;
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("{e}: {output:?}");
    });
    Some((output.status.code().expect("no signal"), report))
}

fn pair(report: &Value, from: usize, to: usize) -> &Value {
    let pairs = report["pairs"].as_array().expect("pairs");
    pairs
        .iter()
        .find(|pair| pair["from"] == from && pair["to"] == to)
        .expect("every pair is there")
}

#[test]
fn a_machine_whose_links_hold_is_healthy() {
    let Some((code, report)) = examined(3, "nvswitch") else {
        return;
    };
    assert_eq!(
        (code, &report["healthy"]),
        (0, &Value::Bool(true)),
        "{report}"
    );
    assert_eq!(report["problems"], Value::Array(vec![]));
    assert_eq!(report["devices"].as_array().map(Vec::len), Some(3));
    assert_eq!(report["pairs"].as_array().map(Vec::len), Some(6));
    for pair in report["pairs"].as_array().expect("pairs") {
        assert_eq!(pair["driver"], "NVLink", "{pair}");
        assert_eq!(pair["probe"], "works", "{pair}");
        // Nobody took a time on a clock that takes none.
        assert_eq!(pair["bytes_per_second"], Value::Null, "{pair}");
    }
    assert_eq!(report["ring"], serde_json::json!([0, 1, 2]));
    let algorithms = report["all_reduce"].as_array().expect("algorithms");
    assert_eq!(algorithms[0]["algorithm"], "one-shot");
    assert_eq!(algorithms.last().expect("some")["algorithm"], "two-shot");
    for choice in algorithms {
        assert_eq!(
            choice["refused"].as_array().map(Vec::len),
            Some(2),
            "{choice}"
        );
    }
}

#[test]
fn a_link_that_loses_writes_is_named() {
    let Some((code, report)) = examined(3, "nvswitch;lossy:1>2") else {
        return;
    };
    assert_eq!(code, 1, "{report}");
    let problems = report["problems"].as_array().expect("problems");
    let about = |from: usize, to: usize| {
        let words =
            format!("from rank {from} (device {from}) to rank {to} (device {to}) is broken");
        problems
            .iter()
            .any(|p| p.as_str().is_some_and(|p| p.contains(&words)))
    };
    assert!(about(1, 2), "{report}");
    assert_ne!(pair(&report, 1, 2)["probe"], "works");
    // Rank 0 has good links with both, so nothing else is to blame.
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0)] {
        assert_eq!(pair(&report, from, to)["probe"], "works", "{report}");
    }
}

#[test]
fn a_square_of_links_has_a_ring_and_uses_it() {
    let Some((code, report)) = examined(4, "links:0-2,2-1,1-3,3-0") else {
        return;
    };
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["ring"], serde_json::json!([0, 2, 1, 3]));
    assert_eq!(pair(&report, 0, 1)["driver"], "no access");
    for choice in report["all_reduce"].as_array().expect("algorithms") {
        assert_eq!(choice["algorithm"], "ring");
        for other in choice["refused"].as_array().expect("others") {
            assert_eq!(other["why"], "ranks 0 and 1 cannot reach each other");
        }
    }
}

#[test]
fn devices_in_a_line_cannot_work_together() {
    let Some((code, report)) = examined(3, "links:0-1,1-2") else {
        return;
    };
    assert_eq!(code, 1, "{report}");
    assert_eq!(report["ring"], Value::Null);
    let problems = report["problems"].to_string();
    assert!(
        problems.contains("ranks 0 and 2 cannot reach each other"),
        "{report}"
    );
    assert!(
        problems.contains("no ring goes through all ranks"),
        "{report}"
    );
}

#[test]
fn a_device_that_dies_ends_the_probe_and_not_the_program() {
    let Some((code, report)) = examined(2, "nvswitch;dies:1@20") else {
        return;
    };
    assert_eq!(code, 1, "{report}");
    // What was known before it died is still told.
    assert_eq!(report["devices"].as_array().map(Vec::len), Some(2));
    assert_ne!(report["problems"], Value::Array(vec![]));
}

#[test]
fn an_examination_that_takes_too_long_is_given_up() {
    let Some(output) = doctor(2, "nvswitch", &["--timeout", "0.001"]) else {
        return;
    };
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(words.contains("did not end within 0.001 s"), "{words}");
}

#[test]
fn ranks_may_share_a_device_and_a_device_must_be_there() {
    let Some(output) = doctor(1, "nvswitch", &["--devices", "0,0"]) else {
        return;
    };
    let words = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{words}");
    assert!(words.contains("same device"), "{words}");
    assert!(words.contains("ring: 0 1\n"), "{words}");
    assert!(words.ends_with("\nhealthy\n"), "{words}");

    let output = doctor(1, "nvswitch", &["--devices", "0,7"]).expect("it is there");
    let words = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("expected one of the 1 devices"), "{words}");

    let output = doctor(1, "nvswitch", &["--devices", "0,x"]).expect("it is there");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_machine_without_a_driver_is_told_what_it_lacks() {
    // Nowhere to find a driver, unless the machine has one of its own.
    let output = Command::new(env!("CARGO_BIN_EXE_ringtp"))
        .args(["doctor", "--json"])
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .expect("the program starts without a driver");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    if report["driver"] != Value::Null {
        test_driver::skipped("this machine has a driver of its own");
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{report}");
    let problem = report["problems"][0].as_str().expect("a problem");
    for words in ["no driver", "libcuda.so.1", "install the NVIDIA driver"] {
        assert!(problem.contains(words), "{problem}");
    }
}
