//! Peer access through the driver API: who may, who does, and what happens to who may not.

use crate::child::{is_child, passes};
use crate::compile::ptx;
use crate::cuda::{Gpu, code, cu, findings};

const ALREADY_ENABLED: u32 = 704;
const NOT_ENABLED: u32 = 705;
const UNSUPPORTED: u32 = 217;

fn can_access(from: i32, to: i32) -> i32 {
    let mut can = -1;
    cu!(cuDeviceCanAccessPeer(&mut can, from, to));
    can
}

fn attribute(number: u32, from: i32, to: i32) -> i32 {
    let mut value = -1;
    cu!(cuDeviceGetP2PAttribute(&mut value, number, from, to));
    value
}

#[test]
fn peer_access_is_directed_and_counted_once() {
    let name = "peers::peer_access_is_directed_and_counted_once";
    if !is_child(name) {
        passes(name, &[("VGPU_DEVICES", "3")]);
        return;
    }
    let text = ptx("threads.cu");
    let gpus: Vec<Gpu> = (0..2).map(|d| Gpu::new(d, &text)).collect();
    assert_eq!(
        (can_access(0, 1), can_access(1, 0), can_access(1, 1)),
        (1, 1, 0)
    );
    assert_eq!(code!(cuDeviceCanAccessPeer(&mut 0, 0, 3)), 101);
    gpus[0].enter();
    assert_eq!(code!(cuCtxDisablePeerAccess(gpus[1].context)), NOT_ENABLED);
    assert_eq!(code!(cuCtxEnablePeerAccess(gpus[1].context, 1)), 1);
    assert_eq!(code!(cuCtxEnablePeerAccess(gpus[0].context, 0)), 201);
    assert_eq!(code!(cuCtxEnablePeerAccess(12345, 0)), 201);
    cu!(cuCtxEnablePeerAccess(gpus[1].context, 0));
    assert_eq!(
        code!(cuCtxEnablePeerAccess(gpus[1].context, 0)),
        ALREADY_ENABLED
    );
    // The way back was never opened.
    gpus[1].enter();
    assert_eq!(code!(cuCtxDisablePeerAccess(gpus[0].context)), NOT_ENABLED);

    // Over the open way a kernel writes into the other's memory.
    let there = gpus[1].room(8);
    gpus[0].enter();
    gpus[0].launch("set", 1, 1, &[there, 41]);
    cu!(cuStreamSynchronize(gpus[0].stream));
    assert_eq!(gpus[1].get::<u64>(there, 1), [41]);
    assert!(findings().is_empty());

    // A copy needs no access.
    let here = gpus[0].room(8);
    gpus[1].enter();
    cu!(cuMemcpyPeer(
        here,
        gpus[0].context,
        there,
        gpus[1].context,
        8
    ));
    assert_eq!(gpus[0].get::<u64>(here, 1), [41]);

    // Against the way, a kernel faults, and the finding says what is missing.
    gpus[1].enter();
    gpus[1].launch("set", 1, 1, &[here, 1]);
    assert_eq!(code!(cuStreamSynchronize(gpus[1].stream)), 700);
    let found = findings();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("peer-access: "), "{found:?}");
    for words in [
        "device 1 of memory of device 0",
        "cuCtxEnablePeerAccess",
        "in set at",
        "device 1, block",
    ] {
        assert!(found[0].contains(words), "{words}: {found:?}");
    }
}

#[test]
fn the_topology_decides_who_can_be_reached() {
    let name = "peers::the_topology_decides_who_can_be_reached";
    if !is_child(name) {
        let topology = ("VGPU_TOPOLOGY", "links:0-1; pcie; no:0-2");
        passes(name, &[("VGPU_DEVICES", "4"), topology]);
        return;
    }
    let text = ptx("threads.cu");
    let gpus: Vec<Gpu> = (0..4).map(|d| Gpu::new(d, &text)).collect();
    // Rank, access, native atomics.
    let of = |from, to| [1, 2, 3].map(|number| attribute(number, from, to));
    assert_eq!(of(0, 1), [0, 1, 1]);
    assert_eq!(of(1, 3), [1, 1, 0]);
    assert_eq!(of(0, 2)[1..], [0, 0]);
    assert_eq!(
        (
            can_access(0, 1),
            can_access(3, 1),
            can_access(0, 2),
            can_access(2, 0)
        ),
        (1, 1, 0, 0)
    );
    assert_eq!(code!(cuDeviceGetP2PAttribute(&mut 0, 1, 2, 2)), 101);
    gpus[0].enter();
    assert_eq!(
        code!(cuCtxEnablePeerAccess(gpus[2].context, 0)),
        UNSUPPORTED
    );
    cu!(cuCtxEnablePeerAccess(gpus[3].context, 0));
    // A copy goes through the host where there is no link.
    let (a, b) = (gpus[0].put(&[7u64]), gpus[2].room(8));
    gpus[0].enter();
    cu!(cuMemcpyPeer(b, gpus[2].context, a, gpus[0].context, 8));
    assert_eq!(gpus[2].get::<u64>(b, 1), [7]);
}

#[test]
fn a_topology_that_is_not_understood_is_refused() {
    let name = "peers::a_topology_that_is_not_understood_is_refused";
    if !is_child(name) {
        let output = passes(name, &[("VGPU_TOPOLOGY", "mesh:0-1")]);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(words.contains("VGPU_TOPOLOGY: 'mesh:0-1' in"), "{words}");
        return;
    }
    assert_eq!(code!(cuInit(0)), 1);
}

#[test]
fn memory_is_not_shared_with_other_processes() {
    let name = "peers::memory_is_not_shared_with_other_processes";
    if !is_child(name) {
        let output = passes(name, &[]);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            words.contains("cuIpcGetMemHandle is not supported"),
            "{words}"
        );
        return;
    }
    cu!(cuInit(0));
    assert_eq!(code!(cuIpcGetMemHandle(std::ptr::null_mut(), 0)), 801);
    assert_eq!(code!(cuIpcGetEventHandle(std::ptr::null_mut(), 0)), 801);
}
