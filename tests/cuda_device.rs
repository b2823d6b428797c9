//! The device half: contexts, streams, events, memory, graphs and checked launches, on the
//! driver that the tests have.
#![cfg(feature = "cuda")]

mod cuda_support;

use std::ffi::{CStr, CString, c_void};
use std::time::Duration;

use cuda_support::{Gpu, Operand, Vector};
use ringtp::backend::cuda::abi::{KernelParams, NormParams};
use ringtp::backend::cuda::{
    self, BUFFER_ALIGN, Context, DeviceAttribute, DevicePool, DeviceSlice, DeviceSliceMut, Event,
    Family, Kernels, Launch, Pinned, RowLayout, Stream,
};
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();
test_driver::also_on_every_architecture!();

fn words<T>(result: Result<T, Error>) -> String {
    result.err().expect("an error").to_string()
}

fn driver_error<T>(result: Result<T, Error>) -> ringtp::backend::DriverError {
    match result.err().expect("an error") {
        Error::Driver(error) => error,
        other => panic!("no error of the driver: {other}"),
    }
}

// Calls of the driver that these tests compare with, or play another library by.
#[link(name = "cuda")]
unsafe extern "C" {
    fn cuCtxGetCurrent(context: *mut *mut c_void) -> u32;
    fn cuStreamCreate(stream: *mut *mut c_void, flags: u32) -> u32;
    fn cuStreamDestroy_v2(stream: *mut c_void) -> u32;
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> u32;
    fn cuMemFree_v2(address: u64) -> u32;
}

fn current() -> *mut c_void {
    let mut context = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    assert_eq!(unsafe { cuCtxGetCurrent(&mut context) }, 0);
    context
}

#[test]
fn a_device_says_what_it_is() {
    let Some(gpu) = Gpu::take() else { return };
    let limits = gpu.context.limits();
    assert!(!gpu.context.name().is_empty());
    assert!(Context::driver_version().expect("a version") >= 12_000);
    assert!(
        limits.compute_capability >= 80 && limits.multiprocessors > 0,
        "{limits:?}"
    );
    assert_eq!(limits.threads_per_block, 1024);
    let warp = gpu
        .context
        .attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE);
    assert_eq!(warp.expect("an attribute"), 32);
    assert!(gpu.context.total_memory().expect("a size") > 1 << 20);
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let Some(_gpu) = Gpu::take() else { return };
    let count = Context::device_count().expect("a count");
    let error = words(Context::new(count));
    assert!(
        error.contains(&format!("one of the {count} devices")),
        "{error}"
    );
    assert!(words(Context::new(usize::MAX)).contains("CUDA device"));
}

#[test]
fn nothing_is_left_in_the_thread() {
    let Some(gpu) = Gpu::take() else { return };
    let before = current();
    let again = Context::new(0).expect("device 0");
    assert_eq!(current(), before, "opening a device");
    {
        let _entered = again.enter().expect("the context is entered");
        let inside = current();
        assert!(!inside.is_null());
        let _nested = gpu.context.enter().expect("entered again");
        assert_eq!(current(), inside, "one primary context a device");
    }
    assert_eq!(current(), before, "entering and leaving");
    let mut buffer = gpu.pool.buffer(64).expect("a buffer");
    gpu.stream.fill(7, &mut buffer.as_mut()).expect("a fill");
    gpu.stream.synchronize().expect("it ends");
    drop(buffer);
    assert_eq!(current(), before, "calls");
}

/// A thread that never saw the driver can use what another made.
#[test]
fn streams_and_memory_work_in_any_thread() {
    let Some(gpu) = Gpu::take() else { return };
    let buffer = gpu
        .pool
        .upload(&[1u32, 2, 3], &gpu.stream)
        .expect("an upload");
    let (stream, view) = (&gpu.stream, buffer.as_ref());
    std::thread::scope(|scope| {
        let read = scope.spawn(move || {
            let mut values = [0u32; 3];
            stream.download(view, &mut values).expect("a download");
            values
        });
        assert_eq!(read.join().expect("no panic"), [1, 2, 3]);
    });
}

#[test]
fn buffers_of_a_slab_do_not_overlap_and_come_back() {
    let Some(gpu) = Gpu::take() else { return };
    let pool = DevicePool::new(&gpu.context, 64 << 10);
    let sizes = [1, 255, 256, 257, 0, 4096, 10_000];
    let mut buffers = Vec::new();
    for (i, &size) in sizes.iter().enumerate() {
        let mut buffer = pool.buffer(size).expect("a buffer");
        assert_eq!(buffer.len(), size);
        assert!(buffer.address().is_multiple_of(BUFFER_ALIGN as u64));
        gpu.stream
            .fill(i as u8 + 1, &mut buffer.as_mut())
            .expect("a fill");
        buffers.push(buffer);
    }
    for (i, buffer) in buffers.iter().enumerate() {
        let bytes = gpu.download(buffer);
        assert!(
            bytes.iter().all(|&b| b == i as u8 + 1),
            "buffer {i} was written by another"
        );
    }
    let (total, _) = pool.usage();
    assert_eq!(total, 64 << 10, "one slab holds them");
    // In any order, and then the whole slab is free in one piece again.
    for index in [3, 0, 4, 2, 1, 1, 0] {
        drop(buffers.remove(index));
    }
    assert_eq!(pool.usage(), (total, total));
    let whole = pool.buffer(64 << 10).expect("the slab in one piece");
    assert_eq!(pool.usage(), (total, 0));
    // What does not fit has a slab of its own.
    let large = pool.buffer(100_000).expect("a large buffer");
    assert_eq!(
        pool.usage().0,
        total + 100_000usize.next_multiple_of(BUFFER_ALIGN)
    );
    drop((whole, large));
}

/// Random takes and gives against a model: no two buffers overlap, and nothing is lost.
#[test]
fn a_pool_keeps_count() {
    let Some(gpu) = Gpu::take() else { return };
    for seed in 0..20u64 {
        let pool = DevicePool::new(&gpu.context, 16 << 10);
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut below = |n: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % n
        };
        let mut held: Vec<cuda::DeviceBuffer> = Vec::new();
        for _ in 0..200 {
            if held.is_empty() || below(3) > 0 {
                held.push(pool.buffer(below(5000) as usize).expect("a buffer"));
            } else {
                held.swap_remove(below(held.len() as u64) as usize);
            }
            let mut ranges: Vec<_> = held
                .iter()
                .map(|b| (b.address(), b.address() + b.len() as u64))
                .collect();
            ranges.sort_unstable();
            assert!(
                ranges.windows(2).all(|w| w[0].1 <= w[1].0),
                "overlap, seed {seed}"
            );
            let taken = |b: &cuda::DeviceBuffer| b.len().max(1).next_multiple_of(BUFFER_ALIGN);
            let (total, free) = pool.usage();
            assert_eq!(
                total - free,
                held.iter().map(taken).sum::<usize>(),
                "seed {seed}"
            );
        }
        held.clear();
        let (total, free) = pool.usage();
        assert_eq!(total, free, "seed {seed}");
    }
}

/// What was reserved is enough for buffers that go in the reverse of the order they come in, whatever
/// lies around it.
#[test]
fn a_reserve_is_enough_for_buffers_that_nest() {
    let Some(gpu) = Gpu::take() else { return };
    let mut state = 7_u64;
    let mut below = |n: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % n
    };
    for _ in 0..20 {
        let pool = DevicePool::new(&gpu.context, 16 << 10);
        let kept: Vec<_> = (0..6).map(|_| pool.buffer(below(9000) as usize)).collect();
        // Every other one goes again, so that there are gaps.
        let kept: Vec<_> = kept.into_iter().step_by(2).collect();
        let reserve = 40_000 + below(30_000) as usize;
        pool.reserve(reserve).expect("a reserve");
        let (total, _) = pool.usage();
        let mut nested: Vec<cuda::DeviceBuffer> = Vec::new();
        let rounded = |len: usize| len.max(1).next_multiple_of(BUFFER_ALIGN);
        for _ in 0..300 {
            let taken: usize = nested.iter().map(|b| rounded(b.len())).sum();
            let len = below(20_000) as usize;
            if below(3) > 0 && taken + rounded(len) <= reserve {
                nested.push(pool.buffer(len).expect("a buffer"));
            } else {
                nested.pop();
            }
            assert_eq!(pool.usage().0, total, "no slab was added");
        }
        drop(kept);
    }
}

/// A slab that does not fit is no error where what was asked for does.
#[test]
fn where_a_slab_does_not_fit_a_smaller_piece_does() {
    let Some(gpu) = Gpu::take() else { return };
    let pool = DevicePool::new(&gpu.context, 1 << 60);
    let buffer = pool.buffer(1000).expect("a buffer");
    assert_eq!(pool.usage(), (1024, 0));
    drop(buffer);
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let Some(gpu) = Gpu::take() else { return };
    let error = gpu.pool.buffer(1 << 60).expect_err("an error");
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    assert!(error.to_string().contains("CUDA device 0"), "{error}");
    let slabs = DevicePool::new(&gpu.context, 1 << 20);
    assert!(slabs.buffer(usize::MAX).is_err());
    // And the device goes on.
    slabs.buffer(100).expect("a small buffer");
}

#[test]
fn parts_and_copies_are_checked() {
    let Some(gpu) = Gpu::take() else { return };
    let mut buffer = gpu.pool.upload(&[0u8; 16], &gpu.stream).expect("an upload");
    let error = words(buffer.as_ref().range(8..17));
    assert!(
        error.contains("0..16") && error.contains("8..17"),
        "{error}"
    );
    #[expect(clippy::reversed_empty_ranges, reason = "that is the mistake")]
    let backwards = buffer.as_ref().range(9..8);
    assert!(backwards.is_err());
    assert!(words(gpu.stream.upload(&[0u8; 15], &mut buffer.as_mut())).contains("15"));
    assert!(words(gpu.stream.download(buffer.as_ref(), &mut [0u8; 17])).contains("17"));
    let part = buffer.as_mut().range(4..8).expect("a part");
    let mut part = part;
    gpu.stream.fill(9, &mut part).expect("a fill");
    let mut copy = gpu.pool.buffer(16).expect("a buffer");
    gpu.stream
        .copy(buffer.as_ref(), &mut copy.as_mut())
        .expect("a copy");
    let mut expected = [0u8; 16];
    expected[4..8].fill(9);
    assert_eq!(gpu.download(&copy), expected);
    let short = buffer.as_ref().range(0..4).expect("a part");
    assert!(gpu.stream.copy(short, &mut copy.as_mut()).is_err());
}

#[test]
fn events_order_streams() {
    let Some(gpu) = Gpu::take() else { return };
    let other = Stream::new(&gpu.context).expect("a stream");
    let mut buffer = gpu.pool.buffer(1 << 16).expect("a buffer");
    for value in 0..8u8 {
        let event = Event::new(&gpu.context).expect("an event");
        gpu.stream
            .fill(value, &mut buffer.as_mut())
            .expect("a fill");
        event.record(&gpu.stream).expect("recorded");
        other.wait_for(&event).expect("a wait");
        let mut bytes = vec![0; buffer.len()];
        other
            .download(buffer.as_ref(), &mut bytes)
            .expect("a download");
        assert!(bytes.iter().all(|&b| b == value));
        assert!(event.is_done().expect("an answer"));
        gpu.stream.wait_for_stream(&other).expect("a wait");
    }
    assert!(
        gpu.stream
            .wait_until_idle(Duration::from_secs(10))
            .expect("an answer")
    );
    let (begin, end) = (Event::timed(&gpu.context), Event::timed(&gpu.context));
    let (begin, end) = (begin.expect("an event"), end.expect("an event"));
    begin.record(&gpu.stream).expect("recorded");
    end.record(&gpu.stream).expect("recorded");
    end.synchronize().expect("it ends");
    assert!(end.elapsed_since(&begin).expect("a time") < Duration::from_secs(60));
}

/// What an engine already has can be brought in, and is not destroyed.
#[test]
fn foreign_memory_and_streams_are_used_and_left_alone() {
    let Some(gpu) = Gpu::take() else { return };
    let entered = gpu.context.enter().expect("the context is entered");
    let (mut stream, mut address) = (std::ptr::null_mut(), 0);
    // SAFETY: each writes one value.
    unsafe {
        assert_eq!(cuStreamCreate(&mut stream, 1), 0);
        assert_eq!(cuMemAlloc_v2(&mut address, 256), 0);
    }
    drop(entered);
    {
        // SAFETY: made above, destroyed below.
        let foreign = unsafe { Stream::from_raw(&gpu.context, stream) };
        assert_eq!(foreign.as_raw(), stream);
        // SAFETY: as above, and only used here.
        let mut memory = unsafe { DeviceSliceMut::from_raw(address, 256) };
        foreign.upload(&[5u8; 256], &mut memory).expect("an upload");
        // SAFETY: as above.
        let memory = unsafe { DeviceSlice::from_raw(address + 100, 56) };
        let mut bytes = [0u8; 56];
        foreign.download(memory, &mut bytes).expect("a download");
        assert_eq!(bytes, [5; 56]);
    }
    let _entered = gpu.context.enter().expect("the context is entered");
    // SAFETY: still there, which these calls check.
    unsafe {
        assert_eq!(cuMemFree_v2(address), 0);
        assert_eq!(cuStreamDestroy_v2(stream), 0);
    }
}

#[test]
fn pinned_memory_is_seen_by_both_sides() {
    let Some(gpu) = Gpu::take() else { return };
    let mut pinned = Pinned::<u32>::zeros(&gpu.context, 5).expect("pinned memory");
    assert_eq!((0..5).map(|i| pinned.read(i)).collect::<Vec<_>>(), [0; 5]);
    pinned.write(2, 0xABCD);
    let mut values = [9u32; 5];
    let view = pinned.as_device();
    gpu.stream
        .download(view.as_ref(), &mut values)
        .expect("a download");
    assert_eq!(values, [0, 0, 0xABCD, 0, 0]);
    gpu.stream
        .fill(0xFF, &mut pinned.as_device())
        .expect("a fill");
    gpu.stream.synchronize().expect("it ends");
    assert_eq!(pinned.read(4), u32::MAX);
    let error = words(Pinned::<u64>::zeros(&gpu.context, usize::MAX));
    assert!(error.contains("pinned memory"), "{error}");
}

/// Peers reach what lies in a slab, after access is enabled and not before.
#[test]
fn devices_reach_each_others_slabs() {
    let Some(gpu) = Gpu::take() else { return };
    let count = Context::device_count().expect("a count");
    if !gpu.driver.has_devices(2, count) {
        return;
    }
    let peer = Context::new(1).expect("device 1");
    if !gpu.context.can_access(&peer).expect("an answer") {
        test_driver::skipped("devices 0 and 1 cannot reach each other");
        return;
    }
    gpu.context.enable_access(&peer).expect("access");
    gpu.context.enable_access(&peer).expect("access once more");
    gpu.context
        .enable_access(&gpu.context)
        .expect("access to itself");
    let stream = Stream::new(&peer).expect("a stream");
    let x = DevicePool::new(&peer, 1 << 16)
        .upload(&[2f32; 64], &stream)
        .expect("an upload");
    // Device 0 normalises a row that lies on device 1.
    let layout = RowLayout::contiguous(DType::F32, 1, 64);
    let weight = Vector::new(&gpu, &[3.0; 64], 0);
    let mut out = Operand::new(&gpu, layout, 0, None);
    let rows = cuda::Rows::new(x.as_ref(), layout).expect("rows");
    cuda::rms_norm(
        &gpu.kernels,
        &gpu.stream,
        rows,
        weight.view(),
        0.0,
        out.rows_mut(),
    )
    .expect("a norm");
    assert_eq!(out.values(&gpu), [3.0; 64]);
}

/// Two holders of a device in one process do not disturb each other.
#[test]
fn two_groups_share_a_device() {
    let Some(gpu) = Gpu::take() else { return };
    let other = Context::new(0).expect("device 0");
    let kernels = Kernels::load(&other).expect("the kernels load again");
    let weight = Vector::new(&gpu, &[1.0; 8], 0);
    let layout = RowLayout::contiguous(DType::F32, 1, 8);
    let x = Operand::new(&gpu, layout, 0, Some(&[2.0; 8]));
    let mut out = Operand::new(&gpu, layout, 0, None);
    cuda::rms_norm(
        &kernels,
        &gpu.stream,
        x.rows(),
        weight.view(),
        0.0,
        out.rows_mut(),
    )
    .expect("a norm");
    drop((kernels, other));
    assert_eq!(out.values(&gpu), [1.0; 8]);
    // The first's code is still there when the second has gone.
    cuda::rms_norm(
        &gpu.kernels,
        &gpu.stream,
        x.rows(),
        weight.view(),
        0.0,
        out.rows_mut(),
    )
    .expect("a norm");
    assert_eq!(out.values(&gpu), [1.0; 8]);
}

#[test]
fn a_graph_replays_with_what_memory_holds_then() {
    let Some(gpu) = Gpu::take() else { return };
    let layout = RowLayout::contiguous(DType::F32, 2, 32);
    let weight = Vector::new(&gpu, &[1.5; 32], 0);
    let mut x = Operand::new(&gpu, layout, 0, Some(&[1.0; 64]));
    let mut out = Operand::new(&gpu, layout, 0, None);
    let graph = gpu
        .stream
        .capture(|| {
            let (x, weight, out) = (x.rows(), weight.view(), out.rows_mut());
            cuda::rms_norm(&gpu.kernels, &gpu.stream, x, weight, 0.0, out)
        })
        .expect("a graph");
    assert!(
        out.values(&gpu).iter().all(|v| v.is_nan()),
        "recording runs nothing"
    );
    graph.upload(&gpu.stream).expect("an upload");
    for value in [2.0f32, -4.0] {
        gpu.stream
            .upload(&[value; 64], &mut x.buffer.as_mut())
            .expect("an upload");
        // SAFETY: the operands are still there.
        unsafe { graph.launch(&gpu.stream) }.expect("a replay");
        assert_eq!(out.values(&gpu), [1.5 * value.signum(); 64]);
    }
    // An error while recording is the caller's, and the stream is fit for use again.
    let error = words(
        gpu.stream
            .capture(|| Err(Error::shape("a test", "this", "that"))),
    );
    assert!(error.contains("a test"), "{error}");
    gpu.stream.synchronize().expect("no capture is left");
}

/// A kernel's parameters that are not those it takes.
#[derive(Clone, Copy)]
#[repr(C)]
struct Short([u64; 3]);

// SAFETY: not launched: that its size is refused is what is tested.
unsafe impl KernelParams for Short {}

fn params() -> NormParams {
    // SAFETY: null pointers and zeros are values of all fields.
    unsafe { std::mem::zeroed() }
}

/// A launch that the device cannot run is refused on the host, with the limit it breaks.
#[test]
fn wrong_launches_are_refused_by_name() {
    let Some(gpu) = Gpu::take() else { return };
    let kernel = gpu.kernels.get("rms_norm_f32").expect("a kernel");
    // SAFETY: none of these runs.
    let refuse = |launch: Launch| words(unsafe { gpu.stream.launch(kernel, launch, &params()) });
    let one = Launch::linear(1, 32);
    let shared = kernel.attributes().max_dynamic_shared;
    for (launch, expected) in [
        (Launch::linear(0, 32), "blocks in x, found 0"),
        (
            Launch {
                grid: [1, 65_536, 1],
                ..one
            },
            "65535 blocks in y",
        ),
        (
            Launch {
                grid: [1, 1, 0],
                ..one
            },
            "blocks in z, found 0",
        ),
        (Launch::linear(1, 0), "threads in x, found 0"),
        (
            Launch {
                block: [1, 1, 65],
                ..one
            },
            "64 threads in z",
        ),
        (
            Launch::linear(1, 513),
            "at most 512 threads a block, found 513",
        ),
        (
            Launch {
                block: [32, 32, 1],
                ..one
            },
            "found 1024",
        ),
        (one.shared(shared + 1), "bytes of dynamic shared memory"),
        (
            Launch::linear(1 << 20, 512).cooperative(),
            "fit on the device at once",
        ),
    ] {
        let error = refuse(launch);
        let named = error.contains("rms_norm_f32") && error.contains(expected);
        assert!(named, "{launch:?}: {error}");
    }
    // SAFETY: does not run.
    let short = words(unsafe { gpu.stream.launch(kernel, one, &Short([0; 3])) });
    match kernel.attributes().param_bytes {
        Some(_) => assert!(
            short.contains("80 bytes of parameters, found 24"),
            "{short}"
        ),
        None => test_driver::skipped("this driver cannot say how many bytes a kernel takes"),
    }
    // All of shared memory is not too much.
    let launch = one.shared(shared);
    // SAFETY: no row has an element: nothing is read or written.
    unsafe { gpu.stream.launch(kernel, launch, &params()) }.expect("the most there is");
    gpu.stream.synchronize().expect("it runs");
    assert!(words(gpu.kernels.get("no_such_kernel").map(|_| ())).contains("no_such_kernel"));
}

#[test]
fn a_stream_of_another_device_is_refused() {
    let Some(gpu) = Gpu::take() else { return };
    if !gpu
        .driver
        .has_devices(2, Context::device_count().expect("a count"))
    {
        return;
    }
    let peer = Context::new(1).expect("device 1");
    let stream = Stream::new(&peer).expect("a stream");
    let kernel = gpu.kernels.get("rms_norm_f32").expect("a kernel");
    // SAFETY: does not run.
    let error = words(unsafe { stream.launch(kernel, Launch::linear(1, 32), &params()) });
    assert!(error.contains("a stream of CUDA device 0"), "{error}");
}

/// Errors of the driver come with the call, the code's name, what was being done and a remedy.
#[test]
fn the_drivers_errors_are_named() {
    let Some(gpu) = Gpu::take() else { return };
    let family = Family {
        name: "a test's own",
        kernels: &["kernel"],
    };
    let image = CString::new(".version 8.0\n.target sm_80\n.address_size 64\nnonsense").unwrap();
    // SAFETY: PTX, though wrong, that ends in zero.
    let load = |image: &CStr| unsafe {
        Kernels::from_image(&gpu.context, family, image.to_bytes_with_nul())
    };
    let error = driver_error(load(&image));
    assert_eq!(
        (error.call, error.name.as_str()),
        ("cuModuleLoadData", "CUDA_ERROR_INVALID_PTX")
    );
    assert!(
        error.doing.contains("a test's own") && !error.sticky,
        "{error}"
    );
    assert!(error.to_string().contains("update the driver"), "{error}");
    let empty = CString::new(".version 8.0\n.target sm_80\n.address_size 64\n").unwrap();
    let error = driver_error(load(&empty));
    assert_eq!(
        (error.code, error.name.as_str()),
        (500, "CUDA_ERROR_NOT_FOUND")
    );
    assert!(error.doing.contains("kernel kernel"), "{error}");
}
