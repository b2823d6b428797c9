//! Which mutants are run, and what follows from the outcome.
//!
//! `RINGTP_MUTANTS=all` runs all; any other text, those whose name contains it. Unset, a sample:
//! one of each kind of fault in each kernel, for one of its types. Which one depends on the PTX, so
//! that it is the same until the kernel changes, and another then.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
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

/// The mutants to run: see the module. `types` are the types that kernels are made for, as their
/// names end.
pub(crate) fn choose(mutants: Vec<Mutant>, ptx: &str, types: &[&str]) -> Vec<Mutant> {
    // Without the paths of the sources, which are another checkout's others.
    let code: Vec<&str> = ptx
        .lines()
        .filter(|line| !line.starts_with(".file"))
        .collect();
    let lot = |text: &str| {
        let mut hasher = DefaultHasher::new();
        (&code, text).hash(&mut hasher);
        hasher.finish()
    };
    match std::env::var("RINGTP_MUTANTS").as_deref() {
        Ok("all") => mutants,
        Ok(part) if !part.is_empty() => mutants
            .into_iter()
            .filter(|mutant| mutant.to_string().contains(part))
            .collect(),
        _ => {
            let ending = types.iter().min_by_key(|ending| lot(ending)).copied();
            let stem = |mutant: &Mutant| {
                let stem = mutant.kernel.strip_suffix(ending.unwrap_or_default());
                stem.map(str::to_owned)
            };
            let mut chosen: BTreeMap<String, (u64, Mutant)> = BTreeMap::new();
            for mutant in mutants {
                let Some(stem) = stem(&mutant) else {
                    continue;
                };
                let stratum = format!("{stem} {} {}", mutant.instruction, mutant.fault);
                let lot = lot(&mutant.to_string());
                match chosen.get(&stratum) {
                    Some((least, _)) if *least <= lot => {}
                    _ => {
                        chosen.insert(stratum, (lot, mutant));
                    }
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
                self.faults.push(format!("survived:\n  {mutant}"));
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
