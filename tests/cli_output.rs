//! What the command line prints, on a model made on the spot.

mod cli_support;

use std::fs;
use std::process::{Command, Stdio};

use cli_support::{CONTEXT, Model, Ran, VOCAB, ringtp, run};
use serde_json::{Value, json};

fn done(ran: &Ran) -> &str {
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    &ran.stdout
}

fn lines(ran: &Ran) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).expect("an object a line");
    done(ran).lines().map(parse).collect()
}

fn numbers(value: &Value) -> Vec<u64> {
    let list = value.as_array().expect("a list");
    list.iter().map(|id| id.as_u64().expect("an id")).collect()
}

#[test]
fn help_names_every_option_and_the_exit_codes() {
    let help = run(&["--help"]);
    let text = done(&help);
    for word in [
        "generate",
        "logits",
        "shards",
        "doctor",
        "Exit codes",
        "2 bad input",
    ] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    let help = run(&["generate", "--help"]);
    let options = "--model --prompt --ids --tp --dtype --max-tokens --temperature --top-k --top-p \
                   --min-p --repetition-penalty --stop --seed --ignore-eos --chat --threads \
                   --max-model-len --all-reduce --tp-invariant --sequence-parallel --batch-invariant \
                   --max-batch-tokens --deadline --json";
    for option in options.split_whitespace() {
        assert!(done(&help).contains(option), "{option} is not in the help");
    }
    assert!(done(&help).contains("finish_reason"));
}

#[test]
fn json_has_a_line_for_each_prompt_in_their_order() {
    let model = Model::new();
    let ran = ringtp(
        "generate",
        model.path(),
        &[
            "--ids",
            "1,2,3",
            "--ids",
            "9",
            "--max-tokens",
            "5",
            "--ignore-eos",
            "--json",
        ],
    );
    let lines = lines(&ran);
    assert_eq!(lines.len(), 2);
    for (line, prompt_tokens) in lines.iter().zip([3, 1]) {
        let ids = numbers(&line["ids"]);
        assert_eq!(ids.len(), 5);
        assert!(ids.iter().all(|&id| id < VOCAB as u64));
        assert_eq!(line["text"], Value::Null);
        assert_eq!(line["finish_reason"], "length");
        let usage = json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 5,
            "total_tokens": prompt_tokens + 5,
        });
        assert_eq!(line["usage"], usage);
    }
    for word in [
        "prefill: 4 tokens",
        "decode: 8 tokens",
        "tokens/s",
        "collectives",
        "memory of rank 0: weights ",
        " + KV cache ",
    ] {
        assert!(ran.stderr.contains(word), "{word} is not in {}", ran.stderr);
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens_alone_and_in_company() {
    let model = Model::new();
    let sampled = [
        "--max-tokens",
        "20",
        "--ignore-eos",
        "--json",
        "--temperature",
        "1.5",
    ];
    let ids = |prompts: &[&str], more: &[&str]| {
        let prompts = prompts.iter().flat_map(|ids| ["--ids", ids]);
        let args: Vec<_> = prompts.chain(sampled).chain(more.iter().copied()).collect();
        let lines = lines(&ringtp("generate", model.path(), &args));
        lines
            .iter()
            .map(|line| numbers(&line["ids"]))
            .collect::<Vec<_>>()
    };
    let alone = ids(&["1,2,3,4,5"], &["--seed", "7"]);
    let company = ["1,2,3,4,5", "9,8,7", "1"];
    assert_eq!(ids(&company, &["--seed", "7"])[0], alone[0]);
    let chunked = ids(&company, &["--seed", "7", "--max-batch-tokens", "2"]);
    assert_eq!(chunked[0], alone[0]);
    assert_ne!(ids(&["1,2,3,4,5"], &["--seed", "8"]), alone);
}

#[test]
fn ids_are_streamed_as_ids_and_text_as_text() {
    let model = Model::new().with_tokenizer();
    let options = ["--max-tokens", "6", "--ignore-eos"];
    let ran = ringtp(
        "generate",
        model.path(),
        &[&["--ids", "1,2"][..], &options].concat(),
    );
    assert_eq!(
        done(&ran).trim_end().split(',').count(),
        6,
        "{}",
        ran.stdout
    );

    let text = |more: &[&str]| {
        let all = [&["--prompt", "Emma"][..], &options, more].concat();
        ringtp("generate", model.path(), &all)
    };
    let plain = text(&[]);
    let json = lines(&text(&["--json"]));
    assert_eq!(
        json[0]["text"].as_str().expect("text"),
        done(&plain).trim_end_matches('\n')
    );
    assert_eq!(json[0]["usage"]["prompt_tokens"], 5, "four letters and <s>");
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_printed() {
    let model = Model::new().with_tokenizer();
    let options = [
        "--prompt",
        "Emma",
        "--max-tokens",
        "12",
        "--ignore-eos",
        "--json",
    ];
    let whole = &lines(&ringtp("generate", model.path(), &options))[0];
    let text = whole["text"].as_str().expect("text");
    let stop: String = text.chars().skip(4).take(2).collect();
    let before = &text[..text.find(&stop).expect("it is there")];
    let args = [&options[..], &["--stop", &stop]].concat();
    let stopped = &lines(&ringtp("generate", model.path(), &args))[0];
    assert_eq!(stopped["text"], before);
    assert_eq!(stopped["finish_reason"], "stop");
}

#[test]
fn several_prompts_each_have_a_header() {
    let model = Model::new();
    let args = ["--ids", "1,2", "--ids", "3", "--max-tokens", "2"];
    let ran = ringtp("generate", model.path(), &args);
    for header in ["== prompt 0 (", "== prompt 1 ("] {
        assert!(done(&ran).contains(header), "{}", ran.stdout);
    }
}

#[test]
fn a_chat_is_the_rendered_template_with_its_own_special_tokens() {
    let model = Model::new().with_tokenizer();
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}";
    model.write_json(
        "tokenizer_config.json",
        &json!({"chat_template": template, "bos_token": {"content": "<s>"}}),
    );
    let args = [
        "--prompt",
        "hi",
        "--chat",
        "--system",
        "x",
        "--json",
        "--max-tokens",
        "1",
    ];
    let line = &lines(&ringtp("generate", model.path(), &args))[0];
    // <s>systemxuserhi, and not a second <s>.
    assert_eq!(line["usage"]["prompt_tokens"], 1 + "systemxuserhi".len());
}

#[test]
fn logits_are_a_safetensors_file_that_does_not_depend_on_chunks() {
    let model = Model::new();
    let ids: Vec<_> = (0..CONTEXT).map(|i| (i % VOCAB).to_string()).collect();
    let ids = ids.join(",");
    let write = |name: &str, rows: &str| {
        let out = model.file(name);
        let out = out.to_str().expect("UTF-8");
        let args = [
            "--ids",
            &ids,
            "--out",
            out,
            "--max-batch-tokens",
            rows,
            "--json",
        ];
        let report = &lines(&ringtp("logits", model.path(), &args))[0];
        assert_eq!(report["shape"], json!([CONTEXT, VOCAB]));
        fs::read(out).expect("a file")
    };
    let whole = write("a", "512");
    let file = safetensors::SafeTensors::deserialize(&whole).expect("safetensors");
    assert_eq!(file.names(), ["logits"]);
    let logits = file.tensor("logits").expect("the tensor");
    assert_eq!(logits.shape(), [CONTEXT, VOCAB]);
    assert_eq!(logits.dtype(), safetensors::Dtype::F32);
    let values = logits.data().as_chunks::<4>().0;
    assert!(
        values
            .iter()
            .all(|&bytes| f32::from_le_bytes(bytes).is_finite())
    );
    assert!(whole == write("b", "5"), "the same bits in chunks of five");
    let left: Vec<_> = fs::read_dir(model.path()).expect("a directory").collect();
    assert_eq!(
        left.len(),
        4,
        "config, weights, two files: no temporary ones"
    );
}

#[test]
fn shards_account_for_every_byte() {
    let model = Model::new();
    let ran = ringtp("shards", model.path(), &["--tp", "2", "--json"]);
    let report = &lines(&ran)[0];
    assert_eq!(
        (&report["tp"], &report["ranks_agree"]),
        (&json!(2), &json!(true))
    );
    assert_eq!(report["valid_tp"], json!([1, 2, 4]));
    let tensors = report["tensors"].as_array().expect("tensors");
    assert_eq!(tensors.len(), 21);
    for rank in 0..2 {
        let bytes = tensors
            .iter()
            .map(|t| t["ranks"][rank]["bytes"].as_u64().expect("bytes"));
        assert_eq!(report["ranks"][rank]["bytes"], bytes.sum::<u64>());
    }
    let q = tensors
        .iter()
        .find(|t| t["name"] == "model.layers.0.self_attn.q_proj.weight");
    let q = q.expect("a query projection");
    assert_eq!(q["shape"], json!([32, 32]));
    assert_eq!(
        q["ranks"][1],
        json!({"rank": 1, "slice": [[16, 32], [0, 32]], "bytes": 2048})
    );
    let table = ringtp("shards", model.path(), &["--tp", "4"]);
    for word in [
        "self_attn.k_proj.weight",
        "[16, 32]",
        "rank 3:",
        "every rank agrees",
    ] {
        assert!(
            done(&table).contains(word),
            "{word} is not in {}",
            table.stdout
        );
    }
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let model = Model::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ringtp"))
        .args(["generate", "--model", model.path().to_str().expect("UTF-8")])
        .args(["--ids", "1", "--max-tokens", "40", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ringtp starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !stderr.contains("panicked") && !stderr.contains("error"),
        "{stderr}"
    );
    assert_eq!(output.status.code(), Some(0));
}

/// Results go where the name leads: a link stays a link, and what is no regular file is written
/// to, never replaced (it may be /dev/null).
#[test]
fn logits_leave_links_and_pipes_in_place() {
    let model = Model::new();
    let logits = |out: &str| {
        let path = model.file(out);
        let path = path.to_str().expect("UTF-8");
        ringtp("logits", model.path(), &["--ids", "1,2", "--out", path])
    };
    done(&logits("plain"));
    let expected = fs::read(model.file("plain")).expect("read");

    fs::write(model.file("target"), "old").expect("written");
    std::os::unix::fs::symlink("target", model.file("link")).expect("linked");
    done(&logits("link"));
    let link = fs::symlink_metadata(model.file("link")).expect("there");
    assert!(link.is_symlink());
    assert_eq!(fs::read(model.file("target")).expect("read"), expected);

    let pipe = model.file("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo").success());
    let reader = Command::new("cat")
        .arg(&pipe)
        .stdout(Stdio::piped())
        .spawn()
        .expect("cat");
    let ran = logits("pipe");
    let read = reader.wait_with_output().expect("cat ends").stdout;
    done(&ran);
    assert_eq!(read, expected);
    // A name as long as a name may be.
    done(&logits(&"n".repeat(255)));
    let names = fs::read_dir(model.path()).expect("a directory");
    let left = names.filter(|name| {
        let name = name.as_ref().expect("an entry").file_name();
        name.to_string_lossy().ends_with(".tmp")
    });
    assert_eq!(left.count(), 0, "temporary files are gone");
}

/// `eprintln!` would panic, with exit code 101.
#[test]
fn an_error_that_cannot_be_told_still_has_its_exit_code() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full");
    let status = Command::new(env!("CARGO_BIN_EXE_ringtp"))
        .args(["shards", "--model", "/no/such/model"])
        .stderr(full.expect("/dev/full"))
        .status()
        .expect("ringtp starts");
    assert_eq!(status.code(), Some(2));
}

#[cfg(not(feature = "cuda"))]
#[test]
fn doctor_of_a_program_without_cuda_says_what_to_build() {
    let ran = run(&["doctor"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stdout.contains("--features cuda"), "{}", ran.stdout);
}
