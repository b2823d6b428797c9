//! The suite of the collectives notices every fault that can be made in their kernels by
//! mechanical means: each fence, barrier, acquire, release and scope dropped or weakened, each
//! comparison of a flag shifted. Those that it cannot notice are in `p2p_mutants/survivors.tsv`,
//! with the reason.
//!
//! **Not part of the ordinary run yet**: the list is not complete, so the tests are ignored. `cargo
//! test --features cuda --test p2p_mutants -- --ignored` runs a sample, with `RINGTP_MUTANTS=all` all:
//! see `mutants/judge.rs`.
#![cfg(feature = "cuda")]

mod listing;
mod mutants;
mod p2p_suite;
mod p2p_support;
#[path = "../examples/custom_collective/tree.rs"]
mod tree;

use std::collections::BTreeSet;
use std::time::Instant;

use mutants::judge::{Tally, Verdict, choose};
use mutants::{Sources, operators, shipped, survivors};
use p2p_suite::{Devices, Operation, Order, Target, dtype_of};
use ringtp::backend::cuda::{Family, families, fatbins};
use tree::{TREE, Tree};

const LIST: &str = "tests/p2p_mutants/survivors.tsv";

/// Times that every scenario runs on a mutant, each with another seed, until it is found; and on
/// what is shipped.
const ROUNDS: u32 = 16;
const ROUNDS_AS_SHIPPED: u32 = 4;

/// Warp operations after which a launch is taken for endless.
const BUDGET: (&str, &str) = ("VGPU_BUDGET", "20000000");

/// A machine on which there is no mesh, but a ring.
const SQUARE: (&str, &str) = ("VGPU_TOPOLOGY", "links:0-1,1-2,2-3,0-3");

const OPERATORS: [operators::Operator; 4] = [
    operators::order::faults,
    operators::scope::faults,
    operators::barrier::faults,
    operators::compare::flags,
];

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
    /// The collectives that use a kernel, whose code is `image`.
    fn targets(&self, kernel: &str, image: Option<&'static [u8]>) -> Vec<Target> {
        match self {
            Self::Own(_, mesh) => Target::of_kernel(kernel, *mesh, ROUNDS),
            Self::Example => {
                let tree = image.map_or(TREE, |image| Tree { image });
                vec![Target {
                    operation: Operation::AllReduce(Box::leak(Box::new(tree))),
                    order: Order::Tree,
                    dtype: dtype_of(kernel),
                    rounds: ROUNDS,
                }]
            }
        }
    }
}

/// Runs the suite on mutants of the kernels in a listing.
fn run(name: &str, subject: Subject, text: &str) {
    let Some(driver) = test_driver::take() else {
        return;
    };
    let start = Instant::now();
    let sources = Sources::read(&["cuda/collective", "cuda", "examples/custom_collective"]);
    let list = survivors::read(LIST);
    let mut devices = Devices::new(
        driver,
        match subject {
            Subject::Own(_, false) => 4,
            _ => 3,
        },
    );

    let tested = |kernel: &str| !subject.targets(kernel, None).is_empty();
    let mut all = mutants::of(text, &OPERATORS, &sources);
    all.retain(|mutant| tested(&mutant.kernel));
    assert!(!all.is_empty(), "{name}: no mutants");
    let sum = all.len();
    let chosen = choose(all);
    // The suite passes on what is shipped; a mutant that fails then fails for its fault.
    let kernels: BTreeSet<&str> = chosen.iter().map(|m| m.kernel.as_str()).collect();
    for kernel in kernels {
        for target in subject.targets(kernel, None) {
            let target = Target {
                rounds: ROUNDS_AS_SHIPPED,
                ..target
            };
            if let Err((how, runs)) = devices.judge(&target, None) {
                panic!("{kernel} as shipped, run {runs}: {how}");
            }
        }
    }
    println!("{name}: {} of {sum} mutants", chosen.len());
    let mut tally = Tally::default();
    for mutant in &chosen {
        // A few hundred of them, until the process ends.
        let image: &'static [u8] = Box::leak(mutant.apply(text).into_boxed_slice());
        let own = match subject {
            Subject::Own(family, _) => Some((family, image)),
            Subject::Example => None,
        };
        let begin = Instant::now();
        let targets = subject.targets(&mutant.kernel, Some(image));
        let judged = targets
            .iter()
            .try_for_each(|target| devices.judge(target, own).map(|_| ()));
        let verdict = match judged {
            Ok(()) => Verdict::Survived,
            Err((how, runs)) => Verdict::Found { how, runs },
        };
        match &verdict {
            Verdict::Survived => println!("SURVIVED {:?} {mutant}", begin.elapsed()),
            Verdict::Found { how, runs } => {
                let how = how.lines().next().unwrap_or_default();
                println!(
                    "found {:?} run {runs} {mutant}\n    {how:.200}",
                    begin.elapsed()
                );
            }
        }
        tally.count(mutant, &verdict, &list);
    }
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
        #[ignore = "the list of survivors is not complete yet"]
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
}

#[test]
#[ignore = "the list of survivors is not complete yet"]
fn mutants_of_the_example_are_found() {
    let this = "mutants_of_the_example_are_found";
    let words = test_driver::in_a_child_with(this, &[BUDGET], || {
        run("example", Subject::Example, &shipped("example", TREE.image));
    });
    if let Some(words) = words {
        println!("{words}");
    }
}
