//! Streams, events, host functions, and waiting for values in memory.

use super::device::found;
use super::status::{Out, Outcome, Status};
use super::{EVENT, Event, Guard, Handle, STREAM, Stream, api, wait, wait_for};
use crate::machine::{Command, World};

/// Steps that a question about progress makes the devices take: whoever only asks gets somewhere.
const STEPS: u32 = 256;

fn advance(mut driver: Guard) -> Guard {
    for _ in 0..STEPS {
        match driver.machine.step() {
            crate::machine::Progress::Advanced => {}
            crate::machine::Progress::HostFunction(stream, function) => {
                drop(driver);
                function();
                driver = super::lock();
                driver.machine.host_function_done(stream);
            }
            _ => break,
        }
    }
    driver.show();
    driver
}

fn create(mut driver: Guard, stream: Out<Handle>, flags: u32, priority: i32) -> Outcome {
    let context = driver.healthy()?;
    if flags > 1 {
        return Err(Status::INVALID_VALUE);
    }
    let device = driver.context(context)?.device;
    let id = driver.machine.create_stream(device);
    let handle = driver.handle(STREAM);
    let made = Stream {
        context,
        id,
        non_blocking: flags & 1 != 0,
        flags,
        priority: priority.clamp(-5, 0),
    };
    driver.streams.insert(handle, made);
    stream.set(handle)
}

/// `cuStreamWaitValue` and its comparisons.
fn until(
    mut driver: Guard,
    stream: Handle,
    at: u64,
    value: u64,
    flags: u32,
    bytes: usize,
) -> Outcome {
    if !at.is_multiple_of(bytes as u64) || flags & !3 != 0 {
        return Err(Status::INVALID_VALUE);
    }
    let memory = &driver.machine.world.memory;
    memory.check(at, bytes).map_err(|_| Status::INVALID_VALUE)?;
    let condition = move |world: &World| {
        let Some((base, allocation)) = world.memory.containing(at) else {
            return false;
        };
        let offset = (at - base) as usize;
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&allocation.region.bytes()[offset..offset + bytes]);
        let found = u64::from_le_bytes(word);
        match flags {
            // Not less, cyclically: the difference is not negative.
            0 if bytes == 4 => (found as u32).wrapping_sub(value as u32) as i32 >= 0,
            0 => found.wrapping_sub(value) as i64 >= 0,
            1 => found == value,
            2 => found & value != 0,
            _ if bytes == 4 => !(found as u32 | value as u32) != 0,
            _ => !(found | value) != 0,
        }
    };
    driver
        .enqueue(stream, Command::Until(Box::new(condition)))
        .map(|_| ())
}

fn write(mut driver: Guard, stream: Handle, at: u64, value: u64, bytes: usize) -> Outcome {
    let memory = &driver.machine.world.memory;
    memory.check(at, bytes).map_err(|_| Status::INVALID_VALUE)?;
    let command = Command::Work(Box::new(move |world: &mut World| {
        let written = world.memory.write(at, &value.to_le_bytes()[..bytes]);
        written.map_err(|_| crate::finding::Fault::IllegalAddress)
    }));
    driver.enqueue(stream, command).map(|_| ())
}

/// A function of the host and its argument.
struct HostFunction(extern "C" fn(u64), u64);

api! {
    fn cuStreamCreate(stream: Out<Handle>, flags: u32) |driver| {
        create(driver, stream, flags, 0)
    }

    fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, priority: i32) |driver| {
        create(driver, stream, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: Handle) |driver| {
        let known = driver.streams.remove(&stream).ok_or(Status::INVALID_HANDLE)?;
        // What is in it still runs; the machine forgets it when it is done.
        let driver = wait_for(driver, known.id);
        let mut driver = driver;
        driver.machine.destroy_stream(known.id);
        Ok(())
    }

    fn cuStreamSynchronize(stream: Handle) |driver| {
        let (id, context, _) = driver.stream(stream)?;
        let device = driver.context(context)?.device;
        driver.check(device)?;
        let driver = wait_for(driver, id);
        driver.check(device)
    }

    fn cuStreamQuery(stream: Handle) |driver| {
        let (id, context, _) = driver.stream(stream)?;
        let device = driver.context(context)?.device;
        let driver = advance(driver);
        driver.check(device)?;
        if driver.machine.is_idle(id) { Ok(()) } else { Err(Status::NOT_READY) }
    }

    fn cuStreamGetFlags(stream: Handle, flags: Out<u32>) |driver| {
        driver.stream(stream)?;
        flags.set(driver.streams.get(&stream).map_or(0, |s| s.flags))
    }

    fn cuStreamGetPriority(stream: Handle, priority: Out<i32>) |driver| {
        driver.stream(stream)?;
        priority.set(driver.streams.get(&stream).map_or(0, |s| s.priority))
    }

    fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) |driver| {
        let (_, owner, _) = driver.stream(stream)?;
        context.set(owner)
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) |driver| {
        if flags > 1 {
            return Err(Status::INVALID_VALUE);
        }
        let event = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?.id;
        driver.enqueue(stream, Command::Wait(event)).map(|_| ())
    }

    fn cuStreamWaitValue32_v2(stream: Handle, at: u64, value: u32, flags: u32) |driver| {
        until(driver, stream, at, value.into(), flags, 4)
    }

    fn cuStreamWaitValue64_v2(stream: Handle, at: u64, value: u64, flags: u32) |driver| {
        until(driver, stream, at, value, flags, 8)
    }

    fn cuStreamWriteValue32_v2(stream: Handle, at: u64, value: u32, _flags: u32) |driver| {
        write(driver, stream, at, value.into(), 4)
    }

    fn cuStreamWriteValue64_v2(stream: Handle, at: u64, value: u64, _flags: u32) |driver| {
        write(driver, stream, at, value, 8)
    }

    fn cuStreamIsCapturing(stream: Handle, status: Out<u32>) |driver| {
        driver.stream(stream)?;
        status.set(0)
    }

    fn cuLaunchHostFunc(stream: Handle, function: Option<extern "C" fn(u64)>, argument: u64) |driver| {
        let function = HostFunction(function.ok_or(Status::INVALID_VALUE)?, argument);
        let run = move || {
            let HostFunction(function, argument) = function;
            function(argument);
        };
        driver.enqueue(stream, Command::Host(Box::new(run))).map(|_| ())
    }

    fn cuEventCreate(event: Out<Handle>, flags: u32) |driver| {
        let context = driver.healthy()?;
        if flags & !7 != 0 {
            return Err(Status::INVALID_VALUE);
        }
        let id = driver.machine.create_event();
        let handle = driver.handle(EVENT);
        let made = Event {
            context,
            id,
            timing: flags & 2 == 0,
        };
        driver.events.insert(handle, made);
        event.set(handle)
    }

    fn cuEventDestroy_v2(event: Handle) |driver| {
        let known = driver.events.remove(&event).ok_or(Status::INVALID_HANDLE)?;
        driver.machine.destroy_event(known.id);
        Ok(())
    }

    fn cuEventRecord(event: Handle, stream: Handle) |driver| {
        let id = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?.id;
        driver.enqueue(stream, Command::Record(id)).map(|_| ())
    }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, _flags: u32) |driver| {
        let id = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?.id;
        driver.enqueue(stream, Command::Record(id)).map(|_| ())
    }

    fn cuEventQuery(event: Handle) |driver| {
        found(driver.events.contains_key(&event))?;
        let driver = advance(driver);
        let event = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
        driver.check(driver.context(event.context)?.device)?;
        if driver.machine.event_finished(event.id) { Ok(()) } else { Err(Status::NOT_READY) }
    }

    fn cuEventSynchronize(event: Handle) |driver| {
        let known = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
        let (id, context) = (known.id, known.context);
        let device = driver.context(context)?.device;
        let mut driver = wait(driver, |d| d.machine.event_finished(id));
        driver.machine.host_synchronised_event(id);
        driver.check(device)
    }

    fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) |driver| {
        let of = |handle: Handle| {
            let event = driver.events.get(&handle).ok_or(Status::INVALID_HANDLE)?;
            if !event.timing || !driver.machine.event_recorded(event.id) {
                return Err(Status::INVALID_HANDLE);
            }
            if !driver.machine.event_finished(event.id) {
                return Err(Status::NOT_READY);
            }
            Ok(driver.machine.event_time(event.id))
        };
        // Virtual nanoseconds: they order things, they measure nothing.
        let (start, end) = (of(start)?, of(end)?);
        milliseconds.set((end as f64 - start as f64) as f32 / 1e6)
    }

    fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) |driver| {
        let of = |handle: Handle| {
            let event = driver.events.get(&handle).ok_or(Status::INVALID_HANDLE)?;
            if !event.timing || !driver.machine.event_recorded(event.id) {
                return Err(Status::INVALID_HANDLE);
            }
            Ok(driver.machine.event_time(event.id))
        };
        let (start, end) = (of(start)?, of(end)?);
        milliseconds.set((end as f64 - start as f64) as f32 / 1e6)
    }
}
