//! Threads that share the work of one operation.
//!
//! A decode step is some hundred operations of tens of microseconds, with a few microseconds
//! between them. A work-stealing pool puts threads to sleep in such gaps and pays for waking
//! them: on two cores that was 8 % of a bf16 decode step. So the helpers of a team spin for
//! [`SPIN`] before they sleep, and so does the caller at the end of an operation.
//!
//! # Protocol
//! A [`Ticket`] is an epoch, a number of tasks and the next of them, in one word. The caller writes the job, then stores a ticket of a new
//! epoch (release). Whoever wants a task advances the ticket by compare-and-swap (acquire),
//! which fails once the epoch has moved on; so a thread that holds a task of an epoch holds up
//! that epoch's end, since `done` (release, one a task) cannot reach the count without it, and
//! the caller returns, or writes another job, only after it has (acquire). Hence the job is read
//! only between those two points, and a helper that slept through an epoch is not waited for.
//!
//! Sleeping: a helper raises `asleep`, then looks at the ticket once more; the caller stores the
//! ticket, then looks at `asleep`; both with a sequentially consistent fence between. So at least
//! one sees the other, and no wake-up is lost.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long a helper looks for work before it sleeps; longer than the gaps within a step.
const SPIN: Duration = Duration::from_micros(200);

/// Looks between two looks at the clock, or offers of the core to others.
const LOOKS: u32 = 256;

/// The caller and some helpers.
#[derive(Debug)]
pub(super) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Operations one at a time.
    busy: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    job: UnsafeCell<Job>,
    ticket: Aligned<AtomicU64>,
    done: Aligned<AtomicUsize>,
    asleep: Aligned<Vec<AtomicBool>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

/// On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Aligned<T>(T);

type Job = *const (dyn Fn(usize) + Sync);

// SAFETY: `job` is written and read as the protocol says; the rest is Sync by itself.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// `epoch << 32 | count << 16 | next`. (The epoch wraps: a helper would have to sleep through
/// 2^32 operations, to the one, to take it for another.)
#[derive(Clone, Copy)]
struct Ticket(u64);

impl Ticket {
    /// Tasks that fit one epoch.
    const MOST: usize = u16::MAX as usize;

    fn new(epoch: u32, count: usize) -> Self {
        debug_assert!(count <= Self::MOST, "{count} tasks");
        Self(u64::from(epoch) << 32 | (count as u64) << 16)
    }

    fn epoch(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The next task, if there is one.
    fn next(self) -> Option<usize> {
        let (count, next) = (self.0 >> 16 & 0xFFFF, self.0 & 0xFFFF);
        (next < count).then_some(next as usize)
    }
}

impl Team {
    /// A team of `threads` threads, the caller's included.
    pub(super) fn new(threads: usize) -> Result<Self> {
        let helpers = threads.saturating_sub(1);
        let nothing: &(dyn Fn(usize) + Sync) = &|_| {};
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(nothing),
            ticket: Aligned(AtomicU64::new(Ticket::new(0, 0).0)),
            done: Aligned::default(),
            asleep: Aligned((0..helpers).map(|_| AtomicBool::new(false)).collect()),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut team = Self {
            shared,
            helpers: Vec::new(),
            busy: Mutex::new(()),
        };
        for index in 0..helpers {
            let shared = team.shared.clone();
            let helper = thread::Builder::new()
                .name(format!("ringtp-cpu-{index}"))
                .spawn(move || shared.help(index))
                .map_err(|error| {
                    Error::input("threads", "threads that start", error, "use fewer")
                })?;
            team.helpers.push(helper);
        }
        Ok(team)
    }

    /// Runs `task(0..count)`, each once, on whichever thread is free; returns when all are done.
    /// A panic of a task is the caller's.
    pub(super) fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.helpers.is_empty() || count <= 1 {
            return (0..count).for_each(task);
        }
        let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        for first in (0..count).step_by(Ticket::MOST) {
            self.epoch(Ticket::MOST.min(count - first), &|index| {
                task(first + index)
            });
        }
    }

    fn epoch(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: no thread reads the job now, as all tasks of the epoch before are done. The
        // lifetime of `task` is lengthened, but no thread calls it once this function returns,
        // which it does only when all tasks are done.
        unsafe { *shared.job.get() = std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(task) };
        shared.done.0.store(0, Ordering::Relaxed);
        let epoch = Ticket(shared.ticket.0.load(Ordering::Relaxed))
            .epoch()
            .wrapping_add(1);
        shared
            .ticket
            .0
            .store(Ticket::new(epoch, count).0, Ordering::Release);
        fence(Ordering::SeqCst);
        for (asleep, helper) in shared.asleep.0.iter().zip(&self.helpers) {
            if asleep.load(Ordering::Relaxed) {
                helper.thread().unpark();
            }
        }
        shared.work(epoch);
        let mut looks = 0_u32;
        while shared.done.0.load(Ordering::Acquire) < count {
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS) {
                // More threads than cores: let the one that holds a task run.
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper catches the panics of tasks, so it ends well.
            let _ = helper.join();
        }
    }
}

impl Shared {
    /// Takes tasks of `epoch` until there are none.
    fn work(&self, epoch: u32) {
        let mut ticket = Ticket(self.ticket.0.load(Ordering::Acquire));
        while ticket.epoch() == epoch
            && let Some(next) = ticket.next()
        {
            let taken = self.ticket.0.compare_exchange_weak(
                ticket.0,
                ticket.0 + 1,
                Ordering::Acquire,
                Ordering::Acquire,
            );
            if let Err(found) = taken {
                ticket = Ticket(found);
                continue;
            }
            // SAFETY: this thread holds a task of the current epoch, so the job is of this epoch
            // and stays until the task is counted as done below.
            let task = unsafe { &**self.job.get() };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(next))) {
                // The first stands. Nothing here may unwind, as tasks may still run elsewhere:
                // the others are not dropped, since what a payload's drop does is not known.
                let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                if first.is_none() {
                    *first = Some(panic);
                } else {
                    std::mem::forget(panic);
                }
            }
            self.done.0.fetch_add(1, Ordering::Release);
            ticket = Ticket(self.ticket.0.load(Ordering::Acquire));
        }
    }

    /// A helper's life.
    fn help(&self, index: usize) {
        while !self.stop.load(Ordering::Relaxed) {
            let ticket = Ticket(self.ticket.0.load(Ordering::Acquire));
            if ticket.next().is_some() {
                self.work(ticket.epoch());
            } else if !self.spin() {
                self.asleep.0[index].store(true, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                let ticket = Ticket(self.ticket.0.load(Ordering::Relaxed));
                if ticket.next().is_none() && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.asleep.0[index].store(false, Ordering::Relaxed);
            }
        }
    }

    /// Whether there is work before [`SPIN`] is over.
    fn spin(&self) -> bool {
        let began = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if Ticket(self.ticket.0.load(Ordering::Relaxed))
                    .next()
                    .is_some()
                {
                    return true;
                }
                std::hint::spin_loop();
            }
            if began.elapsed() > SPIN {
                return false;
            }
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_many_short_operations() {
        for threads in [1, 2, 3, 5] {
            let team = Team::new(threads).unwrap();
            for round in 0..3000 {
                let ran: Vec<_> = (0..round % 23).map(|_| AtomicUsize::new(0)).collect();
                team.run(ran.len(), &|index| {
                    ran[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    ran.iter().all(|ran| ran.load(Ordering::Relaxed) == 1),
                    "{threads}"
                );
                if round % 500 == 0 {
                    thread::sleep(2 * SPIN); // helpers fall asleep
                }
            }
        }
    }

    #[test]
    fn more_tasks_than_a_ticket_counts_all_run() {
        let team = Team::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        let count = 2 * Ticket::MOST + 5;
        team.run(count, &|index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), count * (count - 1) / 2);
    }

    #[test]
    fn a_panic_of_a_task_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| {
            team.run(8, &|index| assert!(index != 5, "task five"));
        }));
        let message = *caught.unwrap_err().downcast::<&str>().unwrap();
        assert_eq!(message, "task five");
        let count = AtomicUsize::new(0);
        team.run(8, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 8);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let team = Team::new(2).unwrap();
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        team.run(4, &|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 3 * 500 * 4);
    }
}
