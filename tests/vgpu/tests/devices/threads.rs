//! The program's threads: a run depends on the seed and not on which of them is faster.

use std::sync::{Arc, Barrier, Mutex};

use crate::child::{child, is_child, marked, passes};
use crate::compile::ptx;
use crate::cuda::{Gpu, code, cu, findings, is_replayable};

const WORLD: usize = 4;

/// A thread a rank, each with a device: exchanges, copies, events, polls.
fn ranks() {
    let text = Arc::new(ptx("threads.cu"));
    let meet = Arc::new(Barrier::new(WORLD));
    let shared = Arc::new(Mutex::new(vec![None::<(u64, u64, u64)>; WORLD]));
    let threads: Vec<_> = (0..WORLD)
        .map(|rank| {
            let (text, meet, shared) = (text.clone(), meet.clone(), shared.clone());
            std::thread::spawn(move || {
                let gpu = Gpu::new(rank as i32, &text);
                let (flags, slots) = (gpu.room(8 * WORLD), gpu.room(8 * 32));
                let out = gpu.room(8 * 32);
                shared.lock().expect("no panic")[rank] = Some((gpu.context, flags, slots));
                meet.wait();
                let all: Vec<_> = shared
                    .lock()
                    .expect("no panic")
                    .iter()
                    .map(|e| e.expect("all"))
                    .collect();
                for (peer, entry) in all.iter().enumerate() {
                    if peer != rank {
                        cu!(cuCtxEnablePeerAccess(entry.0, 0));
                    }
                }
                let flags = gpu.put(&all.iter().map(|e| e.1).collect::<Vec<_>>());
                let slots = gpu.put(&all.iter().map(|e| e.2).collect::<Vec<_>>());
                let (mut start, mut end) = (0, 0);
                cu!(cuEventCreate(&mut start, 0));
                cu!(cuEventCreate(&mut end, 0));
                meet.wait();
                cu!(cuEventRecord(start, gpu.stream));
                let mut polls = 0;
                for round in 0..6u64 {
                    let steps = 3;
                    let args = [
                        rank as u64,
                        WORLD as u64,
                        flags,
                        slots,
                        out,
                        round * steps,
                        steps,
                    ];
                    gpu.launch("exchange", 1, 32, &args);
                    if round % 2 == rank as u64 % 2 {
                        cu!(cuStreamSynchronize(gpu.stream));
                    } else {
                        while code!(cuStreamQuery(gpu.stream)) == 600 {
                            polls += 1;
                        }
                    }
                }
                cu!(cuEventRecord(end, gpu.stream));
                cu!(cuStreamSynchronize(gpu.stream));
                let mut time = 0.0;
                cu!(cuEventElapsedTime(&mut time, start, end));
                let sums: Vec<u64> = gpu.get(out, 32);
                format!("out {rank} {start:x} {end:x} {out:x} {time} {polls} {sums:?}")
            })
        })
        .collect();
    let lines: Vec<String> = threads
        .into_iter()
        .map(|t| t.join().expect("a rank"))
        .collect();
    for line in lines {
        println!("\n{line}");
    }
    println!("out replayable {}", is_replayable());
    println!("out findings {:?}", findings());
}

#[test]
fn threads_of_their_own_devices_give_the_same_run_from_the_same_seed() {
    let name = "threads::threads_of_their_own_devices_give_the_same_run_from_the_same_seed";
    if is_child(name) {
        return ranks();
    }
    let run = |seed: &str| {
        let output = child(name, &[("VGPU_DEVICES", "4"), ("VGPU_SEED", seed)]);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "seed {seed}: {words}");
        let lines = marked(&output);
        assert_eq!(lines.len(), WORLD + 2, "{lines:?}");
        assert_eq!(lines[WORLD], "out replayable true", "seed {seed}: {words}");
        assert_eq!(lines[WORLD + 1], "out findings []", "seed {seed}");
        lines
    };
    let mut different = std::collections::BTreeSet::new();
    for seed in ["1", "2", "3"] {
        let first = run(seed);
        for _ in 0..2 {
            assert_eq!(first, run(seed), "seed {seed}");
        }
        different.insert(first);
    }
    assert_eq!(different.len(), 3, "seeds differ in their clocks");
}

/// A child with two devices that reach each other both ways.
fn pair() -> [Gpu; 2] {
    let text = ptx("threads.cu");
    let gpus = [0, 1].map(|d| Gpu::new(d, &text));
    for (own, peer) in [(0, 1), (1, 0)] {
        gpus[own].enter();
        cu!(cuCtxEnablePeerAccess(gpus[peer].context, 0));
    }
    gpus
}

const TWO: [(&str, &str); 1] = [("VGPU_DEVICES", "2")];

#[test]
fn a_spinner_may_be_launched_before_its_releaser() {
    let name = "threads::a_spinner_may_be_launched_before_its_releaser";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    let gpus = pair();
    let (flag, out) = (gpus[0].room(8), gpus[0].room(8));
    gpus[0].launch("spin_until", 1, 1, &[flag, 5, out]);
    // Questions let it spin for a while.
    for _ in 0..20 {
        assert_eq!(code!(cuStreamQuery(gpus[0].stream)), 600);
    }
    gpus[1].enter();
    gpus[1].launch("set", 1, 1, &[flag, 5]);
    cu!(cuStreamSynchronize(gpus[0].stream));
    assert_eq!(gpus[0].get::<u64>(out, 1), [5]);
    assert!(findings().is_empty());
    assert!(is_replayable());
}

#[test]
fn a_store_of_another_thread_releases_a_spinner_and_marks_the_run() {
    let name = "threads::a_store_of_another_thread_releases_a_spinner_and_marks_the_run";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    let [gpu, _] = pair();
    let mut word = std::ptr::null_mut();
    cu!(cuMemHostAlloc(&mut word, 8, 3));
    let out = gpu.room(8);
    let at = word as u64;
    let storer = std::thread::spawn(move || {
        // A busy machine may let this thread run before the other has come to wait.
        std::thread::sleep(std::time::Duration::from_secs(1));
        // SAFETY: the word is allocated and aligned; the device reads it atomically.
        unsafe {
            (*(at as *const std::sync::atomic::AtomicU64))
                .store(9, std::sync::atomic::Ordering::Release)
        };
    });
    gpu.launch("spin_until", 1, 1, &[at, 9, out]);
    cu!(cuStreamSynchronize(gpu.stream));
    storer.join().expect("it stores");
    assert_eq!(gpu.get::<u64>(out, 1), [9]);
    assert!(findings().is_empty());
    assert!(!is_replayable());
}

#[test]
fn a_thread_that_stays_busy_is_not_waited_for_and_marks_the_run() {
    let name = "threads::a_thread_that_stays_busy_is_not_waited_for_and_marks_the_run";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    use std::sync::atomic::{AtomicBool, Ordering};
    let [gpu, _] = pair();
    let done = Arc::new(AtomicBool::new(false));
    let spinner = std::thread::spawn({
        let done = done.clone();
        move || while !done.load(Ordering::Relaxed) {}
    });
    let flag = gpu.room(8);
    for value in 1..50 {
        gpu.launch("set", 1, 1, &[flag, value]);
        cu!(cuStreamSynchronize(gpu.stream));
    }
    done.store(true, Ordering::Relaxed);
    spinner.join().expect("it ends");
    assert_eq!(gpu.get::<u64>(flag, 1), [49]);
    assert!(!is_replayable());
}

#[test]
fn an_event_orders_streams_of_two_devices() {
    let name = "threads::an_event_orders_streams_of_two_devices";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    let gpus = pair();
    let (word, out) = (gpus[1].room(8), gpus[1].room(8));
    let mut event = 0;
    gpus[0].enter();
    cu!(cuEventCreate(&mut event, 2));
    gpus[0].launch("set", 1, 1, &[word, 3]);
    cu!(cuEventRecord(event, gpus[0].stream));
    gpus[1].enter();
    cu!(cuStreamWaitEvent(gpus[1].stream, event, 0));
    gpus[1].launch("spin_until", 1, 1, &[word, 3, out]);
    cu!(cuStreamSynchronize(gpus[1].stream));
    assert_eq!(gpus[1].get::<u64>(out, 1), [3]);
    assert!(findings().is_empty());
}

#[test]
fn a_deadlock_is_declared_when_every_thread_waits_in_the_driver() {
    let name = "threads::a_deadlock_is_declared_when_every_thread_waits_in_the_driver";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    // Each rank waits for a flag that the other would write afterwards.
    let text = Arc::new(ptx("threads.cu"));
    let codes: Vec<u32> = (0..2)
        .map(|device| {
            let text = text.clone();
            std::thread::spawn(move || {
                let gpu = Gpu::new(device, &text);
                let (flag, out) = (gpu.room(8), gpu.room(8));
                gpu.launch("spin_until", 1, 1, &[flag, 1, out]);
                code!(cuStreamSynchronize(gpu.stream))
            })
        })
        .collect::<Vec<_>>()
        .into_iter()
        .map(|t| t.join().expect("a rank"))
        .collect();
    assert_eq!(codes, [702, 702]);
    let found = findings();
    assert_eq!(
        found.iter().filter(|f| f.starts_with("deadlock: ")).count(),
        found.len()
    );
    assert!(
        found[0].contains("the host waits in cuStreamSynchronize"),
        "{found:?}"
    );
}

/// The kernel `until_late` spins until a flag comes or a time has passed; the flag comes from a
/// thread that first computes for so much of its own processor time. Whether it came in time.
fn flag_of_a_thread_that_computes(computes: std::time::Duration, deadline: u64) -> bool {
    let gpus = pair();
    let (flag, out) = (gpus[0].room(8), gpus[0].room(8));
    let releaser = std::thread::spawn(move || {
        // It has used the driver, so it is one that is waited for.
        gpus[1].enter();
        let mut sum = 0u64;
        while processor_time() < computes {
            sum = (0..10_000).fold(sum, |sum, i| std::hint::black_box(sum ^ i));
        }
        gpus[1].launch("set", 1, 1, &[flag, 1]);
        cu!(cuStreamSynchronize(gpus[1].stream));
    });
    gpus[0].launch("until_late", 1, 1, &[flag, 1, deadline, out]);
    cu!(cuStreamSynchronize(gpus[0].stream));
    releaser.join().expect("it computes");
    assert!(findings().is_empty());
    gpus[0].get::<u64>(out, 1) == [1]
}

/// Processor time of this thread.
fn processor_time() -> std::time::Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time is written to a place of its own.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    std::time::Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn a_deadline_waits_for_a_thread_that_computes() {
    let name = "threads::a_deadline_waits_for_a_thread_that_computes";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    // A deadline of 100 virtual milliseconds, and more than the grace to compute.
    let computes = std::time::Duration::from_millis(1300);
    assert!(flag_of_a_thread_that_computes(computes, 100_000_000));
    assert!(!is_replayable());
}

#[test]
fn a_thread_that_computes_for_less_than_the_grace_leaves_the_run_replayable() {
    let name = "threads::a_thread_that_computes_for_less_than_the_grace_leaves_the_run_replayable";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    let computes = std::time::Duration::from_millis(500);
    assert!(flag_of_a_thread_that_computes(computes, 1_000_000));
    assert!(is_replayable());
}

#[test]
fn a_deadline_passes_beside_a_thread_that_never_comes() {
    let name = "threads::a_deadline_passes_beside_a_thread_that_never_comes";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    // The clock goes on beside it, however slowly.
    let computes = std::time::Duration::from_millis(1800);
    assert!(!flag_of_a_thread_that_computes(computes, 20_000_000));
}

#[test]
fn a_deadline_passes_at_once_where_everybody_waits() {
    let name = "threads::a_deadline_passes_at_once_where_everybody_waits";
    if !is_child(name) {
        passes(name, &TWO);
        return;
    }
    let gpus = pair();
    let (flag, out) = (gpus[0].room(8), gpus[0].room(8));
    // An hour.
    gpus[0].launch("until_late", 1, 1, &[flag, 1, 3_600_000_000_000, out]);
    cu!(cuStreamSynchronize(gpus[0].stream));
    assert_eq!(gpus[0].get::<u64>(out, 1), [2]);
    assert!(is_replayable());
}
