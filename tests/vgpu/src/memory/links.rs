//! What lies between the devices: who may reach whose memory, over which kind of link, and what
//! is wrong with it.
//!
//! `VGPU_TOPOLOGY` describes the machine in clauses separated by `;`:
//!
//! ```text
//! nvswitch              every pair is linked by NVLink (the default)
//! pcie                  every pair not linked otherwise reaches each other over PCIe
//! links:0-1,1-2         these pairs are linked by NVLink; without `pcie`, the others by nothing
//! no:0-3                this pair cannot reach each other
//! lossy:1>2             what device 1 writes into the memory of device 2 never arrives, though
//!                       the driver says that peer access works
//! dies:2@1000           device 2 dies at its 1000th operation
//! dies:1>2@50           the link dies at the 50th access of a thread of device 1 to the memory
//!                       of device 2
//! slow:2, slow:0>1      the scheduler gives the device, or accesses over the link, fewer turns
//! ```
//!
//! `a>b` is the way from device a to the memory of device b, `a-b` both ways; every clause but
//! the first two takes a list.

use std::fmt;

use super::space::Allocation;
use crate::machine::Slow;

/// Most devices of a machine.
pub const MAX_DEVICES: u32 = 16;

/// What a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fabric {
    /// None: the two cannot reach each other.
    #[default]
    None,
    /// No atomic operations; a dead device reads as ones.
    Pcie,
    /// Atomic operations; an access to a dead device ends the context.
    NvLink,
}

/// The way from one device to the memory of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Link {
    fabric: Fabric,
    lossy: bool,
    slow: bool,
    dies_at: Option<u64>,
}

/// A machine as `VGPU_TOPOLOGY` describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    clauses: Vec<Clause>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clause {
    /// All pairs that have no link yet.
    All(Fabric),
    Pair(u32, u32, Change),
    Device(u32, Change),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Fabric(Fabric),
    Lossy,
    Dies(u64),
    Slow,
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            clauses: vec![Clause::All(Fabric::NvLink)],
        }
    }
}

/// What is wrong with a `VGPU_TOPOLOGY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopologyError(String);

impl fmt::Display for TopologyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TopologyError {}

impl std::str::FromStr for Topology {
    type Err = TopologyError;

    fn from_str(text: &str) -> Result<Self, TopologyError> {
        let mut clauses = Vec::new();
        let mut default = None;
        let words = text.split(';').map(str::trim).filter(|c| !c.is_empty());
        for clause in words {
            let (name, list) = clause.split_once(':').unwrap_or((clause, ""));
            let bad = |item: &str| {
                TopologyError(format!(
                    "'{item}' in '{clause}' is not understood: expected nvswitch, pcie, \
                     links:0-1, no:0-1, lossy:0>1, dies:0@100, dies:0>1@100, slow:0 or slow:0>1"
                ))
            };
            match (name.trim(), list.is_empty()) {
                ("nvswitch", true) => {
                    default = Some(Fabric::NvLink);
                    continue;
                }
                ("pcie", true) => {
                    default = Some(Fabric::Pcie);
                    continue;
                }
                ("links" | "no" | "lossy" | "dies" | "slow", false) => {}
                _ => return Err(bad(clause)),
            }
            for item in list.split(',').map(str::trim) {
                let (place, change) = match name.trim() {
                    "links" => (item, Change::Fabric(Fabric::NvLink)),
                    "no" => (item, Change::Fabric(Fabric::None)),
                    "lossy" => (item, Change::Lossy),
                    "slow" => (item, Change::Slow),
                    _ => {
                        let (place, at) = item.split_once('@').ok_or_else(|| bad(item))?;
                        (
                            place,
                            Change::Dies(at.trim().parse().map_err(|_| bad(item))?),
                        )
                    }
                };
                let device = |text: &str| -> Result<u32, TopologyError> {
                    let number = text.trim().parse().map_err(|_| bad(item))?;
                    if number < MAX_DEVICES {
                        Ok(number)
                    } else {
                        Err(bad(item))
                    }
                };
                let both_ways = place.split_once('-');
                match (place.split_once('>').or(both_ways), change) {
                    (Some(_), Change::Fabric(_)) if both_ways.is_none() => return Err(bad(item)),
                    (Some((a, b)), change) => {
                        let (a, b) = (device(a)?, device(b)?);
                        if a == b {
                            return Err(bad(item));
                        }
                        clauses.push(Clause::Pair(a, b, change));
                        if both_ways.is_some() {
                            clauses.push(Clause::Pair(b, a, change));
                        }
                    }
                    (None, Change::Dies(_) | Change::Slow) => {
                        clauses.push(Clause::Device(device(place)?, change));
                    }
                    (None, _) => return Err(bad(item)),
                }
            }
        }
        // What is said of single pairs goes before what is said of all.
        let links = |c: &Clause| matches!(c, Clause::Pair(_, _, Change::Fabric(Fabric::NvLink)));
        let meshed = clauses.iter().any(links);
        let default = default.unwrap_or(if meshed { Fabric::None } else { Fabric::NvLink });
        clauses.insert(0, Clause::All(default));
        Ok(Self { clauses })
    }
}

/// How an access across a link ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crossing {
    /// It arrives.
    Arrives,
    /// The device may not make it.
    Barred,
    /// It goes nowhere: a write is lost, a read gives ones.
    Lost,
    /// The accessing context dies of it.
    Fatal,
}

/// Who may reach an allocation, besides its own device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reach {
    /// Devices with peer access to its device.
    #[default]
    Peers,
    /// Every device: memory of the host.
    Everyone,
    /// These devices, as bits, whatever peer access there is: memory of a pool.
    Devices(u64),
}

/// The links of a machine, and what goes over them.
#[derive(Debug)]
pub struct Links {
    devices: u32,
    links: Vec<Link>,
    /// Accesses of threads over each link that is to die.
    used: Vec<u64>,
    /// Whose memory a device's kernels may reach, as bits: what peer access was enabled for.
    enabled: Vec<u64>,
    /// Of each device, the devices whose memory its accesses reach without further questions.
    plain: Vec<u64>,
    dead: u64,
    slow: u64,
    dies_at: Vec<Option<u64>>,
    /// Accesses over slow links so far.
    pub slow_crossings: u64,
}

impl Links {
    /// Of a machine with so many devices.
    pub fn new(topology: &Topology, devices: u32) -> Self {
        let n = devices as usize;
        let mut links = Self {
            devices,
            links: vec![Link::default(); n * n],
            used: vec![0; n * n],
            enabled: vec![0; n],
            plain: vec![0; n],
            dead: 0,
            slow: 0,
            dies_at: vec![None; n],
            slow_crossings: 0,
        };
        for clause in &topology.clauses {
            match *clause {
                Clause::All(fabric) => links.links.iter_mut().for_each(|l| l.fabric = fabric),
                Clause::Pair(a, b, change) if a < devices && b < devices => {
                    let link = &mut links.links[a as usize * n + b as usize];
                    match change {
                        Change::Fabric(fabric) => link.fabric = fabric,
                        Change::Lossy => link.lossy = true,
                        Change::Dies(at) => link.dies_at = Some(at),
                        Change::Slow => link.slow = true,
                    }
                }
                Clause::Device(a, Change::Dies(at)) if a < devices => {
                    links.dies_at[a as usize] = Some(at);
                }
                Clause::Device(a, _) if a < devices => links.slow |= 1 << a,
                Clause::Pair(..) | Clause::Device(..) => {}
            }
        }
        links
    }

    fn at(&self, from: u32, to: u32) -> usize {
        (from * self.devices + to) as usize
    }

    /// What links a device to another's memory.
    pub fn fabric(&self, from: u32, to: u32) -> Fabric {
        self.links[self.at(from, to)].fabric
    }

    /// Whether the driver lets kernels of one device access the memory of another once peer
    /// access is enabled.
    pub fn can_access(&self, from: u32, to: u32) -> bool {
        from != to && self.fabric(from, to) != Fabric::None
    }

    /// Peer access of a device to another's memory is now enabled, or not.
    pub fn enable(&mut self, from: u32, to: u32, enabled: bool) {
        let bits = &mut self.enabled[from as usize];
        *bits = if enabled {
            *bits | 1 << to
        } else {
            *bits & !(1 << to)
        };
        self.refresh();
    }

    /// Whether peer access is enabled.
    pub fn is_enabled(&self, from: u32, to: u32) -> bool {
        self.enabled[from as usize] >> to & 1 != 0
    }

    fn refresh(&mut self) {
        for from in 0..self.devices {
            self.plain[from as usize] = (0..self.devices)
                .filter(|&to| {
                    let link = &self.links[self.at(from, to)];
                    self.is_enabled(from, to)
                        && !(link.lossy || link.slow || link.dies_at.is_some())
                        && link.fabric == Fabric::NvLink
                        && self.dead >> to & 1 == 0
                })
                .fold(0, |bits, to| bits | 1 << to);
        }
    }

    /// Whether an access by a device's kernel arrives, and nothing about it is out of the
    /// ordinary; otherwise [`cross`](Self::cross) has the answer.
    #[inline(always)]
    pub(super) fn is_plain(&self, from: u32, to: &Allocation) -> bool {
        to.device == from
            || match to.reach {
                Reach::Everyone => true,
                Reach::Peers => self.plain[from as usize] >> to.device & 1 != 0,
                Reach::Devices(_) => false,
            }
    }

    /// What becomes of one thread's access to the memory of another device.
    pub(super) fn cross(&mut self, from: u32, to: u32, reach: Reach, writes: bool) -> Crossing {
        if from == to || reach == Reach::Everyone {
            return Crossing::Arrives;
        }
        let allowed = match reach {
            Reach::Devices(devices) => devices >> from & 1 != 0,
            _ => self.is_enabled(from, to),
        };
        if !allowed {
            return Crossing::Barred;
        }
        let at = self.at(from, to);
        let link = self.links[at];
        self.used[at] += 1;
        self.slow_crossings += u64::from(link.slow);
        let dead = self.dead >> to & 1 != 0 || link.dies_at.is_some_and(|k| self.used[at] >= k);
        match link.fabric {
            Fabric::Pcie if dead => Crossing::Lost,
            _ if dead => Crossing::Fatal,
            _ if link.lossy && writes => Crossing::Lost,
            _ => Crossing::Arrives,
        }
    }

    /// Whether a copy by a device's engine into another's memory is lost: it crosses the link
    /// only where peer access is enabled, and goes through the host otherwise.
    pub fn loses_copy(&self, from: u32, to: u32) -> bool {
        from != to && self.is_enabled(from, to) && self.links[self.at(from, to)].lossy
    }

    /// What becomes of what a device's engine does to memory of another, or its own: it takes their
    /// link where peer access is enabled, and the way through the host otherwise.
    pub fn engine_crosses(&self, engine: u32, of: u32) -> Crossing {
        let dead = self.is_dead(of);
        if engine == of || !self.is_enabled(engine, of) {
            return if dead {
                Crossing::Fatal
            } else {
                Crossing::Arrives
            };
        }
        let at = self.at(engine, of);
        let link = self.links[at];
        let dead = dead || link.dies_at.is_some_and(|k| self.used[at] >= k);
        match link.fabric {
            Fabric::Pcie if dead => Crossing::Lost,
            _ if dead => Crossing::Fatal,
            _ => Crossing::Arrives,
        }
    }

    /// At which of its operations a device dies.
    pub fn dies_at(&self, device: u32) -> Option<u64> {
        self.dies_at[device as usize]
    }

    /// A device is dead from now on.
    pub fn kill(&mut self, device: u32) {
        self.dead |= 1 << device;
        self.refresh();
    }

    /// Whether a device has died.
    pub fn is_dead(&self, device: u32) -> bool {
        self.dead >> device & 1 != 0
    }

    /// Makes this slow, and nothing else.
    pub fn set_slow(&mut self, slow: Option<Slow>) {
        self.slow = 0;
        self.links.iter_mut().for_each(|link| link.slow = false);
        match slow {
            Some(Slow::Device(device)) if device < self.devices => self.slow = 1 << device,
            Some(Slow::Link(from, to)) if from.max(to) < self.devices => {
                let at = self.at(from, to);
                self.links[at].slow = true;
            }
            _ => {}
        }
        self.refresh();
    }

    /// The slow devices, as bits.
    pub fn slow(&self) -> u64 {
        self.slow
    }

    /// Whether some link or device is slow.
    pub fn any_slow(&self) -> bool {
        self.slow != 0 || self.links.iter().any(|l| l.slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(text: &str, devices: u32) -> Links {
        let topology: Topology = text.parse().expect("a topology");
        let mut links = Links::new(&topology, devices);
        for a in 0..devices {
            for b in (0..devices)
                .filter(|&b| links.can_access(a, b))
                .collect::<Vec<_>>()
            {
                links.enable(a, b, true);
            }
        }
        links
    }

    #[test]
    fn the_default_links_every_pair_and_no_device_to_itself() {
        let links = links("", 4);
        for a in 0..4 {
            for b in 0..4 {
                assert_eq!(links.can_access(a, b), a != b);
                assert_eq!(links.fabric(a, b), Fabric::NvLink);
            }
        }
    }

    #[test]
    fn a_partial_mesh_has_the_links_named_and_the_rest_by_pcie_if_asked() {
        let ring = links("links:0-1,1-2,2-3,3-0", 4);
        assert!(ring.can_access(0, 1) && ring.can_access(1, 0) && ring.can_access(0, 3));
        assert!(!ring.can_access(0, 2) && !ring.can_access(1, 3));
        let mixed = links("links:0-1; pcie; no:0-3", 4);
        assert_eq!(mixed.fabric(1, 0), Fabric::NvLink);
        assert_eq!(mixed.fabric(0, 2), Fabric::Pcie);
        assert_eq!(mixed.fabric(3, 0), Fabric::None);
    }

    #[test]
    fn writes_are_lost_one_way_only() {
        let mut links = links("lossy:1>2", 3);
        assert_eq!(links.cross(1, 2, Reach::Peers, true), Crossing::Lost);
        assert_eq!(links.cross(1, 2, Reach::Peers, false), Crossing::Arrives);
        assert_eq!(links.cross(2, 1, Reach::Peers, true), Crossing::Arrives);
        assert!(links.loses_copy(1, 2) && !links.loses_copy(2, 1));
    }

    #[test]
    fn a_link_dies_at_the_access_named() {
        for (base, end) in [("nvswitch", Crossing::Fatal), ("pcie", Crossing::Lost)] {
            let mut links = links(&format!("{base}; dies:0>1@3"), 2);
            let mut cross = || links.cross(0, 1, Reach::Peers, false);
            let seen = [cross(), cross(), cross(), cross()];
            assert_eq!(seen, [Crossing::Arrives, Crossing::Arrives, end, end]);
        }
    }

    #[test]
    fn a_pool_asks_for_its_own_permission() {
        let mut links = links("", 2);
        let own = Reach::Devices(0b01);
        assert_eq!(links.cross(1, 0, own, false), Crossing::Barred);
        let both = Reach::Devices(0b11);
        assert_eq!(links.cross(1, 0, both, false), Crossing::Arrives);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for text in [
            "mesh",
            "links:",
            "links:0",
            "links:0>1",
            "no:1-1",
            "dies:2",
            "lossy:0>99",
        ] {
            let error = text.parse::<Topology>().expect_err(text).to_string();
            assert!(error.contains("is not understood"), "{error}");
        }
    }
}
