//! The bytes over each link between devices, as the virtual GPU counts them, are those that the
//! formulas say and that a rank's counters declare; what flags add is as many as the barriers and
//! messages need; nobody polls across a link.
#![cfg(feature = "cuda")]

mod p2p_support;

use p2p_support::calls::{Buffers, Case, Kind, Wiring};
use p2p_support::random::Random;
use p2p_support::{Team, as_for_large_messages, options};
use ringtp::comm::p2p::{ALL, OneShot, TwoShot};
use test_driver::Taken;
use test_driver::report::Link;

const N: usize = 4;
/// Divides into whole packs for every rank, for every reader of a broadcast, and for all of both.
const UNIT: usize = 16 * N * (N - 1);

/// What went over each link, by the rank whose kernels did it and the rank whose memory it was.
fn over_links(driver: &Taken, team: &mut Team, case: &Case<f32>) -> Vec<Vec<Link>> {
    let mut buffers: Vec<Buffers> = team.ranks.iter().map(|rank| case.place(rank)).collect();
    assert!(driver.count());
    for (rank, buffers) in team.ranks.iter_mut().zip(&mut buffers) {
        case.call(rank, buffers).expect("a call");
    }
    team.synchronize();
    let report = driver.report();
    for (rank, buffers) in team.ranks.iter().zip(&buffers) {
        case.check(rank, buffers, "counted");
    }
    let find = |from: usize, to: usize| {
        let mut links = report.total.links.iter();
        let same = |link: &&Link| link.from as usize == from && link.to == Some(to as u32);
        links.find(same).copied().unwrap_or_default()
    };
    (0..N)
        .map(|from| (0..N).map(|to| find(from, to)).collect())
        .collect()
}

/// The bytes that every rank declares for a call.
fn declared(team: &Team) -> Vec<u64> {
    team.ranks
        .iter()
        .map(|rank| rank.comm.stats().bytes_sent)
        .collect()
}

/// A collective whose ranks read from each other: bytes that `from` reads from `to`, and its
/// barriers a pass.
struct Pull<'a> {
    kind: Kind,
    elements: usize,
    reads: &'a dyn Fn(usize, usize) -> usize,
    barriers: usize,
    /// Packs of the message that a pass moves, of which a block's threads take one each.
    packs: usize,
    per_pass: usize,
}

#[test]
fn collectives_that_pull_read_what_the_formulas_say_and_write_flags_alone() {
    let Some(driver) = test_driver::take() else {
        return;
    };
    if !test_driver::is_virtual() {
        test_driver::skipped("a real driver counts no bytes");
        return;
    }
    // Staging of 840 packs a pass.
    for bytes in [UNIT * 8, UNIT * 100] {
        let (elements, all) = (bytes / 4, bytes / 16);
        let columns = |rank: usize| 4 * (rank + 1);
        let rows = bytes / 64;
        let widths: Vec<usize> = (0..N).map(columns).collect();
        let cases = [
            Pull {
                kind: Kind::AllReduce(&OneShot),
                elements,
                reads: &|_, _| bytes,
                barriers: 1,
                packs: all,
                per_pass: 840,
            },
            Pull {
                kind: Kind::AllReduce(&TwoShot),
                elements,
                reads: &|_, _| 2 * bytes / N,
                barriers: 2,
                packs: all / N,
                per_pass: 840 / N,
            },
            Pull {
                kind: Kind::ReduceScatter,
                elements,
                reads: &|_, _| bytes / N,
                barriers: 1,
                packs: all / N,
                per_pass: 840 / N,
            },
            Pull {
                kind: Kind::AllGather,
                elements,
                reads: &|_, _| bytes,
                barriers: 1,
                packs: all,
                per_pass: 840,
            },
            Pull {
                kind: Kind::Columns(rows, widths),
                elements: 0,
                reads: &|_, to| rows * columns(to) * 4,
                barriers: 1,
                packs: rows * columns(N - 1) / 4,
                per_pass: 840,
            },
            Pull {
                kind: Kind::Broadcast(2),
                elements,
                reads: &|_, to| if to == 2 { bytes } else { 0 },
                barriers: 1,
                packs: all,
                per_pass: 840,
            },
            Pull {
                kind: Kind::Broadcast(2),
                elements,
                // A part from everybody, but the root reads from nobody.
                reads: &|from, _| if from == 2 { 0 } else { bytes / (N - 1) },
                barriers: 2,
                packs: all / (N - 1),
                per_pass: 840 / (N - 1),
            },
        ];
        for case in cases {
            let in_parts = matches!(case.kind, Kind::Broadcast(_)) && case.barriers == 2;
            let options = if in_parts {
                as_for_large_messages()
            } else {
                options()
            };
            let mut team = Team::of(N, options);
            let wiring = Wiring::of(&team.group);
            let kind = case.kind.clone();
            let call = Case::new(&mut Random::new(1), &wiring, kind, case.elements, false);
            let counted = over_links(&driver, &mut team, &call);
            let passes = case.packs.div_ceil(case.per_pass);
            // As the launch has them: by all of the message, but two-shot by a rank's part.
            let of_launch = match case.kind {
                Kind::AllReduce(_) | Kind::ReduceScatter | Kind::AllGather => case.packs,
                Kind::Columns(..) => case.packs,
                _ => all,
            };
            let threads = match case.kind {
                Kind::AllReduce(_) => p2p_threads(all),
                _ => p2p_threads(of_launch),
            };
            let blocks = of_launch.div_ceil(threads);
            // The first barrier of a pass tells where the input is.
            let flags = passes * blocks * (8 + 8 * case.barriers);
            for (from, to) in (0..N).flat_map(|a| (0..N).map(move |b| (a, b))) {
                let words = format!("{:?}, {bytes} bytes, rank {from} of {to}", case.kind);
                let link = counted[from][to];
                if from == to {
                    continue;
                }
                assert_eq!(link.read, (case.reads)(from, to) as u64, "{words} reads");
                assert_eq!(link.written, flags as u64, "{words} writes flags");
                assert_eq!((link.atomics, link.spun), (0, 0), "{words}");
            }
            for (to, declared) in declared(&team).into_iter().enumerate() {
                let peers = (0..N).filter(|&from| from != to);
                let read: u64 = peers.map(|from| counted[from][to].read).sum();
                assert_eq!(read, declared, "{:?}: what rank {to} declares", case.kind);
            }
        }
    }
}

/// Threads of a block for so many packs.
fn p2p_threads(packs: usize) -> usize {
    packs.next_multiple_of(32).clamp(64, 512)
}

#[test]
fn the_ring_writes_what_the_formula_says_to_its_successor_alone() {
    let Some(driver) = test_driver::take() else {
        return;
    };
    if !test_driver::is_virtual() {
        test_driver::skipped("a real driver counts no bytes");
        return;
    }
    let ring = ALL[2];
    assert_eq!(ring.name(), "ring");
    for bytes in [UNIT * 8, UNIT * 400] {
        let mut team = Team::of(N, options());
        assert_eq!(team.group.ring(), Some([0, 1, 2, 3].as_slice()));
        let wiring = Wiring::of(&team.group);
        let kind = Kind::AllReduce(ring);
        let call = Case::new(&mut Random::new(2), &wiring, kind, bytes / 4, false);
        let counted = over_links(&driver, &mut team, &call);
        // Each block sends its messages of 16 KiB of each part in 2 (N - 1) steps.
        let messages = (bytes / N).div_ceil(16 << 10);
        let flags = 8 * messages * 2 * (N - 1);
        for (from, to) in (0..N).flat_map(|a| (0..N).map(move |b| (a, b))) {
            let link = counted[from][to];
            let (next, previous) = (to == (from + 1) % N, from == (to + 1) % N);
            // A neighbour is told of the barrier (and where the input is, though nobody asks); the
            // successor of each message; the predecessor that it was read.
            let expected = match (next, previous) {
                (true, _) => 2 * bytes / N * (N - 1) + flags + 16 * messages,
                (_, true) => flags + 16 * messages,
                _ => 0,
            };
            if from != to {
                assert_eq!(
                    link.written, expected as u64,
                    "{bytes} bytes, {from} to {to}"
                );
                assert_eq!((link.read, link.atomics, link.spun), (0, 0, 0));
            }
        }
        for declared in declared(&team) {
            assert_eq!(declared, (2 * bytes / N * (N - 1)) as u64);
            assert_eq!(declared, ring.bytes_sent(N, bytes) as u64);
        }
    }
}
