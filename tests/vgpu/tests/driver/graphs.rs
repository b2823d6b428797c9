//! Graphs made by hand: nodes, edges, parameters, and how they run.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::cuda::{Cuda, KERNELS, passes};
use crate::{cu, fails, here};

#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq)]
struct KernelParams {
    function: u64,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    params: u64,
    extra: u64,
    kernel: u64,
    context: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq)]
struct MemsetParams {
    at: u64,
    pitch: u64,
    value: u32,
    unit: u32,
    width: u64,
    height: u64,
}

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

#[repr(C)]
struct HostParams {
    function: extern "C" fn(u64),
    argument: u64,
}

fn graph(cuda: &Cuda) -> u64 {
    let mut graph = 0u64;
    cu!(cuda, cuGraphCreate(&mut graph, 0u32));
    graph
}

fn instantiate(cuda: &Cuda, graph: u64) -> u64 {
    let mut exec = 0u64;
    cu!(cuda, cuGraphInstantiateWithFlags(&mut exec, graph, 0u64));
    exec
}

/// A kernel of 4 threads with these parameters.
fn kernel(cuda: &Cuda, graph: u64, after: &[u64], function: u64, params: &[u64]) -> u64 {
    let pointers: Vec<*const u64> = params.iter().map(std::ptr::from_ref).collect();
    let given = KernelParams {
        function,
        grid: [1; 3],
        block: [4, 1, 1],
        params: pointers.as_ptr() as u64,
        ..KernelParams::default()
    };
    let mut node = 0u64;
    cu!(
        cuda,
        cuGraphAddKernelNode_v2(&mut node, graph, after, after.len(), &given)
    );
    node
}

fn launch(cuda: &Cuda, exec: u64) {
    cu!(cuda, cuGraphLaunch(exec, 0u64));
    cu!(cuda, cuStreamSynchronize(0u64));
}

static CALLS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(step: u64) {
    CALLS.fetch_add(step as u32, Ordering::SeqCst);
}

#[test]
fn nodes_of_every_kind_run_in_their_order() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let (add, copy) = (cuda.function(module, "add"), cuda.function(module, "copy"));
        let (a, b) = (cuda.put(&[0; 4]), cuda.put(&[0; 4]));
        let mut back = [0u32; 4];
        let graph = graph(cuda);
        // Made in the wrong order; the edges put it right.
        let read = Copy3d {
            from: Side {
                kind: 2,
                device: b,
                ..Side::default()
            },
            to: Side {
                kind: 1,
                host: back.as_mut_ptr() as u64,
                ..Side::default()
            },
            extent: [16, 1, 1],
        };
        let mut reader = 0u64;
        cu!(
            cuda,
            cuGraphAddMemcpyNode(&mut reader, graph, 0u64, 0u64, &read, 0u64)
        );
        let mover = kernel(cuda, graph, &[], copy, &[b, a]);
        let adder = kernel(cuda, graph, &[], add, &[a, 3]);
        let set = MemsetParams {
            at: a,
            value: 7,
            unit: 4,
            width: 4,
            height: 1,
            ..MemsetParams::default()
        };
        let mut setter = 0u64;
        cu!(
            cuda,
            cuGraphAddMemsetNode(&mut setter, graph, 0u64, 0u64, &set, 0u64)
        );
        let (mut caller, mut nothing) = (0u64, 0u64);
        let host = HostParams {
            function: count,
            argument: 2,
        };
        cu!(
            cuda,
            cuGraphAddHostNode(&mut caller, graph, &[reader][..], 1u64, &host)
        );
        cu!(
            cuda,
            cuGraphAddEmptyNode(&mut nothing, graph, &[setter][..], 1u64)
        );
        let (from, to) = ([nothing, adder, mover], [adder, mover, reader]);
        cu!(
            cuda,
            cuGraphAddDependencies_v2(graph, &from[..], &to[..], 0u64, 3u64)
        );
        let mut kinds = Vec::new();
        for node in [adder, reader, setter, caller, nothing] {
            let mut kind = 99u32;
            cu!(cuda, cuGraphNodeGetType(node, &mut kind));
            kinds.push(kind);
        }
        assert_eq!(kinds, [0, 1, 2, 3, 5]);
        let (mut roots, mut count) = ([0u64; 2], 2u64);
        cu!(cuda, cuGraphGetRootNodes(graph, &mut roots[..], &mut count));
        assert_eq!((roots, count), ([setter, 0], 1));
        let exec = instantiate(cuda, graph);
        for n in 1..=3 {
            back.fill(0);
            launch(cuda, exec);
            assert_eq!(back, [10; 4]);
            assert_eq!(CALLS.load(Ordering::SeqCst), 2 * n);
        }
        assert_eq!(cuda.findings(), "");
    });
}

#[test]
fn parameters_can_be_read_and_changed_in_a_graph_and_in_its_executable() {
    passes(here!(), &[], |cuda| {
        let context = cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[0; 4]);
        let graph = graph(cuda);
        let node = kernel(cuda, graph, &[], add, &[data, 1]);
        let exec = instantiate(cuda, graph);
        let mut params = KernelParams::default();
        cu!(cuda, cuGraphKernelNodeGetParams_v2(node, &mut params));
        assert_eq!(
            (params.function, params.block, params.context),
            (add, [4, 1, 1], context)
        );
        // SAFETY: the driver gives the addresses of two parameters, of 8 and 4 bytes.
        let seen = unsafe {
            let pointers = params.params as *const u64;
            (
                *(*pointers as *const u64),
                *(*pointers.add(1) as *const u32),
            )
        };
        assert_eq!(seen, (data, 1));
        // The executable keeps its own.
        let values = [data, 100];
        let pointers = values.each_ref().map(std::ptr::from_ref);
        params.params = pointers.as_ptr() as u64;
        cu!(cuda, cuGraphKernelNodeSetParams_v2(node, &params));
        launch(cuda, exec);
        assert_eq!(cuda.get(data, 4), [1; 4]);
        cu!(cuda, cuGraphExecKernelNodeSetParams_v2(exec, node, &params));
        launch(cuda, exec);
        assert_eq!(cuda.get(data, 4), [101; 4]);
        // A node of another kind, a kernel that does not exist, too many threads.
        let set = MemsetParams {
            at: data,
            unit: 4,
            width: 1,
            height: 1,
            ..MemsetParams::default()
        };
        fails!(1, cuda, cuGraphMemsetNodeSetParams(node, &set));
        params.function = 12345;
        fails!(400, cuda, cuGraphKernelNodeSetParams_v2(node, &params));
        params.function = add;
        params.block = [2048, 1, 1];
        fails!(1, cuda, cuGraphKernelNodeSetParams_v2(node, &params));
    });
}

#[test]
fn an_executable_takes_the_parameters_of_a_graph_of_the_same_shape() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[0; 4]);
        let make = |steps: &[u64]| {
            let graph = graph(cuda);
            let mut after = Vec::new();
            for &step in steps {
                after = vec![kernel(cuda, graph, &after, add, &[data, step])];
            }
            graph
        };
        let exec = instantiate(cuda, make(&[1, 2]));
        launch(cuda, exec);
        assert_eq!(cuda.get(data, 4), [3; 4]);
        let mut result = [9u64; 3];
        cu!(
            cuda,
            cuGraphExecUpdate_v2(exec, make(&[10, 20]), &mut result[..])
        );
        launch(cuda, exec);
        assert_eq!(cuda.get(data, 4), [33; 4]);
        fails!(
            910,
            cuda,
            cuGraphExecUpdate_v2(exec, make(&[1, 2, 3]), &mut result[..])
        );
        assert_eq!(result[0] as u32, 2, "topology changed");
        let other = graph(cuda);
        let first = kernel(cuda, other, &[], add, &[data, 1]);
        let mut empty = 0u64;
        cu!(
            cuda,
            cuGraphAddEmptyNode(&mut empty, other, &[first][..], 1u64)
        );
        fails!(
            910,
            cuda,
            cuGraphExecUpdate_v2(exec, other, &mut result[..])
        );
        assert_eq!(
            (result[0] as u32, result[1]),
            (3, empty),
            "node type changed"
        );
        // What failed changed nothing.
        launch(cuda, exec);
        assert_eq!(cuda.get(data, 4), [63; 4]);
    });
}

#[test]
fn a_clone_has_nodes_of_its_own() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[0; 4]);
        let original = graph(cuda);
        let first = kernel(cuda, original, &[], add, &[data, 1]);
        let second = kernel(cuda, original, &[first], add, &[data, 2]);
        let mut clone = 0u64;
        cu!(cuda, cuGraphClone(&mut clone, original));
        let mut twin = 0u64;
        cu!(cuda, cuGraphNodeFindInClone(&mut twin, second, clone));
        assert!(twin != second);
        cu!(cuda, cuGraphDestroyNode(twin));
        let mut count = 9u64;
        cu!(cuda, cuGraphGetNodes(clone, 0u64, &mut count));
        assert_eq!(count, 1);
        fails!(1, cuda, cuGraphNodeFindInClone(&mut twin, second, clone));
        launch(cuda, instantiate(cuda, clone));
        launch(cuda, instantiate(cuda, original));
        assert_eq!(cuda.get(data, 4), [4; 4]);
        // A graph in a graph is a copy of it too.
        let outer = graph(cuda);
        let mut child = 0u64;
        cu!(
            cuda,
            cuGraphAddChildGraphNode(&mut child, outer, 0u64, 0u64, original)
        );
        kernel(cuda, outer, &[child], add, &[data, 100]);
        cu!(cuda, cuGraphDestroy(original));
        launch(cuda, instantiate(cuda, outer));
        assert_eq!(cuda.get(data, 4), [107; 4]);
    });
}

#[test]
fn nodes_can_be_switched_off() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[0; 4]);
        let graph = graph(cuda);
        let first = kernel(cuda, graph, &[], add, &[data, 1]);
        let second = kernel(cuda, graph, &[first], add, &[data, 10]);
        kernel(cuda, graph, &[second], add, &[data, 100]);
        let exec = instantiate(cuda, graph);
        cu!(cuda, cuGraphNodeSetEnabled(exec, second, 0u32));
        let mut enabled = 9u32;
        cu!(cuda, cuGraphNodeGetEnabled(exec, second, &mut enabled));
        assert_eq!(enabled, 0);
        launch(cuda, exec);
        assert_eq!(cuda.get(data, 4), [101; 4]);
        cu!(cuda, cuGraphNodeSetEnabled(exec, second, 1u32));
        launch(cuda, exec);
        assert_eq!(cuda.get(data, 4), [212; 4]);
    });
}

#[test]
fn edges_and_graphs_that_make_no_sense_are_refused() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let graph = graph(cuda);
        let other = self::graph(cuda);
        let (mut a, mut b, mut foreign) = (0u64, 0u64, 0u64);
        cu!(cuda, cuGraphAddEmptyNode(&mut a, graph, 0u64, 0u64));
        cu!(cuda, cuGraphAddEmptyNode(&mut b, graph, &[a][..], 1u64));
        cu!(cuda, cuGraphAddEmptyNode(&mut foreign, other, 0u64, 0u64));
        let mut node = 0u64;
        fails!(
            1,
            cuda,
            cuGraphAddEmptyNode(&mut node, graph, &[foreign][..], 1u64)
        );
        fails!(
            1,
            cuda,
            cuGraphAddEmptyNode(&mut node, graph, &[a, a][..], 2u64)
        );
        fails!(1, cuda, cuGraphAddEmptyNode(&mut node, 77u64, 0u64, 0u64));
        // The edge that is there, one to itself, one that is not there.
        fails!(
            1,
            cuda,
            cuGraphAddDependencies(graph, &[a][..], &[b][..], 1u64)
        );
        fails!(
            1,
            cuda,
            cuGraphAddDependencies(graph, &[a][..], &[a][..], 1u64)
        );
        fails!(
            1,
            cuda,
            cuGraphRemoveDependencies(graph, &[b][..], &[a][..], 1u64)
        );
        // A cycle is found when the graph is made executable.
        cu!(
            cuda,
            cuGraphAddDependencies(graph, &[b][..], &[a][..], 1u64)
        );
        let mut exec = 0u64;
        fails!(1, cuda, cuGraphInstantiateWithFlags(&mut exec, graph, 0u64));
        cu!(
            cuda,
            cuGraphRemoveDependencies(graph, &[b][..], &[a][..], 1u64)
        );
        cu!(cuda, cuGraphInstantiateWithFlags(&mut exec, graph, 0u64));
        // Launches from a device are not here; flags that do not exist are no flags.
        fails!(
            801,
            cuda,
            cuGraphInstantiateWithFlags(&mut exec, graph, 4u64)
        );
        fails!(
            1,
            cuda,
            cuGraphInstantiateWithFlags(&mut exec, graph, 1u64 << 40)
        );
        cu!(cuda, cuGraphDestroy(graph));
        fails!(1, cuda, cuGraphDestroy(graph));
        let mut kind = 0u32;
        fails!(1, cuda, cuGraphNodeGetType(a, &mut kind));
    });
}

#[test]
fn launches_of_one_executable_follow_each_other() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        let data = cuda.put(&[0; 4]);
        let graph = graph(cuda);
        kernel(cuda, graph, &[], add, &[data, 1]);
        let exec = instantiate(cuda, graph);
        let streams = [cuda.stream(), cuda.stream(), cuda.stream()];
        for _ in 0..3 {
            for stream in streams {
                cu!(cuda, cuGraphLaunch(exec, stream));
            }
        }
        // Destroyed while it runs: the launches happen all the same.
        cu!(cuda, cuGraphExecDestroy(exec));
        cu!(cuda, cuCtxSynchronize());
        assert_eq!(cuda.get(data, 4), [9; 4]);
        assert_eq!(cuda.findings(), "", "the launches are ordered");
    });
}

#[test]
fn nodes_without_an_order_run_at_the_same_time() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let (add, spin) = (cuda.function(module, "add"), cuda.function(module, "spin"));
        let flag = cuda.put(&[0]);
        let data = cuda.put(&[0; 4]);
        let graph = graph(cuda);
        // The first waits for what the second writes: together they end, in a row they would not.
        kernel(cuda, graph, &[], spin, &[flag]);
        let after = kernel(cuda, graph, &[], add, &[data, 1]);
        let release = MemsetParams {
            at: flag,
            value: 1,
            unit: 4,
            width: 1,
            height: 1,
            ..MemsetParams::default()
        };
        let mut setter = 0u64;
        cu!(
            cuda,
            cuGraphAddMemsetNode(&mut setter, graph, &[after][..], 1u64, &release, 0u64)
        );
        let exec = instantiate(cuda, graph);
        cu!(cuda, cuGraphLaunch(exec, 0u64));
        cu!(cuda, cuStreamSynchronize(0u64));
        assert_eq!(cuda.get(data, 4), [1; 4]);
        cuda.findings();
    });
}
