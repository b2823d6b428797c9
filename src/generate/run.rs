//! Requests to completions: the scheduler's loop, and the text of what it yields.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::engine::Engine;
use super::output::{Completion, Event, FinishReason, Timing, Usage};
use super::params::Sampling;
use super::scheduler::Scheduler;
use super::stop::StopFilter;
use super::tokenizer::{TextStream, Tokenizer};
use crate::error::{Error, Result};
use crate::llama::sampling::SamplingError;

/// A request in the model's terms.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The prompt's ids.
    pub prompt: Vec<u32>,
    /// How to go on.
    pub sampling: Sampling,
    /// What makes text of the ids; `None` where ids are all that is wanted.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// Runs `requests` to their ends on an engine whose cache is free, at most `max_batch_tokens`
/// rows a step.
///
/// `on_event` hears of each token as it comes; a `Break` on a token ends that request.
/// Requests that cannot be served are refused before any work. The completions are in the
/// order of the requests.
pub fn run<E: Engine>(
    engine: &mut E,
    max_batch_tokens: usize,
    requests: &[Request<'_>],
    on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<(Vec<Completion>, Timing)> {
    let mut scheduler = Scheduler::new(engine.limits(), max_batch_tokens)?;
    let mut outputs = Vec::with_capacity(requests.len());
    for (index, request) in requests.iter().enumerate() {
        scheduler.submit(index, &request.prompt, request.sampling.clone())?;
        outputs.push(Output::new(index, request)?);
    }
    let mut timing = Timing::default();
    while !scheduler.is_idle() {
        let step = scheduler.schedule()?;
        if step.batch.rows() == 0 {
            return Err(Error::shape(
                "Scheduler::schedule",
                "at least one row",
                "none",
            ));
        }
        let start = Instant::now();
        let tokens = engine.step(&step.batch, &step.sample);
        let tokens = tokens.map_err(|error| of_request(error, &step.requests))?;
        account(
            &mut timing,
            start.elapsed(),
            step.prefill_rows(),
            step.decode_rows,
        );
        let full = scheduler.commit(&step, &tokens)?;
        for (&index, &token) in step.requests.iter().zip(&tokens) {
            let output = &mut outputs[index];
            if output.push(token, full.contains(&index), on_event)? {
                scheduler.finish(index)?;
            }
        }
    }
    timing.preemptions = scheduler.preemptions();
    let completions = outputs.into_iter().map(|output| output.completion);
    Ok((completions.collect(), timing))
}

/// `error` of a step, with the number of the request where it has that of a row.
fn of_request(error: Error, requests: &[usize]) -> Error {
    let name = |row: usize| requests.get(row).copied().unwrap_or(row);
    match error {
        Error::Sampling(SamplingError::NotANumber { row, count }) => {
            let row = name(row);
            SamplingError::NotANumber { row, count }.into()
        }
        Error::Sampling(SamplingError::NoCandidate { row }) => {
            SamplingError::NoCandidate { row: name(row) }.into()
        }
        other => other,
    }
}

fn account(timing: &mut Timing, elapsed: Duration, prefill: usize, decode: usize) {
    let share = decode as f64 / (prefill + decode) as f64;
    let decoding = elapsed.mul_f64(share);
    timing.decode += decoding;
    timing.prefill += elapsed.saturating_sub(decoding);
    timing.prefill_tokens += prefill;
    timing.decode_tokens += decode;
    timing.steps += 1;
}

/// The growing completion of a request.
struct Output<'a> {
    index: usize,
    request: &'a Request<'a>,
    text: Option<(TextStream<'a>, StopFilter)>,
    completion: Completion,
}

impl<'a> Output<'a> {
    fn new(index: usize, request: &'a Request<'a>) -> Result<Self> {
        let stop = &request.sampling.stop;
        let text = match request.tokenizer {
            Some(tokenizer) => Some((
                TextStream::new(tokenizer, &request.prompt)?,
                StopFilter::new(stop),
            )),
            None if stop.is_empty() => None,
            None => {
                return Err(Error::input(
                    format_args!("prompt {index}: stop"),
                    "stop strings with a prompt of text",
                    "stop strings with a prompt of ids",
                    "pass the prompt as text, or stop ids",
                ));
            }
        };
        Ok(Self {
            index,
            request,
            completion: Completion {
                ids: Vec::new(),
                text: text.as_ref().map(|_| String::new()),
                finish_reason: FinishReason::Length,
                usage: Usage {
                    prompt_tokens: request.prompt.len(),
                    completion_tokens: 0,
                },
                seed: request.sampling.seed,
            },
            text,
        })
    }

    /// Takes the next token and tells of it; returns whether the request is done.
    fn push(
        &mut self,
        token: u32,
        full: bool,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<bool> {
        let stop_id = self.request.sampling.stop_ids.binary_search(&token).is_ok();
        let mut done = (stop_id || full).then_some(match stop_id {
            true => FinishReason::Stop,
            false => FinishReason::Length,
        });
        let mut piece = String::new();
        if let Some((stream, filter)) = &mut self.text {
            let mut raw = String::new();
            if !stop_id {
                stream.push(token, &mut raw)?;
            }
            if done.is_some() {
                stream.finish(&mut raw)?;
            }
            filter.push(&raw, &mut piece);
            if filter.stopped() {
                done = Some(FinishReason::Stop);
            } else if done.is_some() {
                filter.finish(&mut piece);
            }
        }
        self.completion.ids.push(token);
        self.completion.usage.completion_tokens += 1;
        if let Some(text) = &mut self.completion.text {
            text.push_str(&piece);
        }
        let heard = on_event(Event::Token {
            request: self.index,
            id: token,
            text: &piece,
        });
        if heard.is_break() && done.is_none() {
            done = Some(FinishReason::Cancelled);
        }
        let Some(reason) = done else {
            return Ok(false);
        };
        self.completion.finish_reason = reason;
        let _ = on_event(Event::Finished {
            request: self.index,
            completion: &self.completion,
        });
        Ok(true)
    }
}
