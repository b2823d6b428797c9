//! Copies and fills of linear memory, in one, two and three dimensions.
//!
//! Pageable memory of the host is read when a copy is submitted, as the driver stages it, and a
//! copy into it has ended when the call returns; pinned memory is read and written when the
//! copy's turn comes. In a graph both are, as on a device.

use super::operation::Operation;
use super::status::{In, Out, Outcome, Status};
use super::{Driver, Guard, Handle, api, explain, wait_for};
use crate::finding::Fault;
use crate::machine::{Command, World};
use crate::memory::{Crossing, Memory};

/// Nothing of a process lies below: an offset from a null pointer.
const LOWEST: u64 = 4096;

/// One end of a copy.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    /// Memory that devices may access, pinned host memory included.
    Device(u64),
    /// Pageable memory of the host.
    Host(u64),
}

impl End {
    fn address(self) -> u64 {
        match self {
            End::Device(at) | End::Host(at) => at,
        }
    }

    /// The device whose memory it is; none for memory of the host.
    fn device(self, memory: &Memory) -> Option<u32> {
        let (_, allocation) = memory.containing(self.address())?;
        (!allocation.region.is_host()).then_some(allocation.device)
    }

    fn offset(self, bytes: u64) -> Self {
        match self {
            End::Device(at) => End::Device(at.wrapping_add(bytes)),
            End::Host(at) => End::Host(at.wrapping_add(bytes)),
        }
    }
}

/// Where a box of bytes lies: from `end`, rows and slices so many bytes apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    end: End,
    row: u64,
    slice: u64,
}

impl Layout {
    fn at(&self, y: u64, z: u64) -> End {
        self.end.offset(y * self.row + z * self.slice)
    }

    /// Bytes from the first to the last of a box; None if that is no number.
    fn span(&self, [width, height, depth]: [u64; 3]) -> Option<u64> {
        let rows = (height - 1).checked_mul(self.row)?;
        let slices = (depth - 1).checked_mul(self.slice)?;
        rows.checked_add(slices)?.checked_add(width)
    }
}

/// A copy of a box of `[width in bytes, height, depth]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy {
    to: Layout,
    from: Layout,
    extent: [u64; 3],
}

/// When pageable memory of the host is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Staging {
    /// When the copy is submitted.
    Now,
    /// When its turn comes.
    Later,
}

impl Copy {
    fn line(to: End, from: End, bytes: u64) -> Self {
        let layout = |end| Layout {
            end,
            row: bytes,
            slice: bytes,
        };
        Self {
            to: layout(to),
            from: layout(from),
            extent: [bytes, 1, 1],
        }
    }

    fn is_empty(&self) -> bool {
        self.extent.contains(&0)
    }

    /// Whether both ends are there, as far as the driver can know.
    pub(super) fn check(&self, driver: &Driver, name: &str) -> Outcome {
        if self.is_empty() {
            return Ok(());
        }
        for layout in [self.to, self.from] {
            let span = layout.span(self.extent).ok_or(Status::INVALID_VALUE)?;
            match layout.end {
                End::Device(at) => {
                    driver.check_range(name, at, span)?;
                    driver.check_alive(at)?;
                }
                End::Host(at) => {
                    if at < LOWEST || at.checked_add(span).is_none() {
                        return Err(Status::INVALID_VALUE);
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether it ends in memory that the host may look at once the call has returned.
    fn ends_in_pageable(&self) -> bool {
        !self.is_empty() && matches!(self.to.end, End::Host(_))
    }

    fn rows(self) -> impl Iterator<Item = (u64, u64)> {
        let [width, height, depth] = self.extent;
        let depth = if width == 0 || height == 0 { 0 } else { depth };
        (0..depth).flat_map(move |z| (0..height).map(move |y| (y, z)))
    }

    /// What the copy does when its turn comes.
    pub(super) fn command(self, staging: Staging) -> Result<Command, Status> {
        let width = self.extent[0] as usize;
        let read = move |from: End| In::at(from.address()).bytes(width);
        let mut staged = None;
        if let (Staging::Now, End::Host(_)) = (staging, self.from.end) {
            let rows = self.rows().map(|(y, z)| read(self.from.at(y, z)));
            staged = Some(rows.collect::<Result<Vec<_>, _>>()?);
        }
        Ok(Command::Work(Box::new(move |world: &mut World| {
            let failed = |_| Fault::IllegalAddress;
            if let Some(report) = &mut world.report {
                let [from, to] = [self.from.end, self.to.end].map(|end| end.device(&world.memory));
                report.copied(&world.memory, from, to, self.extent.iter().product());
            }
            let reads = reach(world, self.from.end)?;
            if !reach(world, self.to.end)? {
                return Ok(());
            }
            for (n, (y, z)) in self.rows().enumerate() {
                if !reads {
                    let ones = vec![0xff; width];
                    match self.to.at(y, z) {
                        End::Device(to) => world.memory.write(to, &ones).map_err(failed)?,
                        End::Host(to) => Out::at(to).write(&ones),
                    }
                    continue;
                }
                match (self.to.at(y, z), self.from.at(y, z)) {
                    (End::Device(to), End::Device(from)) => {
                        world.memory.copy(to, from, width).map_err(failed)?;
                    }
                    (End::Host(to), End::Device(from)) => {
                        let mut bytes = vec![0; width];
                        world.memory.read(from, &mut bytes).map_err(failed)?;
                        Out::at(to).write(&bytes);
                    }
                    (to, from) => {
                        let late;
                        let bytes = match &staged {
                            Some(rows) => &rows[n],
                            None => {
                                late = read(from).map_err(|_| Fault::IllegalAddress)?;
                                &late
                            }
                        };
                        match to {
                            End::Device(to) => world.memory.write(to, bytes).map_err(failed)?,
                            End::Host(to) => Out::at(to).write(bytes),
                        }
                    }
                }
            }
            Ok(())
        })))
    }

    /// As the structure of a memcpy node.
    pub(super) fn description(&self) -> Copy3d {
        let kind = |end: End| match end {
            End::Host(_) => 1,
            End::Device(_) => 2,
        };
        let side = |layout: &Layout| {
            let host = matches!(layout.end, End::Host(_));
            let at = layout.end.address();
            Side {
                kind: kind(layout.end),
                host: if host { at } else { 0 },
                device: if host { 0 } else { at },
                pitch: layout.row,
                height: layout.slice.checked_div(layout.row).unwrap_or(0),
                ..Side::default()
            }
        };
        Copy3d {
            from: side(&self.from),
            to: side(&self.to),
            extent: self.extent,
        }
    }
}

/// Whether the engine at work reaches memory: if not, what it writes there is lost and what it
/// reads is ones. A dead device, or link, may end its context.
fn reach(world: &World, end: End) -> Result<bool, Fault> {
    let Some(device) = end.device(&world.memory) else {
        return Ok(true);
    };
    match world.memory.links.engine_crosses(world.engine, device) {
        Crossing::Arrives => Ok(true),
        Crossing::Lost => Ok(false),
        Crossing::Fatal | Crossing::Barred => Err(Fault::NvlinkUncorrectable),
    }
}

/// A fill of rows with a unit of 1, 2 or 4 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fill {
    pub(super) at: u64,
    pub(super) pitch: u64,
    pub(super) value: u32,
    /// Bytes of the value.
    pub(super) unit: u32,
    /// Units in a row, and rows.
    pub(super) width: u64,
    pub(super) height: u64,
}

impl Fill {
    /// Whether it can be done.
    pub(super) fn check(&self, driver: &Driver, name: &str) -> Outcome {
        let unit = u64::from(self.unit);
        if !matches!(unit, 1 | 2 | 4) || !self.at.is_multiple_of(unit) {
            return Err(Status::INVALID_VALUE);
        }
        let row = self.width.checked_mul(unit).ok_or(Status::INVALID_VALUE)?;
        if row == 0 || self.height == 0 {
            return Ok(());
        }
        if self.height > 1 && (self.pitch < row || !self.pitch.is_multiple_of(unit)) {
            return Err(Status::INVALID_VALUE);
        }
        let rows = (self.height - 1).checked_mul(self.pitch);
        let span = rows.and_then(|rows| rows.checked_add(row));
        driver.check_range(name, self.at, span.ok_or(Status::INVALID_VALUE)?)?;
        driver.check_alive(self.at)
    }

    pub(super) fn command(self) -> Command {
        Command::Work(Box::new(move |world: &mut World| {
            if self.width == 0 || self.height == 0 || !reach(world, End::Device(self.at))? {
                return Ok(());
            }
            let unit = &self.value.to_le_bytes()[..self.unit as usize];
            let row = unit.repeat(self.width as usize);
            for y in 0..self.height {
                let written = world.memory.write(self.at + y * self.pitch, &row);
                written.map_err(|_| Fault::IllegalAddress)?;
            }
            Ok(())
        }))
    }
}

/// `CUDA_MEMCPY2D`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Copy2d {
    from: Side2d,
    to: Side2d,
    width: u64,
    height: u64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Side2d {
    x: u64,
    y: u64,
    kind: u32,
    host: u64,
    device: u64,
    array: u64,
    pitch: u64,
}

/// `CUDA_MEMCPY3D` and `CUDA_MEMCPY3D_PEER`, which has a context where the other has nothing.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Copy3d {
    from: Side,
    to: Side,
    extent: [u64; 3],
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Side {
    x: u64,
    y: u64,
    z: u64,
    level: u64,
    kind: u32,
    host: u64,
    device: u64,
    array: u64,
    reserved: u64,
    pitch: u64,
    height: u64,
}

impl Side {
    fn layout(&self, driver: &Driver, [width, height, depth]: [u64; 3]) -> Result<Layout, Status> {
        let row = if self.pitch == 0 { width } else { self.pitch };
        let rows = if self.height == 0 {
            height
        } else {
            self.height
        };
        if row < width || (depth > 1 && rows < height) || self.level != 0 {
            return Err(Status::INVALID_VALUE);
        }
        let slice = row.checked_mul(rows);
        let offset = slice.and_then(|slice| {
            let z = self.z.checked_mul(slice)?;
            let y = self.y.checked_mul(row)?;
            z.checked_add(y)?.checked_add(self.x)
        });
        let (slice, offset) = slice.zip(offset).ok_or(Status::INVALID_VALUE)?;
        let end = match self.kind {
            1 => either(driver, self.host.wrapping_add(offset)),
            2 => End::Device(self.device.wrapping_add(offset)),
            4 => either(driver, self.device.wrapping_add(offset)),
            // An array.
            3 => return Err(Status::NOT_SUPPORTED),
            _ => return Err(Status::INVALID_VALUE),
        };
        Ok(Layout { end, row, slice })
    }
}

impl Copy3d {
    fn check_contexts(&self, driver: &Driver) -> Outcome {
        driver.context(self.to.reserved)?;
        driver.context(self.from.reserved)?;
        Ok(())
    }

    pub(super) fn copy(&self, driver: &Driver) -> Result<Copy, Status> {
        Ok(Copy {
            to: self.to.layout(driver, self.extent)?,
            from: self.from.layout(driver, self.extent)?,
            extent: self.extent,
        })
    }
}

impl Copy2d {
    fn copy(&self, driver: &Driver) -> Result<Copy, Status> {
        let side = |side: &Side2d| Side {
            x: side.x,
            y: side.y,
            kind: side.kind,
            host: side.host,
            device: side.device,
            array: side.array,
            pitch: side.pitch,
            ..Side::default()
        };
        let whole = Copy3d {
            from: side(&self.from),
            to: side(&self.to),
            extent: [self.width, self.height, 1],
        };
        whole.copy(driver)
    }
}

/// Memory that devices may access, or pageable memory, whichever an address is. What lies where
/// devices have their memory is never the host's, even if nothing is there.
fn either(driver: &Driver, at: u64) -> End {
    if driver.is_device(at) || driver.machine.world.memory.is_of_devices(at) {
        End::Device(at)
    } else {
        End::Host(at)
    }
}

fn copy(mut driver: Guard, name: &str, copy: Copy, stream: Option<Handle>) -> Outcome {
    driver.healthy()?;
    copy.check(&driver, name)?;
    let target = stream.unwrap_or(0);
    let captured = driver.is_captured(target)?;
    driver.submit(target, Operation::Copy(copy))?;
    if stream.is_none() || (copy.ends_in_pageable() && !captured) {
        finish(driver, target)
    } else {
        Ok(())
    }
}

/// Waits for a stream and gives what its device came to.
fn finish(driver: Guard, stream: Handle) -> Outcome {
    let (id, context, _) = driver.stream(stream)?;
    let device = driver.context(context)?.device;
    let driver = wait_for(driver, id);
    driver.check(device)
}

fn fill(mut driver: Guard, name: &str, fill: Fill, stream: Option<Handle>) -> Outcome {
    driver.healthy()?;
    fill.check(&driver, name)?;
    driver.submit(stream.unwrap_or(0), Operation::Fill(fill))?;
    match stream {
        Some(_) => Ok(()),
        None => finish(driver, 0),
    }
}

fn line(at: u64, value: u32, unit: u32, width: u64) -> Fill {
    rows(at, 0, value, unit, (width, 1))
}

fn rows(at: u64, pitch: u64, value: u32, unit: u32, (width, height): (u64, u64)) -> Fill {
    Fill {
        at,
        pitch,
        value,
        unit,
        width,
        height,
    }
}

/// Refuses the wrong side of a copy by the name of the call.
fn host(driver: &Driver, name: &str, at: u64) -> Result<End, Status> {
    let end = either(driver, at);
    if let End::Device(_) = end
        && !driver.is_host(at)
    {
        explain(name, format_args!("{at:#x} is device memory"));
        return Err(Status::INVALID_VALUE);
    }
    Ok(end)
}

api! {
    fn cuMemcpy(to: u64, from: u64, bytes: u64) |driver| {
        let line = Copy::line(either(&driver, to), either(&driver, from), bytes);
        copy(driver, "cuMemcpy", line, None)
    }

    fn cuMemcpyAsync(to: u64, from: u64, bytes: u64, stream: Handle) |driver| {
        let line = Copy::line(either(&driver, to), either(&driver, from), bytes);
        copy(driver, "cuMemcpyAsync", line, Some(stream))
    }

    fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: u64) |driver| {
        let line = Copy::line(End::Device(to), host(&driver, "cuMemcpyHtoD", from)?, bytes);
        copy(driver, "cuMemcpyHtoD", line, None)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: u64, stream: Handle) |driver| {
        let line = Copy::line(End::Device(to), host(&driver, "cuMemcpyHtoDAsync", from)?, bytes);
        copy(driver, "cuMemcpyHtoDAsync", line, Some(stream))
    }

    fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: u64) |driver| {
        let line = Copy::line(host(&driver, "cuMemcpyDtoH", to)?, End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoH", line, None)
    }

    fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: u64, stream: Handle) |driver| {
        let line = Copy::line(host(&driver, "cuMemcpyDtoHAsync", to)?, End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoHAsync", line, Some(stream))
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: u64) |driver| {
        let line = Copy::line(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoD", line, None)
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: u64, stream: Handle) |driver| {
        let line = Copy::line(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyDtoDAsync", line, Some(stream))
    }

    fn cuMemcpyPeer(to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: u64) |driver| {
        driver.context(to_context)?;
        driver.context(from_context)?;
        let line = Copy::line(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyPeer", line, None)
    }

    fn cuMemcpyPeerAsync(
        to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: u64, stream: Handle,
    ) |driver| {
        driver.context(to_context)?;
        driver.context(from_context)?;
        let line = Copy::line(End::Device(to), End::Device(from), bytes);
        copy(driver, "cuMemcpyPeerAsync", line, Some(stream))
    }

    fn cuMemcpy3DPeer(description: In<Copy3d>) |driver| {
        let description = description.get()?;
        description.check_contexts(&driver)?;
        let rows = description.copy(&driver)?;
        copy(driver, "cuMemcpy3DPeer", rows, None)
    }

    fn cuMemcpy3DPeerAsync(description: In<Copy3d>, stream: Handle) |driver| {
        let description = description.get()?;
        description.check_contexts(&driver)?;
        let rows = description.copy(&driver)?;
        copy(driver, "cuMemcpy3DPeerAsync", rows, Some(stream))
    }

    fn cuMemcpy2D_v2(description: In<Copy2d>) |driver| {
        let rows = description.get()?.copy(&driver)?;
        copy(driver, "cuMemcpy2D", rows, None)
    }

    fn cuMemcpy2DUnaligned_v2(description: In<Copy2d>) |driver| {
        let rows = description.get()?.copy(&driver)?;
        copy(driver, "cuMemcpy2DUnaligned", rows, None)
    }

    fn cuMemcpy2DAsync_v2(description: In<Copy2d>, stream: Handle) |driver| {
        let rows = description.get()?.copy(&driver)?;
        copy(driver, "cuMemcpy2DAsync", rows, Some(stream))
    }

    fn cuMemcpy3D_v2(description: In<Copy3d>) |driver| {
        let rows = description.get()?.copy(&driver)?;
        copy(driver, "cuMemcpy3D", rows, None)
    }

    fn cuMemcpy3DAsync_v2(description: In<Copy3d>, stream: Handle) |driver| {
        let rows = description.get()?.copy(&driver)?;
        copy(driver, "cuMemcpy3DAsync", rows, Some(stream))
    }

    fn cuMemsetD8_v2(at: u64, value: u8, count: u64) |driver| {
        fill(driver, "cuMemsetD8", line(at, value.into(), 1, count), None)
    }

    fn cuMemsetD8Async(at: u64, value: u8, count: u64, stream: Handle) |driver| {
        fill(driver, "cuMemsetD8Async", line(at, value.into(), 1, count), Some(stream))
    }

    fn cuMemsetD16_v2(at: u64, value: u16, count: u64) |driver| {
        fill(driver, "cuMemsetD16", line(at, value.into(), 2, count), None)
    }

    fn cuMemsetD16Async(at: u64, value: u16, count: u64, stream: Handle) |driver| {
        fill(driver, "cuMemsetD16Async", line(at, value.into(), 2, count), Some(stream))
    }

    fn cuMemsetD32_v2(at: u64, value: u32, count: u64) |driver| {
        fill(driver, "cuMemsetD32", line(at, value, 4, count), None)
    }

    fn cuMemsetD32Async(at: u64, value: u32, count: u64, stream: Handle) |driver| {
        fill(driver, "cuMemsetD32Async", line(at, value, 4, count), Some(stream))
    }

    fn cuMemsetD2D8_v2(at: u64, pitch: u64, value: u8, width: u64, height: u64) |driver| {
        fill(driver, "cuMemsetD2D8", rows(at, pitch, value.into(), 1, (width, height)), None)
    }

    fn cuMemsetD2D8Async(at: u64, pitch: u64, value: u8, width: u64, height: u64, stream: Handle) |driver| {
        let rows = rows(at, pitch, value.into(), 1, (width, height));
        fill(driver, "cuMemsetD2D8Async", rows, Some(stream))
    }

    fn cuMemsetD2D16_v2(at: u64, pitch: u64, value: u16, width: u64, height: u64) |driver| {
        fill(driver, "cuMemsetD2D16", rows(at, pitch, value.into(), 2, (width, height)), None)
    }

    fn cuMemsetD2D16Async(at: u64, pitch: u64, value: u16, width: u64, height: u64, stream: Handle) |driver| {
        let rows = rows(at, pitch, value.into(), 2, (width, height));
        fill(driver, "cuMemsetD2D16Async", rows, Some(stream))
    }

    fn cuMemsetD2D32_v2(at: u64, pitch: u64, value: u32, width: u64, height: u64) |driver| {
        fill(driver, "cuMemsetD2D32", rows(at, pitch, value, 4, (width, height)), None)
    }

    fn cuMemsetD2D32Async(at: u64, pitch: u64, value: u32, width: u64, height: u64, stream: Handle) |driver| {
        let rows = rows(at, pitch, value, 4, (width, height));
        fill(driver, "cuMemsetD2D32Async", rows, Some(stream))
    }
}
