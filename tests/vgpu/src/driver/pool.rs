//! Memory pools, and allocation in the order of a stream.
//!
//! A pool is a book: what was allocated from it, who may access it, and its attributes. Memory
//! freed to it is not handed out again, so that whoever still uses it is found.

use std::collections::BTreeMap;

use super::status::{In, Out, Outcome, Status};
use super::{Driver, Handle, Kept, POOL, api};
use crate::finding::Fault;
use crate::machine::{Command, World};
use crate::memory::Reach;

/// `CU_MEM_LOCATION_TYPE_DEVICE`
const ON_DEVICE: u32 = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_NONE`, `READ`, `READWRITE`
const NONE: u32 = 0;
const READ: u32 = 1;
const READ_WRITE: u32 = 3;

struct Pool {
    device: u32,
    /// What other devices may do.
    access: BTreeMap<u32, u32>,
    /// Reuse policies 1 to 3: hints.
    reuse: [u32; 3],
    /// Bytes kept rather than given back: a hint.
    threshold: u64,
    used: u64,
    used_high: u64,
    /// The most it may hold; 0 is no limit.
    most: u64,
}

/// All pools.
#[derive(Default)]
pub(super) struct Pools {
    pools: BTreeMap<Handle, Pool>,
    /// Of each device: the pool it came with, and the one in use.
    of_device: BTreeMap<u32, (Handle, Handle)>,
}

/// `CUmemLocation`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Location {
    kind: u32,
    id: i32,
}

/// `CUmemAccessDesc`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Access {
    location: Location,
    flags: u32,
}

/// `CUmemPoolProps`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct PoolProps {
    kind: u32,
    handle_types: u32,
    location: Location,
    security: u64,
    most: u64,
    reserved: [u8; 56],
}

impl Driver {
    fn ordinal(&self, device: i32) -> Result<u32, Status> {
        let device = u32::try_from(device).map_err(|_| Status::INVALID_DEVICE)?;
        if (device as usize) < self.machine.devices.len() {
            Ok(device)
        } else {
            Err(Status::INVALID_DEVICE)
        }
    }

    fn create_pool(&mut self, device: u32, most: u64) -> Handle {
        let handle = self.handle(POOL);
        let pool = Pool {
            device,
            access: BTreeMap::from([(device, READ_WRITE)]),
            reuse: [1; 3],
            threshold: 0,
            used: 0,
            used_high: 0,
            most,
        };
        self.pools.pools.insert(handle, pool);
        handle
    }

    /// The pool a device came with, and the one in use.
    fn pools_of(&mut self, device: u32) -> (Handle, Handle) {
        if let Some(&pools) = self.pools.of_device.get(&device) {
            return pools;
        }
        let pool = self.create_pool(device, 0);
        self.pools.of_device.insert(device, (pool, pool));
        (pool, pool)
    }

    fn pool(&mut self, pool: Handle) -> Result<&mut Pool, Status> {
        self.pools.pools.get_mut(&pool).ok_or(Status::INVALID_VALUE)
    }

    /// Which devices reach the memory of a pool: peer access does not matter for it.
    fn reach(&self, pool: Handle) -> Reach {
        let devices = 0..self.machine.devices.len() as u32;
        let may = devices.filter(|&device| self.pool_access(pool, device) != NONE);
        Reach::Devices(may.fold(0, |all, device| all | 1 << device))
    }

    /// What a device may do with the memory of a pool.
    fn pool_access(&self, pool: Handle, device: u32) -> u32 {
        let pool = self.pools.pools.get(&pool);
        pool.and_then(|p| p.access.get(&device).copied())
            .unwrap_or(NONE)
    }

    fn allocate_from(&mut self, at: Out<u64>, bytes: u64, pool: Handle, stream: Handle) -> Outcome {
        let (_, context, _) = self.stream(stream)?;
        self.check(self.context(context)?.device)?;
        if self.is_captured(stream)? {
            // An allocation node.
            return Err(Status::NOT_SUPPORTED);
        }
        let known = self.pool(pool)?;
        let (device, used, most) = (known.device, known.used, known.most);
        if bytes == 0 || at.address() == 0 {
            return Err(Status::INVALID_VALUE);
        }
        if most > 0 && bytes > most.saturating_sub(used) {
            return Err(Status::OUT_OF_MEMORY);
        }
        let address = self.allocate_on(context, device, bytes, Kept::Pool(pool))?;
        let reach = self.reach(pool);
        self.machine.world.memory.set_reach(address, reach);
        let pool = self.pool(pool)?;
        pool.used += bytes;
        pool.used_high = pool.used_high.max(pool.used);
        at.set(address)
    }

    /// An allocation of a pool is gone.
    pub(super) fn give_back(&mut self, pool: Handle, bytes: u64) {
        if let Some(pool) = self.pools.pools.get_mut(&pool) {
            pool.used = pool.used.saturating_sub(bytes);
        }
    }

    fn free_async(&mut self, at: u64, stream: Handle) -> Outcome {
        self.healthy()?;
        self.stream(stream)?;
        if self.is_captured(stream)? {
            return Err(Status::NOT_SUPPORTED);
        }
        let Some(&(_, kept @ (Kept::Device | Kept::Pool(_)), bytes)) = self.allocations.get(&at)
        else {
            return self.free(at, &[], "cuMemFreeAsync");
        };
        self.allocations.remove(&at);
        if let Kept::Pool(pool) = kept {
            self.give_back(pool, bytes);
        }
        let command = Command::Work(Box::new(move |world: &mut World| {
            let freed = world.memory.free(at);
            freed.map(|_| ()).map_err(|_| Fault::IllegalAddress)
        }));
        self.enqueue(stream, command).map(|_| ())
    }
}

api! {
    fn cuMemAllocAsync(at: Out<u64>, bytes: u64, stream: Handle) |driver| {
        let (_, context, _) = driver.stream(stream)?;
        let device = driver.context(context)?.device;
        let (_, pool) = driver.pools_of(device);
        driver.allocate_from(at, bytes, pool, stream)
    }

    fn cuMemAllocFromPoolAsync(at: Out<u64>, bytes: u64, pool: Handle, stream: Handle) |driver| {
        driver.allocate_from(at, bytes, pool, stream)
    }

    fn cuMemFreeAsync(at: u64, stream: Handle) |driver| {
        driver.free_async(at, stream)
    }

    fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: i32) |driver| {
        let device = driver.ordinal(device)?;
        let (default, _) = driver.pools_of(device);
        pool.set(default)
    }

    fn cuDeviceGetMemPool(pool: Out<Handle>, device: i32) |driver| {
        let device = driver.ordinal(device)?;
        let (_, current) = driver.pools_of(device);
        pool.set(current)
    }

    fn cuDeviceSetMemPool(device: i32, pool: Handle) |driver| {
        let device = driver.ordinal(device)?;
        if driver.pool(pool)?.device != device {
            return Err(Status::INVALID_VALUE);
        }
        let (default, _) = driver.pools_of(device);
        driver.pools.of_device.insert(device, (default, pool));
        Ok(())
    }

    fn cuMemPoolCreate(pool: Out<Handle>, props: In<PoolProps>) |driver| {
        let props = props.get()?;
        // CU_MEM_ALLOCATION_TYPE_PINNED is the only one; handles for other processes are not here.
        if props.kind != 1 || props.location.kind != ON_DEVICE {
            return Err(Status::NOT_SUPPORTED);
        }
        if props.handle_types != 0 {
            return Err(Status::NOT_SUPPORTED);
        }
        let device = driver.ordinal(props.location.id)?;
        let made = driver.create_pool(device, props.most);
        pool.set(made)
    }

    fn cuMemPoolDestroy(pool: Handle) |driver| {
        let device = driver.pool(pool)?.device;
        let (default, current) = driver.pools_of(device);
        if pool == default {
            return Err(Status::INVALID_VALUE);
        }
        if pool == current {
            driver.pools.of_device.insert(device, (default, default));
        }
        // What was allocated from it lives on, as on a device, and counts for the device.
        driver.pools.pools.remove(&pool);
        Ok(())
    }

    fn cuMemPoolTrimTo(pool: Handle, _keep: u64) |driver| {
        driver.pool(pool).map(|_| ())
    }

    fn cuMemPoolSetAccess(pool: Handle, map: In<Access>, count: u64) |driver| {
        let own = driver.pool(pool)?.device;
        if count > 1024 {
            return Err(Status::INVALID_VALUE);
        }
        let mut changes = Vec::new();
        for n in 0..count as usize {
            let Access { location, flags } = map.index(n)?;
            if location.kind != ON_DEVICE || !matches!(flags, NONE | READ | READ_WRITE) {
                return Err(Status::INVALID_VALUE);
            }
            let device = driver.ordinal(location.id)?;
            if device == own && flags != READ_WRITE {
                // A device cannot be kept from its own memory.
                return Err(Status::INVALID_VALUE);
            }
            if device != own && !driver.machine.world.memory.links.can_access(device, own) {
                return Err(Status::INVALID_DEVICE);
            }
            changes.push((device, flags));
        }
        driver.pool(pool)?.access.extend(changes);
        let reach = driver.reach(pool);
        let of_pool = driver.allocations.iter().filter(|(_, a)| a.1 == Kept::Pool(pool));
        for at in of_pool.map(|(at, _)| *at).collect::<Vec<_>>() {
            driver.machine.world.memory.set_reach(at, reach);
        }
        Ok(())
    }

    fn cuMemPoolGetAccess(flags: Out<u32>, pool: Handle, location: In<Location>) |driver| {
        driver.pool(pool)?;
        let location = location.get()?;
        if location.kind != ON_DEVICE {
            return Err(Status::INVALID_VALUE);
        }
        let device = driver.ordinal(location.id)?;
        flags.set(driver.pool_access(pool, device))
    }

    fn cuMemPoolSetAttribute(pool: Handle, number: u32, value: Out<u64>) |driver| {
        let pool = driver.pool(pool)?;
        match number {
            1..=3 => {
                let flag = In::<u32>::from_address(value.address()).get()?;
                pool.reuse[number as usize - 1] = flag;
            }
            4 => pool.threshold = value.get()?,
            // The high-water marks can only be set back.
            6 | 8 if value.get()? != 0 => return Err(Status::INVALID_VALUE),
            6 | 8 => pool.used_high = pool.used,
            _ => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, number: u32, value: Out<u64>) |driver| {
        let pool = driver.pool(pool)?;
        if value.address() == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let wide = match number {
            4 => pool.threshold,
            // What is reserved is what is used: nothing is kept for later.
            5 | 7 => pool.used,
            6 | 8 => pool.used_high,
            13 => pool.most,
            _ => {
                let narrow = match number {
                    1..=3 => pool.reuse[number as usize - 1],
                    9 => 1,
                    10 => 0,
                    11 => pool.device,
                    12 => ON_DEVICE,
                    _ => return Err(Status::INVALID_VALUE),
                };
                Out::<u8>::at(value.address()).write(&narrow.to_ne_bytes());
                return Ok(());
            }
        };
        value.set(wide)
    }
}
