//! Allocation, copies, fills, and what is known of pointers.

use crate::cuda::{Cuda, KERNELS, passes};
use crate::{cu, fails, here, result};

const INVALID: u32 = 1;
const OUT_OF_MEMORY: u32 = 2;

fn allocate(cuda: &Cuda, bytes: u64) -> u64 {
    let mut at = 0u64;
    cu!(cuda, cuMemAlloc_v2(&mut at, bytes));
    at
}

fn free_bytes(cuda: &Cuda) -> u64 {
    let (mut free, mut total) = (0u64, 0u64);
    cu!(cuda, cuMemGetInfo_v2(&mut free, &mut total));
    assert!(free <= total);
    free
}

#[test]
fn a_device_runs_out_of_memory_and_gets_it_back() {
    passes(here!(), &[("VGPU_MEMORY", "1048576")], |cuda| {
        cuda.start();
        let mut bytes = 0u64;
        cu!(cuda, cuDeviceTotalMem_v2(&mut bytes, 0));
        assert_eq!(bytes, 1 << 20);
        assert_eq!(free_bytes(cuda), 1 << 20);
        let a = allocate(cuda, 700_000);
        assert_eq!(free_bytes(cuda), (1 << 20) - 700_000);
        let mut b = 0u64;
        fails!(OUT_OF_MEMORY, cuda, cuMemAlloc_v2(&mut b, 400_000u64));
        fails!(
            OUT_OF_MEMORY,
            cuda,
            cuMemAllocAsync(&mut b, 400_000u64, 0u64)
        );
        fails!(OUT_OF_MEMORY, cuda, cuMemAlloc_v2(&mut b, u64::MAX));
        fails!(INVALID, cuda, cuMemAlloc_v2(&mut b, 0u64));
        cu!(cuda, cuMemAllocAsync(&mut b, 300_000u64, 0u64));
        assert_eq!(free_bytes(cuda), (1 << 20) - 1_000_000);
        cu!(cuda, cuMemFree_v2(a));
        cu!(cuda, cuMemFreeAsync(b, 0u64));
        cu!(cuda, cuCtxSynchronize());
        assert_eq!(free_bytes(cuda), 1 << 20);
        allocate(cuda, 1 << 20);
    });
}

#[test]
fn each_device_has_its_own_memory() {
    passes(
        here!(),
        &[("VGPU_DEVICES", "2"), ("VGPU_MEMORY", "65536")],
        |cuda| {
            cuda.start();
            allocate(cuda, 65_536);
            cuda.context(1);
            assert_eq!(free_bytes(cuda), 65_536);
            allocate(cuda, 65_536);
        },
    );
}

#[test]
fn freeing_twice_is_an_error_and_a_finding() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let at = allocate(cuda, 256);
        fails!(INVALID, cuda, cuMemFree_v2(at + 4));
        cu!(cuda, cuMemFree_v2(at));
        cu!(cuda, cuMemFree_v2(0u64));
        fails!(INVALID, cuda, cuMemFree_v2(at));
        let findings = cuda.findings();
        assert!(findings.contains("cuMemFree"), "{findings}");
        // Each kind of memory has its own way to be freed.
        let mut host = 0u64;
        cu!(cuda, cuMemHostAlloc(&mut host, 256u64, 3u32));
        fails!(INVALID, cuda, cuMemFree_v2(host));
        cu!(cuda, cuMemFreeHost(host));
    });
}

#[test]
fn copies_are_checked_against_the_bytes_that_were_asked_for() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let (a, b) = (allocate(cuda, 100), allocate(cuda, 100));
        let mut host = [0u8; 200];
        cu!(cuda, cuMemcpyHtoD_v2(a, &host[..], 100u64));
        fails!(INVALID, cuda, cuMemcpyHtoD_v2(a, &host[..], 101u64));
        fails!(INVALID, cuda, cuMemcpyHtoD_v2(a + 1, &host[..], 100u64));
        fails!(INVALID, cuda, cuMemcpyDtoH_v2(&mut host[..], a, u64::MAX));
        fails!(INVALID, cuda, cuMemcpyDtoD_v2(b, a, 101u64));
        fails!(INVALID, cuda, cuMemcpyHtoD_v2(a, 0u64, 100u64));
        fails!(INVALID, cuda, cuMemcpyHtoD_v2(a, b, 100u64));
        fails!(INVALID, cuda, cuMemsetD8_v2(a, 1u8, 101u64));
        fails!(INVALID, cuda, cuMemsetD32_v2(a, 1u32, u64::MAX / 2));
        fails!(INVALID, cuda, cuMemsetD32_v2(a + 2, 1u32, 1u64));
        cu!(cuda, cuMemcpyHtoD_v2(a, &host[..], 0u64));
        cu!(cuda, cuMemsetD8_v2(a, 1u8, 0u64));
        cu!(cuda, cuMemsetD16_v2(a, 0x0102u16, 50u64));
        cu!(cuda, cuMemcpy(b, a, 100u64));
        cu!(cuda, cuMemcpyDtoH_v2(&mut host[..], b, 100u64));
        assert!(host[..100].chunks(2).all(|c| c == [2, 1]));
    });
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Side2d {
    x: u64,
    y: u64,
    kind: u32,
    host: u64,
    device: u64,
    array: u64,
    pitch: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Copy2d {
    from: Side2d,
    to: Side2d,
    width: u64,
    height: u64,
}

#[test]
fn pitched_rows_arrive_where_they_belong() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let (mut at, mut pitch) = (0u64, 0u64);
        cu!(
            cuda,
            cuMemAllocPitch_v2(&mut at, &mut pitch, 100u64, 8u64, 4u32)
        );
        assert!(pitch >= 100 && pitch % 512 == 0);
        fails!(
            INVALID,
            cuda,
            cuMemAllocPitch_v2(&mut at, &mut pitch, 100u64, 8u64, 3u32)
        );
        cu!(cuda, cuMemsetD2D8_v2(at, pitch, 0u8, 100u64, 8u64));
        // A box of 5 bytes and 3 rows at (2, 1), from rows of 10 bytes.
        let source: Vec<u8> = (0..30).collect();
        let mut copy = Copy2d {
            from: Side2d {
                kind: 1,
                host: source.as_ptr() as u64,
                x: 1,
                pitch: 10,
                ..Side2d::default()
            },
            to: Side2d {
                kind: 2,
                device: at,
                x: 2,
                y: 1,
                pitch,
                ..Side2d::default()
            },
            width: 5,
            height: 3,
        };
        cu!(cuda, cuMemcpy2D_v2(&copy));
        let mut all = vec![9u8; 8 * pitch as usize];
        for (y, row) in all.chunks_mut(pitch as usize).enumerate() {
            cu!(
                cuda,
                cuMemcpyDtoH_v2(&mut *row, at + y as u64 * pitch, 100u64)
            );
            for (x, &byte) in row[..100].iter().enumerate() {
                let inside = (1..4).contains(&y) && (2..7).contains(&x);
                let expected = if inside {
                    (y - 1) * 10 + (x - 2) + 1
                } else {
                    0
                };
                assert_eq!(usize::from(byte), expected, "({x}, {y})");
            }
        }
        copy.to.pitch = 4;
        fails!(INVALID, cuda, cuMemcpy2D_v2(&copy));
        copy.to.pitch = pitch;
        copy.height = 8;
        fails!(INVALID, cuda, cuMemcpy2D_v2(&copy));
        copy.to.kind = 3;
        fails!(801, cuda, cuMemcpy2D_v2(&copy));
        copy.to.kind = 2;
        copy.height = u64::MAX;
        fails!(INVALID, cuda, cuMemcpy2D_v2(&copy));
    });
}

#[test]
fn boxes_are_copied_in_three_dimensions() {
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
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
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Copy3d {
        from: Side,
        to: Side,
        extent: [u64; 3],
    }
    passes(here!(), &[], |cuda| {
        cuda.start();
        // 4 slices of 5 rows of 6 bytes.
        let at = allocate(cuda, 120);
        cu!(cuda, cuMemsetD8_v2(at, 0u8, 120u64));
        let source: Vec<u8> = (1..=24).collect();
        let copy = Copy3d {
            from: Side {
                kind: 1,
                host: source.as_ptr() as u64,
                pitch: 4,
                height: 3,
                ..Side::default()
            },
            to: Side {
                kind: 2,
                device: at,
                x: 1,
                y: 2,
                z: 1,
                pitch: 6,
                height: 5,
                ..Side::default()
            },
            extent: [4, 3, 2],
        };
        cu!(cuda, cuMemcpy3D_v2(&copy));
        let mut all = [0u8; 120];
        cu!(cuda, cuMemcpyDtoH_v2(&mut all[..], at, 120u64));
        for (n, &byte) in all.iter().enumerate() {
            let (x, y, z) = (n % 6, n / 6 % 5, n / 30);
            let inside = (1..5).contains(&x) && (2..5).contains(&y) && (1..3).contains(&z);
            let expected = if inside {
                (z - 1) * 12 + (y - 2) * 4 + (x - 1) + 1
            } else {
                0
            };
            assert_eq!(usize::from(byte), expected, "({x}, {y}, {z})");
        }
    });
}

#[test]
fn pinned_memory_is_read_when_the_copy_happens_and_pageable_when_it_is_asked_for() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let spin = cuda.function(module, "spin");
        let (a, b) = (cuda.put(&[0]), cuda.put(&[0]));
        let mut flag = 0u64;
        cu!(cuda, cuMemHostAlloc(&mut flag, 4u64, 0u32));
        let mut pinned = 0u64;
        cu!(cuda, cuMemHostAlloc(&mut pinned, 4u64, 0u32));
        let (flag, pinned) = (flag as *mut u32, pinned as *mut u32);
        let mut pageable = [1u32];
        // SAFETY: the driver gave 4 bytes for each; the devices only run inside of calls.
        unsafe {
            flag.write_volatile(0);
            pinned.write_volatile(1);
        }
        let stream = cuda.stream();
        cuda.launch(spin, stream, 1, &[flag as u64]);
        cu!(
            cuda,
            cuMemcpyHtoDAsync_v2(a, pinned.cast_const(), 4u64, stream)
        );
        cu!(cuda, cuMemcpyHtoDAsync_v2(b, &pageable[..], 4u64, stream));
        pageable[0] = 2;
        // SAFETY: as above.
        unsafe {
            pinned.write_volatile(2);
            flag.write_volatile(1);
        }
        cu!(cuda, cuStreamSynchronize(stream));
        assert_eq!((cuda.get(a, 1), cuda.get(b, 1)), (vec![2], vec![1]));
        assert_eq!(pageable, [2]);
    });
}

#[test]
fn registered_memory_is_mapped_until_it_is_unregistered() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let mut values = vec![1u32; 4];
        let at = values.as_mut_ptr() as u64;
        cu!(cuda, cuMemHostRegister_v2(at, 16u64, 0u32));
        fails!(712, cuda, cuMemHostRegister_v2(at + 4, 16u64, 0u32));
        fails!(712, cuda, cuMemHostRegister_v2(at - 4, 64u64, 0u32));
        let (mut device, mut flags) = (0u64, 0u32);
        cu!(cuda, cuMemHostGetDevicePointer_v2(&mut device, at, 0u32));
        cu!(cuda, cuMemHostGetFlags(&mut flags, at));
        cuda.launch(add, 0, 4, &[device, 41]);
        cu!(cuda, cuStreamSynchronize(0u64));
        assert_eq!(values, [42; 4]);
        fails!(713, cuda, cuMemHostUnregister(at + 4));
        cu!(cuda, cuMemHostUnregister(at));
        fails!(713, cuda, cuMemHostUnregister(at));
        fails!(
            INVALID,
            cuda,
            cuMemHostGetDevicePointer_v2(&mut device, at, 0u32)
        );
        fails!(INVALID, cuda, cuMemHostRegister_v2(at, u64::MAX, 0u32));
    });
}

#[test]
fn pointers_are_known_for_what_they_are() {
    passes(here!(), &[], |cuda| {
        let context = cuda.start();
        let device = allocate(cuda, 64);
        let (mut host, mut managed, mut pooled) = (0u64, 0u64, 0u64);
        cu!(cuda, cuMemAllocHost_v2(&mut host, 64u64));
        cu!(cuda, cuMemAllocManaged(&mut managed, 64u64, 1u32));
        cu!(cuda, cuMemAllocAsync(&mut pooled, 64u64, 0u64));
        let attribute = |number: u32, at: u64| {
            let mut value = 0u64;
            let code = result!(cuda, cuPointerGetAttribute(&mut value, number, at));
            (code, value)
        };
        // CU_POINTER_ATTRIBUTE_MEMORY_TYPE: 1 is the host's, 2 a device's.
        assert_eq!(attribute(2, device), (0, 2));
        assert_eq!(attribute(2, device + 63), (0, 2));
        assert_eq!(attribute(2, host), (0, 1));
        assert_eq!(attribute(2, managed), (0, 2));
        assert_eq!(attribute(2, device + 64).0, INVALID);
        assert_eq!(attribute(1, device), (0, context));
        assert_eq!(
            (attribute(8, managed), attribute(8, device)),
            ((0, 1), (0, 0))
        );
        assert_eq!(
            (attribute(11, device + 9), attribute(12, device + 9)),
            ((0, device), (0, 64))
        );
        assert_eq!(
            (attribute(4, host), attribute(4, device).0),
            ((0, host), INVALID)
        );
        let mut pool = 0u64;
        cu!(cuda, cuDeviceGetDefaultMemPool(&mut pool, 0));
        assert_eq!(
            (attribute(17, pooled), attribute(17, device)),
            ((0, pool), (0, 0))
        );
        assert_eq!(attribute(9999, device).0, 801);
        let (mut kind, mut start) = (9u32, 9u64);
        let places = [&raw mut kind as u64, &raw mut start as u64];
        cu!(
            cuda,
            cuPointerGetAttributes(2u32, &[2u32, 11][..], &places[..], device)
        );
        assert_eq!((kind, start), (2, device));
        // Of an address that is nobody's all are zero, and that is no error.
        cu!(
            cuda,
            cuPointerGetAttributes(2u32, &[2u32, 11][..], &places[..], 4096u64)
        );
        assert_eq!((kind, start), (0, 0));
        let (mut base, mut size) = (0u64, 0u64);
        cu!(
            cuda,
            cuMemGetAddressRange_v2(&mut base, &mut size, device + 5)
        );
        assert_eq!((base, size), (device, 64));
        fails!(
            500,
            cuda,
            cuMemGetAddressRange_v2(&mut base, &mut size, 4096u64)
        );
    });
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PoolProps {
    kind: u32,
    handle_types: u32,
    location: [u32; 2],
    security: u64,
    most: u64,
    reserved: [u64; 7],
}

#[test]
fn pools_keep_books_and_say_who_may_use_their_memory() {
    passes(here!(), &[("VGPU_DEVICES", "2")], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let props = PoolProps {
            kind: 1,
            handle_types: 0,
            location: [1, 1],
            security: 0,
            most: 4096,
            reserved: [0; 7],
        };
        let mut pool = 0u64;
        cu!(cuda, cuMemPoolCreate(&mut pool, &props));
        // Device 1's pool; device 0 is let in only when it says so.
        let stream = cuda.stream();
        let mut at = 0u64;
        cu!(
            cuda,
            cuMemAllocFromPoolAsync(&mut at, 4000u64, pool, stream)
        );
        let used = |number: u32| {
            let mut bytes = 0u64;
            cu!(cuda, cuMemPoolGetAttribute(pool, number, &mut bytes));
            bytes
        };
        assert_eq!((used(7), used(8)), (4000, 4000));
        let mut more = 0u64;
        fails!(
            OUT_OF_MEMORY,
            cuda,
            cuMemAllocFromPoolAsync(&mut more, 100u64, pool, stream)
        );
        let mut flags = 9u32;
        cu!(cuda, cuMemPoolGetAccess(&mut flags, pool, &[1u32, 0][..]));
        assert_eq!(flags, 0);
        cu!(cuda, cuMemPoolGetAccess(&mut flags, pool, &[1u32, 1][..]));
        assert_eq!(flags, 3);
        cu!(cuda, cuMemPoolSetAccess(pool, &[1u32, 0, 3][..], 1u64));
        cu!(cuda, cuMemPoolGetAccess(&mut flags, pool, &[1u32, 0][..]));
        assert_eq!(flags, 3);
        fails!(
            INVALID,
            cuda,
            cuMemPoolSetAccess(pool, &[1u32, 1, 0][..], 1u64)
        );
        fails!(101, cuda, cuMemPoolSetAccess(pool, &[1u32, 7, 3][..], 1u64));
        cu!(cuda, cuMemsetD32Async(at, 5u32, 4u64, stream));
        cuda.launch(cuda.function(module, "add"), stream, 4, &[at, 1]);
        cu!(cuda, cuStreamSynchronize(stream));
        assert_eq!(cuda.get(at, 4), [6; 4]);
        cu!(cuda, cuMemFreeAsync(at, stream));
        assert_eq!((used(7), used(8)), (0, 4000));
        cu!(cuda, cuMemPoolSetAttribute(pool, 8u32, &0u64));
        assert_eq!(used(8), 0);
        cu!(cuda, cuMemPoolDestroy(pool));
        fails!(INVALID, cuda, cuMemPoolDestroy(pool));
        let mut default = 0u64;
        cu!(cuda, cuDeviceGetDefaultMemPool(&mut default, 0));
        fails!(INVALID, cuda, cuMemPoolDestroy(default));
        assert_eq!(cuda.findings(), "");
    });
}

#[test]
fn memory_of_a_pool_that_does_not_let_a_device_in_is_barred() {
    passes(here!(), &[("VGPU_DEVICES", "2")], |cuda| {
        let first = cuda.start();
        let second = cuda.context(1);
        cu!(cuda, cuCtxSetCurrent(second));
        let mut at = 0u64;
        cu!(cuda, cuMemAllocAsync(&mut at, 64u64, 0u64));
        cu!(cuda, cuMemsetD32_v2(at, 1u32, 4u64));
        cu!(cuda, cuCtxSetCurrent(first));
        // Peer access does not cover pools.
        cu!(cuda, cuCtxEnablePeerAccess(second, 0u32));
        let add = cuda.function(cuda.module(KERNELS), "add");
        cuda.launch(add, 0, 4, &[at, 1]);
        assert_eq!(result!(cuda, cuStreamSynchronize(0u64)), 700);
        let findings = cuda.findings();
        assert!(findings.contains("cuMemPoolSetAccess"), "{findings}");
    });
}
