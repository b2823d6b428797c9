//! A fast suite for one collective: everything that its kernel promises, on few ranks with small
//! messages, in one thread. For mutants of the kernel, and for algorithms from outside.
//!
//! A run is one group and one seed of the virtual GPU's choices. Its group has little memory and
//! small blocks, so that short messages have several blocks and passes.
#![allow(dead_code, reason = "each test file uses its part")]

mod again;
mod flags;
mod hosts;
mod losses;
mod operation;
mod probe;
mod raised;
mod stops;
mod sums;
mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use ringtp::backend::cuda::{Context, Family, Kernels, Stream, families, fatbins};
use ringtp::comm::CommError;
use ringtp::comm::cost::Wire;
use ringtp::comm::p2p::{DeviceAllReduce, P2pGroup, P2pOptions};
use test_driver::Taken;

use crate::p2p_support::Rank;
pub(crate) use operation::{Operation, Order, Target, dtype_of};

/// What went wrong, in words.
pub(crate) type Outcome = Result<(), String>;

/// Virtual GPUs with the crate's kernels.
pub(crate) struct Devices {
    driver: Taken,
    count: usize,
    /// Of each device the kernels, and a stream to see whether it still works.
    kernels: Vec<Kernels>,
    streams: Vec<Stream>,
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} devices", self.count)
    }
}

impl Devices {
    /// The first `count` devices.
    pub(crate) fn new(driver: Taken, count: usize) -> Self {
        let (kernels, streams) = load(count);
        Self {
            driver,
            count,
            kernels,
            streams,
        }
    }

    /// The kernels, with another image of a family.
    fn with_image(&self, family: Family, image: &[u8]) -> Result<Vec<Kernels>, String> {
        let each = self.kernels.iter();
        // SAFETY: PTX that ends in zero; what it does is up to the virtual GPU, which checks it.
        each.map(|kernels| unsafe { kernels.with_image(family, image) })
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())
    }

    /// Makes lost devices usable again.
    fn recover(&mut self) {
        if self.streams.iter().any(|stream| stream.is_idle().is_err()) {
            // The last holders of the contexts, which end with them.
            self.streams.clear();
            self.kernels.clear();
            (self.kernels, self.streams) = load(self.count);
        }
        let _ = self.driver.findings();
    }

    /// Makes the runs of a suite, `most` of them, until something is wrong: what, and after how many
    /// runs. What is shipped passes the run that found it, or this panics.
    pub(crate) fn judge(
        &mut self,
        suite: &mut Suite,
        code: Code<'_>,
        most: usize,
    ) -> Result<u32, (String, u32)> {
        let outcome = self.make(suite, code, most);
        self.recover();
        if outcome.is_err()
            && let Some(run) = suite.runs.first_mut().filter(|run| !run.is_passed)
        {
            if let Err(how) = self.party(Code::Shipped).and_then(|party| run.on(&party)) {
                panic!("as shipped: {how}");
            }
            run.is_passed = true;
        }
        outcome
    }

    fn party(&self, code: Code<'_>) -> Result<Party<'_>, String> {
        Ok(Party {
            driver: &self.driver,
            kernels: match code {
                Code::Of(family, image) => self.with_image(family, image)?,
                _ => self.kernels.clone(),
            },
            outside: match code {
                Code::Outside(algorithm) => Some(algorithm),
                _ => None,
            },
        })
    }

    fn make(&self, suite: &mut Suite, code: Code<'_>, most: usize) -> Result<u32, (String, u32)> {
        let party = self.party(code).map_err(|how| (how, 0))?;
        for (index, run) in suite.runs.iter().enumerate().take(most) {
            let begin = Instant::now();
            let outcome = run.on(&party);
            let (runs, took) = suite.spent.entry(run.name).or_default();
            (*runs, *took) = (*runs + 1, *took + begin.elapsed());
            if let Err(how) = outcome {
                suite.runs[..=index].rotate_right(1);
                return Err((how, index as u32 + 1));
            }
        }
        Ok(suite.runs.len() as u32)
    }
}

/// What a suite is made to run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Code<'a> {
    /// The kernels of the crate, and of the target's algorithm.
    Shipped,
    /// Another image of a family of the crate's.
    Of(Family, &'a [u8]),
    /// Another form of the target's algorithm, which is not the crate's.
    Outside(&'static dyn DeviceAllReduce),
}

/// What a suite does once: a scenario and the seed of the virtual GPU's choices.
struct Run {
    name: &'static str,
    seed: u64,
    /// Whether what is shipped is known to pass it.
    is_passed: bool,
    body: Box<dyn Fn(&Party<'_>) -> Outcome>,
}

impl Run {
    fn on(&self, party: &Party<'_>) -> Outcome {
        let outcome = (self.body)(party);
        match party.driver.findings().into_iter().next() {
            Some(first) => Err(first),
            None => outcome,
        }
        .map_err(|how| format!("{} of seed {}: {how}", self.name, self.seed))
    }
}

/// The runs that a kernel must pass. The one that found the last fault comes first from then on:
/// the next fault is often one beside it.
pub(crate) struct Suite {
    runs: Vec<Run>,
    /// Of each scenario how often it ran, and for how long in all.
    pub(crate) spent: BTreeMap<&'static str, (u32, Duration)>,
}

impl Suite {
    /// Every scenario of a target with each of these seeds.
    pub(crate) fn of(target: Target, seeds: impl Iterator<Item = u64>) -> Self {
        let run = |seed, (name, scenario): (&'static str, Scenario)| Run {
            name,
            seed,
            is_passed: false,
            body: Box::new(move |party| scenario(party, &target, seed)),
        };
        let runs = seeds.flat_map(|seed| target.scenarios().into_iter().map(move |s| run(seed, s)));
        Self {
            runs: runs.collect(),
            spent: BTreeMap::new(),
        }
    }

    /// The kernel that tests links, with each of these seeds.
    pub(crate) fn of_the_probe(seeds: impl Iterator<Item = u64>) -> Self {
        let runs = seeds.map(|seed| Run {
            name: "links",
            seed,
            is_passed: false,
            body: Box::new(move |party| probe::links(party, seed)),
        });
        Self {
            runs: runs.collect(),
            spent: BTreeMap::new(),
        }
    }
}

fn load(count: usize) -> (Vec<Kernels>, Vec<Stream>) {
    let devices = 0..count;
    devices
        .map(|device| {
            let context = Context::new(device).expect("a device");
            let kernels = collectives(&context).expect("its kernels");
            (kernels, Stream::new(&context).expect("a stream"))
        })
        .unzip()
}

/// The kernels of the collectives alone.
fn collectives(context: &Context) -> ringtp::Result<Kernels> {
    let mut loaded: Option<Kernels> = None;
    for &family in families()
        .iter()
        .filter(|f| f.name.starts_with("collective/"))
    {
        let image = fatbins().find(|(name, _)| *name == family.name);
        let (_, image) = image.expect("a fatbin of the build");
        // SAFETY: a fatbin of the crate's own kernels.
        loaded = Some(unsafe {
            match loaded {
                None => Kernels::from_image(context, family, image)?,
                Some(others) => others.with_image(family, image)?,
            }
        });
    }
    Ok(loaded.expect("there are collectives"))
}

/// Kernels of the suite itself, written in PTX that ends in zero.
fn own_kernels(context: &Context, family: Family, ptx: &'static str) -> Result<Kernels, String> {
    // SAFETY: PTX that ends in zero.
    unsafe { Kernels::from_image(context, family, ptx.as_bytes()) }.map_err(words)
}

/// What a scenario has to work with.
pub(crate) struct Party<'a> {
    driver: &'a Taken,
    kernels: Vec<Kernels>,
    outside: Option<&'static dyn DeviceAllReduce>,
}

/// Something that a suite does with a collective, given a seed.
pub(crate) type Scenario = fn(&Party<'_>, &Target, u64) -> Outcome;

impl Party<'_> {
    /// A group of `n` ranks on the devices in turn, and the seed's choices.
    fn group(
        &self,
        target: &Target,
        n: usize,
        seed: u64,
        options: P2pOptions,
    ) -> Result<(P2pGroup, Vec<Rank>), String> {
        let devices: Vec<usize> = (0..n).map(|rank| rank % self.kernels.len()).collect();
        let options = P2pOptions {
            kernels: self.kernels.clone(),
            wire: Some(target.wire()),
            algorithms: self
                .outside
                .map_or_else(|| target.algorithms(), |a| vec![a]),
            ..options
        };
        let made = P2pGroup::new(&devices, options);
        let (group, comms) = made.map_err(|error| error.to_string())?;
        let ranks: Vec<Rank> = comms.into_iter().map(Rank::new).collect();
        for rank in &ranks {
            rank.comm.stream().synchronize().map_err(words)?;
        }
        self.driver.explore(seed, n.min(self.kernels.len()) as u32);
        Ok((group, ranks))
    }
}

/// Another seed, with which the virtual GPU reads the oldest values that it may.
fn with_oldest_values(seed: u64) -> u64 {
    9 * seed + 6 + seed % 3
}

/// Options of the suite's groups.
fn options() -> P2pOptions {
    P2pOptions {
        deadline: Duration::from_secs(60),
        drain: Duration::from_secs(10),
        staging_bytes: 13440,
        threads: 64,
        blocks: 4,
        probe: None,
        ..P2pOptions::default()
    }
}

/// A wire on which every hop counts, or on which none does.
fn wire(hops_matter: bool) -> Wire {
    Wire {
        alpha_us: if hops_matter { 1e6 } else { 0.0 },
        bandwidth: 1e9,
    }
}

fn words(error: ringtp::Error) -> String {
    error.to_string()
}

/// The error between ranks in an error of the crate.
fn between_ranks(error: &ringtp::Error) -> Option<&CommError> {
    match error {
        ringtp::Error::Comm(error) => Some(error),
        _ => None,
    }
}
