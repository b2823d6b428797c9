//! What a generation gives back.

use std::fmt;
use std::time::Duration;

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// An end-of-text id, a stop id or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context or of the KV cache.
    Length,
    /// The callback said so.
    Cancelled,
}

impl FinishReason {
    /// "stop", "length" or "cancelled".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, the one that ended the text included.
    pub completion_tokens: usize,
}

impl Usage {
    /// The sum.
    pub fn total_tokens(&self) -> usize {
        self.prompt_tokens + self.completion_tokens
    }
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The generated ids, the one that ended the text included.
    pub ids: Vec<u32>,
    /// Their text, without stop strings, stop ids and special tokens: what was streamed.
    /// `None` for a prompt of ids.
    pub text: Option<String>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How many tokens.
    pub usage: Usage,
    /// The key of the random numbers: the caller's, or the one that was drawn.
    pub seed: u64,
}

/// What a generation tells while it runs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A token of request `request` (its index among the prompts).
    Token {
        /// The request.
        request: usize,
        /// The token.
        id: u32,
        /// The text that is settled by it, perhaps empty: text that may yet turn out to begin
        /// a stop string, and bytes that are no whole character yet, wait for later tokens.
        text: &'a str,
    },
    /// Request `request` is done.
    Finished {
        /// The request.
        request: usize,
        /// What it came to.
        completion: &'a Completion,
    },
}

/// How long a generation took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// Rows computed for prompts, recomputed ones included.
    pub prefill_tokens: usize,
    /// Time of them: a mixed step's is divided by rows.
    pub prefill: Duration,
    /// Rows computed for single generated tokens.
    pub decode_tokens: usize,
    /// Time of them.
    pub decode: Duration,
    /// Steps.
    pub steps: usize,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions: usize,
    /// Time in collectives, of the rank that spent most; zero where the engine does not say.
    pub collectives: Duration,
}

impl Timing {
    /// Prompt tokens a second.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prefill_tokens, self.prefill)
    }

    /// Generated tokens a second.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decode_tokens, self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    match time.is_zero() {
        true => 0.0,
        false => tokens as f64 / time.as_secs_f64(),
    }
}
