//! Whether anything can still happen, and who waits for what when nothing can.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};

use super::WarpState;
use super::engine::Machine;
use super::streams::{Command, Queued, Stream};
use super::warp::{Polled, Wait};
use crate::finding::{Fault, Finding, Kind, Place, Thread};

/// Groups of lanes named in a report.
const MOST_WORDS: usize = 8;

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
                        WarpState::Asleep(time) if time > self.clock_limit => return false,
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
    pub fn declare_deadlock(&mut self, calls: &[String]) {
        let mut stuck: Vec<u32> = Vec::new();
        let mut findings = Vec::new();
        for resident in &self.resident {
            let device = resident.launch.device;
            if !stuck.contains(&device) {
                stuck.push(device);
                findings.push(self.stuck_on(device, calls));
            }
        }
        let waits = |stream: &Stream| stream.busy || !stream.queue.is_empty();
        for stream in self.streams.values().filter(|s| waits(s)) {
            if !stuck.contains(&stream.device) {
                stuck.push(stream.device);
            }
        }
        for finding in findings {
            self.world.findings.report(finding);
        }
        for device in stuck {
            self.fail_device(device, Fault::LaunchTimeout);
        }
    }

    /// Who waits for what on a device.
    fn stuck_on(&self, device: u32, calls: &[String]) -> Finding {
        let mut words = Vec::new();
        // Of whoever spins, else of whoever waits at a barrier for those who do.
        let mut first: Option<(bool, Place, Thread, Option<u64>)> = None;
        let blocks = || self.resident.iter().filter(|r| r.launch.device == device);
        for r in blocks() {
            for warp in &r.warps {
                for (op, group) in warp.positions(&r.launch) {
                    let thread = Thread {
                        device,
                        block: r.block.index,
                        thread: warp.thread_index(group.mask.trailing_zeros() as usize % 32),
                    };
                    let spins = !matches!(group.wait, Wait::Barrier(_) | Wait::Lanes);
                    let polled = warp.polled.clone().filter(|_| spins);
                    let better = first.as_ref().is_none_or(|(before, ..)| spins && !before);
                    if better {
                        let place = polled.as_ref().map_or(&op.place, |p| &p.place);
                        let address = polled.as_ref().map(|p| p.address);
                        first = Some((spins, (**place).clone(), thread, address));
                    }
                    if words.len() < MOST_WORDS {
                        let doing = match group.wait {
                            Wait::Barrier(id) => {
                                let (come, wanted) =
                                    r.block.barriers.progress(id, &r.existing, &r.live);
                                format!("wait at barrier {id} ({come} of {wanted} threads)")
                            }
                            Wait::Lanes => "wait for lanes".to_owned(),
                            _ => polled
                                .as_ref()
                                .map_or("spin".to_owned(), |p| self.awaited(p)),
                        };
                        words.push(format!(
                            "block {:?} warp {} lanes {:#x} {doing} at {}",
                            r.block.index, warp.index, group.mask, op.place
                        ));
                    }
                }
            }
        }
        let grids = self.grids.values().filter(|g| g.launch.device == device);
        let missing: u64 = grids.map(|g| g.waiting()).sum();
        if missing > 0 {
            words.push(format!(
                "{missing} {} not fit on the device beside the {} that wait",
                if missing == 1 {
                    "block does"
                } else {
                    "blocks do"
                },
                blocks().count()
            ));
        }
        // What stands behind the kernels in their streams might have released them.
        for stream in self
            .streams
            .values()
            .filter(|s| s.device == device && s.busy)
        {
            for (queued, _) in stream.queue.iter().take(2) {
                if let Queued::Command(Command::Kernel(launch)) = queued {
                    words.push(format!(
                        "{} stands behind it in its stream and cannot start",
                        launch.kernel.name
                    ));
                }
            }
        }
        if !calls.is_empty() {
            words.push(format!("the host waits in {}", calls.join(", ")));
        }
        let (place, thread, address) = match first {
            Some((_, place, thread, address)) => (Some(place), Some(thread), address),
            None => (None, None, None),
        };
        Finding {
            kind: Kind::Deadlock,
            place,
            thread,
            address,
            other: None,
            reason: None,
            message: format!("nothing can advance any more: {}", words.join("; ")),
        }
    }

    /// What a warp that spins reads: where it is, its value, and who wrote it.
    fn awaited(&self, polled: &Polled) -> String {
        let memory = &self.world.memory;
        let Some((base, allocation)) = memory.containing(polled.address) else {
            return format!("spin on {:#x}", polled.address);
        };
        let at = (polled.address - base) as usize;
        let bytes = (polled.bytes as usize)
            .min(8)
            .min(allocation.region.len() - at);
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&allocation.region.bytes()[at..at + bytes]);
        let place = if allocation.region.is_host() {
            "of the host".to_owned()
        } else {
            format!("of device {}", allocation.device)
        };
        let shadow = allocation.region.shadow.as_ref();
        let writer = shadow.and_then(|shadow| memory.race.last_writer(shadow, at as u32 / 4));
        format!(
            "spin on {:#x} in memory {place}, which is {}, {}",
            polled.address,
            u64::from_le_bytes(value),
            writer.map_or("which no kernel has written".to_owned(), |writer| {
                format!("last written by {writer}")
            })
        )
    }
}
