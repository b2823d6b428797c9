//! `ringtp bench` measures on CPU ranks, and counts on the virtual GPU what one call does.

use std::process::{Command, Output};

use serde_json::Value;

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringtp"))
        .arg("bench")
        .args(args)
        .env("VGPU_DEVICES", "4")
        .output()
        .expect("the program starts")
}

fn rows(args: &[&str]) -> Vec<Value> {
    let output = bench(args);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let parse = |line| serde_json::from_str(line).expect("an object a line");
    text.lines().map(parse).collect()
}

#[test]
fn cpu_ranks_are_timed() {
    for (operation, factor) in [
        ("all-reduce", 4.0 / 3.0),
        ("reduce-scatter", 2.0 / 3.0),
        ("all-gather", 2.0 / 3.0),
        ("broadcast", 1.0),
    ] {
        let args = [
            operation, "--tp", "3", "--sizes", "3K", "--dtype", "bf16", "--json",
        ];
        for row in rows(&args) {
            assert_eq!(row["operation"], operation);
            assert_eq!((&row["bytes"], &row["ranks"]), (&3072.into(), &3.into()));
            let number = |name: &str| row[name].as_f64().expect("a number");
            assert!(number("us") > 0.0, "{row}");
            let expected = number("algbw_gb_s") * factor;
            approx::assert_relative_eq!(number("busbw_gb_s"), expected, max_relative = 1e-12);
        }
    }
}

/// The directory of a small model.
fn model() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama/gqa_8_2").to_owned()
}

#[test]
fn prefill_and_decode_of_a_model_are_timed() {
    let model = model();
    let args = [
        "--model", &model, "--tp", "2", "--prompt", "12", "--steps", "3", "--json",
    ];
    let rows = rows(&args);
    for (row, (part, tokens)) in rows.iter().zip([("prefill", 12), ("decode", 1)]) {
        assert_eq!(
            (&row["part"], &row["tokens"]),
            (&part.into(), &tokens.into())
        );
        assert_eq!((&row["ranks"], &row["dtype"]), (&2.into(), &"f32".into()));
        let number = |name: &str| row[name].as_f64().expect("a number");
        assert!(number("ms") > 0.0, "{row}");
        assert!((0.0..=1.0).contains(&number("in_collectives")), "{row}");
        let rate = f64::from(tokens) / number("ms") * 1e3;
        approx::assert_relative_eq!(number("tokens_per_s"), rate, max_relative = 1e-9);
    }
    assert_eq!(rows.len(), 2);

    let output = bench(&args[..args.len() - 1]);
    let (out, err) = (output.stdout, output.stderr);
    let text = String::from_utf8_lossy(&out) + String::from_utf8_lossy(&err);
    for words in [
        "tokens/s",
        "decode",
        "on threads",
        "memory of rank 1: weights",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
}

#[test]
fn bad_arguments_are_refused_with_the_remedy() {
    for (args, words) in [
        (&["--sizes", "1X"][..], "512,8K,1M"),
        (&["--all-reduce", "none"], "one-shot"),
        (&["--devices", "0,x"], "--devices"),
        (&["--tp", "0"], "1"),
        (&["--prompt", "3"], "--model"),
        (&["--batch-invariant"], "--model"),
        (
            &["--model", &model(), "--sizes", "1K"],
            "cannot be used with",
        ),
        (&["--model", &model(), "--prompt", "0"], "at least 1 each"),
        (&["--model", &model(), "--steps", "999"], "256 together"),
        (&["--model", &model(), "--tp", "5"], "tp"),
    ] {
        let output = bench(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(words), "{args:?}: {text}");
    }
}

#[cfg(all(feature = "cuda", target_os = "linux"))]
mod on_devices {
    use super::{Value, rows};

    /// Rows of a bench of so many ranks, unless the driver is one that takes the time.
    fn counted(ranks: usize, args: &[&str]) -> Option<Vec<Value>> {
        let _driver = test_driver::take()?;
        if !test_driver::is_virtual() {
            test_driver::skipped("a real driver does not count");
            return None;
        }
        Some(rows(
            &[
                args,
                &["--device", "cuda", "--tp", &ranks.to_string(), "--json"],
            ]
            .concat(),
        ))
    }

    fn number(row: &Value, name: &str) -> u64 {
        row[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name} in {row}"))
    }

    /// What flags, epochs and addresses add to a message's own bytes: a rank tells each other
    /// rank a few words a block and barrier.
    const TALK: u64 = 16 << 10;

    #[test]
    fn the_bytes_over_links_are_those_of_the_formula() {
        let Some(rows) = counted(4, &["all-reduce", "--sizes", "48K"]) else {
            return;
        };
        let names: Vec<_> = rows.iter().map(|row| row["algorithm"].clone()).collect();
        assert_eq!(names, ["one-shot", "two-shot", "ring"]);
        for (row, formula) in rows
            .iter()
            .zip([4 * 3 * (48 << 10), 6 * (48 << 10), 6 * (48 << 10)])
        {
            assert_eq!(number(row, "link_bytes_by_formula"), formula, "{row}");
            let counted = number(row, "link_bytes");
            assert!((formula..formula + TALK).contains(&counted), "{row}");
            for name in ["sectors", "barriers", "releases", "acquires"] {
                assert!(number(row, name) > 0, "{row}");
            }
        }
    }

    #[test]
    fn what_a_step_of_a_model_does_is_counted() {
        let Some(rows) = counted(4, &["--model", &super::model(), "--prompt", "6"]) else {
            return;
        };
        for (part, tokens) in [("prefill", 6), ("decode", 1)] {
            let of_part = || rows.iter().filter(|row| row["part"] == part);
            assert!(of_part().all(|row| row["tokens"] == tokens));
            // Two layers with four products each and the head, on four ranks; two sums a layer and
            // that of the embedding.
            for (kernel, launches) in [
                ("gemm_", 4 * 9),
                ("attention_f32", 4 * 2),
                ("one_shot_f32", 4 * 5),
                ("sampling_records", 4),
            ] {
                let named = |row: &&Value| {
                    let name = row["kernel"].as_str();
                    name.is_some_and(|name| name.starts_with(kernel))
                };
                let found: u64 = of_part().filter(named).map(|r| number(r, "launches")).sum();
                assert_eq!(found, launches, "{kernel} in {part}");
            }
            let copies = of_part().find(|row| row["kernel"].is_null());
            let copies = copies.expect("what is copied");
            for name in ["uploaded", "downloaded", "link_bytes"] {
                assert!(number(copies, name) > 0, "{name} in {copies}");
            }
        }
    }

    #[test]
    fn a_batch_invariant_step_has_one_kernel_for_products() {
        let model = super::model();
        let options = ["--batch-invariant", "--sequence-parallel"];
        let Some(rows) = counted(
            2,
            &[&["--model", &model, "--prompt", "5"], &options[..]].concat(),
        ) else {
            return;
        };
        let kernels: Vec<_> = rows
            .iter()
            .filter_map(|row| row["kernel"].as_str())
            .collect();
        let has = |name| kernels.iter().any(|kernel| kernel.starts_with(name));
        assert!(has("gemm_many") && !has("gemm_few"), "{kernels:?}");
        // Five rows are two for each of two ranks, and one for both.
        assert!(has("reduce_scatter") && has("one_shot"), "{kernels:?}");
    }

    #[test]
    fn the_other_collectives_are_counted_as_well() {
        for (operation, formula) in [
            ("reduce-scatter", 3 * (24 << 10)),
            ("all-gather", 3 * (24 << 10)),
            ("broadcast", 3 * (24 << 10)),
        ] {
            let Some(rows) = counted(4, &[operation, "--sizes", "24K"]) else {
                return;
            };
            assert_eq!(rows.len(), 1);
            let row = &rows[0];
            assert_eq!(number(row, "link_bytes_by_formula"), formula, "{row}");
            let counted = number(row, "link_bytes");
            assert!((formula..formula + TALK).contains(&counted), "{row}");
        }
    }
}
