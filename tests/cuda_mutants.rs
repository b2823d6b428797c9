//! A fault made in a kernel of the model by mechanical means is noticed: a barrier dropped, a bound
//! shifted, operands swapped, a mask narrowed, memory order or scope weakened. Each mutant must give
//! other bytes than the kernel as shipped (which the other tests hold against an oracle), make other
//! accesses to memory, write outside of its operands, or make the virtual GPU find something. Those
//! for which no test can be written are in `cuda_mutants/survivors.tsv`, with the reason.
//!
//! The ordinary run takes a sample, `RINGTP_MUTANTS=all` all, and any other text those whose name
//! contains it (`RINGTP_MUTANTS=gemm_few_f32`): see `mutants/judge.rs`. With `-- --nocapture` it says
//! how each was found.
#![cfg(feature = "cuda")]

mod cuda_support;
mod listing;
mod mutants;
#[path = "cuda_mutants/problems.rs"]
mod problems;

use std::collections::BTreeMap;
use std::time::Instant;

use cuda_support::Gpu;
use mutants::judge::{Tally, Verdict, choose};
use mutants::{Mutant, Sources, operators, shipped, survivors};
use problems::{Problem, problems_of};
use ringtp::backend::cuda::{Family, families, fatbins};
use test_driver::report::{Counts, Global, Shared};

const LIST: &str = "tests/cuda_mutants/survivors.tsv";

/// Times that every problem is run, each with another seed of the virtual GPU's choices.
const ROUNDS: u64 = 2;

/// Warp operations after which a launch is taken for endless.
const BUDGET: (&str, &str) = ("VGPU_BUDGET", "5000000");

const OPERATORS: [operators::Operator; 6] = [
    operators::barrier::faults,
    operators::compare::bounds,
    operators::masks::narrowed,
    operators::operands::swapped,
    operators::order::faults,
    operators::scope::faults,
];

/// What a problem comes to: the bytes that it could have written, and how many accesses its threads
/// made to how many bytes, by which a wide access is told from several that do the same.
#[derive(PartialEq)]
struct Outcome {
    bytes: Vec<u8>,
    accesses: [(u64, u64); 6],
}

/// Loads, stores and atomics: of global memory, then of shared. How many a warp makes at once depends
/// on the order of turns, where its threads go different ways; how many a thread makes does not.
fn accesses(counts: &Counts) -> [(u64, u64); 6] {
    let global = |of: &Global| (of.threads, of.bytes);
    let shared = |of: &Shared| (of.threads, of.bytes);
    [
        global(&counts.global_loads),
        global(&counts.global_stores),
        global(&counts.global_atomics),
        shared(&counts.shared_loads),
        shared(&counts.shared_stores),
        (counts.shared_atomics.threads, counts.shared_atomics.bytes),
    ]
}

/// Runs a problem: what it comes to, or what went wrong.
fn outcome(gpu: &Gpu, problem: &Problem, round: u64) -> Result<Outcome, String> {
    gpu.stream.synchronize().map_err(|e| e.to_string())?;
    gpu.driver.explore(round, 1);
    assert!(gpu.driver.count(), "on the virtual GPU");
    let mut bytes = Vec::new();
    let ran = problem(gpu, &mut bytes);
    if let Some(first) = gpu.driver.findings().first() {
        return Err(first.clone());
    }
    ran.map_err(|error| error.to_string())?;
    let accesses = accesses(&gpu.driver.report().total);
    Ok(Outcome { bytes, accesses })
}

/// Runs a kernel's problems, round after round, as long as they come to the same as with the kernel
/// as shipped.
fn judge(gpu: &Gpu, problems: &[Problem], right: &[Outcome]) -> Verdict {
    for (run, right) in right.iter().enumerate() {
        let (round, number) = (run / problems.len(), run % problems.len());
        let how = match outcome(gpu, &problems[number], round as u64) {
            Ok(own) if own == *right => continue,
            Ok(own) if own.bytes == right.bytes => "other accesses".to_owned(),
            Ok(_) => "other bytes".to_owned(),
            Err(how) => how,
        };
        let runs = run as u32 + 1;
        return Verdict::Found { how, runs };
    }
    Verdict::Survived
}

/// Runs the mutants of a family's kernels.
fn run(family: Family, image: &'static [u8]) {
    let Some(mut gpu) = Gpu::take() else { return };
    let start = Instant::now();
    let text = shipped(family.name, image);
    let mut list = survivors::read(LIST);
    list.retain(|line| family.kernels.iter().any(|kernel| line.is_of(kernel)));
    let sources = Sources::read(&["cuda", "cuda/ptx"]);
    let text_of = |kernel: &&'static str| (*kernel, listing::ptx::alone(&text, kernel));
    let texts: BTreeMap<&str, String> = family.kernels.iter().map(text_of).collect();
    let all = texts
        .values()
        .flat_map(|text| mutants::of(text, &OPERATORS, &sources));
    let all: Vec<Mutant> = all.collect();
    let sum = all.len();
    let chosen = choose(all);
    println!("{}: {} of {sum} mutants", family.name, chosen.len());
    let mut tally = Tally::default();
    for kernel in family.kernels {
        let chosen = chosen.iter().filter(|mutant| mutant.kernel == *kernel);
        let mut chosen = chosen.peekable();
        if chosen.peek().is_none() {
            continue;
        }
        let problems = problems_of(kernel);
        let runs = (0..ROUNDS).flat_map(|round| problems.iter().map(move |p| (round, p)));
        let right: Vec<Outcome> = runs
            .map(|(round, problem)| outcome(&gpu, problem, round))
            .collect::<Result<_, _>>()
            .unwrap_or_else(|how| panic!("{kernel} as shipped: {how}"));
        let own = Family {
            kernels: std::slice::from_ref(kernel),
            ..family
        };
        for mutant in chosen {
            let begin = Instant::now();
            // SAFETY: PTX that ends in zero; what it does is up to the virtual GPU, which checks it.
            let kernels = unsafe { gpu.kernels.with_image(own, &mutant.apply(&texts[kernel])) };
            let kernels = kernels.unwrap_or_else(|e| panic!("no program: {mutant}\n{e}"));
            let shipped = std::mem::replace(&mut gpu.kernels, kernels);
            let verdict = judge(&gpu, &problems, &right);
            gpu.kernels = shipped;
            let took = begin.elapsed();
            match &verdict {
                Verdict::Survived => println!("SURVIVED {took:?} {mutant} #{}", mutant.copy),
                Verdict::Found { how, runs } => {
                    let how = how.lines().next().unwrap_or_default();
                    let copy = mutant.copy;
                    println!("found {took:?} run {runs} {mutant} #{copy}\n    {how:.200}");
                }
            }
            tally.count(mutant, &verdict, &list);
            if gpu.stream.is_idle().is_err() {
                // The context is lost, and ends with its last holder.
                drop(gpu);
                gpu = Gpu::take().expect("the driver was there");
            }
        }
    }
    tally.conclude(family.name, &list, start.elapsed());
}

macro_rules! families {
    ($($test:ident: $family:literal;)*) => {
        $(#[test]
        fn $test() {
            let words = test_driver::in_a_child_with(stringify!($test), &[BUDGET], || {
                let family = families().iter().find(|f| f.name == $family);
                let image = fatbins().find(|(name, _)| *name == $family);
                run(*family.expect("a family"), image.expect("its fatbin").1);
            });
            if let Some(words) = words {
                println!("{words}");
            }
        })*
    };
}

families! {
    mutants_of_norms_are_found: "norm";
    mutants_of_products_are_found: "gemm";
    mutants_of_rope_are_found: "rope";
    mutants_of_attention_are_found: "attention";
    mutants_of_rows_are_found: "rows";
    mutants_of_sampling_are_found: "sampling";
}
