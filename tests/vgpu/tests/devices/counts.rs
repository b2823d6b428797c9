//! Counts of protocols between devices: what crosses each link is the closed form, and nothing but
//! the turns of polling loops depends on the schedule.

use vgpu::machine::Config;
use vgpu::report::{Link, Report};

use crate::node::{CLEAN, Node, explore};

/// Counts of a one-shot all-reduce of `n` words on every device, in blocks of 32.
fn one_shot(config: Config, n: u64) -> Report {
    let mut node = Node::new(&CLEAN, config);
    let grid = n.div_ceil(32) as u32;
    let flags = node.world() as usize * grid as usize;
    let (_, ranks) = node.ranks(flags, n as usize, 0);
    let outs = node.outs(n as usize);
    node.machine.world.report = Some(Box::default());
    node.on_all("one_shot", grid, 32, &ranks, &outs, &[n, 0]);
    assert!(node.run().iter().all(Option::is_none));
    assert!(node.findings().is_empty());
    let counter = node.machine.world.report.take();
    counter.expect("it was put there").report()
}

/// A report without what depends on how long whoever waits has to wait.
fn without_waits(mut report: Report) -> Report {
    let launches = report.launches.iter_mut().map(|l| &mut l.counts);
    for counts in launches.chain([&mut report.total]) {
        counts.lane_instructions = 0;
        counts.instructions.clear();
        counts.spins = 0;
        counts.links.iter_mut().for_each(|l| l.spun = 0);
    }
    report.launches.sort_by_key(|l| l.device);
    report.launches.iter_mut().for_each(|l| l.id = 0);
    report
}

#[test]
fn an_all_reduce_moves_its_closed_form_over_each_link() {
    let (devices, n) = (4, 70);
    let report = one_shot(explore(devices, 0), n);
    let grid = n.div_ceil(32);
    for from in 0..devices {
        for to in (0..devices).filter(|&to| to != from) {
            // Each rank reads each peer's words once, and tells it twice from each block how far
            // it is. Nobody polls at a peer.
            let expected = Link {
                from,
                to: Some(to),
                read: 8 * n,
                written: 2 * 8 * grid,
                atomics: 0,
                spun: 0,
            };
            assert_eq!(report.total.link(from, Some(to)), expected);
            assert_eq!(
                report.moved(Some(from), Some(to)),
                8 * n + 2 * 8 * grid,
                "words that {to} reads and flags that {from} writes"
            );
        }
    }
    let waits = u64::from(devices * devices) * 2 * grid;
    assert_eq!(report.total.strong("ld.acquire.sys"), waits);
    assert_eq!(report.total.strong("st.release.sys"), waits);
    // Two meetings with two barriers each.
    assert_eq!(report.total.barriers, u64::from(devices) * grid * 4);
}

#[test]
fn no_count_but_that_of_waiting_depends_on_the_schedule() {
    let first = without_waits(one_shot(explore(3, 0), 40));
    let mut spins = std::collections::BTreeSet::new();
    for seed in 1..20 {
        let report = one_shot(explore(3, seed), 40);
        spins.insert(report.total.spins);
        assert_eq!(without_waits(report), first, "seed {seed}");
    }
    assert!(spins.len() > 5, "the seeds differ in how long they wait");
}
