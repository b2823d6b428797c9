//! Graphs: nodes, each with the operation it does and the nodes it comes after. `node` makes
//! nodes and reads their parameters, `exec` runs graphs, `capture` makes them from streams.

use std::collections::{BTreeMap, BTreeSet};

use super::exec::{Exec, Retired};
use super::operation::Operation;
use super::status::{In, Out, Outcome, Status};
use super::{Driver, GRAPH, Handle, NODE, api};

/// The most nodes or edges that a call may name.
const MOST: u64 = 1 << 20;
/// The most nodes of a graph with those of the graphs in it.
const LARGEST: usize = 1 << 16;
/// How deep graphs may be nested.
const DEEPEST: usize = 32;

/// A node.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) operation: Operation,
    /// Where it runs.
    pub(super) context: Handle,
    /// The nodes that come before.
    pub(super) after: Vec<Handle>,
    /// In a clone: the node it was made from.
    original: Handle,
}

/// A graph. The handles of a device grow, so that the order of the table is the order in which
/// nodes were made, device by device.
#[derive(Clone, Default)]
pub(super) struct Graph {
    pub(super) nodes: BTreeMap<Handle, Node>,
}

/// All graphs.
#[derive(Default)]
pub(super) struct Graphs {
    pub(super) graphs: BTreeMap<Handle, Graph>,
    pub(super) execs: BTreeMap<Handle, Exec>,
    pub(super) retired: Vec<Retired>,
}

impl Graph {
    /// The nodes in an order that respects what comes before what; None if there is a cycle.
    pub(super) fn order(&self) -> Option<Vec<Handle>> {
        let mut waiting: BTreeMap<Handle, usize> = BTreeMap::new();
        let mut followers: BTreeMap<Handle, Vec<Handle>> = BTreeMap::new();
        let mut ready = BTreeSet::new();
        for (&handle, node) in &self.nodes {
            waiting.insert(handle, node.after.len());
            if node.after.is_empty() {
                ready.insert(handle);
            }
            for &before in &node.after {
                followers.entry(before).or_default().push(handle);
            }
        }
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some(handle) = ready.pop_first() {
            order.push(handle);
            for follower in followers.get(&handle).into_iter().flatten() {
                if let Some(left) = waiting.get_mut(follower) {
                    *left -= 1;
                    if *left == 0 {
                        ready.insert(*follower);
                    }
                }
            }
        }
        (order.len() == self.nodes.len()).then_some(order)
    }

    /// A node here or in a graph that is one of the nodes.
    pub(super) fn find_mut(&mut self, handle: Handle) -> Option<&mut Node> {
        if self.nodes.contains_key(&handle) {
            return self.nodes.get_mut(&handle);
        }
        self.nodes
            .values_mut()
            .find_map(|node| match &mut node.operation {
                Operation::Child(child) => child.find_mut(handle),
                _ => None,
            })
    }

    pub(super) fn find(&self, handle: Handle) -> Option<&Node> {
        self.nodes.get(&handle).or_else(|| {
            self.nodes.values().find_map(|node| match &node.operation {
                Operation::Child(child) => child.find(handle),
                _ => None,
            })
        })
    }

    fn depth(&self) -> usize {
        let children = self.nodes.values().map(|node| match &node.operation {
            Operation::Child(child) => child.depth(),
            _ => 0,
        });
        1 + children.max().unwrap_or(0)
    }

    fn size(&self) -> usize {
        let children = self.nodes.values().map(|node| match &node.operation {
            Operation::Child(child) => 1 + child.size(),
            _ => 1,
        });
        children.sum()
    }

    fn edges(&self) -> Vec<[Handle; 2]> {
        let nodes = self.nodes.iter();
        nodes
            .flat_map(|(&to, node)| node.after.iter().map(move |&from| [from, to]))
            .collect()
    }
}

impl Driver {
    pub(super) fn graph(&self, graph: Handle) -> Result<&Graph, Status> {
        self.graphs.graphs.get(&graph).ok_or(Status::INVALID_VALUE)
    }

    fn graph_mut(&mut self, graph: Handle) -> Result<&mut Graph, Status> {
        self.graphs
            .graphs
            .get_mut(&graph)
            .ok_or(Status::INVALID_VALUE)
    }

    /// A node of any graph.
    pub(super) fn node(&self, node: Handle) -> Result<&Node, Status> {
        let found = self
            .graphs
            .graphs
            .values()
            .find_map(|graph| graph.find(node));
        found.ok_or(Status::INVALID_VALUE)
    }

    pub(super) fn node_mut(&mut self, node: Handle) -> Result<&mut Node, Status> {
        let mut graphs = self.graphs.graphs.values_mut();
        let found = graphs.find_map(|graph| graph.find_mut(node));
        found.ok_or(Status::INVALID_VALUE)
    }

    /// The graph whose own node this is.
    fn owner(&self, node: Handle) -> Result<Handle, Status> {
        let mut graphs = self.graphs.graphs.iter();
        let found = graphs.find(|(_, graph)| graph.nodes.contains_key(&node));
        Ok(*found.ok_or(Status::INVALID_VALUE)?.0)
    }

    /// Adds a node after others of the same graph.
    pub(super) fn add_node(
        &mut self,
        graph: Handle,
        context: Handle,
        after: &[Handle],
        operation: Operation,
    ) -> Result<Handle, Status> {
        let nodes = &self.graph(graph)?.nodes;
        let distinct: BTreeSet<&Handle> = after.iter().collect();
        if distinct.len() != after.len() || after.iter().any(|n| !nodes.contains_key(n)) {
            return Err(Status::INVALID_VALUE);
        }
        let handle = self.handle(NODE);
        let node = Node {
            operation,
            context,
            after: after.to_vec(),
            original: handle,
        };
        self.graph_mut(graph)?.nodes.insert(handle, node);
        Ok(handle)
    }

    /// A copy with nodes of its own.
    pub(super) fn clone_graph(&mut self, graph: &Graph) -> Result<Graph, Status> {
        if graph.depth() > DEEPEST || graph.size() > LARGEST {
            return Err(Status::NOT_SUPPORTED);
        }
        let handles: BTreeMap<Handle, Handle> = graph
            .nodes
            .keys()
            .map(|&old| (old, self.handle(NODE)))
            .collect();
        let mut nodes = BTreeMap::new();
        for (&old, node) in &graph.nodes {
            let mut node = node.clone();
            node.original = old;
            node.after.iter_mut().for_each(|n| *n = handles[n]);
            if let Operation::Child(child) = &mut node.operation {
                *child = self.clone_graph(child)?;
            }
            nodes.insert(handles[&old], node);
        }
        Ok(Graph { nodes })
    }

    fn change_edges(
        &mut self,
        graph: Handle,
        from: &[Handle],
        to: &[Handle],
        add: bool,
    ) -> Outcome {
        let nodes = &mut self.graph_mut(graph)?.nodes;
        let known = |n: &Handle| nodes.contains_key(n);
        if !from.iter().chain(to).all(known) {
            return Err(Status::INVALID_VALUE);
        }
        for (from, to) in from.iter().zip(to) {
            let Some(node) = nodes.get_mut(to) else {
                continue;
            };
            let there = node.after.contains(from);
            if there == add || from == to {
                return Err(Status::INVALID_VALUE);
            }
            if add {
                node.after.push(*from);
            } else {
                node.after.retain(|n| n != from);
            }
        }
        Ok(())
    }
}

/// The handles in an array of the caller, with edge data that must say nothing special.
pub(super) fn list(handles: In<Handle>, edges: In<u64>, n: u64) -> Result<Vec<Handle>, Status> {
    if n > MOST {
        return Err(Status::INVALID_VALUE);
    }
    let n = n as usize;
    if !edges.is_null() {
        for i in 0..n {
            // Ports and types other than 0 are programmatic launches.
            if edges.index(i)? != 0 {
                return Err(Status::NOT_SUPPORTED);
            }
        }
    }
    (0..n).map(|i| handles.index(i)).collect()
}

/// Gives back arrays the way the graph queries do: with no array the number; else as many as fit,
/// zeros after them, and the number written.
fn give<const N: usize>(
    arrays: [Out<Handle>; N],
    count: Out<u64>,
    found: &[[Handle; N]],
) -> Outcome {
    if arrays.iter().all(|a| a.address() == 0) {
        return count.set(found.len() as u64);
    }
    let room = usize::try_from(count.get()?).unwrap_or(usize::MAX);
    for (n, values) in found.iter().take(room).enumerate() {
        for (array, value) in arrays.iter().zip(values) {
            array.set_at(n, *value);
        }
    }
    for n in found.len()..room.min(MOST as usize) {
        arrays.iter().for_each(|array| array.set_at(n, 0));
    }
    count.set(room.min(found.len()) as u64)
}

/// As `give`, with edge data, which is always zero.
fn give_edges<const N: usize>(
    arrays: [Out<Handle>; N],
    data: Out<u64>,
    count: Out<u64>,
    found: &[[Handle; N]],
) -> Outcome {
    let only_counts = arrays.iter().all(|a| a.address() == 0);
    if only_counts && data.address() != 0 {
        return Err(Status::INVALID_VALUE);
    }
    give(arrays, count, found)?;
    if !only_counts {
        for n in 0..count.get()? as usize {
            data.set_at(n, 0);
        }
    }
    Ok(())
}

fn before(driver: &Driver, node: Handle) -> Result<Vec<[Handle; 1]>, Status> {
    Ok(driver.node(node)?.after.iter().map(|&n| [n]).collect())
}

fn behind(driver: &Driver, node: Handle) -> Result<Vec<[Handle; 1]>, Status> {
    let graph = driver.graph(driver.owner(node)?)?;
    let behind = graph.nodes.iter().filter(|(_, n)| n.after.contains(&node));
    Ok(behind.map(|(&handle, _)| [handle]).collect())
}

api! {
    fn cuGraphCreate(graph: Out<Handle>, flags: u32) |driver| {
        if flags != 0 {
            return Err(Status::INVALID_VALUE);
        }
        let handle = driver.handle(GRAPH);
        graph.set(handle)?;
        driver.graphs.graphs.insert(handle, Graph::default());
        Ok(())
    }

    fn cuGraphDestroy(graph: Handle) |driver| {
        driver.graph(graph)?;
        if driver.captures.holds(graph) {
            return Err(Status::ILLEGAL_STATE);
        }
        driver.graphs.graphs.remove(&graph);
        Ok(())
    }

    fn cuGraphClone(clone: Out<Handle>, graph: Handle) |driver| {
        let original = driver.graph(graph)?.clone();
        let copy = driver.clone_graph(&original)?;
        let handle = driver.handle(GRAPH);
        clone.set(handle)?;
        driver.graphs.graphs.insert(handle, copy);
        Ok(())
    }

    fn cuGraphNodeFindInClone(node: Out<Handle>, original: Handle, clone: Handle) |driver| {
        let nodes = &driver.graph(clone)?.nodes;
        let found = nodes.iter().find(|(h, n)| n.original == original && **h != original);
        node.set(*found.ok_or(Status::INVALID_VALUE)?.0)
    }

    fn cuGraphDestroyNode(node: Handle) |driver| {
        let graph = driver.owner(node)?;
        if driver.captures.holds(graph) {
            return Err(Status::ILLEGAL_STATE);
        }
        let nodes = &mut driver.graph_mut(graph)?.nodes;
        nodes.remove(&node);
        nodes.values_mut().for_each(|n| n.after.retain(|&other| other != node));
        Ok(())
    }

    fn cuGraphGetNodes(graph: Handle, nodes: Out<Handle>, count: Out<u64>) |driver| {
        let found: Vec<[Handle; 1]> = driver.graph(graph)?.nodes.keys().map(|&n| [n]).collect();
        give([nodes], count, &found)
    }

    fn cuGraphGetRootNodes(graph: Handle, nodes: Out<Handle>, count: Out<u64>) |driver| {
        let all = driver.graph(graph)?.nodes.iter();
        let found: Vec<[Handle; 1]> =
            all.filter(|(_, n)| n.after.is_empty()).map(|(&n, _)| [n]).collect();
        give([nodes], count, &found)
    }

    fn cuGraphGetEdges(graph: Handle, from: Out<Handle>, to: Out<Handle>, count: Out<u64>) |driver| {
        give([from, to], count, &driver.graph(graph)?.edges())
    }

    fn cuGraphGetEdges_v2(
        graph: Handle, from: Out<Handle>, to: Out<Handle>, data: Out<u64>, count: Out<u64>,
    ) |driver| {
        give_edges([from, to], data, count, &driver.graph(graph)?.edges())
    }

    fn cuGraphNodeGetDependencies(node: Handle, nodes: Out<Handle>, count: Out<u64>) |driver| {
        give([nodes], count, &before(&driver, node)?)
    }

    fn cuGraphNodeGetDependencies_v2(
        node: Handle, nodes: Out<Handle>, data: Out<u64>, count: Out<u64>,
    ) |driver| {
        give_edges([nodes], data, count, &before(&driver, node)?)
    }

    fn cuGraphNodeGetDependentNodes(node: Handle, nodes: Out<Handle>, count: Out<u64>) |driver| {
        give([nodes], count, &behind(&driver, node)?)
    }

    fn cuGraphNodeGetDependentNodes_v2(
        node: Handle, nodes: Out<Handle>, data: Out<u64>, count: Out<u64>,
    ) |driver| {
        give_edges([nodes], data, count, &behind(&driver, node)?)
    }

    fn cuGraphAddDependencies(graph: Handle, from: In<Handle>, to: In<Handle>, n: u64) |driver| {
        let none = In::null();
        driver.change_edges(graph, &list(from, none, n)?, &list(to, none, n)?, true)
    }

    fn cuGraphAddDependencies_v2(
        graph: Handle, from: In<Handle>, to: In<Handle>, data: In<u64>, n: u64,
    ) |driver| {
        driver.change_edges(graph, &list(from, data, n)?, &list(to, data, n)?, true)
    }

    fn cuGraphRemoveDependencies(graph: Handle, from: In<Handle>, to: In<Handle>, n: u64) |driver| {
        let none = In::null();
        driver.change_edges(graph, &list(from, none, n)?, &list(to, none, n)?, false)
    }

    fn cuGraphRemoveDependencies_v2(
        graph: Handle, from: In<Handle>, to: In<Handle>, data: In<u64>, n: u64,
    ) |driver| {
        driver.change_edges(graph, &list(from, data, n)?, &list(to, data, n)?, false)
    }
}
