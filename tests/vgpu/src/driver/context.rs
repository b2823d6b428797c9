//! Contexts: the calling thread's stack of them, and their limits.

use std::collections::BTreeMap;

use super::status::{Out, Outcome, Status};
use super::{CONTEXT, CURRENT, Context, Driver, Handle, api, wait_for};

impl Driver {
    pub(super) fn create_context(&mut self, device: u32, flags: u32, primary: bool) -> Handle {
        let handle = self.handle_on(CONTEXT, device);
        let context = Context {
            device,
            primary,
            flags,
            default: self.machine.create_stream(device),
            per_thread: self.machine.create_stream(device),
            // Stack, printf buffer and heap as the driver has them by default.
            limits: BTreeMap::from([(0, 1024), (1, 1 << 20), (2, 8 << 20), (3, 2), (4, 2048)]),
        };
        self.contexts.insert(handle, context);
        handle
    }

    /// A device that has died gets no new context.
    pub(super) fn check_dead(&self, device: u32) -> Outcome {
        match self.machine.world.memory.links.is_dead(device) {
            true => self.check(device),
            false => Ok(()),
        }
    }

    pub(super) fn retain_primary(&mut self, device: u32) -> Handle {
        let (context, _, flags) = self.primaries[device as usize];
        let handle = match context {
            Some(handle) => handle,
            None => self.create_context(device, flags, true),
        };
        let slot = &mut self.primaries[device as usize];
        slot.0 = Some(handle);
        slot.1 += 1;
        handle
    }

    /// Ends a context and everything in it. A device that faulted works again afterwards.
    pub(super) fn destroy_context(&mut self, handle: Handle) {
        let Some(context) = self.contexts.remove(&handle) else {
            return;
        };
        let device = context.device;
        self.forget_peers(handle);
        // Contexts of one device share its fault: with the first of them that goes, it goes.
        // A device that has died stays dead.
        if !self.machine.world.memory.links.is_dead(device) {
            self.machine.devices[device as usize].fault = None;
        }
        let own = [context.default, context.per_thread];
        let streams = self.streams.values().filter(|s| s.context == handle);
        let streams: Vec<_> = streams.map(|s| s.id).chain(own).collect();
        self.machine.cancel_streams(&streams);
        self.cancel_graphs(handle);
        for id in streams {
            self.captures.forget_stream(id);
            self.machine.destroy_stream(id);
        }
        let events: Vec<Handle> = self
            .events
            .iter()
            .filter(|(_, e)| e.context == handle)
            .map(|(h, _)| *h)
            .collect();
        for event in events {
            self.captures.forget_event(event);
            if let Some(event) = self.events.remove(&event) {
                self.machine.destroy_event(event.id);
            }
        }
        let modules: Vec<Handle> = self
            .modules
            .iter()
            .filter(|(_, m)| m.context == handle)
            .map(|(h, _)| *h)
            .collect();
        for module in modules {
            self.unload(module);
        }
        self.libraries.forget_context(handle);
        self.streams.retain(|_, s| s.context != handle);
        let allocations: Vec<u64> = self
            .allocations
            .iter()
            .filter(|(_, a)| a.0 == handle)
            .map(|(at, _)| *at)
            .collect();
        for at in allocations {
            self.release(at);
        }
    }

    fn limit(&mut self, number: u32) -> Result<&mut u64, Status> {
        let current = self.current()?;
        let context = self.contexts.get_mut(&current);
        let context = context.ok_or(Status::INVALID_CONTEXT)?;
        context.limits.get_mut(&number).ok_or(Status::NOT_SUPPORTED)
    }
}

fn push(handle: Handle) {
    CURRENT.with_borrow_mut(|stack| stack.push(handle));
}

fn set_current(handle: Handle) {
    CURRENT.with_borrow_mut(|stack| {
        stack.pop();
        if handle != 0 {
            stack.push(handle);
        }
    });
}

fn known(driver: &Driver, handle: Handle) -> Outcome {
    driver.context(handle).map(|_| ())
}

fn create(driver: &mut Driver, context: Out<Handle>, flags: u32, device: i32) -> Outcome {
    let device = u32::try_from(device).map_err(|_| Status::INVALID_DEVICE)?;
    if device as usize >= driver.machine.devices.len() {
        return Err(Status::INVALID_DEVICE);
    }
    if context.address() == 0 {
        return Err(Status::INVALID_VALUE);
    }
    driver.check_dead(device)?;
    let handle = driver.create_context(device, flags, false);
    push(handle);
    context.set(handle)
}

api! {
    fn cuCtxCreate_v2(context: Out<Handle>, flags: u32, device: i32) |driver| {
        create(&mut driver, context, flags, device)
    }

    fn cuCtxCreate_v3(context: Out<Handle>, _affinity: u64, n: i32, flags: u32, device: i32) |driver| {
        // A part of the multiprocessors only.
        if n != 0 {
            return Err(Status::NOT_SUPPORTED);
        }
        create(&mut driver, context, flags, device)
    }

    fn cuCtxCreate_v4(context: Out<Handle>, params: u64, flags: u32, device: i32) |driver| {
        if params != 0 {
            return Err(Status::NOT_SUPPORTED);
        }
        create(&mut driver, context, flags, device)
    }

    fn cuCtxGetId(context: Handle, id: Out<u64>) |driver| {
        let context = if context == 0 { driver.current()? } else { context };
        known(&driver, context)?;
        // Handles are never used again.
        id.set(context)
    }

    fn cuCtxSetFlags(flags: u32) |driver| {
        let current = driver.current()?;
        if let Some(context) = driver.contexts.get_mut(&current) {
            context.flags = flags;
        }
        Ok(())
    }

    fn cuCtxResetPersistingL2Cache() |driver| {
        driver.current().map(|_| ())
    }

    // There is no profiler to tell.
    fn cuProfilerStart() |driver| {
        driver.current().map(|_| ())
    }

    fn cuProfilerStop() |driver| {
        driver.current().map(|_| ())
    }

    fn cuCtxDestroy_v2(context: Handle) |driver| {
        if driver.context(context)?.primary {
            return Err(Status::INVALID_CONTEXT);
        }
        driver.destroy_context(context);
        CURRENT.with_borrow_mut(|stack| {
            if stack.last() == Some(&context) {
                stack.pop();
            }
        });
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: Handle) |driver| {
        known(&driver, context)?;
        push(context);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: Out<Handle>) |_driver| {
        let top = CURRENT.with_borrow_mut(Vec::pop).ok_or(Status::INVALID_CONTEXT)?;
        context.set_if_wanted(top);
        Ok(())
    }

    fn cuCtxSetCurrent(context: Handle) |driver| {
        if context != 0 {
            known(&driver, context)?;
        }
        set_current(context);
        Ok(())
    }

    fn cuCtxGetCurrent(context: Out<Handle>) |_driver| {
        context.set(CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0)))
    }

    fn cuCtxGetDevice(device: Out<i32>) |driver| {
        device.set(driver.device()? as i32)
    }

    fn cuCtxGetFlags(flags: Out<u32>) |driver| {
        let current = driver.current()?;
        flags.set(driver.context(current)?.flags)
    }

    fn cuCtxGetApiVersion(context: Handle, version: Out<u32>) |driver| {
        if context != 0 {
            known(&driver, context)?;
        }
        version.set(3020)
    }

    fn cuCtxGetLimit(value: Out<u64>, number: u32) |driver| {
        let limit = *driver.limit(number)?;
        value.set(limit)
    }

    fn cuCtxSetLimit(number: u32, value: u64) |driver| {
        *driver.limit(number)? = value;
        Ok(())
    }

    fn cuCtxGetCacheConfig(config: Out<u32>) |driver| {
        driver.current()?;
        config.set(0)
    }

    fn cuCtxSetCacheConfig(_config: u32) |driver| {
        driver.current().map(|_| ())
    }

    fn cuCtxGetSharedMemConfig(config: Out<u32>) |driver| {
        driver.current()?;
        config.set(1)
    }

    fn cuCtxSetSharedMemConfig(_config: u32) |driver| {
        driver.current().map(|_| ())
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) |driver| {
        driver.current()?;
        least.set_if_wanted(0);
        greatest.set_if_wanted(-5);
        Ok(())
    }

    fn cuCtxSynchronize() |driver| {
        let current = driver.healthy()?;
        driver.refuse_captured_context(current)?;
        driver.potentially_unsafe()?;
        let context = driver.context(current)?;
        let (device, own) = (context.device, [context.default, context.per_thread]);
        let streams = driver.streams.values().filter(|s| s.context == current).map(|s| s.id);
        let ids: Vec<_> = streams.chain(own).collect();
        let mut driver = driver;
        for id in ids {
            driver = wait_for(driver, id);
        }
        driver.check(device)
    }
}
