//! Memory: allocation, copies, fills.

use std::alloc::Layout;

use super::status::{In, Out, Outcome, Status};
use super::{Driver, Guard, Handle, Kept, api, explain, wait_for};
use crate::finding::{Fault, Finding, Kind};
use crate::machine::{Command, World};

/// Alignment of memory that the driver makes on the host.
const HOST_ALIGNMENT: usize = 4096;

fn layout(bytes: u64) -> Result<Layout, Status> {
    let bytes = usize::try_from(bytes).map_err(|_| Status::OUT_OF_MEMORY)?;
    Layout::from_size_align(bytes.max(1), HOST_ALIGNMENT).map_err(|_| Status::OUT_OF_MEMORY)
}

impl Driver {
    fn used(&self, device: u32) -> u64 {
        self.allocations
            .values()
            .filter(|a| a.1 == Kept::Device)
            .filter(|a| self.contexts.get(&a.0).is_some_and(|c| c.device == device))
            .map(|a| a.2)
            .sum()
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64, Status> {
        let current = self.healthy()?;
        let device = self.context(current)?.device;
        if bytes == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let properties = &self.machine.devices[device as usize].properties;
        if bytes > properties.memory.saturating_sub(self.used(device)) {
            return Err(Status::OUT_OF_MEMORY);
        }
        let memory = &mut self.machine.world.memory;
        let at = memory
            .allocate(device, bytes)
            .map_err(|_| Status::OUT_OF_MEMORY)?;
        self.allocations.insert(at, (current, Kept::Device, bytes));
        Ok(at)
    }

    /// Memory of the host that the devices may access.
    fn allocate_host(&mut self, bytes: u64, kept: Kept) -> Result<u64, Status> {
        let current = self.healthy()?;
        let device = self.context(current)?.device;
        if bytes == 0 {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: the layout has a size.
        let at = unsafe { std::alloc::alloc_zeroed(layout(bytes)?) };
        if at.is_null() {
            return Err(Status::OUT_OF_MEMORY);
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
        // It was there, as the table says.
        let _ = self.machine.world.memory.free(at);
        if matches!(kept, Kept::Host | Kept::Managed)
            && let Ok(layout) = layout(bytes)
        {
            // SAFETY: made in `allocate_host` with this layout, and just forgotten.
            unsafe { std::alloc::dealloc(at as *mut u8, layout) };
        }
    }

    fn free(&mut self, at: u64, allowed: &[Kept], name: &str) -> Outcome {
        if at == 0 {
            return Ok(());
        }
        match self.allocations.get(&at) {
            Some((_, kept, _)) if allowed.contains(kept) => {
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
    fn check_range(&self, name: &str, address: u64, bytes: u64) -> Outcome {
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

    fn is_device(&self, address: u64) -> bool {
        self.machine.world.memory.containing(address).is_some()
    }
}

/// One end of a copy.
#[derive(Debug, Clone, Copy)]
enum End {
    Device(u64),
    Host(u64),
}

/// A copy of rows.
#[derive(Debug, Clone, Copy)]
struct Rows {
    to: End,
    to_pitch: u64,
    from: End,
    from_pitch: u64,
    width: u64,
    height: u64,
}

impl Rows {
    fn one(to: End, from: End, bytes: u64) -> Self {
        Self {
            to,
            to_pitch: bytes,
            from,
            from_pitch: bytes,
            width: bytes,
            height: 1,
        }
    }

    fn check(&self, driver: &Driver, name: &str) -> Outcome {
        for (end, pitch) in [(self.to, self.to_pitch), (self.from, self.from_pitch)] {
            match end {
                End::Device(at) => {
                    if self.width > 0 && self.height > 0 {
                        driver.check_range(name, at, (self.height - 1) * pitch + self.width)?;
                    }
                }
                End::Host(0) if self.width * self.height > 0 => {
                    return Err(Status::INVALID_VALUE);
                }
                End::Host(_) => {}
            }
        }
        Ok(())
    }

    /// What the copy does when its turn comes. Pageable memory of the host is read at once, as
    /// the driver stages it.
    fn work(self) -> Result<Command, Status> {
        let mut staged = Vec::new();
        if let End::Host(at) = self.from {
            for row in 0..self.height {
                staged.push(In::at(at + row * self.from_pitch).bytes(self.width as usize)?);
            }
        }
        Ok(Command::Work(Box::new(move |world: &mut World| {
            let failed = |_| Fault::IllegalAddress;
            for row in 0..self.height {
                let to_offset = row * self.to_pitch;
                let from_offset = row * self.from_pitch;
                let width = self.width as usize;
                match (self.to, self.from) {
                    (End::Device(to), End::Device(from)) => world
                        .memory
                        .copy(to + to_offset, from + from_offset, width)
                        .map_err(failed)?,
                    (End::Device(to), End::Host(_)) => world
                        .memory
                        .write(to + to_offset, &staged[row as usize])
                        .map_err(failed)?,
                    (End::Host(to), End::Device(from)) => {
                        let mut bytes = vec![0; width];
                        let from = from + from_offset;
                        world.memory.read(from, &mut bytes).map_err(failed)?;
                        Out::at(to + to_offset).write(&bytes);
                    }
                    (End::Host(to), End::Host(_)) => {
                        Out::at(to + to_offset).write(&staged[row as usize]);
                    }
                }
            }
            Ok(())
        })))
    }
}

fn copy(mut driver: Guard, name: &str, rows: Rows, stream: Option<Handle>) -> Outcome {
    driver.healthy()?;
    rows.check(&driver, name)?;
    let target = stream.unwrap_or(0);
    let command = rows.work()?;
    driver.enqueue(target, command)?;
    match stream {
        Some(_) => Ok(()),
        None => finish(driver, 0),
    }
}

/// Waits for a stream and gives what its device came to.
fn finish(driver: Guard, stream: Handle) -> Outcome {
    let (id, context, _) = driver.stream(stream)?;
    let device = driver.context(context)?.device;
    let driver = wait_for(driver, id);
    driver.check(device)
}

fn fill(
    mut driver: Guard,
    name: &str,
    (at, pitch): (u64, u64),
    unit: &[u8],
    (count, height): (u64, u64),
    stream: Option<Handle>,
) -> Outcome {
    driver.healthy()?;
    if at % unit.len() as u64 != 0 {
        return Err(Status::INVALID_VALUE);
    }
    let width = count
        .checked_mul(unit.len() as u64)
        .ok_or(Status::INVALID_VALUE)?;
    if width > 0 && height > 0 {
        driver.check_range(name, at, (height - 1) * pitch + width)?;
    }
    let row = unit.repeat(count as usize);
    let command = Command::Work(Box::new(move |world: &mut World| {
        for y in 0..height {
            let written = world.memory.write(at + y * pitch, &row);
            written.map_err(|_| Fault::IllegalAddress)?;
        }
        Ok(())
    }));
    driver.enqueue(stream.unwrap_or(0), command)?;
    match stream {
        Some(_) => Ok(()),
        None => finish(driver, 0),
    }
}

/// `CUDA_MEMCPY2D`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Copy2d {
    from_x: u64,
    from_y: u64,
    from_type: u32,
    from_host: u64,
    from_device: u64,
    from_array: u64,
    from_pitch: u64,
    to_x: u64,
    to_y: u64,
    to_type: u32,
    to_host: u64,
    to_device: u64,
    to_array: u64,
    to_pitch: u64,
    width: u64,
    height: u64,
}

impl Copy2d {
    fn rows(&self, driver: &Driver) -> Result<Rows, Status> {
        let end = |kind: u32, host: u64, device: u64, x: u64, y: u64, pitch: u64| {
            let offset = y * pitch + x;
            Ok(match kind {
                1 => End::Host(host + offset),
                2 => End::Device(device + offset),
                4 if driver.is_device(device + offset) => End::Device(device + offset),
                4 => End::Host(device + offset),
                _ => return Err(Status::NOT_SUPPORTED),
            })
        };
        let pitch = |pitch: u64| if pitch == 0 { self.width } else { pitch };
        let (to_pitch, from_pitch) = (pitch(self.to_pitch), pitch(self.from_pitch));
        if to_pitch < self.width || from_pitch < self.width {
            return Err(Status::INVALID_VALUE);
        }
        Ok(Rows {
            to: end(
                self.to_type,
                self.to_host,
                self.to_device,
                self.to_x,
                self.to_y,
                to_pitch,
            )?,
            to_pitch,
            from: end(
                self.from_type,
                self.from_host,
                self.from_device,
                self.from_x,
                self.from_y,
                from_pitch,
            )?,
            from_pitch,
            width: self.width,
            height: self.height,
        })
    }
}

/// An address of the host or of a device, whichever it is.
fn either(driver: &Driver, at: u64) -> End {
    if driver.is_device(at) {
        End::Device(at)
    } else {
        End::Host(at)
    }
}

api! {
    fn cuMemAlloc_v2(at: Out<u64>, bytes: u64) |driver| {
        let address = driver.allocate(bytes)?;
        at.set(address)
    }

    fn cuMemAllocPitch_v2(at: Out<u64>, pitch: Out<u64>, width: u64, height: u64, element: u32) |driver| {
        if !matches!(element, 4 | 8 | 16) || width == 0 || height == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let row = width.checked_next_multiple_of(512).ok_or(Status::OUT_OF_MEMORY)?;
        let bytes = row.checked_mul(height).ok_or(Status::OUT_OF_MEMORY)?;
        let address = driver.allocate(bytes)?;
        pitch.set(row)?;
        at.set(address)
    }

    fn cuMemFree_v2(at: u64) |driver| {
        driver.healthy()?;
        if driver.allocations.contains_key(&at) {
            // As on a device, freeing waits for what may still use the memory.
            let current = driver.current()?;
            let context = driver.context(current)?;
            let own = [context.default, context.per_thread];
            let streams = driver.streams.values().filter(|s| s.context == current).map(|s| s.id);
            for id in streams.chain(own).collect::<Vec<_>>() {
                driver = wait_for(driver, id);
            }
        }
        driver.free(at, &[Kept::Device, Kept::Managed], "cuMemFree")
    }

    fn cuMemAllocAsync(at: Out<u64>, bytes: u64, stream: Handle) |driver| {
        driver.stream(stream)?;
        let address = driver.allocate(bytes)?;
        at.set(address)
    }

    fn cuMemFreeAsync(at: u64, stream: Handle) |driver| {
        driver.healthy()?;
        if !matches!(driver.allocations.get(&at), Some((_, Kept::Device, _))) {
            return driver.free(at, &[], "cuMemFreeAsync");
        }
        driver.allocations.remove(&at);
        let command = Command::Work(Box::new(move |world: &mut World| {
            world.memory.free(at).map(|_| ()).map_err(|_| Fault::IllegalAddress)
        }));
        driver.enqueue(stream, command).map(|_| ())
    }

    fn cuMemAllocManaged(at: Out<u64>, bytes: u64, flags: u32) |driver| {
        if !matches!(flags, 1 | 2) {
            return Err(Status::INVALID_VALUE);
        }
        let address = driver.allocate_host(bytes, Kept::Managed)?;
        at.set(address)
    }

    fn cuMemAllocHost_v2(at: Out<u64>, bytes: u64) |driver| {
        let address = driver.allocate_host(bytes, Kept::Host)?;
        at.set(address)
    }

    fn cuMemHostAlloc(at: Out<u64>, bytes: u64, _flags: u32) |driver| {
        let address = driver.allocate_host(bytes, Kept::Host)?;
        at.set(address)
    }

    fn cuMemFreeHost(at: u64) |driver| {
        driver.free(at, &[Kept::Host], "cuMemFreeHost")
    }

    fn cuMemHostRegister_v2(at: u64, bytes: u64, _flags: u32) |driver| {
        let current = driver.healthy()?;
        if at == 0 || bytes == 0 {
            return Err(Status::INVALID_VALUE);
        }
        if driver.is_device(at) || driver.is_device(at + bytes - 1) {
            return Err(Status::HOST_MEMORY_ALREADY_REGISTERED);
        }
        let device = driver.context(current)?.device;
        // SAFETY: whoever registers memory keeps it until it is unregistered.
        unsafe { driver.machine.world.memory.map_host(at as *mut u8, bytes as usize, device) };
        driver.allocations.insert(at, (current, Kept::Registered, bytes));
        Ok(())
    }

    fn cuMemHostUnregister(at: u64) |driver| {
        match driver.allocations.get(&at) {
            Some((_, Kept::Registered, _)) => {
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

    fn cuPointerGetAttribute(data: Out<u64>, attribute: u32, at: u64) |driver| {
        let found = driver.machine.world.memory.containing(at);
        let (first, allocation) = found.ok_or(Status::INVALID_VALUE)?;
        let host = allocation.region.is_host();
        let kept = driver.allocations.get(&first).copied();
        let narrow = Out::<u8>::at(data.address());
        if data.address() == 0 {
            return Err(Status::INVALID_VALUE);
        }
        match attribute {
            1 => data.set(kept.map_or(0, |k| k.0)),
            // CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE
            2 => {
                let managed = matches!(kept, Some((_, Kept::Managed, _)));
                let kind: u32 = if host && !managed { 1 } else { 2 };
                narrow.write(&kind.to_ne_bytes());
                Ok(())
            }
            3 => data.set(at),
            4 if host => data.set(at),
            4 => Err(Status::INVALID_VALUE),
            8 => {
                let managed = matches!(kept, Some((_, Kept::Managed, _)));
                narrow.write(&u32::from(managed).to_ne_bytes());
                Ok(())
            }
            9 => {
                narrow.write(&allocation.device.to_ne_bytes());
                Ok(())
            }
            11 => data.set(first),
            12 => data.set(allocation.region.len() as u64),
            _ => Err(Status::NOT_SUPPORTED),
        }
    }

    fn cuMemcpy(to: u64, from: u64, bytes: u64) |driver| {
        let rows = Rows::one(either(&driver, to), either(&driver, from), bytes);
        copy(driver, "cuMemcpy", rows, None)
    }

    fn cuMemcpyAsync(to: u64, from: u64, bytes: u64, stream: Handle) |driver| {
        let rows = Rows::one(either(&driver, to), either(&driver, from), bytes);
        copy(driver, "cuMemcpyAsync", rows, Some(stream))
    }

    fn cuMemcpyHtoD_v2(to: u64, from: In<u8>, bytes: u64) |driver| {
        let rows = Rows::one(End::Device(to), End::Host(from.address()), bytes);
        copy(driver, "cuMemcpyHtoD", rows, None)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: In<u8>, bytes: u64, stream: Handle) |driver| {
        let rows = Rows::one(End::Device(to), End::Host(from.address()), bytes);
        copy(driver, "cuMemcpyHtoDAsync", rows, Some(stream))
    }

    fn cuMemcpyDtoH_v2(to: Out<u8>, from: u64, bytes: u64) |driver| {
        let rows = Rows::one(End::Host(to.address()), End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoH", rows, None)
    }

    fn cuMemcpyDtoHAsync_v2(to: Out<u8>, from: u64, bytes: u64, stream: Handle) |driver| {
        let rows = Rows::one(End::Host(to.address()), End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoHAsync", rows, Some(stream))
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: u64) |driver| {
        let rows = Rows::one(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoD", rows, None)
    }

    fn cuMemcpyPeer(to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: u64) |driver| {
        driver.context(to_context)?;
        driver.context(from_context)?;
        let rows = Rows::one(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyPeer", rows, None)
    }

    fn cuMemcpyPeerAsync(
        to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: u64, stream: Handle,
    ) |driver| {
        driver.context(to_context)?;
        driver.context(from_context)?;
        let rows = Rows::one(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyPeerAsync", rows, Some(stream))
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: u64, stream: Handle) |driver| {
        let rows = Rows::one(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoDAsync", rows, Some(stream))
    }

    fn cuMemcpy2D_v2(description: In<Copy2d>) |driver| {
        let rows = description.get()?.rows(&driver)?;
        copy(driver, "cuMemcpy2D", rows, None)
    }

    fn cuMemcpy2DUnaligned_v2(description: In<Copy2d>) |driver| {
        let rows = description.get()?.rows(&driver)?;
        copy(driver, "cuMemcpy2DUnaligned", rows, None)
    }

    fn cuMemcpy2DAsync_v2(description: In<Copy2d>, stream: Handle) |driver| {
        let rows = description.get()?.rows(&driver)?;
        copy(driver, "cuMemcpy2DAsync", rows, Some(stream))
    }

    fn cuMemsetD8_v2(at: u64, value: u8, count: u64) |driver| {
        fill(driver, "cuMemsetD8", (at, 0), &[value], (count, 1), None)
    }

    fn cuMemsetD8Async(at: u64, value: u8, count: u64, stream: Handle) |driver| {
        fill(driver, "cuMemsetD8Async", (at, 0), &[value], (count, 1), Some(stream))
    }

    fn cuMemsetD16_v2(at: u64, value: u16, count: u64) |driver| {
        fill(driver, "cuMemsetD16", (at, 0), &value.to_ne_bytes(), (count, 1), None)
    }

    fn cuMemsetD16Async(at: u64, value: u16, count: u64, stream: Handle) |driver| {
        fill(driver, "cuMemsetD16Async", (at, 0), &value.to_ne_bytes(), (count, 1), Some(stream))
    }

    fn cuMemsetD32_v2(at: u64, value: u32, count: u64) |driver| {
        fill(driver, "cuMemsetD32", (at, 0), &value.to_ne_bytes(), (count, 1), None)
    }

    fn cuMemsetD32Async(at: u64, value: u32, count: u64, stream: Handle) |driver| {
        fill(driver, "cuMemsetD32Async", (at, 0), &value.to_ne_bytes(), (count, 1), Some(stream))
    }

    fn cuMemsetD2D8_v2(at: u64, pitch: u64, value: u8, width: u64, height: u64) |driver| {
        fill(driver, "cuMemsetD2D8", (at, pitch), &[value], (width, height), None)
    }

    fn cuMemsetD2D32_v2(at: u64, pitch: u64, value: u32, width: u64, height: u64) |driver| {
        let unit = value.to_ne_bytes();
        fill(driver, "cuMemsetD2D32", (at, pitch), &unit, (width, height), None)
    }

    fn cuMemAdvise(at: u64, bytes: u64, _advice: u32, _device: i32) |driver| {
        driver.check_range("cuMemAdvise", at, bytes)
    }

    fn cuMemPrefetchAsync(at: u64, bytes: u64, _device: i32, stream: Handle) |driver| {
        driver.stream(stream)?;
        driver.check_range("cuMemPrefetchAsync", at, bytes)
    }
}
