//! Every collective on devices gives what the same call gives on the CPU's ranks, to the bit: sums in
//! rank order, or by the hops of the ring where there is no mesh; moved bits as they were.
#![cfg(feature = "cuda")]

mod p2p_support;

use half::{bf16, f16};
use p2p_support::calls::{Case, Kind, Wiring, every_kind, run_all};
use p2p_support::random::Random;
use p2p_support::{Team, as_for_large_messages, options};
use ringtp::comm::p2p::P2pOptions;
use ringtp::dtype::Element;
use test_driver::in_a_child_with;

test_driver::also_on_a_real_driver!();

/// Bytes around the boundaries of packs, blocks and passes, and none.
const BYTES: [usize; 6] = [0, 1, 17, 1040, 13456, 40330];

fn on_devices<T: Element>(devices: &[usize], bytes: &[usize], seed: u64) {
    let mut team = Team::new(devices, options());
    let wiring = Wiring::of(&team.group);
    let cases = every_kind::<T>(&mut Random::new(seed), &wiring, bytes);
    run_all(
        &mut team,
        &cases,
        &format!("seed {seed}, devices {devices:?}"),
    );
}

/// On so many ranks; in one run on all numbers of them if `RINGTP_P2P_RANKS=all` is set.
fn on_ranks<T: Element>(mut ranks: Vec<usize>) {
    if std::env::var("RINGTP_P2P_RANKS").is_ok_and(|words| words == "all") {
        ranks = (1..=8).collect();
    }
    let Some(_driver) = test_driver::take() else {
        return;
    };
    for n in ranks {
        let devices: Vec<usize> = (0..n).collect();
        on_devices::<T>(&devices, &BYTES, n as u64);
    }
}

#[test]
fn every_collective_of_f32_has_the_bits_of_the_cpu_ranks_on_1_to_8_ranks() {
    on_ranks::<f32>((1..=8).collect());
}

#[test]
fn every_collective_of_bf16_has_the_bits_of_the_cpu_ranks_on_2_and_5_ranks() {
    on_ranks::<bf16>(vec![2, 5]);
}

#[test]
fn every_collective_of_f16_has_the_bits_of_the_cpu_ranks_on_3_and_6_ranks() {
    on_ranks::<f16>(vec![3, 6]);
}

/// Of large messages each rank reads a part from the root and the rest from the others.
#[test]
fn a_broadcast_in_parts_has_the_bits_of_any_root_on_2_to_8_ranks() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    for n in 2..=8 {
        let mut team = Team::of(n, as_for_large_messages());
        let wiring = Wiring::of(&team.group);
        let mut random = Random::new(n as u64);
        let cases: Vec<_> = [0, 1, 17, 1040, 13456, 40330]
            .map(|bytes| {
                let kind = Kind::Broadcast(random.below(n));
                Case::<bf16>::new(&mut random, &wiring, kind, bytes / 2, true)
            })
            .into();
        run_all(&mut team, &cases, &format!("{n} ranks"));
    }
}

#[test]
fn ranks_may_share_devices_in_every_collective() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    for devices in [vec![0; 4], vec![0, 0, 1], vec![2, 1, 2, 1]] {
        on_devices::<f32>(&devices, &[17, 13456], 13);
    }
}

/// Two ranks to five, joined in rings that are not in the order of the ranks, in processes of their
/// own: the machine is another.
#[test]
fn without_a_mesh_every_collective_goes_round_the_ring_with_the_bits_of_its_hops() {
    const THIS: &str =
        "without_a_mesh_every_collective_goes_round_the_ring_with_the_bits_of_its_hops";
    // A ring of four ranks whose order is not theirs, one of five, one over eight.
    for (ring, name) in [
        (vec![0, 2, 1, 3], "links:0-2,2-1,1-3,3-0"),
        (vec![0, 2, 4, 1, 3], "links:0-2,2-4,4-1,1-3,3-0"),
        (
            vec![0, 1, 2, 3, 7, 6, 5, 4],
            "links:0-1,1-2,2-3,3-7,7-6,6-5,5-4,4-0",
        ),
    ] {
        in_a_child_with(THIS, &[("VGPU_TOPOLOGY", name)], || {
            let Some(_driver) = test_driver::take() else {
                return;
            };
            let mut team = Team::of(ring.len(), options());
            assert_eq!(team.group.ring(), Some(ring.as_slice()));
            let wiring = Wiring::of(&team.group);
            assert!(!wiring.is_mesh);
            let mut random = Random::new(5);
            let cases = every_kind::<f32>(&mut random, &wiring, &BYTES);
            run_all(&mut team, &cases, name);
            let cases = every_kind::<bf16>(&mut random, &wiring, &[17, 26896]);
            run_all(&mut team, &cases, name);
        });
    }
}

/// Messages of mixed kinds and sizes, each of which turns the staging buffers over as often as it
/// likes, without the host ever waiting in between.
#[test]
fn hundreds_of_mixed_calls_back_to_back_keep_their_staging_buffers_apart() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(3, as_for_large_messages());
    let wiring = Wiring::of(&team.group);
    let mut random = Random::new(17);
    for round in 0..3 {
        let bytes: Vec<usize> = (0..6)
            .map(|_| match random.below(3) {
                0 => random.below(64),
                1 => random.below(2000),
                _ => random.below(30_000),
            })
            .collect();
        let cases = every_kind::<f32>(&mut random, &wiring, &bytes);
        run_all(
            &mut team,
            &cases,
            &format!("round {round}, sizes {bytes:?}"),
        );
    }
}

#[test]
fn epochs_wrap_in_every_collective() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut random = Random::new(23);
    for before in [2, 4, 20, 60] {
        // A new one: epochs never go back.
        let mut team = Team::of(3, as_for_large_messages());
        let wiring = Wiring::of(&team.group);
        team.group.set_epoch((1 << 40) - before).expect("an epoch");
        let cases = every_kind::<f32>(&mut random, &wiring, &[16, 26896]);
        run_all(
            &mut team,
            &cases,
            &format!("{before} epochs before the wrap"),
        );
    }
}

/// What small messages leave behind is the flags of the blocks that they do not use; the epochs of
/// those that do wrap round to them.
#[test]
fn a_flag_left_behind_by_small_messages_is_not_taken_for_a_new_one() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    const WINDOW: u64 = 1 << 20;
    let mut team = Team::of(3, options());
    let wiring = Wiring::of(&team.group);
    let mut random = Random::new(29);
    let kinds = every_kind::<f32>(&mut random, &wiring, &[13440]);
    // As many epochs later as there are, less those that a flag may be ahead.
    for later in [WINDOW, WINDOW + 2, 1 << 39, (1 << 40) - WINDOW - 200] {
        for large in &kinds {
            team.group.set_epoch(0).expect("an epoch");
            run_all(&mut team, std::slice::from_ref(large), "before");
            team.group.set_epoch(later).expect("an epoch");
            let context = format!("{later} epochs later");
            run_all(&mut team, std::slice::from_ref(large), &context);
        }
    }
}

#[test]
fn arguments_that_cannot_be_are_refused_and_harm_nothing() {
    let Some(_driver) = test_driver::take() else {
        return;
    };
    let mut team = Team::of(2, P2pOptions { ..options() });
    for rank in &mut team.ranks {
        let (mut three, four) = (
            rank.message(&[1.0_f32; 3], 0),
            rank.message(&[1.0_f32; 4], 0),
        );
        let mut odd = rank.message(&[1.0_f32; 4], 2);
        let comm = &mut rank.comm;
        let f32 = ringtp::DType::F32;
        let refused = [
            (
                comm.reduce_scatter(f32, four.view(), &mut three.view_mut()),
                "out has length 12, expected 8",
            ),
            (
                comm.all_gather(f32, four.view(), &mut three.view_mut()),
                "out has length 12, expected 32",
            ),
            (
                comm.all_gather_columns(f32, 1, &[3, 4, 5], four.view(), &mut three.view_mut()),
                "widths has length 3, expected 2",
            ),
            (
                comm.broadcast(f32, &mut odd.view_mut(), 0),
                "no multiple of the 4 bytes of a f32",
            ),
            (
                comm.broadcast(f32, &mut three.view_mut(), 2),
                "root is rank 2 of 2",
            ),
            (
                comm.broadcast(f32, &mut three.view_mut().range(0..10).expect("a part"), 0),
                "which are no whole elements of f32",
            ),
        ];
        for (result, words) in refused {
            let error = result.expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
        }
    }
    let wiring = Wiring::of(&team.group);
    let kind = Kind::Broadcast(1);
    let case = Case::<f32>::new(&mut Random::new(1), &wiring, kind, 5, true);
    run_all(&mut team, &[case], "after refusals");
}
