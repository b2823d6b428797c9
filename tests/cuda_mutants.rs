//! A fault made in a kernel of the model by mechanical means is noticed: a barrier dropped, a bound
//! shifted, operands swapped, a mask narrowed, memory order or scope weakened. Each mutant must give
//! other bytes than the kernel as shipped (which the other tests hold against an oracle), write
//! outside of its operands, or make the virtual GPU find something. Those for which no test can be
//! written are in `cuda_mutants/survivors.tsv`, with the reason.
//!
//! `cargo test --features cuda --test cuda_mutants -- --ignored --nocapture` runs a sample, with
//! `RINGTP_MUTANTS=all` all: see `mutants/judge.rs`. **Unfinished**: of one sample everything that
//! survives is argued, of others not.
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

const LIST: &str = "tests/cuda_mutants/survivors.tsv";

/// Times that every problem is run, each with another seed of the virtual GPU's choices.
const ROUNDS: u64 = 2;

/// Warp operations after which a launch is taken for endless.
const BUDGET: (&str, &str) = ("VGPU_BUDGET", "5000000");

const OPERATORS: [operators::Operator; 5] = [
    operators::barrier::faults,
    operators::masks::narrowed,
    operators::operands::swapped,
    operators::order::faults,
    operators::scope::faults,
];

/// Whether bounds are shifted as well. Their survivors are not argued yet: about seventy in the
/// sample, most of them bounds that choose between a wide access and single ones, or of unrolled
/// loops whose counters pass them by more than one.
fn with_bounds() -> bool {
    std::env::var_os("RINGTP_MUTANTS_OF_BOUNDS").is_some()
}

/// Runs a kernel's problems on a device with these kernels: the bytes that came of it, or what went
/// wrong, and in which run.
fn outcome(gpu: &Gpu, problems: &[Problem]) -> Result<Vec<Vec<u8>>, (String, u32)> {
    let mut bytes = Vec::new();
    for round in 0..ROUNDS {
        for (number, problem) in problems.iter().enumerate() {
            let run = round as u32 * problems.len() as u32 + number as u32 + 1;
            gpu.stream.synchronize().map_err(|e| (e.to_string(), run))?;
            gpu.driver.explore(round, 1);
            let mut out = Vec::new();
            let ran = problem(gpu, &mut out);
            if let Some(first) = gpu.driver.findings().first() {
                return Err((first.clone(), run));
            }
            ran.map_err(|error| (error.to_string(), run))?;
            bytes.push(out);
        }
    }
    Ok(bytes)
}

/// The types of a kernel are compiled from the same source: for the sample, the mutants of one of
/// them, and f32 where it has the like, since its results show most.
fn of_one_type(all: Vec<Mutant>) -> Vec<Mutant> {
    let types = ["_f32", "_bf16", "_f16"];
    let rank = |mutant: &Mutant| types.iter().position(|t| mutant.kernel.ends_with(t));
    let kind = |mutant: &Mutant| {
        let stem = mutant.kernel.rsplit_once('_').map_or("", |(stem, _)| stem);
        format!("{stem} {} {}", mutant.instruction, mutant.fault)
    };
    let mut first: BTreeMap<String, Option<usize>> = BTreeMap::new();
    for mutant in &all {
        let known = first.entry(kind(mutant)).or_insert_with(|| rank(mutant));
        *known = (*known).min(rank(mutant));
    }
    let mut all = all;
    all.retain(|mutant| first.get(&kind(mutant)) == Some(&rank(mutant)));
    all
}

/// Runs the mutants of a family's kernels.
fn run(family: Family, image: &'static [u8]) {
    let Some(mut gpu) = Gpu::take() else { return };
    let start = Instant::now();
    let text = shipped(family.name, image);
    let list = survivors::read(LIST);
    let sources = Sources::read(&["cuda", "cuda/ptx"]);
    let mut all = mutants::of(&text, &OPERATORS, &sources);
    if with_bounds() {
        all.extend(mutants::of(&text, &[operators::compare::bounds], &sources));
    }
    if std::env::var_os("RINGTP_MUTANTS").is_none() {
        all = of_one_type(all);
    }
    all.retain(|mutant| !problems_of(&mutant.kernel).is_empty());
    let chosen = choose(all, &text, &[""]);
    let mut tally = Tally::default();
    for mutant in &chosen {
        let problems = problems_of(&mutant.kernel);
        let right = outcome(&gpu, &problems)
            .unwrap_or_else(|(how, _)| panic!("{} as shipped: {how}", mutant.kernel));
        let own = gpu.kernels.clone();
        let begin = Instant::now();
        // SAFETY: PTX that ends in zero; what it does is up to the virtual GPU, which checks it.
        let loaded = unsafe { own.with_image(family, &mutant.apply(&text)) };
        let judged = match loaded {
            Err(error) => Err((error.to_string(), 0)),
            Ok(kernels) => {
                gpu.kernels = kernels;
                outcome(&gpu, &problems)
            }
        };
        let verdict = match judged {
            Ok(bytes) if bytes == right => Verdict::Survived,
            Ok(bytes) => {
                let differs = bytes.iter().zip(&right).position(|(a, b)| a != b);
                Verdict::Found {
                    how: "other bytes".into(),
                    runs: differs.unwrap_or(0) as u32 + 1,
                }
            }
            Err((how, runs)) => Verdict::Found { how, runs },
        };
        let took = begin.elapsed();
        match &verdict {
            Verdict::Survived => println!("SURVIVED {took:?} {mutant}"),
            Verdict::Found { how, runs } => {
                let how = how.lines().next().unwrap_or_default();
                println!("found {took:?} run {runs} {mutant}\n    {how:.200}");
            }
        }
        tally.count(mutant, &verdict, &list);
        gpu.kernels = own;
        if gpu.stream.is_idle().is_err() {
            // The context is lost, and ends with its last holder.
            drop(gpu);
            gpu = Gpu::take().expect("the driver was there");
        }
    }
    tally.conclude(family.name, &list, start.elapsed());
}

macro_rules! families {
    ($($test:ident: $family:literal;)*) => {
        $(#[test]
        #[ignore = "the list of survivors is not complete: see the module"]
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
