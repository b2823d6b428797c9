//! Memory: allocation and what is known of it. Copies and fills are in `copy`.

use super::rest::{all_at_rest, device_at_rest};
use super::status::{In, Out, Outcome, Status};
use super::{Driver, Guard, Handle, Kept, api, explain};
use crate::finding::{Finding, Kind};

impl Driver {
    fn used(&self, device: u32) -> u64 {
        let memory = &self.machine.world.memory;
        let on_device = |at: u64| {
            memory
                .containing(at)
                .is_some_and(|(_, a)| a.device == device)
        };
        self.allocations
            .iter()
            .filter(|(_, a)| matches!(a.1, Kept::Device | Kept::Pool(_)))
            .filter(|(at, _)| on_device(**at))
            .map(|(_, a)| a.2)
            .sum()
    }

    /// Memory of a device, if it has that much left.
    pub(super) fn allocate_on(
        &mut self,
        context: Handle,
        device: u32,
        bytes: u64,
        kept: Kept,
    ) -> Result<u64, Status> {
        let properties = &self.machine.devices[device as usize].properties;
        if bytes > properties.memory.saturating_sub(self.used(device)) {
            return Err(Status::OUT_OF_MEMORY);
        }
        let memory = &mut self.machine.world.memory;
        let at = memory
            .allocate(device, bytes)
            .map_err(|_| Status::OUT_OF_MEMORY)?;
        self.allocations.insert(at, (context, kept, bytes));
        Ok(at)
    }

    /// Memory of the host that the devices may access.
    fn allocate_host(&mut self, bytes: u64, kept: Kept) -> Result<u64, Status> {
        let current = self.healthy()?;
        let device = self.context(current)?.device;
        // As much as a device has, so that a size that is nonsense is refused here.
        let most = self.machine.devices[device as usize].properties.memory;
        let pinned = |a: &&(Handle, Kept, u64)| matches!(a.1, Kept::Host | Kept::Managed);
        let used: u64 = self.allocations.values().filter(pinned).map(|a| a.2).sum();
        if bytes > most.saturating_sub(used) {
            return Err(Status::OUT_OF_MEMORY);
        }
        let mapped = self.pinned.map(device, bytes);
        let (at, as_ever) = mapped.ok_or(Status::OUT_OF_MEMORY)?;
        if !as_ever {
            self.actors.cannot_be_replayed(format!(
                "{bytes} bytes of pinned memory lie at {at:p}, since something else lies where they \
                 lie in other processes"
            ));
        }
        // SAFETY: it is freed only after the devices have forgotten it, in `release`.
        unsafe {
            self.machine
                .world
                .memory
                .map_host(at, bytes as usize, device)
        };
        self.allocations.insert(at as u64, (current, kept, bytes));
        Ok(at as u64)
    }

    /// Frees an allocation of any kind.
    pub(super) fn release(&mut self, at: u64) {
        let Some((_, kept, bytes)) = self.allocations.remove(&at) else {
            return;
        };
        if let Kept::Pool(pool) = kept {
            self.give_back(pool, bytes);
        }
        // It was there, as the table says.
        let _ = self.machine.world.memory.free(at);
        if matches!(kept, Kept::Host | Kept::Managed) {
            // SAFETY: mapped in `allocate_host` with as many bytes, and just forgotten.
            unsafe { libc::munmap(at as *mut libc::c_void, bytes as usize) };
        }
    }

    /// Frees an allocation if it is one of those that the call is for.
    pub(super) fn free(&mut self, at: u64, allowed: &[Kept], name: &str) -> Outcome {
        if at == 0 {
            return Ok(());
        }
        let of_pool = allowed.contains(&Kept::Device);
        match self.allocations.get(&at) {
            Some((_, kept, _))
                if allowed.contains(kept) || (of_pool && matches!(kept, Kept::Pool(_))) =>
            {
                self.release(at);
                Ok(())
            }
            _ => {
                let words = self.machine.world.memory.whereabouts(at);
                explain(name, format_args!("{at:#x}: {words}"));
                if words.contains("was freed") {
                    self.machine.world.findings.report(Finding {
                        kind: Kind::UseAfterFree,
                        place: None,
                        thread: None,
                        address: Some(at),
                        other: None,
                        reason: None,
                        message: format!("{name} of {words}"),
                    });
                }
                Err(Status::INVALID_VALUE)
            }
        }
    }

    /// Whether so many bytes from an address are some allocation's.
    pub(super) fn check_range(&self, name: &str, address: u64, bytes: u64) -> Outcome {
        let bytes = usize::try_from(bytes).map_err(|_| Status::INVALID_VALUE)?;
        self.machine
            .world
            .memory
            .check(address, bytes)
            .map_err(|e| {
                explain(name, e.0);
                Status::INVALID_VALUE
            })
    }

    /// Whether the device whose memory an address is has not died.
    pub(super) fn check_alive(&self, address: u64) -> Outcome {
        let memory = &self.machine.world.memory;
        let found = memory.containing(address);
        match found.filter(|(_, a)| !a.region.is_host()) {
            Some((_, allocation)) if memory.links.is_dead(allocation.device) => {
                self.check(allocation.device)
            }
            _ => Ok(()),
        }
    }

    pub(super) fn is_device(&self, address: u64) -> bool {
        self.machine.world.memory.containing(address).is_some()
    }

    /// Whether an address is memory of the host that devices may access.
    pub(super) fn is_host(&self, address: u64) -> bool {
        let found = self.machine.world.memory.containing(address);
        found.is_some_and(|(_, allocation)| allocation.region.is_host())
    }
}

/// What every allocation asks before it waits.
fn may_allocate(driver: &mut Driver, bytes: u64) -> Outcome {
    driver.healthy()?;
    driver.potentially_unsafe()?;
    if bytes == 0 {
        return Err(Status::INVALID_VALUE);
    }
    Ok(())
}

/// Memory of the calling thread's device.
fn allocate(mut driver: Guard, bytes: u64) -> Result<u64, Status> {
    may_allocate(&mut driver, bytes)?;
    let mut driver = device_at_rest(driver)?;
    let current = driver.current()?;
    let device = driver.context(current)?.device;
    driver.allocate_on(current, device, bytes, Kept::Device)
}

/// Memory of the host, which is mapped for every device.
fn allocate_host(mut driver: Guard, bytes: u64, kept: Kept) -> Result<u64, Status> {
    may_allocate(&mut driver, bytes)?;
    all_at_rest(driver)?.allocate_host(bytes, kept)
}

/// The value of an attribute of a pointer, as wide as its type.
enum Value {
    Narrow(u32),
    Wide(u64),
    Byte(u8),
}

impl Value {
    fn store(self, data: u64) {
        let out = Out::at(data);
        match self {
            Value::Narrow(value) => out.write(&value.to_ne_bytes()),
            Value::Wide(value) => out.write(&value.to_ne_bytes()),
            Value::Byte(value) => out.write(&[value]),
        }
    }

    fn zero(number: u32) -> Self {
        match number {
            2 | 16 => Value::Narrow(0),
            9 => Value::Narrow(u32::MAX),
            6 | 8 | 10 | 13 | 15 => Value::Byte(0),
            _ => Value::Wide(0),
        }
    }
}

impl Driver {
    /// An attribute of a pointer by its number in `cuda.h`; None if it has none of that kind.
    fn pointer_attribute(&self, number: u32, at: u64) -> Result<Option<Value>, Status> {
        if !matches!(number, 1..=4 | 6..=20) {
            return Err(Status::NOT_SUPPORTED);
        }
        let memory = &self.machine.world.memory;
        let (first, allocation) = memory.containing(at).ok_or(Status::INVALID_VALUE)?;
        let host = allocation.region.is_host();
        let (context, kept, _) = match self.allocations.get(&first) {
            Some(&known) => known,
            None => (0, Kept::Device, 0),
        };
        let managed = kept == Kept::Managed;
        let device = allocation.device;
        Ok(Some(match number {
            1 => Value::Wide(context),
            // CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE
            2 => Value::Narrow(if host && !managed { 1 } else { 2 }),
            3 => Value::Wide(at),
            4 if host => Value::Wide(at),
            4 => return Ok(None),
            6 => Value::Byte(1),
            7 | 20 => Value::Wide(first),
            8 => Value::Byte(managed.into()),
            9 => Value::Narrow(device),
            11 | 19 => Value::Wide(first),
            12 | 18 => Value::Wide(allocation.region.len() as u64),
            13 => Value::Byte(1),
            14 => Value::Wide(0),
            16 => Value::Narrow(3),
            17 => match kept {
                Kept::Pool(pool) => Value::Wide(pool),
                _ => Value::Wide(0),
            },
            _ => Value::Byte(0),
        }))
    }
}

api! {
    fn cuMemAlloc_v2(at: Out<u64>, bytes: u64) |driver| {
        let address = allocate(driver, bytes)?;
        at.set(address)
    }

    fn cuMemAllocPitch_v2(at: Out<u64>, pitch: Out<u64>, width: u64, height: u64, element: u32) |driver| {
        if !matches!(element, 4 | 8 | 16) || width == 0 || height == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let row = width.checked_next_multiple_of(512).ok_or(Status::OUT_OF_MEMORY)?;
        let bytes = row.checked_mul(height).ok_or(Status::OUT_OF_MEMORY)?;
        let address = allocate(driver, bytes)?;
        pitch.set(row)?;
        at.set(address)
    }

    fn cuMemFree_v2(at: u64) |driver| {
        driver.healthy()?;
        driver.potentially_unsafe()?;
        if driver.allocations.contains_key(&at) {
            driver = device_at_rest(driver)?;
        }
        driver.free(at, &[Kept::Device, Kept::Managed], "cuMemFree")
    }

    fn cuMemAllocManaged(at: Out<u64>, bytes: u64, flags: u32) |driver| {
        if !matches!(flags, 1 | 2) {
            return Err(Status::INVALID_VALUE);
        }
        let address = allocate_host(driver, bytes, Kept::Managed)?;
        at.set(address)
    }

    fn cuMemAllocHost_v2(at: Out<u64>, bytes: u64) |driver| {
        let address = allocate_host(driver, bytes, Kept::Host)?;
        at.set(address)
    }

    // Portable, mapped and write-combined memory are all the same here.
    fn cuMemHostAlloc(at: Out<u64>, bytes: u64, flags: u32) |driver| {
        if flags & !7 != 0 {
            return Err(Status::INVALID_VALUE);
        }
        let address = allocate_host(driver, bytes, Kept::Host)?;
        at.set(address)
    }

    fn cuMemFreeHost(at: u64) |driver| {
        driver.potentially_unsafe()?;
        if driver.is_host(at) && driver.healthy().is_ok() {
            driver = all_at_rest(driver)?;
        }
        driver.free(at, &[Kept::Host], "cuMemFreeHost")
    }

    fn cuMemHostRegister_v2(at: u64, bytes: u64, _flags: u32) |driver| {
        let current = driver.healthy()?;
        driver.potentially_unsafe()?;
        if at == 0 || bytes == 0 {
            return Err(Status::INVALID_VALUE);
        }
        // Addresses of programs have 47 bits.
        let last = at.checked_add(bytes - 1).filter(|&last| last >> 47 == 0);
        let last = last.ok_or(Status::INVALID_VALUE)?;
        if driver.machine.world.memory.is_used(at, last) {
            return Err(Status::HOST_MEMORY_ALREADY_REGISTERED);
        }
        driver = all_at_rest(driver)?;
        let device = driver.context(current)?.device;
        // SAFETY: whoever registers memory keeps it until it is unregistered.
        unsafe { driver.machine.world.memory.map_host(at as *mut u8, bytes as usize, device) };
        driver.allocations.insert(at, (current, Kept::Registered, bytes));
        Ok(())
    }

    fn cuMemHostUnregister(at: u64) |driver| {
        match driver.allocations.get(&at) {
            Some((_, Kept::Registered, _)) => {
                if driver.healthy().is_ok() {
                    driver = all_at_rest(driver)?;
                }
                driver.release(at);
                Ok(())
            }
            _ => Err(Status::HOST_MEMORY_NOT_REGISTERED),
        }
    }

    fn cuMemHostGetDevicePointer_v2(device: Out<u64>, host: u64, flags: u32) |driver| {
        if flags != 0 || !driver.is_device(host) {
            return Err(Status::INVALID_VALUE);
        }
        device.set(host)
    }

    fn cuMemHostGetFlags(flags: Out<u32>, host: u64) |driver| {
        match driver.allocations.get(&host) {
            Some((_, Kept::Host | Kept::Registered, _)) => flags.set(3),
            _ => Err(Status::INVALID_VALUE),
        }
    }

    fn cuMemGetInfo_v2(free: Out<u64>, total: Out<u64>) |driver| {
        let device = driver.device()?;
        let memory = driver.machine.devices[device as usize].properties.memory;
        free.set(memory.saturating_sub(driver.used(device)))?;
        total.set(memory)
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, size: Out<u64>, at: u64) |driver| {
        let found = driver.machine.world.memory.containing(at);
        let (first, allocation) = found.ok_or(Status::NOT_FOUND)?;
        let len = allocation.region.len() as u64;
        base.set_if_wanted(first);
        size.set_if_wanted(len);
        Ok(())
    }

    fn cuPointerGetAttribute(data: u64, number: u32, at: u64) |driver| {
        if data == 0 {
            return Err(Status::INVALID_VALUE);
        }
        match driver.pointer_attribute(number, at)? {
            Some(value) => value.store(data),
            None => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    }

    fn cuPointerGetAttributes(n: u32, numbers: In<u32>, data: In<u64>, at: u64) |driver| {
        for i in 0..n as usize {
            let (number, data) = (numbers.index(i)?, data.index(i)?);
            if data == 0 {
                return Err(Status::INVALID_VALUE);
            }
            // What is unknown is zero here, unlike for one attribute.
            match driver.pointer_attribute(number, at) {
                Ok(Some(value)) => value.store(data),
                Ok(None) | Err(Status::INVALID_VALUE) => Value::zero(number).store(data),
                Err(status) => return Err(status),
            }
        }
        Ok(())
    }

    fn cuPointerSetAttribute(_value: u64, number: u32, at: u64) |driver| {
        // CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: copies that synchronise do so anyway.
        if number != 6 || !driver.is_device(at) {
            return Err(Status::INVALID_VALUE);
        }
        Ok(())
    }

    // With a device, and since CUDA 12.2 with a location.
    fn cuMemAdvise_v2(at: u64, bytes: u64, _advice: u32, _location: u64) |driver| {
        driver.check_range("cuMemAdvise", at, bytes)
    }

    fn cuMemPrefetchAsync_v2(at: u64, bytes: u64, _location: u64, _flags: u32, stream: Handle) |driver| {
        driver.stream(stream)?;
        driver.check_range("cuMemPrefetchAsync", at, bytes)
    }

    fn cuMemAdvise(at: u64, bytes: u64, _advice: u32, _device: i32) |driver| {
        driver.check_range("cuMemAdvise", at, bytes)
    }

    fn cuMemPrefetchAsync(at: u64, bytes: u64, _device: i32, stream: Handle) |driver| {
        driver.stream(stream)?;
        driver.check_range("cuMemPrefetchAsync", at, bytes)
    }
}
