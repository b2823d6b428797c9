//! A fast suite for one collective: everything that its kernel promises, on few ranks with small
//! messages, in one thread. For mutants of the kernel, and for algorithms from outside.
//!
//! A run is one group and one seed of the virtual GPU's choices. Its group has little memory and
//! small blocks, so that short messages have several blocks and passes.
#![allow(dead_code, reason = "each test file uses its part")]

mod losses;
mod operation;
mod sums;
mod watch;

use std::fmt;
use std::time::Duration;

use ringtp::backend::cuda::{Context, Family, Kernels, Stream, families, fatbins};
use ringtp::comm::CommError;
use ringtp::comm::cost::Wire;
use ringtp::comm::p2p::{P2pGroup, P2pOptions};
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

    /// Runs the suite of `target` with `image` as the code of `family`, or as shipped, until
    /// something is wrong: what, and after how many runs.
    pub(crate) fn judge(
        &mut self,
        target: &Target,
        image: Option<(Family, &[u8])>,
    ) -> Result<u32, (String, u32)> {
        let mut runs = 0;
        let mut all = || -> Outcome {
            let kernels = match image {
                Some((family, image)) => self.with_image(family, image)?,
                None => self.kernels.clone(),
            };
            let party = Party {
                driver: &self.driver,
                kernels,
            };
            for round in 0..target.rounds {
                for scenario in target.scenarios() {
                    runs += 1;
                    let outcome = scenario(&party, target, round.into());
                    let findings = self.driver.findings();
                    if let Some(first) = findings.first() {
                        return Err(first.clone());
                    }
                    outcome?;
                }
            }
            Ok(())
        };
        let outcome = all();
        self.recover();
        match outcome {
            Ok(()) => Ok(runs),
            Err(how) => Err((how, runs)),
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

/// What a scenario has to work with.
pub(crate) struct Party<'a> {
    driver: &'a Taken,
    kernels: Vec<Kernels>,
}

/// Something that the suite does with a collective, given a seed.
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
            algorithms: target.algorithms(),
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
