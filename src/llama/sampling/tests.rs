//! The whole way, records and merging, against a plain oracle.

use proptest::prelude::*;

use super::merge::{Choice, choose, kept};
use super::{Candidate, Gumbel, Record, SamplingError, mass::Mass};
use crate::backend::cpu::sampling::record;
use crate::llama::SampleRow;

/// Cuts closer to a cumulative mass or a ratio than this may round either way.
const MARGIN: f64 = 1e-9;

/// The logits after penalty and bans, as transformers computes them, in f32.
fn processed(logits: &[f32], row: &SampleRow) -> Vec<f32> {
    let mut out = logits.to_vec();
    for &id in &row.penalized {
        let l = &mut out[id as usize];
        *l = if *l < 0.0 {
            *l * row.repetition_penalty
        } else {
            (*l / row.repetition_penalty).min(f32::MAX)
        };
    }
    for &id in &row.banned {
        out[id as usize] = f32::NEG_INFINITY;
    }
    out
}

/// The ids that the filters keep, best first, by full sorts and f64 sums; and whether no cut was
/// within the margin.
fn oracle_kept(logits: &[f32], row: &SampleRow) -> (Vec<u32>, bool) {
    let logits = processed(logits, row);
    let mut ids: Vec<u32> = (0..logits.len() as u32)
        .filter(|&id| logits[id as usize] > f32::NEG_INFINITY)
        .collect();
    let at = |id: u32| f64::from(logits[id as usize]);
    ids.sort_by(|&a, &b| at(b).total_cmp(&at(a)).then(a.cmp(&b)));
    let Some(&first) = ids.first() else {
        return (ids, true);
    };
    let weight = |id: u32| ((at(id) - at(first)) / f64::from(row.temperature)).exp();
    let mut clear = true;
    if row.top_k > 0 && row.top_k < ids.len() {
        let last = at(ids[row.top_k - 1]);
        ids.retain(|&id| at(id) >= last);
    }
    if row.top_p < 1.0 {
        let p = f64::from(row.top_p);
        let total: f64 = ids.iter().map(|&id| weight(id)).sum();
        let (mut sum, mut kept) = (0.0, Vec::new());
        for &id in &ids {
            kept.push(id);
            sum += weight(id);
            clear &= (sum / total - p).abs() > MARGIN;
            if sum / total >= p {
                break;
            }
        }
        ids = kept;
    }
    let min_p = f64::from(row.min_p);
    clear &= min_p == 0.0
        || ids
            .iter()
            .all(|&id| (weight(id) - min_p).abs() > MARGIN * min_p);
    ids.retain(|&id| id == first || weight(id) >= min_p);
    (ids, clear)
}

/// The token that the oracle draws, and whether by more than rounding.
fn oracle_draw(logits: &[f32], row: &SampleRow, kept: &[u32]) -> (u32, bool) {
    let logits = processed(logits, row);
    let gumbel = Gumbel::new(row.seed, row.draw);
    let mut values: Vec<_> = kept
        .iter()
        .map(|&id| {
            let l = f64::from(logits[id as usize]) / f64::from(row.temperature);
            (l + gumbel.of(id), id)
        })
        .collect();
    values.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let clear = values.len() < 2 || values[0].0 > values[1].0;
    (values[0].1, clear)
}

/// What the ranks that hold `shards` come to, in how many rounds.
fn sharded(shards: &[&[f32]], row: &SampleRow) -> Result<(u32, usize), SamplingError> {
    let largest = shards.iter().map(|shard| shard.len()).max().unwrap();
    let mut form = Record::first(row, largest);
    for round in 1.. {
        let mut first_id = 0;
        let records: Vec<Vec<u32>> = shards
            .iter()
            .map(|shard| {
                let mut out = vec![0xDEAD_BEEF; form.words()];
                record(shard, first_id, row, form, &mut out);
                first_id += shard.len();
                out
            })
            .collect();
        let gathered: Vec<_> = records.iter().map(Vec::as_slice).collect();
        match choose(5, row, form, &gathered)? {
            Choice::Token(id) => return Ok((id, round)),
            Choice::More(longer) => {
                assert!(longer.words() > form.words(), "rounds must end");
                form = longer;
            }
        }
    }
    unreachable!()
}

/// `logits` cut at `cuts`.
fn split<'a>(logits: &'a [f32], cuts: &[usize]) -> Vec<&'a [f32]> {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (logits.len() + 1)).collect();
    cuts.sort_unstable();
    let mut start = 0;
    let mut shards = Vec::new();
    for end in cuts.into_iter().chain([logits.len()]) {
        shards.push(&logits[start..end]);
        start = end;
    }
    shards
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    let smooth = -12f32..12.0;
    let ties = (-3i8..4).prop_map(f32::from);
    let huge = prop_oneof![-f32::MAX..f32::MAX, -1e4f32..1e4];
    let holes = prop_oneof![2 => -4f32..4.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(-0.0f32)];
    prop_oneof![
        proptest::collection::vec(smooth, 1..700),
        proptest::collection::vec(ties, 1..700),
        proptest::collection::vec(huge, 1..300),
        proptest::collection::vec(holes, 1..300),
    ]
}

fn rows() -> impl Strategy<Value = SampleRow> {
    let temperature = prop_oneof![1 => Just(0.0f32), 6 => 0.05f32..3.0, 1 => 1e-6f32..1e-3];
    let top_k = prop_oneof![Just(0usize), 1usize..90, 1usize..1000];
    let top_p = prop_oneof![Just(1.0f32), 0.0f32..1.0, Just(0.5f32)];
    let min_p = prop_oneof![Just(0.0f32), 1e-6f32..1.0];
    let penalty = prop_oneof![Just(1.0f32), 0.2f32..3.0];
    let ids = || proptest::collection::btree_set(0u32..700, 0..30);
    (
        (temperature, top_k, top_p, min_p, penalty),
        ids(),
        ids(),
        any::<u64>(),
        any::<u64>(),
    )
        .prop_map(
            |((temperature, top_k, top_p, min_p, penalty), penalized, banned, seed, draw)| {
                SampleRow {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty: penalty,
                    penalized: penalized.into_iter().collect(),
                    banned: banned.into_iter().collect(),
                    seed,
                    draw,
                }
            },
        )
}

/// `row` with no ids past the vocabulary, which the oracle does not expect.
fn within(mut row: SampleRow, vocab_size: usize) -> SampleRow {
    row.penalized.retain(|&id| (id as usize) < vocab_size);
    row.banned.retain(|&id| (id as usize) < vocab_size);
    row
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_split_chooses_what_one_rank_chooses(
        logits in logits(),
        row in rows(),
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
    ) {
        let one = sharded(&[&logits], &row).map(|(id, _)| id);
        let many = sharded(&split(&logits, &cuts), &row).map(|(id, _)| id);
        prop_assert_eq!(many, one);
    }

    #[test]
    fn the_token_is_the_oracles(
        logits in logits(),
        row in rows(),
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
    ) {
        let row = within(row, logits.len());
        let found = sharded(&split(&logits, &cuts), &row).map(|(id, _)| id);
        if row.temperature == 0.0 {
            let all = SampleRow { top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.0, ..row.clone() };
            let expected = oracle_kept(&logits, &all).0.first().copied();
            prop_assert_eq!(found.ok(), expected);
            return Ok(());
        }
        let (kept, clear) = oracle_kept(&logits, &row);
        if kept.is_empty() {
            prop_assert_eq!(found, Err(SamplingError::NoCandidate { row: 5 }));
        } else if clear {
            let (expected, clear) = oracle_draw(&logits, &row, &kept);
            prop_assert!(!clear || found == Ok(expected), "{found:?}, oracle {expected}");
        }
    }

    #[test]
    fn the_kept_set_is_the_oracles(logits in logits(), row in rows(), shown in 1usize..700) {
        let mut row = within(row, logits.len());
        row.temperature = row.temperature.max(1e-6);
        let (expected, clear) = oracle_kept(&logits, &row);
        prop_assume!(clear);
        let mut candidates: Vec<_> = (0..)
            .zip(processed(&logits, &row))
            .filter(|(_, l)| *l > f32::NEG_INFINITY)
            .map(|(id, l)| Candidate::new(l, id))
            .collect();
        // `choose` reports a row without candidates before it asks what is kept.
        prop_assume!(!candidates.is_empty());
        candidates.sort_unstable();
        let mut total = Mass::EMPTY;
        for candidate in &candidates {
            total.add_exp(f64::from(candidate.logit()) / f64::from(row.temperature));
        }
        let ids = |n: usize| candidates[..n].iter().map(|c| c.id()).collect::<Vec<_>>();
        let found = kept(&row, &candidates, true, &total).unwrap();
        prop_assert_eq!(ids(found), expected);
        // A head of the candidates gives the same answer or none.
        if shown < candidates.len()
            && let Some(head) = kept(&row, &candidates[..shown], false, &total)
        {
            prop_assert_eq!(head, found);
        }
    }
}

fn sampled() -> SampleRow {
    SampleRow {
        temperature: 1.0,
        seed: 11,
        ..SampleRow::greedy()
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    let logits = [1.0f32, 3.0, -0.0, 3.0, 3.0];
    for cut in 0..=5 {
        let (left, right) = logits.split_at(cut);
        assert_eq!(sharded(&[left, right], &SampleRow::greedy()), Ok((1, 1)));
    }
    let zeros = [-0.0f32, 0.0];
    assert_eq!(sharded(&[&zeros], &SampleRow::greedy()), Ok((0, 1)));
}

#[test]
fn top_k_keeps_ties_with_its_last() {
    let logits = [2.0f32, 1.0, 1.0, 1.0, 0.0];
    let mut seen = std::collections::BTreeSet::new();
    for draw in 0..500 {
        let row = SampleRow {
            top_k: 2,
            draw,
            ..sampled()
        };
        seen.insert(sharded(&[&logits[..2], &logits[2..]], &row).unwrap().0);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn flat_rows_escalate_until_the_cut_is_in_sight() {
    let flat = vec![0.5f32; 3000];
    let (left, right) = flat.split_at(1000);
    let rounds = |row: SampleRow| sharded(&[left, right], &row).unwrap().1;
    assert_eq!(
        rounds(SampleRow {
            top_p: 0.01,
            ..sampled()
        }),
        1,
        "30 ids are listed at once"
    );
    assert_eq!(
        rounds(SampleRow {
            top_p: 0.15,
            ..sampled()
        }),
        2,
        "450 of 512 on the first rank"
    );
    assert_eq!(
        rounds(SampleRow {
            top_p: 0.9,
            ..sampled()
        }),
        3,
        "2700 ids"
    );
    assert_eq!(
        rounds(SampleRow {
            min_p: 0.5,
            ..sampled()
        }),
        3,
        "all tie with the best"
    );
    assert_eq!(
        rounds(SampleRow {
            top_k: 3,
            ..sampled()
        }),
        3,
        "all tie with the third"
    );
    let both = SampleRow {
        top_k: 3,
        top_p: 0.2,
        ..sampled()
    };
    assert_eq!(rounds(both), 3, "top-p is a share of what top-k keeps");
    assert_eq!(rounds(sampled()), 1, "no filter, no candidates");
}

#[test]
fn numbers_that_are_none_are_reported_whatever_the_filters() {
    let mut logits = vec![0.0f32; 200];
    logits[3] = f32::NAN;
    logits[150] = f32::NAN;
    logits[151] = f32::INFINITY;
    let banned = vec![3, 150, 151];
    for row in [
        SampleRow::greedy(),
        sampled(),
        SampleRow {
            top_k: 5,
            ..sampled()
        },
        SampleRow {
            min_p: 0.9,
            banned,
            ..sampled()
        },
    ] {
        let found = sharded(&[&logits[..100], &logits[100..]], &row);
        let expected = SamplingError::NotANumber { row: 5, count: 3 };
        assert_eq!(found, Err(expected));
        assert!(expected.to_string().contains("row 5") && expected.to_string().contains("found 3"));
    }
}

#[test]
fn a_row_without_candidates_is_an_error() {
    let logits = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY];
    for row in [
        SampleRow::greedy(),
        sampled(),
        SampleRow {
            top_p: 0.5,
            ..sampled()
        },
        SampleRow {
            top_k: 1,
            ..sampled()
        },
    ] {
        for shards in [vec![&logits[..]], vec![&logits[..1], &logits[1..], &[]]] {
            assert_eq!(sharded(&shards, &row).unwrap().0, 1);
            let row = SampleRow {
                banned: vec![1],
                ..row.clone()
            };
            assert_eq!(
                sharded(&shards, &row),
                Err(SamplingError::NoCandidate { row: 5 })
            );
        }
    }
}

#[test]
fn penalties_concern_their_ids_alone() {
    let logits = [2.0f32, 1.9, -1.0, -1.1];
    let row = |penalized, banned| SampleRow {
        repetition_penalty: 1.2,
        penalized,
        banned,
        ..SampleRow::greedy()
    };
    let pick = |row| sharded(&[&logits[..1], &logits[1..]], &row).unwrap().0;
    assert_eq!(pick(row(vec![], vec![])), 0);
    assert_eq!(pick(row(vec![0], vec![])), 1, "2 / 1.2 is below 1.9");
    assert_eq!(pick(row(vec![2], vec![0, 1])), 3, "-1 * 1.2 is below -1.1");
    assert_eq!(pick(row(vec![700], vec![701])), 0, "ids of no shard");
}
