//! `ringtp bench`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod model;

use std::io::{Write, stdout};
use std::time::Duration;

#[cfg(feature = "cuda")]
use ringtp::comm::p2p::Counts;
use serde_json::{Value, json};

use crate::Failure;
use crate::args::{BenchArgs, Device, Operation};
use crate::table::{Side, table};

/// One row of the result.
struct Row {
    algorithm: &'static str,
    bytes: usize,
    measured: Measured,
}

enum Measured {
    /// A call's time.
    Time(Duration),
    /// What a call of all ranks did on the virtual GPU.
    #[cfg(feature = "cuda")]
    Counts { counts: Counts, hops: usize },
}

/// What all rows have in common.
struct Setting {
    ranks: usize,
    /// Where, in words.
    place: String,
}

pub(crate) fn bench(args: &BenchArgs) -> Result<(), Failure> {
    if let Some(dir) = &args.model {
        return model::run(args, dir);
    }
    let (setting, rows) = match args.device {
        Device::Cpu if args.devices.is_empty() => cpu::run(args)?,
        #[cfg(feature = "cuda")]
        _ => cuda::run(args)?,
        #[cfg(not(feature = "cuda"))]
        _ => {
            return Err(ringtp::Error::input(
                "--device",
                "cpu, as this program was built without CUDA",
                "cuda",
                "build it with cargo build --release --features cuda",
            )
            .into());
        }
    };
    let text = if args.json {
        let lines = rows.iter().map(|row| row.to_json(args, &setting));
        lines.map(|line| format!("{line}\n")).collect()
    } else {
        to_text(args, &setting, &rows)
    };
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
        }
    }

    /// How many times its message the busiest link carries.
    fn bus_factor(self, ranks: usize) -> f64 {
        let others = (ranks - 1) as f64 / ranks as f64;
        match self {
            Self::AllReduce => 2.0 * others,
            Self::ReduceScatter | Self::AllGather => others,
            Self::Broadcast => 1.0,
        }
    }
}

/// `bytes` as whole elements, the same number for every rank, and at least one.
fn elements(args: &BenchArgs, ranks: usize, bytes: usize) -> usize {
    let elements = (bytes / args.elements().size()).max(1);
    match args.operation {
        Operation::AllReduce | Operation::Broadcast => elements,
        Operation::ReduceScatter | Operation::AllGather => elements.next_multiple_of(ranks),
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

impl Row {
    fn bandwidths(&self, args: &BenchArgs, setting: &Setting, time: Duration) -> (f64, f64) {
        let algbw = self.bytes as f64 / time.as_secs_f64() / 1e9;
        (algbw, algbw * args.operation.bus_factor(setting.ranks))
    }

    fn to_json(&self, args: &BenchArgs, setting: &Setting) -> Value {
        let mut object = json!({
            "operation": args.operation.name(),
            "algorithm": self.algorithm,
            "bytes": self.bytes,
            "dtype": args.elements().name(),
            "ranks": setting.ranks,
            "place": setting.place,
        });
        let measured = match &self.measured {
            Measured::Time(time) => {
                let (algbw, busbw) = self.bandwidths(args, setting, *time);
                json!({"us": time.as_secs_f64() * 1e6, "algbw_gb_s": algbw, "busbw_gb_s": busbw})
            }
            #[cfg(feature = "cuda")]
            Measured::Counts { counts, hops } => json!({
                "link_bytes": counts.link_bytes,
                "link_bytes_by_formula": counts.bytes_by_formula,
                "hops": hops,
                "sectors": counts.sectors,
                "barriers": counts.barriers,
                "fences": counts.fences,
                "releases": counts.releases,
                "acquires": counts.acquires,
            }),
        };
        if let (Value::Object(object), Value::Object(measured)) = (&mut object, measured) {
            object.extend(measured);
        }
        object
    }
}

fn to_text(args: &BenchArgs, setting: &Setting, rows: &[Row]) -> String {
    let mut out = format!(
        "{} of {}, {} ranks, {}\n",
        args.operation.name(),
        args.elements(),
        setting.ranks,
        setting.place
    );
    let (mut times, mut counts) = (Vec::new(), Vec::new());
    for row in rows {
        let (bytes, algorithm) = (row.bytes.to_string(), row.algorithm.to_owned());
        match &row.measured {
            Measured::Time(time) => {
                let (algbw, busbw) = row.bandwidths(args, setting, *time);
                times.push([
                    bytes,
                    algorithm,
                    format!("{:.2}", time.as_secs_f64() * 1e6),
                    format!("{algbw:.2}"),
                    format!("{busbw:.2}"),
                ]);
            }
            #[cfg(feature = "cuda")]
            Measured::Counts { counts: c, hops } => counts.push([
                bytes,
                algorithm,
                hops.to_string(),
                c.link_bytes.to_string(),
                c.bytes_by_formula.to_string(),
                c.sectors.to_string(),
                c.barriers.to_string(),
                c.fences.to_string(),
                c.releases.to_string(),
                c.acquires.to_string(),
            ]),
        }
    }
    use Side::{Left, Right};
    if !times.is_empty() {
        let heading = ["bytes", "algorithm", "us", "algbw GB/s", "busbw GB/s"];
        times.insert(0, heading.map(String::from));
        out.push_str(&table([Right, Left, Right, Right, Right], &times));
    }
    if !counts.is_empty() {
        let heading = [
            "bytes",
            "algorithm",
            "hops",
            "link bytes",
            "by formula",
            "sectors",
            "barriers",
            "fences",
            "releases",
            "acquires",
        ];
        counts.insert(0, heading.map(String::from));
        let sides = [
            Right, Left, Right, Right, Right, Right, Right, Right, Right, Right,
        ];
        out.push_str(&table(sides, &counts));
    }
    out
}
