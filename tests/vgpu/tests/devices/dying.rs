//! Devices and links that die: what the program is told, by which call, and what goes on.

use std::sync::{Arc, Barrier, Mutex};

use crate::child::{is_child, passes};
use crate::compile::ptx;
use crate::cuda::{Gpu, code, cu, findings};

const ECC_UNCORRECTABLE: u32 = 214;
const NVLINK_UNCORRECTABLE: u32 = 220;

/// Devices that all reach each other.
fn machine(n: i32) -> Vec<Gpu> {
    let text = ptx("threads.cu");
    let gpus: Vec<Gpu> = (0..n).map(|d| Gpu::new(d, &text)).collect();
    for own in &gpus {
        own.enter();
        for peer in gpus.iter().filter(|peer| peer.context != own.context) {
            cu!(cuCtxEnablePeerAccess(peer.context, 0));
        }
    }
    gpus
}

/// Makes device `gpu` run until it dies.
fn until_dead(gpu: &Gpu, flag: u64, out: u64) {
    gpu.launch("spin_until", 1, 1, &[flag, 1, out]);
    assert_eq!(code!(cuStreamSynchronize(gpu.stream)), ECC_UNCORRECTABLE);
}

#[test]
fn every_call_on_a_dead_device_returns_its_code() {
    let name = "dying::every_call_on_a_dead_device_returns_its_code";
    if !is_child(name) {
        let output = passes(
            name,
            &[("VGPU_DEVICES", "2"), ("VGPU_TOPOLOGY", "dies:1@300")],
        );
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(words.contains("device 1 dies at its operation"), "{words}");
        return;
    }
    let gpus = machine(2);
    let (flag, out) = (gpus[1].room(8), gpus[1].room(8));
    let set = gpus[1].function("set");
    until_dead(&gpus[1], flag, out);
    let (mut at, mut stream, mut event, mut word) = (0, 0, 0, 0u64);
    let to = (&raw mut word).cast();
    let calls = || {
        [
            code!(cuCtxSynchronize()),
            code!(cuStreamSynchronize(gpus[1].stream)),
            code!(cuStreamQuery(gpus[1].stream)),
            code!(cuMemAlloc_v2(&mut at, 8)),
            code!(cuMemFree_v2(flag)),
            code!(cuMemcpyDtoH_v2(to, flag, 8)),
            code!(cuMemcpyHtoD_v2(flag, to, 8)),
            code!(cuMemsetD8_v2(flag, 0, 8)),
            code!(cuStreamCreate(&mut stream, 1)),
            code!(cuEventCreate(&mut event, 2)),
            gpus[1].try_launch(set, 1, 1, &[flag, 1]),
        ]
    };
    let mut calls = calls;
    assert_eq!(calls(), [ECC_UNCORRECTABLE; 11]);
    // It stays dead, and gets no new context.
    assert_eq!(calls(), [ECC_UNCORRECTABLE; 11]);
    cu!(cuDevicePrimaryCtxReset_v2(1));
    let mut context = 0;
    let retained = code!(cuDevicePrimaryCtxRetain(&mut context, 1));
    assert_eq!(retained, ECC_UNCORRECTABLE);
    // The other is as it was.
    let word = gpus[0].room(8);
    gpus[0].launch("set", 1, 1, &[word, 5]);
    cu!(cuStreamSynchronize(gpus[0].stream));
    assert_eq!(gpus[0].get::<u64>(word, 1), [5]);
    assert!(findings().is_empty());
}

#[test]
fn copies_with_a_dead_device_fail_and_leave_the_others_alone() {
    let name = "dying::copies_with_a_dead_device_fail_and_leave_the_others_alone";
    if !is_child(name) {
        passes(
            name,
            &[("VGPU_DEVICES", "3"), ("VGPU_TOPOLOGY", "dies:1@300")],
        );
        return;
    }
    let gpus = machine(3);
    let (flag, out) = (gpus[1].room(8), gpus[1].room(8));
    let (here, there) = (gpus[0].room(8), gpus[2].room(8));
    until_dead(&gpus[1], flag, out);
    let [a, b, c] = [0, 1, 2].map(|n| gpus[n].context);
    gpus[0].enter();
    assert_eq!(code!(cuMemcpyPeer(flag, b, here, a, 8)), ECC_UNCORRECTABLE);
    assert_eq!(code!(cuMemcpyPeer(here, a, flag, b, 8)), ECC_UNCORRECTABLE);
    let mut word = 0u64;
    let to = (&raw mut word).cast();
    assert_eq!(code!(cuMemcpyDtoH_v2(to, flag, 8)), ECC_UNCORRECTABLE);
    assert_eq!(
        code!(cuMemsetD8_v2(flag, 1, 8)),
        ECC_UNCORRECTABLE,
        "memory of the dead device"
    );
    // These calls ended nobody else's context.
    cu!(cuMemcpyPeer(there, c, here, a, 8));
    assert!(findings().is_empty());
}

#[test]
fn a_copy_under_way_when_its_peer_dies_ends_the_context() {
    let name = "dying::a_copy_under_way_when_its_peer_dies_ends_the_context";
    if !is_child(name) {
        passes(
            name,
            &[("VGPU_DEVICES", "2"), ("VGPU_TOPOLOGY", "dies:1@300")],
        );
        return;
    }
    let gpus = machine(2);
    let (flag, out) = (gpus[1].room(8), gpus[1].room(8));
    let (here, own) = (gpus[0].room(8), gpus[0].room(8));
    let mut gate = 0;
    gpus[0].enter();
    cu!(cuStreamCreate(&mut gate, 1));
    // The copy stands behind a kernel that waits; loading another would wait for that one.
    let set = gpus[0].function("set");
    gpus[0].launch("spin_until", 1, 1, &[own, 1, here]);
    let [a, b] = [0, 1].map(|n| gpus[n].context);
    cu!(cuMemcpyPeerAsync(here, a, flag, b, 8, gpus[0].stream));
    gpus[1].enter();
    until_dead(&gpus[1], flag, out);
    gpus[0].enter();
    let other = Gpu {
        stream: gate,
        ..gpus[0]
    };
    assert_eq!(other.try_launch(set, 1, 1, &[own, 1]), 0);
    assert_eq!(
        code!(cuStreamSynchronize(gpus[0].stream)),
        NVLINK_UNCORRECTABLE
    );
    assert_eq!(code!(cuStreamSynchronize(gate)), NVLINK_UNCORRECTABLE);
}

#[test]
fn kernels_that_read_a_dead_device_end_their_context() {
    let name = "dying::kernels_that_read_a_dead_device_end_their_context";
    if !is_child(name) {
        passes(
            name,
            &[("VGPU_DEVICES", "3"), ("VGPU_TOPOLOGY", "dies:1@300")],
        );
        return;
    }
    let gpus = machine(3);
    let (flag, out) = (gpus[1].room(8), gpus[1].room(8));
    let own = gpus[2].room(8);
    until_dead(&gpus[1], flag, out);
    // One spins on its memory, one stores there.
    for (gpu, kernel) in [(&gpus[0], "spin_until"), (&gpus[2], "set")] {
        let args: &[u64] = if kernel == "set" {
            &[flag, 1]
        } else {
            &[flag, 1, own]
        };
        gpu.enter();
        gpu.launch(kernel, 1, 1, args);
        for _ in 0..2 {
            let code = code!(cuStreamSynchronize(gpu.stream));
            assert_eq!(code, NVLINK_UNCORRECTABLE, "{kernel}");
        }
        let code = code!(cuMemAlloc_v2(&mut 0, 8));
        assert_eq!(code, NVLINK_UNCORRECTABLE, "{kernel}");
    }
    // A new context of a device that lives works, and cannot reach the dead one.
    cu!(cuDevicePrimaryCtxReset_v2(0));
    let fresh = Gpu::new(0, &ptx("threads.cu"));
    let word = fresh.room(8);
    fresh.launch("set", 1, 1, &[word, 5]);
    cu!(cuStreamSynchronize(fresh.stream));
    assert_eq!(fresh.get::<u64>(word, 1), [5]);
    let code = code!(cuCtxEnablePeerAccess(gpus[1].context, 0));
    assert_eq!(code, ECC_UNCORRECTABLE);
    assert!(findings().is_empty());
}

#[test]
fn a_dead_link_ends_the_context_that_uses_it_and_not_the_peer() {
    let name = "dying::a_dead_link_ends_the_context_that_uses_it_and_not_the_peer";
    if !is_child(name) {
        passes(
            name,
            &[("VGPU_DEVICES", "2"), ("VGPU_TOPOLOGY", "dies:0>1@3")],
        );
        return;
    }
    let gpus = machine(2);
    let (here, there) = (gpus[0].room(8), gpus[1].room(8));
    // Two accesses arrive, the third does not.
    for value in 1..=2 {
        gpus[0].launch("set", 1, 1, &[there, value]);
        cu!(cuStreamSynchronize(gpus[0].stream));
    }
    gpus[0].launch("set", 1, 1, &[there, 3]);
    assert_eq!(
        code!(cuStreamSynchronize(gpus[0].stream)),
        NVLINK_UNCORRECTABLE
    );
    assert_eq!(gpus[1].get::<u64>(there, 1), [2]);
    // The other device, and the way back, are as they were; what lay here went with the context.
    cu!(cuDevicePrimaryCtxReset_v2(0));
    let fresh = Gpu::new(0, &ptx("threads.cu"));
    let word = fresh.room(8);
    gpus[1].enter();
    cu!(cuCtxEnablePeerAccess(fresh.context, 0));
    gpus[1].launch("set", 1, 1, &[word, 7]);
    cu!(cuStreamSynchronize(gpus[1].stream));
    assert_eq!(fresh.get::<u64>(word, 1), [7]);
    // A copy without peer access goes through the host; with it, over the dead link.
    cu!(cuMemcpyPeer(there, gpus[1].context, word, fresh.context, 8));
    assert_eq!(gpus[1].get::<u64>(there, 1), [7]);
    fresh.enter();
    cu!(cuCtxEnablePeerAccess(gpus[1].context, 0));
    let code = code!(cuMemcpyPeer(there, gpus[1].context, word, fresh.context, 8));
    assert_eq!(code, NVLINK_UNCORRECTABLE);
    let _ = here;
    assert!(findings().is_empty());
}

#[test]
fn over_pcie_a_dead_link_loses_writes_and_reads_ones() {
    let name = "dying::over_pcie_a_dead_link_loses_writes_and_reads_ones";
    if !is_child(name) {
        let topology = ("VGPU_TOPOLOGY", "pcie; dies:0>1@2");
        passes(name, &[("VGPU_DEVICES", "2"), topology]);
        return;
    }
    let gpus = machine(2);
    let (here, there) = (gpus[0].room(8), gpus[1].room(8));
    for value in 1..=3 {
        gpus[0].launch("set", 1, 1, &[there, value]);
        cu!(cuStreamSynchronize(gpus[0].stream));
    }
    assert_eq!(gpus[1].get::<u64>(there, 1), [1]);
    let [a, b] = [0, 1].map(|n| gpus[n].context);
    gpus[0].enter();
    cu!(cuMemcpyPeer(there, b, here, a, 8));
    assert_eq!(gpus[1].get::<u64>(there, 1), [1]);
    gpus[0].enter();
    cu!(cuMemcpyPeer(here, a, there, b, 8));
    assert_eq!(gpus[0].get::<u64>(here, 1), [u64::MAX]);
    assert!(findings().is_empty());
}

#[test]
fn a_rank_that_dies_ends_its_peer_too() {
    let name = "dying::a_rank_that_dies_ends_its_peer_too";
    if !is_child(name) {
        passes(
            name,
            &[("VGPU_DEVICES", "2"), ("VGPU_TOPOLOGY", "dies:1@4000")],
        );
        return;
    }
    // Two threads, each with a device, exchange words until one of the devices dies.
    let text = Arc::new(ptx("threads.cu"));
    let meet = Arc::new(Barrier::new(2));
    let shared = Arc::new(Mutex::new([(0, 0, 0); 2]));
    let codes: Vec<u32> = (0..2usize)
        .map(|rank| {
            let (text, meet, shared) = (text.clone(), meet.clone(), shared.clone());
            std::thread::spawn(move || {
                let gpu = Gpu::new(rank as i32, &text);
                let (flags, slots) = (gpu.room(16), gpu.room(8 * 32));
                let out = gpu.room(8 * 32);
                shared.lock().expect("no panic")[rank] = (gpu.context, flags, slots);
                meet.wait();
                let all = *shared.lock().expect("no panic");
                cu!(cuCtxEnablePeerAccess(all[1 - rank].0, 0));
                let flags = gpu.put(&all.map(|e| e.1));
                let slots = gpu.put(&all.map(|e| e.2));
                meet.wait();
                let args = [rank as u64, 2, flags, slots, out, 0, 1_000_000];
                gpu.launch("exchange", 1, 32, &args);
                code!(cuStreamSynchronize(gpu.stream))
            })
        })
        .collect::<Vec<_>>()
        .into_iter()
        .map(|thread| thread.join().expect("a rank"))
        .collect();
    assert_eq!(codes, [NVLINK_UNCORRECTABLE, ECC_UNCORRECTABLE]);
    assert!(findings().is_empty());
}
