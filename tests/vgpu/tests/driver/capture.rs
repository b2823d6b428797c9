//! Stream capture: what becomes of the work, and what ends a capture.

use crate::cuda::{Cuda, KERNELS, passes};
use crate::{cu, fails, here, result};

const ILLEGAL_STATE: u32 = 401;
const UNSUPPORTED: u32 = 900;
const INVALIDATED: u32 = 901;
const MERGE: u32 = 902;
const UNMATCHED: u32 = 903;
const UNJOINED: u32 = 904;
const ISOLATION: u32 = 905;
const IMPLICIT: u32 = 906;
const CAPTURED_EVENT: u32 = 907;
const WRONG_THREAD: u32 = 908;

const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;

fn begin(cuda: &Cuda, mode: u32) -> u64 {
    let stream = cuda.stream();
    cu!(cuda, cuStreamBeginCapture_v2(stream, mode));
    stream
}

fn end(cuda: &Cuda, stream: u64) -> u64 {
    let mut graph = 0u64;
    cu!(cuda, cuStreamEndCapture(stream, &mut graph));
    assert_ne!(graph, 0);
    graph
}

fn instantiate(cuda: &Cuda, graph: u64) -> u64 {
    let mut exec = 0u64;
    cu!(cuda, cuGraphInstantiateWithFlags(&mut exec, graph, 0u64));
    exec
}

/// The capture in a stream must have become invalid.
fn is_lost(cuda: &Cuda, stream: u64) {
    let mut status = 9u32;
    cu!(cuda, cuStreamIsCapturing(stream, &mut status));
    assert_eq!(status, 2);
    let mut graph = 1u64;
    fails!(INVALIDATED, cuda, cuStreamEndCapture(stream, &mut graph));
    assert_eq!(graph, 0);
    cu!(cuda, cuStreamIsCapturing(stream, &mut status));
    assert_eq!(status, 0);
}

#[test]
fn a_replay_uses_the_parameters_of_the_capture() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[1, 2, 3, 4]);
        let mut source = [10u32; 4];
        let target = cuda.put(&[0; 4]);
        let stream = begin(cuda, GLOBAL);
        let mut params = [data, 5];
        cuda.launch(add, stream, 4, &params);
        cu!(
            cuda,
            cuMemcpyHtoDAsync_v2(target, &source[..], 16usize, stream)
        );
        let graph = end(cuda, stream);
        // Nothing ran, and what the variables hold now does not matter for the kernel.
        params[1] = 1000;
        assert_eq!(cuda.get(data, 4), [1, 2, 3, 4]);
        assert_eq!(cuda.get(target, 4), [0; 4]);
        let exec = instantiate(cuda, graph);
        cu!(cuda, cuGraphDestroy(graph));
        for n in 1..=3u32 {
            // Host memory is read when the graph runs.
            source = [n; 4];
            cu!(cuda, cuGraphLaunch(exec, stream));
            cu!(cuda, cuStreamSynchronize(stream));
            assert_eq!(
                cuda.get(data, 4),
                [1 + 5 * n, 2 + 5 * n, 3 + 5 * n, 4 + 5 * n]
            );
            assert_eq!(cuda.get(target, 4), source);
        }
        cu!(cuda, cuGraphExecDestroy(exec));
        fails!(1, cuda, cuGraphLaunch(exec, stream));
        assert_eq!(params[1], 1000);
    });
}

/// A diamond over two streams: `first` in both after the fork, `second` behind the join.
fn diamond(cuda: &Cuda, order: bool) -> (u64, u64, u64) {
    let module = cuda.module(KERNELS);
    let (add, copy) = (cuda.function(module, "add"), cuda.function(module, "copy"));
    let (data, other) = (cuda.put(&[1; 32]), cuda.put(&[0; 32]));
    let (side, fork, written, joined) = (cuda.stream(), cuda.event(), cuda.event(), cuda.event());
    let stream = begin(cuda, GLOBAL);
    cu!(cuda, cuEventRecord(fork, stream));
    cu!(cuda, cuStreamWaitEvent(side, fork, 0u32));
    cuda.launch(add, stream, 32, &[data, 1]);
    cu!(cuda, cuEventRecord(written, stream));
    if order {
        cu!(cuda, cuStreamWaitEvent(side, written, 0u32));
    }
    cuda.launch(copy, side, 32, &[other, data]);
    cu!(cuda, cuEventRecord(joined, side));
    cu!(cuda, cuStreamWaitEvent(stream, joined, 0u32));
    cuda.launch(add, stream, 32, &[other, 100]);
    (end(cuda, stream), stream, other)
}

#[test]
fn events_fork_and_join_a_capture() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let (graph, stream, other) = diamond(cuda, true);
        let mut count = 0u64;
        cu!(cuda, cuGraphGetNodes(graph, 0u64, &mut count));
        assert_eq!(count, 3);
        let (mut nodes, mut from, mut to) = ([0u64; 3], [0u64; 8], [0u64; 8]);
        cu!(cuda, cuGraphGetNodes(graph, &mut nodes[..], &mut count));
        let mut edges = 8u64;
        cu!(
            cuda,
            cuGraphGetEdges(graph, &mut from[..], &mut to[..], &mut edges)
        );
        let mut found: Vec<_> = from.iter().zip(&to).take(edges as usize).collect();
        found.sort();
        // add, copy after add; the last after both.
        let [a, b, c] = &nodes;
        assert_eq!(found, [(a, b), (a, c), (b, c)]);
        let exec = instantiate(cuda, graph);
        for n in 1..=3 {
            cu!(cuda, cuGraphLaunch(exec, stream));
            cu!(cuda, cuStreamSynchronize(stream));
            assert_eq!(cuda.get(other, 32), [1 + n + 100; 32]);
        }
        assert_eq!(cuda.findings(), "");
    });
}

#[test]
fn a_dependency_that_is_missing_shows_as_a_race() {
    for seed in ["1", "2", "3"] {
        passes(here!(), &[("VGPU_SEED", seed)], |cuda| {
            cuda.start();
            let (graph, stream, _) = diamond(cuda, false);
            let exec = instantiate(cuda, graph);
            cu!(cuda, cuGraphLaunch(exec, stream));
            cu!(cuda, cuStreamSynchronize(stream));
            let findings = cuda.findings();
            assert!(findings.contains("race"), "{findings}");
        });
    }
}

#[test]
fn work_that_is_not_joined_ends_a_capture() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[1; 32]);
        let (side, fork) = (cuda.stream(), cuda.event());
        let stream = begin(cuda, GLOBAL);
        cu!(cuda, cuEventRecord(fork, stream));
        cu!(cuda, cuStreamWaitEvent(side, fork, 0u32));
        let mut status = 0u32;
        cu!(cuda, cuStreamIsCapturing(side, &mut status));
        assert_eq!(status, 1);
        cuda.launch(add, side, 32, &[data, 1]);
        let mut graph = 1u64;
        fails!(UNMATCHED, cuda, cuStreamEndCapture(side, &mut graph));
        fails!(UNJOINED, cuda, cuStreamEndCapture(stream, &mut graph));
        assert_eq!(graph, 0);
        // Both streams are free again.
        for stream in [stream, side] {
            cu!(cuda, cuStreamIsCapturing(stream, &mut status));
            assert_eq!(status, 0);
            fails!(ILLEGAL_STATE, cuda, cuStreamEndCapture(stream, &mut graph));
        }
        cuda.launch(add, side, 32, &[data, 1]);
        cu!(cuda, cuCtxSynchronize());
        assert_eq!(cuda.get(data, 32), [2; 32]);
    });
}

#[test]
fn captures_do_not_mix_with_each_other_or_with_what_is_outside() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let (one, two) = (begin(cuda, GLOBAL), begin(cuda, GLOBAL));
        let event = cuda.event();
        cu!(cuda, cuEventRecord(event, one));
        fails!(MERGE, cuda, cuStreamWaitEvent(two, event, 0u32));
        is_lost(cuda, one);
        is_lost(cuda, two);

        // An event that was never recorded holds nothing up; one recorded outside cannot come in.
        let outside = cuda.stream();
        let stream = begin(cuda, GLOBAL);
        let event = cuda.event();
        cu!(cuda, cuStreamWaitEvent(stream, event, 0u32));
        cu!(cuda, cuEventRecord(event, outside));
        fails!(ISOLATION, cuda, cuStreamWaitEvent(stream, event, 0u32));
        is_lost(cuda, stream);
    });
}

#[test]
fn a_captured_event_cannot_be_waited_for_by_the_host() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let mut timed = 0u64;
        cu!(cuda, cuEventCreate(&mut timed, 0u32));
        let attempts: [fn(&Cuda, u64) -> u32; 3] = [
            |cuda, event| result!(cuda, cuEventQuery(event)),
            |cuda, event| result!(cuda, cuEventSynchronize(event)),
            |cuda, event| {
                let mut ms = 0f32;
                result!(cuda, cuEventElapsedTime_v2(&mut ms, event, event))
            },
        ];
        for attempt in attempts {
            let stream = begin(cuda, RELAXED);
            cu!(cuda, cuEventRecord(timed, stream));
            assert_eq!(attempt(cuda, timed), CAPTURED_EVENT);
            is_lost(cuda, stream);
            // Recorded outside it is an event like any other.
            cu!(cuda, cuEventRecord(timed, stream));
            cu!(cuda, cuEventSynchronize(timed));
        }
    });
}

#[test]
fn what_synchronises_ends_a_capture() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let attempts: [fn(&Cuda, u64) -> u32; 3] = [
            |cuda, stream| result!(cuda, cuStreamSynchronize(stream)),
            |cuda, stream| result!(cuda, cuStreamQuery(stream)),
            |cuda, _| result!(cuda, cuCtxSynchronize()),
        ];
        for attempt in attempts {
            let stream = begin(cuda, RELAXED);
            assert_eq!(attempt(cuda, stream), UNSUPPORTED);
            is_lost(cuda, stream);
        }
    });
}

#[test]
fn the_legacy_stream_does_not_wait_for_a_captured_one() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let data = cuda.put(&[1; 4]);
        let mut graph = 0u64;
        fails!(UNSUPPORTED, cuda, cuStreamBeginCapture_v2(0u64, RELAXED));
        let mut blocking = 0u64;
        cu!(cuda, cuStreamCreate(&mut blocking, 0u32));
        cu!(cuda, cuStreamBeginCapture_v2(blocking, RELAXED));
        let mut status = 0u32;
        fails!(IMPLICIT, cuda, cuStreamIsCapturing(0u64, &mut status));
        is_lost(cuda, blocking);
        cu!(cuda, cuStreamBeginCapture_v2(blocking, RELAXED));
        let mut values = [0u32; 4];
        fails!(
            IMPLICIT,
            cuda,
            cuMemcpyDtoH_v2(&mut values[..], data, 16usize)
        );
        is_lost(cuda, blocking);
        // A non-blocking stream has nothing to do with it.
        let stream = begin(cuda, RELAXED);
        assert_eq!(cuda.get(data, 4), [1; 4]);
        cu!(cuda, cuStreamEndCapture(stream, &mut graph));
    });
}

/// A call that may synchronise: forbidden by some modes.
fn allocate(cuda: &Cuda) -> u32 {
    let mut at = 0u64;
    result!(cuda, cuMemAlloc_v2(&mut at, 64usize))
}

#[test]
fn modes_forbid_what_may_synchronise() {
    passes(here!(), &[], |cuda| {
        let context = cuda.start();
        // Of this thread's captures, all but relaxed ones.
        for (mode, allowed) in [(GLOBAL, false), (THREAD_LOCAL, false), (RELAXED, true)] {
            let stream = begin(cuda, mode);
            if allowed {
                assert_eq!(allocate(cuda), 0);
                end(cuda, stream);
            } else {
                assert_eq!(allocate(cuda), UNSUPPORTED, "mode {mode}");
                is_lost(cuda, stream);
            }
        }
        // Of other threads', global ones only, and none for a thread that exchanged its mode.
        for (mode, own, allowed) in [
            (GLOBAL, GLOBAL, false),
            (GLOBAL, THREAD_LOCAL, true),
            (GLOBAL, RELAXED, true),
            (THREAD_LOCAL, GLOBAL, true),
            (RELAXED, GLOBAL, true),
        ] {
            let stream = begin(cuda, mode);
            let code = std::thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    cu!(cuda, cuCtxSetCurrent(context));
                    let mut exchanged = own;
                    cu!(cuda, cuThreadExchangeStreamCaptureMode(&mut exchanged));
                    assert_eq!(exchanged, GLOBAL);
                    allocate(cuda)
                });
                thread.join().expect("the thread ends")
            });
            if allowed {
                assert_eq!(code, 0, "capture {mode}, thread {own}");
                end(cuda, stream);
            } else {
                assert_eq!(code, UNSUPPORTED, "capture {mode}, thread {own}");
                is_lost(cuda, stream);
            }
        }
        let mut none = 3u32;
        fails!(1, cuda, cuThreadExchangeStreamCaptureMode(&mut none));
    });
}

#[test]
fn another_thread_ends_a_relaxed_capture_only() {
    passes(here!(), &[], |cuda| {
        let context = cuda.start();
        for (mode, code) in [
            (GLOBAL, WRONG_THREAD),
            (THREAD_LOCAL, WRONG_THREAD),
            (RELAXED, 0),
        ] {
            let stream = begin(cuda, mode);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    cu!(cuda, cuCtxSetCurrent(context));
                    let mut graph = 0u64;
                    fails!(code, cuda, cuStreamEndCapture(stream, &mut graph));
                });
            });
            if code != 0 {
                end(cuda, stream);
            }
        }
    });
}

#[test]
fn the_state_of_a_capture_can_be_asked_for_and_changed() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[1; 4]);
        let stream = begin(cuda, GLOBAL);
        fails!(ILLEGAL_STATE, cuda, cuStreamBeginCapture_v2(stream, GLOBAL));
        cuda.launch(add, stream, 4, &[data, 1]);
        let (mut status, mut id, mut graph, mut nodes, mut edges, mut n) =
            (0u32, 0u64, 0u64, 0u64, 0u64, 0u64);
        cu!(
            cuda,
            cuStreamGetCaptureInfo_v3(
                stream,
                &mut status,
                &mut id,
                &mut graph,
                &mut nodes,
                &mut edges,
                &mut n
            )
        );
        assert_eq!((status, n), (1, 1));
        assert!(id != 0 && graph != 0 && edges != 0);
        // SAFETY: the driver gives the address of `n` nodes.
        let node = unsafe { *(nodes as *const u64) };
        let mut kind = 9u32;
        cu!(cuda, cuGraphNodeGetType(node, &mut kind));
        assert_eq!(kind, 0);
        // A node added by hand, for what comes next to wait for.
        let mut empty = 0u64;
        cu!(
            cuda,
            cuGraphAddEmptyNode(&mut empty, graph, &[node][..], 1u64)
        );
        cu!(
            cuda,
            cuStreamUpdateCaptureDependencies(stream, &[empty][..], 1u64, 1u32)
        );
        cuda.launch(add, stream, 4, &[data, 1]);
        let made = end(cuda, stream);
        assert_eq!(made, graph);
        let mut count = 9u64;
        cu!(cuda, cuGraphGetEdges(graph, 0u64, 0u64, &mut count));
        assert_eq!(count, 2);
        let exec = instantiate(cuda, graph);
        cu!(cuda, cuGraphLaunch(exec, stream));
        cu!(cuda, cuStreamSynchronize(stream));
        assert_eq!(cuda.get(data, 4), [3; 4]);
    });
}

#[test]
fn a_graph_launched_into_a_capture_becomes_one_node() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[0; 4]);
        let stream = begin(cuda, GLOBAL);
        cuda.launch(add, stream, 4, &[data, 1]);
        cuda.launch(add, stream, 4, &[data, 1]);
        let inner = instantiate(cuda, end(cuda, stream));
        cu!(cuda, cuStreamBeginCapture_v2(stream, GLOBAL));
        cu!(cuda, cuGraphLaunch(inner, stream));
        cuda.launch(add, stream, 4, &[data, 10]);
        cu!(cuda, cuGraphLaunch(inner, stream));
        let graph = end(cuda, stream);
        let mut nodes = [0u64; 4];
        let mut count = 4u64;
        cu!(cuda, cuGraphGetNodes(graph, &mut nodes[..], &mut count));
        let kinds: Vec<u32> = nodes[..count as usize]
            .iter()
            .map(|&node| {
                let mut kind = 0u32;
                cu!(cuda, cuGraphNodeGetType(node, &mut kind));
                kind
            })
            .collect();
        assert_eq!(kinds, [4, 0, 4]);
        let exec = instantiate(cuda, graph);
        cu!(cuda, cuGraphLaunch(exec, stream));
        cu!(cuda, cuGraphLaunch(exec, stream));
        cu!(cuda, cuStreamSynchronize(stream));
        assert_eq!(cuda.get(data, 4), [28; 4]);
        assert_eq!(cuda.findings(), "");
    });
}

#[test]
fn each_device_captures_and_runs_its_own_graph() {
    passes(here!(), &[("VGPU_DEVICES", "3")], |cuda| {
        cuda.start();
        let mut graphs = Vec::new();
        for device in 0..3 {
            cuda.context(device);
            let module = cuda.module(KERNELS);
            let add = cuda.function(module, "add");
            let data = cuda.put(&[device as u32; 4]);
            let stream = begin(cuda, THREAD_LOCAL);
            cuda.launch(add, stream, 4, &[data, 1]);
            graphs.push((instantiate(cuda, end(cuda, stream)), stream, data));
        }
        for _ in 0..2 {
            for &(exec, stream, _) in &graphs {
                cu!(cuda, cuGraphLaunch(exec, stream));
            }
        }
        for (device, &(_, stream, data)) in graphs.iter().enumerate() {
            cuda.context(device as i32);
            cu!(cuda, cuStreamSynchronize(stream));
            assert_eq!(cuda.get(data, 4), [device as u32 + 2; 4]);
        }
        assert_eq!(cuda.findings(), "");
    });
}
