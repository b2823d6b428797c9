//! What the links between the devices are is found out before anything runs over them, and what they
//! do not carry is refused or done another way; links and devices that fail later are named. Every
//! machine is a process of its own, as `VGPU_TOPOLOGY` describes it.
#![cfg(feature = "cuda")]

mod p2p_support;

use std::time::Duration;

use p2p_support::calls::{Buffers, Case, Kind, Wiring, every_kind, run_all};
use p2p_support::random::Random;
use p2p_support::{Team, impatient, options};
use ringtp::DType;
use ringtp::comm::p2p::{ALL, OneShot, P2pGroup, P2pOptions, Ring, TwoShot};
use ringtp::comm::{CommError, Link};
use test_driver::in_a_child_with;

/// Runs `body` where the machine is this one; not on a real driver, whose machine is what it is.
fn on_machine(this: &str, topology: &str, body: impl FnOnce(&test_driver::Taken)) {
    in_a_child_with(this, &[("VGPU_TOPOLOGY", topology)], || {
        if let Some(driver) = test_driver::take() {
            body(&driver);
        }
    });
}

fn probing() -> P2pOptions {
    P2pOptions {
        probe: Some(Duration::from_secs(2)),
        ..options()
    }
}

/// Calls of every kind on a team give what they must.
fn all_kinds_are_right(team: &mut Team) {
    let wiring = Wiring::of(&team.group);
    let cases = every_kind::<f32>(&mut Random::new(3), &wiring, &[17, 13456]);
    run_all(team, &cases, "all kinds");
}

#[test]
fn on_a_sound_machine_the_probe_finds_every_directed_pair_right() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    for devices in [vec![0, 1, 2, 3, 4, 5, 6, 7], vec![0, 0, 1]] {
        let mut team = Team::new(&devices, probing());
        for from in 0..devices.len() {
            for to in 0..devices.len() {
                let expected = if devices[from] == devices[to] {
                    Link::SameDevice
                } else {
                    Link::Nvlink
                };
                assert_eq!(
                    *team.group.links().get(from, to),
                    expected,
                    "{from} to {to}"
                );
            }
        }
        all_kinds_are_right(&mut team);
    }
}

#[test]
fn a_link_that_loses_writes_is_found_by_the_probe_named_and_left_out_of_the_ring() {
    let this = "a_link_that_loses_writes_is_found_by_the_probe_named_and_left_out_of_the_ring";
    on_machine(this, "lossy:1>2", |_| {
        let mut team = Team::of(4, probing());
        let links = team.group.links();
        for (from, to) in (0..4).flat_map(|from| (0..4).map(move |to| (from, to))) {
            let link = links.get(from, to);
            assert_eq!(
                link.is_good(),
                (from, to) != (1, 2),
                "{from} to {to}: {link}"
            );
        }
        let broken = links.get(1, 2).to_string();
        assert!(broken.contains("writes did not arrive in time"), "{broken}");
        assert_eq!(links.gaps().collect::<Vec<_>>(), [(1, 2)]);
        assert_eq!(team.group.ring(), Some([0, 1, 3, 2].as_slice()));

        // What needs the link says so; what does not works.
        let mut data = team.ranks[0].message(&[1.0_f32; 8], 0);
        for algorithm in [
            &OneShot as &dyn ringtp::comm::p2p::DeviceAllReduce,
            &TwoShot,
        ] {
            let view = &mut data.view_mut();
            let refused = team.ranks[0]
                .comm
                .all_reduce_with(algorithm, DType::F32, view);
            let error = refused.expect_err("it needs a mesh").to_string();
            assert!(error.contains(algorithm.name()), "{error}");
            assert!(
                error.contains("ranks 1 and 2 cannot reach each other"),
                "{error}"
            );
            assert!(error.contains("writes did not arrive in time"), "{error}");
        }
        let chosen = team.ranks[0].comm.choose(1 << 10).expect("the ring works");
        assert_eq!(chosen.name(), "ring");
        all_kinds_are_right(&mut team);
    });
}

#[test]
fn a_pair_without_access_is_a_gap_and_the_ring_goes_round_it() {
    let this = "a_pair_without_access_is_a_gap_and_the_ring_goes_round_it";
    on_machine(this, "no:0-1", |_| {
        let mut team = Team::of(4, probing());
        assert_eq!(*team.group.links().get(0, 1), Link::NoAccess);
        assert_eq!(*team.group.links().get(1, 0), Link::NoAccess);
        assert_eq!(team.group.ring(), Some([0, 2, 1, 3].as_slice()));
        all_kinds_are_right(&mut team);
    });
}

#[test]
fn where_no_ring_goes_through_all_ranks_every_collective_says_which_pair_is_missing() {
    let this = "where_no_ring_goes_through_all_ranks_every_collective_says_which_pair_is_missing";
    on_machine(this, "links:0-1,1-2", |_| {
        let mut team = Team::of(3, probing());
        assert_eq!(team.group.ring(), None);
        let rank = &mut team.ranks[0];
        let (input, mut data) = (
            rank.message(&[1.0_f32; 6], 0),
            rank.message(&[1.0_f32; 18], 0),
        );
        let comm = &mut rank.comm;
        let mut refused = Vec::new();
        for &algorithm in ALL {
            refused.push(comm.all_reduce_with(algorithm, DType::F32, &mut data.view_mut()));
        }
        refused.push(comm.all_reduce(DType::F32, &mut data.view_mut()));
        refused.push(comm.all_gather(DType::F32, input.view(), &mut data.view_mut()));
        refused.push(comm.broadcast(DType::F32, &mut data.view_mut(), 0));
        refused.push(comm.barrier());
        let mut part = data.view_mut().range(0..8).expect("a part");
        refused.push(comm.reduce_scatter(DType::F32, input.view(), &mut part));
        for result in refused {
            let error = result.expect_err("there is no way").to_string();
            assert!(
                error.contains("ranks 0 and 2 cannot reach each other"),
                "{error}"
            );
        }
    });
}

#[test]
fn a_named_all_reduce_that_the_links_do_not_carry_is_refused_with_those_that_they_do() {
    let this = "a_named_all_reduce_that_the_links_do_not_carry_is_refused_with_those_that_they_do";
    on_machine(this, "no:0-1", |_| {
        let named = |algorithm, devices: &[usize]| {
            let options = P2pOptions {
                all_reduce: Some(algorithm),
                ..options()
            };
            P2pGroup::new(devices, options)
        };
        let refused = |algorithm, devices: &[usize], parts: &[&str]| {
            let error = named(algorithm, devices).expect_err("links are missing");
            assert!(error.is_input(), "{error}");
            for part in parts {
                assert!(error.to_string().contains(part), "{part} in {error}");
            }
        };
        let gap = "ranks 0 and 1 cannot reach each other (no access)";
        let all = [0, 1, 2, 3];
        let works = "all_reduce: expected one that works over these links: ring";
        refused(&TwoShot, &all, &[works, "\"two-shot\"", gap]);
        // No ring goes through these three.
        refused(
            &Ring,
            &all[..3],
            &["some algorithm", "a ring of links", gap],
        );
        // What it does not need is not missed.
        let (_group, comms) = named(&Ring, &all).expect("a ring");
        assert_eq!(comms[0].choose(4).expect("it is named").name(), "ring");
        named(&OneShot, &all[1..]).expect("a mesh");
    });
}

#[test]
fn over_the_bus_every_collective_is_right() {
    on_machine("over_the_bus_every_collective_is_right", "pcie", |_| {
        let mut team = Team::of(3, probing());
        assert_eq!(*team.group.links().get(0, 1), Link::Pcie);
        all_kinds_are_right(&mut team);
    });
}

fn place(team: &Team, case: &Case<f32>) -> Vec<Buffers> {
    team.ranks.iter().map(|rank| case.place(rank)).collect()
}

/// One call of every rank; the error of all.
fn fails(team: &mut Team, case: &Case<f32>) -> CommError {
    let mut buffers = place(team, case);
    for (rank, buffers) in team.ranks.iter_mut().zip(&mut buffers) {
        case.call(rank, buffers).expect("a call");
    }
    let error = team.failure();
    for (rank, buffers) in team.ranks.iter().zip(&buffers) {
        drop(rank.values::<f32>(buffers.first()));
    }
    error
}

/// Without a probe the loss comes out when a flag does not arrive.
#[test]
fn a_link_that_loses_writes_without_a_probe_is_named_by_every_rank_at_the_deadline() {
    let this = "a_link_that_loses_writes_without_a_probe_is_named_by_every_rank_at_the_deadline";
    for topology in ["lossy:1>2", "lossy:2>0,0>2"] {
        on_machine(this, topology, |_| {
            let mut team = Team::of(3, impatient());
            let wiring = Wiring::of(&team.group);
            for kind in [
                Kind::AllReduce(&OneShot),
                Kind::AllReduce(ALL[2]),
                Kind::Broadcast(0),
            ] {
                let case = Case::new(&mut Random::new(5), &wiring, kind, 100, true);
                match fails(&mut team, &case) {
                    CommError::Link { from, to, problem } => {
                        let link = format!("{from}>{to}");
                        assert!(topology.contains(&link), "{topology}: {link}: {problem}");
                    }
                    other => panic!("{:?}: {other}", case.kind),
                }
                team.rebuild();
            }
        });
    }
}

/// Whatever the moment: at creation it is an error of the driver that names the device; later, every
/// rank is told who is lost, within the deadline, and that it is for good.
#[test]
fn a_device_that_dies_is_named_by_every_rank_and_the_group_is_poisoned() {
    let this = "a_device_that_dies_is_named_by_every_rank_and_the_group_is_poisoned";
    for topology in ["dies:1@40", "dies:1@400", "dies:1@3000"] {
        on_machine(this, topology, |driver| {
            is_poisoned(driver, topology, &[1]);
        });
    }
}

#[test]
fn a_link_that_dies_poisons_the_group_and_one_of_its_ends_is_named() {
    let this = "a_link_that_dies_poisons_the_group_and_one_of_its_ends_is_named";
    for topology in ["dies:1>2@1", "dies:1>2@300"] {
        on_machine(this, topology, |driver| {
            is_poisoned(driver, topology, &[1, 2]);
        });
    }
}

/// Calls until something fails; it has to be for good, and to name one of these ranks.
fn is_poisoned(driver: &test_driver::Taken, machine: &str, culprits: &[usize]) {
    let mut team = Team::of(3, options());
    let wiring = Wiring::of(&team.group);
    let kind = Kind::AllReduce(&TwoShot);
    let case = Case::<f32>::new(&mut Random::new(7), &wiring, kind, 3000, true);
    let mut buffers = place(&team, &case);
    let mut failed = false;
    for _ in 0..100 {
        for (rank, buffers) in team.ranks.iter_mut().zip(&mut buffers) {
            failed |= case.call(rank, buffers).is_err();
        }
        for rank in &mut team.ranks {
            failed |= rank.comm.synchronize().is_err();
        }
        if failed {
            break;
        }
    }
    assert!(failed, "{machine}: nothing has died");
    let error = team.failure();
    match &error {
        CommError::Poisoned { rank, cause } => {
            assert!(culprits.contains(rank), "{machine}: rank {rank}, {cause}");
            assert!(cause.contains("UNCORRECTABLE"), "{machine}: {cause}");
        }
        other => panic!("{machine}: {other}"),
    }
    for result in team.try_rebuild() {
        assert_eq!(result.expect_err("for good").to_string(), error.to_string());
    }
    // What has died is no fault of a kernel.
    assert_eq!(driver.findings(), [""; 0], "{machine}");
    // Nothing can be freed in a context that is lost.
    std::mem::forget((team, buffers));
}

#[test]
fn a_device_that_dies_in_the_probe_is_an_error_that_names_it() {
    let this = "a_device_that_dies_in_the_probe_is_an_error_that_names_it";
    on_machine(this, "dies:1@10", |_| {
        let refused = P2pGroup::new(&[0, 1, 2], probing());
        let error = refused.expect_err("device 1 is dead").to_string();
        assert!(error.contains("UNCORRECTABLE"), "{error}");
        assert!(error.contains("CUDA device 1"), "{error}");
    });
}
