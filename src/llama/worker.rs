//! The thread of one rank of a [`super::Group`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use super::group::{Progress, StepHook};
use super::seat::{Member, Seat};
use super::{Batch, KvCache, LoadOptions, Model, SampleRow, select};
use crate::backend::MemoryUse;
use crate::checkpoint::Checkpoint;
use crate::comm::{CommError, CommStats};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::{Partition, Rank};

/// What a rank is asked to do.
pub(super) enum Command {
    /// One step.
    Run(Arc<Work>),
    /// Go on with the group as it is made anew; with a new end of it, where there is one.
    Rejoin(Option<Seat>),
}

/// One step, the same for all ranks.
pub(super) struct Work {
    /// Counts the steps of the group.
    pub(super) step: u64,
    pub(super) batch: Batch,
    /// How tokens are chosen; `None` where the logits are wanted.
    pub(super) sample: Option<Vec<SampleRow>>,
}

/// What a rank answers, to its loading and to every command.
pub(super) struct Reply {
    pub(super) rank: usize,
    /// Which thread of this rank it is from: a lost one may answer late.
    pub(super) incarnation: u64,
    pub(super) result: Result<Output>,
    pub(super) stats: CommStats,
    pub(super) memory: MemoryUse,
}

/// What a step came to.
pub(super) enum Output {
    /// Loaded, or rejoined.
    Ready,
    /// `[logits_rows, vocab]`; empty on all ranks but the first.
    Logits(Vec<f32>),
    /// One a row of logits.
    Tokens(Vec<u32>),
}

/// What a rank is made of.
#[derive(Clone)]
pub(super) struct Setup {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) part: Partition,
    pub(super) incarnation: u64,
    /// The thread stands in for a lost one, in a group that is being made anew.
    pub(super) rejoins: bool,
    pub(super) threads: usize,
    pub(super) dtype: DType,
    pub(super) tp_invariant: bool,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for devices"))]
    pub(super) batch_invariant: bool,
    pub(super) max_model_len: usize,
    pub(super) num_blocks: usize,
    pub(super) block_size: usize,
    pub(super) progress: Option<Progress>,
    pub(super) on_step: Option<StepHook>,
}

struct Worker<C: Member> {
    setup: Setup,
    backend: C::Backend,
    comm: C,
    model: Model<C::Backend>,
    kv: KvCache<C::Backend>,
}

/// Loads the rank's part, then serves commands until the group is dropped.
pub(super) fn serve(
    setup: Setup,
    seat: Seat,
    commands: Receiver<Command>,
    replies: &Sender<Reply>,
) {
    match seat {
        Seat::Cpu(comm) => serve_on(setup, *comm, commands, replies),
        #[cfg(feature = "cuda")]
        Seat::Cuda(comm) => serve_on(setup, *comm, commands, replies),
    }
}

fn serve_on<C: Member>(
    setup: Setup,
    mut comm: C,
    commands: Receiver<Command>,
    replies: &Sender<Reply>,
) {
    let reply = |comm: &C, memory, result| {
        let Partition { rank, .. } = setup.part;
        let incarnation = setup.incarnation;
        // A group that is gone needs no reply.
        let _ = replies.send(Reply {
            rank,
            incarnation,
            result,
            stats: comm.stats(),
            memory,
        });
    };
    let loaded = guarded(setup.part.rank, || load(&setup, &mut comm));
    let (backend, model, kv) = match loaded {
        Ok(parts) => parts,
        Err(error) => {
            abort(&mut comm, &error);
            // Before the reply: whoever has it finds that this thread takes no more commands.
            drop(commands);
            return reply(&comm, MemoryUse::default(), Err(error));
        }
    };
    let mut worker = Worker {
        setup: setup.clone(),
        backend,
        comm,
        model,
        kv,
    };
    let memory = worker.memory();
    reply(&worker.comm, memory, Ok(Output::Ready));
    while let Ok(command) = commands.recv() {
        let result = match command {
            Command::Rejoin(seat) => guarded(setup.part.rank, || {
                worker.comm.rejoin(seat)?;
                Ok(Output::Ready)
            }),
            Command::Run(work) => {
                let result = guarded(setup.part.rank, || worker.run(&work));
                if let Err(error) = &result
                    && !matches!(error, Error::Sampling(_))
                {
                    // All ranks choose tokens alike, so they all have that error; any other
                    // may be this rank's alone.
                    abort(&mut worker.comm, error);
                }
                result
            }
        };
        let memory = worker.memory();
        reply(&worker.comm, memory, result);
    }
}

/// Ends the group because of `error`; what names this rank already need not say so twice.
fn abort<C: Member>(comm: &mut C, error: &Error) {
    let me = comm.rank();
    match error {
        Error::Comm(CommError::RankFailed { rank, cause }) if *rank == me => comm.abort(cause),
        error => comm.abort(&error.to_string()),
    }
}

/// Runs `f`; a panic becomes an error that names the rank.
fn guarded<R>(rank: usize, f: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let cause = format!("panicked: {}", panic_message(&*panic));
        Err(CommError::RankFailed { rank, cause }.into())
    })
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let message = panic.downcast_ref::<&str>().copied();
    message
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}

/// What a rank computes with.
type Loaded<B> = (B, Model<B>, KvCache<B>);

fn load<C: Member>(setup: &Setup, comm: &mut C) -> Result<Loaded<C::Backend>> {
    if setup.rejoins {
        // Before anything else: the others wait for it.
        comm.rejoin(None)?;
    }
    let mut backend = comm.backend(setup)?;
    let progress = |bytes| {
        if let Some(progress) = &setup.progress {
            progress(bytes);
        }
    };
    let mut rank = Rank {
        backend: &mut backend,
        comm,
    };
    let options = LoadOptions {
        dtype: setup.dtype,
        tp_invariant: setup.tp_invariant,
    };
    let mut model = Model::load(&mut rank, &setup.checkpoint, options, &progress)?;
    model.limit_context(setup.max_model_len);
    let kv = model.kv_cache(
        &mut backend,
        setup.num_blocks,
        setup.block_size,
        setup.dtype,
    )?;
    Ok((backend, model, kv))
}

impl<C: Member> Worker<C> {
    fn memory(&mut self) -> MemoryUse {
        let Self {
            backend,
            comm,
            model,
            kv,
            ..
        } = self;
        model.memory(&Rank { backend, comm }, kv)
    }

    fn run(&mut self, work: &Work) -> Result<Output> {
        if let Some(on_step) = &self.setup.on_step {
            on_step(self.setup.part.rank, work.step);
        }
        let Self {
            setup,
            backend,
            comm,
            model,
            kv,
        } = self;
        let mut rank = Rank { backend, comm };
        let (logits, head) = model.forward(&mut rank, &work.batch, kv)?;
        if let Some(sample) = &work.sample {
            return Ok(Output::Tokens(select(&mut rank, head, logits, sample)?));
        }
        let logits = model.gather_logits(&mut rank, work.batch.logits_rows.len())?;
        Ok(Output::Logits(if setup.part.rank == 0 {
            logits
        } else {
            Vec::new()
        }))
    }
}
