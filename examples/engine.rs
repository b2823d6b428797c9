//! An engine of one's own on ringtp's ranks: `cargo run --release --example engine -- [DIR [TP]]`.
//!
//! It has threads of its own, one a rank, and its own idea of who gets which blocks of the KV
//! cache; [`Model::forward`] and [`select`] do the rest. Requests join while others decode, so
//! that a batch holds a prompt beside single tokens. Engines without threads call
//! [`Group::forward`]: see [`logits`].
//!
//! With the feature `cuda`, `cargo run --features cuda --example engine -- DIR TP cuda` runs the same
//! engine on devices, in streams of its own; and `devices::alone` uses single kernels and
//! collectives on memory of its own, without a model.

use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use ringtp::backend::Backend;
use ringtp::backend::cpu::CpuBackend;
use ringtp::checkpoint::Checkpoint;
use ringtp::comm::{self, Communicator, TensorComm};
use ringtp::generate::Tokenizer;
use ringtp::layers::Rank;
use ringtp::llama::{Batch, Group, GroupOptions, LoadOptions, Model, SampleRow, select};
use ringtp::{DType, Result};

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

/// One rank, whatever it runs on. All ranks run this, each on its thread, and choose the same
/// tokens.
fn serve<B: Backend, C: Communicator<B>>(
    mut rank: Rank<'_, B, C>,
    checkpoint: &Checkpoint,
    dtype: DType,
    mut requests: Vec<Request>,
    steps: usize,
) -> Result<Vec<Request>> {
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
        let (mut backend, mut comm) = (CpuBackend::new(1)?, TensorComm::new(comm));
        let (backend, comm) = (&mut backend, &mut comm);
        let (rank, dtype) = (Rank { backend, comm }, checkpoint.dtype());
        let result = serve(rank, checkpoint, dtype, requests.to_vec(), steps);
        // The others learn why, and need not wait for the deadline.
        result.inspect_err(|error| comm.abort(&error.to_string()))
    };
    Ok(on_threads(comms, rank)?.swap_remove(0))
}

/// A thread for each rank's end of the group.
fn on_threads<C: Send, R: Send>(
    comms: Vec<C>,
    rank: impl Fn(C) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let rank = &rank;
    thread::scope(|scope| {
        let start = |comm| scope.spawn(move || rank(comm));
        let threads: Vec<_> = comms.into_iter().map(start).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended
            .map(|r| r.unwrap_or_else(|p| resume_unwind(p)))
            .collect()
    })
}

/// The engine on CUDA devices.
#[cfg(feature = "cuda")]
pub(crate) mod devices {
    use ringtp::backend::cuda::{
        self, Context, CudaBackend, DevicePool, DeviceSlice, GemmEpilogue, Kernels, RowLayout,
        Rows, RowsMut, Stream,
    };
    use ringtp::comm::p2p::{P2pComm, P2pGroup, P2pOptions};

    use super::*;

    /// As [`super::run`], a rank on each of these devices, in streams that the engine has already:
    /// a `CUstream` of another library will do ([`Stream::from_raw`]).
    pub(crate) fn run(
        checkpoint: &Checkpoint,
        devices: &[usize],
        dtype: DType,
        requests: &[Request],
        steps: usize,
    ) -> Result<Vec<Request>> {
        let stream = |&device: &usize| Ok(Arc::new(Stream::new(&Context::new(device)?)?));
        let streams = devices.iter().map(stream).collect::<Result<_>>()?;
        let (_group, comms) = P2pGroup::with_streams(streams, P2pOptions::default())?;
        let rank = |mut comm: P2pComm| {
            let mut backend = CudaBackend::new(comm.stream().clone(), dtype)?;
            let (backend, comm) = (&mut backend, &mut comm);
            let rank = Rank { backend, comm };
            let result = serve(rank, checkpoint, dtype, requests.to_vec(), steps);
            result.inspect_err(|error| comm.abort(&error.to_string()))
        };
        Ok(on_threads(comms, rank)?.swap_remove(0))
    }

    /// Kernels and a collective alone, on memory that the engine knows by its address: each rank
    /// multiplies its part of x, `[1, k]`, by its columns of w, `[n, k]`, and the ranks' sum is
    /// normalised. All get the same; the first's is returned.
    pub(crate) fn alone(x: &[f32], w: &[f32], devices: &[usize]) -> Result<Vec<f32>> {
        let (k, n, tp) = (x.len(), w.len() / x.len(), devices.len());
        let (_group, comms) = P2pGroup::new(devices, P2pOptions::default())?;
        let rank = |mut comm: P2pComm| {
            let stream = comm.stream().clone();
            let (kernels, part) = (Kernels::load(stream.context())?, k / tp);
            // This engine's memory; any other's address would do.
            let pool = DevicePool::new(stream.context(), 0);
            let (x, w) = (pool.upload(x, &stream)?, pool.upload(w, &stream)?);
            let weight = pool.upload(&vec![1.0_f32; n], &stream)?;
            let (mut sum, mut out) = (pool.buffer(4 * n)?, pool.buffer(4 * n)?);
            let dense = |rows, cols| RowLayout::contiguous(DType::F32, rows, cols);
            // The rank's columns of both: from an address, as it comes from elsewhere.
            let columns = |address: u64, rows: usize| -> Result<Rows<'_>> {
                let first = (4 * comm.rank() * part) as u64;
                let layout = RowLayout {
                    stride: k,
                    ..dense(rows, part)
                };
                let bytes = 4 * ((rows - 1) * k + part);
                // SAFETY: the columns are within the buffers above, which live until the end.
                let data = unsafe { DeviceSlice::from_raw(address + first, bytes) };
                Rows::new(data, layout)
            };
            let (x_part, w_part) = (columns(x.address(), 1)?, columns(w.address(), n)?);
            let to = RowsMut::new(sum.as_mut(), dense(1, n))?;
            cuda::gemm(
                &kernels,
                &stream,
                x_part,
                w_part,
                GemmEpilogue::default(),
                to,
            )?;
            comm.all_reduce(DType::F32, &mut sum.as_mut())?;
            let from = Rows::new(sum.as_ref(), dense(1, n))?;
            let to = RowsMut::new(out.as_mut(), dense(1, n))?;
            cuda::rms_norm(&kernels, &stream, from, weight.as_ref(), 1e-5, to)?;
            comm.synchronize()?;
            let mut values = vec![0.0; n];
            stream.download(out.as_ref(), &mut values)?;
            Ok(values)
        };
        Ok(on_threads(comms, rank)?.swap_remove(0))
    }
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
    let served = match args.next().as_deref() {
        #[cfg(feature = "cuda")]
        Some("cuda") => {
            let devices: Vec<_> = (0..tp).collect();
            let (x, w) = (vec![1.0; tp], [vec![1.0; tp], vec![2.0; tp]].concat());
            let normed = devices::alone(&x, &w, &devices)?;
            println!("kernels and a sum over the ranks, alone: {normed:?}");
            devices::run(&checkpoint, &devices, checkpoint.dtype(), &requests, 24)?
        }
        _ => run(&checkpoint, tp, &requests, 24)?,
    };
    for (request, text) in served.iter().zip(texts) {
        let generated = &request.tokens[request.prompt_len as usize..];
        println!("{text}{}\n  {generated:?}", tokenizer.decode(generated)?);
    }
    let logits = logits(checkpoint, tp, &requests[0])?;
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    println!("the first of these by its logits: {best:?}");
    Ok(())
}
