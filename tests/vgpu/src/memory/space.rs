//! Allocations and accesses to them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::links::{Crossing, Fabric, Links, Reach};
use super::region::Region;
use super::{
    Access, Data, FRAME_PARAMS, LOCAL_WINDOW, Order, PARAM_WINDOW, SHARED_WINDOW, Space, space_of,
};
use crate::finding::{Fault, Finding, Kind};
use crate::machine::{Config, Cx, Polled, World};
use crate::race::{
    self, Agent, Conflict, CountAccess, Counter, FlagAccess, Memo, Race, Row, StreamClock,
};
use crate::registers::{LANES, for_lanes, lanes};

/// The first address of device 0.
const FIRST_ADDRESS: u64 = 0x1000_0000_0000;
/// Addresses of one device.
const DEVICE_WINDOW: u64 = 1 << 40;
/// Between allocations, so that a small step beyond one is outside all.
const GAP: u64 = 512;
/// What the driver promises of an allocation's first address.
const ALIGNMENT: u64 = 512;
/// Freed allocations remembered.
const MOST_FREED: usize = 1 << 16;

/// A stretch of device or host memory that somebody asked for.
#[derive(Debug)]
pub struct Allocation {
    /// The device it is on, or whose context it was made in.
    pub device: u32,
    /// A `.const` variable: kernels may not write it.
    pub constant: bool,
    /// Part of a module: `free` is not for it.
    pub variable: bool,
    /// The devices that may access it besides its own.
    pub reach: Reach,
    /// The bytes, exactly as many as were asked for, and what is known of them.
    pub region: Region,
}

/// Why a request of the host cannot be met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryError(pub String);

/// The memory of all devices.
#[derive(Debug)]
pub struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    /// Freed, with their sizes.
    freed: BTreeMap<u64, u64>,
    /// The next free address of each device.
    next: Vec<u64>,
    changes: u64,
    /// What lies between the devices.
    pub links: Links,
    /// The tables of the race checks.
    pub race: Race,
    /// What the host's copies and fills did wrong.
    pub findings: Vec<Finding>,
}

/// A block's shared memory.
#[derive(Debug, Default)]
pub struct SharedMemory {
    region: Region,
}

impl SharedMemory {
    /// `bytes` that nobody has written.
    pub fn new(bytes: u32, races: bool) -> Self {
        Self {
            region: Region::of_block(bytes as usize, races).unwrap_or_default(),
        }
    }
}

impl Memory {
    /// Nothing allocated.
    pub fn new(config: &Config) -> Self {
        Self {
            allocations: BTreeMap::new(),
            freed: BTreeMap::new(),
            next: (0..u64::from(config.devices))
                .map(|device| FIRST_ADDRESS + device * DEVICE_WINDOW)
                .collect(),
            changes: 0,
            links: Links::new(&config.topology, config.devices),
            race: Race::new(
                config.checks.contains(&Kind::Race),
                config.stale,
                config.seed,
            ),
            findings: Vec::new(),
        }
    }

    /// Counts the writes that changed a value: whoever spins can only be released by one.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Whose accesses the host calls that follow are: a stream's, in its order.
    pub fn set_actor(&mut self, stream: u32, clock: &StreamClock) {
        self.race.start_host(stream, clock);
    }

    /// The host calls that follow are nobody's in particular.
    pub fn clear_actor(&mut self) {
        self.race.end_host();
    }

    /// `bytes` on a device; the address.
    pub fn allocate(&mut self, device: u32, bytes: u64) -> Result<u64, MemoryError> {
        self.place(device, bytes, ALIGNMENT, false, false)
    }

    /// Room for a module's variable; nobody but its kernels and `cuMemcpy` may write it, and
    /// kernels may not when it is constant.
    pub fn allocate_variable(
        &mut self,
        device: u32,
        bytes: u64,
        align: u64,
        constant: bool,
    ) -> Result<u64, MemoryError> {
        self.place(device, bytes, align.max(ALIGNMENT), constant, true)
    }

    fn place(
        &mut self,
        device: u32,
        bytes: u64,
        align: u64,
        constant: bool,
        variable: bool,
    ) -> Result<u64, MemoryError> {
        let none = || MemoryError(format!("there is no room for {bytes} bytes"));
        let next = self.next.get_mut(device as usize).ok_or_else(none)?;
        let end = FIRST_ADDRESS + (u64::from(device) + 1) * DEVICE_WINDOW;
        let at = next.checked_next_multiple_of(align).ok_or_else(none)?;
        let after = at
            .checked_add(bytes)
            .and_then(|a| a.checked_add(GAP))
            .filter(|&a| a <= end)
            .ok_or_else(none)?;
        let size = usize::try_from(bytes).map_err(|_| none())?;
        let region = Region::new(size, self.race.is_on()).ok_or_else(none)?;
        *next = after;
        let allocation = Allocation {
            device,
            constant,
            variable,
            reach: Reach::Peers,
            region,
        };
        self.allocations.insert(at, allocation);
        Ok(at)
    }

    /// Makes memory of the host accessible to the devices, at its own address.
    ///
    /// # Safety
    /// The memory must stay valid until it is freed here.
    pub unsafe fn map_host(&mut self, at: *mut u8, bytes: usize, device: u32) {
        // SAFETY: as promised by the caller.
        let region = unsafe { Region::of_host(at, bytes, self.race.is_on()) };
        let allocation = Allocation {
            device,
            constant: false,
            variable: false,
            reach: Reach::Everyone,
            region,
        };
        self.freed.remove(&(at as u64));
        self.allocations.insert(at as u64, allocation);
    }

    /// Changes which devices may access an allocation, by its first address: for pools, whose
    /// memory peer access does not cover.
    pub fn set_reach(&mut self, address: u64, reach: Reach) {
        if let Some(allocation) = self.allocations.get_mut(&address) {
            allocation.reach = reach;
        }
    }

    /// Writes a variable's initial value, constants included.
    pub fn write_image(&mut self, address: u64, image: &[u8]) -> Result<(), MemoryError> {
        self.write(address, image)
    }

    /// Whether an address lies in a `.const` variable.
    pub fn is_constant(&self, address: u64) -> bool {
        self.containing(address).is_some_and(|(_, a)| a.constant)
    }

    /// The allocation an address lies in, and where that begins.
    pub fn containing(&self, address: u64) -> Option<(u64, &Allocation)> {
        let (&base, allocation) = self.allocations.range(..=address).next_back()?;
        (address - base < allocation.region.len().max(1) as u64).then_some((base, allocation))
    }

    /// Whether an address lies where the devices' memory does, allocated or not.
    pub fn is_of_devices(&self, address: u64) -> bool {
        let (first, end, _) = self.addresses();
        (first..end).contains(&address)
    }

    /// The addresses of the devices' memory, from the first to before the last, and how many each
    /// of them has.
    pub fn addresses(&self) -> (u64, u64, u64) {
        let end = FIRST_ADDRESS + self.next.len() as u64 * DEVICE_WINDOW;
        (FIRST_ADDRESS, end, DEVICE_WINDOW)
    }

    /// Whether any allocation has a byte between two addresses, both included.
    pub fn is_used(&self, first: u64, last: u64) -> bool {
        self.containing(first).is_some() || self.allocations.range(first..=last).next().is_some()
    }

    /// Frees an allocation by its first address.
    pub fn free(&mut self, address: u64) -> Result<Allocation, MemoryError> {
        let Some(allocation) = self.allocations.remove(&address) else {
            return Err(MemoryError(self.whereabouts(address)));
        };
        self.freed.insert(address, allocation.region.len() as u64);
        if self.freed.len() > MOST_FREED {
            self.freed.pop_first();
        }
        Ok(allocation)
    }

    /// What lies at an address, in words.
    pub fn whereabouts(&self, address: u64) -> String {
        if let Some((base, allocation)) = self.allocations.range(..=address).next_back() {
            let (offset, len) = (address - base, allocation.region.len() as u64);
            if offset < len {
                return format!("byte {offset} of an allocation of {len} at {base:#x}");
            }
            let freed_after = self
                .freed
                .range((Bound::Excluded(*base), Bound::Included(address)))
                .next_back();
            if offset - len < (1 << 20) && freed_after.is_none() {
                return format!(
                    "{} bytes beyond the end of an allocation of {len} at {base:#x}",
                    offset - len
                );
            }
        }
        if let Some((base, len)) = self.freed_at(address) {
            return format!(
                "byte {} of an allocation of {len} at {base:#x} that was freed",
                address - base
            );
        }
        if let Some((base, _)) = self.allocations.range(address..).next()
            && base - address < 4096
        {
            return format!(
                "{} bytes before the allocation at {base:#x}",
                base - address
            );
        }
        "in no allocation".to_owned()
    }

    fn freed_at(&self, address: u64) -> Option<(u64, u64)> {
        let (&base, &len) = self.freed.range(..=address).next_back()?;
        (address - base < len).then_some((base, len))
    }

    fn find(&self, address: u64, len: usize) -> Result<(u64, &Allocation), MemoryError> {
        let found = self.containing(address);
        found
            .filter(|(base, a)| len <= a.region.len() - (address - base) as usize)
            .ok_or_else(|| {
                MemoryError(format!(
                    "{len} bytes at {address:#x}: {}",
                    self.whereabouts(match found {
                        Some(_) => address.saturating_add(len as u64),
                        None => address,
                    })
                ))
            })
    }

    /// Whether `len` bytes from `address` lie in one allocation.
    pub fn check(&self, address: u64, len: usize) -> Result<(), MemoryError> {
        self.find(address, len).map(|_| ())
    }

    fn host_access(&mut self, address: u64, len: usize, writes: bool) -> Result<(), MemoryError> {
        let (base, _) = self.find(address, len)?;
        let at = (address - base) as usize;
        let Some(allocation) = self.allocations.get_mut(&base) else {
            return Ok(());
        };
        if let Some(shadow) = &mut allocation.region.shadow {
            if let Some(conflict) = shadow.host(&mut self.race, at, at + len, writes) {
                let finding = race_finding(&self.race, &conflict, address, writes);
                self.findings.push(finding);
            }
            if self.race.host_is_nobody() && writes {
                shadow.forget(at, at + len);
            }
        }
        if writes && !allocation.region.flags.is_empty() {
            allocation.region.flags.forget(at as u32, (at + len) as u32);
        }
        Ok(())
    }

    /// Reads for the host.
    pub fn read(&mut self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        if out.is_empty() {
            return Ok(());
        }
        self.host_access(address, out.len(), false)?;
        let (base, allocation) = self.find(address, out.len())?;
        let at = (address - base) as usize;
        out.copy_from_slice(&allocation.region.bytes()[at..at + out.len()]);
        Ok(())
    }

    /// Writes for the host.
    pub fn write(&mut self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        if data.is_empty() {
            return Ok(());
        }
        self.host_access(address, data.len(), true)?;
        let (base, _) = self.find(address, data.len())?;
        let at = (address - base) as usize;
        if let Some(allocation) = self.allocations.get_mut(&base) {
            allocation.region.bytes_mut()[at..at + data.len()].copy_from_slice(data);
            allocation.region.mark_range(at, at + data.len(), true);
            // Small writes of a stream are flags: they release all before them in the stream.
            if matches!(data.len(), 4 | 8) && at.is_multiple_of(data.len()) {
                let flags = &mut allocation.region.flags;
                self.race.stream_wrote(flags, at as u32, data);
            }
        }
        self.changes += 1;
        Ok(())
    }

    /// Copies between allocations; what nobody wrote stays unwritten.
    pub fn copy(&mut self, to: u64, from: u64, len: usize) -> Result<(), MemoryError> {
        if let (Some((_, source)), Some((_, target))) = (self.containing(from), self.containing(to))
            && self.links.loses_copy(source.device, target.device)
        {
            return Ok(());
        }
        let mut bytes = vec![0; len];
        self.read(from, &mut bytes)?;
        let unwritten: Vec<usize> = {
            let (base, allocation) = self.find(from, len.max(1))?;
            let at = (from - base) as usize;
            if allocation.region.is_written() {
                Vec::new()
            } else {
                (0..len)
                    .filter(|i| allocation.region.unwritten(at + i, 1) != 0)
                    .collect()
            }
        };
        self.write(to, &bytes)?;
        if !unwritten.is_empty() {
            let (base, _) = self.find(to, len)?;
            let at = (to - base) as usize;
            if let Some(allocation) = self.allocations.get_mut(&base) {
                for i in unwritten {
                    allocation.region.mark_range(at + i, at + i + 1, false);
                }
            }
        }
        Ok(())
    }
}

fn race_finding(race: &Race, conflict: &Conflict, address: u64, writes: bool) -> Finding {
    let doing = if writes { "written" } else { "read" };
    let (reason, message) = race.explain(conflict, doing, None);
    Finding {
        kind: Kind::Race,
        place: None,
        thread: None,
        address: Some(address),
        other: Some(race.describe(conflict.other, conflict.other_op)),
        reason: Some(reason),
        message,
    }
}

/// The space and the offset or address in it.
fn resolve(space: Space, address: u64) -> (Space, u64) {
    let space_then = match space {
        Space::Generic => space_of(address),
        other => return (other, address),
    };
    let offset = match space_then {
        Space::Shared => address - SHARED_WINDOW,
        Space::Local => address - LOCAL_WINDOW,
        Space::Param => address - PARAM_WINDOW,
        _ => address,
    };
    (space_then, offset)
}

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Load,
    Store,
    Atomic,
}

impl Doing {
    fn word(self) -> &'static str {
        match self {
            Doing::Load => "read",
            Doing::Store => "write",
            Doing::Atomic => "atomic operation",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Doing::Load => "read",
            Doing::Store => "written",
            Doing::Atomic => "changed atomically",
        }
    }
}

fn misaligned(cx: &mut Cx, lane: usize, address: u64, bytes: u32, doing: Doing) -> Fault {
    let message = format!(
        "a {} of {bytes} bytes at an address that is no multiple of {bytes}",
        doing.word()
    );
    cx.report(Kind::Misaligned, lane, Some(address), message);
    Fault::MisalignedAddress
}

fn outside(
    cx: &mut Cx,
    lane: usize,
    space: Space,
    address: u64,
    bytes: u32,
    doing: Doing,
) -> Fault {
    let memory = &cx.world.memory;
    let (kind, place) = match space {
        Space::Shared => {
            let len = cx.block.shared.region.len();
            let place = format!("offset {address} of the block's {len} bytes of shared memory");
            (Kind::OutOfBounds, place)
        }
        Space::Local => {
            let len = cx.warp.local.len();
            let place = format!("offset {address} of the thread's {len} bytes of local memory");
            (Kind::OutOfBounds, place)
        }
        Space::Param => (
            Kind::OutOfBounds,
            format!("offset {address} of the parameters"),
        ),
        _ => {
            let last = address.saturating_add(u64::from(bytes) - 1);
            let first_inside = memory.containing(address).is_some();
            let at = if first_inside { last } else { address };
            let kind = if memory.containing(at).is_none() && memory.freed_at(at).is_some() {
                Kind::UseAfterFree
            } else {
                Kind::OutOfBounds
            };
            (kind, memory.whereabouts(at))
        }
    };
    let message = format!("a {} of {bytes} bytes: {place}", doing.word());
    cx.report(kind, lane, Some(address), message);
    Fault::IllegalAddress
}

#[cold]
fn report_race(cx: &mut Cx, lane: usize, address: u64, conflict: &Conflict, doing: Doing) {
    if conflict.unwritten {
        cx.world.findings.excuse_unwritten(&cx.op.place.kernel);
    }
    if !cx.world.findings.is_first(Kind::Race, cx.op.id) {
        return;
    }
    let race = &cx.world.memory.race;
    let (reason, message) = race.explain(conflict, doing.done(), Some(&cx.block.clock.notes));
    let finding = Finding {
        kind: Kind::Race,
        place: Some((*cx.op.place).clone()),
        thread: Some(cx.thread(lane)),
        address: Some(address),
        other: Some(race.describe(conflict.other, conflict.other_op)),
        reason: Some(reason),
        message,
    };
    cx.world.findings.report(finding);
}

/// The bytes of a word that lie in `at..at + n`.
#[inline(always)]
fn byte_mask(word: u32, at: u32, n: u32) -> u8 {
    let from = at.saturating_sub(4 * word).min(4);
    let to = (at + n).saturating_sub(4 * word).min(4);
    ((1u32 << to) - (1u32 << from)) as u8
}

/// What a strong access moves, for the histories.
#[derive(Clone, Copy)]
struct Moved<'a> {
    /// What is in memory.
    old: &'a [u8],
    /// Bytes of it that nobody wrote.
    undef: u32,
    /// What comes there; None for a load, or if nobody knows.
    new: Option<&'a [u8]>,
    /// An atomic operation, though it may leave memory as it is.
    atomic: bool,
}

/// Race checks and history of one lane's access to a region. If a strong load gets older values
/// than memory holds, those; if a strong store comes before others in coherence order, what
/// memory holds after it.
#[inline(always)]
fn check_race(
    cx: &mut Cx,
    access: &Access,
    lane: usize,
    base: Option<u64>,
    offset: u32,
    doing: Doing,
    moved: Option<Moved>,
) -> Option<[u8; 32]> {
    let memory = &mut cx.world.memory;
    if !memory.race.is_on() {
        return None;
    }
    let region = match base {
        None => &mut cx.block.shared.region,
        Some(base) => &mut memory.allocations.get_mut(&base)?.region,
    };
    let mut agent = Agent {
        block: cx.block.uid,
        warp: cx.warp.index,
        lane,
        clock: &mut cx.warp.clock,
        launch: &cx.launch.clock,
        op: cx.op.id,
        element: access.element,
        bytes: access.bytes,
        strong: (access.order != Order::Weak).then_some(access.scope),
        non_coherent: access.non_coherent,
        memo: Memo::default(),
    };
    let conflict = check_region(region, &mut memory.race, &mut agent, access, offset, doing);
    let address = base.unwrap_or(SHARED_WINDOW) + u64::from(offset);
    let mut stale = None;
    match moved {
        Some(moved) if access.order != Order::Weak => {
            // A vector access is accesses to its elements, without an order among them.
            for at in (0..access.bytes).step_by(access.element as usize) {
                let flag = FlagAccess {
                    offset: offset + at,
                    address: address + u64::from(at),
                    bytes: access.element,
                    order: access.order,
                    scope: access.scope,
                    old: (moved.undef >> at == 0).then(|| integer(moved.old, at, access.element)),
                    reads: doing != Doing::Store,
                    modifies: moved.atomic,
                    new: moved.new.map(|new| integer(new, at, access.element)),
                    raced: conflict.is_some(),
                };
                let notes = &mut cx.block.clock.notes;
                let flags = &mut region.flags;
                if let Some(value) = flags.access(&mut memory.race, &mut agent, notes, flag) {
                    let all = stale.get_or_insert_with(|| {
                        let mut bytes = [0; 32];
                        let newest = moved.new.unwrap_or(moved.old);
                        bytes[..newest.len()].copy_from_slice(newest);
                        bytes
                    });
                    let (at, n) = (at as usize, access.element as usize);
                    all[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
                }
            }
        }
        _ if doing != Doing::Load && !region.flags.is_empty() => {
            region.flags.forget(offset, offset + access.bytes);
        }
        _ => {}
    }
    if stale.is_some() {
        // Whoever waits may still see something new.
        memory.changes += 1;
    }
    if let Some(conflict) = conflict {
        report_race(cx, lane, address, &conflict, doing);
    }
    stale
}

fn integer(bytes: &[u8], at: u32, n: u32) -> u64 {
    read_word(&bytes[at as usize..(at + n) as usize])
}

/// The race checks of [`check_race`], where the region is at hand.
#[inline(always)]
fn check_region(
    region: &mut Region,
    race: &mut Race,
    agent: &mut Agent,
    access: &Access,
    offset: u32,
    doing: Doing,
) -> Option<Conflict> {
    let shadow = region.shadow.as_mut()?;
    let mut conflict = None;
    for word in offset / 4..(offset + access.bytes).div_ceil(4) {
        let bytes = byte_mask(word, offset, access.bytes);
        let found = match doing {
            Doing::Load => shadow.read(race, agent, word, bytes),
            Doing::Store | Doing::Atomic => shadow.write(race, agent, word, bytes),
        };
        conflict = conflict.or(found);
    }
    if let Some(conflict) = &mut conflict {
        complete(
            conflict,
            region,
            offset as usize,
            access.bytes as usize,
            doing,
        );
    }
    conflict
}

/// Adds to a conflict what the memory of the race checks does not know.
fn complete(conflict: &mut Conflict, region: &Region, at: usize, bytes: usize, doing: Doing) {
    let unwritten = doing != Doing::Load && region.unwritten(at, bytes) != 0;
    conflict.unwritten = unwritten && !conflict.other_wrote;
    conflict.this_reads = doing != Doing::Store;
}

/// An access to a region that begins at `base`.
fn row_of<'a>(access: &Access<'a>, base: u64) -> Row<'a> {
    Row {
        mask: access.mask,
        addresses: access.addresses,
        base,
        bytes: access.bytes,
    }
}

/// The region in which all lanes of an access lie, its first address, and whether it is the
/// block's shared memory; None if they do not, or if anything is wrong with any of them, which
/// is then for the lane-by-lane path to report.
#[inline(always)]
fn common_region<'a>(
    world: &'a mut World,
    shared: &'a mut SharedMemory,
    access: &Access,
    writes: bool,
    device: u32,
) -> Option<(&'a mut Region, &'a mut Race, u64, bool)> {
    let first = access.addresses[access.mask.trailing_zeros() as usize & 31];
    let (mut low, mut high, mut bits) = (first, first, 0);
    for_lanes(access.mask, |lane| {
        let address = access.addresses[lane];
        low = low.min(address);
        high = high.max(address);
        bits |= address;
    });
    if bits & u64::from(access.bytes - 1) != 0 {
        return None;
    }
    let (space, _) = resolve(access.space, first);
    let memory = &mut world.memory;
    let (region, base, is_shared) = match space {
        Space::Shared => {
            let generic = access.space == Space::Generic;
            let base = if generic { SHARED_WINDOW } else { 0 };
            (&mut shared.region, base, true)
        }
        Space::Global | Space::Const | Space::Generic => {
            let (&base, allocation) = memory.allocations.range_mut(..=first).next_back()?;
            if writes && allocation.constant || !memory.links.is_plain(device, allocation) {
                return None;
            }
            (&mut allocation.region, base, false)
        }
        Space::Local | Space::Param => return None,
    };
    let inside = low >= base
        && high
            .checked_add(u64::from(access.bytes))
            .is_some_and(|end| end - base <= region.len() as u64);
    inside.then_some((region, &mut memory.race, base, is_shared))
}

/// Where the last access of a warp found its allocation: most lanes find theirs there too.
struct Found {
    base: u64,
    len: u64,
}

/// The allocation of an access, with its bounds checked.
#[inline(always)]
fn locate(cx: &Cx, last: &mut Option<Found>, address: u64, bytes: u32) -> Option<(u64, u64)> {
    if let Some(found) = last
        && address >= found.base
        && address - found.base + u64::from(bytes) <= found.len
    {
        return Some((found.base, address - found.base));
    }
    let (base, allocation) = cx.world.memory.containing(address)?;
    let len = allocation.region.len() as u64;
    *last = Some(Found { base, len });
    (address - base + u64::from(bytes) <= len).then_some((base, address - base))
}

/// Whether an access reaches the memory it is for, which may be another device's; if not, a write
/// is lost and a read gives ones.
fn arrives(cx: &mut Cx, lane: usize, base: u64, at: u64, doing: Doing) -> Result<bool, Fault> {
    let memory = &mut cx.world.memory;
    let from = cx.launch.device;
    let Some(allocation) = memory.allocations.get(&base) else {
        return Ok(true);
    };
    if memory.links.is_plain(from, allocation) {
        return Ok(true);
    }
    let (to, reach) = (allocation.device, allocation.reach);
    match memory.links.cross(from, to, reach, doing != Doing::Load) {
        Crossing::Arrives => {
            if doing == Doing::Atomic && memory.links.fabric(from, to) == Fabric::Pcie {
                let message = format!(
                    "an atomic operation on memory of device {to}, which device {from} reaches \
                     over PCIe, where it is not atomic"
                );
                cx.report(Kind::PeerAccess, lane, Some(at), message);
            }
            Ok(true)
        }
        Crossing::Lost => Ok(false),
        Crossing::Fatal => Err(Fault::NvlinkUncorrectable),
        Crossing::Barred => {
            let remedy = match reach {
                Reach::Devices(_) => "cuMemPoolSetAccess of its pool does not name the device",
                _ if memory.links.can_access(from, to) => {
                    "cuCtxEnablePeerAccess was not called for this direction"
                }
                _ => "the two devices cannot reach each other",
            };
            let message = format!(
                "a {} by device {from} of memory of device {to} without peer access: {remedy}",
                doing.word()
            );
            cx.report(Kind::PeerAccess, lane, Some(at), message);
            Err(Fault::IllegalAddress)
        }
    }
}

/// Remembers a strong read: whoever spins does so on one.
#[inline(always)]
fn poll(cx: &mut Cx, access: &Access) {
    if access.order != Order::Weak {
        let lane = access.mask.trailing_zeros() as usize % LANES;
        let (address, bytes) = (access.addresses[lane], access.bytes);
        match &mut cx.warp.polled {
            Some(polled) if Arc::ptr_eq(&polled.place, &cx.op.place) => {
                (polled.address, polled.bytes) = (address, bytes);
            }
            polled => {
                let place = cx.op.place.clone();
                *polled = Some(Polled {
                    address,
                    bytes,
                    place,
                });
            }
        }
        cx.world.polls += 1;
    }
}

fn note(cx: &mut Cx, access: &Access) {
    let race = &mut cx.world.memory.race;
    if race.is_on() {
        race.note(cx.op.id, &cx.op.place, access);
    }
}

/// Puts `n` bytes and their undefined bits into a lane of the data.
#[inline(always)]
fn put(data: &mut Data, lane: usize, bytes: &[u8], undef: u32) {
    for (w, chunk) in bytes.chunks(4).enumerate() {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        data.words[w][lane] = u32::from_le_bytes(word);
    }
    if undef != 0 {
        for i in 0..bytes.len() {
            data.undef[i / 4][i % 4] |= (undef >> i & 1) << lane;
        }
    }
}

/// 1, 2, 4 or 8 bytes as an integer. (A copy of a length known at run time only is a call.)
#[inline(always)]
fn read_word(bytes: &[u8]) -> u64 {
    match *bytes {
        [a] => a.into(),
        [a, b] => u16::from_le_bytes([a, b]).into(),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => 0,
    }
}

/// The other way round.
#[inline(always)]
fn write_word(bytes: &mut [u8], value: u64) {
    match bytes {
        [a] => *a = value as u8,
        [_, _] => bytes.copy_from_slice(&(value as u16).to_le_bytes()),
        [_, _, _, _] => bytes.copy_from_slice(&(value as u32).to_le_bytes()),
        [_, _, _, _, _, _, _, _] => bytes.copy_from_slice(&value.to_le_bytes()),
        _ => {}
    }
}

fn take(data: &Data, lane: usize, n: usize) -> ([u8; 32], u32) {
    let mut bytes = [0; 32];
    let mut undef = 0;
    for w in 0..n.div_ceil(4) {
        bytes[4 * w..4 * w + 4].copy_from_slice(&data.words[w][lane].to_le_bytes());
        for b in 0..4 {
            undef |= (data.undef[w][b] >> lane & 1) << (4 * w + b);
        }
    }
    (bytes, undef)
}

/// The values of all lanes, `W` words each.
#[inline(always)]
fn gather<const W: usize>(bytes: &[u8], base: u64, access: &Access, data: &mut Data) {
    for_lanes(access.mask, |lane| {
        let at = (access.addresses[lane] - base) as usize;
        let words = bytes[at..at + 4 * W].as_chunks::<4>().0;
        for (row, &word) in data.words.iter_mut().zip(words) {
            row[lane] = u32::from_le_bytes(word);
        }
    });
}

/// The other way round; how many words change.
#[inline(always)]
fn scatter<const W: usize>(bytes: &mut [u8], base: u64, access: &Access, data: &Data) -> u64 {
    let mut changes = 0;
    for_lanes(access.mask, |lane| {
        let at = (access.addresses[lane] - base) as usize;
        let words = bytes[at..at + 4 * W].as_chunks_mut::<4>().0;
        for (row, word) in data.words.iter().zip(words) {
            let new = row[lane].to_le_bytes();
            changes += u64::from(*word != new);
            *word = new;
        }
    });
    changes
}

/// A weak load whose lanes all lie in one region; false if they do not.
fn load_together(cx: &mut Cx, access: &Access, data: &mut Data) -> bool {
    let Some((region, race, base, is_shared)) = common_region(
        cx.world,
        &mut cx.block.shared,
        access,
        false,
        cx.launch.device,
    ) else {
        return false;
    };
    let n = access.bytes as usize;
    let mut found = None;
    if race.is_on()
        && let Some(shadow) = &mut region.shadow
    {
        let mut agent = Agent {
            block: cx.block.uid,
            warp: cx.warp.index,
            lane: 0,
            clock: &mut cx.warp.clock,
            launch: &cx.launch.clock,
            op: cx.op.id,
            element: access.element,
            bytes: access.bytes,
            strong: None,
            non_coherent: access.non_coherent,
            memo: Memo::default(),
        };
        found = shadow.read_row(race, &mut agent, &row_of(access, base));
    }
    if let Some((lane, conflict)) = &mut found {
        let at = (access.addresses[*lane] - base) as usize;
        complete(conflict, region, at, n, Doing::Load);
    }
    if n >= 4 {
        let bytes = region.bytes();
        match n {
            4 => gather::<1>(bytes, base, access, data),
            8 => gather::<2>(bytes, base, access, data),
            16 => gather::<4>(bytes, base, access, data),
            _ => gather::<8>(bytes, base, access, data),
        }
        if !region.is_written() {
            for lane in lanes(access.mask) {
                let at = (access.addresses[lane] - base) as usize;
                let undef = region.unwritten(at, n);
                for i in 0..n {
                    data.undef[i / 4][i % 4] |= (undef >> i & 1) << lane;
                }
            }
        }
    } else {
        let bytes = region.bytes();
        for_lanes(access.mask, |lane| {
            let at = (access.addresses[lane] - base) as usize;
            data.words[0][lane] = read_word(&bytes[at..at + n]) as u32;
        });
        if !region.is_written() {
            for lane in lanes(access.mask) {
                let at = (access.addresses[lane] - base) as usize;
                let undef = region.unwritten(at, n);
                for (i, plane) in data.undef[0].iter_mut().enumerate() {
                    *plane |= (undef >> i & 1) << lane;
                }
            }
        }
    }
    if let Some((lane, conflict)) = found {
        let window = if is_shared && base == 0 {
            SHARED_WINDOW
        } else {
            0
        };
        let address = access.addresses[lane] + window;
        report_race(cx, lane, address, &conflict, Doing::Load);
    }
    true
}

/// A weak store whose lanes all lie in one region and whose values are defined; false otherwise.
fn store_together(cx: &mut Cx, access: &Access, data: &Data) -> bool {
    let n = access.bytes as usize;
    let undef = data.undef[..n.div_ceil(4)].iter().flatten();
    if undef.fold(0, |all, plane| all | plane) & access.mask != 0 {
        return false;
    }
    let Some((region, race, base, is_shared)) = common_region(
        cx.world,
        &mut cx.block.shared,
        access,
        true,
        cx.launch.device,
    ) else {
        return false;
    };
    let mut found = None;
    if race.is_on()
        && let Some(shadow) = &mut region.shadow
    {
        let mut agent = Agent {
            block: cx.block.uid,
            warp: cx.warp.index,
            lane: 0,
            clock: &mut cx.warp.clock,
            launch: &cx.launch.clock,
            op: cx.op.id,
            element: access.element,
            bytes: access.bytes,
            strong: None,
            non_coherent: false,
            memo: Memo::default(),
        };
        found = shadow.write_row(race, &mut agent, &row_of(access, base));
        if !region.flags.is_empty() {
            for lane in lanes(access.mask) {
                let offset = (access.addresses[lane] - base) as u32;
                region.flags.forget(offset, offset + access.bytes);
            }
        }
    }
    if let Some((lane, conflict)) = &mut found {
        let at = (access.addresses[*lane] - base) as usize;
        complete(conflict, region, at, n, Doing::Store);
    }
    let bytes = region.bytes_mut();
    let changes = match n {
        4 => scatter::<1>(bytes, base, access, data),
        8 => scatter::<2>(bytes, base, access, data),
        16 => scatter::<4>(bytes, base, access, data),
        32 => scatter::<8>(bytes, base, access, data),
        _ => {
            let mut changes = 0;
            for lane in lanes(access.mask) {
                let at = (access.addresses[lane] - base) as usize;
                let target = &mut bytes[at..at + n];
                let new = u64::from(data.words[0][lane]) & (u64::MAX >> (64 - 8 * n));
                changes += u64::from(read_word(target) != new);
                write_word(target, new);
            }
            changes
        }
    };
    if !region.is_written() {
        for lane in lanes(access.mask) {
            region.mark((access.addresses[lane] - base) as usize, n, 0);
        }
    }
    cx.world.memory.changes += changes;
    if let Some((lane, conflict)) = found {
        let window = if is_shared && base == 0 {
            SHARED_WINDOW
        } else {
            0
        };
        let address = access.addresses[lane] + window;
        report_race(cx, lane, address, &conflict, Doing::Store);
    }
    true
}

/// The region at an address that was found there, or the block's shared memory.
fn region_at<'a>(cx: &'a mut Cx, base: Option<u64>) -> Option<&'a mut Region> {
    match base {
        None => Some(&mut cx.block.shared.region),
        Some(base) => {
            let allocation = cx.world.memory.allocations.get_mut(&base)?;
            Some(&mut allocation.region)
        }
    }
}

/// One lane's load from a region, inside of it.
fn load_one(
    cx: &mut Cx,
    access: &Access,
    data: &mut Data,
    lane: usize,
    base: Option<u64>,
    at: usize,
) {
    let n = access.bytes as usize;
    let mut bytes = [0; 32];
    let Some(region) = region_at(cx, base) else {
        return;
    };
    bytes[..n].copy_from_slice(&region.bytes()[at..at + n]);
    let undef = region.unwritten(at, n);
    let moved = Moved {
        old: &bytes[..n],
        undef,
        new: None,
        atomic: false,
    };
    let stale = check_race(cx, access, lane, base, at as u32, Doing::Load, Some(moved));
    put(data, lane, &stale.unwrap_or(bytes)[..n], undef);
}

/// One lane's store into a region, inside of it.
#[allow(clippy::too_many_arguments)]
fn store_one(
    cx: &mut Cx,
    access: &Access,
    lane: usize,
    base: Option<u64>,
    at: usize,
    new: &[u8],
    undef: u32,
    doing: Doing,
) {
    let n = new.len();
    let strong = access.order != Order::Weak;
    let mut old = [0; 32];
    let mut moved = None;
    if strong
        && undef == 0
        && let Some(region) = region_at(cx, base)
    {
        old[..n].copy_from_slice(&region.bytes()[at..at + n]);
        moved = Some(Moved {
            old: &old[..n],
            undef: region.unwritten(at, n),
            new: Some(new),
            atomic: false,
        });
    }
    let kept = check_race(cx, access, lane, base, at as u32, doing, moved);
    let new = kept.as_ref().map_or(new, |kept| &kept[..n]);
    let Some(region) = region_at(cx, base) else {
        return;
    };
    let target = &mut region.bytes_mut()[at..at + n];
    let changed = *target != *new;
    target.copy_from_slice(new);
    region.mark(at, n, undef);
    cx.world.memory.changes += u64::from(changed);
}

pub(super) fn load(cx: &mut Cx, access: &Access, data: &mut Data) -> Result<(), Fault> {
    let n = access.bytes as usize;
    let mut last = None;
    note(cx, access);
    poll(cx, access);
    if access.mask != 0 && access.order == Order::Weak && load_together(cx, access, data) {
        return Ok(());
    }
    for lane in lanes(access.mask) {
        let (space, at) = resolve(access.space, access.addresses[lane]);
        if at & u64::from(access.bytes - 1) != 0 {
            return Err(misaligned(cx, lane, at, access.bytes, Doing::Load));
        }
        match space {
            Space::Global | Space::Const | Space::Generic => {
                let Some((base, offset)) = locate(cx, &mut last, at, access.bytes) else {
                    return Err(outside(cx, lane, space, at, access.bytes, Doing::Load));
                };
                if !arrives(cx, lane, base, at, Doing::Load)? {
                    put(data, lane, &[0xff; 32][..n], 0);
                    continue;
                }
                load_one(cx, access, data, lane, Some(base), offset as usize);
            }
            Space::Shared => {
                if at + n as u64 > cx.block.shared.region.len() as u64 {
                    return Err(outside(cx, lane, space, at, access.bytes, Doing::Load));
                }
                load_one(cx, access, data, lane, None, at as usize);
            }
            Space::Param if at < FRAME_PARAMS => {
                let at = at as usize;
                match cx.launch.params.get(at..at + n) {
                    Some(source) => put(data, lane, source, 0),
                    None => {
                        let at = at as u64;
                        return Err(outside(cx, lane, space, at, access.bytes, Doing::Load));
                    }
                }
            }
            Space::Param | Space::Local => {
                let (memory, offset) = match space {
                    Space::Local => (&cx.warp.local, at),
                    _ => (&*cx.params, at - FRAME_PARAMS),
                };
                let mut bytes = [0u8; 32];
                let mut undef = 0;
                let mut inside = true;
                for (i, byte) in bytes[..n].iter_mut().enumerate() {
                    match memory.byte(lane, offset + i as u64) {
                        Some((value, undefined)) => {
                            *byte = value;
                            undef |= u32::from(undefined) << i;
                        }
                        None => inside = false,
                    }
                }
                if !inside {
                    return Err(outside(cx, lane, space, at, access.bytes, Doing::Load));
                }
                put(data, lane, &bytes[..n], undef);
            }
        }
    }
    Ok(())
}

pub(super) fn store(cx: &mut Cx, access: &Access, data: &Data) -> Result<(), Fault> {
    let n = access.bytes as usize;
    let mut last = None;
    note(cx, access);
    if access.mask != 0 && access.order == Order::Weak && store_together(cx, access, data) {
        return Ok(());
    }
    for lane in lanes(access.mask) {
        let (space, at) = resolve(access.space, access.addresses[lane]);
        if at & u64::from(access.bytes - 1) != 0 {
            return Err(misaligned(cx, lane, at, access.bytes, Doing::Store));
        }
        let (bytes, undef) = take(data, lane, n);
        match space {
            Space::Global | Space::Generic => {
                store_global(
                    cx,
                    access,
                    lane,
                    at,
                    &bytes[..n],
                    undef,
                    &mut last,
                    Doing::Store,
                )?;
            }
            Space::Shared => {
                if at + n as u64 > cx.block.shared.region.len() as u64 {
                    return Err(outside(cx, lane, space, at, access.bytes, Doing::Store));
                }
                let at = at as usize;
                store_one(cx, access, lane, None, at, &bytes[..n], undef, Doing::Store);
            }
            Space::Local => {
                for (i, &byte) in bytes[..n].iter().enumerate() {
                    let undefined = undef >> i & 1 != 0;
                    let offset = at + i as u64;
                    if !cx.warp.local.set_byte(lane, offset, byte, undefined) {
                        return Err(outside(cx, lane, space, at, access.bytes, Doing::Store));
                    }
                }
            }
            Space::Param if at >= FRAME_PARAMS => {
                for (i, &byte) in bytes[..n].iter().enumerate() {
                    let undefined = undef >> i & 1 != 0;
                    let offset = at - FRAME_PARAMS + i as u64;
                    if !cx.params.set_byte(lane, offset, byte, undefined) {
                        return Err(outside(cx, lane, space, at, access.bytes, Doing::Store));
                    }
                }
            }
            Space::Param | Space::Const => {
                let message = format!("a write of {n} bytes to the kernel's parameters");
                cx.report(Kind::ReadOnly, lane, Some(at), message);
                return Err(Fault::InvalidAddressSpace);
            }
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn store_global(
    cx: &mut Cx,
    access: &Access,
    lane: usize,
    at: u64,
    bytes: &[u8],
    undef: u32,
    last: &mut Option<Found>,
    doing: Doing,
) -> Result<(), Fault> {
    let n = bytes.len();
    let Some((base, offset)) = locate(cx, last, at, access.bytes) else {
        return Err(outside(cx, lane, Space::Global, at, access.bytes, doing));
    };
    if !arrives(cx, lane, base, at, doing)? {
        return Ok(());
    }
    if cx.world.memory.is_constant(at) {
        let message = format!("a {} of {n} bytes in a constant variable", doing.word());
        cx.report(Kind::ReadOnly, lane, Some(at), message);
        return Err(Fault::IllegalAddress);
    }
    if undef != 0 && cx.world.findings.is_first(Kind::Uninitialised, cx.op.id) {
        let message = format!(
            "a value nobody wrote (bytes {undef:#x} of {n}) goes into a result in global memory"
        );
        cx.report(Kind::Uninitialised, lane, Some(at), message);
    }
    let offset = offset as usize;
    store_one(cx, access, lane, Some(base), offset, bytes, undef, doing);
    Ok(())
}

/// Read-modify-writes in the simplest case, see [`race::count`]: from the first lane on, up to one
/// for which it is not as simple. The lanes for which it was.
fn count_together(
    cx: &mut Cx,
    access: &Access,
    old: &mut Data,
    update: &mut dyn FnMut(usize, u64) -> Option<u64>,
) -> u32 {
    if access.order != Order::Relaxed || access.bytes < 4 {
        return 0;
    }
    let (block, warp) = (&mut *cx.block, &*cx.warp);
    let (world, shared, device) = (&mut *cx.world, &mut block.shared, cx.launch.device);
    let found = common_region(world, shared, access, true, device);
    let Some((region, _, base, is_shared)) = found else {
        return 0;
    };
    let window = if is_shared && base == 0 {
        SHARED_WINDOW
    } else {
        0
    };
    let n = access.bytes as usize;
    let (mut done, mut changes) = (0, 0);
    for lane in lanes(access.mask) {
        let address = access.addresses[lane];
        let at = (address - base) as usize;
        let value = read_word(&region.bytes()[at..at + n]);
        let counter = Counter::new(
            block.uid,
            warp.index,
            lane,
            &warp.clock,
            cx.op.id,
            access.scope,
        );
        let (Some(counter), Some(new), 0) = (counter, update(lane, value), region.unwritten(at, n))
        else {
            break;
        };
        let new = new & (u64::MAX >> (64 - 8 * n));
        let count = CountAccess {
            offset: at as u32,
            address: address + window,
            bytes: access.bytes,
            old: value,
            new,
        };
        let Some(shadow) = &mut region.shadow else {
            break;
        };
        let notes = &mut block.clock.notes;
        if !race::count(shadow, &mut region.flags, notes, &counter, &count) {
            break;
        }
        write_word(&mut region.bytes_mut()[at..at + n], new);
        changes += u64::from(new != value);
        old.words[0][lane] = value as u32;
        old.words[1][lane] = (value >> 32) as u32;
        done |= 1 << lane;
    }
    world.memory.changes += changes;
    done
}

pub(super) fn atomic(
    cx: &mut Cx,
    access: &Access,
    old: &mut Data,
    update: &mut dyn FnMut(usize, u64) -> Option<u64>,
) -> Result<(), Fault> {
    note(cx, access);
    poll(cx, access);
    let mut left = access.mask;
    let mut simple = cx.world.memory.race.is_on();
    while left != 0 {
        if simple {
            let rest = Access {
                mask: left,
                ..*access
            };
            let done = count_together(cx, &rest, old, update);
            simple = done != 0;
            left &= !done;
        }
        if left != 0 {
            atomic_of_lane(cx, access, old, update, left.trailing_zeros() as usize)?;
            left &= left - 1;
        }
    }
    Ok(())
}

/// One lane's read-modify-write.
fn atomic_of_lane(
    cx: &mut Cx,
    access: &Access,
    old: &mut Data,
    update: &mut dyn FnMut(usize, u64) -> Option<u64>,
    lane: usize,
) -> Result<(), Fault> {
    let n = access.bytes as usize;
    let (space, at) = resolve(access.space, access.addresses[lane]);
    if at & u64::from(access.bytes - 1) != 0 {
        return Err(misaligned(cx, lane, at, access.bytes, Doing::Atomic));
    }
    let (base, offset) = match space {
        Space::Global | Space::Generic => match locate(cx, &mut None, at, access.bytes) {
            Some((base, offset)) => (Some(base), offset),
            None => return Err(outside(cx, lane, space, at, access.bytes, Doing::Atomic)),
        },
        Space::Shared if at + n as u64 <= cx.block.shared.region.len() as u64 => (None, at),
        space => return Err(outside(cx, lane, space, at, access.bytes, Doing::Atomic)),
    };
    if base.is_some() && cx.world.memory.is_constant(at) {
        let message = "an atomic operation on a constant variable".to_owned();
        cx.report(Kind::ReadOnly, lane, Some(at), message);
        return Err(Fault::IllegalAddress);
    }
    if let Some(base) = base
        && !arrives(cx, lane, base, at, Doing::Atomic)?
    {
        put(old, lane, &[0xff; 8][..n], 0);
        return Ok(());
    }
    let offset = offset as usize;
    let Some(region) = region_at(cx, base) else {
        return Ok(());
    };
    let value = read_word(&region.bytes()[offset..offset + n]);
    let undef = region.unwritten(offset, n);
    let new = update(lane, value).map(|new| new & (u64::MAX >> (64 - 8 * n)));
    // A compare-and-swap that fails has only read.
    let doing = if new.is_some() {
        Doing::Atomic
    } else {
        Doing::Load
    };
    let after = new.map(u64::to_le_bytes);
    let moved = Moved {
        old: &value.to_le_bytes()[..n],
        undef,
        new: after.as_ref().map(|after| &after[..n]),
        atomic: true,
    };
    check_race(cx, access, lane, base, offset as u32, doing, Some(moved));
    if undef != 0 && cx.world.findings.is_first(Kind::Uninitialised, cx.op.id) {
        let message = "an atomic operation on memory that nobody wrote".to_owned();
        cx.report(Kind::Uninitialised, lane, Some(at), message);
    }
    old.words[0][lane] = value as u32;
    old.words[1][lane] = (value >> 32) as u32;
    let (Some(new), Some(region)) = (new, region_at(cx, base)) else {
        return Ok(());
    };
    write_word(&mut region.bytes_mut()[offset..offset + n], new);
    region.mark(offset, n, 0);
    cx.world.memory.changes += u64::from(new != value);
    Ok(())
}
