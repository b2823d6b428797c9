//! A request gets the same tokens alone, in a batch, in chunks, and after a recompute; no
//! block is lost or shared.
//!
//! The engine here keeps token ids in the blocks of its cache and chooses a hash of the whole
//! history as it reads it back *through the block table*. A wrong table, position, chunk or
//! recompute gives another token.

use std::ops::ControlFlow;

use proptest::prelude::*;
use ringtp::Result;
use ringtp::checkpoint::GenerationConfig;
use ringtp::generate::{
    Completion, Engine, FinishReason, Request, SamplingParams, Scheduler, Timing, run,
};
use ringtp::llama::{Batch, Limits, SampleRow};

const VOCAB: usize = 97;

/// Ways in which an engine's driver can be wrong, for the negative controls.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The second block of every table is the first.
    Table,
    /// The first row of a chunk that is not the first gets lost.
    Chunk,
    /// Draws depend on the place in the batch.
    Draw,
}

struct Fake {
    limits: Limits,
    /// For each slot its token; `u32::MAX` where nothing was written.
    cache: Vec<u32>,
    max_rows: usize,
    fault: Fault,
}

impl Fake {
    fn new(num_blocks: usize, block_size: usize) -> Self {
        let limits = Limits {
            vocab_size: VOCAB,
            max_model_len: 64,
            num_blocks,
            block_size,
        };
        Self {
            limits,
            cache: vec![u32::MAX; num_blocks * block_size],
            max_rows: 0,
            fault: Fault::None,
        }
    }

    fn slot(&self, table: &[u32], position: usize) -> usize {
        let size = self.limits.block_size;
        table[position / size] as usize * size + position % size
    }
}

fn mix(hash: u64, value: u64) -> u64 {
    let x = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^ (x >> 29)
}

impl Engine for Fake {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn step(&mut self, batch: &Batch, sample: &[SampleRow]) -> Result<Vec<u32>> {
        batch.check(&self.limits)?;
        assert_eq!(batch.logits_rows.len(), sample.len());
        self.max_rows = self.max_rows.max(batch.rows());
        let mut tables = batch.block_tables.clone();
        if self.fault == Fault::Table {
            for table in tables.iter_mut().filter(|table| table.len() > 1) {
                table[1] = table[0];
            }
        }
        // No block in two tables: a KV entry has one owner.
        if self.fault == Fault::None {
            let mut owners = tables.concat();
            owners.sort_unstable();
            owners.dedup();
            assert_eq!(owners.len(), tables.iter().map(Vec::len).sum::<usize>());
        }
        for (s, table) in tables.iter().enumerate() {
            for row in batch.rows_of(s) {
                let position = batch.positions[row] as usize;
                let lost = self.fault == Fault::Chunk
                    && row == batch.rows_of(s).start
                    && position > 0
                    && batch.rows_of(s).len() > 1;
                if !lost {
                    let slot = self.slot(table, position);
                    self.cache[slot] = batch.token_ids[row];
                }
            }
        }
        let choose = |(place, (&row, sample)): (usize, (&u32, &SampleRow))| {
            let s = (0..batch.sequences())
                .find(|&s| batch.rows_of(s).contains(&(row as usize)))
                .expect("a sequence of the row");
            let last = batch.positions[row as usize] as usize;
            assert_eq!(sample.draw, last as u64 + 1, "draw is the position to come");
            let mut hash = mix(sample.seed, sample.draw);
            hash = mix(hash, batch.prompt_lens[s].into());
            for &id in &sample.penalized {
                hash = mix(hash, id.into());
            }
            for position in 0..=last {
                hash = mix(hash, self.cache[self.slot(&tables[s], position)].into());
            }
            if self.fault == Fault::Draw {
                hash = mix(hash, place as u64);
            }
            let allowed = |id: &u32| !sample.banned.contains(id);
            (0..VOCAB as u32)
                .map(|i| ((hash % VOCAB as u64) as u32 + i) % VOCAB as u32)
                .find(allowed)
                .expect("an id that is allowed")
        };
        let rows = batch.logits_rows.iter().zip(sample);
        Ok(rows.enumerate().map(choose).collect())
    }
}

/// What a request is to come to, from the definition: no batch, no blocks, no chunks.
fn oracle(request: &Request<'_>) -> Vec<u32> {
    let sampling = &request.sampling;
    let mut history = request.prompt.clone();
    let room = (64 + 1 - history.len()).min(sampling.max_tokens.unwrap_or(usize::MAX));
    while history.len() - request.prompt.len() < room {
        let generated = history.len() - request.prompt.len();
        let mut hash = mix(sampling.seed, history.len() as u64);
        hash = mix(hash, request.prompt.len() as u64);
        if sampling.repetition_penalty != 1.0 {
            let seen: std::collections::BTreeSet<_> = history.iter().copied().collect();
            for id in seen {
                hash = mix(hash, id.into());
            }
        }
        for &id in &history {
            hash = mix(hash, id.into());
        }
        let mut id = (hash % VOCAB as u64) as u32;
        while generated < sampling.min_tokens && sampling.stop_ids.contains(&id) {
            id = (id + 1) % VOCAB as u32;
        }
        history.push(id);
        if sampling.stop_ids.contains(&id) {
            break;
        }
    }
    history.split_off(request.prompt.len())
}

fn request(prompt: Vec<u32>, params: &SamplingParams) -> Request<'static> {
    let sampling = params.resolve(&GenerationConfig::default(), &[3, 5]);
    Request {
        prompt,
        sampling: sampling.expect("valid parameters"),
        tokenizer: None,
    }
}

fn serve(fake: &mut Fake, rows: usize, all: &[Request<'_>]) -> (Vec<Completion>, Timing) {
    run(fake, rows, all, &mut |_| ControlFlow::Continue(())).expect("served")
}

fn ids(completions: &[Completion]) -> Vec<Vec<u32>> {
    completions.iter().map(|c| c.ids.clone()).collect()
}

fn any_request() -> impl Strategy<Value = Request<'static>> {
    let prompt = prop::collection::vec(0..VOCAB as u32, 1..40);
    (prompt, 1..25_usize, 0..4_usize, any::<u64>(), 0..3_u8).prop_map(
        |(prompt, max_tokens, min_tokens, seed, kind)| {
            let params = SamplingParams::default()
                .max_tokens(max_tokens)
                .min_tokens(min_tokens.min(max_tokens))
                .ignore_eos(kind == 0)
                .repetition_penalty(if kind == 1 { 1.5 } else { 1.0 })
                .seed(seed);
            request(prompt, &params)
        },
    )
}

proptest! {
    #[test]
    fn tokens_do_not_depend_on_company_chunks_or_recomputation(
        requests in prop::collection::vec(any_request(), 1..8),
        rows in 1..50_usize,
        block_size in prop::sample::select(vec![1, 2, 3, 4, 16]),
        spare_blocks in 0..30_usize,
    ) {
        let longest = requests
            .iter()
            .map(|r| r.prompt.len() + r.sampling.max_tokens.unwrap_or(1) - 1)
            .max()
            .unwrap_or(1);
        let blocks = longest.min(64).div_ceil(block_size) + spare_blocks;
        let mut fake = Fake::new(blocks, block_size);
        let (completions, timing) = serve(&mut fake, rows, &requests);
        let expected: Vec<_> = requests.iter().map(oracle).collect();
        prop_assert_eq!(ids(&completions), expected);
        prop_assert!(fake.max_rows <= rows, "{} rows a step, allowed {rows}", fake.max_rows);
        if timing.preemptions == 0 {
            let prompts: usize = requests.iter().map(|r| r.prompt.len()).sum();
            prop_assert_eq!(timing.prefill_tokens, prompts);
        }
        for (completion, request) in completions.iter().zip(&requests) {
            prop_assert_eq!(completion.usage.prompt_tokens, request.prompt.len());
            prop_assert_eq!(completion.usage.completion_tokens, completion.ids.len());
            let stopped = completion.ids.last().is_some_and(|id| request.sampling.stop_ids.contains(id));
            let reason = if stopped { FinishReason::Stop } else { FinishReason::Length };
            prop_assert_eq!(completion.finish_reason, reason);
        }
    }

    #[test]
    fn no_block_is_lost(
        requests in prop::collection::vec(any_request(), 1..8),
        rows in 1..50_usize,
        end_early in prop::collection::vec((0..8_usize, 0..20_usize), 0..4),
    ) {
        let mut fake = Fake::new(18, 4);
        let mut scheduler = Scheduler::new(fake.limits(), rows).expect("a scheduler");
        for (id, request) in requests.iter().enumerate() {
            let sampling = request.sampling.clone();
            scheduler.submit(id, &request.prompt, sampling).expect("it fits");
        }
        for turn in 0.. {
            for &(id, _) in end_early.iter().filter(|&&(_, when)| when == turn) {
                scheduler.finish(id).expect("finished");
            }
            if scheduler.is_idle() {
                break;
            }
            let step = scheduler.schedule().expect("a step");
            let tokens = fake.step(&step.batch, &step.sample).expect("tokens");
            for id in scheduler.commit(&step, &tokens).expect("committed") {
                scheduler.finish(id).expect("finished");
            }
        }
        prop_assert_eq!(scheduler.free_blocks(), 18);
    }
}

/// Eight requests that overfill a cache of 20 blocks of 4.
fn crowd() -> Vec<Request<'static>> {
    (0..8)
        .map(|i| {
            let params = SamplingParams::default()
                .max_tokens(30)
                .ignore_eos(true)
                .seed(i);
            request((0..20 + i as u32).collect(), &params)
        })
        .collect()
}

#[test]
fn a_crowd_preempts_and_nobody_notices() {
    let requests = crowd();
    let (completions, timing) = serve(&mut Fake::new(20, 4), 16, &requests);
    assert!(timing.preemptions > 0, "the cache is too small for all");
    assert_eq!(
        ids(&completions),
        requests.iter().map(oracle).collect::<Vec<_>>()
    );
}

#[test]
fn faults_of_a_driver_show_up_as_other_tokens() {
    let requests = crowd();
    let expected: Vec<_> = requests.iter().map(oracle).collect();
    for fault in [Fault::Table, Fault::Chunk, Fault::Draw] {
        let mut fake = Fake::new(200, 4);
        fake.fault = fault;
        let (completions, _) = serve(&mut fake, 16, &requests);
        assert_ne!(ids(&completions), expected);
    }
}

#[test]
fn requests_finish_in_order_of_arrival_where_they_are_alike() {
    let params = SamplingParams::default()
        .max_tokens(12)
        .ignore_eos(true)
        .seed(1);
    let requests: Vec<_> = (0..6).map(|_| request(vec![1; 20], &params)).collect();
    let mut order = Vec::new();
    let mut listen = |event: ringtp::generate::Event<'_>| {
        if let ringtp::generate::Event::Finished { request, .. } = event {
            order.push(request);
        }
        ControlFlow::Continue(())
    };
    run(&mut Fake::new(16, 4), 8, &requests, &mut listen).expect("served");
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn what_can_never_fit_is_refused_with_the_arithmetic() {
    let params = |max| SamplingParams::default().max_tokens(max).seed(1);
    let refuse = |blocks, prompt: Vec<u32>, params: &SamplingParams| {
        let mut fake = Fake::new(blocks, 4);
        let requests = [
            request(vec![1], &SamplingParams::greedy()),
            request(prompt, params),
        ];
        let error = run(&mut fake, 8, &requests, &mut |_| ControlFlow::Continue(()));
        let error = error.expect_err("refused");
        assert!(error.is_input());
        assert_eq!(fake.max_rows, 0, "refused before any work");
        error.to_string()
    };
    let text = refuse(5, vec![1; 15], &params(7));
    assert!(text.contains("20 positions (5 blocks of 4)"), "{text}");
    assert!(
        text.contains("21 (15 of the prompt, 6 of generated tokens)"),
        "{text}"
    );
    let text = refuse(20, vec![1; 65], &params(1));
    assert!(
        text.contains("context of 64") && text.contains("65"),
        "{text}"
    );
    let text = refuse(20, vec![], &params(1));
    assert!(
        text.contains("prompt 1") && text.contains("at least one token"),
        "{text}"
    );
    let text = refuse(20, vec![1, 97], &params(1));
    assert!(text.contains("97") && text.contains("prompt 1"), "{text}");
}

#[test]
fn the_last_place_of_context_and_cache_is_used() {
    // 64 positions, all fed; the token after the last needs none.
    let all = SamplingParams::default().ignore_eos(true).seed(1);
    let (done, _) = serve(&mut Fake::new(16, 4), 8, &[request(vec![1; 64], &all)]);
    assert_eq!(done[0].ids.len(), 1);
    let (done, _) = serve(&mut Fake::new(16, 4), 8, &[request(vec![1; 10], &all)]);
    assert_eq!(done[0].ids.len(), 55);
    // A cache of 20 positions ends it sooner, where no number of tokens was asked for.
    let (done, _) = serve(&mut Fake::new(5, 4), 8, &[request(vec![1; 10], &all)]);
    assert_eq!(done[0].ids.len(), 11);
    assert_eq!(done[0].finish_reason, FinishReason::Length);
    let exact = all.max_tokens(11);
    let (done, _) = serve(&mut Fake::new(5, 4), 8, &[request(vec![1; 10], &exact)]);
    assert_eq!(done[0].ids.len(), 11);
}

#[test]
fn a_callback_can_end_a_request_without_touching_the_others() {
    let params = SamplingParams::default()
        .max_tokens(10)
        .ignore_eos(true)
        .seed(1);
    let requests = [request(vec![1; 5], &params), request(vec![2; 5], &params)];
    let mut listen = |event: ringtp::generate::Event<'_>| match event {
        ringtp::generate::Event::Token { request: 0, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let (done, _) = run(&mut Fake::new(16, 4), 8, &requests, &mut listen).expect("served");
    assert_eq!(done[0].finish_reason, FinishReason::Cancelled);
    assert_eq!(done[0].ids, oracle(&requests[0])[..1]);
    assert_eq!(done[1].ids, oracle(&requests[1]));
}

#[test]
fn an_engine_that_fails_ends_the_run_with_its_error() {
    struct Failing(Fake, usize);
    impl Engine for Failing {
        fn limits(&self) -> Limits {
            self.0.limits()
        }
        fn step(&mut self, batch: &Batch, sample: &[SampleRow]) -> Result<Vec<u32>> {
            self.1 += 1;
            match self.1 {
                3 => Ok(vec![]),
                _ => self.0.step(batch, sample),
            }
        }
    }
    let requests = [request(
        vec![1],
        &SamplingParams::default().max_tokens(9).ignore_eos(true),
    )];
    let mut engine = Failing(Fake::new(16, 4), 0);
    let result = run(
        &mut engine,
        8,
        &requests,
        &mut |_| ControlFlow::Continue(()),
    );
    let text = result.expect_err("too few tokens").to_string();
    assert!(
        text.contains("1 tokens") && text.contains("found 0"),
        "{text}"
    );
}
