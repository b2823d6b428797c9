//! Stream capture: work given to a stream becomes nodes of a graph instead of being run.
//!
//! A *sequence* is one capture: it begins in its origin stream and takes in every stream that
//! waits for an event recorded in it (a fork); those must be joined again, by events, before it
//! ends. Each captured stream, and each event recorded in one, stands for the set of nodes that
//! whatever comes next depends on. What could run into a capture ends it: the sequence is
//! invalid from then on, and says so until it is ended.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::thread::ThreadId;

use super::graph::{Graph, list};
use super::operation::Operation;
use super::status::{In, Out, Outcome, Status};
use super::{Driver, GRAPH, Handle, api};
use crate::machine::StreamId;

/// `CU_STREAM_CAPTURE_MODE_GLOBAL`, `THREAD_LOCAL`, `RELAXED`
const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

thread_local! {
    /// How this thread's calls and others' captures get along.
    static MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

struct Sequence {
    origin: StreamId,
    thread: ThreadId,
    mode: u32,
    graph: Handle,
    /// The graph was the caller's before.
    into_existing: bool,
    invalid: bool,
}

struct Captured {
    sequence: u64,
    context: Handle,
    non_blocking: bool,
    tail: Vec<Handle>,
    /// Edge data for whoever asks: all zero.
    edges: Vec<u64>,
}

/// The captures that are going on.
#[derive(Default)]
pub(super) struct Captures {
    sequences: BTreeMap<u64, Sequence>,
    streams: BTreeMap<StreamId, Captured>,
    /// Events last recorded in a captured stream.
    events: BTreeMap<Handle, (u64, Vec<Handle>)>,
    begun: u64,
}

impl Captures {
    fn invalidate(&mut self, number: u64) {
        if let Some(sequence) = self.sequences.get_mut(&number) {
            sequence.invalid = true;
        }
    }

    fn valid(&self, number: u64) -> Outcome {
        match self.sequences.get(&number) {
            Some(sequence) if !sequence.invalid => Ok(()),
            _ => Err(Status::STREAM_CAPTURE_INVALIDATED),
        }
    }

    /// Whether a graph is being captured into.
    pub(super) fn holds(&self, graph: Handle) -> bool {
        self.sequences.values().any(|s| s.graph == graph)
    }

    /// A stream that is destroyed takes its capture with it.
    pub(super) fn forget_stream(&mut self, id: StreamId) {
        if let Some(captured) = self.streams.remove(&id) {
            self.invalidate(captured.sequence);
            if self
                .sequences
                .get(&captured.sequence)
                .is_some_and(|s| s.origin == id)
            {
                self.end(captured.sequence);
            }
        }
    }

    pub(super) fn forget_event(&mut self, event: Handle) {
        self.events.remove(&event);
    }

    fn end(&mut self, number: u64) -> Option<Sequence> {
        self.streams.retain(|_, c| c.sequence != number);
        self.events.retain(|_, e| e.0 != number);
        self.sequences.remove(&number)
    }
}

impl Driver {
    /// Whether a stream is being captured. The legacy default stream never is: to use it while a
    /// stream that it would wait for is captured is an error, and the end of that capture.
    pub(super) fn is_captured(&mut self, stream: Handle) -> Result<bool, Status> {
        let (id, context, _) = self.stream(stream)?;
        if let Some(captured) = self.captures.streams.get(&id) {
            self.captures.valid(captured.sequence)?;
            return Ok(true);
        }
        if id == self.context(context)?.default {
            let waited_for = |c: &&Captured| c.context == context && !c.non_blocking;
            let streams = self.captures.streams.values().filter(waited_for);
            let numbers: Vec<u64> = streams.map(|c| c.sequence).collect();
            for &number in &numbers {
                self.captures.invalidate(number);
            }
            if !numbers.is_empty() {
                return Err(Status::STREAM_CAPTURE_IMPLICIT);
            }
        }
        Ok(false)
    }

    /// Adds an operation to the graph that a stream is capturing.
    pub(super) fn capture(&mut self, stream: Handle, operation: Operation) -> Outcome {
        let (id, context, _) = self.stream(stream)?;
        let captured = self.captures.streams.get(&id);
        let captured = captured.ok_or(Status::ILLEGAL_STATE)?;
        let (number, tail) = (captured.sequence, captured.tail.clone());
        let graph = self.captures.sequences.get(&number);
        let graph = graph.ok_or(Status::ILLEGAL_STATE)?.graph;
        let node = self.add_node(graph, context, &tail, operation)?;
        if let Some(captured) = self.captures.streams.get_mut(&id) {
            captured.tail = vec![node];
        }
        Ok(())
    }

    /// For calls that a captured stream cannot take at all.
    pub(super) fn refuse_captured(&mut self, stream: Handle) -> Outcome {
        if self.is_captured(stream)? {
            let (id, ..) = self.stream(stream)?;
            if let Some(captured) = self.captures.streams.get(&id) {
                self.captures.invalidate(captured.sequence);
            }
            return Err(Status::STREAM_CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }

    /// For calls that concern a whole context.
    pub(super) fn refuse_captured_context(&mut self, context: Handle) -> Outcome {
        let streams = self.captures.streams.values();
        let within = streams.filter(|c| c.context == context);
        let numbers: Vec<u64> = within.map(|c| c.sequence).collect();
        for &number in &numbers {
            self.captures.invalidate(number);
        }
        if numbers.is_empty() {
            Ok(())
        } else {
            Err(Status::STREAM_CAPTURE_UNSUPPORTED)
        }
    }

    /// For calls on an event that a captured event does not allow.
    pub(super) fn refuse_captured_event(&mut self, event: Handle) -> Outcome {
        match self.captures.events.get(&event) {
            Some(&(number, _)) => {
                self.captures.invalidate(number);
                Err(Status::CAPTURED_EVENT)
            }
            None => Ok(()),
        }
    }

    /// For calls that may synchronise on a device (allocation, freeing, queries): what the modes
    /// of the captures and of the thread forbid.
    pub(super) fn potentially_unsafe(&mut self) -> Outcome {
        let mode = MODE.get();
        let me = std::thread::current().id();
        let forbids = |s: &Sequence| match (s.thread == me, mode) {
            (_, RELAXED) => false,
            (true, _) => s.mode != RELAXED,
            (false, mode) => mode == GLOBAL && s.mode == GLOBAL,
        };
        let mut forbidden = false;
        for sequence in self.captures.sequences.values_mut() {
            if forbids(sequence) {
                sequence.invalid = true;
                forbidden = true;
            }
        }
        if forbidden {
            Err(Status::STREAM_CAPTURE_UNSUPPORTED)
        } else {
            Ok(())
        }
    }

    /// `cuEventRecord`: in a captured stream the event stands for the nodes so far. Whether that
    /// is all there is to do.
    pub(super) fn capture_record(&mut self, stream: Handle, event: Handle) -> Result<bool, Status> {
        if !self.is_captured(stream)? {
            self.captures.events.remove(&event);
            return Ok(false);
        }
        let (id, ..) = self.stream(stream)?;
        if let Some(captured) = self.captures.streams.get(&id) {
            let point = (captured.sequence, captured.tail.clone());
            self.captures.events.insert(event, point);
        }
        Ok(true)
    }

    /// `cuStreamWaitEvent`: joins, forks, or neither. Whether that is all there is to do.
    pub(super) fn capture_wait(&mut self, stream: Handle, event: Handle) -> Result<bool, Status> {
        let point = self.captures.events.get(&event).cloned();
        let (id, context, non_blocking) = self.stream(stream)?;
        let captured = self.is_captured(stream)?;
        let Some((number, tail)) = point else {
            if !captured {
                return Ok(false);
            }
            let known = self.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
            if !self.machine.event_recorded(known.id) {
                return Ok(true);
            }
            // Work outside of the capture cannot be waited for inside.
            if let Some(captured) = self.captures.streams.get(&id) {
                self.captures.invalidate(captured.sequence);
            }
            return Err(Status::STREAM_CAPTURE_ISOLATION);
        };
        self.captures.valid(number)?;
        if id == self.context(context)?.default {
            self.captures.invalidate(number);
            return Err(Status::STREAM_CAPTURE_IMPLICIT);
        }
        let fresh = Captured {
            sequence: number,
            context,
            non_blocking,
            tail: Vec::new(),
            edges: Vec::new(),
        };
        let joined = self.captures.streams.entry(id).or_insert(fresh);
        if joined.sequence != number {
            let other = joined.sequence;
            self.captures.invalidate(other);
            self.captures.invalidate(number);
            return Err(Status::STREAM_CAPTURE_MERGE);
        }
        for node in tail {
            if !joined.tail.contains(&node) {
                joined.tail.push(node);
            }
        }
        Ok(true)
    }

    fn begin(&mut self, stream: Handle, mode: u32, into: Option<(Handle, Vec<Handle>)>) -> Outcome {
        let (id, context, non_blocking) = self.stream(stream)?;
        self.check(self.context(context)?.device)?;
        if mode > RELAXED {
            return Err(Status::INVALID_VALUE);
        }
        if id == self.context(context)?.default {
            return Err(Status::STREAM_CAPTURE_UNSUPPORTED);
        }
        if self.captures.streams.contains_key(&id) {
            return Err(Status::ILLEGAL_STATE);
        }
        let into_existing = into.is_some();
        let (graph, tail) = match into {
            Some((graph, tail)) => {
                let nodes = &self.graph(graph)?.nodes;
                if tail.iter().any(|node| !nodes.contains_key(node)) {
                    return Err(Status::INVALID_VALUE);
                }
                (graph, tail)
            }
            None => {
                let graph = self.handle(GRAPH);
                self.graphs.graphs.insert(graph, Graph::default());
                (graph, Vec::new())
            }
        };
        self.captures.begun += 1;
        let sequence = Sequence {
            origin: id,
            thread: std::thread::current().id(),
            mode,
            graph,
            into_existing,
            invalid: false,
        };
        self.captures
            .sequences
            .insert(self.captures.begun, sequence);
        let captured = Captured {
            sequence: self.captures.begun,
            context,
            non_blocking,
            tail,
            edges: Vec::new(),
        };
        self.captures.streams.insert(id, captured);
        Ok(())
    }

    fn end_capture(&mut self, stream: Handle) -> Result<Handle, Status> {
        let (id, ..) = self.stream(stream)?;
        let captured = self.captures.streams.get(&id);
        let number = captured.ok_or(Status::ILLEGAL_STATE)?.sequence;
        let sequence = self.captures.sequences.get(&number);
        let sequence = sequence.ok_or(Status::ILLEGAL_STATE)?;
        if sequence.origin != id {
            return Err(Status::STREAM_CAPTURE_UNMATCHED);
        }
        if sequence.mode != RELAXED && sequence.thread != std::thread::current().id() {
            return Err(Status::STREAM_CAPTURE_WRONG_THREAD);
        }
        let joined = self.is_joined(number, id, sequence.graph)?;
        let sequence = self.captures.end(number).ok_or(Status::ILLEGAL_STATE)?;
        let outcome = if sequence.invalid {
            Err(Status::STREAM_CAPTURE_INVALIDATED)
        } else if !joined {
            Err(Status::STREAM_CAPTURE_UNJOINED)
        } else {
            Ok(sequence.graph)
        };
        if outcome.is_err() && !sequence.into_existing {
            self.graphs.graphs.remove(&sequence.graph);
        }
        outcome
    }

    /// Whether all that other streams captured comes before the end of the origin.
    fn is_joined(&self, number: u64, origin: StreamId, graph: Handle) -> Result<bool, Status> {
        let nodes = &self.graph(graph)?.nodes;
        let mut before = BTreeSet::new();
        let mut next: Vec<Handle> = Vec::new();
        for (&id, captured) in &self.captures.streams {
            if id == origin {
                next.extend(&captured.tail);
            }
        }
        while let Some(node) = next.pop() {
            if before.insert(node)
                && let Some(node) = nodes.get(&node)
            {
                next.extend(&node.after);
            }
        }
        let streams = self.captures.streams.values();
        let mut tails = streams
            .filter(|c| c.sequence == number)
            .flat_map(|c| &c.tail);
        // Nodes that were removed from the graph by hand need no joining.
        Ok(tails.all(|node| before.contains(node) || !nodes.contains_key(node)))
    }

    /// 0, 1 and 2: not captured, captured, invalidated; and the capture.
    fn capture_status(&mut self, stream: Handle) -> Result<(u32, Option<u64>), Status> {
        match self.is_captured(stream) {
            Ok(false) => Ok((0, None)),
            Ok(true) => {
                let (id, ..) = self.stream(stream)?;
                Ok((1, self.captures.streams.get(&id).map(|c| c.sequence)))
            }
            Err(Status::STREAM_CAPTURE_INVALIDATED) => Ok((2, None)),
            Err(status) => Err(status),
        }
    }

    fn update_dependencies(&mut self, stream: Handle, nodes: &[Handle], flags: u32) -> Outcome {
        if flags > 1 {
            return Err(Status::INVALID_VALUE);
        }
        if !self.is_captured(stream)? {
            return Err(Status::ILLEGAL_STATE);
        }
        let (id, ..) = self.stream(stream)?;
        let captured = self.captures.streams.get(&id);
        let number = captured.ok_or(Status::ILLEGAL_STATE)?.sequence;
        let sequence = self.captures.sequences.get(&number);
        let graph = self.graph(sequence.ok_or(Status::ILLEGAL_STATE)?.graph)?;
        if nodes.iter().any(|node| !graph.nodes.contains_key(node)) {
            return Err(Status::INVALID_VALUE);
        }
        if let Some(captured) = self.captures.streams.get_mut(&id) {
            if flags == 1 {
                captured.tail.clear();
            }
            for node in nodes {
                if !captured.tail.contains(node) {
                    captured.tail.push(*node);
                }
            }
        }
        Ok(())
    }
}

/// Where `cuStreamGetCaptureInfo` puts what it knows.
struct Info {
    status: Out<u32>,
    id: Out<u64>,
    graph: Out<Handle>,
    dependencies: Out<u64>,
    edges: Out<u64>,
    count: Out<u64>,
}

fn info(driver: &mut Driver, stream: Handle, out: Info) -> Outcome {
    let (status, number) = driver.capture_status(stream)?;
    out.status.set(status)?;
    let Some(number) = number else {
        return Ok(());
    };
    let (id, ..) = driver.stream(stream)?;
    out.id.set_if_wanted(number);
    if let Some(sequence) = driver.captures.sequences.get(&number) {
        out.graph.set_if_wanted(sequence.graph);
    }
    if let Some(captured) = driver.captures.streams.get_mut(&id) {
        captured.edges = vec![0; captured.tail.len()];
        out.dependencies
            .set_if_wanted(captured.tail.as_ptr() as u64);
        out.edges.set_if_wanted(captured.edges.as_ptr() as u64);
        out.count.set_if_wanted(captured.tail.len() as u64);
    }
    Ok(())
}

api! {
    // The form of CUDA 10.0 knows one mode.
    fn cuStreamBeginCapture(stream: Handle) |driver| {
        driver.begin(stream, GLOBAL, None)
    }

    fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) |driver| {
        driver.begin(stream, mode, None)
    }

    fn cuStreamBeginCaptureToGraph(
        stream: Handle, graph: Handle, nodes: In<Handle>, edges: In<u64>, n: u64, mode: u32,
    ) |driver| {
        let nodes = list(nodes, edges, n)?;
        driver.begin(stream, mode, Some((graph, nodes)))
    }

    fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) |driver| {
        let ended = driver.end_capture(stream);
        graph.set(*ended.as_ref().unwrap_or(&0))?;
        ended.map(|_| ())
    }

    fn cuStreamIsCapturing(stream: Handle, status: Out<u32>) |driver| {
        let (found, _) = driver.capture_status(stream)?;
        status.set(found)
    }

    fn cuStreamGetCaptureInfo(stream: Handle, status: Out<u32>, id: Out<u64>) |driver| {
        let out = Info {
            status,
            id,
            graph: Out::null(),
            dependencies: Out::null(),
            edges: Out::null(),
            count: Out::null(),
        };
        info(&mut driver, stream, out)
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: Handle, status: Out<u32>, id: Out<u64>, graph: Out<Handle>,
        dependencies: Out<u64>, count: Out<u64>,
    ) |driver| {
        let edges = Out::null();
        let out = Info { status, id, graph, dependencies, edges, count };
        info(&mut driver, stream, out)
    }

    fn cuStreamGetCaptureInfo_v3(
        stream: Handle, status: Out<u32>, id: Out<u64>, graph: Out<Handle>,
        dependencies: Out<u64>, edges: Out<u64>, count: Out<u64>,
    ) |driver| {
        let out = Info { status, id, graph, dependencies, edges, count };
        info(&mut driver, stream, out)
    }

    fn cuStreamUpdateCaptureDependencies(stream: Handle, nodes: In<Handle>, n: u64, flags: u32) |driver| {
        let nodes = list(nodes, In::null(), n)?;
        driver.update_dependencies(stream, &nodes, flags)
    }

    fn cuStreamUpdateCaptureDependencies_v2(
        stream: Handle, nodes: In<Handle>, edges: In<u64>, n: u64, flags: u32,
    ) |driver| {
        let nodes = list(nodes, edges, n)?;
        driver.update_dependencies(stream, &nodes, flags)
    }

    fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) |_driver| {
        let wanted = mode.get()?;
        if wanted > RELAXED {
            return Err(Status::INVALID_VALUE);
        }
        mode.set(MODE.replace(wanted))
    }
}
