//! From the records of all ranks to a token.

use super::elementary::ln;
use super::error::SamplingError;
use super::gumbel::Gumbel;
use super::mass::Mass;
use super::record::{Candidate, Record};
use crate::llama::SampleRow;

/// What the records of one round come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The next token.
    Token(u32),
    /// The candidates do not contain the cut of the filters: gather records of this form.
    More(Record),
}

/// Chooses from the records `gathered`, one a rank in rank order, of the form `record`.
///
/// A pure function: ranks that gathered the same words come to the same choice. Rounds end, since
/// records grow by a factor up to the largest shard. `index` names the row in errors.
///
/// # Panics
///
/// Where a record is not of [`Record::words`] words.
pub fn choose(
    index: usize,
    row: &SampleRow,
    record: Record,
    gathered: &[&[u32]],
) -> Result<Choice, SamplingError> {
    for words in gathered {
        assert_eq!(words.len(), record.words(), "a record of {record:?}");
    }
    let count = gathered.iter().map(|words| u64::from(words[0])).sum();
    if count > 0 {
        return Err(SamplingError::NotANumber { row: index, count });
    }
    let choice = match record {
        Record::Best => best(gathered).map(Choice::Token),
        Record::Drawn => drawn(gathered).map(Choice::Token),
        Record::Candidates { count } => filtered(row, count, gathered),
    };
    choice.ok_or(SamplingError::NoCandidate { row: index })
}

fn best(gathered: &[&[u32]]) -> Option<u32> {
    let candidates = gathered.iter().map(|words| candidate(&words[1..]));
    let best = candidates.min().unwrap_or(Candidate::NONE);
    (best != Candidate::NONE).then(|| best.id())
}

fn drawn(gathered: &[&[u32]]) -> Option<u32> {
    let mut best = None;
    for words in gathered {
        let value = f64::from_bits(u64::from(words[2]) | u64::from(words[3]) << 32);
        if words[1] != u32::MAX {
            best = Some(better(best, value, words[1]));
        }
    }
    best.map(|(_, id)| id)
}

/// The greater value; of equals, the lower id.
fn better(best: Option<(f64, u32)>, value: f64, id: u32) -> (f64, u32) {
    match best {
        Some((most, at)) if most > value || most == value && at < id => (most, at),
        _ => (value, id),
    }
}

fn candidate(words: &[u32]) -> Candidate {
    Candidate::from_words([words[0], words[1]])
}

fn filtered(row: &SampleRow, count: usize, gathered: &[&[u32]]) -> Option<Choice> {
    let mut candidates = Vec::new();
    let mut total = Mass::EMPTY;
    let mut largest = 0;
    // What a rank did not list comes after the last that it did: candidates up to the earliest
    // such last are certainly the first of the whole vocabulary.
    let mut horizon = Candidate::NONE;
    for words in gathered {
        let size = words[1] as usize;
        let mass = words[2..].first_chunk().expect("a mass in every record");
        total.add(&Mass::from_words(mass));
        let listed = words[Record::CANDIDATES_AT..].chunks_exact(2);
        candidates.extend(listed.take(size.min(count)).map(candidate));
        largest = largest.max(size);
        if size > count {
            horizon = match count {
                0 => Candidate::new(f32::INFINITY, 0),
                _ => horizon.min(candidate(&words[words.len() - 2..])),
            };
        }
    }
    if largest == 0 {
        return None;
    }
    candidates.sort_unstable();
    let exhausted = horizon == Candidate::NONE;
    candidates.truncate(candidates.partition_point(|&c| c <= horizon));
    Some(match kept(row, &candidates, exhausted, &total) {
        Some(kept) => Choice::Token(draw(row, &candidates[..kept])),
        None => Choice::More(Record::longer(count, largest)),
    })
}

/// How many of the first candidates of the vocabulary, in order, survive the filters: each keeps
/// a head of what it is given. `None` where that cannot be said, as there are more candidates
/// than these (not `exhausted`). `total` is the mass of the vocabulary, where top-p needs it.
pub(super) fn kept(
    row: &SampleRow,
    candidates: &[Candidate],
    exhausted: bool,
    total: &Mass,
) -> Option<usize> {
    let scaled = |c: &Candidate| f64::from(c.logit()) / f64::from(row.temperature);
    let mut kept = candidates.len();
    let mut known = exhausted;
    if row.top_k > 0
        && let Some(last) = candidates.get(row.top_k - 1)
        && let Some(cut) = candidates.iter().position(|c| c.logit() < last.logit())
    {
        (kept, known) = (cut, true);
    }
    if row.top_p < 1.0 {
        let mut of_top_k = Mass::EMPTY;
        let total = if Record::wants_mass(row) {
            total
        } else if known {
            candidates[..kept]
                .iter()
                .for_each(|c| of_top_k.add_exp(scaled(c)));
            &of_top_k
        } else {
            return None;
        };
        let mut mass = Mass::EMPTY;
        let cut = candidates[..kept].iter().position(|c| {
            mass.add_exp(scaled(c));
            mass.reaches(f64::from(row.top_p), total)
        });
        if let Some(cut) = cut {
            (kept, known) = (cut + 1, true);
        }
    }
    if row.min_p > 0.0 {
        let most = scaled(candidates.first()?);
        let least = ln(f64::from(row.min_p));
        let cut = candidates[..kept]
            .iter()
            .position(|c| scaled(c) - most < least);
        if let Some(cut) = cut {
            (kept, known) = (cut.max(1), true);
        }
    }
    known.then_some(kept)
}

/// The draw among the kept, of which there is at least one.
fn draw(row: &SampleRow, kept: &[Candidate]) -> u32 {
    let gumbel = Gumbel::new(row.seed, row.draw);
    let mut best = None;
    for candidate in kept {
        let logit = f64::from(candidate.logit()) / f64::from(row.temperature);
        let most = best.map_or(f64::NEG_INFINITY, |(value, _)| value);
        if let Some(value) = gumbel.perturb_above(logit, candidate.id(), most) {
            best = Some(better(best, value, candidate.id()));
        }
    }
    best.expect("a filter keeps at least one").1
}
