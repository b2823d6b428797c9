//! The life of a group between two rebuilds: waiting, aborting, leaving.
//!
//! # Sleeping without losing a wake-up
//!
//! A waiter spins while the process has a core for every rank, then parks. Sleeper and waker
//! agree as in Dekker's algorithm, each writing its own word before it reads the other's:
//!
//! - sleeper: writes what it waits for and `parked = true`; `SeqCst` fence; looks at the
//!   progress (and the abort word) once more; parks if there is still nothing.
//! - waker: stores the progress (or the abort word); `SeqCst` fence; looks at `sleepers` and
//!   `parked`; unparks. For progress the fence comes before the waker waits itself and at the
//!   end of its call: once for many packets.
//!
//! Fences are totally ordered. If the sleeper's is first, the waker sees `parked`; otherwise
//! the sleeper sees the progress. An unpark before the park makes the park return at once.
//!
//! # Who is to blame
//!
//! A rank that waits in vain says whom it waits for. The culprit of a time-out is at the end
//! of that chain: the rank that does not wait itself. In a ring one's predecessor is
//! innocent if it waits too.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::error::CommError;
use super::mailbox::{Endpoint, Line};

/// Ranks alive in this process, over all groups of more than one (a rank alone never waits):
/// what decides between spinning and parking.
pub(crate) static LIVE_RANKS: AtomicUsize = AtomicUsize::new(0);

/// Looks at the progress before the clock is looked at for the first time.
const FAST_LOOKS: usize = 200;
/// Looks between two glances at the clock while spinning.
const SPIN_LOOKS: usize = 64;
/// Spinning for longer than this gives way to other threads now and then: the scheduler may
/// have put the awaited rank on this very core, behind this thread.
const SPIN_BEFORE_YIELD: Duration = Duration::from_micros(5);
/// Times a rank without a core of its own gives way before it parks.
const YIELDS: usize = 4;

const NOBODY: usize = usize::MAX;

/// How a rank is gone without having failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Departure {
    Left = 1,
    Rebuilding = 2,
}

struct Abort {
    rank: usize,
    cause: String,
}

/// One rank's place, on its own cache lines.
#[repr(align(128))]
struct Seat {
    departed: AtomicU8,
    waiting_for: AtomicUsize,
    target: AtomicU64,
    parked: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

pub(crate) struct Generation {
    /// Rebuilds before this one.
    pub(crate) number: u64,
    pub(crate) deadline: Duration,
    spin: Duration,
    cores: usize,
    aborted: Line<AtomicBool>,
    abort: Mutex<Option<Abort>>,
    sleepers: Line<AtomicUsize>,
    seats: Box<[Seat]>,
}

/// Locks, whatever happened to another holder: every critical section here leaves the value
/// whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Generation {
    pub(crate) fn new(number: u64, world_size: usize, deadline: Duration, spin: Duration) -> Self {
        Self {
            number,
            deadline,
            spin,
            cores: thread::available_parallelism().map_or(1, usize::from),
            aborted: Line(AtomicBool::new(false)),
            abort: Mutex::new(None),
            sleepers: Line(AtomicUsize::new(0)),
            seats: (0..world_size)
                .map(|_| Seat {
                    departed: AtomicU8::new(0),
                    waiting_for: AtomicUsize::new(NOBODY),
                    target: AtomicU64::new(0),
                    parked: AtomicBool::new(false),
                    thread: Mutex::new(None),
                })
                .collect(),
        }
    }

    pub(crate) fn world_size(&self) -> usize {
        self.seats.len()
    }

    /// The error of an aborted group, if it is one.
    #[inline]
    pub(crate) fn check(&self) -> Result<(), CommError> {
        if self.aborted.0.load(Ordering::Acquire) {
            Err(self.abort_error())
        } else {
            Ok(())
        }
    }

    #[cold]
    fn abort_error(&self) -> CommError {
        let abort = lock(&self.abort);
        let (rank, cause) = match &*abort {
            Some(abort) => (abort.rank, abort.cause.clone()),
            None => (0, "aborted".into()),
        };
        CommError::RankFailed { rank, cause }
    }

    /// Ends the group for all ranks, because of `rank`; the first cause stands. Returns
    /// whether this was the first.
    #[cold]
    pub(crate) fn abort(&self, rank: usize, cause: impl FnOnce() -> String) -> bool {
        let first = {
            let mut abort = lock(&self.abort);
            let first = abort.is_none();
            if first {
                *abort = Some(Abort {
                    rank,
                    cause: cause(),
                });
            }
            first
        };
        self.aborted.0.store(true, Ordering::Release);
        self.wake_all();
        first
    }

    /// `rank` is gone; whoever waits for it, or will, learns that at once.
    #[cold]
    pub(crate) fn depart(&self, rank: usize, how: Departure) {
        self.seats[rank]
            .departed
            .store(how as u8, Ordering::Release);
        self.wake_all();
    }

    /// Whether `rank` is gone.
    pub(crate) fn has_departed(&self, rank: usize) -> bool {
        self.seats[rank].departed.load(Ordering::Acquire) != 0
    }

    fn wake_all(&self) {
        fence(Ordering::SeqCst);
        for seat in &self.seats {
            seat.wake();
        }
    }

    /// As [`Self::wake`], without the fence: may miss one who is just falling asleep. A fence
    /// waits until all stores of a packet have left the core, so it is put off until this
    /// rank waits in earnest or ends its call; `wake` comes then.
    #[inline]
    pub(crate) fn wake_early(&self, rank: usize, progress: u64) {
        if self.sleepers.0.load(Ordering::Relaxed) != 0 {
            self.wake_sleepers(rank, progress);
        }
    }

    /// Wakes those who sleep until `rank` reaches `progress`, which it has stored.
    #[inline]
    pub(crate) fn wake(&self, rank: usize, progress: u64) {
        fence(Ordering::SeqCst);
        if self.sleepers.0.load(Ordering::Relaxed) != 0 {
            self.wake_sleepers(rank, progress);
        }
    }

    #[cold]
    fn wake_sleepers(&self, rank: usize, progress: u64) {
        for seat in &self.seats {
            // Acquire: `waiting_for` and `target` are at least as new as `parked`.
            if seat.parked.load(Ordering::Acquire)
                && seat.waiting_for.load(Ordering::Relaxed) == rank
                && seat.target.load(Ordering::Relaxed) <= progress
            {
                seat.wake();
            }
        }
    }

    /// Waits until `peer` reaches progress `target`, as `endpoint`'s rank `rank` in its call
    /// `operation` number `epoch`. A failure aborts the group.
    #[inline]
    pub(crate) fn wait(
        &self,
        endpoint: &Endpoint,
        rank: usize,
        peer: usize,
        target: u64,
        operation: &'static str,
    ) -> Result<(), CommError> {
        if endpoint.progress(peer, target) >= target {
            return Ok(());
        }
        self.wait_slow(endpoint, rank, peer, target, operation)
    }

    #[cold]
    #[inline(never)]
    fn wait_slow(
        &self,
        endpoint: &Endpoint,
        rank: usize,
        peer: usize,
        target: u64,
        operation: &'static str,
    ) -> Result<(), CommError> {
        let here = || endpoint.progress(peer, target) >= target;
        let has_core = LIVE_RANKS.load(Ordering::Relaxed) <= self.cores;
        if has_core {
            for _ in 0..FAST_LOOKS {
                if here() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        self.wake(rank, endpoint.own_progress());
        let start = Instant::now();
        let seat = &self.seats[rank];
        seat.target.store(target, Ordering::Relaxed);
        seat.waiting_for.store(peer, Ordering::Relaxed);
        let mut yields = 0;
        let result = loop {
            if here() {
                break Ok(());
            }
            if let Err(error) = self.check() {
                break Err(error);
            }
            let departed = self.seats[peer].departed.load(Ordering::Acquire);
            if departed != 0 {
                // Its last packets were stored before it left.
                break if here() {
                    Ok(())
                } else {
                    Err(self.blame_departed(peer, departed))
                };
            }
            let waited = start.elapsed();
            if waited >= self.deadline {
                let seen = endpoint.progress(peer, target);
                break Err(self.time_out(endpoint, rank, peer, seen, target, operation));
            }
            if has_core && waited < self.spin {
                if waited > SPIN_BEFORE_YIELD {
                    thread::yield_now();
                }
                for _ in 0..SPIN_LOOKS {
                    if here() {
                        break;
                    }
                    std::hint::spin_loop();
                }
            } else if yields < YIELDS {
                yields += 1;
                thread::yield_now();
            } else {
                self.sleep(seat, self.deadline - waited, || {
                    here()
                        || self.aborted.0.load(Ordering::Acquire)
                        || self.seats[peer].departed.load(Ordering::Acquire) != 0
                });
            }
        };
        seat.waiting_for.store(NOBODY, Ordering::Relaxed);
        result
    }

    /// Parks until woken, for at most `limit`, unless `ready`.
    fn sleep(&self, seat: &Seat, limit: Duration, ready: impl Fn() -> bool) {
        {
            let mut thread = lock(&seat.thread);
            let current = thread::current();
            if thread.as_ref().map(Thread::id) != Some(current.id()) {
                *thread = Some(current);
            }
        }
        self.sleepers.0.fetch_add(1, Ordering::Relaxed);
        // Release: whoever sees it sees what is waited for.
        seat.parked.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if !ready() {
            thread::park_timeout(limit);
        }
        seat.parked.store(false, Ordering::Relaxed);
        self.sleepers.0.fetch_sub(1, Ordering::Relaxed);
    }

    fn blame_departed(&self, peer: usize, how: u8) -> CommError {
        self.abort(peer, || {
            if how == Departure::Rebuilding as u8 {
                "it went to rebuild the group".into()
            } else {
                "it left the group".into()
            }
        });
        self.abort_error()
    }

    fn time_out(
        &self,
        endpoint: &Endpoint,
        rank: usize,
        peer: usize,
        mut seen: u64,
        mut expected: u64,
        operation: &'static str,
    ) -> CommError {
        let epoch = endpoint.epoch().max(expected >> 16);
        let mut culprit = peer;
        // The chain is as long as there are ranks; if it comes back, the peer stands.
        for _ in 0..self.seats.len() {
            match self.seats[culprit].waiting_for.load(Ordering::Relaxed) {
                NOBODY => break,
                next if next == rank => {
                    culprit = peer;
                    break;
                }
                next => {
                    expected = self.seats[culprit].target.load(Ordering::Relaxed);
                    culprit = next;
                }
            }
        }
        if culprit != peer {
            seen = endpoint.progress(culprit, u64::MAX);
        } else {
            expected = expected.max(seen);
        }
        let waited = self.deadline;
        let first = self.abort(culprit, || {
            format!("rank {rank} waited {waited:?} for it in {operation} number {epoch}, in vain")
        });
        if !first {
            // Another rank noticed at the same time, or before; its word is the group's.
            let error = self.abort_error();
            let CommError::RankFailed { rank: named, .. } = error else {
                unreachable!("an aborted group says RankFailed");
            };
            if named == rank {
                return error; // It waited for others, who waited for it.
            }
            culprit = named;
            seen = endpoint.progress(culprit, u64::MAX);
        }
        CommError::Timeout {
            rank,
            peer: culprit,
            operation,
            epoch,
            seen: packets(seen, epoch),
            expected: packets(expected, epoch),
            waited,
        }
    }
}

/// The packets of call `epoch` that a progress word stands for.
fn packets(progress: u64, epoch: u64) -> u64 {
    if progress >> 16 < epoch {
        0
    } else {
        progress & 0xffff
    }
}

impl Seat {
    fn wake(&self) {
        if self.parked.swap(false, Ordering::AcqRel)
            && let Some(thread) = &*lock(&self.thread)
        {
            thread.unpark();
        }
    }
}
