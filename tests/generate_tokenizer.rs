//! Ids, texts and rendered chats are those of Hugging Face transformers.

use std::fs;
use std::path::Path;

use ringtp::generate::{ChatTemplate, Message, TextStream, Tokenizer};
use serde_json::Value;

fn fixture() -> (&'static Path, Value) {
    let dir = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/llama/chat"
    ));
    let golden = fs::read_to_string(dir.join("tokenizer_golden.json")).expect("the fixture");
    (dir, serde_json::from_str(&golden).expect("JSON"))
}

fn list<'a>(value: &'a Value, name: &str) -> &'a Vec<Value> {
    let list = value[name].as_array().expect("a list");
    assert!(!list.is_empty(), "{name} is empty");
    list
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("a list of ids").iter();
    ids.map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().expect("a text")
}

#[test]
fn texts_become_the_same_ids() {
    let (dir, golden) = fixture();
    let tokenizer = Tokenizer::open(dir).expect("a tokenizer");
    for case in list(&golden, "encode") {
        let input = text(case, "text");
        let encoded = tokenizer.encode(input).expect("encoded");
        assert_eq!(encoded, ids(&case["ids"]), "{input:?}");
        let bare = tokenizer.encode_rendered(input).expect("encoded");
        assert_eq!(bare, ids(&case["ids_without_special_tokens"]), "{input:?}");
    }
}

#[test]
fn ids_become_the_same_text_at_once_and_one_by_one() {
    let (dir, golden) = fixture();
    let tokenizer = Tokenizer::open(dir).expect("a tokenizer");
    for case in list(&golden, "decode") {
        let (input, expected) = (ids(&case["ids"]), text(case, "text_without_special_tokens"));
        assert_eq!(tokenizer.decode(&input).expect("decoded"), expected);
        let mut stream = TextStream::new(&tokenizer, &[]).expect("a stream");
        let mut streamed = String::new();
        for &id in &input {
            stream.push(id, &mut streamed).expect("decoded");
        }
        stream.finish(&mut streamed).expect("decoded");
        assert_eq!(streamed, expected, "{input:?}");
    }
}

#[test]
fn chats_become_the_same_prompts_and_ids() {
    let (dir, golden) = fixture();
    let tokenizer = Tokenizer::open(dir).expect("a tokenizer");
    let template = ChatTemplate::open(dir).expect("a template");
    for case in list(&golden, "chat") {
        let message = |m: &Value| Message::new(text(m, "role"), text(m, "content"));
        let messages: Vec<_> = list(case, "messages").iter().map(message).collect();
        let open = case["add_generation_prompt"].as_bool().expect("a flag");
        let prompt = template.render(&messages, open).expect("rendered");
        assert_eq!(prompt, text(case, "prompt"));
        let encoded = tokenizer.encode_rendered(&prompt).expect("encoded");
        assert_eq!(encoded, ids(&case["ids"]));
    }
}

/// A tokenizer saved after training may say that texts are cut and filled up; prompts are not.
#[test]
fn settings_of_truncation_and_padding_do_not_touch_a_prompt() {
    let (dir, golden) = fixture();
    let file = fs::read_to_string(dir.join("tokenizer.json")).expect("the fixture");
    let mut json: Value = serde_json::from_str(&file).expect("JSON");
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    });
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    });
    let changed = tempfile::tempdir().expect("a directory");
    fs::write(changed.path().join("tokenizer.json"), json.to_string()).expect("written");
    let tokenizer = Tokenizer::open(changed.path()).expect("a tokenizer");
    let plain = Tokenizer::open(dir).expect("a tokenizer");
    let mut longest = 0;
    for case in list(&golden, "encode") {
        let encoded = tokenizer.encode(text(case, "text")).expect("encoded");
        assert_eq!(encoded, plain.encode(text(case, "text")).expect("encoded"));
        longest = longest.max(encoded.len());
    }
    assert!((4..200).contains(&longest), "{longest}: both would show");
}
