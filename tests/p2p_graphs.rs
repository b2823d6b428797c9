//! Collectives recorded in CUDA graphs are right at every replay: with inputs that change, mixed with
//! calls that are not recorded, with staging buffers and epochs that go on, and after a rebuild.
#![cfg(feature = "cuda")]

mod p2p_support;

use p2p_support::calls::{Buffers, Case, Kind, Wiring, call_all, check_all, every_kind, run_all};
use p2p_support::random::Random;
use p2p_support::{Team, as_for_large_messages, impatient, options};
use ringtp::backend::cuda::Graph;
use ringtp::comm::CommError;
use ringtp::comm::p2p::{OneShot, TwoShot};
use ringtp::dtype::Element;

test_driver::also_on_a_real_driver!();

/// The same calls of every rank, recorded and ready.
fn record<T: Element>(
    team: &mut Team,
    cases: &[Case<T>],
    buffers: &mut [Vec<Buffers>],
) -> Vec<Graph> {
    let each = team.ranks.iter_mut().zip(buffers);
    each.map(|(rank, buffers)| {
        let stream = rank.comm.stream().clone();
        let graph = stream.capture(|| {
            let mut each = cases.iter().zip(buffers);
            each.try_for_each(|(case, buffers)| case.call(rank, buffers))
        });
        let graph = graph.expect("a graph");
        graph.upload(&stream).expect("an upload");
        graph
    })
    .collect()
}

fn replay(team: &Team, graphs: &[Graph]) {
    for (rank, graph) in team.ranks.iter().zip(graphs) {
        // SAFETY: the buffers and the group live until the ranks have been waited for.
        unsafe { graph.launch(rank.comm.stream()) }.expect("a replay");
    }
}

/// Puts other values into the buffers of recorded calls; what they must give then.
fn other_values<T: Element>(
    team: &Team,
    cases: &[Case<T>],
    buffers: &mut [Vec<Buffers>],
    random: &mut Random,
) -> Vec<Case<T>> {
    let wiring = Wiring::of(&team.group);
    let cases: Vec<_> = cases
        .iter()
        .map(|case| case.again(random, &wiring))
        .collect();
    for (rank, buffers) in team.ranks.iter().zip(buffers) {
        for (case, buffers) in cases.iter().zip(buffers) {
            case.write(rank, buffers);
        }
    }
    cases
}

fn place<T: Element>(team: &Team, cases: &[Case<T>]) -> Vec<Vec<Buffers>> {
    let each = |rank| cases.iter().map(|case| case.place(rank)).collect();
    team.ranks.iter().map(each).collect()
}

#[test]
fn every_collective_is_right_at_every_replay_also_between_other_calls_and_after_a_rebuild() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, as_for_large_messages());
    let wiring = Wiring::of(&team.group);
    let mut random = Random::new(1);
    let recorded = every_kind::<f32>(&mut random, &wiring, &[17, 13456]);
    let mut buffers = place(&team, &recorded);
    let graphs = record(&mut team, &recorded, &mut buffers);
    for turn in 0..6 {
        let now = other_values(&team, &recorded, &mut buffers, &mut random);
        let beside = every_kind::<f32>(&mut random, &wiring, &[1040]);
        let mut others = place(&team, &beside);
        // Before, between and behind calls that are not recorded.
        if turn % 3 != 0 {
            call_all(&mut team, &beside, &mut others);
        }
        replay(&team, &graphs);
        if turn % 3 != 1 {
            call_all(&mut team, &beside, &mut others);
        }
        team.synchronize();
        let context = format!("turn {turn}");
        check_all(&team, &now, &buffers, &context);
        if turn == 3 {
            team.ranks[1].comm.abort("a rehearsal");
            team.rebuild();
        }
    }
}

/// A step of a model: what one call gives is the next one's input.
#[test]
fn a_graph_replayed_twenty_times_without_a_wait_goes_on_from_its_own_results() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let n = 3;
    let mut team = Team::of(n, options());
    let mut data: Vec<_> = team
        .ranks
        .iter()
        .map(|rank| rank.message(&[0.5_f32; 700], 0))
        .collect();
    let graphs: Vec<Graph> = team
        .ranks
        .iter_mut()
        .zip(&mut data)
        .map(|(rank, data)| {
            let stream = rank.comm.stream().clone();
            let graph = stream.capture(|| {
                let view = &mut data.view_mut();
                rank.comm.all_reduce_with(&OneShot, f32::DTYPE, view)?;
                rank.comm.all_reduce_with(&TwoShot, f32::DTYPE, view)
            });
            graph.expect("a graph")
        })
        .collect();
    for (rank, graph) in team.ranks.iter().zip(&graphs) {
        graph.upload(rank.comm.stream()).expect("an upload");
    }
    for _ in 0..20 {
        replay(&team, &graphs);
    }
    team.synchronize();
    let expected = 0.5 * (n as f32).powi(40);
    for (rank, data) in team.ranks.iter().zip(&data) {
        assert_eq!(rank.values::<f32>(data), vec![expected; 700]);
    }
}

#[test]
fn a_rank_that_does_not_replay_is_named_and_the_graphs_are_right_after_the_rebuild() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, impatient());
    let wiring = Wiring::of(&team.group);
    let mut random = Random::new(2);
    let recorded = every_kind::<f32>(&mut random, &wiring, &[2000]);
    let mut buffers = place(&team, &recorded);
    let graphs = record(&mut team, &recorded, &mut buffers);
    for missing in 0..3 {
        for (rank, graph) in team.ranks.iter().zip(&graphs) {
            if rank.comm.rank() != missing {
                // SAFETY: the buffers and the group live until the ranks have been waited for.
                unsafe { graph.launch(rank.comm.stream()) }.expect("a replay");
            }
        }
        match team.failure() {
            CommError::RankFailed { rank, cause } => {
                assert_eq!(rank, missing, "{cause}");
                assert!(
                    cause.contains("did not call the collective in time"),
                    "{cause}"
                );
            }
            other => panic!("{other}"),
        }
        team.rebuild();
        let now = other_values(&team, &recorded, &mut buffers, &mut random);
        replay(&team, &graphs);
        team.synchronize();
        check_all(&team, &now, &buffers, "rebuilt");
    }
}

/// A rank that only records cannot be asked how far it is: it is named, and the group goes on.
#[test]
fn a_rank_that_records_while_the_others_wait_is_named_and_nothing_is_poisoned() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(2, impatient());
    let wiring = Wiring::of(&team.group);
    let kind = Kind::AllReduce(&OneShot);
    let case = Case::<f32>::new(&mut Random::new(3), &wiring, kind, 40, true);
    let mut buffers = place(&team, std::slice::from_ref(&case));
    let (first, second) = team.ranks.split_at_mut(1);
    let stream = second[0].comm.stream().clone();
    let recorded = stream.capture(|| {
        case.call(&mut second[0], &mut buffers[1][0])?;
        case.call(&mut first[0], &mut buffers[0][0])?;
        // On a thread of its own: one that records may not ask about any stream.
        let waited = std::thread::scope(|scope| {
            let wait = || first[0].comm.synchronize();
            scope.spawn(wait).join().expect("no panic")
        });
        let error = waited.expect_err("it is alone");
        assert!(error.to_string().contains("rank 1 failed"), "{error}");
        Ok(())
    });
    // Being asked ends a recording, as the driver's manual says.
    drop(recorded);
    team.rebuild();
    run_all(&mut team, &[case], "rebuilt");
}
