//! Protocols with one fault each: found, as the kind of fault that it is, at its line, on the
//! right devices.

use vgpu::finding::{Fault, Finding, Kind, Place, Reason};
use vgpu::machine::Config;

use crate::node::{MUTANTS, Node, explore};

/// Seeds within which each mutant must be found.
const SEEDS: u64 = 60;

/// The lines of mutants.cu marked with a name.
fn marked(name: &str) -> Vec<u32> {
    let text = include_str!("mutants.cu");
    let lines: Vec<u32> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| {
            line.trim_end().ends_with(&format!("// {name}"))
                || line.starts_with(&format!("ONE_SHOT({name},"))
                || line.starts_with(&format!("FENCE_FIRST({name},"))
        })
        .map(|(i, _)| i as u32 + 1)
        .collect();
    assert!(!lines.is_empty(), "no line of mutants.cu is marked {name}");
    lines
}

fn is_at(place: &Place, lines: &[u32]) -> bool {
    place
        .source
        .iter()
        .any(|(file, line)| file.ends_with("mutants.cu") && lines.contains(line))
}

/// Whether a finding names the line on one of its sides, and a device on each side it has.
fn names(finding: &Finding, line: &str) -> bool {
    let lines = marked(line);
    let here = finding.place.as_ref().is_some_and(|p| is_at(p, &lines));
    let other = finding.other.as_ref().and_then(|o| o.0.as_ref());
    here || other.is_some_and(|p| is_at(p, &lines))
}

/// Runs a mutant on seeds until it is found; the finding, which must be of this kind, at this
/// line. Nothing else may be found before it.
fn found(
    line: &str,
    kind: Kind,
    run: impl Fn(u64) -> (Vec<Finding>, Vec<Option<Fault>>),
) -> Finding {
    for seed in 0..SEEDS {
        let (findings, _) = run(seed);
        let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert!(
            findings.iter().all(|f| f.kind == kind),
            "{line}, seed {seed}: {words:#?}"
        );
        if let Some(finding) = findings.iter().find(|f| names(f, line)) {
            return finding.clone();
        }
        assert!(
            findings.is_empty(),
            "{line}, seed {seed}: not at its line: {words:#?}"
        );
    }
    panic!("{line} was not found within {SEEDS} seeds");
}

/// A mutant that all ranks run: found, between two devices.
fn race(kernel: &'static str, devices: u32, n: u64, steps: u64) -> Finding {
    let finding = found(kernel, Kind::Race, |seed| {
        on_all(kernel, explore(devices, seed), n, steps)
    });
    let device = |thread: Option<vgpu::finding::Thread>| thread.expect("a thread").device;
    let other = finding.other.clone().expect("a race has two sides");
    assert_ne!(device(finding.thread), device(other.1), "{finding}");
    finding
}

fn on_all(kernel: &str, config: Config, n: u64, steps: u64) -> (Vec<Finding>, Vec<Option<Fault>>) {
    let mut node = Node::new(&MUTANTS, config);
    let world = node.world() as usize;
    let (_, mut ranks) = node.ranks(16, 64, 0);
    // A second set of flags for the barriers at the end, whose table follows the first.
    let ends: Vec<u64> = (0..world).map(|r| node.put(r, &[0; 16])).collect();
    let flags: Vec<u64> = (0..world).map(|r| node.put(r, &[0; 16])).collect();
    for (rank, entry) in ranks.iter_mut().enumerate() {
        entry[2] = node.put(rank, &[flags.clone(), ends.clone()].concat());
    }
    let outs = node.outs(64);
    node.on_all(kernel, 1, 64, &ranks, &outs, &[n, steps]);
    let faults = node.run();
    (node.findings(), faults)
}

macro_rules! races {
    ($($kernel:ident($devices:literal, $n:literal, $steps:literal) is $reason:ident;)*) => {
        $(#[test]
        fn $kernel() {
            let finding = race(stringify!($kernel), $devices, $n, $steps);
            assert_eq!(finding.reason, Some(Reason::$reason), "{finding}");
        })*
    };
}

races! {
    flag_relaxed(2, 32, 1) is FlagRelaxed;
    released_at_gpu_scope(2, 32, 1) is ReleaseTooNarrow;
    acquired_at_gpu_scope(2, 32, 1) is AcquireTooNarrow;
    flag_read_relaxed(2, 32, 1) is FlagReadRelaxed;
    flag_volatile_alone(2, 32, 1) is FlagRelaxed;
    fence_at_gpu_scope(2, 32, 1) is ReleaseTooNarrow;
    no_end_barrier(2, 32, 3) is Unordered;
    no_start_barrier(2, 32, 1) is Unordered;
    fence_before_the_barrier(2, 32, 1) is FenceElsewhere;
    fence_of_all_before_the_barrier(2, 32, 1) is Unordered;
    no_barrier_before_the_flag(2, 64, 1) is Unordered;
    no_barrier_after_the_flag(2, 64, 1) is Unordered;
    read_through_nc(2, 32, 1) is NonCoherent;
    flag_in_a_weak_vector(2, 16, 1) is FlagWrittenWeakly;
    one_flag_for_a_vector(2, 16, 1) is VectorElements;
    packet_in_two_stores(2, 16, 1) is FlagRelaxed;
    one_buffer_too_few(2, 16, 4) is Unordered;
    epoch_compared_with_less(2, 32, 4) is Unordered;
    mailbox_without_a_receipt(2, 32, 4) is Unordered;
    slots_that_overlap(3, 16, 1) is Unordered;
    counter_at_gpu_scope(2, 1, 1) is ScopeTooNarrow;
    lock_without_acquire(2, 1, 3) is FlagReadRelaxed;
    seqlock_of_weak_words(2, 1, 3) is Unordered;
}

/// Weak accesses to a flag race at the flag itself.
#[test]
fn weak_accesses_to_a_flag() {
    for (kernel, expected) in [
        ("acquired_weakly", Reason::FlagReadWeakly),
        ("flag_written_weakly", Reason::FlagWrittenWeakly),
    ] {
        let finding = race(kernel, 2, 32, 1);
        assert_eq!(finding.reason, Some(expected), "{finding}");
    }
}

/// Two kernels of two ranks, with whatever is between them.
fn pair(
    config: Config,
    first: &str,
    second: &str,
    between: impl FnOnce(&mut Node, u64),
) -> (Vec<Finding>, Vec<Option<Fault>>) {
    let mut node = Node::new(&MUTANTS, config);
    let (data, out) = (node.put(0, &[0; 64]), node.room(1, 64));
    node.launch(node.stream(0), first, 1, 32, &[data, data]);
    between(&mut node, data);
    if !second.is_empty() {
        node.launch(node.stream(1), second, 1, 32, &[data, out]);
    }
    let faults = node.run();
    (node.findings(), faults)
}

#[test]
fn an_event_missing_between_two_devices() {
    let finding = found("write", Kind::Race, |seed| {
        pair(explore(2, seed), "write", "read", |_, _| {})
    });
    let words = finding.to_string();
    assert!(
        words.contains("device 0") && words.contains("device 1"),
        "{words}"
    );
}

#[test]
fn a_copy_that_races_with_a_kernel() {
    let finding = found("write", Kind::Race, |seed| {
        pair(explore(2, seed), "write", "", |node, data| {
            let landed = node.room(1, 32);
            node.copy(node.stream(1), landed, data, 32);
        })
    });
    assert!(finding.to_string().contains("device 0"), "{finding}");
}

#[test]
fn no_peer_access() {
    let finding = found("write", Kind::PeerAccess, |seed| {
        let mut node = Node::new(&MUTANTS, explore(2, seed));
        node.machine.world.memory.links.enable(1, 0, false);
        let data = node.put(0, &[0; 32]);
        node.launch(node.stream(1), "write", 1, 32, &[data, data]);
        let faults = node.run();
        assert_eq!(faults, [None, Some(Fault::IllegalAddress)]);
        (node.findings(), faults)
    });
    let thread = finding.thread.expect("a thread");
    assert_eq!(thread.device, 1);
    assert!(
        finding
            .message
            .contains("memory of device 0 without peer access"),
        "{finding}"
    );
}

#[test]
fn memory_of_a_pool_without_access() {
    let finding = found("write", Kind::PeerAccess, |seed| {
        let mut node = Node::new(&MUTANTS, explore(2, seed));
        let data = node.put(0, &[0; 32]);
        let own = vgpu::memory::Reach::Devices(1);
        node.machine.world.memory.set_reach(data, own);
        node.launch(node.stream(1), "write", 1, 32, &[data, data]);
        let faults = node.run();
        (node.findings(), faults)
    });
    assert!(finding.message.contains("cuMemPoolSetAccess"), "{finding}");
}

#[test]
fn a_write_to_a_buffer_that_its_owner_freed() {
    let finding = found("write", Kind::UseAfterFree, |seed| {
        let mut node = Node::new(&MUTANTS, explore(2, seed));
        let data = node.put(0, &[0; 32]);
        node.machine.world.memory.free(data).expect("it is there");
        node.launch(node.stream(1), "write", 1, 32, &[data, data]);
        let faults = node.run();
        (node.findings(), faults)
    });
    assert_eq!(finding.thread.expect("a thread").device, 1);
}

#[test]
fn a_write_beyond_a_buffer_of_a_peer() {
    let finding = found("write", Kind::OutOfBounds, |seed| {
        let mut node = Node::new(&MUTANTS, explore(2, seed));
        let data = node.put(0, &[0; 31]);
        node.launch(node.stream(1), "write", 1, 32, &[data, data]);
        let faults = node.run();
        (node.findings(), faults)
    });
    assert_eq!(
        finding.thread.expect("a thread").thread,
        [31, 0, 0],
        "{finding}"
    );
}

#[test]
fn atomics_over_pcie() {
    let finding = found("atomics_over_pcie", Kind::PeerAccess, |seed| {
        let config = Config {
            topology: "pcie".parse().expect("a topology"),
            ..explore(2, seed)
        };
        let mut node = Node::new(&MUTANTS, config);
        let data = node.put(0, &[0; 32]);
        node.launch(node.stream(1), "add", 1, 32, &[data, data]);
        let faults = node.run();
        (node.findings(), faults)
    });
    assert!(finding.message.contains("PCIe"), "{finding}");
}

#[test]
fn one_rank_too_many() {
    let finding = found("one_rank_too_many", Kind::Deadlock, |seed| {
        let run = on_all("one_rank_too_many", explore(2, seed), 1, 1);
        assert_eq!(run.1, [Some(Fault::LaunchTimeout); 2]);
        run
    });
    let words = finding.to_string();
    assert!(words.contains("which is 0, "), "{words}");
}

#[test]
fn grid_too_large_to_spin() {
    let finding = found("grid_too_large_to_spin", Kind::Deadlock, |seed| {
        let mut node = Node::new(
            &MUTANTS,
            Config {
                seed,
                ..Config::default()
            },
        );
        let (_, ranks) = node.ranks(1, 1, 0);
        let out = node.room(0, 1);
        let sms = node.machine.devices[0].properties.multiprocessors;
        let mut args = ranks[0].to_vec();
        args.extend([out, 0, 0]);
        // So much shared memory that a multiprocessor holds one block.
        node.launch_with(
            node.stream(0),
            "grid_too_large_to_spin",
            sms + 1,
            32,
            200 << 10,
            &args,
        );
        let faults = node.run();
        (node.findings(), faults)
    });
    assert!(
        finding
            .message
            .contains("1 block does not fit on the device beside the 132"),
        "{finding}"
    );
}

#[test]
fn kernels_that_wait_for_each_other() {
    let finding = found("kernels_that_wait_for_each_other", Kind::Deadlock, |seed| {
        let mut node = Node::new(&MUTANTS, explore(1, seed));
        let flags = node.put(0, &[0; 2]);
        for kernel in ["first_of_two", "second_of_two"] {
            node.launch(node.stream(0), kernel, 1, 1, &[flags, flags]);
        }
        let faults = node.run();
        (node.findings(), faults)
    });
    assert!(finding.message.contains("second_of_two"), "{finding}");
}

#[test]
fn a_link_that_loses_writes() {
    // The driver says that it works; nobody's flag ever comes.
    for seed in 0..SEEDS {
        let config = Config {
            topology: "lossy:0>1".parse().expect("a topology"),
            ..explore(2, seed)
        };
        let mut node = Node::new(&MUTANTS, config);
        let (_, ranks) = node.ranks(16, 64, 0);
        let outs = node.outs(64);
        node.on_all("read_through_nc", 1, 32, &ranks, &outs, &[8, 1]);
        let faults = node.run();
        assert!(faults.contains(&Some(Fault::LaunchTimeout)), "{faults:?}");
        let findings = node.findings();
        assert!(
            findings.iter().any(|f| f.kind == Kind::Deadlock),
            "{findings:?}"
        );
    }
}
