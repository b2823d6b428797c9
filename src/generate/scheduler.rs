//! Continuous batching: which rows of which sequences the next step computes.
//!
//! A step takes every running sequence's newest token (decode) and fills up to
//! `max_batch_tokens` rows with chunks of prompts (prefill), oldest request first. A request
//! is admitted, in order of arrival, once the blocks for its tokens are free; where a growing
//! sequence finds no block, the youngest running one gives up all of its own and waits at the
//! head of the queue, to be computed again with its generated tokens as part of the prompt.
//!
//! A token depends on the tokens before it, its position and the request's seed; so with an
//! engine whose rows do not depend on the batch, on none of the above.

use std::collections::VecDeque;
use std::ops::Range;

use super::block_allocator::BlockAllocator;
use super::params::Sampling;
use crate::error::{Error, Result};
use crate::llama::{Batch, Limits, SampleRow};

/// A request's name: the caller's, distinct among those in the scheduler.
pub type RequestId = usize;

/// The rows of one step.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// What the engine computes.
    pub batch: Batch,
    /// How the token of each logits row is chosen.
    pub sample: Vec<SampleRow>,
    /// The request of each logits row.
    pub requests: Vec<RequestId>,
    /// Rows that decode: a sequence's single newest, generated token.
    pub decode_rows: usize,
}

impl Step {
    /// Rows that belong to prompts, or are computed again.
    pub fn prefill_rows(&self) -> usize {
        self.batch.rows() - self.decode_rows
    }
}

/// One request on its way.
#[derive(Debug)]
struct Sequence {
    id: RequestId,
    /// The prompt and what was generated.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Tokens whose KV entries are in the blocks.
    computed: usize,
    /// Tokens in the step under way.
    scheduled: usize,
    blocks: Vec<u32>,
    sampling: Sampling,
    /// Most tokens that may be generated.
    max_tokens: usize,
    /// The distinct ids of `tokens`, ascending; kept where there is a repetition penalty.
    seen: Vec<u32>,
}

impl Sequence {
    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether the next step only feeds back a generated token.
    fn decodes(&self) -> bool {
        self.pending() == 1 && self.generated() > 0
    }

    fn see(&mut self, id: u32) {
        if self.sampling.repetition_penalty != 1.0
            && let Err(place) = self.seen.binary_search(&id)
        {
            self.seen.insert(place, id);
        }
    }

    fn sample_row(&self) -> SampleRow {
        let banned = match self.generated() < self.sampling.min_tokens {
            true => self.sampling.stop_ids.clone(),
            false => Vec::new(),
        };
        SampleRow {
            temperature: self.sampling.temperature,
            top_k: self.sampling.top_k,
            top_p: self.sampling.top_p,
            min_p: self.sampling.min_p,
            repetition_penalty: self.sampling.repetition_penalty,
            penalized: self.seen.clone(),
            banned,
            seed: self.sampling.seed,
            draw: self.tokens.len() as u64,
        }
    }
}

/// The sequences of an engine and the blocks of its cache.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    max_batch_tokens: usize,
    blocks: BlockAllocator,
    /// In order of arrival; all younger than the running ones.
    waiting: VecDeque<Sequence>,
    /// In order of arrival.
    running: Vec<Sequence>,
    preemptions: usize,
}

impl Scheduler {
    /// A scheduler of an engine with these limits whose cache is unused. A step has at most
    /// `max_batch_tokens` rows, and as many sequences run at most.
    pub fn new(limits: Limits, max_batch_tokens: usize) -> Result<Self> {
        if max_batch_tokens == 0 {
            return Err(Error::input(
                "max_batch_tokens",
                "at least 1",
                0,
                "allow a row a step",
            ));
        }
        Ok(Self {
            limits,
            max_batch_tokens,
            blocks: BlockAllocator::new(limits.num_blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            preemptions: 0,
        })
    }

    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Free blocks of the cache.
    pub fn free_blocks(&self) -> usize {
        self.blocks.num_free()
    }

    /// How often a sequence lost its blocks.
    pub fn preemptions(&self) -> usize {
        self.preemptions
    }

    /// Queues a request, or says why it could never be served. `id` names it in `Step` and
    /// must not be in use.
    pub fn submit(&mut self, id: RequestId, prompt: &[u32], sampling: Sampling) -> Result<()> {
        let max_tokens = check_request(&self.limits, id, prompt, &sampling)?;
        let mut sequence = Sequence {
            id,
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            computed: 0,
            scheduled: 0,
            blocks: Vec::new(),
            sampling,
            max_tokens,
            seen: Vec::new(),
        };
        if sequence.sampling.repetition_penalty != 1.0 {
            sequence.seen = prompt.to_vec();
            sequence.seen.sort_unstable();
            sequence.seen.dedup();
        }
        self.waiting.push_back(sequence);
        Ok(())
    }

    /// Plans the next step. Where requests are left, it has at least one row.
    pub fn schedule(&mut self) -> Result<Step> {
        self.admit();
        self.distribute_rows();
        self.find_blocks()?;
        Ok(self.build())
    }

    /// Takes the tokens that the engine chose for `step.requests`, in that order. Returns
    /// those of them that reached the length at which they must end; the caller ends these
    /// and any others with [`finish`](Self::finish).
    pub fn commit(&mut self, step: &Step, tokens: &[u32]) -> Result<Vec<RequestId>> {
        if tokens.len() != step.requests.len() {
            return Err(Error::shape(
                "Scheduler::commit",
                format_args!("{} tokens, one a logits row", step.requests.len()),
                tokens.len(),
            ));
        }
        if let Some(id) = tokens
            .iter()
            .find(|&&id| id as usize >= self.limits.vocab_size)
        {
            return Err(Error::shape(
                "Scheduler::commit",
                format_args!("ids below the vocabulary of {}", self.limits.vocab_size),
                id,
            ));
        }
        for sequence in &mut self.running {
            sequence.computed += std::mem::take(&mut sequence.scheduled);
        }
        let mut full = Vec::new();
        for (&id, &token) in step.requests.iter().zip(tokens) {
            let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) else {
                continue;
            };
            sequence.tokens.push(token);
            sequence.see(token);
            if sequence.generated() >= sequence.max_tokens {
                full.push(id);
            }
        }
        Ok(full)
    }

    /// Ends a request and frees its blocks. Unknown ids are ignored.
    pub fn finish(&mut self, id: RequestId) -> Result<()> {
        if let Some(place) = self.running.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.running.remove(place);
            self.blocks.free(&mut sequence.blocks)?;
        }
        self.waiting.retain(|sequence| sequence.id != id);
        Ok(())
    }

    /// Moves requests from the queue to the running ones, strictly in order, while the blocks
    /// of all their tokens are free, not promised to sequences still in prefill, and one more
    /// a running sequence is left, so that the newcomer does not lose its own at once.
    fn admit(&mut self) {
        let block_size = self.limits.block_size;
        let need = |sequence: &Sequence| {
            sequence.tokens.len().div_ceil(block_size) - sequence.blocks.len()
        };
        let mut promised: usize = self.running.iter().map(need).sum();
        while let Some(next) = self.waiting.front() {
            promised += need(next);
            // A lone request always fits: `check_request` saw to it.
            let wanted = promised + self.running.len();
            let fits = wanted <= self.blocks.num_free() || self.running.is_empty();
            if !fits || self.running.len() == self.max_batch_tokens {
                break;
            }
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Decides how many tokens of each running sequence the step takes: first one for each
    /// that decodes, then prompts, the oldest first.
    fn distribute_rows(&mut self) {
        let mut rest = self.max_batch_tokens;
        for decodes in [true, false] {
            for sequence in &mut self.running {
                if sequence.decodes() == decodes {
                    sequence.scheduled = sequence.pending().min(rest);
                    rest -= sequence.scheduled;
                }
            }
        }
    }

    /// Gives each sequence the blocks for its rows, the oldest first; the youngest make room.
    fn find_blocks(&mut self) -> Result<()> {
        let mut place = 0;
        while place < self.running.len() {
            let sequence = &mut self.running[place];
            let length = sequence.computed + sequence.scheduled;
            let need = length
                .div_ceil(self.limits.block_size)
                .saturating_sub(sequence.blocks.len());
            if need <= self.blocks.num_free() {
                self.blocks.allocate(need, &mut sequence.blocks)?;
                place += 1;
            } else {
                self.preempt_youngest()?;
            }
        }
        Ok(())
    }

    fn preempt_youngest(&mut self) -> Result<()> {
        let Some(mut sequence) = self.running.pop() else {
            return Ok(());
        };
        self.blocks.free(&mut sequence.blocks)?;
        sequence.computed = 0;
        sequence.scheduled = 0;
        self.waiting.push_front(sequence);
        self.preemptions += 1;
        Ok(())
    }

    fn build(&self) -> Step {
        let mut step = Step {
            batch: Batch::new(),
            ..Step::default()
        };
        for sequence in &self.running {
            if sequence.scheduled == 0 {
                continue;
            }
            let tokens: Range<usize> = sequence.computed..sequence.computed + sequence.scheduled;
            let rows = step.batch.push(
                &sequence.tokens[tokens],
                sequence.computed as u32,
                sequence.prompt_len as u32,
                &sequence.blocks,
            );
            step.decode_rows += usize::from(sequence.decodes());
            if sequence.scheduled == sequence.pending() {
                step.batch.logits_rows.push(rows.end - 1);
                step.sample.push(sequence.sample_row());
                step.requests.push(sequence.id);
            }
        }
        step
    }
}

/// Checks that an engine with `limits` can serve a request, and returns how many tokens it
/// may generate at most.
///
/// Every token that is fed back needs a position below `max_model_len` and a place in the
/// cache; the last one generated is not fed back. A request that names `max_tokens` is
/// refused if the cache cannot hold it; one that does not gets what fits.
pub fn check_request(
    limits: &Limits,
    id: RequestId,
    prompt: &[u32],
    sampling: &Sampling,
) -> Result<usize> {
    let &Limits {
        vocab_size,
        max_model_len,
        num_blocks,
        block_size,
    } = limits;
    check_prompt(vocab_size, max_model_len, id, prompt)?;
    let stray = sampling
        .stop_ids
        .iter()
        .find(|&&stop| stop as usize >= vocab_size);
    if let (Some(stop), true) = (stray, sampling.min_tokens > 0) {
        return Err(Error::input(
            format_args!("prompt {id}: stop id"),
            format_args!("below the vocabulary of {vocab_size}"),
            stop,
            "use ids of this model's tokenizer",
        ));
    }
    let room = max_model_len + 1 - prompt.len();
    let slots = num_blocks.saturating_mul(block_size);
    let wanted = match sampling.max_tokens {
        Some(max) => max.min(room),
        None => 1,
    };
    let length = prompt.len() + wanted - 1;
    if length > slots {
        return Err(Error::input(
            format_args!("prompt {id}: KV cache"),
            format_args!("at most {slots} positions ({num_blocks} blocks of {block_size})"),
            format_args!(
                "{length} ({} of the prompt, {} of generated tokens)",
                prompt.len(),
                wanted - 1
            ),
            "shorten the prompt, lower max_tokens or make the cache larger",
        ));
    }
    Ok(match sampling.max_tokens {
        Some(_) => wanted,
        None => room.min(slots + 1 - prompt.len()),
    })
}

/// Checks what needs no cache: ids, and the length against the context.
pub(crate) fn check_prompt(
    vocab_size: usize,
    max_model_len: usize,
    id: RequestId,
    prompt: &[u32],
) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::input(
            format_args!("prompt {id}"),
            "at least one token",
            "none",
            "pass a text or ids that are not empty",
        ));
    }
    if prompt.len() > max_model_len {
        return Err(Error::input(
            format_args!("prompt {id}: length"),
            format_args!("at most the context of {max_model_len} tokens"),
            prompt.len(),
            "shorten the prompt, or raise the context where the model allows it",
        ));
    }
    match prompt.iter().find(|&&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(Error::input(
            format_args!("prompt {id}: token id"),
            format_args!("below the vocabulary of {vocab_size}"),
            token,
            "use ids of this model's tokenizer",
        )),
    }
}
