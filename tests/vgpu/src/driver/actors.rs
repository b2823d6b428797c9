//! The program's threads as actors, so that a run can be replayed.
//!
//! The devices advance only while every thread that uses the driver waits: inside the driver, or
//! asleep in the kernel (joining a rank, waiting on a condition variable for another thread). A
//! thread that runs may be about to launch, copy or store something, and when it does must not
//! depend on how fast this machine is. So:
//!
//! - A thread is known from its first call until it ends. It *waits* from the moment a call finds
//!   that it has to until the devices have brought what it waits for. Then it is woken, and the
//!   devices rest until it waits again.
//! - Of the threads that wait, one is the *watcher*: it looks whether anybody still runs, and
//!   when nobody does it drives the devices. The others sleep.
//! - A thread outside the driver counts as running unless the kernel says that it sleeps
//!   (`/proc/self/task/…/stat`). So does one that is at the driver's lock ([`KNOCKING`]). New
//!   threads run from the start.
//! - A thread that stays busy longer than a grace, measured in its own processor time, is no
//!   longer waited for, until it sleeps or calls the driver. What the devices do meanwhile
//!   depends on the clock on the wall: the run is marked as one that cannot be replayed. Time
//!   passes slowly for them meanwhile: the virtual clock leaps no further than a part of the
//!   processor time that the thread uses, so that a kernel's deadline says something about the
//!   thread it waits for, and nothing about how busy the machine is.
//! - A question about progress (`cuStreamQuery`) waits for the answer yes or for a number of the
//!   devices' turns, by the same rule: a loop of such questions runs the same each time.
//! - A deadlock is declared when the devices cannot advance and every thread waits inside the
//!   driver; where others sleep, or are no longer waited for, only after a while in which
//!   nothing came from them.
//!
//! Its limits: a thread that a timer or the outside world wakes comes when it comes (the run is
//! marked); and what two threads do to the same device between two waits happens in the order in
//! which they come to the lock.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::{Driver, Guard, lock};
use crate::machine::{EventId, Progress, StreamId};

/// Processor time that a thread outside the driver may use before the devices go on without it:
/// one that has used the driver will do so again, another perhaps never. And time on the wall, for
/// a thread that cannot run at all.
const GRACE: Duration = Duration::from_secs(1);
const GRACE_OF_STRANGERS: Duration = Duration::from_millis(100);
const GRACE_ON_THE_WALL: Duration = Duration::from_secs(20);
/// How much slower the clock of devices that go on without a busy thread leaps than that thread
/// uses processor time.
const PACE: u32 = 10;
/// How long nothing may advance before it is a deadlock: where every thread waits in the driver,
/// where others sleep outside, and where others run.
const STUCK_ALONE: Duration = Duration::from_millis(20);
const STUCK_BESIDE_SLEEPERS: Duration = Duration::from_secs(1);
const STUCK_BESIDE_OTHERS: Duration = Duration::from_secs(3);
/// How often the watcher looks again.
const FIRST_PAUSE: Duration = Duration::from_micros(30);
const LONGEST_PAUSE: Duration = Duration::from_millis(2);
/// Turns of the devices that a question about progress waits for.
const TURNS: u64 = 512;

/// Threads that are about to take the lock.
static KNOCKING: AtomicUsize = AtomicUsize::new(0);

/// What a call waits for.
#[derive(Debug, Clone)]
pub(super) enum Until {
    /// The command of a stream with this number, and all before it; of several streams.
    Streams(Vec<(StreamId, u64)>),
    /// The record of an event with this number.
    Event(EventId, u64),
    /// The same, or this many turns of the devices in all.
    Turns(Box<Until>, u64),
}

/// A thread that waits in the driver.
struct Waiting {
    until: Until,
    /// Whether the host knows, for the race checks, what was done when the wait is over.
    learns: bool,
    call: &'static str,
    /// What it waited for has come, though it may not have noticed.
    ended: bool,
}

struct Actor {
    waiting: Option<Waiting>,
    call: &'static str,
    wake: Arc<Condvar>,
}

/// All threads that use the driver.
#[derive(Default)]
pub(super) struct Actors {
    threads: BTreeMap<i32, Actor>,
    watcher: Option<i32>,
    /// Busy threads that are not waited for.
    ignored: BTreeMap<i32, Ignored>,
    /// Why the run cannot be replayed.
    unreplayable: Option<String>,
}

/// When a thread began not to be waited for.
struct Ignored {
    /// In its own processor time, where the kernel counts it.
    used: Option<Duration>,
    since: Instant,
    /// The virtual time.
    clock: u64,
}

impl Ignored {
    /// The virtual time up to which the clock may leap while the thread stays busy.
    fn limit(&self, thread: i32) -> u64 {
        let time = match (self.used, time_used(thread)) {
            (Some(before), Some(now)) => now.saturating_sub(before),
            _ => self.since.elapsed(),
        };
        let leap = u64::try_from((time / PACE).as_nanos()).unwrap_or(u64::MAX);
        self.clock.saturating_add(leap)
    }
}

/// A thread's entry, which goes with the thread.
struct Registration {
    thread: i32,
    wake: Arc<Condvar>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut driver = knock();
        driver.actors.threads.remove(&self.thread);
        driver.actors.ignored.remove(&self.thread);
    }
}

thread_local! {
    static REGISTRATION: Registration = Registration {
        // SAFETY: it only asks.
        thread: unsafe { libc::gettid() },
        wake: Arc::new(Condvar::new()),
    };
}

/// The calling thread's number. A thread that is ending has none and is taken for nobody.
fn this_thread() -> i32 {
    REGISTRATION.try_with(|r| r.thread).unwrap_or(0)
}

/// Takes the lock; whoever stands at it counts as running.
fn knock() -> Guard {
    KNOCKING.fetch_add(1, Ordering::SeqCst);
    let driver = lock();
    KNOCKING.fetch_sub(1, Ordering::SeqCst);
    driver
}

/// A call begins.
pub(super) fn enter(call: &'static str) -> Guard {
    let mut driver = knock();
    let known = REGISTRATION.try_with(|r| (r.thread, r.wake.clone()));
    if let Ok((thread, wake)) = known {
        let actors = &mut driver.actors;
        actors.ignored.remove(&thread);
        let actor = actors.threads.entry(thread).or_insert_with(|| Actor {
            waiting: None,
            call,
            wake,
        });
        actor.call = call;
    }
    driver
}

/// What the threads outside the driver do.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outside {
    /// There are none.
    Nobody,
    /// They sleep.
    Asleep,
    /// These run.
    Busy(Vec<i32>),
}

/// The state of a thread as the kernel gives it, `S` or `R`; None for one that is gone.
fn state(thread: i32) -> Option<u8> {
    let stat = std::fs::read(format!("/proc/self/task/{thread}/stat")).ok()?;
    // The name before it is in parentheses and may contain anything.
    let end = stat.iter().rposition(|&c| c == b')')?;
    stat.get(end + 2).copied()
}

/// Processor time a thread has used; None where the kernel does not count it.
fn time_used(thread: i32) -> Option<Duration> {
    let words = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    let nanoseconds = words.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

impl Actors {
    fn waits(&self, thread: i32) -> bool {
        let waiting = self.threads.get(&thread).and_then(|a| a.waiting.as_ref());
        waiting.is_some_and(|w| !w.ended)
    }

    fn outside(&mut self) -> Outside {
        if KNOCKING.load(Ordering::SeqCst) > 0 {
            return Outside::Busy(Vec::new());
        }
        // One that was woken may stand at the lock, and looks asleep.
        let woken = |a: &Actor| a.waiting.as_ref().is_some_and(|w| w.ended);
        if self.threads.values().any(woken) {
            return Outside::Busy(Vec::new());
        }
        let waiting = self.threads.keys().filter(|&&t| self.waits(t)).count();
        // A directory has two links more than it has directories in it.
        let tasks = std::fs::metadata("/proc/self/task").map_or(0, |m| m.nlink());
        if tasks == waiting as u64 + 2 {
            return Outside::Nobody;
        }
        let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
            return Outside::Asleep;
        };
        let mut busy = Vec::new();
        let leader = std::process::id() as i32;
        for entry in tasks.flatten() {
            let name = entry.file_name();
            let Some(thread) = name.to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            if self.waits(thread) {
                continue;
            }
            match state(thread) {
                None => {}
                Some(b'S' | b'T' | b't' | b'I') => {
                    self.ignored.remove(&thread);
                }
                // The first thread stays so for ever once it has ended.
                Some(b'Z') if thread == leader => {}
                Some(_) => busy.push(thread),
            }
        }
        // Somebody may have come meanwhile.
        if busy.is_empty() && KNOCKING.load(Ordering::SeqCst) == 0 {
            Outside::Asleep
        } else {
            Outside::Busy(busy)
        }
    }

    /// The virtual time up to which the clock may leap.
    fn clock_limit(&self, outside: &Outside) -> u64 {
        let Outside::Busy(busy) = outside else {
            return u64::MAX;
        };
        let ignored = busy.iter().filter_map(|t| Some((t, self.ignored.get(t)?)));
        ignored.map(|(&t, i)| i.limit(t)).min().unwrap_or(u64::MAX)
    }

    /// Whether the run still depends on nothing but its seed.
    pub(super) fn is_replayable(&self) -> bool {
        self.unreplayable.is_none()
    }

    pub(super) fn cannot_be_replayed(&mut self, why: String) {
        if self.unreplayable.is_none() {
            eprintln!("vgpu: this run cannot be replayed from its seed: {why}");
            self.unreplayable = Some(why);
        }
    }

    /// Somebody else who waits takes over.
    fn hand_over(&mut self, from: i32) {
        if self.watcher != Some(from) {
            return;
        }
        let next = self.threads.keys().copied().find(|&t| self.waits(t));
        self.watcher = next;
        if let Some(actor) = next.and_then(|t| self.threads.get(&t)) {
            actor.wake.notify_all();
        }
    }

    /// What comes depends on nothing but the next seed.
    pub(super) fn begin_anew(&mut self) {
        self.unreplayable = None;
        self.ignored.clear();
    }

    /// In which calls threads wait, for reports.
    pub(super) fn calls(&self) -> Vec<String> {
        let waiting = self.threads.values().filter_map(|a| a.waiting.as_ref());
        let words = |w: &Waiting| match w.learns {
            true => w.call.to_owned(),
            // Its name does not say that it waits.
            false => format!(
                "{}, which waits for all that the devices had to do when it was called",
                w.call
            ),
        };
        waiting.map(words).collect()
    }
}

/// A busy thread, as it was first seen so.
struct Seen {
    since: Instant,
    /// Processor time it had used.
    used: Option<Duration>,
    /// Whether it has used the driver, then or later: it is not forgotten while it ends.
    known: bool,
}

/// How long the watcher has seen what it sees.
#[derive(Default)]
struct Watch {
    /// Busy threads since they were first seen so.
    busy: BTreeMap<i32, Seen>,
    stuck_since: Option<Instant>,
    pause: Duration,
}

impl Watch {
    /// Whether the devices may go on; if not, somebody still runs.
    /// `clock` is the virtual time.
    fn is_quiet(&mut self, actors: &mut Actors, outside: &Outside, clock: u64) -> bool {
        let Outside::Busy(busy) = outside else {
            self.busy.clear();
            return true;
        };
        if busy.is_empty() {
            // Somebody is at the lock and will have it in a moment.
            return false;
        }
        self.busy.retain(|thread, _| busy.contains(thread));
        for &thread in busy {
            let seen = self.busy.entry(thread).or_insert_with(|| Seen {
                since: Instant::now(),
                used: time_used(thread),
                known: false,
            });
            seen.known |= actors.threads.contains_key(&thread);
            if actors.ignored.contains_key(&thread) {
                continue;
            }
            let grace = match seen.known {
                true => GRACE,
                false => GRACE_OF_STRANGERS,
            };
            let now = time_used(thread);
            let over = match (seen.used, now) {
                (Some(before), Some(now)) => now.saturating_sub(before) > grace,
                _ => seen.since.elapsed() > grace,
            };
            if over || seen.since.elapsed() > GRACE_ON_THE_WALL {
                actors.cannot_be_replayed(format!(
                    "a thread stayed busy outside the driver while the others waited in {}, and \
                     the devices went on without it",
                    actors.calls().join(", ")
                ));
                let ignored = Ignored {
                    used: now,
                    since: Instant::now(),
                    clock,
                };
                actors.ignored.insert(thread, ignored);
            }
        }
        busy.iter()
            .all(|thread| actors.ignored.contains_key(thread))
    }

    fn next_pause(&mut self) -> Duration {
        self.pause = (2 * self.pause).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.pause
    }
}

impl Driver {
    fn is_met(&self, until: &Until) -> bool {
        match until {
            Until::Streams(marks) => marks
                .iter()
                .all(|&(id, number)| self.machine.is_finished(id, number)),
            Until::Event(id, number) => self.machine.is_recorded(*id, *number),
            Until::Turns(until, turn) => self.machine.turns() >= *turn || self.is_met(until),
        }
    }

    /// Ends the waits whose time has come, and wakes their threads; whether there are any.
    fn end_waits(&mut self, questions: bool) -> bool {
        let met: Vec<i32> = self
            .actors
            .threads
            .iter()
            .filter_map(|(thread, actor)| Some((thread, actor.waiting.as_ref()?)))
            .filter(|(_, w)| {
                !w.ended
                    && (self.is_met(&w.until) || questions && matches!(w.until, Until::Turns(..)))
            })
            .map(|(thread, _)| *thread)
            .collect();
        for thread in &met {
            let Some(actor) = self.actors.threads.get_mut(thread) else {
                continue;
            };
            actor.wake.notify_all();
            if let Some(waiting) = &mut actor.waiting {
                waiting.ended = true;
                let until = waiting.until.clone();
                if waiting.learns {
                    self.learn(&until);
                }
            }
        }
        !met.is_empty()
    }

    /// The host knows of what is done, and did before it does anything else: of all its threads,
    /// for who tells whom is not seen here.
    fn learn(&mut self, until: &Until) {
        match until {
            Until::Streams(marks) => {
                for &(id, _) in marks {
                    self.machine.host_synchronised(id);
                }
            }
            Until::Event(id, _) => self.machine.host_synchronised_event(*id),
            Until::Turns(until, _) => {
                if self.is_met(until) {
                    self.learn(until);
                }
            }
        }
    }
}

/// Waits until what is wanted has come; the devices advance meanwhile.
fn wait(mut driver: Guard, until: Until, learns: bool) -> Guard {
    let me = this_thread();
    if driver.is_met(&until) {
        if learns {
            driver.learn(&until);
        }
        driver.show();
        return driver;
    }
    let wake = match driver.actors.threads.get_mut(&me) {
        Some(actor) => {
            actor.waiting = Some(Waiting {
                until,
                learns,
                call: actor.call,
                ended: false,
            });
            actor.wake.clone()
        }
        // A thread that is ending and no longer counts.
        None => {
            while !driver.is_met(&until) {
                let progress = driver.machine.step();
                if !matches!(progress, Progress::Advanced | Progress::Released) {
                    break;
                }
            }
            return driver;
        }
    };
    driver.actors.watcher = Some(me);
    let mut watch = Watch::default();
    while driver.actors.waits(me) {
        if driver.actors.watcher != Some(me) {
            watch = Watch::default();
            driver = sleep(&wake, driver, None);
            continue;
        }
        let outside = driver.actors.outside();
        let clock = driver.machine.world.now;
        if !watch.is_quiet(&mut driver.actors, &outside, clock) {
            watch.stuck_since = None;
            let pause = watch.next_pause();
            driver = sleep(&wake, driver, Some(pause));
            continue;
        }
        watch.pause = Duration::ZERO;
        driver.machine.clock_limit = driver.actors.clock_limit(&outside);
        driver = advance(driver, me, &outside, &mut watch, &wake);
    }
    if let Some(actor) = driver.actors.threads.get_mut(&me) {
        actor.waiting = None;
    }
    driver.actors.hand_over(me);
    driver.show();
    driver
}

fn sleep(wake: &Condvar, driver: Guard, time: Option<Duration>) -> Guard {
    use std::sync::PoisonError;
    match time {
        None => wake.wait(driver).unwrap_or_else(PoisonError::into_inner),
        Some(time) => {
            let woken = wake.wait_timeout(driver, time);
            woken.unwrap_or_else(PoisonError::into_inner).0
        }
    }
}

/// Lets the devices advance until a wait ends, somebody knocks, or nothing can.
fn advance(
    mut driver: Guard,
    me: i32,
    outside: &Outside,
    watch: &mut Watch,
    wake: &Condvar,
) -> Guard {
    let mut completions = driver.machine.completions();
    // What others put in while the devices rested may have met a wait at once.
    if driver.end_waits(false) {
        return driver;
    }
    loop {
        if KNOCKING.load(Ordering::Relaxed) > 0 {
            driver.actors.cannot_be_replayed(
                "a thread came to the driver while the devices ran: something else than the \
                 driver had woken it"
                    .to_owned(),
            );
            return sleep(wake, driver, Some(FIRST_PAUSE));
        }
        let progress = driver.machine.step();
        match progress {
            Progress::Advanced => watch.stuck_since = None,
            Progress::Released => {
                watch.stuck_since = None;
                driver.actors.cannot_be_replayed(
                    "the program stored into memory that the devices see while they ran".to_owned(),
                );
            }
            Progress::TooEarly => return sleep(wake, driver, Some(LONGEST_PAUSE)),
            Progress::HostFunction(stream, function) => {
                watch.stuck_since = None;
                return call_host(driver, me, stream, function);
            }
            Progress::Idle | Progress::Stuck => {
                if driver.end_waits(true) {
                    // Whoever only asks must not keep a processor busy with it.
                    drop(driver);
                    std::thread::sleep(FIRST_PAUSE);
                    return lock();
                }
                let patience = match outside {
                    Outside::Nobody => STUCK_ALONE,
                    Outside::Asleep => STUCK_BESIDE_SLEEPERS,
                    Outside::Busy(_) => STUCK_BESIDE_OTHERS,
                };
                let since = *watch.stuck_since.get_or_insert_with(Instant::now);
                if since.elapsed() <= patience {
                    return sleep(wake, driver, Some(LONGEST_PAUSE));
                }
                let calls = driver.actors.calls();
                driver.machine.declare_deadlock(&calls);
                watch.stuck_since = None;
            }
        }
        let now = driver.machine.completions();
        if now != completions || driver.machine.turns().is_multiple_of(64) {
            completions = now;
            if driver.end_waits(false) {
                return driver;
            }
        }
    }
}

/// Runs a function of the host that a stream has come to. The thread is outside meanwhile.
fn call_host(
    mut driver: Guard,
    me: i32,
    stream: StreamId,
    function: Box<dyn FnOnce() + Send>,
) -> Guard {
    let waiting = driver
        .actors
        .threads
        .get_mut(&me)
        .and_then(|a| a.waiting.take());
    driver.actors.hand_over(me);
    drop(driver);
    function();
    let mut driver = knock();
    driver.machine.host_function_done(stream);
    if let Some(actor) = driver.actors.threads.get_mut(&me) {
        actor.waiting = waiting;
    }
    driver.actors.watcher = Some(me);
    driver
}

/// Waits for everything put into a stream so far.
pub(super) fn wait_for(driver: Guard, id: StreamId) -> Guard {
    let number = driver.machine.submitted(id);
    wait(driver, Until::Streams(vec![(id, number)]), true)
}

/// Waits for the last record of an event asked for so far.
pub(super) fn wait_for_event(driver: Guard, id: EventId) -> Guard {
    let number = driver.machine.records(id);
    wait(driver, Until::Event(id, number), true)
}

/// Waits as a call does that happens to synchronise with devices: for everything put into their
/// streams so far. Nobody may rely on it, so the host learns nothing by it.
pub(super) fn wait_for_devices(driver: Guard, devices: u64) -> Guard {
    let marks = (0..driver.machine.devices.len() as u32)
        .filter(|device| devices >> device & 1 != 0)
        .flat_map(|device| driver.machine.streams_of(device))
        .map(|id| (id, driver.machine.submitted(id)))
        .collect();
    wait(driver, Until::Streams(marks), false)
}

/// Waits for an answer, or for a while, so that whoever asks again and again gets somewhere.
pub(super) fn ask(driver: Guard, until: Until) -> Guard {
    let turn = driver.machine.turns() + TURNS;
    wait(driver, Until::Turns(Box::new(until), turn), true)
}
