//! Groups of CPU ranks: making, rebuilding, replacing a lost rank.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::cpu::CpuComm;
use super::error::CommError;
use super::generation::{Generation, lock};
use super::mailbox::Endpoint;
use crate::error::Result;

/// Ranks a group can have; far more than make sense, and few enough to allocate.
const MAX_WORLD_SIZE: usize = 1024;

/// What a group can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupOptions {
    /// How long any single wait for a peer may last.
    pub deadline: Duration,
    /// How long a waiting rank spins before it sleeps, where the process has a core for
    /// every rank alive; without, it sleeps at once. Zero: always sleep.
    pub spin: Duration,
}

impl Default for GroupOptions {
    /// 30 s, and 2 ms of spinning.
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            spin: Duration::from_millis(2),
        }
    }
}

/// `world_size` ranks that call collectives together. A clone is the same group.
#[derive(Clone, Debug)]
pub struct Group {
    inner: Arc<Inner>,
}

struct Inner {
    world_size: usize,
    options: GroupOptions,
    state: Mutex<State>,
    rebuilt: Condvar,
}

/// Where ranks meet to rebuild.
struct State {
    current: Arc<Generation>,
    /// The current generation's endpoints that their ranks have yet to fetch.
    endpoints: Vec<Option<Endpoint>>,
    /// Who waits for the next generation.
    arrived: Vec<bool>,
    /// Rebuilds that were given up, and who was missing in the last one.
    given_up: u64,
    missing: Vec<usize>,
    /// The number of the handle that speaks for each rank.
    incarnations: Vec<u64>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("world_size", &self.world_size)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Group {
    /// A group of `world_size` ranks, and the handle of each, in rank order.
    ///
    /// # Errors
    /// [`CommError::Argument`] for zero ranks or more than 1024.
    pub fn new(
        world_size: usize,
        options: GroupOptions,
    ) -> Result<(Self, Vec<CpuComm>), CommError> {
        if !(1..=MAX_WORLD_SIZE).contains(&world_size) {
            return Err(CommError::Argument {
                operation: "Group::new",
                problem: format!("{world_size} ranks; ask for 1 to {MAX_WORLD_SIZE}"),
            });
        }
        let generation = Arc::new(Generation::new(
            0,
            world_size,
            options.deadline,
            options.spin,
        ));
        let group = Self {
            inner: Arc::new(Inner {
                world_size,
                options,
                state: Mutex::new(State {
                    current: generation.clone(),
                    endpoints: Vec::new(),
                    arrived: vec![false; world_size],
                    given_up: 0,
                    missing: Vec::new(),
                    incarnations: vec![0; world_size],
                }),
                rebuilt: Condvar::new(),
            }),
        };
        let comms = Endpoint::group(world_size)
            .into_iter()
            .enumerate()
            .map(|(rank, endpoint)| {
                CpuComm::new(rank, group.clone(), generation.clone(), endpoint, 0)
            })
            .collect();
        Ok((group, comms))
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.inner.world_size
    }

    /// Rebuilds so far.
    #[cfg(feature = "cuda")]
    pub(super) fn generation(&self) -> u64 {
        lock(&self.inner.state).current.number
    }

    /// The options it was made with.
    pub fn options(&self) -> GroupOptions {
        self.inner.options
    }

    /// A new handle for `rank`, whose thread is lost: stuck, or gone with its handle. It
    /// becomes usable by [`CpuComm::rebuild`], with all other ranks. The old handle is void; if
    /// it has not been dropped, this ends the group.
    ///
    /// # Errors
    /// [`CommError::Argument`] if there is no such rank.
    pub fn rejoin(&self, rank: usize) -> Result<CpuComm, CommError> {
        let world_size = self.inner.world_size;
        if rank >= world_size {
            return Err(CommError::Argument {
                operation: "Group::rejoin",
                problem: format!("rank {rank} of {world_size}; name one of the ranks, from 0"),
            });
        }
        let mut state = lock(&self.inner.state);
        // Whoever waits for a rank that has left knows; the others may finish their calls.
        if !state.current.has_departed(rank) {
            state.current.abort(rank, || "it was replaced".into());
        }
        state.incarnations[rank] += 1;
        state.arrived[rank] = false;
        // Mailboxes of its own, of a generation that has ended: there is only ever one
        // endpoint for a mailbox, and the real one is the old handle's.
        let ended = Arc::new(Generation::new(
            state.current.number,
            world_size,
            self.inner.options.deadline,
            self.inner.options.spin,
        ));
        ended.abort(rank, || {
            "its new handle has to rebuild the group first".into()
        });
        let endpoint = Endpoint::group(world_size).swap_remove(rank);
        let incarnation = state.incarnations[rank];
        drop(state);
        // Whoever waits in a rebuild on behalf of the old handle has to learn that it is void.
        self.inner.rebuilt.notify_all();
        Ok(CpuComm::new(
            rank,
            self.clone(),
            ended,
            endpoint,
            incarnation,
        ))
    }

    /// Waits until all ranks of generation `number` are here; returns the next generation.
    pub(crate) fn rebuild(
        &self,
        rank: usize,
        incarnation: u64,
        number: u64,
    ) -> Result<(Arc<Generation>, Endpoint), CommError> {
        let Inner {
            world_size,
            options,
            ref state,
            ref rebuilt,
        } = *self.inner;
        let start = Instant::now();
        let mut state = lock(state);
        let void = |state: &State| state.incarnations[rank] != incarnation;
        if void(&state) || state.current.number != number {
            return Err(replaced(rank));
        }
        state.arrived[rank] = true;
        let given_up = state.given_up;
        if state.arrived.iter().all(|&arrived| arrived) {
            state.current.abort(rank, || {
                "the group was rebuilt; use the handle that took part".into()
            });
            let next = Generation::new(number + 1, world_size, options.deadline, options.spin);
            state.current = Arc::new(next);
            state.endpoints = Endpoint::group(world_size).into_iter().map(Some).collect();
            state.arrived.fill(false);
            rebuilt.notify_all();
        }
        while state.current.number == number {
            if void(&state) {
                return Err(replaced(rank));
            }
            let waited = start.elapsed();
            if state.given_up == given_up && waited >= options.deadline {
                // For all who wait, so that nobody names one who has waited and gone.
                state.missing = (0..world_size).filter(|&r| !state.arrived[r]).collect();
                state.arrived.fill(false);
                state.given_up += 1;
                rebuilt.notify_all();
            }
            if state.given_up != given_up {
                return Err(CommError::RankFailed {
                    rank: state.missing.first().copied().unwrap_or(rank),
                    cause: format!(
                        "all ranks were to rebuild the group, and {:?} did not come within {:?}",
                        state.missing, options.deadline
                    ),
                });
            }
            state = rebuilt
                .wait_timeout(state, options.deadline.saturating_sub(waited))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let current = state.current.clone();
        match state.endpoints.get_mut(rank).and_then(Option::take) {
            // A later generation has no endpoint for a handle that slept through one.
            Some(endpoint) if current.number == number + 1 && !void(&state) => {
                Ok((current, endpoint))
            }
            _ => Err(replaced(rank)),
        }
    }
}

fn replaced(rank: usize) -> CommError {
    CommError::RankFailed {
        rank,
        cause: "this handle was replaced; use the one that rejoined".into(),
    }
}

/// Runs `body` once per rank, each on a thread of its own, and returns every rank's result
/// in rank order. A panic becomes an error; a rank's error or panic ends the group with its
/// message, so that the others come back too.
///
/// # Errors
/// [`CommError::Argument`] for an impossible `world_size`.
///
/// ```
/// let sums = ringtp::comm::run_ranks(3, Default::default(), |comm| {
///     let mut data = [comm.rank() as f32; 4];
///     comm.all_reduce(&mut data)?;
///     Ok(data[0])
/// })?;
/// for sum in sums {
///     assert_eq!(sum?, 3.0);
/// }
/// # Ok::<(), ringtp::Error>(())
/// ```
pub fn run_ranks<R: Send>(
    world_size: usize,
    options: GroupOptions,
    body: impl Fn(&mut CpuComm) -> Result<R> + Sync,
) -> Result<Vec<Result<R>>, CommError> {
    let (_group, comms) = Group::new(world_size, options)?;
    let body = &body;
    Ok(std::thread::scope(|scope| {
        let threads: Vec<_> = comms
            .into_iter()
            .map(|mut comm| {
                scope.spawn(move || {
                    let rank = comm.rank();
                    let result = catch_unwind(AssertUnwindSafe(|| body(&mut comm))).unwrap_or_else(
                        |panic| {
                            let cause = format!("it panicked: {}", panic_message(&*panic));
                            Err(CommError::RankFailed { rank, cause }.into())
                        },
                    );
                    match &result {
                        Ok(_) => {}
                        Err(crate::Error::Comm(CommError::RankFailed { rank: me, cause }))
                            if *me == rank =>
                        {
                            comm.abort(cause);
                        }
                        Err(error) => comm.abort(&error.to_string()),
                    }
                    result
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .expect("the body's panics are caught, and nothing else panics")
            })
            .collect()
    }))
}

/// What a panic said.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
