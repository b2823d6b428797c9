//! Random numbers for the fuzz tests, and how a fuzz test runs: cases by number, in a process of
//! their own, until the time is over.

use std::time::{Duration, Instant};

use crate::cuda::{Child, Cuda, child};

/// Cases from here on, and for how long.
const FROM: &str = "VGPU_FUZZ_FROM";
const SECONDS: &str = "VGPU_FUZZ_SECONDS";
/// A case that takes longer is one that hangs: in seconds of processor time, for the machine may be
/// busy, and on the wall.
const PATIENCE: i64 = 30;
const PATIENCE_ON_THE_WALL: u32 = 300;
/// More memory than any case needs.
const MEMORY: u64 = 8 << 30;

/// splitmix64
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}

fn number(name: &str, default: u64) -> u64 {
    let set = std::env::var(name).ok();
    set.map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text}"))
    })
}

/// Runs this in a process with a single thread. The test harness has one more, which sleeps, and
/// beside a thread that sleeps the driver waits a second before it calls anything a deadlock.
pub(crate) fn alone(body: impl FnOnce()) {
    // SAFETY: the child only runs `body`, and ends without returning here.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "a process can be forked");
    if child == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(if result.is_ok() { 0 } else { 101 }) };
    }
    let mut status = 0;
    // SAFETY: waits for the process just made.
    unsafe { libc::waitpid(child, &mut status, 0) };
    if libc::WIFSIGNALED(status) {
        panic!("ended by signal {}", libc::WTERMSIG(status));
    }
    assert_eq!(libc::WEXITSTATUS(status), 0);
}

/// In the child: runs cases until the time is over; prints how many.
pub(crate) fn cases(seconds: u64, mut case: impl FnMut(u64)) {
    let limit = libc::rlimit {
        rlim_cur: MEMORY,
        rlim_max: MEMORY,
    };
    // SAFETY: only sets a limit.
    unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) };
    let time = Duration::from_secs(number(SECONDS, seconds));
    let (start, from) = (Instant::now(), number(FROM, 0));
    let mut seed = from;
    while start.elapsed() < time {
        eprintln!("case {seed}");
        give(PATIENCE, PATIENCE_ON_THE_WALL);
        case(seed);
        seed += 1;
    }
    give(0, 0);
    println!("{} cases", seed - from);
}

/// Ends the process, which its parent sees, if it goes on for longer; 0 is no limit.
fn give(processor: i64, wall: u32) {
    let none = libc::timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    let timer = libc::itimerval {
        it_interval: none,
        it_value: libc::timeval {
            tv_sec: processor,
            ..none
        },
    };
    // SAFETY: both only set timers; their signals end a process that does not handle them.
    unsafe {
        libc::setitimer(libc::ITIMER_PROF, &timer, std::ptr::null_mut());
        libc::alarm(wall);
    }
}

/// Runs a fuzz test, which must neither end early nor hang nor meet a panic in the library.
pub(crate) fn fuzz<F: Fn(&Cuda)>(test: &str, variables: &[(&str, &str)], body: F) {
    let body = |cuda: &Cuda| alone(|| body(cuda));
    let Some(Child {
        code,
        output,
        errors,
    }) = child(test, variables, body)
    else {
        return;
    };
    let bad = errors
        .lines()
        .position(|line| line.contains("please report this"));
    let lines: Vec<&str> = errors.lines().collect();
    let until = bad.map_or(lines.len(), |at| at + 1);
    let case = lines[..until]
        .iter()
        .rev()
        .find(|line| line.starts_with("case "));
    let tail = lines[until.saturating_sub(20)..until].join("\n");
    assert!(
        code == Some(0) && bad.is_none(),
        "{case:?} (run it alone: {FROM}=<its number> {SECONDS}=1): status {code:?}\n{tail}\n{output}"
    );
    let said = |end: &str| output.lines().find(|line| line.ends_with(end));
    let count = said(" cases").expect("the number of cases is printed");
    println!("{test}: {count}; {}", said(" launches").unwrap_or_default());
}
