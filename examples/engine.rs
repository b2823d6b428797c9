//! An engine of one's own on ringtp's ranks: `cargo run --release --example engine -- [DIR [TP]]`.
//!
//! It has threads of its own, one a rank, and its own idea of who gets which blocks of the KV
//! cache; [`Model::forward`] and [`select`] do the rest. Requests join while others decode, so
//! that a batch holds a prompt beside single tokens. Engines without threads call
//! [`Group::forward`]: see [`logits`].

use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use ringtp::Result;
use ringtp::backend::cpu::CpuBackend;
use ringtp::checkpoint::Checkpoint;
use ringtp::comm::{self, Communicator, TensorComm};
use ringtp::generate::Tokenizer;
use ringtp::layers::Rank;
use ringtp::llama::{Batch, Group, GroupOptions, LoadOptions, Model, SampleRow, select};

/// The engine's policy: so many blocks of 16 positions for every request, from the start.
const BLOCKS_EACH: u32 = 6;

#[derive(Clone)]
pub(crate) struct Request {
    /// The step at which it comes.
    pub(crate) joins: usize,
    pub(crate) prompt_len: u32,
    /// The prompt's, then those generated.
    pub(crate) tokens: Vec<u32>,
    /// How many of them are in the KV cache.
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<u32>,
}

/// One rank. All ranks run this, each on its thread, and choose the same tokens.
fn serve(
    comm: &mut TensorComm,
    checkpoint: &Checkpoint,
    mut requests: Vec<Request>,
    steps: usize,
) -> Result<Vec<Request>> {
    let backend = &mut CpuBackend::new(1)?;
    let mut rank = Rank { backend, comm };
    let dtype = checkpoint.dtype();
    let options = LoadOptions {
        dtype,
        tp_invariant: false,
    };
    let mut model = Model::load(&mut rank, checkpoint, options, &|_| {})?;
    let blocks = requests.len() * BLOCKS_EACH as usize;
    let mut kv = model.kv_cache(rank.backend, blocks, 16, dtype)?;
    for step in 0..steps {
        let mut batch = Batch::new();
        let here = |request: &&mut Request| request.joins <= step;
        let mut running: Vec<_> = requests.iter_mut().filter(here).collect();
        for r in &mut running {
            // The whole prompt at first, then the one new token.
            let (new, position) = (&r.tokens[r.computed..], r.computed as u32);
            let rows = batch.push(new, position, r.prompt_len, &r.blocks);
            batch.logits_rows.push(rows.end - 1);
            r.computed = r.tokens.len();
        }
        let sample = vec![SampleRow::greedy(); running.len()];
        let (logits, head) = model.forward(&mut rank, &batch, &mut kv)?;
        let tokens = select(&mut rank, head, logits, &sample)?;
        for (request, token) in running.into_iter().zip(tokens) {
            request.tokens.push(token);
        }
    }
    Ok(requests)
}

/// [`serve`] on `tp` threads; what it came to is the same on all.
pub(crate) fn run(
    checkpoint: &Checkpoint,
    tp: usize,
    requests: &[Request],
    steps: usize,
) -> Result<Vec<Request>> {
    let (_group, comms) = comm::Group::new(tp, Default::default())?;
    let rank = |comm| {
        let mut comm = TensorComm::new(comm);
        let result = serve(&mut comm, checkpoint, requests.to_vec(), steps);
        // The others learn why, and need not wait for the deadline.
        result.inspect_err(|error| comm.abort(&error.to_string()))
    };
    let all: Result<Vec<_>> = thread::scope(|scope| {
        let start = |comm| scope.spawn(move || rank(comm));
        let threads: Vec<_> = comms.into_iter().map(start).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended
            .map(|r| r.unwrap_or_else(|p| resume_unwind(p)))
            .collect()
    });
    Ok(all?.swap_remove(0))
}

/// The other entry: ranks that the library keeps. The logits after a prompt, `[vocab]`.
pub(crate) fn logits(checkpoint: Arc<Checkpoint>, tp: usize, r: &Request) -> Result<Vec<f32>> {
    let options = GroupOptions {
        tp,
        ..Default::default()
    };
    let mut group = Group::load(checkpoint, options)?;
    let mut batch = Batch::new();
    let rows = batch.push(&r.tokens, 0, r.prompt_len, &r.blocks);
    batch.logits_rows.push(rows.end - 1);
    group.forward(&batch)
}

/// Each text as the prompt of a request that joins three steps after the one before.
pub(crate) fn requests(tokenizer: &Tokenizer, texts: &[&str]) -> Result<Vec<Request>> {
    let request = |(i, text): (u32, &&str)| {
        let tokens = tokenizer.encode(text)?;
        Ok(Request {
            joins: 3 * i as usize,
            prompt_len: tokens.len() as u32,
            tokens,
            computed: 0,
            blocks: (i * BLOCKS_EACH..(i + 1) * BLOCKS_EACH).collect(),
        })
    };
    (0..).zip(texts).map(request).collect()
}

fn main() -> Result<()> {
    let austen = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/austen");
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| austen.into());
    let tp = args.next().and_then(|tp| tp.parse().ok()).unwrap_or(2);
    let checkpoint = Arc::new(Checkpoint::open(&dir)?);
    let tokenizer = Tokenizer::open(Path::new(&dir))?;
    let texts = ["It is a truth universally", "My dear Mr. Bennet", "The"];
    let requests = requests(&tokenizer, &texts)?;
    for (request, text) in run(&checkpoint, tp, &requests, 24)?.iter().zip(texts) {
        let generated = &request.tokens[request.prompt_len as usize..];
        println!("{text}{}\n  {generated:?}", tokenizer.decode(generated)?);
    }
    let logits = logits(checkpoint, tp, &requests[0])?;
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    println!("the first of these by its logits: {best:?}");
    Ok(())
}
