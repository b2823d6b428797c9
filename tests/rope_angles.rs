//! The angles of the rotary embedding, against the formulas of the papers in f64.
//!
//! A table entry is the cosine or sine of an f32 angle: a product of the position and of a
//! frequency, each rounded (the frequency after up to six roundings). So it may be off by
//! `8 * 2^-24` of the angle, and by `2^-23` for its own rounding.

use std::f64::consts::PI;

use approx::{abs_diff_eq, assert_abs_diff_eq};
use ringtp::checkpoint::LlamaConfig;
use ringtp::llama::{Batch, Rope};
use serde_json::{Value, json};

const HEAD_DIM: usize = 16;
const THETA: f64 = 10_000.0;
const CONTEXT: usize = 64;
const POSITIONS: [u32; 6] = [0, 1, 7, 63, 64, 200];

fn config(rope: Value) -> LlamaConfig {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "head_dim": HEAD_DIM, "vocab_size": 64,
        "max_position_embeddings": CONTEXT, "rope_parameters": rope,
    });
    LlamaConfig::from_json("test", &config.to_string()).expect("a configuration")
}

/// The plain frequency of pair `i`.
fn plain(i: usize) -> f64 {
    THETA.powf(-2.0 * i as f64 / HEAD_DIM as f64)
}

/// Whether the tables of a row at `position`, of a sequence whose prompt has `prompt_len`, are
/// those of `frequency(i)`, times `factor`.
fn agrees(
    rope: &Rope,
    position: u32,
    prompt_len: u32,
    factor: f64,
    frequency: impl Fn(usize) -> f64,
) -> bool {
    let mut batch = Batch::new();
    batch.push(&[0], position, prompt_len, &[0]);
    let tables = rope.tables(&batch);
    assert_eq!(tables.cos.len(), HEAD_DIM / 2);
    assert_eq!(tables.sin.len(), HEAD_DIM / 2);
    (0..HEAD_DIM / 2).all(|i| {
        let angle = f64::from(position) * frequency(i);
        let bound = factor * (angle * 8.0 * 2f64.powi(-24) + 2f64.powi(-23));
        abs_diff_eq!(
            f64::from(tables.cos[i]),
            factor * angle.cos(),
            epsilon = bound
        ) && abs_diff_eq!(
            f64::from(tables.sin[i]),
            factor * angle.sin(),
            epsilon = bound
        )
    })
}

#[test]
fn default_and_linear_turn_by_position_over_factor() {
    let default = Rope::new(&config(
        json!({"rope_type": "default", "rope_theta": THETA}),
    ));
    let linear = Rope::new(&config(
        json!({"rope_type": "linear", "rope_theta": THETA, "factor": 2.5}),
    ));
    for position in POSITIONS {
        assert!(agrees(&default, position, 1, 1.0, plain), "{position}");
        assert!(
            agrees(&linear, position, 1, 1.0, |i| plain(i) / 2.5),
            "{position}"
        );
    }
    // The comparison sees a wrong formula.
    assert!(!agrees(&linear, 7, 1, 1.0, plain));
    assert!(!agrees(&default, 7, 1, 1.0, |i| plain(i) * 1.001));
}

#[test]
fn dynamic_grows_its_base_with_the_longer_of_prompt_and_sequence() {
    let factor = 4.0;
    let rope = Rope::new(&config(
        json!({"rope_type": "dynamic", "rope_theta": THETA, "factor": factor}),
    ));
    let grown = |length: f64| {
        let d = HEAD_DIM as f64;
        let ratio = factor * length / CONTEXT as f64 - (factor - 1.0);
        let theta = THETA * ratio.powf(d / (d - 2.0));
        move |i: usize| theta.powf(-2.0 * i as f64 / d)
    };
    assert!(agrees(&rope, 5, 20, 1.0, plain), "within the context");
    assert!(
        agrees(&rope, 63, 20, 1.0, plain),
        "the last position of the context"
    );
    assert!(agrees(&rope, 64, 20, 1.0, grown(65.0)), "the first beyond");
    assert!(
        agrees(&rope, 5, 100, 1.0, grown(100.0)),
        "early in a long prompt"
    );
    assert!(!agrees(&rope, 5, 100, 1.0, plain));
}

#[test]
fn llama3_divides_long_waves_keeps_short_ones_and_blends_between() {
    let (factor, low, high, original) = (8.0, 1.0, 4.0, 32.0);
    let rope = Rope::new(&config(json!({
        "rope_type": "llama3", "rope_theta": THETA, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": 32,
    })));
    let mut kinds = [0; 3];
    let frequencies: Vec<_> = (0..HEAD_DIM / 2)
        .map(|i| {
            let turns = original * plain(i) / (2.0 * PI);
            let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            kinds[if keep == 0.0 {
                0
            } else if keep == 1.0 {
                1
            } else {
                2
            }] += 1;
            plain(i) * (keep + (1.0 - keep) / factor)
        })
        .collect();
    assert!(
        kinds.iter().all(|&count| count > 0),
        "each kind occurs: {kinds:?}"
    );
    for position in POSITIONS {
        assert!(
            agrees(&rope, position, 1, 1.0, |i| frequencies[i]),
            "{position}"
        );
    }
}

#[test]
fn yarn_scales_cosines_and_sines_and_interpolates_slow_dimensions() {
    let factor = 4.0_f64;
    let rope = Rope::new(&config(json!({
        "rope_type": "yarn", "rope_theta": THETA, "factor": factor,
        "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 0.5,
    })));
    let d = HEAD_DIM as f64;
    let dimension = |turns: f64| d * (64.0 / (turns * 2.0 * PI)).ln() / (2.0 * THETA.ln());
    let (first, last) = (dimension(4.0).floor().max(0.0), dimension(0.5).ceil());
    let frequency = |i: usize| {
        let ramp = ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
        plain(i) * (1.0 - ramp) + plain(i) / factor * ramp
    };
    let attention_factor = 0.1 * factor.ln() + 1.0;
    for position in POSITIONS {
        assert!(
            agrees(&rope, position, 1, attention_factor, frequency),
            "{position}"
        );
    }
    let mut batch = Batch::new();
    batch.push(&[0], 9, 1, &[0]);
    let tables = rope.tables(&batch);
    for (cos, sin) in tables.cos.iter().zip(&tables.sin) {
        let length = f64::from(cos.hypot(*sin));
        assert_abs_diff_eq!(length, attention_factor, epsilon = 4.0 * 2f64.powi(-23));
    }
}
