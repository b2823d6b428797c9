//! The ranks of one process, each on a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SendError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use super::capacity;
use super::seat::Seat;
use super::worker::{Command, Output, Reply, Setup, Work, serve};
use super::{Batch, Limits, SampleRow};
use crate::backend::MemoryUse;
use crate::checkpoint::Checkpoint;
#[cfg(feature = "cuda")]
use crate::comm::p2p::{self, P2pGroup, P2pOptions};
use crate::comm::{self, AllReduce, CommError, CommStats, Rounding, TensorComm};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::Partition;
#[cfg(feature = "cuda")]
use crate::shard::ShardPlan;

/// More threads than any machine has cores are a mistake, and starting them would take long.
const MAX_THREADS: usize = 4096;

/// Told the bytes of each weight as a rank is done with it.
pub type Progress = Arc<dyn Fn(usize) + Send + Sync>;

/// Called with (rank, step) on each rank's thread when it starts a step: for tracing, and for
/// tests that make a rank fail.
pub type StepHook = Arc<dyn Fn(usize, u64) + Send + Sync>;

/// How a [`Group`] is made.
#[derive(Clone)]
pub struct GroupOptions {
    /// Number of ranks.
    pub tp: usize,
    /// Threads of all ranks together, at least one each; by default the cores.
    pub threads: Option<usize>,
    /// Storage type of weights and KV cache; by default the checkpoint's.
    pub dtype: Option<DType>,
    /// The same bits for any number of ranks, for about one and a half times the bytes between
    /// them.
    pub tp_invariant: bool,
    /// Each rank adds and normalises its part of the rows: see [`TensorComm::sequence_parallel`].
    pub sequence_parallel: bool,
    /// The bits of a row do not depend on its batch on devices either, for slower steps of few rows:
    /// by default they are the same among products of up to four rows, and among those of more. An
    /// all-reduce that rounds at each hop cannot keep that: with one it is an error, unless
    /// `tp_invariant` leaves it nothing to round. On the CPU it changes nothing else.
    pub batch_invariant: bool,
    /// Longest sequence; by default, and at most, what the model was made for.
    pub max_model_len: Option<usize>,
    /// Positions in a block of the KV cache.
    pub block_size: usize,
    /// Blocks of the KV cache; by default enough for 16 sequences, or for 65536 positions
    /// where that is less, and always for one of the longest sequences; on devices no more than
    /// fit into what is free there beside the weights.
    pub num_blocks: Option<usize>,
    /// The all-reduce, by name; by default chosen by size.
    pub all_reduce: Option<String>,
    /// How long a rank waits for another.
    pub deadline: Duration,
    /// The CUDA device of each rank; one may have several. By default ranks are threads on the CPU.
    /// Needs the feature `cuda`.
    pub devices: Option<Vec<usize>>,
    /// Told of the loading.
    pub progress: Option<Progress>,
    /// Told of every step.
    pub on_step: Option<StepHook>,
}

impl Default for GroupOptions {
    fn default() -> Self {
        Self {
            tp: 1,
            threads: None,
            dtype: None,
            tp_invariant: false,
            sequence_parallel: false,
            batch_invariant: false,
            max_model_len: None,
            block_size: 16,
            num_blocks: None,
            all_reduce: None,
            deadline: comm::GroupOptions::default().deadline,
            devices: None,
            progress: None,
            on_step: None,
        }
    }
}

impl std::fmt::Debug for GroupOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupOptions")
            .field("tp", &self.tp)
            .field("threads", &self.threads)
            .field("dtype", &self.dtype)
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}

/// What a group has spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupStats {
    /// Time in collectives, waiting included, of the rank that spent most.
    pub comm_time: Duration,
    /// Collectives of one rank.
    pub comm_calls: u64,
    /// Bytes that all ranks sent.
    pub comm_bytes: u64,
}

/// The ranks of a model as threads of this process: what [`super::Model::forward`] is to one
/// rank, for all.
///
/// When a rank fails, panics or does not come back within the deadline, the call returns the
/// cause, and so does every later one until [`Self::rebuild`].
pub struct Group {
    checkpoint: Arc<Checkpoint>,
    options: GroupOptions,
    setup: Setup,
    limits: Limits,
    ranks: Vec<RankThread>,
    replies: Receiver<Reply>,
    /// For new threads.
    reply_to: Sender<Reply>,
    stats: Vec<CommStats>,
    memory: Vec<MemoryUse>,
    steps: u64,
    incarnations: u64,
    failed: Option<Error>,
    /// Where ranks are on devices.
    #[cfg(feature = "cuda")]
    p2p: Option<P2pGroup>,
}

struct RankThread {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
    incarnation: u64,
    /// It owes a reply; a rank that still does after a failure is lost.
    busy: bool,
}

impl RankThread {
    /// Lets the thread go on, with a new end of the group where there is one. If it cannot, gives
    /// that back.
    fn rejoin(&mut self, seat: Option<Seat>) -> Result<(), Option<Seat>> {
        if self.busy {
            return Err(seat);
        }
        match self.commands.send(Command::Rejoin(seat)) {
            Ok(()) => {
                self.busy = true;
                Ok(())
            }
            Err(SendError(Command::Rejoin(seat))) => Err(seat),
            Err(SendError(Command::Run(_))) => unreachable!("what was sent comes back"),
        }
    }
}

impl Group {
    /// Loads `checkpoint` onto `options.tp` ranks, each reading its own slices.
    ///
    /// # Errors
    /// A `tp` that is not valid for the model, with those that are; options out of range;
    /// memory.
    pub fn load(checkpoint: Arc<Checkpoint>, options: GroupOptions) -> Result<Self> {
        let config = checkpoint.config();
        config.dims.check_tp(options.tp)?;
        let limits = limits(&checkpoint, &options)?;
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let setup = Setup {
            checkpoint: checkpoint.clone(),
            part: Partition {
                tp: options.tp,
                rank: 0,
            },
            incarnation: 0,
            rejoins: false,
            threads: (options.threads.unwrap_or(cores) / options.tp).max(1),
            dtype: options.dtype.unwrap_or(checkpoint.dtype()),
            tp_invariant: options.tp_invariant,
            batch_invariant: options.batch_invariant,
            max_model_len: limits.max_model_len,
            num_blocks: limits.num_blocks,
            block_size: limits.block_size,
            progress: options.progress.clone(),
            on_step: options.on_step.clone(),
        };
        let (reply_to, replies) = mpsc::channel();
        let mut group = Self {
            checkpoint,
            stats: vec![CommStats::default(); options.tp],
            memory: vec![MemoryUse::default(); options.tp],
            options,
            setup,
            limits,
            ranks: Vec::new(),
            replies,
            reply_to,
            steps: 0,
            incarnations: 0,
            failed: None,
            #[cfg(feature = "cuda")]
            p2p: None,
        };
        for seat in group.seats()? {
            let rank = group.ranks.len();
            let thread = group.spawn(rank, seat, false)?;
            group.ranks.push(thread);
        }
        group.collect()?;
        Ok(group)
    }

    /// The checkpoint it was loaded from.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// What a batch must keep to.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The storage type of weights and KV cache.
    pub fn dtype(&self) -> DType {
        self.setup.dtype
    }

    /// What was spent since the group was loaded or last rebuilt.
    pub fn stats(&self) -> GroupStats {
        GroupStats {
            comm_time: self
                .stats
                .iter()
                .map(|s| s.elapsed)
                .max()
                .unwrap_or_default(),
            comm_calls: self.stats.iter().map(|s| s.calls).max().unwrap_or_default(),
            comm_bytes: self.stats.iter().map(|s| s.bytes_sent).sum(),
        }
    }

    /// What memory each rank has, as of its last answer.
    pub fn memory(&self) -> &[MemoryUse] {
        &self.memory
    }

    /// The CUDA device of each rank, where they are on devices.
    pub fn devices(&self) -> Option<&[usize]> {
        self.options.devices.as_deref()
    }

    /// The logits of the rows asked for: `[logits_rows, vocab_size]`, row-major.
    ///
    /// # Errors
    /// A batch that breaks the limits (the group goes on); a failed rank (it does not).
    pub fn forward(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        match self.run(batch, None)? {
            Output::Logits(logits) => Ok(logits),
            _ => unreachable!("ranks answer a forward with logits"),
        }
    }

    /// The token chosen for each of the rows asked for.
    ///
    /// # Errors
    /// As [`Self::forward`], and logits that no token can be chosen from (the group goes on).
    pub fn step(&mut self, batch: &Batch, sample: &[SampleRow]) -> Result<Vec<u32>> {
        if sample.len() != batch.logits_rows.len() {
            let expected = format!("{}, one a logits row", batch.logits_rows.len());
            return Err(Error::shape("step: sampling rows", expected, sample.len()));
        }
        match self.run(batch, Some(sample.to_vec()))? {
            Output::Tokens(tokens) => Ok(tokens),
            _ => unreachable!("ranks answer a step with tokens"),
        }
    }

    /// Makes the group work again after a failure: ranks that answered keep their weights; a
    /// lost one is replaced by a new thread that loads them. Its thread cannot be killed: it is
    /// left with its memory, and ends when it comes back. The KV cache's contents are void.
    pub fn rebuild(&mut self) -> Result<()> {
        // Whoever has come back in the meantime is not lost.
        while let Ok(reply) = self.replies.try_recv() {
            self.answered(&reply);
        }
        self.reseat()?;
        self.failed = None;
        self.collect().map(|_| ())
    }

    fn run(&mut self, batch: &Batch, sample: Option<Vec<SampleRow>>) -> Result<Output> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        batch.check(&self.limits)?;
        self.steps += 1;
        let work = Arc::new(Work {
            step: self.steps,
            batch: batch.clone(),
            sample,
        });
        for rank in 0..self.ranks.len() {
            self.send(rank, Command::Run(work.clone()))?;
        }
        self.collect()
    }

    fn send(&mut self, rank: usize, command: Command) -> Result<()> {
        let thread = &mut self.ranks[rank];
        thread.busy = true;
        thread.commands.send(command).map_err(|_| gone(rank))
    }

    /// Notes that a rank has answered; false where the reply is of a thread given up earlier.
    fn answered(&mut self, reply: &Reply) -> bool {
        let rank = &mut self.ranks[reply.rank];
        let current = rank.incarnation == reply.incarnation;
        if current {
            rank.busy = false;
            self.stats[reply.rank] = reply.stats;
            self.memory[reply.rank] = reply.memory;
        }
        current
    }

    /// The first rank's output once all ranks have answered, or the cause of the failure. After
    /// a failure the others have the deadline to answer; they need far less, since it ends
    /// their waits. A rank that was waited for in vain has had its deadline.
    fn collect(&mut self) -> Result<Output> {
        let mut output = None;
        let mut cause: Option<Error> = None;
        let mut until: Option<Instant> = None;
        let mut late = vec![false; self.ranks.len()];
        while (self.ranks.iter().zip(&late)).any(|(rank, late)| rank.busy && !late) {
            let reply = match until {
                None => self
                    .replies
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
                Some(until) => self
                    .replies
                    .recv_timeout(until.saturating_duration_since(Instant::now())),
            };
            let Ok(reply) = reply else { break };
            if !self.answered(&reply) {
                continue;
            }
            match reply.result {
                Ok(out) if reply.rank == 0 => output = Some(out),
                Ok(_) => {}
                Err(error) => {
                    if let Error::Comm(CommError::Timeout { peer, .. }) = error {
                        late[peer] = true;
                    }
                    until.get_or_insert(Instant::now() + self.options.deadline);
                    cause = Some(match cause.take() {
                        Some(earlier) => root_cause(earlier, error),
                        None => error,
                    });
                }
            }
        }
        match (cause, output) {
            (None, Some(output)) => Ok(output),
            (cause, _) => {
                let error = cause.unwrap_or_else(|| gone(0));
                if !matches!(error, Error::Sampling(_)) {
                    self.failed = Some(error.clone());
                }
                Err(error)
            }
        }
    }

    /// The ranks' ends of a new group.
    fn seats(&mut self) -> Result<Vec<Seat>> {
        let Some(devices) = &self.options.devices else {
            let comms = self.communicators()?;
            return Ok(comms
                .into_iter()
                .map(|comm| Seat::Cpu(Box::new(comm)))
                .collect());
        };
        if devices.len() != self.options.tp {
            return Err(Error::input(
                "devices",
                format_args!("one for each of {} ranks", self.options.tp),
                format_args!("{devices:?}"),
                "name as many; one may be named several times",
            ));
        }
        #[cfg(feature = "cuda")]
        {
            // By size, where `auto` does so on the CPU.
            let all_reduce = match self.all_reduce()? {
                by_size if by_size.name() == comm::Auto.name() => None,
                named => Some(p2p::by_name(named.name())?),
            };
            let options = P2pOptions {
                deadline: self.options.deadline,
                all_reduce,
                sequence_parallel: self.options.sequence_parallel,
                ..Default::default()
            };
            let (group, comms) = P2pGroup::new(devices, options)?;
            if self.options.batch_invariant {
                let algorithm = comms[0].choose(1)?;
                self.check_batch_invariant(algorithm.name(), algorithm.rounding())?;
            }
            self.p2p = Some(group);
            Ok(comms
                .into_iter()
                .map(|comm| Seat::Cuda(Box::new(comm)))
                .collect())
        }
        #[cfg(not(feature = "cuda"))]
        Err(Error::input(
            "devices",
            "none in a build without CUDA",
            format_args!("{devices:?}"),
            "build with the feature cuda, or leave them out",
        ))
    }

    /// Gives every rank a place in the group made anew, and lost ones a new thread.
    fn reseat(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(p2p) = self.p2p.clone() {
            // Handles stay good; a lost rank gets a new one.
            for rank in 0..self.ranks.len() {
                if self.ranks[rank].rejoin(None).is_err() {
                    let comm = p2p.rejoin(rank)?;
                    self.ranks[rank] = self.spawn(rank, Seat::Cuda(Box::new(comm)), true)?;
                }
            }
            return Ok(());
        }
        for (rank, comm) in self.communicators()?.into_iter().enumerate() {
            if let Err(Some(seat)) = self.ranks[rank].rejoin(Some(Seat::Cpu(Box::new(comm)))) {
                self.ranks[rank] = self.spawn(rank, seat, false)?;
            }
        }
        Ok(())
    }

    /// The all-reduce that is named; its names are the same on devices.
    fn all_reduce(&self) -> Result<&'static dyn AllReduce> {
        let Some(name) = &self.options.all_reduce else {
            return Ok(&comm::Auto);
        };
        comm::by_name(name).map_err(|_| {
            let names: Vec<_> = comm::ALL.iter().map(|known| known.name()).collect();
            Error::input(
                "all_reduce",
                format_args!("one of {}", names.join(", ")),
                format_args!("{name:?}"),
                "name one of these, or leave it out",
            )
        })
    }

    /// Whether an all-reduce keeps what `batch_invariant` promises. One that rounds at each hop adds
    /// in an order that depends on where in the message a row is. Where activations are gathered,
    /// only embeddings are summed, of which one rank's is not zero.
    fn check_batch_invariant(&self, name: &str, rounding: Rounding) -> Result<()> {
        let GroupOptions {
            tp,
            tp_invariant,
            batch_invariant,
            ..
        } = self.options;
        if !batch_invariant || tp_invariant || tp == 1 || rounding == Rounding::RankOrder {
            return Ok(());
        }
        Err(Error::input(
            "batch_invariant",
            "an all-reduce that sums in rank order",
            format_args!("{name}, whose sums depend on where in its batch a row is"),
            "name another all_reduce, or none on devices that all reach each other; or set \
             tp_invariant",
        ))
    }

    fn communicators(&self) -> Result<Vec<TensorComm>> {
        let algorithm = self.all_reduce()?;
        self.check_batch_invariant(algorithm.name(), algorithm.rounding())?;
        let options = comm::GroupOptions {
            deadline: self.options.deadline,
            ..Default::default()
        };
        let (_, comms) = comm::Group::new(self.options.tp, options)?;
        Ok(comms
            .into_iter()
            .map(|comm| {
                TensorComm::with_algorithm(comm, algorithm)
                    .sequence_parallel(self.options.sequence_parallel)
            })
            .collect())
    }

    fn spawn(&mut self, rank: usize, seat: Seat, rejoins: bool) -> Result<RankThread> {
        self.incarnations += 1;
        let setup = Setup {
            part: Partition {
                rank,
                ..self.setup.part
            },
            incarnation: self.incarnations,
            rejoins,
            ..self.setup.clone()
        };
        let (commands, inbox) = mpsc::channel();
        let reply_to = self.reply_to.clone();
        let thread = thread::Builder::new()
            .name(format!("ringtp-rank-{rank}"))
            .spawn(move || serve(setup, seat, inbox, &reply_to))
            .map_err(|error| Error::input("ranks", "threads that start", error, "use fewer"))?;
        Ok(RankThread {
            commands,
            thread,
            incarnation: self.incarnations,
            busy: true,
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for rank in self.ranks.drain(..) {
            drop(rank.commands);
            if !rank.busy {
                // It is idle, so it ends at once; a panic of its was reported already.
                let _ = rank.thread.join();
            }
        }
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("options", &self.options)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

fn gone(rank: usize) -> Error {
    CommError::RankFailed {
        rank,
        cause: "its thread has ended".into(),
    }
    .into()
}

/// Which of two ranks' errors says more: a rank's own over what its peers saw of it, and who
/// failed over who was waited for in vain.
fn root_cause(a: Error, b: Error) -> Error {
    let depth = |error: &Error| match error {
        Error::Comm(CommError::Timeout { .. }) => 1,
        Error::Comm(CommError::RankFailed { .. }) => 2,
        _ => 0,
    };
    if depth(&b) < depth(&a) { b } else { a }
}

/// Enough for 16 sequences, or for 65536 positions where that is less, and always for one of the
/// longest sequences; on devices no more than what is free holds beside the weights.
fn default_blocks(
    checkpoint: &Checkpoint,
    options: &GroupOptions,
    max_model_len: usize,
) -> Result<usize> {
    let positions = max_model_len.max(65536.min(16 * max_model_len));
    let wanted = positions.div_ceil(options.block_size);
    #[cfg(feature = "cuda")]
    if let Some(devices) = &options.devices
        && devices.len() == options.tp
    {
        let needs = capacity::Needs {
            plan: &ShardPlan::new(&checkpoint.config().dims, options.tp)?,
            devices,
            dtype: options.dtype.unwrap_or(checkpoint.dtype()),
            block_size: options.block_size,
            longest: max_model_len.div_ceil(options.block_size),
        };
        return Ok(wanted.min(needs.blocks(&capacity::free(devices)?)?));
    }
    #[cfg(not(feature = "cuda"))]
    let _ = checkpoint;
    Ok(wanted)
}

/// Blocks of a KV cache: 2^28 positions at the least, and few enough to list the free ones.
const MAX_BLOCKS: usize = 1 << 24;

fn limits(checkpoint: &Checkpoint, options: &GroupOptions) -> Result<Limits> {
    let config = checkpoint.config();
    let context = config.max_context();
    let max_model_len = options.max_model_len.unwrap_or(context);
    if max_model_len == 0 || max_model_len > context {
        return Err(Error::input(
            "max_model_len",
            format_args!("1 to {context}, the context of the model"),
            max_model_len,
            "choose a shorter one",
        ));
    }
    if let Some(threads) = options.threads
        && !(1..=MAX_THREADS).contains(&threads)
    {
        return Err(Error::input(
            "threads",
            format_args!("1 to {MAX_THREADS}"),
            threads,
            "choose about as many as there are cores, or leave it out",
        ));
    }
    let block_size = options.block_size;
    if block_size == 0 || !block_size.is_multiple_of(16) {
        return Err(Error::input(
            "block_size",
            "a multiple of 16",
            block_size,
            "use 16 or 32",
        ));
    }
    let num_blocks = match options.num_blocks {
        Some(blocks) => blocks,
        None => default_blocks(checkpoint, options, max_model_len)?,
    };
    if num_blocks == 0 || num_blocks > MAX_BLOCKS {
        return Err(Error::input(
            "num_blocks",
            format_args!("1 to {MAX_BLOCKS}"),
            num_blocks,
            "give the KV cache as many blocks as its sequences need",
        ));
    }
    Ok(Limits {
        vocab_size: config.dims.vocab_size,
        max_model_len,
        num_blocks,
        block_size,
    })
}
