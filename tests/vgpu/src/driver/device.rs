//! Devices and their attributes.

use super::status::{Out, Outcome, Status};
use super::{Driver, api};
use crate::machine::{Properties, SHARED_PER_BLOCK, THREADS_PER_BLOCK};

impl Driver {
    fn properties(&self, device: i32) -> Result<&Properties, Status> {
        let device = usize::try_from(device).map_err(|_| Status::INVALID_DEVICE)?;
        let device = self.machine.devices.get(device);
        Ok(&device.ok_or(Status::INVALID_DEVICE)?.properties)
    }
}

/// The attributes of a device by their numbers in `cuda.h`. Rates and widths, which mean nothing
/// here, are those of the chip's order of magnitude; what a virtual device lacks is 0.
fn attribute(number: u32, ordinal: i32, p: &Properties) -> Option<i32> {
    Some(match number {
        1 => THREADS_PER_BLOCK as i32,
        2 | 3 => 1024,
        4 => 64,
        5 => i32::MAX,
        6 | 7 => 65_535,
        8 => SHARED_PER_BLOCK as i32,
        9 => 65_536,
        10 => 32,
        11 => i32::MAX,
        12 | 82 => p.registers_per_sm as i32,
        13 => 1_500_000,
        14 => 512,
        // Concurrent copies, kernels; addressing shared with the host; mapped host memory.
        15 | 19 | 31 | 41 => 1,
        16 => p.multiprocessors as i32,
        17 => 0,
        18 => 0,
        20 => 0,
        // Cooperative launches.
        95 => 1,
        33 => ordinal + 1,
        34 => 0,
        35 => 0,
        36 => 1_500_000,
        37 => 5120,
        38 => 50 << 20,
        39 => p.threads_per_sm as i32,
        40 => 2,
        50 => 0,
        75 => p.capability.0 as i32,
        76 => p.capability.1 as i32,
        78..=80 => 1,
        81 => p.shared_per_sm as i32,
        83 => 1,
        84 => 0,
        85 => 0,
        86 => 1,
        88 => 1,
        89 => 1,
        90 => 0,
        91 => 0,
        97 => p.shared_per_block_optin as i32,
        99 => 1,
        100 => 0,
        101 => 0,
        // Virtual memory management, handles: not here.
        102..=105 => 0,
        106 => p.blocks_per_sm as i32,
        108 => 0,
        111 => 1024,
        // Memory pools.
        115 => 1,
        // Stream wait and write value, 64 bits too.
        92..=94 | 122..=125 => 1,
        _ if number <= 150 => 0,
        _ => return None,
    })
}

api! {
    fn cuDeviceGetCount(count: Out<i32>) |driver| {
        count.set(driver.machine.devices.len() as i32)
    }

    fn cuDeviceGet(device: Out<i32>, ordinal: i32) |driver| {
        driver.properties(ordinal)?;
        device.set(ordinal)
    }

    fn cuDeviceGetName(name: Out<u8>, len: i32, device: i32) |driver| {
        let mut words = driver.properties(device)?.name.clone().into_bytes();
        let len = usize::try_from(len).map_err(|_| Status::INVALID_VALUE)?;
        if len == 0 || name.address() == 0 {
            return Err(Status::INVALID_VALUE);
        }
        words.truncate(len - 1);
        words.push(0);
        name.write(&words);
        Ok(())
    }

    fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: i32) |driver| {
        driver.properties(device)?;
        uuid.set(id_of(device))
    }

    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) |driver| {
        driver.properties(device)?;
        uuid.set(id_of(device))
    }

    fn cuDeviceGetPCIBusId(id: Out<u8>, len: i32, device: i32) |driver| {
        driver.properties(device)?;
        let words = format!("0000:{:02x}:00.0\0", device + 1);
        if (len as usize) < words.len() || len < 0 || id.address() == 0 {
            return Err(Status::INVALID_VALUE);
        }
        id.write(words.as_bytes());
        Ok(())
    }

    fn cuDeviceTotalMem_v2(bytes: Out<u64>, device: i32) |driver| {
        bytes.set(driver.properties(device)?.memory)
    }

    fn cuDeviceComputeCapability(major: Out<i32>, minor: Out<i32>, device: i32) |driver| {
        let (a, b) = driver.properties(device)?.capability;
        major.set(a as i32)?;
        minor.set(b as i32)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, number: u32, device: i32) |driver| {
        let found = attribute(number, device, driver.properties(device)?);
        value.set(found.ok_or(Status::INVALID_VALUE)?)
    }

    fn cuDevicePrimaryCtxRetain(context: Out<u64>, device: i32) |driver| {
        driver.properties(device)?;
        driver.check_dead(device as u32)?;
        let handle = driver.retain_primary(device as u32);
        context.set(handle)
    }

    fn cuDevicePrimaryCtxRelease_v2(device: i32) |driver| {
        driver.properties(device)?;
        let (context, held, _) = &mut driver.primaries[device as usize];
        if *held == 0 {
            return Err(Status::INVALID_CONTEXT);
        }
        *held -= 1;
        if *held == 0 && let Some(context) = context.take() {
            driver.destroy_context(context);
        }
        Ok(())
    }

    fn cuDevicePrimaryCtxReset_v2(device: i32) |driver| {
        driver.properties(device)?;
        if let Some(context) = driver.primaries[device as usize].0.take() {
            driver.destroy_context(context);
        }
        Ok(())
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32) |driver| {
        driver.properties(device)?;
        driver.primaries[device as usize].2 = flags;
        Ok(())
    }

    fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) |driver| {
        driver.properties(device)?;
        let (context, _, kept) = driver.primaries[device as usize];
        flags.set(kept)?;
        active.set(context.is_some().into())
    }
}

fn id_of(device: i32) -> [u8; 16] {
    let mut id = *b"virtual-gpu\0\0\0\0\0";
    id[12..].copy_from_slice(&device.to_be_bytes());
    id
}

/// The outcome of looking up something that must be there.
pub(super) fn found(there: bool) -> Outcome {
    if there {
        Ok(())
    } else {
        Err(Status::INVALID_HANDLE)
    }
}
