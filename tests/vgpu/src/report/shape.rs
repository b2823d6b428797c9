//! What a report says, as data: made here, read back by whoever tests with it (`tests/driver`
//! compiles this file too, so it depends on serde alone).
//!
//! Everything counts what was asked for, not what a cache would make of it. Loads that a polling
//! loop repeats are `spins`, and in no other figure: how many there are depends on the schedule,
//! and the rest does not (where a kernel's own way does not depend on timing).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// All that was counted since counting began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The kernels, in the order they began.
    pub launches: Vec<Launch>,
    /// The sum over the launches.
    pub total: Counts,
    /// What copies moved, by where from and where to.
    pub copies: Vec<Copied>,
    /// What kernels read and wrote, by allocation; those that none touched are left out.
    pub memory: Vec<Touched>,
}

/// A kernel that ran, or as much of it as has run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Unique in the process, growing.
    pub id: u32,
    /// The kernel's (mangled) name.
    pub kernel: String,
    /// The device's ordinal.
    pub device: u32,
    /// `gridDim`
    pub grid: [u32; 3],
    /// `blockDim`
    pub block: [u32; 3],
    /// What it did.
    pub counts: Counts,
}

/// What kernels did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Instructions of threads: those whose guard was true.
    pub lane_instructions: u64,
    /// The same by instruction, as it stands in the PTX.
    pub instructions: BTreeMap<String, Executed>,
    /// Loads from global memory, own, peers' or the host's; `.const` is not among it.
    pub global_loads: Global,
    /// Stores to global memory.
    pub global_stores: Global,
    /// Atomic operations on global memory, failed compare-and-swaps included.
    pub global_atomics: Global,
    /// Loads from shared memory.
    pub shared_loads: Shared,
    /// Stores to shared memory.
    pub shared_stores: Shared,
    /// Atomic operations on shared memory.
    pub shared_atomics: Atomics,
    /// Barriers of a block that completed: `__syncthreads` counts one for each block.
    pub barriers: u64,
    /// By operation, order and scope, how many threads did it: `fence.sc.sys`, `ld.acquire.gpu`,
    /// `st.release.sys`, `atom.relaxed.gpu`, `ld.volatile.sys`. `membar` is `fence.sc`.
    pub strong: BTreeMap<String, u64>,
    /// Strong loads by threads that repeat one by the same instruction from the same address,
    /// with nothing between but other strong loads: the turns of polling loops after the first.
    pub spins: u64,
    /// What went over links, by the device whose kernels did it and whose memory it was.
    pub links: Vec<Link>,
}

/// How often an instruction was executed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executed {
    /// By warps, in whole or in part.
    pub warps: u64,
    /// By threads.
    pub lanes: u64,
}

/// Accesses to global memory of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Global {
    /// Instructions of warps.
    pub requests: u64,
    /// Accesses of threads.
    pub threads: u64,
    /// Bytes the threads asked for: two that ask for the same byte count twice.
    pub bytes: u64,
    /// Sectors of 32 bytes that the requests touched, each once a request. A request whose
    /// threads ask for consecutive bytes touches as many as its bytes fill.
    pub sectors: u64,
}

/// Accesses to shared memory of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// Instructions of warps.
    pub requests: u64,
    /// Accesses of threads.
    pub threads: u64,
    /// Bytes the threads asked for.
    pub bytes: u64,
    /// Passes that the 32 banks of 4 bytes need. A request of up to 4 bytes a thread is one part;
    /// one of 8, 16 or 32 bytes a thread is taken in parts of 16, 8 or 4 threads. Each part needs
    /// as many passes as the most words that its threads ask of one bank; threads that ask for the
    /// same word are served together.
    pub wavefronts: u64,
    /// Passes beyond one for each part: what bank conflicts cost.
    pub conflicts: u64,
}

/// Atomic operations on shared memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Atomics {
    /// Instructions of warps.
    pub requests: u64,
    /// Operations of threads.
    pub threads: u64,
    /// Bytes the threads asked for.
    pub bytes: u64,
}

/// What kernels of one device asked of the memory of another, or of the host's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The device of the kernels.
    pub from: u32,
    /// The device whose memory it was; none for memory of the host.
    pub to: Option<u32>,
    /// Bytes loaded, which travel against the direction of the link.
    pub read: u64,
    /// Bytes stored.
    pub written: u64,
    /// Bytes changed atomically.
    pub atomics: u64,
    /// Bytes that polling loops loaded again.
    pub spun: u64,
}

/// What copies moved between two places; fills are not among it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// The device whose memory was read; none for memory of the host.
    pub from: Option<u32>,
    /// The device whose memory was written; none for memory of the host.
    pub to: Option<u32>,
    /// Copies. One between devices without peer access goes through the host and counts on both
    /// ways.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What kernels, of any device, did to the bytes of an allocation, or of a part of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// The first byte.
    pub address: u64,
    /// How many there are.
    pub bytes: u64,
    /// Whose memory it is; none for the host's.
    pub device: Option<u32>,
    /// Bytes read, each as often as it was. Atomic operations read and write.
    pub read: u64,
    /// Bytes read at least once: equal to `read` where none was read twice.
    pub read_distinct: u64,
    /// Bytes written, each as often as it was.
    pub written: u64,
    /// Bytes written at least once.
    pub written_distinct: u64,
}

impl Report {
    /// The launches of a kernel, by its whole name.
    pub fn of<'a>(&'a self, kernel: &'a str) -> impl Iterator<Item = &'a Launch> {
        self.launches.iter().filter(move |l| l.kernel == kernel)
    }

    /// Bytes that travelled from one place's memory towards another's (none is the host): what
    /// kernels there stored and changed here, what kernels here loaded from there, and what copies
    /// moved.
    pub fn moved(&self, from: Option<u32>, to: Option<u32>) -> u64 {
        let by_copies = self.copies.iter().filter(|c| (c.from, c.to) == (from, to));
        let by_kernels = self.total.links.iter().map(|link| {
            let there = (Some(link.from), link.to);
            match () {
                () if there == (from, to) => link.written + link.atomics,
                () if there == (to, from) => link.read,
                () => 0,
            }
        });
        by_copies.map(|c| c.bytes).sum::<u64>() + by_kernels.sum::<u64>()
    }
}

impl Counts {
    /// How many threads did a strong operation or fence: see [`strong`](Self::strong).
    pub fn strong(&self, name: &str) -> u64 {
        self.strong.get(name).copied().unwrap_or(0)
    }

    /// Fences of every kind and scope, by thread.
    pub fn fences(&self) -> u64 {
        let fences = self.strong.iter().filter(|(n, _)| n.starts_with("fence."));
        fences.map(|(_, n)| n).sum()
    }

    /// How often threads executed instructions whose text begins so: `ld.global`, `fma.`.
    pub fn executed(&self, prefix: &str) -> u64 {
        let named = |(name, _): &(&String, &Executed)| name.starts_with(prefix);
        self.instructions
            .iter()
            .filter(named)
            .map(|(_, e)| e.lanes)
            .sum()
    }

    /// What went over the link from a device's kernels to a memory.
    pub fn link(&self, from: u32, to: Option<u32>) -> Link {
        let found = self.links.iter().find(|l| (l.from, l.to) == (from, to));
        let none = Link {
            from,
            to,
            ..Link::default()
        };
        found.copied().unwrap_or(none)
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Counts) {
        self.lane_instructions += other.lane_instructions;
        for (name, n) in &other.instructions {
            let own = self.instructions.entry(name.clone()).or_default();
            own.warps += n.warps;
            own.lanes += n.lanes;
        }
        for (own, other) in [
            (&mut self.global_loads, &other.global_loads),
            (&mut self.global_stores, &other.global_stores),
            (&mut self.global_atomics, &other.global_atomics),
        ] {
            own.requests += other.requests;
            own.threads += other.threads;
            own.bytes += other.bytes;
            own.sectors += other.sectors;
        }
        for (own, other) in [
            (&mut self.shared_loads, &other.shared_loads),
            (&mut self.shared_stores, &other.shared_stores),
        ] {
            own.requests += other.requests;
            own.threads += other.threads;
            own.bytes += other.bytes;
            own.wavefronts += other.wavefronts;
            own.conflicts += other.conflicts;
        }
        self.shared_atomics.requests += other.shared_atomics.requests;
        self.shared_atomics.threads += other.shared_atomics.threads;
        self.shared_atomics.bytes += other.shared_atomics.bytes;
        self.barriers += other.barriers;
        for (name, n) in &other.strong {
            *self.strong.entry(name.clone()).or_default() += n;
        }
        self.spins += other.spins;
        for link in &other.links {
            let own = self.link_mut(link.from, link.to);
            own.read += link.read;
            own.written += link.written;
            own.atomics += link.atomics;
            own.spun += link.spun;
        }
    }

    /// What went over a link, to be counted up. Links stand in order.
    pub(crate) fn link_mut(&mut self, from: u32, to: Option<u32>) -> &mut Link {
        let found = self
            .links
            .binary_search_by_key(&(from, to), |l| (l.from, l.to));
        let at = found.unwrap_or_else(|at| {
            let new = Link {
                from,
                to,
                ..Link::default()
            };
            self.links.insert(at, new);
            at
        });
        &mut self.links[at]
    }
}
