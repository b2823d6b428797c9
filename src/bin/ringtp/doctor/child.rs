//! The examination itself, in a process of its own: a line of JSON after each step.

use std::io::{Write, stdout};

use super::report::{Asked, Choice, Device, Driver, Line, Probed};
use crate::Failure;
use crate::args::DoctorArgs;

use ringtp::backend::cuda::Context;
use ringtp::comm::Link;
use ringtp::comm::p2p::{MAX_RANKS, P2pGroup, P2pOptions, Survey, choose};

/// Sizes of messages that the table of algorithms has.
const SIZES: [usize; 8] = [
    1 << 10,
    8 << 10,
    32 << 10,
    128 << 10,
    512 << 10,
    2 << 20,
    16 << 20,
    128 << 20,
];

pub(super) fn examine(args: &DoctorArgs) -> Result<(), Failure> {
    match steps(args) {
        Err(Failure::Ringtp(error)) => say(&Line::Failed(error.to_string())),
        other => other,
    }
}

fn steps(args: &DoctorArgs) -> Result<(), Failure> {
    let count = Context::device_count()?;
    let version = Context::driver_version()?;
    say(&Line::Driver(Driver {
        cuda: format!("{}.{}", version / 1000, version % 1000 / 10),
        is_virtual: Context::is_virtual(),
        devices: count,
    }))?;
    let devices = if args.devices.is_empty() {
        (0..count.min(MAX_RANKS)).collect()
    } else {
        args.devices.clone()
    };
    let survey = Survey::new(&devices)?;
    say(&Line::Asked(asked(&survey)?))?;
    let options = P2pOptions {
        probe: Some(args.probe),
        ..P2pOptions::default()
    };
    // The handles are not used, but a group ends with them.
    let (group, _comms) = P2pGroup::new(&devices, options)?;
    say(&Line::Probed(probed(&survey, &group)?))
}

fn say(line: &Line) -> Result<(), Failure> {
    let words = serde_json::to_string(line).map_err(std::io::Error::from)?;
    let mut out = stdout().lock();
    writeln!(out, "{words}")?;
    Ok(out.flush()?)
}

fn asked(survey: &Survey) -> ringtp::Result<Asked> {
    let contexts = survey.contexts().iter().enumerate();
    let devices = contexts.map(|(rank, context)| {
        Ok(Device {
            rank,
            device: context.ordinal(),
            name: context.name().to_owned(),
            compute_capability: context.limits().compute_capability,
            memory_bytes: context.total_memory()?,
            multiprocessors: context.limits().multiprocessors,
        })
    });
    Ok(Asked {
        devices: devices.collect::<ringtp::Result<_>>()?,
        links: square(survey.contexts().len(), |from, to| {
            survey.links().get(from, to).to_string()
        }),
    })
}

fn probed(survey: &Survey, group: &P2pGroup) -> ringtp::Result<Probed> {
    let (links, wire) = (group.links(), group.wire());
    let mut all_reduce = Vec::new();
    let mut no_algorithm = None;
    for bytes in SIZES {
        match choose(links, wire, bytes) {
            Ok(choice) => all_reduce.push(Choice {
                bytes,
                algorithm: choice.algorithm.name().to_owned(),
                model_us: choice.time_us,
                refused: choice
                    .refused
                    .iter()
                    .map(|(other, why)| (other.name().to_owned(), why.to_string()))
                    .collect(),
            }),
            Err(error) => no_algorithm = Some(error.to_string()),
        }
    }
    let ranks = group.world_size();
    let mut bandwidth = square(ranks, |_, _| None);
    for (from, row) in bandwidth.iter_mut().enumerate() {
        for (to, cell) in row.iter_mut().enumerate() {
            // The virtual GPU's clock measures nothing.
            if from != to && links.get(from, to).is_good() && !Context::is_virtual() {
                *cell = Some(survey.bandwidth(from, to)?);
            }
        }
    }
    Ok(Probed {
        broken: square(ranks, |from, to| match links.get(from, to) {
            Link::Broken(how) => Some(how.clone()),
            _ => None,
        }),
        bandwidth,
        ring: group.ring().map(<[usize]>::to_vec),
        blocks: group.blocks(),
        alpha_us: wire.alpha_us,
        model_bandwidth: wire.bandwidth,
        all_reduce,
        no_algorithm,
    })
}

fn square<T>(side: usize, mut cell: impl FnMut(usize, usize) -> T) -> Vec<Vec<T>> {
    (0..side)
        .map(|from| (0..side).map(|to| cell(from, to)).collect())
        .collect()
}
