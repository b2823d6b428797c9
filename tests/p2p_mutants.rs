//! The suite of the collectives notices every fault that can be made in their kernels by
//! mechanical means: each fence, barrier, acquire, release and scope dropped or weakened, each
//! comparison of a flag shifted. Those that it cannot notice are in `p2p_mutants/survivors.tsv`,
//! with the reason.
//!
//! A kernel's types are one template, and what orders memory is the same in all of them: a test
//! holds their mutants against each other, and the others judge those of one type.
//!
//! The ordinary run takes a sample, see [`sample`]. `RINGTP_MUTANTS=whole` judges all of one type of
//! each kernel, `RINGTP_MUTANTS=all` those of all types, any other text those whose line contains it
//! (`-- --nocapture` shows what each came to). `RINGTP_SEEDS_FROM` is the first of the seeds, 0 if
//! unset: faults that one range of seeds finds and another does not are found by luck.
#![cfg(feature = "cuda")]

mod listing;
mod mutants;
mod p2p_suite;
mod p2p_support;
#[path = "../examples/custom_collective/tree.rs"]
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Instant;

use mutants::judge::{Tally, Verdict, lot};
use mutants::{Mutant, Sources, operators, shipped, survivors};
use p2p_suite::{Code, Devices, Operation, Order, Suite, Target, dtype_of};
use ringtp::backend::cuda::{Family, families, fatbins};
use tree::{TREE, Tree};

const LIST: &str = "tests/p2p_mutants/survivors.tsv";

/// Seeds with which every scenario runs on a mutant until it is found.
const SEEDS: u64 = 16;

/// Runs on a mutant that is listed as equivalent.
const RUNS_OF_LISTED: usize = 16;

/// The types whose kernels are judged for all.
const TYPES: [&str; 2] = ["_f32", "_b32"];
const OTHER_TYPES: [&str; 3] = ["_bf16", "_f16", "_b16"];

/// Warp operations after which a launch is taken for endless.
const BUDGET: (&str, &str) = ("VGPU_BUDGET", "4000000");

/// A machine on which there is no mesh, but a ring.
const SQUARE: (&str, &str) = ("VGPU_TOPOLOGY", "links:0-1,1-2,2-3,0-3");

const OPERATORS: [operators::Operator; 4] = [
    operators::order::faults,
    operators::scope::faults,
    operators::barrier::faults,
    operators::compare::flags,
];

fn seeds() -> Range<u64> {
    let first = std::env::var("RINGTP_SEEDS_FROM").unwrap_or_else(|_| "0".into());
    let first: u64 = first.parse().expect("RINGTP_SEEDS_FROM is a number");
    first..first + SEEDS
}

fn embedded(family: &str) -> &'static [u8] {
    let image = fatbins().find(|(name, _)| *name == family);
    image.expect("a fatbin of the build").1
}

fn family(name: &str) -> Family {
    let found = families().iter().find(|family| family.name == name);
    *found.expect("a family of the crate")
}

/// Kernels that mutants are made of.
#[derive(Clone, Copy)]
enum Subject {
    /// Those of a family of the crate that are used where there is a mesh, or where there is none.
    Own(Family, bool),
    /// The algorithm of `examples/custom_collective`.
    Example,
}

impl Subject {
    fn kernels(&self) -> &'static [&'static str] {
        match self {
            Self::Own(family, _) => family.kernels,
            Self::Example => &["tree_f32", "tree_bf16", "tree_f16"],
        }
    }

    /// Suites of what uses a kernel.
    fn suites(&self, kernel: &str, seeds: Range<u64>) -> Vec<Suite> {
        let targets = match self {
            Self::Own(..) if kernel == "probe" => return vec![Suite::of_the_probe(seeds)],
            Self::Own(_, mesh) => Target::of_kernel(kernel, *mesh),
            Self::Example => vec![Target {
                operation: Operation::AllReduce(&TREE),
                order: Order::Tree,
                dtype: dtype_of(kernel),
            }],
        };
        let suite = |target| Suite::of(target, seeds.clone());
        targets.into_iter().map(suite).collect()
    }

    fn code(&self, image: &'static [u8]) -> Code<'static> {
        match self {
            Self::Own(family, _) => Code::Of(*family, image),
            Self::Example => Code::Outside(Box::leak(Box::new(Tree { image }))),
        }
    }
}

/// The mutants of a kernel, and the listing that they are made of, in which it is alone.
fn mutants_of(kernel: &str, text: &str, sources: &Sources) -> (Vec<Mutant>, String) {
    let text = listing::ptx::alone(text, kernel);
    let all = mutants::of(&text, &OPERATORS, sources);
    assert!(all.iter().all(|mutant| mutant.kernel == kernel));
    (all, text)
}

fn sources() -> Sources {
    Sources::read(&["cuda/collective", "cuda", "examples/custom_collective"])
}

/// The mutants that are asked for: see the module.
fn chosen(mutants: Vec<Mutant>) -> Vec<Mutant> {
    let asked = std::env::var("RINGTP_MUTANTS").unwrap_or_default();
    let of_one_type = |m: &Mutant| !OTHER_TYPES.iter().any(|t| m.kernel.ends_with(t));
    match asked.as_str() {
        "all" => mutants,
        "whole" => mutants.into_iter().filter(of_one_type).collect(),
        "" => sample(mutants.into_iter().filter(of_one_type)),
        part => mutants
            .into_iter()
            .filter(|m| m.to_string().contains(part))
            .collect(),
    }
}

/// Kernels of whose faults in `collective.cuh`, which all share, the sample has each.
const WAITS_OF_EACH_KIND: [&str; 3] = ["one_shot_f32", "two_shot_f32", "ring_all_reduce_f32"];

/// Of each fault at a line of source one, wherever that is called from; in some kernels every third
/// of those at the lines that all share. Which follows from the names alone.
fn sample(mutants: impl Iterator<Item = Mutant>) -> Vec<Mutant> {
    let mut least: BTreeMap<String, (u64, Mutant)> = BTreeMap::new();
    for mutant in mutants {
        let line = mutant.place.split(" <- ").next().unwrap_or_default();
        let fault = format!("{line} {} {}", mutant.instruction, mutant.fault);
        let is_shared = line.starts_with("collective.cuh")
            && !WAITS_OF_EACH_KIND.contains(&mutant.kernel.as_str());
        if is_shared && !lot(&format!("{} {fault}", mutant.kernel)).is_multiple_of(3) {
            continue;
        }
        let order = lot(&format!("{mutant} {}", mutant.copy));
        if least.get(&fault).is_none_or(|(other, _)| order < *other) {
            least.insert(fault, (order, mutant));
        }
    }
    least.into_values().map(|(_, mutant)| mutant).collect()
}

/// Runs the suite on mutants of the kernels in a listing.
fn run(name: &str, subject: Subject, text: &str) {
    let Some(driver) = test_driver::take() else {
        return;
    };
    let start = Instant::now();
    let sources = sources();
    let mutants: Vec<(&str, Vec<Mutant>, String)> = subject
        .kernels()
        .iter()
        .filter(|kernel| !subject.suites(kernel, 0..1).is_empty())
        .map(|kernel| {
            let (mutants, alone) = mutants_of(kernel, text, &sources);
            (*kernel, mutants, alone)
        })
        .collect();
    // Of the list what is about these.
    let mut list = survivors::read(LIST);
    list.retain(|line| {
        mutants
            .iter()
            .any(|(_, all, _)| all.iter().any(|m| line.is(m)))
    });
    // Each rank of most groups has a device to itself: around the ring there are more of them.
    let in_a_ring = matches!(subject, Subject::Own(family, _) if family.name == "collective/ring");
    let mut devices = Devices::new(driver, if in_a_ring { 4 } else { 3 });
    let (mut tally, mut sum) = (Tally::default(), 0);
    for (kernel, all, alone) in mutants {
        sum += all.len();
        let chosen = chosen(all);
        if chosen.is_empty() {
            continue;
        }
        // The same image without a fault passes.
        let as_shipped: &'static [u8] = Box::leak(format!("{alone}\0").into_bytes().into());
        for mut suite in subject.suites(kernel, seeds().start..seeds().start + 2) {
            if let Err((how, _)) = devices.judge(&mut suite, subject.code(as_shipped), usize::MAX) {
                panic!("{kernel} without a fault: {how}");
            }
        }
        let mut suites = subject.suites(kernel, seeds());
        for mutant in &chosen {
            let begin = Instant::now();
            // What is argued is not proven by running it; a look is enough.
            let is_listed = list.iter().any(|line| line.is(mutant));
            let most = if is_listed {
                RUNS_OF_LISTED
            } else {
                usize::MAX
            };
            // A few hundred of them, until the process ends.
            let image: &'static [u8] = Box::leak(mutant.apply(&alone).into_boxed_slice());
            let code = subject.code(image);
            let judged = suites
                .iter_mut()
                .try_for_each(|suite| devices.judge(suite, code, most).map(|_| ()));
            let verdict = match judged {
                Ok(()) => Verdict::Survived,
                Err((how, runs)) => Verdict::Found { how, runs },
            };
            let took = begin.elapsed().as_secs_f64();
            match &verdict {
                Verdict::Survived => println!("SURVIVED {took:.2} s: {mutant}"),
                Verdict::Found { how, runs } => {
                    let how = how.lines().next().unwrap_or_default();
                    println!("found {took:.2} s, run {runs}: {mutant}\n    {how:.200}");
                }
            }
            tally.count(mutant, &verdict, &list);
        }
        for (scenario, (runs, took)) in suites.iter().flat_map(|suite| &suite.spent) {
            println!(
                "{kernel}: {:.1} s in {runs} runs: {scenario}",
                took.as_secs_f64()
            );
        }
    }
    assert!(sum > 0, "{name}: no mutants");
    println!("of {sum} mutants of all types");
    tally.conclude(name, &list, start.elapsed());
}

/// The same in a process of its own.
fn in_a_child(this: &str, name: &str, mesh: bool) {
    let environment = if mesh {
        vec![BUDGET]
    } else {
        vec![BUDGET, SQUARE]
    };
    let words = test_driver::in_a_child_with(this, &environment, || {
        let subject = Subject::Own(family(name), mesh);
        run(name, subject, &shipped(name, embedded(name)));
    });
    if let Some(words) = words {
        println!("{words}");
    }
}

macro_rules! families {
    ($($test:ident: $family:literal, $mesh:literal;)*) => {
        $(#[test]
        fn $test() {
            in_a_child(stringify!($test), $family, $mesh);
        })*
    };
}

families! {
    mutants_of_one_shot_are_found: "collective/one_shot", true;
    mutants_of_two_shot_are_found: "collective/two_shot", true;
    mutants_of_the_ring_are_found: "collective/ring", true;
    mutants_of_its_halves_are_found: "collective/ring", false;
    mutants_of_reduce_scatter_are_found: "collective/reduce_scatter", true;
    mutants_of_all_gather_are_found: "collective/all_gather", true;
    mutants_of_broadcast_are_found: "collective/broadcast", true;
    mutants_of_leaving_are_found: "collective/leave", true;
    mutants_of_the_probe_are_found: "collective/probe", true;
}

#[test]
fn mutants_of_the_example_are_found() {
    let this = "mutants_of_the_example_are_found";
    let words = test_driver::in_a_child_with(this, &[BUDGET], || {
        run("example", Subject::Example, &shipped("example", TREE.image));
    });
    if let Some(words) = words {
        println!("{words}");
    }
}

#[test]
fn every_line_of_the_list_is_about_a_mutant() {
    let sources = sources();
    let own = families()
        .iter()
        .filter(|f| f.name.starts_with("collective/"));
    let own = own.map(|f| shipped(&format!("lines of {}", f.name), embedded(f.name)));
    let texts: Vec<String> = own
        .chain([shipped("lines of the example", TREE.image)])
        .collect();
    let all: Vec<Mutant> = texts
        .iter()
        .flat_map(|t| mutants::of(t, &OPERATORS, &sources))
        .collect();
    for line in survivors::read(LIST) {
        assert!(
            all.iter().any(|m| line.is(m)),
            "no mutant is: {}",
            line.name()
        );
    }
}

/// All that is mutated of a kernel is the same, and at the same places, in the kernel of another type.
#[test]
fn the_types_of_a_kernel_have_the_same_mutants() {
    let sources = sources();
    let own = families()
        .iter()
        .filter(|f| f.name.starts_with("collective/"));
    let own = own.map(|f| (Subject::Own(*f, true), shipped(f.name, embedded(f.name))));
    let example = (Subject::Example, shipped("example of types", TREE.image));
    let mut compared = 0;
    for (subject, text) in own.chain([example]) {
        let mut of_stems: BTreeMap<&str, Vec<(&str, Vec<String>)>> = BTreeMap::new();
        for kernel in subject.kernels() {
            let (mutants, _) = mutants_of(kernel, &text, &sources);
            let all = TYPES.iter().chain(&OTHER_TYPES);
            let Some(stem) = all.filter_map(|t| kernel.strip_suffix(t)).next() else {
                continue;
            };
            let mut lines: Vec<String> = mutants.iter().map(Mutant::fault_line).collect();
            lines.sort();
            of_stems.entry(stem).or_default().push((kernel, lines));
        }
        for types in of_stems.values() {
            let (first, expected) = &types[0];
            for (kernel, lines) in types {
                compared += 1;
                let (all, of_first): (BTreeSet<_>, BTreeSet<_>) =
                    (lines.iter().collect(), expected.iter().collect());
                let differ: Vec<_> = all.symmetric_difference(&of_first).collect();
                assert!(differ.is_empty(), "{first} and {kernel}: {differ:#?}");
                assert_eq!(lines.len(), expected.len(), "{first} and {kernel}");
            }
        }
    }
    assert!(compared > 20, "{compared} kernels");
}

/// A mutant that survives and is not listed makes a test fail, as does one that is listed and found.
#[test]
fn a_survivor_fails_the_test_unless_it_is_listed_and_one_that_is_listed_must_survive() {
    let text = shipped("survivors", embedded("collective/leave"));
    let (mutants, _) = mutants_of("leave", &text, &sources());
    let release = mutants.iter().find(|m| m.fault == "release -> relaxed");
    let release = release.expect("leaving releases a word");
    let found = Verdict::Found {
        how: "a race".into(),
        runs: 1,
    };
    let line = |kernel: &str| {
        let text = format!("{kernel}\t*\t*\t*\tfor five words of a reason");
        survivors::line(&text).expect("a line of the list")
    };
    for (list, verdict, passes) in [
        (vec![], found.clone(), true),
        (vec![], Verdict::Survived, false),
        (vec![line("leave")], Verdict::Survived, true),
        (vec![line("probe")], Verdict::Survived, false),
        (vec![line("leave")], found, false),
    ] {
        let concluded = std::panic::catch_unwind(|| {
            let mut tally = Tally::default();
            tally.count(release, &verdict, &list);
            tally.conclude("a test", &list, std::time::Duration::ZERO);
        });
        assert_eq!(concluded.is_ok(), passes, "{verdict:?} with {list:?}");
    }
}
