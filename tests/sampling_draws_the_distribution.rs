//! The token drawn is distributed as the softmax says: by Pearson's chi-square at fixed seeds.

use ringtp::backend::cpu::sampling::record;
use ringtp::llama::SampleRow;
use ringtp::llama::sampling::{Choice, Record, choose};

const DRAWS: u64 = 200_000;
const LOGITS: [f32; 12] = [
    1.5, -0.7, 0.0, 2.1, 0.3, 0.3, -1.9, 1.0, 0.8, -0.2, 2.0, -2.5,
];

/// Above this a chi-square number of `d` degrees of freedom comes with probability below 1e-6:
/// Laurent and Massart (2000), lemma 1, `P(X - d >= 2 sqrt(d t) + 2 t) <= exp(-t)`.
fn limit(d: usize) -> f64 {
    let (d, t) = (d as f64, 1e6f64.ln());
    d + 2.0 * (d * t).sqrt() + 2.0 * t
}

/// How far `counts` are from `probabilities`, and the limit.
fn chi_square(counts: &[u64], probabilities: &[f64]) -> (f64, f64) {
    let n = counts.iter().sum::<u64>() as f64;
    let mut sum = 0.0;
    for (&count, &p) in counts.iter().zip(probabilities) {
        if p == 0.0 {
            assert_eq!(count, 0, "what is not kept is never drawn");
            continue;
        }
        assert!(
            n * p >= 50.0,
            "the statistic is chi-square only for large counts"
        );
        sum += (count as f64 - n * p).powi(2) / (n * p);
    }
    let cells = probabilities.iter().filter(|&&p| p > 0.0).count();
    (sum, limit(cells - 1))
}

/// softmax(LOGITS / temperature) over the ids that `keep` names.
fn softmax(temperature: f64, keep: impl Fn(usize) -> bool) -> Vec<f64> {
    let weight = |i: usize| match keep(i) {
        true => (f64::from(LOGITS[i]) / temperature).exp(),
        false => 0.0,
    };
    let weights: Vec<_> = (0..LOGITS.len()).map(weight).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

fn token(row: &SampleRow) -> u32 {
    let form = Record::first(row, LOGITS.len());
    let mut records = Vec::new();
    for (first_id, shard) in [(0, &LOGITS[..5]), (5, &LOGITS[5..7]), (7, &LOGITS[7..])] {
        let mut words = vec![0; form.words()];
        record(shard, first_id, row, form, &mut words);
        records.push(words);
    }
    let gathered: Vec<_> = records.iter().map(Vec::as_slice).collect();
    match choose(0, row, form, &gathered) {
        Ok(Choice::Token(id)) => id,
        other => panic!("{other:?}"),
    }
}

fn counts(row: &SampleRow, rekey: impl Fn(&mut SampleRow, u64)) -> Vec<u64> {
    let mut counts = vec![0; LOGITS.len()];
    let mut row = row.clone();
    for n in 0..DRAWS {
        rekey(&mut row, n);
        counts[token(&row) as usize] += 1;
    }
    counts
}

fn row(temperature: f32) -> SampleRow {
    SampleRow {
        temperature,
        seed: 20_240_229,
        ..SampleRow::greedy()
    }
}

#[test]
fn draws_follow_the_softmax() {
    let by_draw = |row: &mut SampleRow, n| row.draw = n;
    let by_seed = |row: &mut SampleRow, n| row.seed = n;
    for temperature in [0.7f32, 1.0, 1.3] {
        let expected = softmax(temperature.into(), |_| true);
        for counts in [
            counts(&row(temperature), by_draw),
            counts(&row(temperature), by_seed),
        ] {
            let (found, limit) = chi_square(&counts, &expected);
            assert!(found < limit, "T {temperature}: {found} above {limit}");
        }
    }
}

#[test]
fn draws_after_filters_follow_the_softmax_of_what_is_kept() {
    let by_draw = |row: &mut SampleRow, n| row.draw = n;
    // The order is 3, 10, 0, 7, 8, 4, 5, ..
    let cases = [
        (
            SampleRow {
                top_k: 6,
                ..row(1.0)
            },
            vec![3, 10, 0, 7, 8, 4, 5],
        ),
        (
            SampleRow {
                top_p: 0.6,
                ..row(1.0)
            },
            vec![3, 10, 0],
        ),
        (
            SampleRow {
                min_p: 0.3,
                ..row(1.0)
            },
            vec![3, 10, 0, 7],
        ),
    ];
    for (row, kept) in cases {
        let expected = softmax(1.0, |i| kept.contains(&i));
        let (found, limit) = chi_square(&counts(&row, by_draw), &expected);
        assert!(found < limit, "{row:?}: {found} above {limit}");
    }
}

#[test]
fn the_test_catches_biased_samplers() {
    let expected = softmax(1.0, |_| true);
    // A temperature 3 % off.
    let warm = counts(&row(1.03), |row, n| row.draw = n);
    let (found, limit) = chi_square(&warm, &expected);
    assert!(found > limit, "warm: {found} below {limit}");
    // One token in a hundred replaced by the most probable.
    let lazy = counts(&row(1.0), |row, n| {
        row.draw = n;
        row.top_k = usize::from(n % 100 == 0);
    });
    let (found, limit) = chi_square(&lazy, &expected);
    assert!(found > limit, "lazy: {found} below {limit}");
}
