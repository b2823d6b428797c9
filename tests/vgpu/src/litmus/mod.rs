//! Litmus tests: tiny PTX programs with conditions on what they may come to, run over many
//! seeds.
//!
//! A test is text, close to the form that other tools use for PTX:
//!
//! ```text
//! PTX MP+release.gpu+acquire.gpu
//! "a message and its flag"
//! { x = 0; y = 0; }
//! P0@gpu 0,cta 0      | P1@gpu 0,cta 1                 ;
//! st.weak x, 1        | ld.acquire.gpu r0, y           ;
//! st.release.gpu y, 1 | if (r0 == 1) ld.weak r1, x     ;
//! allowed   (P1:r0 == 1 /\ P1:r1 == 1)
//! forbidden (P1:r0 == 1 /\ P1:r1 == 0)
//! races none
//! ```
//!
//! - Variables are words of 32 bits with an initial value (0 if it is left out); `u64 x` has 64,
//!   `x[4]` is an array of four, aligned to its size, and `shared x` lies in the block's shared
//!   memory. `# …` is a comment.
//! - A thread stands on a device (`gpu`), in a block (`cta`), in a warp (`warp`; by default one
//!   of its own) and a lane (`lane`, 0). Each column is one thread's program.
//! - Statements are PTX without state space and type: `ld`, `st` (also `.v2` and `.v4` with
//!   registers or values in braces), `atom` and `red` with their operation last (`add`, `exch`,
//!   `cas`, …), `fence`, `membar`, `bar.sync id[, threads]`; operands are registers `r0`, `r1`, …,
//!   variables, and numbers. `if (r0 == 1)` and `if (r0 != 1)` guard one. Registers are 0 at
//!   first.
//! - Conditions are atoms `P0:r0 == 1` or `x == 1` (also `!=`) with `/\`, `\/`, `~` and
//!   parentheses. `forbidden` must never hold, `forall` always, `allowed` must hold at least
//!   once, and `unreached` names what the PTX model allows and this one does not do: should it
//!   ever hold, the test says so.
//! - `races none` (the default) promises that the race check finds nothing; `races some` that it
//!   finds something in some run, and `races NAME` that what it finds is missing is `NAME`, of
//!   the names of [`Reason`].

mod parse;
mod ptx;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

pub use parse::ParseError;

use crate::finding::{Finding, Reason};
use crate::machine::Config;
use crate::memory::{Order, Scope};
use crate::program::Kernel;
use crate::race::Stale;
use crate::rig::Rig;

/// A variable, or an array of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Bytes of an element, 4 or 8.
    pub bytes: u32,
    /// How many there are.
    pub count: u32,
    /// In the block's shared memory.
    pub shared: bool,
    /// What each is at first.
    pub initial: u64,
}

/// An element of a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Location {
    /// Index into the test's variables.
    pub variable: usize,
    /// Which of its elements.
    pub element: u32,
}

/// Where a thread stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub struct Placement {
    pub device: u32,
    pub block: u32,
    pub warp: u32,
    pub lane: u32,
}

/// An operand: a register or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Value {
    Register(u32),
    Number(u64),
}

/// What a statement does. `opcode` is the instruction as written, without operands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Load {
        order: Order,
        scope: Scope,
        to: Vec<u32>,
        from: Location,
    },
    Store {
        order: Order,
        scope: Scope,
        to: Location,
        values: Vec<Value>,
    },
    Atomic {
        order: Order,
        scope: Scope,
        update: String,
        to: Option<u32>,
        at: Location,
        operands: Vec<Value>,
    },
    Fence {
        order: Order,
        scope: Scope,
    },
    Barrier {
        id: u32,
        threads: Option<u32>,
    },
}

/// One statement of a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// Runs only if the register has the value, or has not.
    pub guard: Option<(u32, u64, bool)>,
    /// The instruction as written, without operands.
    pub opcode: String,
    /// What it does.
    pub op: Op,
}

/// A thread's place and program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Its name, `P0`.
    pub name: String,
    /// Where it runs.
    pub at: Placement,
    /// What it does.
    pub program: Vec<Statement>,
}

/// A condition on a final state.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Condition {
    Register(usize, u32, u64, bool),
    Memory(Location, u64, bool),
    Not(Box<Condition>),
    And(Box<Condition>, Box<Condition>),
    Or(Box<Condition>, Box<Condition>),
}

/// What is claimed of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It holds in no run.
    Forbidden,
    /// It holds in every run.
    Forall,
    /// It holds in some run.
    Allowed,
    /// The PTX model allows it; this one never does it.
    Unreached,
}

/// What is claimed of races.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Races {
    /// There are none.
    None,
    /// Some run has one.
    Some,
    /// Some run has one, and this is what is missing in each.
    Because(Reason),
}

/// A litmus test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// Its name.
    pub name: String,
    /// What it is about.
    pub about: String,
    /// The variables.
    pub variables: Vec<Variable>,
    /// The threads.
    pub threads: Vec<Thread>,
    /// The claims, each with its condition as written.
    pub claims: Vec<(Claim, Condition, String)>,
    /// What is claimed of races.
    pub races: Races,
}

/// What a run came to: each thread's registers, and each location's value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    /// By thread and register; those a thread does not use are 0.
    pub registers: Vec<Vec<u64>>,
    /// By variable and element; those in shared memory are 0.
    pub memory: Vec<Vec<u64>>,
}

impl Condition {
    /// Whether it holds.
    pub fn holds(&self, state: &State) -> bool {
        match self {
            Condition::Register(thread, register, value, equal) => {
                let found = state.registers[*thread].get(*register as usize);
                (found.copied().unwrap_or(0) == *value) == *equal
            }
            Condition::Memory(at, value, equal) => {
                (state.memory[at.variable][at.element as usize] == *value) == *equal
            }
            Condition::Not(a) => !a.holds(state),
            Condition::And(a, b) => a.holds(state) && b.holds(state),
            Condition::Or(a, b) => a.holds(state) || b.holds(state),
        }
    }
}

/// A test ready to run.
pub struct Compiled {
    /// The test.
    pub test: Test,
    /// Its kernel on each device, with blocks, threads of a block, and bytes of shared memory.
    kernels: Vec<Option<(Arc<Kernel>, u32, u32)>>,
    layout: ptx::Layout,
}

/// One run.
#[derive(Debug)]
pub struct Run {
    /// What it came to.
    pub state: State,
    /// What the checks found.
    pub findings: Vec<Finding>,
}

/// What many runs came to.
#[derive(Debug, Default)]
pub struct Summary {
    /// How often each final state appeared.
    pub states: BTreeMap<State, u64>,
    /// Runs.
    pub runs: u64,
    /// Runs with a race.
    pub racy: u64,
    /// What was missing in the races found, with an example of each.
    pub reasons: BTreeMap<Reason, String>,
    /// Claims that do not hold, in words.
    pub failures: Vec<String>,
}

impl std::str::FromStr for Test {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse::test(text)
    }
}

impl Compiled {
    /// Makes a test ready to run.
    pub fn new(test: Test) -> Result<Self, ParseError> {
        let (text, layout) = ptx::generate(&test)?;
        let module = crate::ptx::parse(&text)
            .map_err(|e| ParseError::new(format!("the test's PTX: {e}\n{text}")))?;
        let mut rig = Rig::new(Config::default());
        let loaded = rig
            .load(&module)
            .map_err(|e| ParseError::new(format!("the test's PTX: {e}\n{text}")))?;
        let devices = 1 + test.threads.iter().map(|t| t.at.device).max().unwrap_or(0);
        let kernels = (0..devices)
            .map(|device| {
                let here = test.threads.iter().filter(|t| t.at.device == device);
                let kernel = loaded.kernels.get(&ptx::kernel_name(device))?;
                let blocks = 1 + here.clone().map(|t| t.at.block).max()?;
                let warps = 1 + here.map(|t| t.at.warp).max()?;
                Some((kernel.clone(), blocks, 32 * warps))
            })
            .collect();
        Ok(Self {
            test,
            kernels,
            layout,
        })
    }

    /// Runs it once.
    pub fn run(&self, seed: u64, stale: Stale) -> Result<Run, ParseError> {
        let mut rig = Rig::new(Config {
            devices: self.kernels.len() as u32,
            seed,
            stale,
            longest_turn: 4,
            ..Config::default()
        });
        let memory = rig.upload(&self.layout.image);
        let out = rig.upload(&vec![0; self.layout.out_bytes]);
        let mut params = memory.to_le_bytes().to_vec();
        params.extend(out.to_le_bytes());
        for (device, kernel) in self.kernels.iter().enumerate() {
            if let Some((kernel, blocks, threads)) = kernel {
                let (grid, block) = ([*blocks, 1, 1], [*threads, 1, 1]);
                rig.launch_on(device as u32, kernel, grid, block, 0, &params);
            }
        }
        let end = rig.synchronise();
        let findings = rig.findings();
        if let Err(fault) = end {
            let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
            return Err(ParseError::new(format!(
                "seed {seed}: {fault:?}; {}",
                words.join("\n")
            )));
        }
        let image = rig.download(memory, self.layout.image.len());
        let out = rig.download(out, self.layout.out_bytes);
        Ok(Run {
            state: self.layout.state(&self.test, &image, &out),
            findings,
        })
    }

    /// Runs it with these seeds and judges what came out. Whether what is allowed must appear is
    /// for `thorough` to say: a few runs may miss it.
    pub fn judge(
        &self,
        seeds: std::ops::Range<u64>,
        stale: Stale,
        thorough: bool,
    ) -> Result<Summary, ParseError> {
        let mut summary = Summary::default();
        for seed in seeds {
            let run = self.run(seed, stale)?;
            summary.runs += 1;
            let mut racy = false;
            for finding in &run.findings {
                match finding.reason {
                    Some(reason) => {
                        racy = true;
                        let words = || format!("seed {seed}: {finding}");
                        summary.reasons.entry(reason).or_insert_with(words);
                    }
                    None => summary.failures.push(format!("seed {seed}: {finding}")),
                }
            }
            summary.racy += u64::from(racy);
            for (claim, condition, words) in &self.test.claims {
                let holds = condition.holds(&run.state);
                let bad = match claim {
                    Claim::Forbidden => holds,
                    Claim::Forall => !holds,
                    _ => false,
                };
                if bad && summary.failures.len() < 10 {
                    let state = self.test.show(&run.state);
                    summary
                        .failures
                        .push(format!("seed {seed}: {claim:?} {words}, but: {state}"));
                }
            }
            *summary.states.entry(run.state).or_default() += 1;
        }
        self.judge_all(&mut summary, thorough);
        Ok(summary)
    }

    fn judge_all(&self, summary: &mut Summary, thorough: bool) {
        for (claim, condition, words) in &self.test.claims {
            let count = summary.count(condition);
            match claim {
                Claim::Allowed if count == 0 && thorough => {
                    summary.failures.push(format!("never seen: {words}"));
                }
                Claim::Unreached if count > 0 => summary.failures.push(format!(
                    "said to be out of reach, and seen {count} times: {words}"
                )),
                _ => {}
            }
        }
        let none = summary.racy == 0;
        match self.test.races {
            Races::None if !none => {
                let words: Vec<&String> = summary.reasons.values().collect();
                summary.failures.push(format!("a race: {words:#?}"));
            }
            Races::Some | Races::Because(_) if none && thorough => {
                summary.failures.push("no race was found".to_owned());
            }
            Races::Because(reason) => {
                let others = summary.reasons.iter().filter(|(r, _)| **r != reason);
                let words: Vec<String> = others.map(|(r, w)| format!("{r:?}: {w}")).collect();
                if !words.is_empty() {
                    summary.failures.push(format!(
                        "races for another reason than {reason:?}: {words:#?}"
                    ));
                }
            }
            _ => {}
        }
    }
}

impl Summary {
    /// In how many runs a condition held.
    pub fn count(&self, condition: &Condition) -> u64 {
        let holds = self.states.iter().filter(|(s, _)| condition.holds(s));
        holds.map(|(_, n)| n).sum()
    }
}

impl Test {
    /// A final state in words.
    pub fn show(&self, state: &State) -> String {
        let mut words = Vec::new();
        for (thread, registers) in self.threads.iter().zip(&state.registers) {
            for (number, value) in registers.iter().enumerate() {
                words.push(format!("{}:r{number}={value}", thread.name));
            }
        }
        for (variable, values) in self.variables.iter().zip(&state.memory) {
            for (element, value) in values.iter().enumerate().filter(|_| !variable.shared) {
                let name = &variable.name;
                words.push(if variable.count == 1 {
                    format!("{name}={value}")
                } else {
                    format!("{name}[{element}]={value}")
                });
            }
        }
        words.join(" ")
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.about)
    }
}
