//! A rank's part in choosing the next token: from its shard of one row of logits to a record.
//!
//! The form of records, and why no split of the vocabulary changes the choice, are in
//! [`crate::llama::sampling`].

use std::borrow::Cow;

use crate::llama::SampleRow;
use crate::llama::sampling::mass::Mass;
use crate::llama::sampling::{Candidate, Gumbel, Record};

/// Writes the record of the logits `[shard]` of the true ids from `first_id` on (no padding; it
/// may be empty) to `out`, of [`Record::words`] words.
///
/// The logits are left as they are: further rounds pass the same ones.
///
/// # Panics
///
/// Where `out` has another length, or an id would not fit 32 bits.
pub fn record(logits: &[f32], first_id: usize, row: &SampleRow, record: Record, out: &mut [u32]) {
    assert_eq!(out.len(), record.words(), "a record of {record:?}");
    assert!(
        first_id + logits.len() <= u32::MAX as usize,
        "ids below {} do not fit 32 bits",
        first_id + logits.len()
    );
    let first_id = first_id as u32;
    // NaN or +inf: not below infinity.
    let bad = logits
        .iter()
        .filter(|&&l| {
            !matches!(
                l.partial_cmp(&f32::INFINITY),
                Some(std::cmp::Ordering::Less)
            )
        })
        .count();
    out.fill(0);
    out[0] = bad as u32;
    if bad > 0 {
        return;
    }
    let logits = processed(logits, first_id, row);
    match record {
        Record::Best => out[1..].copy_from_slice(&best(&logits, first_id).to_words()),
        Record::Drawn => drawn(&logits, first_id, row, &mut out[1..]),
        Record::Candidates { count } => candidates(&logits, first_id, row, count, &mut out[1..]),
    }
}

/// The logits after repetition penalty and bans; copied only if this shard has such ids.
fn processed<'a>(logits: &'a [f32], first_id: u32, row: &SampleRow) -> Cow<'a, [f32]> {
    let mut logits = Cow::Borrowed(logits);
    let ids = first_id..first_id + logits.len() as u32;
    let local = |id: &u32| ids.contains(id).then(|| (id - first_id) as usize);
    if row.repetition_penalty != 1.0 {
        for id in row.penalized.iter().filter_map(local) {
            let logit = &mut logits.to_mut()[id];
            *logit = match *logit < 0.0 {
                true => *logit * row.repetition_penalty,
                // A penalty below 1 may overflow: stay a number.
                false => (*logit / row.repetition_penalty).min(f32::MAX),
            };
        }
    }
    for id in row.banned.iter().filter_map(local) {
        logits.to_mut()[id] = f32::NEG_INFINITY;
    }
    logits
}

fn best(logits: &[f32], first_id: u32) -> Candidate {
    // Two plain passes, which the compiler vectorises, rather than one of pairs.
    let most = logits.iter().fold(
        f32::NEG_INFINITY,
        |most, &l| if l > most { l } else { most },
    );
    match logits.iter().position(|&l| l == most) {
        Some(at) if most > f32::NEG_INFINITY => Candidate::new(most, first_id + at as u32),
        _ => Candidate::NONE,
    }
}

fn drawn(logits: &[f32], first_id: u32, row: &SampleRow, out: &mut [u32]) {
    let gumbel = Gumbel::new(row.seed, row.draw);
    let temperature = f64::from(row.temperature);
    let (mut most, mut token) = (f64::NEG_INFINITY, u32::MAX);
    for (id, &logit) in (first_id..).zip(logits) {
        if logit == f32::NEG_INFINITY {
            continue;
        }
        // Only a greater value replaces: of equals the lowest id stays.
        match gumbel.perturb_above(f64::from(logit) / temperature, id, most) {
            Some(value) if value > most => (most, token) = (value, id),
            _ => {}
        }
    }
    let bits = most.to_bits();
    out.copy_from_slice(&[token, bits as u32, (bits >> 32) as u32]);
}

fn candidates(logits: &[f32], first_id: u32, row: &SampleRow, count: usize, out: &mut [u32]) {
    let temperature = f64::from(row.temperature);
    let wants_mass = Record::wants_mass(row);
    let (mut size, mut mass) = (0u32, Mass::EMPTY);
    let mut best = Best::new(count.min(logits.len()));
    for (id, &logit) in (first_id..).zip(logits) {
        if logit == f32::NEG_INFINITY {
            continue;
        }
        size += 1;
        best.push(Candidate::new(logit, id));
        if wants_mass {
            mass.add_exp(f64::from(logit) / temperature);
        }
    }
    out[0] = size;
    let (head, listed) = out[1..].split_at_mut(Mass::WORDS);
    head.copy_from_slice(&mass.to_words());
    let none = std::iter::repeat(Candidate::NONE);
    let best = best.finish().into_iter().chain(none);
    for (words, candidate) in listed.as_chunks_mut().0.iter_mut().zip(best) {
        *words = candidate.to_words();
    }
}

/// The first `count` of a stream of candidates: a buffer of twice as many that is cut in half
/// when full, so that each costs amortised constant time, most of them one comparison.
struct Best {
    count: usize,
    buffer: Vec<Candidate>,
    /// What does not come before this is not among the first.
    bound: Candidate,
}

impl Best {
    fn new(count: usize) -> Self {
        Self {
            count,
            buffer: Vec::with_capacity(2 * count),
            bound: Candidate::NONE,
        }
    }

    fn push(&mut self, candidate: Candidate) {
        if self.count == 0 || candidate >= self.bound {
            return;
        }
        if self.buffer.len() == 2 * self.count {
            let (_, &mut last, _) = self.buffer.select_nth_unstable(self.count - 1);
            self.buffer.truncate(self.count);
            self.bound = last;
            if candidate >= last {
                return;
            }
        }
        self.buffer.push(candidate);
    }

    fn finish(mut self) -> Vec<Candidate> {
        self.buffer.sort_unstable();
        self.buffer.truncate(self.count);
        self.buffer
    }
}
