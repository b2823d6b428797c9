//! `ringtp generate`.

use std::collections::BTreeMap;
use std::io::{self, Write, stdout};
use std::ops::ControlFlow;

use ringtp::Error;
use ringtp::generate::{Completion, Event, Llm, Prompt, SamplingParams};
use serde_json::json;

use crate::Failure;
use crate::args::GenerateArgs;
use crate::progress::LoadBar;

pub(crate) fn generate(args: &GenerateArgs, prompts: &[Prompt]) -> Result<(), Failure> {
    if prompts.is_empty() {
        return Err(Failure::Ringtp(Error::input(
            "prompts",
            "at least one",
            "none",
            "pass --prompt TEXT or --ids 1,2,3",
        )));
    }
    let params = args.sampling.params();
    let builder = args.model.builder().max_batch_tokens(args.max_batch_tokens);
    let (bar, builder) = LoadBar::new(builder);
    let model = builder.open()?;
    let requests: Vec<(Prompt, SamplingParams)> = prompts
        .iter()
        .map(|prompt| (prompt.clone(), params.clone()))
        .collect();
    // Bad prompts are found before the weights are read.
    model.requests(&requests)?;
    let mut llm = bar.load(model, args.model.ranks())?;

    let mut printer = Printer::new(args.json, prompts);
    let mut written = Ok(());
    llm.generate_each(&requests, |event| {
        if written.is_ok() {
            written = printer.event(event);
        }
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    written?;
    report(&llm);
    Ok(())
}

/// Writes completions as they come.
struct Printer<'a> {
    json: bool,
    prompts: &'a [Prompt],
    /// JSON lines that wait for those of earlier prompts.
    waiting: BTreeMap<usize, String>,
    next: usize,
    /// Tokens printed of the one prompt that is streamed.
    streamed: usize,
}

impl<'a> Printer<'a> {
    fn new(json: bool, prompts: &'a [Prompt]) -> Self {
        Self {
            json,
            prompts,
            waiting: BTreeMap::new(),
            next: 0,
            streamed: 0,
        }
    }

    fn event(&mut self, event: Event<'_>) -> io::Result<()> {
        let mut out = stdout().lock();
        let alone = self.prompts.len() == 1;
        match event {
            Event::Token { id, text, .. } if alone && !self.json => {
                match &self.prompts[0] {
                    Prompt::Ids(_) if self.streamed == 0 => write!(out, "{id}")?,
                    Prompt::Ids(_) => write!(out, ",{id}")?,
                    _ => write!(out, "{text}")?,
                }
                self.streamed += 1;
                out.flush()
            }
            Event::Finished {
                request,
                completion,
            } => {
                if self.json {
                    self.waiting.insert(request, line(request, completion));
                    while let Some(line) = self.waiting.remove(&self.next) {
                        writeln!(out, "{line}")?;
                        self.next += 1;
                    }
                } else if alone {
                    writeln!(out)?;
                } else {
                    let reason = completion.finish_reason;
                    writeln!(
                        out,
                        "== prompt {request} ({reason}): {}",
                        self.title(request)
                    )?;
                    match &completion.text {
                        Some(text) => writeln!(out, "{text}")?,
                        None => writeln!(out, "{}", commas(&completion.ids))?,
                    }
                }
                out.flush()
            }
            _ => Ok(()),
        }
    }

    /// The beginning of a prompt, on one line.
    fn title(&self, request: usize) -> String {
        let text = match &self.prompts[request] {
            Prompt::Text(text) => text.clone(),
            Prompt::Ids(ids) => commas(ids),
            Prompt::Chat(messages) => messages
                .last()
                .map(|message| message.content.clone())
                .unwrap_or_default(),
        };
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut title: String = line.chars().take(60).collect();
        if title.len() < line.len() {
            title.push('…');
        }
        title
    }
}

fn commas(ids: &[u32]) -> String {
    let ids: Vec<_> = ids.iter().map(u32::to_string).collect();
    ids.join(",")
}

fn line(index: usize, completion: &Completion) -> String {
    json!({
        "index": index,
        "ids": completion.ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason.name(),
        "usage": {
            "prompt_tokens": completion.usage.prompt_tokens,
            "completion_tokens": completion.usage.completion_tokens,
            "total_tokens": completion.usage.total_tokens(),
        },
        "seed": completion.seed,
    })
    .to_string()
}

fn report(llm: &Llm) {
    let timing = llm.timing();
    let total = timing.prefill + timing.decode;
    let share = match total.is_zero() {
        true => 0.0,
        false => 100.0 * timing.collectives.as_secs_f64() / total.as_secs_f64(),
    };
    let lines = format!(
        "prefill: {} tokens, {:.1} tokens/s\n\
         decode: {} tokens, {:.1} tokens/s\n\
         collectives: {:.3} s of {:.3} s ({share:.1} %)\n{}",
        timing.prefill_tokens,
        timing.prefill_rate(),
        timing.decode_tokens,
        timing.decode_rate(),
        timing.collectives.as_secs_f64(),
        total.as_secs_f64(),
        crate::memory::lines(llm),
    );
    // The completions are out; nobody to tell if this cannot be.
    let _ = io::stderr().write_all(lines.as_bytes());
}
