//! Which mutants are run, and what follows from the outcome.
//!
//! `RINGTP_MUTANTS=all` runs all; any other text, those whose name contains it. Unset, a sample: of
//! each kind of fault in each kernel one, of the first type that has the like. Which one follows
//! from the names of that kind's mutants alone, so that a change of a kernel changes the sample
//! where the kernel was changed and nowhere else.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Mutant;
use super::survivors::Survivor;

/// What a suite makes of a mutant.
#[derive(Clone, Debug)]
pub(crate) enum Verdict {
    /// It failed, in words, after so many runs.
    Found {
        /// What it said.
        how: String,
        /// Runs until then.
        runs: u32,
    },
    /// It passed.
    Survived,
}

/// Whether all mutants are to be run.
pub(crate) fn complete() -> bool {
    std::env::var("RINGTP_MUTANTS").as_deref() == Ok("all")
}

/// The types that kernels are made for, as their names end. f32 first: its results show most.
const TYPES: [&str; 3] = ["_f32", "_bf16", "_f16"];

/// A kernel's name without its type, and which type that is.
fn parts(kernel: &str) -> (&str, usize) {
    let mut types = TYPES.iter().enumerate();
    let typed = types.find_map(|(number, ending)| Some((kernel.strip_suffix(ending)?, number)));
    typed.unwrap_or((kernel, 0))
}

/// A number that follows from the text alone, whatever the version of Rust: FNV-1a.
pub(crate) fn lot(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The mutants to run: see the module.
pub(crate) fn choose(mutants: Vec<Mutant>) -> Vec<Mutant> {
    match std::env::var("RINGTP_MUTANTS").as_deref() {
        Ok("all") => mutants,
        Ok(part) if !part.is_empty() => mutants
            .into_iter()
            .filter(|mutant| mutant.to_string().contains(part))
            .collect(),
        _ => {
            let mut chosen: BTreeMap<String, ((usize, u64), Mutant)> = BTreeMap::new();
            for mutant in mutants {
                let (stem, dtype) = parts(&mutant.kernel);
                let kind = format!("{stem} {} {}", mutant.instruction, mutant.fault);
                let order = (dtype, lot(&mutant.to_string()));
                if chosen.get(&kind).is_none_or(|(least, _)| order < *least) {
                    chosen.insert(kind, (order, mutant));
                }
            }
            chosen.into_values().map(|(_, mutant)| mutant).collect()
        }
    }
}

/// What became of all mutants that were run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    found: usize,
    equivalent: usize,
    /// Runs until the last of those that were found was, and which that is.
    slowest: (u32, String),
    faults: Vec<String>,
    used: Vec<bool>,
}

impl Tally {
    /// Counts one in.
    pub(crate) fn count(&mut self, mutant: &Mutant, verdict: &Verdict, list: &[Survivor]) {
        self.used.resize(list.len(), false);
        let listed: Vec<usize> = (0..list.len()).filter(|&i| list[i].is(mutant)).collect();
        for &line in &listed {
            self.used[line] = true;
        }
        match verdict {
            Verdict::Found { how, runs } => {
                self.found += 1;
                if *runs > self.slowest.0 {
                    self.slowest = (*runs, mutant.to_string());
                }
                for &line in &listed {
                    self.faults.push(format!(
                        "listed as equivalent, and found:\n  {mutant}\n  line: {}\n  {how}",
                        list[line].name()
                    ));
                }
            }
            Verdict::Survived if listed.is_empty() => {
                self.faults
                    .push(format!("survived:\n  {mutant} #{}", mutant.copy));
            }
            Verdict::Survived => self.equivalent += 1,
        }
    }

    /// Prints the sums. Panics if a mutant survived that is not listed, if one was found that is,
    /// or if a line of the list is about no mutant at all.
    pub(crate) fn conclude(&self, name: &str, list: &[Survivor], took: Duration) {
        let all = self.found + self.equivalent;
        println!(
            "{name}: {all} mutants, {} found, {} equivalent; {:.0} s",
            self.found,
            self.equivalent,
            took.as_secs_f64()
        );
        if self.slowest.0 > 0 {
            println!(
                "found last, after {} runs:\n  {}",
                self.slowest.0, self.slowest.1
            );
        }
        let mut faults = self.faults.clone();
        if complete() {
            let unused = list.iter().zip(&self.used).filter(|(_, used)| !**used);
            faults.extend(unused.map(|(line, _)| format!("no mutant is:\n  {}", line.name())));
        }
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }
}
