//! Executable graphs: how a graph runs.
//!
//! A launch gives each chain of nodes a stream of its own, a *lane*: a node goes on in the lane
//! of a node it comes after if nothing has been put behind that one yet, and opens a lane
//! otherwise. Every other dependency is an event. So exactly the order of the graph holds, no
//! more: nodes without an order between them run at the same time, and the race checks see the
//! edge that is missing. The stream of the launch waits for the nodes that nothing follows.

use std::collections::{BTreeMap, BTreeSet};

use super::actors::wait_for_devices;
use super::copy::Staging;
use super::graph::{Graph, Node};
use super::operation::Operation;
use super::status::{Out, Outcome, Status};
use super::{Driver, EXEC, Guard, Handle, api};
use crate::machine::{Command, EventId, StreamId};

/// `CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`, `UPLOAD`, `USE_NODE_PRIORITY`; launches from
/// a device, 4, are not here.
const FLAGS: u64 = 1 | UPLOAD | 8;
const UPLOAD: u64 = 2;

/// An executable graph.
pub(super) struct Exec {
    pub(super) graph: Graph,
    flags: u64,
    /// Nodes that were switched off.
    disabled: BTreeSet<Handle>,
    lanes: Vec<(StreamId, u32)>,
    events: Vec<EventId>,
    /// When a launch begins, and when it is done: one launch follows the other.
    start: EventId,
    done: EventId,
    launched: bool,
    /// What a launch needs is on the device.
    uploaded: bool,
    /// The context of the last launch.
    context: Handle,
}

/// Streams and events of an executable graph that was destroyed, perhaps while it ran.
pub(super) struct Retired {
    context: Handle,
    lanes: Vec<StreamId>,
    events: Vec<EventId>,
}

/// A node of a graph laid flat: those of graphs in it stand beside its own.
struct Flat {
    handle: Handle,
    context: Handle,
    operation: Operation,
    after: Vec<usize>,
}

/// Lays a graph flat; its roots come after `roots`. The last nodes, in the result.
fn flatten(graph: &Graph, roots: &[usize], flat: &mut Vec<Flat>) -> Option<Vec<usize>> {
    let mut place: BTreeMap<Handle, usize> = BTreeMap::new();
    let mut last: BTreeSet<usize> = BTreeSet::new();
    for handle in graph.order()? {
        let node = &graph.nodes[&handle];
        let mut after: Vec<usize> = node.after.iter().map(|n| place[n]).collect();
        after.iter().for_each(|n| {
            last.remove(n);
        });
        if after.is_empty() {
            after = roots.to_vec();
        }
        let operation = match &node.operation {
            Operation::Child(child) => {
                let ends = flatten(child, &after, flat)?;
                if !ends.is_empty() {
                    after = ends;
                }
                Operation::Empty
            }
            other => other.clone(),
        };
        place.insert(handle, flat.len());
        last.insert(flat.len());
        flat.push(Flat {
            handle,
            context: node.context,
            operation,
            after,
        });
    }
    Some(last.into_iter().collect())
}

impl Driver {
    pub(super) fn instantiate(&mut self, graph: Handle, flags: u64) -> Result<Handle, Status> {
        if flags & !FLAGS != 0 {
            return Err(if flags & !15 == 0 {
                Status::NOT_SUPPORTED
            } else {
                Status::INVALID_VALUE
            });
        }
        let graph = self.graph(graph)?.clone();
        let mut flat = Vec::new();
        if flatten(&graph, &[], &mut flat).is_none() {
            super::explain("cuGraphInstantiate", "the graph has a cycle");
            return Err(Status::INVALID_VALUE);
        }
        let handle = self.handle(EXEC);
        let exec = Exec {
            graph,
            flags,
            disabled: BTreeSet::new(),
            lanes: Vec::new(),
            events: Vec::new(),
            start: self.machine.create_event(),
            done: self.machine.create_event(),
            launched: false,
            uploaded: false,
            context: 0,
        };
        self.graphs.execs.insert(handle, exec);
        Ok(handle)
    }

    fn exec(&mut self, exec: Handle) -> Result<&mut Exec, Status> {
        self.graphs
            .execs
            .get_mut(&exec)
            .ok_or(Status::INVALID_VALUE)
    }

    fn launch_graph(&mut self, handle: Handle, stream: Handle) -> Outcome {
        let graph = self.exec(handle)?.graph.clone();
        if self.is_captured(stream)? {
            let child = self.clone_graph(&graph)?;
            return self.capture(stream, Operation::Child(child));
        }
        let (_, context, _) = self.stream(stream)?;
        self.check(self.context(context)?.device)?;
        self.sweep();
        let mut flat = Vec::new();
        let last = flatten(&graph, &[], &mut flat).ok_or(Status::INVALID_VALUE)?;
        let mut prepared = Vec::new();
        for node in &flat {
            let device = self.context(node.context)?.device;
            self.check(device)?;
            let off = self.exec(handle)?.disabled.contains(&node.handle);
            let commands = match off {
                true => Vec::new(),
                false => node.operation.commands(self, Staging::Later)?,
            };
            prepared.push((device, commands));
        }
        let exec = self.exec(handle)?;
        let (start, done, launched) = (exec.start, exec.done, exec.launched);
        exec.launched = true;
        exec.context = context;
        let events = self.events_of(handle, flat.len())?;
        if launched {
            self.enqueue(stream, Command::Wait(done))?;
        }
        self.enqueue(stream, Command::Record(start))?;
        // The lane of each node, and of each lane its last node.
        let mut lane_of: Vec<usize> = Vec::new();
        let mut ends: Vec<usize> = Vec::new();
        for (n, (node, (device, commands))) in flat.iter().zip(prepared).enumerate() {
            let lanes = &self.exec(handle)?.lanes;
            let follows = |&&d: &&usize| ends[lane_of[d]] == d && lanes[lane_of[d]].1 == device;
            let before = node.after.iter().find(follows).copied();
            let lane = match before {
                Some(before) => lane_of[before],
                None => {
                    self.lane(handle, ends.len(), device)?;
                    ends.push(n);
                    let lane = self.exec(handle)?.lanes[ends.len() - 1].0;
                    self.machine.enqueue(lane, Command::Wait(start));
                    ends.len() - 1
                }
            };
            lane_of.push(lane);
            ends[lane] = n;
            let id = self.exec(handle)?.lanes[lane].0;
            for &other in node.after.iter().filter(|&&d| Some(d) != before) {
                self.machine.enqueue(id, Command::Wait(events[other]));
            }
            for command in commands {
                self.machine.enqueue(id, command);
            }
            self.machine.enqueue(id, Command::Record(events[n]));
        }
        for n in last {
            self.enqueue(stream, Command::Wait(events[n]))?;
        }
        self.enqueue(stream, Command::Record(done)).map(|_| ())
    }

    /// Makes lane `n` of a graph one of this device.
    fn lane(&mut self, exec: Handle, n: usize, device: u32) -> Outcome {
        let known = self.exec(exec)?.lanes.get(n).copied();
        if known.is_some_and(|(_, of)| of == device) {
            return Ok(());
        }
        let fresh = (self.machine.create_stream(device), device);
        let exec = self.exec(exec)?;
        let context = exec.context;
        match known {
            None => exec.lanes.push(fresh),
            Some((old, _)) => {
                exec.lanes[n] = fresh;
                let retired = Retired {
                    context,
                    lanes: vec![old],
                    events: Vec::new(),
                };
                self.graphs.retired.push(retired);
            }
        }
        Ok(())
    }

    fn events_of(&mut self, exec: Handle, count: usize) -> Result<Vec<EventId>, Status> {
        while self.exec(exec)?.events.len() < count {
            let event = self.machine.create_event();
            self.exec(exec)?.events.push(event);
        }
        Ok(self.exec(exec)?.events[..count].to_vec())
    }

    /// Forgets what is left of destroyed graphs and no longer runs.
    fn sweep(&mut self) {
        let machine = &mut self.machine;
        self.graphs.retired.retain(|Retired { lanes, events, .. }| {
            let over = lanes.iter().all(|&id| machine.is_idle(id))
                && events.iter().all(|&id| machine.event_finished(id));
            if over {
                lanes.iter().for_each(|&id| machine.destroy_stream(id));
                events.iter().for_each(|&id| machine.destroy_event(id));
            }
            !over
        });
    }

    /// A context ends, and with it what graphs were launched to do in it.
    pub(super) fn cancel_graphs(&mut self, context: Handle) {
        let execs = self.graphs.execs.values().filter(|e| e.context == context);
        let lanes = execs.flat_map(|e| e.lanes.iter().map(|&(id, _)| id));
        let retired = self.graphs.retired.iter().filter(|r| r.context == context);
        let all: Vec<StreamId> = lanes
            .chain(retired.flat_map(|r| r.lanes.iter().copied()))
            .collect();
        self.machine.cancel_streams(&all);
        self.sweep();
    }

    fn update(&mut self, exec: Handle, graph: Handle) -> Result<Result<(), Mismatch>, Status> {
        let fresh = self.graph(graph)?.clone();
        let exec = self.exec(exec)?;
        let mut updated = exec.graph.clone();
        let result = update_graph(&mut updated, &fresh);
        if result.is_ok() {
            exec.graph = updated;
        }
        Ok(result)
    }
}

/// Puts what a graph needs onto the devices, which must be at rest for it, unless that was done.
fn upload(driver: Guard, exec: Handle, stream: Handle) -> Result<Guard, Status> {
    let mut driver = driver;
    let (_, context, _) = driver.stream(stream)?;
    let device = driver.context(context)?.device;
    driver.check(device)?;
    let known = driver.exec(exec)?;
    if known.uploaded {
        return Ok(driver);
    }
    let contexts: Vec<Handle> = known.graph.nodes.values().map(|n| n.context).collect();
    let mut devices = 1 << device;
    for context in contexts {
        devices |= 1 << driver.context(context)?.device;
    }
    driver = wait_for_devices(driver, devices);
    driver.check(device)?;
    driver.exec(exec)?.uploaded = true;
    Ok(driver)
}

/// Why a graph cannot take another's parameters: the result's number and the two nodes.
struct Mismatch(u32, Handle, Handle);

const TOPOLOGY_CHANGED: u32 = 2;
const TYPE_CHANGED: u32 = 3;
const FUNCTION_CHANGED: u32 = 4;
const PARAMETERS_CHANGED: u32 = 5;

/// Gives the nodes of a graph the parameters of another's, which must have the same nodes in the
/// same order with the same edges.
fn update_graph(old: &mut Graph, fresh: &Graph) -> Result<(), Mismatch> {
    let index = |graph: &Graph| -> BTreeMap<Handle, usize> {
        graph
            .nodes
            .keys()
            .enumerate()
            .map(|(n, &h)| (h, n))
            .collect()
    };
    let edges = |node: &Node, index: &BTreeMap<Handle, usize>| -> BTreeSet<usize> {
        node.after.iter().map(|h| index[h]).collect()
    };
    if old.nodes.len() != fresh.nodes.len() {
        return Err(Mismatch(TOPOLOGY_CHANGED, 0, 0));
    }
    let (old_index, fresh_index) = (index(old), index(fresh));
    for ((&handle, node), (&from, new)) in old.nodes.iter_mut().zip(&fresh.nodes) {
        let fail = |why| Err(Mismatch(why, from, handle));
        if node.operation.kind() != new.operation.kind() {
            return fail(TYPE_CHANGED);
        }
        if edges(node, &old_index) != edges(new, &fresh_index) {
            return fail(TOPOLOGY_CHANGED);
        }
        if node.context != new.context {
            return fail(PARAMETERS_CHANGED);
        }
        match (&mut node.operation, &new.operation) {
            (Operation::Child(old), Operation::Child(fresh)) => update_graph(old, fresh)?,
            (Operation::Kernel(old), Operation::Kernel(new))
                if old.shape.cooperative != new.shape.cooperative =>
            {
                return fail(FUNCTION_CHANGED);
            }
            (old, new) => *old = new.clone(),
        }
    }
    Ok(())
}

/// `CUDA_GRAPH_INSTANTIATE_PARAMS`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct InstantiateParams {
    flags: u64,
    stream: Handle,
    error_node: Handle,
    result: u32,
}

/// `CUgraphExecUpdateResultInfo`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct UpdateResult {
    result: u32,
    node: Handle,
    from: Handle,
}

api! {
    fn cuGraphInstantiateWithFlags(exec: Out<Handle>, graph: Handle, flags: u64) |driver| {
        let made = driver.instantiate(graph, flags)?;
        exec.set(made)
    }

    // The form of CUDA 11, which tells the node and the cause of a failure.
    fn cuGraphInstantiate_v2(
        exec: Out<Handle>, graph: Handle, node: Out<Handle>, text: Out<u8>, size: u64,
    ) |driver| {
        node.set_if_wanted(0);
        if text.address() != 0 && size > 0 {
            text.set(0)?;
        }
        let made = driver.instantiate(graph, 0)?;
        exec.set(made)
    }

    fn cuGraphInstantiateWithParams(exec: Out<Handle>, graph: Handle, params: Out<InstantiateParams>) |driver| {
        let mut given = params.get()?;
        given.error_node = 0;
        let made = driver.instantiate(graph, given.flags);
        given.result = u32::from(made.is_err());
        params.set(given)?;
        let made = made?;
        if given.flags & UPLOAD != 0 {
            drop(upload(driver, made, given.stream)?);
        }
        exec.set(made)
    }

    fn cuGraphExecGetFlags(exec: Handle, flags: Out<u64>) |driver| {
        flags.set(driver.exec(exec)?.flags)
    }

    fn cuGraphExecDestroy(exec: Handle) |driver| {
        let gone = driver.graphs.execs.remove(&exec).ok_or(Status::INVALID_VALUE)?;
        let mut events = gone.events;
        events.extend([gone.start, gone.done]);
        let retired = Retired {
            context: gone.context,
            lanes: gone.lanes.into_iter().map(|(id, _)| id).collect(),
            events,
        };
        driver.graphs.retired.push(retired);
        driver.sweep();
        Ok(())
    }

    fn cuGraphUpload(exec: Handle, stream: Handle) |driver| {
        driver.exec(exec)?;
        driver.refuse_captured(stream)?;
        upload(driver, exec, stream).map(|_| ())
    }

    fn cuGraphLaunch(exec: Handle, stream: Handle) |driver| {
        if !driver.is_captured(stream)? {
            driver = upload(driver, exec, stream)?;
        }
        driver.launch_graph(exec, stream)
    }

    fn cuGraphNodeSetEnabled(exec: Handle, node: Handle, enabled: u32) |driver| {
        let exec = driver.exec(exec)?;
        let found = exec.graph.find(node).ok_or(Status::INVALID_VALUE)?;
        if !matches!(found.operation, Operation::Kernel(_) | Operation::Copy(_) | Operation::Fill(_)) {
            return Err(Status::INVALID_VALUE);
        }
        if enabled == 0 {
            exec.disabled.insert(node);
        } else {
            exec.disabled.remove(&node);
        }
        Ok(())
    }

    fn cuGraphNodeGetEnabled(exec: Handle, node: Handle, enabled: Out<u32>) |driver| {
        let exec = driver.exec(exec)?;
        exec.graph.find(node).ok_or(Status::INVALID_VALUE)?;
        enabled.set(u32::from(!exec.disabled.contains(&node)))
    }

    fn cuGraphExecUpdate(exec: Handle, graph: Handle, node: Out<Handle>, result: Out<u32>) |driver| {
        let (code, found) = match driver.update(exec, graph)? {
            Ok(()) => (0, 0),
            Err(Mismatch(code, node, _)) => (code, node),
        };
        node.set_if_wanted(found);
        result.set(code)?;
        if code == 0 { Ok(()) } else { Err(Status::GRAPH_EXEC_UPDATE_FAILURE) }
    }

    fn cuGraphExecUpdate_v2(exec: Handle, graph: Handle, result: Out<UpdateResult>) |driver| {
        let found = match driver.update(exec, graph)? {
            Ok(()) => UpdateResult { result: 0, node: 0, from: 0 },
            Err(Mismatch(result, node, from)) => UpdateResult { result, node, from },
        };
        result.set(found)?;
        if found.result == 0 { Ok(()) } else { Err(Status::GRAPH_EXEC_UPDATE_FAILURE) }
    }
}
