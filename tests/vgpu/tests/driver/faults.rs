//! A fault ends a context: what fails afterwards, what still works, and how to begin again.

use crate::cuda::{Cuda, KERNELS, child, passes};
use crate::{cu, fails, here, result};

const ILLEGAL_ADDRESS: u32 = 700;

/// Starts a kernel that stores where nothing is.
fn fault(cuda: &Cuda) {
    let module = cuda.module(KERNELS);
    cuda.launch(cuda.function(module, "fault"), 0, 1, &[0x1000]);
}

#[test]
fn every_call_after_a_fault_returns_its_code() {
    passes(here!(), &[], |cuda| {
        let context = cuda.start();
        let at = cuda.put(&[1; 4]);
        let (stream, event) = (cuda.stream(), cuda.event());
        let module = cuda.module(KERNELS);
        let add = cuda.function(module, "add");
        fault(cuda);
        fails!(ILLEGAL_ADDRESS, cuda, cuCtxSynchronize());
        let mut values = [0u32; 4];
        let (mut new, mut free, mut total) = (0u64, 0u64, 0u64);
        let params = [&at as *const u64, &at as *const u64];
        for code in [
            result!(cuda, cuCtxSynchronize()),
            result!(cuda, cuStreamSynchronize(stream)),
            result!(cuda, cuStreamQuery(stream)),
            result!(cuda, cuMemAlloc_v2(&mut new, 64u64)),
            result!(cuda, cuMemAllocHost_v2(&mut new, 64u64)),
            result!(cuda, cuMemAllocAsync(&mut new, 64u64, stream)),
            result!(cuda, cuMemFree_v2(at)),
            result!(cuda, cuMemcpyDtoH_v2(&mut values[..], at, 16u64)),
            result!(cuda, cuMemcpyHtoDAsync_v2(at, &values[..], 16u64, stream)),
            result!(cuda, cuMemsetD32_v2(at, 0u32, 4u64)),
            result!(cuda, cuStreamCreate(&mut new, 0u32)),
            result!(cuda, cuEventCreate(&mut new, 0u32)),
            result!(cuda, cuEventRecord(event, stream)),
            result!(cuda, cuEventSynchronize(event)),
            result!(cuda, cuStreamWaitEvent(stream, event, 0u32)),
            result!(cuda, cuStreamBeginCapture_v2(stream, 2u32)),
            result!(
                cuda,
                cuLaunchKernel(
                    add,
                    1u32,
                    1u32,
                    1u32,
                    4u32,
                    1u32,
                    1u32,
                    0u32,
                    stream,
                    &params[..],
                    0u64
                )
            ),
        ] {
            assert_eq!(code, ILLEGAL_ADDRESS);
        }
        // What only looks at things still works.
        let mut current = 0u64;
        cu!(cuda, cuCtxGetCurrent(&mut current));
        assert_eq!(current, context);
        cu!(cuda, cuMemGetInfo_v2(&mut free, &mut total));
        let findings = cuda.findings();
        assert!(findings.contains("fault"), "{findings}");
    });
}

#[test]
fn a_context_made_anew_works() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        fault(cuda);
        fails!(ILLEGAL_ADDRESS, cuda, cuStreamSynchronize(0u64));
        cu!(cuda, cuDevicePrimaryCtxReset_v2(0));
        let mut at = 0u64;
        fails!(709, cuda, cuMemAlloc_v2(&mut at, 64u64));
        cuda.context(0);
        let data = cuda.put(&[1; 4]);
        let module = cuda.module(KERNELS);
        cuda.launch(cuda.function(module, "add"), 0, 4, &[data, 1]);
        assert_eq!(cuda.get(data, 4), [2; 4]);
        cuda.findings();
    });
}

#[test]
fn a_fault_in_a_graph_is_one_of_its_context() {
    passes(here!(), &[], |cuda| {
        cuda.start();
        let module = cuda.module(KERNELS);
        let (fault, add) = (cuda.function(module, "fault"), cuda.function(module, "add"));
        let data = cuda.put(&[1; 4]);
        let stream = cuda.stream();
        cu!(cuda, cuStreamBeginCapture_v2(stream, 0u32));
        cuda.launch(fault, stream, 1, &[0x1000]);
        cuda.launch(add, stream, 4, &[data, 1]);
        let (mut graph, mut exec) = (0u64, 0u64);
        cu!(cuda, cuStreamEndCapture(stream, &mut graph));
        cu!(cuda, cuGraphInstantiateWithFlags(&mut exec, graph, 0u64));
        cu!(cuda, cuGraphLaunch(exec, stream));
        fails!(ILLEGAL_ADDRESS, cuda, cuStreamSynchronize(stream));
        fails!(ILLEGAL_ADDRESS, cuda, cuGraphLaunch(exec, stream));
        cu!(cuda, cuGraphExecDestroy(exec));
        cuda.findings();
    });
}

#[test]
fn other_devices_go_on() {
    passes(here!(), &[("VGPU_DEVICES", "2")], |cuda| {
        cuda.start();
        fault(cuda);
        fails!(ILLEGAL_ADDRESS, cuda, cuCtxSynchronize());
        cuda.context(1);
        let data = cuda.put(&[1; 4]);
        let module = cuda.module(KERNELS);
        cuda.launch(cuda.function(module, "add"), 0, 4, &[data, 1]);
        assert_eq!(cuda.get(data, 4), [2; 4]);
        cuda.findings();
    });
}

#[test]
fn findings_that_nobody_takes_fail_the_process() {
    let body = |cuda: &Cuda| {
        cuda.start();
        fault(cuda);
        fails!(ILLEGAL_ADDRESS, cuda, cuCtxSynchronize());
    };
    if let Some(child) = child(here!(), &[], body) {
        assert_eq!(child.code, Some(86), "{}", child.errors);
        assert!(child.output.contains("1 passed"), "{}", child.output);
        assert!(child.errors.contains("fault"), "{}", child.errors);
    }
}
