//! Streams, events, host functions, and waiting for values in memory.

use super::actors::{Until, ask, wait_for, wait_for_event};
use super::operation::{HostFunction, Operation, WaitValue, WriteValue};
use super::status::{Out, Outcome, Status};
use super::{Driver, EVENT, Event, Guard, Handle, STREAM, Stream, api};
use crate::machine::Command;

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
fn until(mut driver: Guard, stream: Handle, wait: WaitValue) -> Outcome {
    if !wait.at.is_multiple_of(wait.bytes as u64) || wait.comparison & !3 != 0 {
        return Err(Status::INVALID_VALUE);
    }
    let memory = &driver.machine.world.memory;
    let there = memory.check(wait.at, wait.bytes);
    there.map_err(|_| Status::INVALID_VALUE)?;
    driver.submit(stream, Operation::WaitValue(wait))
}

fn write(mut driver: Guard, stream: Handle, write: WriteValue) -> Outcome {
    if !write.at.is_multiple_of(write.bytes as u64) {
        return Err(Status::INVALID_VALUE);
    }
    let memory = &driver.machine.world.memory;
    let there = memory.check(write.at, write.bytes);
    there.map_err(|_| Status::INVALID_VALUE)?;
    driver.submit(stream, Operation::WriteValue(write))
}

api! {
    fn cuStreamCreate(stream: Out<Handle>, flags: u32) |driver| {
        create(driver, stream, flags, 0)
    }

    fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: u32, priority: i32) |driver| {
        create(driver, stream, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: Handle) |driver| {
        let known = driver.streams.remove(&stream).ok_or(Status::INVALID_HANDLE)?;
        driver.captures.forget_stream(known.id);
        // What is in it still runs; the machine forgets it when it is done.
        let driver = wait_for(driver, known.id);
        let mut driver = driver;
        driver.machine.destroy_stream(known.id);
        Ok(())
    }

    fn cuStreamSynchronize(stream: Handle) |driver| {
        let (id, context, _) = driver.stream(stream)?;
        let device = driver.context(context)?.device;
        driver.refuse_captured(stream)?;
        driver.potentially_unsafe()?;
        driver.check(device)?;
        let driver = wait_for(driver, id);
        driver.check(device)
    }

    fn cuStreamQuery(stream: Handle) |driver| {
        let (id, context, _) = driver.stream(stream)?;
        let device = driver.context(context)?.device;
        driver.refuse_captured(stream)?;
        driver.potentially_unsafe()?;
        let number = driver.machine.submitted(id);
        let driver = ask(driver, Until::Streams(vec![(id, number)]));
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
        let id = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?.id;
        // CU_EVENT_WAIT_EXTERNAL: a node that waits, in a capture.
        if flags == 1 && driver.is_captured(stream)? {
            return driver.capture(stream, Operation::Await(event, id));
        }
        if driver.capture_wait(stream, event)? {
            return Ok(());
        }
        driver.enqueue(stream, Command::Wait(id)).map(|_| ())
    }

    fn cuStreamWaitValue32_v2(stream: Handle, at: u64, value: u32, flags: u32) |driver| {
        let wait = WaitValue { at, value: value.into(), bytes: 4, comparison: flags };
        until(driver, stream, wait)
    }

    fn cuStreamWaitValue64_v2(stream: Handle, at: u64, value: u64, flags: u32) |driver| {
        until(driver, stream, WaitValue { at, value, bytes: 8, comparison: flags })
    }

    fn cuStreamWriteValue32_v2(stream: Handle, at: u64, value: u32, _flags: u32) |driver| {
        write(driver, stream, WriteValue { at, value: value.into(), bytes: 4 })
    }

    fn cuStreamWriteValue64_v2(stream: Handle, at: u64, value: u64, _flags: u32) |driver| {
        write(driver, stream, WriteValue { at, value, bytes: 8 })
    }

    fn cuStreamGetId(stream: Handle, id: Out<u64>) |driver| {
        let (found, ..) = driver.stream(stream)?;
        id.set(found.0.into())
    }

    fn cuStreamGetDevice(stream: Handle, device: Out<i32>) |driver| {
        let (_, context, _) = driver.stream(stream)?;
        device.set(driver.context(context)?.device as i32)
    }

    fn cuLaunchHostFunc(stream: Handle, function: Option<extern "C" fn(u64)>, argument: u64) |driver| {
        let function = function.ok_or(Status::INVALID_VALUE)?;
        driver.submit(stream, Operation::Host(HostFunction { function, argument }))
    }

    fn cuStreamAddCallback(
        stream: Handle,
        callback: Option<extern "C" fn(Handle, u32, u64)>,
        argument: u64,
        flags: u32,
    ) |driver| {
        let callback = callback.ok_or(Status::INVALID_VALUE)?;
        if flags != 0 {
            return Err(Status::INVALID_VALUE);
        }
        driver.refuse_captured(stream)?;
        // A stream that has faulted runs nothing, so what is called sees success.
        let run = move || callback(stream, 0, argument);
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
        driver.captures.forget_event(event);
        driver.machine.destroy_event(known.id);
        Ok(())
    }

    fn cuEventRecord(event: Handle, stream: Handle) |driver| {
        record(&mut driver, event, stream)
    }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: u32) |driver| {
        if flags > 1 {
            return Err(Status::INVALID_VALUE);
        }
        let id = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?.id;
        // CU_EVENT_RECORD_EXTERNAL: a node that records, in a capture.
        if flags == 1 && driver.is_captured(stream)? {
            return driver.capture(stream, Operation::Record(event, id));
        }
        record(&mut driver, event, stream)
    }

    fn cuEventQuery(event: Handle) |driver| {
        let id = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?.id;
        driver.refuse_captured_event(event)?;
        driver.potentially_unsafe()?;
        let number = driver.machine.records(id);
        let driver = ask(driver, Until::Event(id, number));
        let event = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
        driver.check(driver.context(event.context)?.device)?;
        if driver.machine.event_finished(event.id) { Ok(()) } else { Err(Status::NOT_READY) }
    }

    fn cuEventSynchronize(event: Handle) |driver| {
        let known = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
        let (id, context) = (known.id, known.context);
        let device = driver.context(context)?.device;
        driver.refuse_captured_event(event)?;
        driver.potentially_unsafe()?;
        let driver = wait_for_event(driver, id);
        driver.check(device)
    }

    fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) |driver| {
        elapsed(driver, milliseconds, start, end)
    }

    fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) |driver| {
        elapsed(driver, milliseconds, start, end)
    }
}

fn record(driver: &mut Driver, event: Handle, stream: Handle) -> Outcome {
    let known = driver.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
    let (id, context) = (known.id, known.context);
    let (_, of_stream, _) = driver.stream(stream)?;
    if driver.context(context)?.device != driver.context(of_stream)?.device {
        // An event is recorded on the device it was made for.
        return Err(Status::INVALID_HANDLE);
    }
    if driver.capture_record(stream, event)? {
        return Ok(());
    }
    driver.enqueue(stream, Command::Record(id)).map(|_| ())
}

/// Virtual time between two events: it orders things, it measures nothing.
fn elapsed(mut driver: Guard, milliseconds: Out<f32>, start: Handle, end: Handle) -> Outcome {
    let mut times = [0; 2];
    for (time, handle) in times.iter_mut().zip([start, end]) {
        driver.refuse_captured_event(handle)?;
        let event = driver.events.get(&handle).ok_or(Status::INVALID_HANDLE)?;
        if !event.timing || !driver.machine.event_recorded(event.id) {
            return Err(Status::INVALID_HANDLE);
        }
        if !driver.machine.event_finished(event.id) {
            return Err(Status::NOT_READY);
        }
        *time = driver.machine.event_time(event.id);
    }
    milliseconds.set((times[1] as f64 - times[0] as f64) as f32 / 1e6)
}
