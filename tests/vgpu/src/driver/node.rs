//! Nodes of graphs: how they are added, and their parameters.

use super::copy::{Copy3d, Fill};
use super::graph::list;
use super::launch::Shape;
use super::operation::{HostFunction, Operation};
use super::status::{In, Out, Outcome, Status};
use super::{Driver, Handle, api};

/// `CUDA_KERNEL_NODE_PARAMS` as it was until CUDA 12.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct KernelParamsV1 {
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    params: u64,
    extra: u64,
}

/// `CUDA_KERNEL_NODE_PARAMS`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct KernelParams {
    base: KernelParamsV1,
    kernel: Handle,
    context: Handle,
}

/// `CUDA_MEMSET_NODE_PARAMS`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MemsetParams {
    at: u64,
    pitch: u64,
    value: u32,
    unit: u32,
    width: u64,
    height: u64,
}

/// `CUDA_HOST_NODE_PARAMS`
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct HostParams {
    function: Option<extern "C" fn(u64)>,
    argument: u64,
}

impl From<KernelParamsV1> for KernelParams {
    fn from(base: KernelParamsV1) -> Self {
        Self {
            base,
            kernel: 0,
            context: 0,
        }
    }
}

impl KernelParams {
    /// The operation, and the context it belongs to.
    fn operation(&self, driver: &mut Driver) -> Result<(Operation, Handle), Status> {
        let context = driver.context_or_current(self.context)?;
        let function = match self.base.function {
            0 => self.kernel,
            function => function,
        };
        let shape = Shape {
            grid: self.base.grid,
            block: self.base.block,
            shared: self.base.shared,
            cooperative: false,
        };
        let params = In::from_address(self.base.params);
        let extra = In::from_address(self.base.extra);
        let launch = driver.prepare(function, context, shape, params, extra)?;
        Ok((Operation::Kernel(launch), context))
    }
}

impl MemsetParams {
    fn operation(&self, driver: &Driver) -> Result<Operation, Status> {
        let fill = Fill {
            at: self.at,
            pitch: self.pitch,
            value: self.value,
            unit: self.unit,
            width: self.width,
            height: self.height,
        };
        fill.check(driver, "cuGraphAddMemsetNode")?;
        Ok(Operation::Fill(fill))
    }
}

impl HostParams {
    fn operation(&self) -> Result<Operation, Status> {
        Ok(Operation::Host(HostFunction {
            function: self.function.ok_or(Status::INVALID_VALUE)?,
            argument: self.argument,
        }))
    }
}

fn memcpy(driver: &Driver, params: In<Copy3d>) -> Result<Operation, Status> {
    let copy = params.get()?.copy(driver)?;
    copy.check(driver, "cuGraphAddMemcpyNode")?;
    Ok(Operation::Copy(copy))
}

impl Operation {
    /// `CUgraphNodeType`
    pub(super) fn kind(&self) -> u32 {
        match self {
            Operation::Kernel(_) => 0,
            Operation::Copy(_) => 1,
            Operation::Fill(_) => 2,
            Operation::Host(_) => 3,
            Operation::Child(_) => 4,
            Operation::Empty => 5,
            Operation::Await(..) => 6,
            Operation::Record(..) => 7,
            Operation::WaitValue(_) | Operation::WriteValue(_) => 12,
        }
    }
}

impl Driver {
    fn context_or_current(&self, context: Handle) -> Result<Handle, Status> {
        match context {
            0 => self.current(),
            context => self.context(context).map(|_| context),
        }
    }

    fn add(
        &mut self,
        node: Out<Handle>,
        graph: Handle,
        (after, n): (In<Handle>, u64),
        context: Handle,
        operation: Operation,
    ) -> Outcome {
        let after = list(after, In::null(), n)?;
        let made = self.add_node(graph, context, &after, operation)?;
        node.set(made)
    }

    /// Gives a node another operation of the same kind.
    fn replace(&mut self, node: Handle, operation: Operation) -> Outcome {
        let node = self.node_mut(node)?;
        if node.operation.kind() != operation.kind() {
            return Err(Status::INVALID_VALUE);
        }
        node.operation = operation;
        Ok(())
    }

    /// The same in an executable graph only.
    fn replace_in(
        &mut self,
        exec: Handle,
        node: Handle,
        operation: Operation,
        context: Option<Handle>,
    ) -> Outcome {
        let exec = self
            .graphs
            .execs
            .get_mut(&exec)
            .ok_or(Status::INVALID_VALUE)?;
        let node = exec.graph.find_mut(node).ok_or(Status::INVALID_VALUE)?;
        if node.operation.kind() != operation.kind() {
            return Err(Status::INVALID_VALUE);
        }
        if let Some(context) = context
            && node.context != context
        {
            return Err(Status::INVALID_VALUE);
        }
        node.operation = operation;
        Ok(())
    }

    fn kernel_params(&self, node: Handle) -> Result<KernelParamsV1, Status> {
        let Operation::Kernel(launch) = &self.node(node)?.operation else {
            return Err(Status::INVALID_VALUE);
        };
        Ok(KernelParamsV1 {
            function: launch.function,
            grid: launch.shape.grid,
            block: launch.shape.block,
            shared: launch.shape.shared,
            params: launch.pointers.as_ptr() as u64,
            extra: 0,
        })
    }

    fn event_node(&self, event: Handle) -> Result<(Handle, crate::machine::EventId), Status> {
        let known = self.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
        Ok((event, known.id))
    }
}

api! {
    fn cuGraphNodeGetType(node: Handle, kind: Out<u32>) |driver| {
        kind.set(driver.node(node)?.operation.kind())
    }

    fn cuGraphAddKernelNode(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, params: In<KernelParamsV1>,
    ) |driver| {
        let (operation, context) = KernelParams::from(params.get()?).operation(&mut driver)?;
        driver.add(node, graph, (after, n), context, operation)
    }

    fn cuGraphAddKernelNode_v2(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, params: In<KernelParams>,
    ) |driver| {
        let (operation, context) = params.get()?.operation(&mut driver)?;
        driver.add(node, graph, (after, n), context, operation)
    }

    fn cuGraphKernelNodeGetParams(node: Handle, params: Out<KernelParamsV1>) |driver| {
        params.set(driver.kernel_params(node)?)
    }

    fn cuGraphKernelNodeGetParams_v2(node: Handle, params: Out<KernelParams>) |driver| {
        let base = driver.kernel_params(node)?;
        let context = driver.node(node)?.context;
        params.set(KernelParams { base, kernel: 0, context })
    }

    fn cuGraphKernelNodeSetParams(node: Handle, params: In<KernelParamsV1>) |driver| {
        let (operation, _) = KernelParams::from(params.get()?).operation(&mut driver)?;
        driver.replace(node, operation)
    }

    fn cuGraphKernelNodeSetParams_v2(node: Handle, params: In<KernelParams>) |driver| {
        let (operation, _) = params.get()?.operation(&mut driver)?;
        driver.replace(node, operation)
    }

    fn cuGraphExecKernelNodeSetParams(exec: Handle, node: Handle, params: In<KernelParamsV1>) |driver| {
        let (operation, context) = KernelParams::from(params.get()?).operation(&mut driver)?;
        driver.replace_in(exec, node, operation, Some(context))
    }

    fn cuGraphExecKernelNodeSetParams_v2(exec: Handle, node: Handle, params: In<KernelParams>) |driver| {
        let (operation, context) = params.get()?.operation(&mut driver)?;
        driver.replace_in(exec, node, operation, Some(context))
    }

    fn cuGraphAddMemcpyNode(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, params: In<Copy3d>, context: Handle,
    ) |driver| {
        let context = driver.context_or_current(context)?;
        let operation = memcpy(&driver, params)?;
        driver.add(node, graph, (after, n), context, operation)
    }

    fn cuGraphMemcpyNodeGetParams(node: Handle, params: Out<Copy3d>) |driver| {
        match &driver.node(node)?.operation {
            Operation::Copy(copy) => params.set(copy.description()),
            _ => Err(Status::INVALID_VALUE),
        }
    }

    fn cuGraphMemcpyNodeSetParams(node: Handle, params: In<Copy3d>) |driver| {
        let operation = memcpy(&driver, params)?;
        driver.replace(node, operation)
    }

    fn cuGraphExecMemcpyNodeSetParams(exec: Handle, node: Handle, params: In<Copy3d>, context: Handle) |driver| {
        let context = driver.context_or_current(context)?;
        let operation = memcpy(&driver, params)?;
        driver.replace_in(exec, node, operation, Some(context))
    }

    fn cuGraphAddMemsetNode(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, params: In<MemsetParams>, context: Handle,
    ) |driver| {
        let context = driver.context_or_current(context)?;
        let operation = params.get()?.operation(&driver)?;
        driver.add(node, graph, (after, n), context, operation)
    }

    fn cuGraphMemsetNodeGetParams(node: Handle, params: Out<MemsetParams>) |driver| {
        match driver.node(node)?.operation {
            Operation::Fill(Fill { at, pitch, value, unit, width, height }) => {
                params.set(MemsetParams { at, pitch, value, unit, width, height })
            }
            _ => Err(Status::INVALID_VALUE),
        }
    }

    fn cuGraphMemsetNodeSetParams(node: Handle, params: In<MemsetParams>) |driver| {
        let operation = params.get()?.operation(&driver)?;
        driver.replace(node, operation)
    }

    fn cuGraphExecMemsetNodeSetParams(exec: Handle, node: Handle, params: In<MemsetParams>, context: Handle) |driver| {
        let context = driver.context_or_current(context)?;
        let operation = params.get()?.operation(&driver)?;
        driver.replace_in(exec, node, operation, Some(context))
    }

    fn cuGraphAddHostNode(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, params: In<HostParams>,
    ) |driver| {
        let context = driver.current()?;
        let operation = params.get()?.operation()?;
        driver.add(node, graph, (after, n), context, operation)
    }

    fn cuGraphHostNodeGetParams(node: Handle, params: Out<HostParams>) |driver| {
        match driver.node(node)?.operation {
            Operation::Host(HostFunction { function, argument }) => {
                params.set(HostParams { function: Some(function), argument })
            }
            _ => Err(Status::INVALID_VALUE),
        }
    }

    fn cuGraphHostNodeSetParams(node: Handle, params: In<HostParams>) |driver| {
        driver.replace(node, params.get()?.operation()?)
    }

    fn cuGraphExecHostNodeSetParams(exec: Handle, node: Handle, params: In<HostParams>) |driver| {
        driver.replace_in(exec, node, params.get()?.operation()?, None)
    }

    fn cuGraphAddEmptyNode(node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64) |driver| {
        let context = driver.current()?;
        driver.add(node, graph, (after, n), context, Operation::Empty)
    }

    fn cuGraphAddChildGraphNode(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, child: Handle,
    ) |driver| {
        let context = driver.current()?;
        let original = driver.graph(child)?.clone();
        let copy = driver.clone_graph(&original)?;
        driver.add(node, graph, (after, n), context, Operation::Child(copy))
    }

    fn cuGraphAddEventRecordNode(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, event: Handle,
    ) |driver| {
        let context = driver.current()?;
        let (event, id) = driver.event_node(event)?;
        driver.add(node, graph, (after, n), context, Operation::Record(event, id))
    }

    fn cuGraphEventRecordNodeGetEvent(node: Handle, event: Out<Handle>) |driver| {
        match driver.node(node)?.operation {
            Operation::Record(found, _) => event.set(found),
            _ => Err(Status::INVALID_VALUE),
        }
    }

    fn cuGraphAddEventWaitNode(
        node: Out<Handle>, graph: Handle, after: In<Handle>, n: u64, event: Handle,
    ) |driver| {
        let context = driver.current()?;
        let (event, id) = driver.event_node(event)?;
        driver.add(node, graph, (after, n), context, Operation::Await(event, id))
    }

    fn cuGraphEventWaitNodeGetEvent(node: Handle, event: Out<Handle>) |driver| {
        match driver.node(node)?.operation {
            Operation::Await(found, _) => event.set(found),
            _ => Err(Status::INVALID_VALUE),
        }
    }
}
