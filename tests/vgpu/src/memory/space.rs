//! Allocations and their bytes.

use std::collections::BTreeMap;

use super::{Access, Data, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Space, space_of};
use crate::finding::Fault;
use crate::machine::{Config, Cx};
use crate::race::StreamClock;
use crate::registers::lanes;

/// A stretch of device or host memory that somebody asked for.
#[derive(Debug)]
pub struct Allocation {
    /// The bytes, exactly as many as were asked for.
    pub bytes: Vec<u8>,
}

/// Why a request of the host cannot be met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryError(pub String);

/// The memory of all devices.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    next: u64,
    changes: u64,
}

/// A block's shared memory.
#[derive(Debug, Default)]
pub struct SharedMemory {
    bytes: Vec<u8>,
}

impl SharedMemory {
    /// `bytes` that nobody has written.
    pub fn new(bytes: u32) -> Self {
        Self {
            bytes: vec![0; bytes as usize],
        }
    }
}

impl Memory {
    /// Nothing allocated.
    pub fn new(_config: &Config) -> Self {
        Self::default()
    }

    /// Counts the writes that changed a value: whoever spins can only be released by one.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Whose accesses the host calls that follow are: a stream's, in its order.
    pub fn set_actor(&mut self, _stream: u32, _clock: &StreamClock) {}

    /// `bytes` on a device; the address.
    pub fn allocate(&mut self, device: u32, bytes: u64) -> Result<u64, MemoryError> {
        let at = 0x1000_0000_0000 + (u64::from(device) << 40) + self.next;
        self.next += bytes.next_multiple_of(512) + 512;
        self.allocations.insert(
            at,
            Allocation {
                bytes: vec![0; bytes as usize],
            },
        );
        Ok(at)
    }

    /// Room for a module's variable; nobody but its kernels and `cuMemcpy` may write it, and
    /// kernels may not when it is constant.
    pub fn allocate_variable(
        &mut self,
        device: u32,
        bytes: u64,
        _align: u64,
        _constant: bool,
    ) -> Result<u64, MemoryError> {
        self.allocate(device, bytes)
    }

    /// Writes a variable's initial value, constants included.
    pub fn write_image(&mut self, address: u64, image: &[u8]) -> Result<(), MemoryError> {
        self.write(address, image)
    }

    /// Whether an address lies in a `.const` variable.
    pub fn is_constant(&self, _address: u64) -> bool {
        false
    }

    /// Frees an allocation by its first address.
    pub fn free(&mut self, address: u64) -> Result<(), MemoryError> {
        let freed = self.allocations.remove(&address);
        freed.map(|_| ()).ok_or_else(|| outside(address))
    }

    /// Reads for the host.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let (bytes, at) = self
            .find(address, out.len())
            .map_err(|_| outside(address))?;
        out.copy_from_slice(&bytes[at..at + out.len()]);
        Ok(())
    }

    /// Writes for the host.
    pub fn write(&mut self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        let (bytes, at) = self
            .find_mut(address, data.len())
            .map_err(|_| outside(address))?;
        bytes[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Result<(&[u8], usize), Fault> {
        let (base, allocation) = self
            .allocations
            .range(..=address)
            .next_back()
            .ok_or(Fault::IllegalAddress)?;
        let at = (address - base) as usize;
        if at + len > allocation.bytes.len() {
            return Err(Fault::IllegalAddress);
        }
        Ok((&allocation.bytes, at))
    }

    fn find_mut(&mut self, address: u64, len: usize) -> Result<(&mut [u8], usize), Fault> {
        let (base, allocation) = self
            .allocations
            .range_mut(..=address)
            .next_back()
            .ok_or(Fault::IllegalAddress)?;
        let at = (address - base) as usize;
        if at + len > allocation.bytes.len() {
            return Err(Fault::IllegalAddress);
        }
        Ok((&mut allocation.bytes, at))
    }
}

fn outside(address: u64) -> MemoryError {
    MemoryError(format!("{address:#x} lies in no allocation"))
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

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    let n = bytes.len().saturating_sub(at).min(4);
    word[..n].copy_from_slice(&bytes[at..at + n]);
    u32::from_le_bytes(word)
}

pub(super) fn load(cx: &mut Cx, access: &Access, data: &mut Data) -> Result<(), Fault> {
    let n = access.bytes as usize;
    for lane in lanes(access.mask) {
        let mut bytes = [0u8; 32];
        let mut undef = [false; 32];
        let (space, at) = resolve(access.space, access.addresses[lane]);
        if at % u64::from(access.bytes) != 0 {
            return Err(Fault::MisalignedAddress);
        }
        match space {
            Space::Global | Space::Const | Space::Generic => {
                let (source, at) = cx.world.memory.find(at, n)?;
                bytes[..n].copy_from_slice(&source[at..at + n]);
            }
            Space::Shared => {
                let at = at as usize;
                let source = cx
                    .block
                    .shared
                    .bytes
                    .get(at..at + n)
                    .ok_or(Fault::IllegalAddress)?;
                bytes[..n].copy_from_slice(source);
            }
            Space::Param => {
                let at = at as usize;
                let source = cx
                    .launch
                    .params
                    .get(at..at + n)
                    .ok_or(Fault::IllegalAddress)?;
                bytes[..n].copy_from_slice(source);
            }
            Space::Local => {
                for i in 0..n {
                    (bytes[i], undef[i]) = cx
                        .warp
                        .local
                        .byte(lane, at + i as u64)
                        .ok_or(Fault::IllegalAddress)?;
                }
            }
        }
        for w in 0..n.div_ceil(4) {
            data.words[w][lane] = word(&bytes[..n], 4 * w);
            for b in 0..4 {
                let bit = u32::from(undef[4 * w + b]) << lane;
                data.undef[w][b] = (data.undef[w][b] & !(1 << lane)) | bit;
            }
        }
    }
    Ok(())
}

pub(super) fn store(cx: &mut Cx, access: &Access, data: &Data) -> Result<(), Fault> {
    let n = access.bytes as usize;
    for lane in lanes(access.mask) {
        let mut bytes = [0u8; 32];
        for w in 0..n.div_ceil(4) {
            bytes[4 * w..4 * w + 4].copy_from_slice(&data.words[w][lane].to_le_bytes());
        }
        let (space, at) = resolve(access.space, access.addresses[lane]);
        if at % u64::from(access.bytes) != 0 {
            return Err(Fault::MisalignedAddress);
        }
        cx.world.memory.changes += 1;
        match space {
            Space::Global | Space::Generic => {
                let (target, at) = cx.world.memory.find_mut(at, n)?;
                target[at..at + n].copy_from_slice(&bytes[..n]);
            }
            Space::Shared => {
                let at = at as usize;
                let target = cx
                    .block
                    .shared
                    .bytes
                    .get_mut(at..at + n)
                    .ok_or(Fault::IllegalAddress)?;
                target.copy_from_slice(&bytes[..n]);
            }
            Space::Local => {
                for (i, &byte) in bytes[..n].iter().enumerate() {
                    let undef = data.undef[i / 4][i % 4] >> lane & 1 != 0;
                    if !cx.warp.local.set_byte(lane, at + i as u64, byte, undef) {
                        return Err(Fault::IllegalAddress);
                    }
                }
            }
            Space::Param | Space::Const => return Err(Fault::IllegalAddress),
        }
    }
    Ok(())
}

pub(super) fn atomic(
    cx: &mut Cx,
    access: &Access,
    old: &mut Data,
    update: &mut dyn FnMut(usize, u64) -> Option<u64>,
) -> Result<(), Fault> {
    for lane in lanes(access.mask) {
        let one = Access {
            mask: 1 << lane,
            ..*access
        };
        load(cx, &one, old)?;
        let value = u64::from(old.words[0][lane]) | u64::from(old.words[1][lane]) << 32;
        let value = if access.bytes == 8 {
            value
        } else {
            value & 0xffff_ffff
        };
        if let Some(new) = update(lane, value) {
            let mut data = Data::default();
            data.words[0][lane] = new as u32;
            data.words[1][lane] = (new >> 32) as u32;
            store(cx, &one, &data)?;
        }
    }
    Ok(())
}
