//! Devices and each other's memory: whether they can reach it, and whether they may.
//!
//! Peer access is enabled from one context to another; kernels see it from device to device: a
//! device reaches another's memory while any of its contexts has access to any of the other's.

use super::actors::wait_for_devices;
use super::status::{Out, Status};
use super::{Driver, Handle, api};
use crate::memory::{Fabric, MAX_DEVICES};

impl Driver {
    fn pair(&self, from: i32, to: i32) -> Result<(u32, u32), Status> {
        let device = |ordinal: i32| {
            let device = u32::try_from(ordinal).map_err(|_| Status::INVALID_DEVICE)?;
            let known = (device as usize) < self.machine.devices.len();
            known.then_some(device).ok_or(Status::INVALID_DEVICE)
        };
        Ok((device(from)?, device(to)?))
    }

    /// Tells the devices which of them reach each other now.
    fn refresh_peers(&mut self) {
        let links = &mut self.machine.world.memory.links;
        let devices = self.machine.devices.len() as u32;
        let device = |handle: &Handle| self.contexts.get(handle).map(|c| c.device);
        let enabled: Vec<_> = self
            .peers
            .iter()
            .map(|(from, to)| (device(from), device(to)))
            .collect();
        for from in 0..devices {
            for to in 0..devices {
                links.enable(from, to, enabled.contains(&(Some(from), Some(to))));
            }
        }
    }

    /// A context ends, and with it the access from and to it.
    pub(super) fn forget_peers(&mut self, context: Handle) {
        self.peers
            .retain(|&(from, to)| from != context && to != context);
        self.refresh_peers();
    }
}

api! {
    fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) |driver| {
        let (from, to) = driver.pair(device, peer)?;
        can.set(driver.machine.world.memory.links.can_access(from, to).into())
    }

    fn cuDeviceGetP2PAttribute(value: Out<i32>, attribute: u32, device: i32, peer: i32) |driver| {
        let (from, to) = driver.pair(device, peer)?;
        if from == to {
            return Err(Status::INVALID_DEVICE);
        }
        let fabric = driver.machine.world.memory.links.fabric(from, to);
        value.set(match attribute {
            // CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK: smaller is faster.
            1 => i32::from(fabric != Fabric::NvLink),
            // …_ACCESS_SUPPORTED
            2 => i32::from(fabric != Fabric::None),
            // …_NATIVE_ATOMIC_SUPPORTED
            3 => i32::from(fabric == Fabric::NvLink),
            // …_CUDA_ARRAY_ACCESS_SUPPORTED, …_ONLY_PARTIAL_NATIVE_ATOMIC_SUPPORTED
            4 | 5 => 0,
            _ => return Err(Status::INVALID_VALUE),
        })
    }

    fn cuCtxEnablePeerAccess(peer: Handle, flags: u32) |driver| {
        let current = driver.healthy()?;
        let (from, to) = (driver.context(current)?.device, driver.context(peer)?.device);
        if flags != 0 {
            return Err(Status::INVALID_VALUE);
        }
        if current == peer {
            return Err(Status::INVALID_CONTEXT);
        }
        driver.check_dead(to)?;
        if from != to && !driver.machine.world.memory.links.can_access(from, to) {
            return Err(Status::PEER_ACCESS_UNSUPPORTED);
        }
        if driver.peers.contains(&(current, peer)) {
            return Err(Status::PEER_ACCESS_ALREADY_ENABLED);
        }
        if driver.peers.iter().filter(|p| p.0 == current).count() >= MAX_DEVICES as usize {
            return Err(Status::TOO_MANY_PEERS);
        }
        // New mappings want the devices at rest.
        driver = wait_for_devices(driver, 1 << from | 1 << to);
        driver.check(from)?;
        driver.peers.insert((current, peer));
        driver.refresh_peers();
        Ok(())
    }

    fn cuCtxDisablePeerAccess(peer: Handle) |driver| {
        let current = driver.healthy()?;
        driver.context(peer)?;
        if !driver.peers.remove(&(current, peer)) {
            return Err(Status::PEER_ACCESS_NOT_ENABLED);
        }
        driver.refresh_peers();
        Ok(())
    }
}
