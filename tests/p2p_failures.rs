//! A rank that does not come, comes late, calls something else, panics, leaves or aborts ends the
//! collectives of all others with an error that names it, the same on every rank, within the
//! deadline and with no output written; after a rebuild the group gives the bits of a fresh one.
#![cfg(feature = "cuda")]

mod p2p_support;

use std::time::{Duration, Instant};

use half::bf16;
use p2p_support::calls::{Buffers, Case, Kind, Wiring, call_all, check_all, every_kind, run_all};
use p2p_support::random::Random;
use p2p_support::{Rank, SHORT, Team, faulty, impatient, options};
use ringtp::DType;
use ringtp::backend::cuda::Event;
use ringtp::comm::CommError;
use ringtp::comm::p2p::{ALL, OneShot, P2pOptions, TwoShot};
use ringtp::dtype::Element;
use test_driver::in_a_child;

test_driver::also_on_a_real_driver!();

/// Longer than any test: what ends before it was not ended by it.
fn patient() -> P2pOptions {
    P2pOptions {
        deadline: Duration::from_secs(3600),
        ..options()
    }
}

fn place<T: Element>(team: &Team, cases: &[Case<T>]) -> Vec<Vec<Buffers>> {
    let each = |rank| cases.iter().map(|case| case.place(rank)).collect();
    team.ranks.iter().map(each).collect()
}

/// The rank that an error blames, and why.
#[track_caller]
fn blamed(error: &CommError) -> (usize, &str) {
    match error {
        CommError::RankFailed { rank, cause } => (*rank, cause),
        other => panic!("{other}, expected a rank that failed"),
    }
}

/// That the group is as good as new: a rebuild, and calls of all kinds.
fn is_rebuilt(team: &mut Team, seed: u64) {
    team.rebuild();
    let wiring = Wiring::of(&team.group);
    let cases = every_kind::<f32>(&mut Random::new(seed), &wiring, &[17, 13456]);
    run_all(team, &cases, &format!("seed {seed}, rebuilt"));
}

#[test]
fn a_rank_that_does_not_call_is_named_by_all_and_the_rebuilt_group_has_the_bits_of_a_fresh_one() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, impatient());
    let wiring = Wiring::of(&team.group);
    let kinds = every_kind::<f32>(&mut Random::new(1), &wiring, &[8192]);
    for (turn, case) in kinds.iter().enumerate() {
        let missing = turn % 3;
        let mut buffers = place(&team, std::slice::from_ref(case));
        for rank in &mut team.ranks {
            let me = rank.comm.rank();
            if me != missing {
                case.call(rank, &mut buffers[me][0]).expect("a call");
            }
        }
        let error = team.failure();
        let (rank, cause) = blamed(&error);
        assert_eq!(rank, missing, "{:?}: {error}", case.kind);
        assert!(
            cause.contains("did not call the collective in time"),
            "{error}"
        );
        for rank in &team.ranks {
            case.check_untouched(rank, &buffers[rank.comm.rank()][0]);
        }

        // For every later call too, at once.
        for rank in &mut team.ranks {
            let me = rank.comm.rank();
            let again = case.call(rank, &mut buffers[me][0]);
            let again = again.expect_err("the group has failed").to_string();
            assert_eq!(again, error.to_string());
        }
        assert_eq!(team.failure(), error);

        team.rebuild();
        call_all(&mut team, std::slice::from_ref(case), &mut buffers);
        team.synchronize();
        check_all(&team, std::slice::from_ref(case), &buffers, "rebuilt");
    }
    is_rebuilt(&mut team, 2);
}

#[test]
fn of_eight_ranks_too_the_missing_one_is_named() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(8, impatient());
    let wiring = Wiring::of(&team.group);
    for (turn, &algorithm) in ALL.iter().enumerate() {
        let missing = [5, 0, 7][turn];
        let kind = Kind::AllReduce(algorithm);
        let case = Case::<f32>::new(&mut Random::new(3), &wiring, kind, 500, true);
        let mut buffers = place(&team, std::slice::from_ref(&case));
        for rank in &mut team.ranks {
            let me = rank.comm.rank();
            if me != missing {
                case.call(rank, &mut buffers[me][0]).expect("a call");
            }
        }
        let error = team.failure();
        assert_eq!(blamed(&error).0, missing, "{}: {error}", algorithm.name());
        team.rebuild();
    }
}

#[test]
fn many_calls_in_a_row_cost_one_deadline_and_not_one_each() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(2, impatient());
    let wiring = Wiring::of(&team.group);
    let cases = every_kind::<f32>(&mut Random::new(5), &wiring, &[17, 2000]);
    let mut buffers = place(&team, &cases);
    let rank = &mut team.ranks[0];
    let stream = rank.comm.stream().clone();
    let events = [0, 1].map(|_| Event::timed(stream.context()).expect("an event"));
    events[0].record(&stream).expect("a record");
    for (case, buffers) in cases.iter().zip(&mut buffers[0]) {
        case.call(rank, buffers).expect("a call");
    }
    events[1].record(&stream).expect("a record");
    assert_eq!(blamed(&team.failure()).0, 1);
    let took = events[1].elapsed_since(&events[0]).expect("a time");
    assert!(took >= SHORT, "{took:?}");
    assert!(took < SHORT * 3 / 2, "{} calls: {took:?}", cases.len());
}

/// The others have given up when its kernel begins.
#[test]
fn a_rank_that_comes_after_the_deadline_is_named_and_no_link_is_blamed() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, impatient());
    let wiring = Wiring::of(&team.group);
    for (turn, &algorithm) in ALL.iter().enumerate() {
        let kind = Kind::AllReduce(algorithm);
        let case = Case::<f32>::new(&mut Random::new(7), &wiring, kind, 500, false);
        let mut buffers = place(&team, std::slice::from_ref(&case));
        for step in 1..3 {
            let me = (turn + step) % 3;
            case.call(&mut team.ranks[me], &mut buffers[me][0])
                .expect("a call");
        }
        for step in 1..3 {
            let stream = team.ranks[(turn + step) % 3].comm.stream();
            let idle = stream.wait_until_idle(Duration::from_secs(60));
            assert!(idle.expect("a wait"), "it gave up");
        }
        case.call(&mut team.ranks[turn], &mut buffers[turn][0])
            .expect("nobody has told it");
        let error = team.failure();
        let (rank, cause) = blamed(&error);
        assert_eq!(rank, turn, "{}: {error}", algorithm.name());
        assert!(cause.contains("came too late"), "{error}");
        team.rebuild();
    }
    is_rebuilt(&mut team, 8);
}

#[test]
fn a_rank_whose_device_is_busy_beyond_the_deadline_is_named() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, impatient());
    let wiring = Wiring::of(&team.group);
    let kernels = faulty::load(&team.ranks[1]);
    let kind = Kind::AllReduce(&TwoShot);
    let case = Case::<f32>::new(&mut Random::new(9), &wiring, kind, 500, true);
    let mut buffers = place(&team, std::slice::from_ref(&case));
    faulty::launch(&team.ranks[1], &kernels, "stay", 100 * SHORT);
    call_all(&mut team, std::slice::from_ref(&case), &mut buffers);
    let error = team.failure();
    assert_eq!(blamed(&error).0, 1, "{error}");
    is_rebuilt(&mut team, 10);
}

#[test]
fn ranks_that_make_different_calls_find_out_and_both_calls_are_named() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, patient());
    let wiring = Wiring::of(&team.group);
    let mut random = Random::new(11);
    let mut case = |kind, elements| Case::<f32>::new(&mut random, &wiring, kind, elements, false);
    let columns = |widths: &[usize]| Kind::Columns(2, widths.to_vec());
    let pairs = [
        (
            case(Kind::AllReduce(&OneShot), 40),
            case(Kind::AllReduce(&TwoShot), 40),
        ),
        (
            case(Kind::AllReduce(&OneShot), 40),
            case(Kind::AllReduce(&OneShot), 41),
        ),
        (
            case(Kind::AllReduce(&OneShot), 40),
            case(Kind::AllReduce(&OneShot), 9000),
        ),
        (
            case(Kind::AllReduce(ALL[2]), 40),
            case(Kind::AllReduce(&TwoShot), 40),
        ),
        (case(Kind::AllGather, 40), case(Kind::ReduceScatter, 40)),
        (case(Kind::Broadcast(0), 40), case(Kind::Broadcast(1), 40)),
        (case(Kind::Barrier, 0), case(Kind::AllReduce(&OneShot), 40)),
        (case(columns(&[4, 5, 6]), 0), case(columns(&[4, 6, 5]), 0)),
    ];
    for (turn, (most, odd)) in pairs.iter().enumerate() {
        let other = turn % 3;
        let mut buffers = place(&team, &[most.clone(), odd.clone()]);
        for rank in &mut team.ranks {
            let me = rank.comm.rank();
            let which = usize::from(me == other);
            let called = [most, odd][which].call(rank, &mut buffers[me][which]);
            called.expect("a call");
        }
        match team.failure() {
            CommError::Mismatch {
                rank,
                peer,
                expected,
                found,
                ..
            } => {
                assert!(rank == other || peer == other, "{rank}, {peer}: {other}");
                assert!(!expected.is_empty() && !found.is_empty());
                assert!(!expected.contains("nothing") && !found.contains("nothing"));
            }
            error => panic!("{:?} and {:?}: {error}", most.kind, odd.kind),
        }
        team.rebuild();
    }
    // Another type of as many bytes.
    let kind = || Kind::AllReduce(&OneShot);
    let f32 = Case::<f32>::new(&mut Random::new(1), &wiring, kind(), 40, true);
    let bf16 = Case::<bf16>::new(&mut Random::new(1), &wiring, kind(), 80, true);
    let mut wide = place(&team, std::slice::from_ref(&f32));
    let mut narrow = place(&team, std::slice::from_ref(&bf16));
    f32.call(&mut team.ranks[0], &mut wide[0][0])
        .expect("a call");
    f32.call(&mut team.ranks[1], &mut wide[1][0])
        .expect("a call");
    bf16.call(&mut team.ranks[2], &mut narrow[2][0])
        .expect("a call");
    let error = team.failure().to_string();
    assert!(error.contains("of 160 bytes of f32"), "{error}");
    assert!(error.contains("of 160 bytes of bf16"), "{error}");
    is_rebuilt(&mut team, 12);
}

#[test]
fn a_rank_that_leaves_ends_the_wait_for_it_at_once_and_what_it_called_before_is_done() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, patient());
    let wiring = Wiring::of(&team.group);
    let cases = every_kind::<f32>(&mut Random::new(13), &wiring, &[40, 13456]);
    let last = Case::<f32>::new(&mut Random::new(14), &wiring, Kind::AllGather, 50, false);
    let mut buffers = place(&team, &cases);
    let mut of_last = place(&team, std::slice::from_ref(&last));
    call_all(&mut team, &cases, &mut buffers);
    let left = team.ranks.remove(1);
    drop(left.comm);
    for rank in &mut team.ranks {
        let buffers = &mut of_last[rank.comm.rank()][0];
        last.call(rank, buffers).expect("a call");
    }
    let error = team.failure();
    let (rank, cause) = blamed(&error);
    assert_eq!(rank, 1, "{error}");
    assert!(cause.contains("left the group"), "{error}");
    for rank in &team.ranks {
        for (case, buffers) in cases.iter().zip(&buffers[rank.comm.rank()]) {
            case.check(rank, buffers, "called before it left");
        }
    }

    // Somebody takes its place.
    let comm = team.group.rejoin(1).expect("a handle");
    team.ranks.insert(1, Rank::new(comm));
    is_rebuilt(&mut team, 15);
}

#[test]
fn a_rank_that_aborts_or_panics_ends_the_wait_for_it_at_once_with_its_words() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, patient());
    let wiring = Wiring::of(&team.group);
    let kind = Kind::AllReduce(&TwoShot);
    let case = Case::<f32>::new(&mut Random::new(17), &wiring, kind, 500, true);
    for panics in [false, true] {
        let mut buffers = place(&team, std::slice::from_ref(&case));
        for me in [0, 1] {
            case.call(&mut team.ranks[me], &mut buffers[me][0])
                .expect("a call");
        }
        if panics {
            let rank = team.ranks.pop().expect("rank 2");
            let thread = std::thread::spawn(move || {
                let _rank = rank;
                std::panic::resume_unwind(Box::new("the dog ate it"));
            });
            assert!(thread.join().is_err(), "it panicked");
        } else {
            team.ranks[2].comm.abort("the dog ate it");
        }
        let error = team.failure();
        let words = if panics {
            "it panicked"
        } else {
            "the dog ate it"
        };
        assert_eq!(blamed(&error), (2, words), "{error}");
        if panics {
            let comm = team.group.rejoin(2).expect("a handle");
            team.ranks.push(Rank::new(comm));
        }
        is_rebuilt(&mut team, 18);
    }
}

#[test]
fn failure_after_failure_is_survived() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(4, impatient());
    let wiring = Wiring::of(&team.group);
    let case = Case::<f32>::new(
        &mut Random::new(19),
        &wiring,
        Kind::ReduceScatter,
        900,
        false,
    );
    let mut buffers = place(&team, std::slice::from_ref(&case));
    for missing in [3, 0, 0, 2, 1] {
        for me in (0..4).filter(|&me| me != missing) {
            case.call(&mut team.ranks[me], &mut buffers[me][0])
                .expect("a call");
        }
        assert_eq!(blamed(&team.failure()).0, missing);
        team.rebuild();
        call_all(&mut team, std::slice::from_ref(&case), &mut buffers);
        team.synchronize();
        check_all(&team, std::slice::from_ref(&case), &buffers, "rebuilt");
    }
}

#[test]
fn a_rebuild_names_the_rank_that_does_not_come_and_can_be_done_again() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let drain = Duration::from_secs(2);
    let mut team = Team::of(
        3,
        P2pOptions {
            drain,
            ..impatient()
        },
    );
    team.ranks[0].comm.abort("a rehearsal");
    let third = team.ranks.pop().expect("rank 2");
    let begin = Instant::now();
    for result in team.try_rebuild() {
        match result.expect_err("rank 2 is missing") {
            ringtp::Error::Comm(CommError::RankFailed { rank, cause }) => {
                assert_eq!(rank, 2, "{cause}");
            }
            other => panic!("{other}"),
        }
    }
    assert!(begin.elapsed() < 10 * drain);
    team.ranks.push(third);
    is_rebuilt(&mut team, 20);
}

#[test]
fn another_group_on_the_same_devices_goes_on() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(2, impatient());
    let mut other = Team::of(2, options());
    let wiring = Wiring::of(&team.group);
    let kind = Kind::AllReduce(&OneShot);
    let case = Case::<f32>::new(&mut Random::new(21), &wiring, kind, 500, true);
    let mut buffers = place(&team, std::slice::from_ref(&case));
    let cases = every_kind::<f32>(&mut Random::new(22), &wiring, &[17, 13456]);
    let mut others = place(&other, &cases);
    case.call(&mut team.ranks[0], &mut buffers[0][0])
        .expect("a call");
    call_all(&mut other, &cases, &mut others);
    assert_eq!(blamed(&team.failure()).0, 1);
    other.synchronize();
    check_all(&other, &cases, &others, "the other group");
}

/// The context of the device is lost, and with it the group: in a process of its own.
#[test]
fn a_kernel_that_traps_poisons_the_group_on_every_rank_for_good() {
    let this = "a_kernel_that_traps_poisons_the_group_on_every_rank_for_good";
    in_a_child(this, || {
        let Some(driver) = test_driver::take() else {
            return;
        };
        let mut team = Team::of(3, patient());
        let wiring = Wiring::of(&team.group);
        let kernels = faulty::load(&team.ranks[1]);
        let kind = Kind::AllReduce(&TwoShot);
        let case = Case::<f32>::new(&mut Random::new(23), &wiring, kind, 500, true);
        let mut buffers = place(&team, std::slice::from_ref(&case));
        faulty::launch(&team.ranks[1], &kernels, "fault", Duration::ZERO);
        for rank in &mut team.ranks {
            let me = rank.comm.rank();
            // The rank that has failed may notice already.
            let called = case.call(rank, &mut buffers[me][0]);
            assert!(called.is_ok() || me >= 1, "{called:?}");
        }
        // The rank itself notices first: the deadline is an hour.
        let noticed = team.ranks[1]
            .comm
            .synchronize()
            .expect_err("it has trapped");
        let error = team.failure();
        assert_eq!(noticed.to_string(), error.to_string());
        assert!(
            matches!(error, CommError::Poisoned { rank: 1, .. }),
            "{error}"
        );
        for result in team.try_rebuild() {
            assert_eq!(result.expect_err("for good").to_string(), error.to_string());
        }
        let findings = driver.findings();
        assert_eq!(
            findings.len(),
            usize::from(test_driver::is_virtual()),
            "{findings:?}"
        );
        // Nothing can be freed in a context that is lost.
        std::mem::forget((team, buffers));
    });
}

#[test]
fn the_words_of_an_error_name_the_call_the_block_and_the_wait() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(2, impatient());
    let mut data = team.ranks[0].message(&[1.0_f32; 8], 0);
    let comm = &mut team.ranks[0].comm;
    comm.all_reduce_with(&OneShot, DType::F32, &mut data.view_mut())
        .expect("a call");
    let error = team.failure().to_string();
    for words in [
        "rank 1 failed",
        "rank 0 waited 2",
        "for rank 1 at the barrier in all_reduce (block 0, epoch 1, seen 0)",
    ] {
        assert!(error.contains(words), "{error}");
    }
}
