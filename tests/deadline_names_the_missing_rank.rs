//! A rank that is missing, stuck, panicking or in error ends the others within the deadline,
//! with an error that names it, and the group can be rebuilt.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::sync::Barrier;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ringtp::Error;
use ringtp::comm::{
    ALL, AllReduce, Auto, CommError, CpuComm, Group, GroupOptions, OneShot, Ring, TwoShot,
    run_ranks,
};

const DEADLINE: Duration = Duration::from_millis(300);
/// What a loaded machine may take on top: generous, and far below a second deadline's sum.
const SLACK: Duration = Duration::from_secs(5);

fn options(deadline: Duration) -> GroupOptions {
    GroupOptions {
        deadline,
        ..GroupOptions::default()
    }
}

/// A deadline that no test reaches: what ends earlier was not ended by it.
fn patient() -> GroupOptions {
    options(Duration::from_secs(60))
}

/// The rank that an error blames.
fn blamed(error: &CommError) -> usize {
    match error {
        CommError::Timeout { peer, .. } => *peer,
        CommError::RankFailed { rank, .. } => *rank,
        error => panic!("not the loss of a rank: {error}"),
    }
}

fn sum_of_ranks(comm: &mut CpuComm) -> Result<(), CommError> {
    let n = comm.world_size();
    let mut data = vec![comm.rank() as f32; 100];
    comm.all_reduce(&mut data)?;
    assert_eq!(data, vec![(n * (n - 1) / 2) as f32; 100]);
    Ok(())
}

/// Every rank rebuilds and the new group works.
fn rebuild_and_use(comm: &mut CpuComm) -> Result<(), CommError> {
    comm.rebuild()?;
    for _ in 0..5 {
        sum_of_ranks(comm)?;
    }
    Ok(())
}

#[test]
fn every_rank_that_waits_for_a_missing_one_names_it() {
    let missing = 2;
    for &algorithm in ALL {
        for world_size in [3, 5, 8] {
            let met = Barrier::new(world_size);
            let results = run_ranks(world_size, options(DEADLINE), |comm| {
                sum_of_ranks(comm)?;
                if comm.rank() == missing {
                    met.wait();
                } else {
                    let start = Instant::now();
                    let error = comm
                        .all_reduce_with(algorithm, &mut vec![1_f32; 5000])
                        .unwrap_err();
                    let waited = start.elapsed();
                    let name = algorithm.name();
                    assert_eq!(blamed(&error), missing, "{name}: {error}");
                    assert!(waited < DEADLINE + SLACK, "{name}: {waited:?}");
                    assert!(error.to_string().contains("rank 2"), "{error}");
                    // Sticky, and at once.
                    let start = Instant::now();
                    assert_eq!(blamed(&comm.barrier().unwrap_err()), missing);
                    assert!(start.elapsed() < DEADLINE);
                    met.wait();
                    assert!(waited >= DEADLINE / 2, "{name}: {waited:?}");
                }
                rebuild_and_use(comm)?;
                Ok(())
            });
            for result in results.unwrap() {
                result.unwrap();
            }
        }
    }
}

/// The predecessor in a ring waits itself; it is innocent.
#[test]
fn a_ring_blames_the_missing_rank_and_no_neighbour() {
    let met = Barrier::new(6);
    let ring = Ring { chunk: 64 };
    let results = run_ranks(6, options(DEADLINE), |comm| {
        let result = match comm.rank() {
            4 => Ok(()),
            _ => comm.all_reduce_with(&ring, &mut [1_f32; 1000]),
        };
        met.wait();
        Ok(result)
    });
    for (rank, result) in results.unwrap().into_iter().enumerate() {
        if rank != 4 {
            assert_eq!(blamed(&result.unwrap().unwrap_err()), 4, "rank {rank}");
        }
    }
}

#[test]
fn a_rank_that_is_slow_but_in_time_is_waited_for() {
    for world_size in [2, 4] {
        let results = run_ranks(world_size, patient(), |comm| {
            for slow in 0..comm.world_size() {
                if comm.rank() == slow {
                    thread::sleep(Duration::from_millis(60));
                }
                sum_of_ranks(comm)?;
                comm.all_reduce_with(&Ring::DEFAULT, &mut [1_f32; 99])?;
            }
            Ok(())
        });
        for result in results.unwrap() {
            result.unwrap();
        }
    }
}

#[test]
fn a_panic_ends_the_others_at_once_with_its_message() {
    let start = Instant::now();
    let results = run_ranks(4, patient(), |comm| {
        sum_of_ranks(comm)?;
        assert!(comm.rank() != 1, "the dog ate rank 1");
        sum_of_ranks(comm)?;
        Ok(())
    })
    .unwrap();
    assert!(start.elapsed() < SLACK);
    for result in results {
        let Error::Comm(error) = result.unwrap_err() else {
            panic!("another error");
        };
        assert_eq!(blamed(&error), 1);
        assert!(error.to_string().contains("the dog ate rank 1"), "{error}");
    }
}

#[test]
fn an_error_of_one_rank_ends_the_others_at_once_with_its_message() {
    let start = Instant::now();
    let results = run_ranks(4, patient(), |comm| {
        sum_of_ranks(comm)?;
        if comm.rank() == 3 {
            return Err(Error::input("weights", "a file", "nothing", "find it"));
        }
        sum_of_ranks(comm)?;
        Ok(())
    })
    .unwrap();
    assert!(start.elapsed() < SLACK);
    for (rank, result) in results.into_iter().enumerate() {
        match result.unwrap_err() {
            Error::Comm(error) => {
                assert_eq!(blamed(&error), 3);
                assert!(error.to_string().contains("find it"), "{error}");
            }
            error => assert_eq!(rank, 3, "{error}"),
        }
    }
}

#[test]
fn a_reported_error_is_followed_by_a_rebuild_that_works() {
    let results = run_ranks(3, patient(), |comm| {
        if comm.rank() == 0 {
            comm.abort("no more paper");
        }
        let error = loop {
            if let Err(error) = comm.barrier() {
                break error;
            }
        };
        assert_eq!(blamed(&error), 0);
        assert!(error.to_string().contains("no more paper"), "{error}");
        rebuild_and_use(comm)?;
        Ok(())
    });
    for result in results.unwrap() {
        result.unwrap();
    }
}

/// A thread that leaves by a panic without `run_ranks` around it.
#[test]
fn a_handle_dropped_in_a_panic_says_so() {
    let (_group, mut comms) = Group::new(2, patient()).unwrap();
    let mut stays = comms.remove(0);
    let panics = comms.remove(0);
    let thread = thread::spawn(move || {
        let _comm = panics;
        panic!("on purpose");
    });
    let error = stays.barrier().unwrap_err();
    assert_eq!(blamed(&error), 1);
    assert!(error.to_string().contains("panicked"), "{error}");
    assert!(thread.join().is_err());
}

#[test]
fn a_dropped_handle_fails_those_that_wait_for_it_and_a_new_one_rejoins() {
    let (group, comms) = Group::new(3, patient()).unwrap();
    let (left, new) = mpsc::channel();
    thread::scope(|scope| {
        for mut comm in comms {
            let left = left.clone();
            scope.spawn(move || {
                sum_of_ranks(&mut comm).unwrap();
                if comm.rank() == 2 {
                    // Everyone has all it needs of the last call.
                    drop(comm);
                    left.send(()).unwrap();
                    return;
                }
                let start = Instant::now();
                let error = sum_of_ranks(&mut comm).unwrap_err();
                assert_eq!(blamed(&error), 2);
                assert!(error.to_string().contains("left"), "{error}");
                assert!(start.elapsed() < SLACK);
                rebuild_and_use(&mut comm).unwrap();
            });
        }
        new.recv().unwrap();
        let mut comm = group.rejoin(2).unwrap();
        let error = comm.barrier().unwrap_err();
        assert!(error.to_string().contains("rebuild"), "{error}");
        rebuild_and_use(&mut comm).unwrap();
    });
}

/// A stuck thread can't be killed. Its place is taken by another; when it wakes, its handle
/// is void and harms nobody.
#[test]
fn a_stuck_rank_is_replaced_and_its_old_handle_is_void() {
    let (group, comms) = Group::new(3, options(DEADLINE)).unwrap();
    let (wake, sleep) = mpsc::channel::<()>();
    let sleep = std::sync::Mutex::new(sleep);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for mut comm in comms {
            let sleep = &sleep;
            threads.push(scope.spawn(move || {
                sum_of_ranks(&mut comm).unwrap();
                if comm.rank() == 1 {
                    sleep.lock().unwrap().recv().unwrap();
                    let error = sum_of_ranks(&mut comm).unwrap_err();
                    assert_eq!(blamed(&error), 1);
                    let error = comm.rebuild().unwrap_err();
                    assert!(error.to_string().contains("replaced"), "{error}");
                    return;
                }
                assert_eq!(blamed(&sum_of_ranks(&mut comm).unwrap_err()), 1);
                // Without the missing one it can't be rebuilt, and that says who is missing.
                let error = comm.rebuild().unwrap_err();
                assert_eq!(blamed(&error), 1);
                while let Err(error) = comm.rebuild() {
                    assert_eq!(blamed(&error), 1, "{error}");
                }
                for _ in 0..100 {
                    sum_of_ranks(&mut comm).unwrap();
                }
            }));
        }
        thread::sleep(DEADLINE * 3);
        let mut comm = group.rejoin(1).unwrap();
        while comm.rebuild().is_err() {}
        wake.send(()).unwrap();
        for _ in 0..100 {
            sum_of_ranks(&mut comm).unwrap();
        }
    });
}

#[test]
fn different_calls_are_told_apart_and_survived() {
    type Calls = fn(&mut CpuComm) -> Result<(), CommError>;
    let odd_one: [(&str, Calls); 5] = [
        ("barrier", |comm| comm.barrier()),
        ("104 bytes", |comm| {
            comm.all_reduce_with(&OneShot, &mut [0_f32; 26])
        }),
        ("two-shot", |comm| {
            comm.all_reduce_with(&TwoShot, &mut [0_f32; 25])
        }),
        ("bf16", |comm| {
            comm.all_reduce_with(&OneShot, &mut [half::bf16::ZERO; 50])
        }),
        ("broadcast", |comm| comm.broadcast(&mut [0_u8; 100], 0)),
    ];
    for (name, call) in odd_one {
        let results = run_ranks(3, patient(), |comm| {
            let result = match comm.rank() {
                1 => call(comm).and_then(|()| comm.barrier()),
                _ => comm
                    .all_reduce_with(&OneShot, &mut [0_f32; 25])
                    .and_then(|()| comm.barrier()),
            };
            let error = result.unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
            rebuild_and_use(comm)?;
            Ok(())
        });
        for result in results.unwrap() {
            result.unwrap();
        }
    }
}

/// Nothing was sent, so nothing is lost.
#[test]
fn arguments_that_cannot_be_leave_the_group_usable() {
    let results = run_ranks(2, patient(), |comm| {
        let errors = [
            comm.all_reduce_out(&[0_f32; 3], &mut [0.0; 4]),
            comm.reduce_scatter(&[0_f32; 3], &mut [0.0; 3]),
            comm.all_gather(&[0_u8; 3], &mut [0; 5]),
            comm.all_gather_v(&[0_u8; 3], &[3], &mut [0; 3]),
            comm.all_gather_v(&[0_u8; 3], &[3, usize::MAX], &mut [0; 3]),
            comm.broadcast(&mut [0_u8; 3], 2),
            comm.scatter(&[0_u8; 3], &mut [0; 2], comm.rank()),
            comm.gather(&[0_u8; 3], &mut [0; 2], 0),
        ];
        for error in errors {
            assert!(
                matches!(error, Err(CommError::Argument { .. })),
                "{error:?}"
            );
        }
        sum_of_ranks(comm)?;
        Ok(())
    });
    for result in results.unwrap() {
        result.unwrap();
    }
    assert!(Group::new(0, patient()).is_err());
    assert!(Group::new(usize::MAX, patient()).is_err());
}

#[test]
fn the_failure_of_one_group_is_nothing_to_another() {
    let (_first, mut broken) = Group::new(2, patient()).unwrap();
    let (_second, works) = Group::new(2, patient()).unwrap();
    thread::scope(|scope| {
        for mut comm in works {
            scope.spawn(move || {
                for _ in 0..1000 {
                    sum_of_ranks(&mut comm).unwrap();
                }
            });
        }
        broken[0].abort("enough");
        assert_eq!(blamed(&broken[1].barrier().unwrap_err()), 0);
    });
}

/// CPU time of this process so far.
fn cpu_time() -> Duration {
    // SAFETY: all zeros is a valid `rusage`, a struct of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid place to write.
    let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    assert_eq!(status, 0);
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Runs in a process of its own: the CPU time of other tests would count.
#[test]
fn waiting_ranks_sleep() {
    const CHILD: &str = "RINGTP_TEST_WAITING_RANKS_SLEEP";
    if std::env::var_os(CHILD).is_none() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "waiting_ranks_sleep"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}");
        return;
    }
    let wait = Duration::from_millis(500);
    for world_size in [2, 8, 32] {
        let before = cpu_time();
        let results = run_ranks(world_size, patient(), |comm| {
            if comm.rank() == 0 {
                thread::sleep(wait);
            }
            comm.all_reduce_with(&Auto, &mut [1_f32; 8])?;
            Ok(())
        });
        let spent = cpu_time() - before;
        assert!(results.unwrap().iter().all(Result::is_ok));
        // Spinning would take 500 ms on one core at least.
        assert!(
            spent < wait / 5,
            "{world_size} ranks took {spent:?} of CPU time"
        );
    }
}

/// Wake-ups are not lost: with sleep at every wait, a lost one would cost the deadline.
#[test]
fn ranks_that_always_sleep_lose_no_wake_up() {
    let sleepy = GroupOptions {
        spin: Duration::ZERO,
        ..patient()
    };
    let start = Instant::now();
    let algorithms: Vec<&dyn AllReduce> = ALL.to_vec();
    for world_size in [2, 3, 5] {
        let results = run_ranks(world_size, sleepy, |comm| {
            for call in 0..2000 {
                let algorithm = algorithms[call % algorithms.len()];
                let mut data = [1_f32; 20];
                comm.all_reduce_with(algorithm, &mut data)?;
                assert_eq!(data, [comm.world_size() as f32; 20]);
            }
            Ok(())
        });
        assert!(results.unwrap().iter().all(Result::is_ok));
    }
    assert!(start.elapsed() < Duration::from_secs(50));
}
