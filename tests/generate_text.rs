//! Streamed text is the final text, whatever characters the tokens cut; stop strings are found
//! across tokens and no part of them is ever streamed.
//!
//! The tokenizer has one token a byte, so every character beyond ASCII is several tokens.

use std::ops::ControlFlow;
use std::sync::OnceLock;

use proptest::prelude::*;
use ringtp::Result;
use ringtp::checkpoint::GenerationConfig;
use ringtp::generate::{
    Completion, Engine, Event, FinishReason, Request, SamplingParams, TextStream, Tokenizer, run,
};
use ringtp::llama::{Batch, Limits, SampleRow};
use serde_json::json;

/// The end-of-text id, a special token beside the 256 bytes.
const EOS: u32 = 256;

/// The letters that a byte-level vocabulary writes for bytes: itself where it is printable,
/// else the next letter from 256.
fn letters() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let letter = |byte: u32| {
        let code = match printable(byte) {
            true => byte,
            false => {
                next += 1;
                next - 1
            }
        };
        char::from_u32(code).expect("a letter")
    };
    (0..256).map(letter).collect()
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let vocab: serde_json::Map<String, serde_json::Value> = letters()
            .into_iter()
            .enumerate()
            .map(|(byte, letter)| (letter.to_string(), json!(byte)))
            .collect();
        let level = json!({"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": false});
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [{"id": EOS, "content": "<end>", "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": level, "post_processor": null, "decoder": level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": []}
        });
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).expect("written");
        Tokenizer::open(dir.path()).expect("a tokenizer")
    })
}

/// Says a given text, then EOS for ever.
struct Parrot(Vec<u8>, usize);

impl Engine for Parrot {
    fn limits(&self) -> Limits {
        Limits {
            vocab_size: 257,
            max_model_len: 1000,
            num_blocks: 100,
            block_size: 16,
        }
    }

    fn step(&mut self, batch: &Batch, _: &[SampleRow]) -> Result<Vec<u32>> {
        let say = |&row: &u32| {
            let place = batch.positions[row as usize] as usize + 1 - self.1;
            self.0.get(place).map_or(EOS, |&byte| byte.into())
        };
        Ok(batch.logits_rows.iter().map(say).collect())
    }
}

fn say(text: &[u8], params: &SamplingParams) -> (Completion, Vec<String>) {
    let tokenizer = tokenizer();
    let prompt = tokenizer.encode("Ünd: ").expect("encoded");
    let request = Request {
        sampling: params
            .resolve(&GenerationConfig::default(), &[EOS])
            .expect("valid"),
        tokenizer: Some(tokenizer),
        prompt,
    };
    let mut engine = Parrot(text.to_vec(), request.prompt.len());
    let mut pieces = Vec::new();
    let mut listen = |event: Event<'_>| {
        if let Event::Token { text, .. } = event {
            pieces.push(text.to_string());
        }
        ControlFlow::Continue(())
    };
    let (mut done, _) = run(&mut engine, 64, &[request], &mut listen).expect("served");
    (done.remove(0), pieces)
}

proptest! {
    #[test]
    fn streamed_text_is_the_text(text in "[a é€😀\\n]{0,30}") {
        let (done, pieces) = say(text.as_bytes(), &SamplingParams::default());
        prop_assert_eq!(pieces.concat(), text.clone());
        prop_assert_eq!(done.text.as_deref(), Some(text.as_str()));
        prop_assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        prop_assert_eq!(done.finish_reason, FinishReason::Stop);
        prop_assert_eq!(done.usage.completion_tokens, text.len() + 1);
    }

    #[test]
    fn bytes_that_are_no_text_neither_panic_nor_get_stuck(
        bytes in prop::collection::vec(any::<u8>(), 0..60),
    ) {
        let (done, pieces) = say(&bytes, &SamplingParams::default());
        prop_assert_eq!(done.text, Some(pieces.concat()));
    }

    #[test]
    fn stop_strings_are_found_across_tokens(
        text in "[ab€]{0,20}",
        stop in prop::collection::vec("[ab€]{1,3}", 1..3),
    ) {
        let params = SamplingParams { stop: stop.clone(), ..SamplingParams::default() };
        let (done, pieces) = say(text.as_bytes(), &params);
        // The stop string that is complete first, of several the longest.
        let found = (0..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
            let ends = stop.iter().filter(|stop| text[..end].ends_with(*stop));
            ends.map(String::len).max().map(|longest| end - longest)
        });
        prop_assert_eq!(pieces.concat(), &text[..found.unwrap_or(text.len())]);
        prop_assert_eq!(done.text, Some(pieces.concat()));
        prop_assert_eq!(done.finish_reason, FinishReason::Stop);
    }

    #[test]
    fn any_ids_decode_without_a_panic(ids in prop::collection::vec(257..=u32::MAX, 0..40)) {
        let mut stream = TextStream::new(tokenizer(), &ids).expect("a stream");
        let mut out = String::new();
        for &id in &ids {
            stream.push(id, &mut out).expect("decoded");
        }
        stream.finish(&mut out).expect("decoded");
        prop_assert_eq!(out, "");
    }
}

#[test]
fn a_text_that_is_cut_within_a_character_shows_that() {
    let params = SamplingParams::default().max_tokens(3);
    let (done, pieces) = say("a€".as_bytes(), &params);
    assert_eq!(done.text.as_deref(), Some("a\u{fffd}"));
    assert_eq!(pieces, ["a", "", "\u{fffd}"]);
    assert_eq!(done.finish_reason, FinishReason::Length);
}

#[test]
fn stop_ids_and_ignored_ends() {
    let stop = SamplingParams::default().stop_id(b'c'.into());
    let (done, _) = say(b"abcd", &stop);
    assert_eq!(done.text.as_deref(), Some("ab"));
    assert_eq!(done.ids, b"abc".map(u32::from));
    let on = SamplingParams::default().ignore_eos(true).max_tokens(6);
    let (done, _) = say(b"abcd", &on);
    assert_eq!(done.ids, [97, 98, 99, 100, EOS, EOS]);
    assert_eq!(done.text.as_deref(), Some("abcd"));
    assert_eq!(done.finish_reason, FinishReason::Length);
}

#[test]
fn decoding_token_by_token_would_be_caught() {
    let ids = tokenizer().encode("é").expect("encoded");
    let alone = |id: &u32| tokenizer().decode(&[*id]).expect("decoded");
    assert_ne!(ids.iter().map(alone).collect::<String>(), "é");
}
