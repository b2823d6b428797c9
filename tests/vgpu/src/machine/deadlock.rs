//! Whether anything can still happen, and who waits for what when nothing can.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};

use super::WarpState;
use super::engine::Machine;
use crate::finding::{Fault, Finding, Kind, Thread};

impl Machine {
    /// Whether every warp, run alone, comes back to a state it has been in without having
    /// changed any memory: then nothing that any of them does will ever release another.
    pub(super) fn all_repeat(&mut self) -> bool {
        const TURNS: u32 = 64;
        let changes = self.world.memory.changes();
        for b in 0..self.resident.len() {
            for w in 0..self.resident[b].warps.len() {
                let mut seen: HashMap<u64, u32> = HashMap::new();
                let mut repeats = false;
                for turn in 0..TURNS {
                    match self.resident[b].warps[w].state(self.world.now) {
                        WarpState::Done | WarpState::Blocked => {
                            repeats = true;
                            break;
                        }
                        WarpState::Asleep(time) => self.world.now = time,
                        WarpState::Ready => {}
                    }
                    let mut hasher = DefaultHasher::new();
                    self.resident[b].warps[w].fingerprint(&mut hasher);
                    if seen.insert(hasher.finish(), turn).is_some() {
                        repeats = true;
                        break;
                    }
                    if let Err(fault) = self.run_warp(b, w, 4096, true) {
                        let device = self.resident[b].launch.device;
                        self.fail_device(device, fault);
                        return false;
                    }
                    if self.world.memory.changes() != changes {
                        self.after_run(b);
                        return false;
                    }
                    let touched = self.resident[b].block.barriers.touched != 0;
                    let exited = self.resident[b].warps[w].live != self.resident[b].live[w];
                    if touched || exited {
                        self.after_run(b);
                        return false;
                    }
                }
                if !repeats {
                    return false;
                }
            }
        }
        true
    }

    /// Nothing can advance any more and the host, which waits in these calls, will not help:
    /// reports who waits for what, and ends the devices concerned.
    pub fn declare_deadlock(&mut self, calls: &[&str]) {
        let mut stuck: Vec<u32> = Vec::new();
        let mut findings = Vec::new();
        for resident in &self.resident {
            let device = resident.launch.device;
            if stuck.contains(&device) {
                continue;
            }
            stuck.push(device);
            let mut words = Vec::new();
            let mut first = None;
            let blocks = self.resident.iter().filter(|r| r.launch.device == device);
            for r in blocks.clone() {
                for warp in &r.warps {
                    for (op, group) in warp.positions(&r.launch) {
                        let thread = Thread {
                            device,
                            block: r.block.index,
                            thread: warp.thread_index(group.mask.trailing_zeros() as usize % 32),
                        };
                        if first.is_none() {
                            first = Some((op.place.clone(), thread));
                        }
                        if words.len() < 8 {
                            words.push(format!(
                                "block {:?} warp {} lanes {:#x} {} at {}",
                                r.block.index,
                                warp.index,
                                group.mask,
                                match group.wait {
                                    super::warp::Wait::Barrier(id) => {
                                        let (come, wanted) =
                                            r.block.barriers.progress(id, &r.existing, &r.live);
                                        format!("wait at barrier {id} ({come} of {wanted} threads)")
                                    }
                                    super::warp::Wait::Lanes => "wait for lanes".to_owned(),
                                    _ => "spin".to_owned(),
                                },
                                op.place
                            ));
                        }
                    }
                }
            }
            let not_resident: u64 = self
                .grids
                .values()
                .filter(|g| g.launch.device == device)
                .map(|g| g.waiting())
                .sum();
            if not_resident > 0 {
                words.push(format!(
                    "{not_resident} blocks do not fit on the device beside the {} that wait",
                    blocks.count()
                ));
            }
            findings.push(Finding {
                kind: Kind::Deadlock,
                place: first.as_ref().map(|(place, _)| (**place).clone()),
                thread: first.map(|(_, thread)| thread),
                address: None,
                other: None,
                reason: None,
                message: format!(
                    "nothing can advance any more: {}{}",
                    words.join("; "),
                    if calls.is_empty() {
                        String::new()
                    } else {
                        format!("; the host waits in {}", calls.join(", "))
                    }
                ),
            });
        }
        for finding in findings {
            self.world.findings.report(finding);
        }
        for (_, stream) in self.streams.iter() {
            if (stream.busy || !stream.queue.is_empty()) && !stuck.contains(&stream.device) {
                stuck.push(stream.device);
            }
        }
        for device in stuck {
            self.fail_device(device, Fault::LaunchTimeout);
        }
    }
}
