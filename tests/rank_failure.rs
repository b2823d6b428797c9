//! A rank of a model that panics, stalls, fails or never comes ends the call of all others with
//! an error that names it, within the deadline; after a rebuild the model gives the same bits
//! as a fresh one, and whoever comes back late disturbs nothing.

mod model_support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use model_support::{Result, batch, bits, fixture, load, open, some_ids, spmd};
use ringtp::backend::cpu::CpuBackend;
use ringtp::comm::{self, CommError, Communicator};
use ringtp::generate::{Llm, SamplingParams};
use ringtp::layers::Rank;
use ringtp::llama::{Batch, Group, GroupOptions, LoadOptions, Model, SampleRow, StepHook};
use ringtp::{DType, Error};

/// Short, for many stalls have to outlast it; long enough for a loaded machine to run a step.
const DEADLINE: Duration = Duration::from_millis(400);
/// A deadline that no test reaches: what ends earlier was not ended by it.
const PATIENCE: Duration = Duration::from_secs(120);
/// What a loaded machine may take on top.
const SLACK: Duration = Duration::from_secs(5);
/// 8 KV heads: 3 ranks have 3, 3 and 2.
const MODEL: &str = "gqa_16_8";

/// Closed until it is opened, or for a minute.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn wait(&self) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let minute = Duration::from_secs(60);
        let _open = self.1.wait_timeout_while(open, minute, |open| !*open);
    }

    fn open(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.1.notify_all();
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Panic,
    Stall,
}

impl Fault {
    fn deadline(self) -> Duration {
        match self {
            Self::Panic => PATIENCE,
            Self::Stall => DEADLINE,
        }
    }

    fn cause(self) -> &'static str {
        match self {
            Self::Panic => "the dog ate it",
            Self::Stall => "waited",
        }
    }
}

/// Makes `rank` fail once, at `step`. A stall lasts until the gate opens.
fn saboteur(fault: Fault, rank: usize, step: u64) -> (StepHook, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let (inner, done) = (gate.clone(), AtomicBool::new(false));
    let hook = move |this: usize, now: u64| {
        if (this, now) == (rank, step) && !done.swap(true, Ordering::SeqCst) {
            match fault {
                Fault::Panic => panic!("the dog ate it"),
                Fault::Stall => inner.wait(),
            }
        }
    };
    (Arc::new(hook), gate)
}

fn options(tp: usize, deadline: Duration, on_step: Option<StepHook>) -> GroupOptions {
    GroupOptions {
        tp,
        threads: Some(tp),
        num_blocks: Some(8),
        deadline,
        on_step,
        ..Default::default()
    }
}

/// The rank that an error blames.
fn blamed(error: &Error) -> Option<usize> {
    match error {
        Error::Comm(CommError::Timeout { peer, .. }) => Some(*peer),
        Error::Comm(CommError::RankFailed { rank, .. }) => Some(*rank),
        _ => None,
    }
}

/// The logits of a prompt and of the rows after it, as bits: three steps.
fn run(group: &mut Group) -> ringtp::Result<Vec<u32>> {
    let table = [5, 2, 7];
    let ids = some_ids(group.limits().vocab_size, 3, 20);
    let mut all = Vec::new();
    for rows in [0..18, 18..19, 19..20] {
        let step = batch(&ids[rows.clone()], rows.start, 18, &table);
        all.extend(bits(&group.forward(&step)?));
    }
    Ok(all)
}

fn one_row() -> Batch {
    batch(&[1], 0, 1, &[0])
}

#[test]
fn a_rank_that_panics_or_stalls_is_named_and_the_rebuilt_group_gives_the_same_bits() -> Result {
    for tp in [2, 3, 4] {
        let fresh = run(&mut load(MODEL, options(tp, PATIENCE, None))?)?;
        for (rank, fault) in (0..tp).flat_map(|r| [(r, Fault::Panic), (r, Fault::Stall)]) {
            let case = format!("rank {rank} of {tp}, {fault:?}");
            // Before it the ranks have met, and their caches hold something.
            let (hook, gate) = saboteur(fault, rank, 3);
            let mut group = load(MODEL, options(tp, fault.deadline(), Some(hook)))?;
            let start = Instant::now();
            let error = run(&mut group).expect_err(&case);
            assert!(start.elapsed() < DEADLINE + SLACK, "{case}");
            assert_eq!(blamed(&error), Some(rank), "{case}: {error}");
            let message = error.to_string();
            assert!(message.contains(&format!("rank {rank}")), "{message}");
            assert!(message.contains(fault.cause()), "{message}");

            // Sticky, at once, for every call.
            let start = Instant::now();
            for _ in 0..10 {
                let again = group.forward(&one_row()).expect_err(&case);
                assert_eq!(again.to_string(), message, "{case}");
                let again = group.step(&one_row(), &[SampleRow::greedy()]);
                assert_eq!(again.expect_err(&case).to_string(), message, "{case}");
            }
            assert!(start.elapsed() < 5 * DEADLINE, "20 calls that do not wait");

            group.rebuild()?;
            assert_eq!(run(&mut group)?, fresh, "{case}: rebuilt");
            // The old thread comes back, in the middle of the new group's life.
            gate.open();
            for _ in 0..3 {
                assert_eq!(run(&mut group)?, fresh, "{case}: with the late one");
            }
        }
    }
    Ok(())
}

#[test]
fn a_rank_alone_that_panics_is_named_and_goes_on_after_a_rebuild() -> Result {
    let fresh = run(&mut load(MODEL, options(1, PATIENCE, None))?)?;
    let (hook, _) = saboteur(Fault::Panic, 0, 2);
    let mut group = load(MODEL, options(1, PATIENCE, Some(hook)))?;
    let error = run(&mut group).expect_err("a panic");
    assert_eq!(blamed(&error), Some(0), "{error}");
    assert!(error.to_string().contains("the dog ate it"), "{error}");
    let again = group.forward(&one_row()).expect_err("until it is rebuilt");
    assert_eq!(again.to_string(), error.to_string());
    group.rebuild()?;
    assert_eq!(run(&mut group)?, fresh);
    Ok(())
}

/// The deadline is long here, so that two of them would show.
#[test]
fn the_call_ends_a_deadline_after_the_stall_and_not_two() -> Result {
    let deadline = Duration::from_secs(3);
    let (hook, gate) = saboteur(Fault::Stall, 1, 2);
    let mut group = load(MODEL, options(3, deadline, Some(hook)))?;
    group.forward(&one_row())?;
    let start = Instant::now();
    let error = group.forward(&one_row()).expect_err("a stall");
    let waited = start.elapsed();
    assert_eq!(blamed(&error), Some(1), "{error}");
    assert!(waited >= deadline, "{waited:?}");
    assert!(
        waited < deadline * 2 - Duration::from_millis(500),
        "{waited:?}"
    );
    gate.open();
    Ok(())
}

/// Whoever comes back before the rebuild keeps its weights: nothing is loaded again.
#[test]
fn a_rank_that_came_back_before_the_rebuild_is_not_loaded_again() -> Result {
    let loaded = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = loaded.clone();
    let (hook, gate) = saboteur(Fault::Stall, 1, 1);
    let hook_alive = Arc::downgrade(&hook);
    let mut options = options(2, DEADLINE, Some(hook));
    options.progress = Some(Arc::new(move |bytes| {
        count.fetch_add(bytes, Ordering::SeqCst);
    }));
    let mut group = load(MODEL, options)?;
    let once = loaded.load(Ordering::SeqCst);
    assert_eq!(
        blamed(&group.forward(&one_row()).expect_err("a stall")),
        Some(1)
    );
    gate.open();
    // It only has to find out that its group ended.
    thread::sleep(Duration::from_secs(1));
    group.rebuild()?;
    assert_eq!(loaded.load(Ordering::SeqCst), once);
    group.forward(&one_row())?;

    // And all threads end with the group.
    drop(group);
    assert!(hook_alive.upgrade().is_none(), "a thread is left");
    Ok(())
}

#[test]
fn a_lost_thread_ends_once_it_comes_back() -> Result {
    let (hook, gate) = saboteur(Fault::Stall, 0, 1);
    let alive = Arc::downgrade(&hook);
    let mut group = load(MODEL, options(2, DEADLINE, Some(hook)))?;
    assert_eq!(
        blamed(&group.forward(&one_row()).expect_err("a stall")),
        Some(0)
    );
    group.rebuild()?;
    group.forward(&one_row())?;
    drop(group);
    assert!(alive.upgrade().is_some(), "the lost one still has it");
    gate.open();
    let start = Instant::now();
    while alive.upgrade().is_some() {
        assert!(start.elapsed() < SLACK, "it did not end");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
fn a_group_with_a_stalled_rank_is_dropped_at_once() -> Result {
    for rank in 0..3 {
        let (hook, gate) = saboteur(Fault::Stall, rank, 1);
        let mut group = load(MODEL, options(3, DEADLINE, Some(hook)))?;
        let error = group.forward(&one_row()).expect_err("a stall");
        assert_eq!(blamed(&error), Some(rank), "{error}");
        let start = Instant::now();
        drop(group);
        assert!(start.elapsed() < SLACK);
        gate.open();
    }
    Ok(())
}

/// A group may fail, be rebuilt and fail again, each time another rank.
#[test]
fn failure_after_failure_is_survived() -> Result {
    let fresh = run(&mut load(MODEL, options(3, PATIENCE, None))?)?;
    let failing = Arc::new(Mutex::new(None));
    let next = failing.clone();
    let hook: StepHook = Arc::new(move |rank, _| {
        let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
        if *next == Some(rank) {
            *next = None;
            drop(next);
            panic!("rank {rank} was told to");
        }
    });
    let mut group = load(MODEL, options(3, PATIENCE, Some(hook)))?;
    for rank in [0, 1, 2, 1, 0] {
        *failing.lock().unwrap_or_else(PoisonError::into_inner) = Some(rank);
        let error = run(&mut group).expect_err("told to");
        assert_eq!(blamed(&error), Some(rank), "{error}");
        group.rebuild()?;
        assert_eq!(run(&mut group)?, fresh);
    }
    Ok(())
}

#[test]
fn a_model_with_its_tokenizer_is_rebuilt_and_gives_the_same_text() -> Result {
    let prompts = ["It is a truth universally", "My dear Mr. Bennet"];
    let params = SamplingParams::greedy().max_tokens(12);
    for (tp, fault) in [(1, Fault::Panic), (2, Fault::Panic), (2, Fault::Stall)] {
        let builder = || Llm::builder(fixture("austen")).tp(tp).threads(tp);
        let fresh = builder().build()?.generate(&prompts, &params)?;
        let (hook, gate) = saboteur(fault, tp - 1, 6);
        let build = builder().deadline(fault.deadline()).on_step(hook);
        let mut llm = build.build()?;
        let start = Instant::now();
        let error = llm.generate(&prompts, &params).expect_err("a failure");
        assert!(start.elapsed() < DEADLINE + SLACK);
        assert_eq!(blamed(&error), Some(tp - 1), "{error}");
        let again = llm.generate(&prompts, &params).expect_err("not rebuilt");
        assert_eq!(again.to_string(), error.to_string());
        llm.rebuild()?;
        let rebuilt = llm.generate(&prompts, &params)?;
        gate.open();
        let later = llm.generate(&prompts, &params)?;
        for ((fresh, rebuilt), later) in fresh.iter().zip(&rebuilt).zip(&later) {
            assert_eq!(fresh.ids, rebuilt.ids);
            assert_eq!(fresh.ids, later.ids);
            assert_eq!(fresh.text, rebuilt.text);
        }
    }
    Ok(())
}

/// The ring's ranks wait for their neighbours, who are innocent.
#[test]
fn every_all_reduce_names_the_stalled_rank() -> Result {
    for all_reduce in ["one-shot", "two-shot", "ring"] {
        for rank in 0..4 {
            let (hook, gate) = saboteur(Fault::Stall, rank, 1);
            let mut options = options(4, DEADLINE, Some(hook));
            options.all_reduce = Some(all_reduce.into());
            let mut group = load(MODEL, options)?;
            let error = group.forward(&one_row()).expect_err("a stall");
            assert_eq!(blamed(&error), Some(rank), "{all_reduce}: {error}");
            gate.open();
            group.rebuild()?;
            group.forward(&one_row())?;
        }
    }
    Ok(())
}

#[test]
fn a_rebuild_whose_loading_fails_says_so_and_can_be_done_again() -> Result {
    let fresh = run(&mut load(MODEL, options(3, PATIENCE, None))?)?;
    let (hook, gate) = saboteur(Fault::Stall, 1, 2);
    let no_memory = Arc::new(AtomicBool::new(false));
    let fails = no_memory.clone();
    let mut options = options(3, DEADLINE, Some(hook));
    options.progress = Some(Arc::new(move |_| {
        assert!(!fails.load(Ordering::SeqCst), "no weights today");
    }));
    let mut group = load(MODEL, options)?;
    run(&mut group).expect_err("a stall");
    no_memory.store(true, Ordering::SeqCst);
    for _ in 0..20 {
        let error = group.rebuild().expect_err("no weights");
        assert_eq!(blamed(&error), Some(1), "{error}");
        assert!(error.to_string().contains("no weights today"), "{error}");
        let again = group.forward(&one_row()).expect_err("not rebuilt");
        assert_eq!(again.to_string(), error.to_string());
    }
    no_memory.store(false, Ordering::SeqCst);
    group.rebuild()?;
    assert_eq!(run(&mut group)?, fresh);
    gate.open();
    Ok(())
}

#[test]
fn a_cache_that_no_memory_holds_is_an_error_of_every_rank_and_no_hang() -> Result {
    for tp in [1, 3] {
        let mut options = options(tp, PATIENCE, None);
        options.num_blocks = Some(1 << 20);
        options.block_size = 1 << 30;
        let refused = load(MODEL, options).map(|_| ());
        assert!(matches!(refused, Err(Error::OutOfMemory(_))), "{refused:?}");
    }
    Ok(())
}

/// A row of which nothing may be chosen is its caller's affair: the ranks go on.
#[test]
fn a_choice_among_nothing_is_no_failure() -> Result {
    for tp in [1, 3] {
        let mut group = load(MODEL, options(tp, PATIENCE, None))?;
        let fresh = run(&mut group)?;
        let nothing = SampleRow {
            banned: (0..group.limits().vocab_size as u32).collect(),
            ..SampleRow::greedy()
        };
        let refused = group.step(&one_row(), &[nothing]);
        assert!(matches!(refused, Err(Error::Sampling(_))), "{refused:?}");
        assert_eq!(run(&mut group)?, fresh);
    }
    Ok(())
}

/// A batch that breaks the limits is refused before any rank sees it, and harms nothing.
#[test]
fn a_refused_batch_is_no_failure() -> Result {
    let mut group = load(MODEL, options(2, PATIENCE, None))?;
    let fresh = run(&mut group)?;
    assert!(group.forward(&batch(&[1], 0, 1, &[99])).is_err());
    assert!(group.step(&one_row(), &[]).is_err());
    assert_eq!(run(&mut group)?, fresh);
    Ok(())
}

/// How a rank of an engine with threads of its own may fail.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spmd {
    /// Its thread unwinds.
    Panics,
    /// It tells the others why it cannot go on.
    Aborts,
    /// It returns, dropping its end.
    Leaves,
    /// It is there and never calls.
    NeverCalls,
}

#[test]
fn ranks_of_an_outside_engine_name_the_one_that_fails() -> Result {
    let checkpoint = open(MODEL)?;
    let ids = some_ids(checkpoint.config().dims.vocab_size, 3, 9);
    for fault in [Spmd::Panics, Spmd::Aborts, Spmd::Leaves, Spmd::NeverCalls] {
        for (tp, failing) in [(2, 0), (2, 1), (3, 1), (4, 3)] {
            let gate = Gate::default();
            let left = std::sync::atomic::AtomicUsize::new(tp - 1);
            let options = comm::GroupOptions {
                deadline: match fault {
                    Spmd::NeverCalls => DEADLINE,
                    _ => PATIENCE,
                },
                ..Default::default()
            };
            let results = spmd(tp, options, |mut comm| -> ringtp::Result<()> {
                let me = comm.rank();
                let mut backend = CpuBackend::new(1)?;
                let options = LoadOptions {
                    dtype: DType::F32,
                    tp_invariant: false,
                };
                let mut rank = Rank {
                    backend: &mut backend,
                    comm: &mut comm,
                };
                let mut model = Model::load(&mut rank, &checkpoint, options, &|_| {})?;
                let mut kv = model.kv_cache(&mut backend, 4, 16, DType::F32)?;
                for position in 0..ids.len() {
                    let fails = me == failing && position == 5;
                    match fault {
                        Spmd::Panics if fails => panic!("out of ideas"),
                        Spmd::Aborts if fails => {
                            comm.abort("out of ideas");
                            return Ok(());
                        }
                        Spmd::Leaves if fails => return Ok(()),
                        Spmd::NeverCalls if fails => {
                            gate.wait();
                            return Ok(());
                        }
                        _ => {}
                    }
                    let mut rank = Rank {
                        backend: &mut backend,
                        comm: &mut comm,
                    };
                    let step = batch(&ids[position..=position], position, 1, &[2]);
                    let start = Instant::now();
                    let result = model.forward(&mut rank, &step, &mut kv);
                    if let Err(error) = result {
                        assert_eq!(position, 5, "{error}");
                        assert!(start.elapsed() < DEADLINE + SLACK);
                        // Sticky, here too.
                        let start = Instant::now();
                        for _ in 0..20 {
                            assert!(model.forward(&mut rank, &step, &mut kv).is_err());
                        }
                        assert!(start.elapsed() < 5 * DEADLINE, "20 calls that do not wait");
                        if left.fetch_sub(1, Ordering::SeqCst) == 1 {
                            gate.open();
                        }
                        return Err(error);
                    }
                }
                Ok(())
            })?;
            for (rank, result) in results.into_iter().enumerate() {
                let case = format!("{fault:?}: rank {rank} of {tp}");
                if rank == failing {
                    assert_eq!(result.is_none(), fault == Spmd::Panics, "{case}");
                    continue;
                }
                let error = result.ok_or("a panic")?.expect_err(&case);
                assert_eq!(blamed(&error), Some(failing), "{case}: {error}");
                let cause = match fault {
                    Spmd::Panics => "panicked",
                    Spmd::Aborts => "out of ideas",
                    Spmd::Leaves => "left",
                    Spmd::NeverCalls => "waited",
                };
                assert!(error.to_string().contains(cause), "{case}: {error}");
            }
        }
    }
    Ok(())
}
