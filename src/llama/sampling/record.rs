//! What a rank tells the others about its shard of one row.

use std::fmt;

use super::mass::Mass;
use crate::llama::SampleRow;

/// Candidates asked of each rank in the first round.
const FIRST_COUNT: usize = 64;
/// How much longer the next round's records are.
const GROWTH: usize = 8;

/// A token and its logit (after penalty, before temperature), as one word that sorts in the
/// order in which tokens are preferred: greater logits first, then lower ids.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Candidate(u64);

impl Candidate {
    /// Sorts after every candidate and is none.
    pub const NONE: Self = Self(u64::MAX);

    /// Token `id` with `logit`, which is not NaN.
    #[inline]
    pub fn new(logit: f32, id: u32) -> Self {
        // + 0.0 makes -0 and +0 one value. Then the bits of positive numbers ascend as they are,
        // those of negative ones after inversion; the whole is inverted to descend.
        let bits = (logit + 0.0).to_bits();
        let ascending = bits ^ ((bits as i32 >> 31) as u32 | 1 << 31);
        Self(u64::from(!ascending) << 32 | u64::from(id))
    }

    /// The logit; -0 has become +0.
    #[inline]
    pub fn logit(self) -> f32 {
        let ascending = !((self.0 >> 32) as u32);
        let negative = (!(ascending as i32) >> 31) as u32;
        f32::from_bits(ascending ^ (negative | 1 << 31))
    }

    /// The token.
    #[inline]
    pub fn id(self) -> u32 {
        self.0 as u32
    }

    pub(crate) fn to_words(self) -> [u32; 2] {
        [self.0 as u32, (self.0 >> 32) as u32]
    }

    pub(crate) fn from_words([low, high]: [u32; 2]) -> Self {
        Self(u64::from(high) << 32 | u64::from(low))
    }
}

impl fmt::Debug for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => f.write_str("none"),
            _ => write!(f, "{}: {}", self.id(), self.logit()),
        }
    }
}

/// The form of the records of one row in one round: known to all ranks beforehand, so that an
/// all-gather of [`Record::words`] words a rank carries them. Words are u32, low halves first;
/// the first counts the logits that are NaN or +inf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Greedy: `[bad, candidate x 2]`.
    Best,
    /// A draw without filters: `[bad, id, perturbed logit (f64) x 2]`; u32::MAX is no id.
    Drawn,
    /// A draw with filters: `[bad, size, mass x 10, candidate x 2, ..]`. `size` is the number of
    /// candidates in the shard (ids neither banned nor at -inf); the best `min(size, count)` are
    /// listed, best first, then [`Candidate::NONE`]. The mass is that of the whole shard where
    /// [`Record::wants_mass`], else empty.
    Candidates {
        /// How many are listed.
        count: usize,
    },
}

impl Record {
    /// The form of the first round, for shards of at most `largest_shard` logits: all ranks pass
    /// the same number.
    pub fn first(row: &SampleRow, largest_shard: usize) -> Self {
        let filtered = row.top_k > 0 || row.top_p < 1.0 || row.min_p > 0.0;
        match row.temperature {
            0.0 => Self::Best,
            _ if !filtered => Self::Drawn,
            _ => Self::Candidates {
                count: row.top_k.max(FIRST_COUNT).min(largest_shard),
            },
        }
    }

    /// The form of the next round: longer, but not longer than `largest` candidates.
    pub(super) fn longer(count: usize, largest: usize) -> Self {
        Self::Candidates {
            count: count.max(1).saturating_mul(GROWTH).min(largest),
        }
    }

    /// The words of a record.
    pub fn words(&self) -> usize {
        match self {
            Self::Best => 3,
            Self::Drawn => 4,
            Self::Candidates { count } => Self::CANDIDATES_AT + 2 * count,
        }
    }

    pub(crate) const CANDIDATES_AT: usize = 2 + Mass::WORDS;

    /// Whether top-p is normalised over the whole row (after top-k it is over the k kept).
    pub fn wants_mass(row: &SampleRow) -> bool {
        row.top_k == 0 && row.top_p < 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn candidates_sort_by_logit_then_id(a: f32, b: f32, i: u32, j in 0u32..u32::MAX) {
            prop_assume!(!a.is_nan() && !b.is_nan());
            let (first, second) = (Candidate::new(a, i), Candidate::new(b, j));
            prop_assert_eq!(first.logit(), a);
            prop_assert_eq!(first.id(), i);
            prop_assert_eq!(Candidate::from_words(first.to_words()), first);
            let expected = b.partial_cmp(&a).unwrap().then(i.cmp(&j));
            prop_assert_eq!(first.cmp(&second), expected);
            prop_assert!(second < Candidate::NONE);
        }
    }

    #[test]
    fn zeros_tie() {
        assert!(Candidate::new(-0.0, 1) < Candidate::new(0.0, 2));
        assert!(Candidate::new(0.0, 1) < Candidate::new(-0.0, 2));
        assert!(Candidate::new(f32::NEG_INFINITY, 1) < Candidate::NONE);
    }

    #[test]
    fn a_huge_top_k_asks_for_no_more_than_a_shard() {
        let row = SampleRow {
            temperature: 1.0,
            top_k: usize::MAX,
            ..SampleRow::greedy()
        };
        assert_eq!(Record::first(&row, 100), Record::Candidates { count: 100 });
        assert_eq!(
            Record::longer(usize::MAX, 7),
            Record::Candidates { count: 7 }
        );
    }
}
