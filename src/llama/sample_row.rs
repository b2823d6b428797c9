//! What to do with the logits of one row.

/// How the next token is chosen from one row's logits `l`.
///
/// In the order of transformers: the repetition penalty, the temperature, top-k, top-p,
/// min-p. A temperature of zero takes the greatest logit, ties to the lowest id.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleRow {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keeps the k greatest (and any that equal the last); 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most probable whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keeps those whose probability is at least this times the greatest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of `penalized`; 1 does nothing.
    pub repetition_penalty: f32,
    /// The ids that the penalty concerns, ascending and distinct.
    pub penalized: Vec<u32>,
    /// Ids that may not be chosen (a minimum length, `ignore_eos` does not use it).
    pub banned: Vec<u32>,
    /// Key of the random numbers.
    pub seed: u64,
    /// Which draw of that key this is: the position of the token to come.
    pub draw: u64,
}

impl SampleRow {
    /// The greatest logit.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            penalized: Vec::new(),
            banned: Vec::new(),
            seed: 0,
            draw: 0,
        }
    }
}
