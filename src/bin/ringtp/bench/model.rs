//! Prefill and decode of a model: timed, or on the virtual GPU counted.

use std::io::{Write, stderr, stdout};
use std::time::{Duration, Instant};

use ringtp::generate::Llm;
use ringtp::llama::{Batch, Group, GroupOptions, SampleRow};
use serde_json::{Value, json};

use super::median;
use crate::Failure;
use crate::args::{BenchArgs, devices};
use crate::memory;
use crate::progress::LoadBar;
use crate::table::{Side, table};

/// Tokens of the prompt, and steps of decode, where they are timed.
const PROMPT: usize = 128;
const STEPS: usize = 32;
/// Tokens of the prompt where what it does is counted.
const COUNTED_PROMPT: usize = 8;
/// Prefills that are timed after the first.
const PREFILLS: usize = 5;

/// One sequence on the ranks of a model.
struct Sequence<'a> {
    group: &'a mut Group,
    prompt: Vec<u32>,
    blocks: Vec<u32>,
}

impl Sequence<'_> {
    /// A step of these ids from `position` on: the next id, and how long it took.
    fn step(&mut self, ids: &[u32], position: usize) -> ringtp::Result<(u32, Duration)> {
        let mut batch = Batch::new();
        let prompt_len = self.prompt.len() as u32;
        let rows = batch.push(ids, position as u32, prompt_len, &self.blocks);
        batch.logits_rows = vec![rows.end - 1];
        let begin = Instant::now();
        let next = self.group.step(&batch, &[SampleRow::greedy()])?;
        Ok((next[0], begin.elapsed()))
    }

    fn prefill(&mut self) -> ringtp::Result<(u32, Duration)> {
        let prompt = self.prompt.clone();
        self.step(&prompt, 0)
    }
}

pub(super) fn run(args: &BenchArgs, dir: &std::path::Path) -> Result<(), Failure> {
    let tp = args.tp.unwrap_or(1);
    let devices = devices(args.device, &args.devices, tp);
    let ranks = devices.as_ref().map_or(tp, Vec::len);
    let mut counting = Counting::begin(devices.is_some())?;
    let (prompt, steps) = match counting {
        Some(_) => (args.prompt.unwrap_or(COUNTED_PROMPT), 1),
        None => (args.prompt.unwrap_or(PROMPT), args.steps.unwrap_or(STEPS)),
    };
    let blocks = (prompt + steps).div_ceil(GroupOptions::default().block_size);
    let builder = Llm::builder(dir)
        .tp(ranks)
        .devices(devices.clone())
        .dtype(args.dtype)
        .all_reduce(args.all_reduce.clone())
        .sequence_parallel(args.sequence_parallel)
        .batch_invariant(args.batch_invariant)
        .num_blocks(blocks.max(1));
    let (bar, builder) = LoadBar::new(builder);
    let model = builder.open()?;
    let longest = model.max_model_len();
    if prompt == 0 || steps == 0 || prompt + steps > longest {
        return Err(ringtp::Error::input(
            "--prompt and --steps",
            format_args!("at least 1 each, and {longest} together, the context of the model"),
            format_args!("{prompt} and {steps}"),
            "choose fewer",
        )
        .into());
    }
    let mut llm = bar.load(model, ranks)?;
    let vocab = llm.limits().vocab_size;
    let dtype = llm.group().dtype();
    let mut sequence = Sequence {
        prompt: (1..=prompt).map(|i| (i * 7919 % vocab) as u32).collect(),
        blocks: (0..blocks as u32).collect(),
        group: llm.group(),
    };
    // What grows with the first step has grown then.
    let (first, _) = sequence.prefill()?;
    let place = match (&devices, &counting) {
        (None, _) => "on threads".to_owned(),
        (Some(devices), None) => format!("on devices {devices:?}"),
        (Some(devices), Some(_)) => {
            format!("on devices {devices:?} of the virtual GPU: counts of one step, no times")
        }
    };
    let about = json!({
        "model": dir.display().to_string(), "dtype": dtype.name(), "ranks": ranks, "place": place,
    });
    let heading = format!("{}, {dtype}, {ranks} ranks, {place}\n", dir.display());
    let text = match &mut counting {
        Some(counting) => {
            let parts = count(&mut sequence, counting, first)?;
            counts_to_text(args.json, &about, heading, &parts)
        }
        None => {
            let parts = time(&mut sequence, steps)?;
            times_to_text(args.json, &about, heading, &parts)
        }
    };
    stdout().write_all(text.as_bytes())?;
    stdout().flush()?;
    // The figures are out; nobody to tell if this cannot be.
    let _ = stderr().write_all(memory::lines(&llm).as_bytes());
    Ok(())
}

/// A part of a generation that was timed.
struct Timed {
    part: &'static str,
    /// Tokens of a step.
    tokens: usize,
    /// The median step.
    time: Duration,
    /// Of the time of all steps, the share in collectives. Not known of devices, whose collectives
    /// nobody waits for by themselves.
    collectives: f64,
}

fn time(sequence: &mut Sequence<'_>, steps: usize) -> ringtp::Result<[Timed; 2]> {
    let tokens = sequence.prompt.len();
    let mut times = Vec::new();
    let before = sequence.group.stats().comm_time;
    for _ in 0..PREFILLS {
        times.push(sequence.prefill()?.1);
    }
    let prefill = Timed::of("prefill", tokens, &mut times, sequence, before);

    let (mut next, _) = sequence.prefill()?;
    let before = sequence.group.stats().comm_time;
    for step in 0..steps {
        let (token, time) = sequence.step(&[next], tokens + step)?;
        next = token;
        times.push(time);
    }
    let decode = Timed::of("decode", 1, &mut times, sequence, before);
    Ok([prefill, decode])
}

impl Timed {
    /// Of steps that took these times, which are taken away; `before` is what had been spent in
    /// collectives.
    fn of(
        part: &'static str,
        tokens: usize,
        times: &mut Vec<Duration>,
        sequence: &Sequence<'_>,
        before: Duration,
    ) -> Self {
        let spent = sequence.group.stats().comm_time.saturating_sub(before);
        let mut times = std::mem::take(times);
        let all: Duration = times.iter().sum();
        Self {
            part,
            tokens,
            collectives: spent.as_secs_f64() / all.as_secs_f64(),
            time: median(&mut times),
        }
    }
}

fn times_to_text(as_json: bool, about: &Value, heading: String, parts: &[Timed; 2]) -> String {
    let rate = |p: &Timed| p.tokens as f64 / p.time.as_secs_f64();
    let ms = |p: &Timed| p.time.as_secs_f64() * 1e3;
    if as_json {
        let line = |p: &Timed| {
            let own = json!({
                "part": p.part, "tokens": p.tokens, "ms": ms(p), "tokens_per_s": rate(p),
                "in_collectives": p.collectives,
            });
            format!("{}\n", with(about, own))
        };
        return parts.iter().map(line).collect();
    }
    let heads = ["part", "tokens", "ms", "tokens/s", "in collectives %"];
    let mut rows = vec![heads.map(String::from)];
    rows.extend(parts.iter().map(|p| {
        [
            p.part.to_owned(),
            p.tokens.to_string(),
            format!("{:.3}", ms(p)),
            format!("{:.1}", rate(p)),
            format!("{:.1}", 100.0 * p.collectives),
        ]
    }));
    use Side::{Left, Right};
    heading + &table([Left, Right, Right, Right, Right], &rows)
}

/// What all ranks did in a step.
struct Counted {
    part: &'static str,
    tokens: usize,
    /// By kernel: launches, bytes that threads loaded, stored and changed atomically.
    kernels: Vec<(String, [u64; 4])>,
    /// Copies between the host and devices, and their bytes: to devices, and from them.
    copies: [[u64; 2]; 2],
    /// Bytes between devices.
    link_bytes: u64,
}

fn counts_to_text(as_json: bool, about: &Value, heading: String, parts: &[Counted]) -> String {
    let mut out = if as_json { String::new() } else { heading };
    for p in parts {
        let [[uploads, uploaded], [downloads, downloaded]] = p.copies;
        if as_json {
            let line = |own: Value| {
                let part = json!({"part": p.part, "tokens": p.tokens});
                format!("{}\n", with(&with(about, part), own))
            };
            for (kernel, [launches, loaded, stored, atomics]) in &p.kernels {
                out += &line(json!({
                    "kernel": kernel, "launches": launches, "loaded": loaded, "stored": stored,
                    "atomics": atomics,
                }));
            }
            out += &line(json!({
                "uploads": uploads, "uploaded": uploaded, "downloads": downloads,
                "downloaded": downloaded, "link_bytes": p.link_bytes,
            }));
            continue;
        }
        let heads = ["kernel", "launches", "loaded", "stored", "atomics"];
        let mut rows = vec![heads.map(String::from)];
        rows.extend(p.kernels.iter().map(|(kernel, n)| {
            let [a, b, c, d] = n.map(|n| n.to_string());
            [kernel.clone(), a, b, c, d]
        }));
        use Side::{Left, Right};
        let tokens = p.tokens;
        out += &format!("\n{}, tokens: {tokens}; bytes of all ranks\n", p.part);
        out += &table([Left, Right, Right, Right, Right], &rows);
        out += &format!(
            "copies to devices: {uploads} of {uploaded} bytes; from them: {downloads} of \
             {downloaded}; between devices: {} bytes\n",
            p.link_bytes
        );
    }
    out
}

/// Both objects' entries.
fn with(object: &Value, more: Value) -> Value {
    let mut object = object.clone();
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

#[cfg(feature = "cuda")]
use counting::{Counting, count};
#[cfg(feature = "cuda")]
mod counting {
    use std::collections::BTreeMap;

    use ringtp::backend::cuda::Counters;
    use serde_json::Value;

    use super::{Counted, Sequence};

    /// The counters of the virtual GPU.
    pub(super) struct Counting(Counters);

    impl Counting {
        /// Begins to count where there is something that counts.
        pub(super) fn begin(on_devices: bool) -> ringtp::Result<Option<Self>> {
            match on_devices {
                true => Ok(Counters::begin()?.map(Self)),
                false => Ok(None),
            }
        }
    }

    /// A prefill, then the step of the token that it chose, or of `first`, which was chosen before.
    pub(super) fn count(
        sequence: &mut Sequence<'_>,
        counting: &mut Counting,
        first: u32,
    ) -> ringtp::Result<[Counted; 2]> {
        let tokens = sequence.prompt.len();
        counting.0.take()?;
        sequence.prefill()?;
        let prefill = counted("prefill", tokens, &counting.0.take()?);
        sequence.step(&[first], tokens)?;
        let decode = counted("decode", 1, &counting.0.take()?);
        Ok([prefill, decode])
    }

    fn counted(part: &'static str, tokens: usize, report: &Value) -> Counted {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let mut kernels: BTreeMap<String, [u64; 4]> = BTreeMap::new();
        for launch in list(&report["launches"]) {
            let name = launch["kernel"].as_str().unwrap_or_default();
            let row = kernels.entry(name.to_owned()).or_default();
            row[0] += 1;
            for (sum, kind) in row[1..].iter_mut().zip(["loads", "stores", "atomics"]) {
                *sum += number(&launch["counts"][format!("global_{kind}")]["bytes"]);
            }
        }
        let mut copies = [[0; 2]; 2];
        let mut link_bytes = 0;
        for copy in list(&report["copies"]) {
            let (count, bytes) = (number(&copy["count"]), number(&copy["bytes"]));
            match (copy["from"].is_null(), copy["to"].is_null()) {
                (true, false) => copies[0] = [copies[0][0] + count, copies[0][1] + bytes],
                (false, true) => copies[1] = [copies[1][0] + count, copies[1][1] + bytes],
                _ => {}
            }
        }
        let links = list(&report["total"]["links"]);
        for link in links.iter().filter(|link| !link["to"].is_null()) {
            let kinds = ["read", "written", "atomics", "spun"];
            link_bytes += kinds.iter().map(|kind| number(&link[*kind])).sum::<u64>();
        }
        Counted {
            part,
            tokens,
            kernels: kernels.into_iter().collect(),
            copies,
            link_bytes,
        }
    }
}

#[cfg(not(feature = "cuda"))]
use no_counting::{Counting, count};
#[cfg(not(feature = "cuda"))]
mod no_counting {
    use super::{Counted, Sequence};

    /// Nothing counts without devices.
    pub(super) enum Counting {}

    impl Counting {
        pub(super) fn begin(_on_devices: bool) -> ringtp::Result<Option<Self>> {
            Ok(None)
        }
    }

    pub(super) fn count(
        _sequence: &mut Sequence<'_>,
        counting: &mut Counting,
        _first: u32,
    ) -> ringtp::Result<[Counted; 2]> {
        match *counting {}
    }
}
