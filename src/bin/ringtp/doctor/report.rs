//! What the examination found, as it comes line by line, as text and as JSON.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::table::{Side, table};

/// A line from the child, in this order.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Line {
    /// The driver answers.
    Driver(Driver),
    /// What it says of devices and links.
    Asked(Asked),
    /// What kernels found out.
    Probed(Probed),
    /// What ended the examination.
    Failed(String),
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Driver {
    /// The newest CUDA it is for, as "13.0".
    pub(super) cuda: String,
    pub(super) is_virtual: bool,
    pub(super) devices: usize,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Device {
    pub(super) rank: usize,
    pub(super) device: usize,
    pub(super) name: String,
    pub(super) compute_capability: u32,
    pub(super) memory_bytes: usize,
    pub(super) multiprocessors: u32,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Asked {
    /// The device of each rank.
    pub(super) devices: Vec<Device>,
    /// `[from][to]`.
    pub(super) links: Vec<Vec<String>>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Probed {
    /// `[from][to]`: what does not work about a link that the driver calls good.
    pub(super) broken: Vec<Vec<Option<String>>>,
    /// `[from][to]`, in bytes a second, where it was measured.
    pub(super) bandwidth: Vec<Vec<Option<f64>>>,
    pub(super) ring: Option<Vec<usize>>,
    pub(super) blocks: u32,
    /// The cost model's microseconds a hop.
    pub(super) alpha_us: f64,
    /// The cost model's bytes a second and rank, one way.
    pub(super) model_bandwidth: f64,
    pub(super) all_reduce: Vec<Choice>,
    /// Why there is no algorithm.
    pub(super) no_algorithm: Option<String>,
}

/// The algorithm for a message.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Choice {
    pub(super) bytes: usize,
    pub(super) algorithm: String,
    pub(super) model_us: f64,
    /// The others, and why not.
    pub(super) refused: Vec<(String, String)>,
}

#[derive(Debug, Default)]
pub(super) struct Report {
    driver: Option<Driver>,
    asked: Option<Asked>,
    probed: Option<Probed>,
    problems: Vec<String>,
}

impl Report {
    pub(super) fn take(&mut self, line: Line) {
        match line {
            Line::Driver(driver) => self.driver = Some(driver),
            Line::Asked(asked) => self.asked = Some(asked),
            Line::Probed(probed) => {
                self.probed = Some(probed);
                self.judge_links();
            }
            Line::Failed(why) => self.problem(why),
        }
    }

    pub(super) fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    pub(super) fn is_healthy(&self) -> bool {
        self.problems.is_empty()
    }

    /// What the child does next.
    pub(super) fn stage(&self) -> &'static str {
        match (&self.driver, &self.asked) {
            (None, _) => "starting the driver",
            (_, None) => "asking the driver about the devices",
            _ => "the probe of the links",
        }
    }

    /// No more lines come: an examination that stopped halfway is no clean bill of health.
    pub(super) fn finish(&mut self) {
        if self.probed.is_none() && self.problems.is_empty() {
            self.problem(format!(
                "{} ended without a result; run ringtp doctor --in-this-process to see more",
                self.stage()
            ));
        }
    }

    fn judge_links(&mut self) {
        let (Some(asked), Some(probed)) = (&self.asked, &self.probed) else {
            return;
        };
        let mut problems = Vec::new();
        for (from, to) in pairs(asked.devices.len()) {
            if let Some(how) = &probed.broken[from][to] {
                problems.push(format!(
                    "the way from rank {from} (device {}) to rank {to} (device {}) is broken: the \
                     driver calls it {}, but {how}; leave one of the two out with --devices, or \
                     mend the machine (on PCIe: switch off ACS and the IOMMU's translation)",
                    asked.devices[from].device, asked.devices[to].device, asked.links[from][to],
                ));
            }
        }
        problems.extend(probed.no_algorithm.clone());
        self.problems.extend(problems);
    }

    pub(super) fn to_json(&self) -> Value {
        let asked = self.asked.as_ref();
        let probed = self.probed.as_ref();
        let pair = |asked: &Asked, (from, to): (usize, usize)| {
            json!({
                "from": from,
                "to": to,
                "driver": asked.links[from][to],
                "probe": probed.map(|p| p.verdict(asked, from, to)),
                "bytes_per_second": probed.and_then(|p| p.bandwidth[from][to]),
            })
        };
        json!({
            "healthy": self.is_healthy(),
            "problems": self.problems,
            "ringtp": env!("CARGO_PKG_VERSION"),
            "driver": self.driver,
            "devices": asked.map(|a| &a.devices),
            "pairs": asked.map(|a| {
                pairs(a.devices.len()).map(|at| pair(a, at)).collect::<Vec<_>>()
            }),
            "ring": probed.and_then(|p| p.ring.as_ref()),
            "blocks": probed.map(|p| p.blocks),
            "model": probed.map(|p| json!({
                "us_per_hop": p.alpha_us,
                "bytes_per_second": p.model_bandwidth,
            })),
            "all_reduce": probed.map(|p| p.all_reduce.iter().map(Choice::to_json).collect::<Vec<_>>()),
        })
    }

    pub(super) fn to_text(&self) -> String {
        let mut out = format!("ringtp {}\n", env!("CARGO_PKG_VERSION"));
        if let Some(driver) = &self.driver {
            out.push_str(&driver.to_text());
        }
        if let Some(asked) = &self.asked {
            out.push_str("\nranks\n");
            out.push_str(&device_table(&asked.devices));
            if asked.devices.len() > 1 {
                out.push_str("\nlinks\n");
                out.push_str(&self.link_table(asked));
            }
        }
        if let Some(probed) = &self.probed {
            out.push_str(&probed.to_text());
        }
        out.push('\n');
        if self.is_healthy() {
            out.push_str("healthy\n");
        }
        for problem in &self.problems {
            out.push_str(&format!("PROBLEM: {problem}\n"));
        }
        out
    }

    fn link_table(&self, asked: &Asked) -> String {
        let heading = ["from", "to", "driver says", "probe", "GB/s"].map(String::from);
        let rows = pairs(asked.devices.len()).map(|(from, to)| {
            let probed = self.probed.as_ref();
            let bandwidth = probed.and_then(|p| p.bandwidth[from][to]);
            [
                from.to_string(),
                to.to_string(),
                asked.links[from][to].clone(),
                probed.map_or("not made".into(), |p| p.verdict(asked, from, to)),
                bandwidth.map_or("-".into(), |b| format!("{:.1}", b / 1e9)),
            ]
        });
        let rows: Vec<_> = std::iter::once(heading).chain(rows).collect();
        use Side::{Left, Right};
        table([Right, Right, Left, Left, Right], &rows)
    }
}

impl Driver {
    fn to_text(&self) -> String {
        let kind = if self.is_virtual {
            " (the virtual GPU: it runs PTX and takes no time)"
        } else {
            ""
        };
        format!(
            "driver for CUDA {}{kind}, {} devices\n",
            self.cuda, self.devices
        )
    }
}

impl Probed {
    fn verdict(&self, asked: &Asked, from: usize, to: usize) -> String {
        match &self.broken[from][to] {
            Some(how) => format!("broken: {how}"),
            None if asked.links[from][to] == NO_ACCESS => "-".into(),
            None => "works".into(),
        }
    }

    fn to_text(&self) -> String {
        let ring = match &self.ring {
            Some(ring) => ring.iter().map(usize::to_string).collect::<Vec<_>>(),
            None => vec!["none goes through all ranks".into()],
        };
        let mut out = format!(
            "\nring: {}\nblocks of a collective: {}\n",
            ring.join(" "),
            self.blocks
        );
        if self.all_reduce.is_empty() {
            return out;
        }
        out.push_str(&format!(
            "\nall-reduce, by a model and not measured: {} us a hop, {:.0} GB/s one way\n",
            self.alpha_us,
            self.model_bandwidth / 1e9
        ));
        let heading = ["bytes", "algorithm", "us", "not chosen"].map(String::from);
        let rows = self.all_reduce.iter().map(|choice| {
            let others = choice.refused.iter();
            let others = others.map(|(name, why)| format!("{name} ({why})"));
            [
                choice.bytes.to_string(),
                choice.algorithm.clone(),
                format!("{:.1}", choice.model_us),
                others.collect::<Vec<_>>().join(", "),
            ]
        });
        let rows: Vec<_> = std::iter::once(heading).chain(rows).collect();
        use Side::{Left, Right};
        out.push_str(&table([Right, Left, Right, Left], &rows));
        out
    }
}

/// How a link that the driver does not give is written.
const NO_ACCESS: &str = "no access";

impl Choice {
    fn to_json(&self) -> Value {
        let refused = self.refused.iter();
        let refused = refused.map(|(name, why)| json!({"algorithm": name, "why": why}));
        json!({
            "bytes": self.bytes,
            "algorithm": self.algorithm,
            "model_us": self.model_us,
            "refused": refused.collect::<Vec<_>>(),
        })
    }
}

fn device_table(devices: &[Device]) -> String {
    let heading = [
        "rank",
        "device",
        "name",
        "capability",
        "memory GiB",
        "multiprocessors",
    ];
    let rows = devices.iter().map(|d| {
        [
            d.rank.to_string(),
            d.device.to_string(),
            d.name.clone(),
            format!(
                "{}.{}",
                d.compute_capability / 10,
                d.compute_capability % 10
            ),
            format!("{:.1}", d.memory_bytes as f64 / f64::from(1 << 30)),
            d.multiprocessors.to_string(),
        ]
    });
    let rows: Vec<_> = std::iter::once(heading.map(String::from))
        .chain(rows)
        .collect();
    use Side::{Left, Right};
    table([Right, Right, Left, Right, Right, Right], &rows)
}

/// The ordered pairs of different ranks.
fn pairs(ranks: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..ranks * ranks)
        .map(move |at| (at / ranks, at % ranks))
        .filter(|(from, to)| from != to)
}
