//! What transformers' processors keep, and how probable it is, is what is drawn here: see
//! tests/fixtures/README.md for the rows.

use std::path::Path;

use ringtp::backend::cpu::sampling::record;
use ringtp::llama::SampleRow;
use ringtp::llama::sampling::{Choice, Record, choose};
use safetensors::SafeTensors;

const DRAWS: u64 = 50_000;
/// Expected counts from which the chi-square distribution is a good one.
const FEW: f64 = 50.0;

fn token(logits: &[f32], row: &SampleRow) -> u32 {
    let shards = [
        (0, &logits[..13]),
        (13, &logits[13..30]),
        (30, &logits[30..]),
    ];
    let form = Record::first(row, 20);
    let records = shards.map(|(first_id, shard)| {
        let mut words = vec![0; form.words()];
        record(shard, first_id, row, form, &mut words);
        words
    });
    match choose(0, row, form, &records.each_ref().map(Vec::as_slice)) {
        Ok(Choice::Token(id)) => id,
        other => panic!("{other:?}"),
    }
}

/// Pearson's statistic over the cells, those with few expected counts taken together, and the
/// limit that it passes with probability below 1e-6 (Laurent and Massart 2000, lemma 1).
fn chi_square(counts: &[u64], probs: &[f32]) -> (f64, f64) {
    let (mut sum, mut cells, mut rest) = (0.0, 0.0f64, (0.0, 0.0));
    let n = DRAWS as f64;
    let term = |count: f64, expected: f64| (count - expected).powi(2) / expected;
    for (&count, &p) in counts.iter().zip(probs) {
        let (count, expected) = (count as f64, n * f64::from(p));
        if expected < FEW {
            rest = (rest.0 + count, rest.1 + expected);
        } else {
            sum += term(count, expected);
            cells += 1.0;
        }
    }
    if rest.1 >= FEW {
        sum += term(rest.0, rest.1);
        cells += 1.0;
    }
    let (d, t) = (cells - 1.0, 1e6f64.ln());
    (sum, d + 2.0 * (d * t).sqrt() + 2.0 * t)
}

#[test]
fn draws_have_the_probabilities_of_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sampling.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str| tensors.tensor(name).unwrap().data().to_vec();
    let floats = |name: &str| -> Vec<f32> {
        let data = data(name);
        let chunks = data.as_chunks().0.iter();
        chunks.map(|&bytes| f32::from_le_bytes(bytes)).collect()
    };
    let integers = |name: &str| -> Vec<i64> {
        let data = data(name);
        let chunks = data.as_chunks().0.iter();
        chunks.map(|&bytes| i64::from_le_bytes(bytes)).collect()
    };
    let (logits, probs) = (floats("logits"), floats("probs"));
    let (temperature, penalty) = (floats("temperature"), floats("repetition_penalty"));
    let (top_p, min_p) = (floats("top_p"), floats("min_p"));
    let (top_k, seen) = (integers("top_k"), integers("seen"));
    assert_eq!(temperature.len(), 22);
    for (i, (logits, probs)) in logits.chunks(50).zip(probs.chunks(50)).enumerate() {
        let mut penalized: Vec<u32> = seen[6 * i..][..6].iter().map(|&id| id as u32).collect();
        penalized.sort_unstable();
        penalized.dedup();
        let mut row = SampleRow {
            temperature: temperature[i],
            top_k: top_k[i] as usize,
            top_p: top_p[i],
            min_p: min_p[i],
            repetition_penalty: penalty[i],
            penalized,
            banned: Vec::new(),
            seed: 5,
            draw: 0,
        };
        let mut counts = vec![0u64; 50];
        for draw in 0..DRAWS {
            row.draw = draw;
            counts[token(logits, &row) as usize] += 1;
        }
        for (id, (&count, &p)) in counts.iter().zip(probs).enumerate() {
            assert!(
                p > 0.0 || count == 0,
                "row {i}, {row:?}: {id} was not removed"
            );
        }
        let (found, limit) = chi_square(&counts, probs);
        assert!(found < limit, "row {i}, {row:?}: {found} above {limit}");
        // The control: at another temperature they do not fit, unless one token takes nearly all.
        row.temperature *= 1.3;
        let mut counts = vec![0u64; 50];
        for draw in 0..DRAWS {
            row.draw = draw;
            counts[token(logits, &row) as usize] += 1;
        }
        let (found, limit) = chi_square(&counts, probs);
        let certain = probs.iter().any(|&p| p > 0.9);
        assert!(certain || found > limit, "row {i}: {found} below {limit}");
    }
}
