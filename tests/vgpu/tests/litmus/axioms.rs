//! The PTX memory model as its axioms state it (PTX ISA, "Memory Consistency Model"; D. Lustig,
//! S. Sahasrabuddhe, O. Giroux, "A Formal Analysis of the NVIDIA PTX Memory Consistency Model",
//! ASPLOS 2019), for programs so small that every candidate execution can be tried: which write
//! each read takes its value from, the coherence order of each word's writes, the order of the
//! `fence.sc`. It shares nothing with the virtual GPU but the form of a test.
//!
//! Coherence order is taken to be total for each word, where PTX leaves racing writes unordered:
//! that forbids more, so that who keeps to it keeps to PTX.

use std::collections::BTreeSet;

use vgpu::litmus::{Location, Op, Placement, State, Test, Value};
use vgpu::memory::{Order, Scope};

/// What PTX allows a program to come to.
#[derive(Debug, Default)]
pub(crate) struct Allowed {
    pub(crate) states: BTreeSet<State>,
    /// Those that some execution reaches in which no read takes its value from a write that
    /// comes, by program order and other reads, after it: without load buffering.
    pub(crate) in_order: BTreeSet<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Fence,
}

#[derive(Debug, Clone, Copy)]
struct Event {
    /// None for the writes that were there at first.
    thread: Option<usize>,
    /// Place in its thread: the halves of an atomic operation share one.
    place: usize,
    kind: Kind,
    order: Order,
    /// None for weak accesses.
    scope: Option<Scope>,
    location: Option<Location>,
    /// The other half of an atomic operation.
    partner: Option<usize>,
    /// The register that a read fills.
    register: Option<u32>,
    /// What a write puts there: the number, plus what its partner has read for an addition.
    number: u64,
    adds: bool,
}

/// A relation on events: row `a` has bit `b` if a is related to b.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Relation(Vec<u32>);

impl Relation {
    fn new(n: usize) -> Self {
        Self(vec![0; n])
    }

    fn add(&mut self, a: usize, b: usize) {
        self.0[a] |= 1 << b;
    }

    fn has(&self, a: usize, b: usize) -> bool {
        self.0[a] >> b & 1 != 0
    }

    fn union(mut self, other: &Self) -> Self {
        for (a, b) in self.0.iter_mut().zip(&other.0) {
            *a |= b;
        }
        self
    }

    /// First this, then the other.
    fn then(&self, other: &Self) -> Self {
        let rows = self.0.iter().map(|&row| {
            (0..other.0.len())
                .filter(|&b| row >> b & 1 != 0)
                .fold(0, |all, b| all | other.0[b])
        });
        Self(rows.collect())
    }

    fn closure(mut self) -> Self {
        for k in 0..self.0.len() {
            let row = self.0[k];
            for a in 0..self.0.len() {
                if self.0[a] >> k & 1 != 0 {
                    self.0[a] |= row;
                }
            }
        }
        self
    }

    fn is_irreflexive(&self) -> bool {
        (0..self.0.len()).all(|a| !self.has(a, a))
    }

    fn is_acyclic(&self) -> bool {
        self.clone().closure().is_irreflexive()
    }
}

struct Model<'a> {
    test: &'a Test,
    places: Vec<Placement>,
    events: Vec<Event>,
    program_order: Relation,
    /// Of events that are related in program order, or strong with scopes that include each
    /// other; and access the same word, if they access any.
    morally_strong: Relation,
}

fn acquires(order: Order) -> bool {
    matches!(order, Order::Acquire | Order::AcqRel | Order::SeqCst)
}

fn releases(order: Order) -> bool {
    matches!(order, Order::Release | Order::AcqRel | Order::SeqCst)
}

/// All that PTX allows a program without guards, vectors and barriers to come to.
pub(crate) fn allowed(test: &Test) -> Allowed {
    let model = Model::new(test);
    let mut allowed = Allowed::default();
    model.choose_reads(&mut allowed);
    allowed
}

impl<'a> Model<'a> {
    fn new(test: &'a Test) -> Self {
        let mut events = Vec::new();
        let start = Event {
            thread: None,
            place: 0,
            kind: Kind::Write,
            order: Order::Weak,
            scope: None,
            location: None,
            partner: None,
            register: None,
            number: 0,
            adds: false,
        };
        for (variable, v) in test.variables.iter().enumerate() {
            for element in 0..v.count {
                events.push(Event {
                    location: Some(Location { variable, element }),
                    number: v.initial,
                    ..start
                });
            }
        }
        let number = |value: &Value| match value {
            Value::Number(number) => *number,
            Value::Register(_) => panic!("stores of registers are not modelled here"),
        };
        for (thread, program) in test.threads.iter().enumerate() {
            for (place, statement) in program.program.iter().enumerate() {
                assert!(statement.guard.is_none(), "guards are not modelled here");
                let of = |order: Order, scope: Scope| Event {
                    thread: Some(thread),
                    place,
                    order,
                    scope: (order != Order::Weak).then_some(scope),
                    ..start
                };
                match &statement.op {
                    Op::Load {
                        order,
                        scope,
                        to,
                        from,
                    } => events.push(Event {
                        kind: Kind::Read,
                        location: Some(*from),
                        register: Some(to[0]),
                        ..of(*order, *scope)
                    }),
                    Op::Store {
                        order,
                        scope,
                        to,
                        values,
                    } => events.push(Event {
                        location: Some(*to),
                        number: number(&values[0]),
                        ..of(*order, *scope)
                    }),
                    Op::Atomic {
                        order,
                        scope,
                        update,
                        to,
                        at,
                        operands,
                    } => {
                        let n = events.len();
                        let one = Event {
                            location: Some(*at),
                            ..of(*order, *scope)
                        };
                        events.push(Event {
                            kind: Kind::Read,
                            partner: Some(n + 1),
                            register: *to,
                            ..one
                        });
                        events.push(Event {
                            partner: Some(n),
                            number: number(&operands[0]),
                            adds: match update.as_str() {
                                "add" => true,
                                "exch" => false,
                                other => panic!("'{other}' is not modelled here"),
                            },
                            ..one
                        });
                    }
                    Op::Fence { order, scope } => events.push(Event {
                        kind: Kind::Fence,
                        ..of(*order, *scope)
                    }),
                    Op::Barrier { .. } => panic!("barriers are not modelled here"),
                }
            }
        }
        assert!(events.len() <= 32, "the program is too large");
        let mut model = Self {
            test,
            places: test.threads.iter().map(|t| t.at).collect(),
            program_order: Relation::new(events.len()),
            morally_strong: Relation::new(events.len()),
            events,
        };
        for a in 0..model.events.len() {
            for b in 0..model.events.len() {
                let (x, y) = (model.events[a], model.events[b]);
                let before = match (x.thread, y.thread) {
                    (None, Some(_)) => true,
                    (one, other) => one == other && one.is_some() && x.place < y.place,
                };
                let halves = x.partner == Some(b) && x.kind == Kind::Read;
                if before || halves {
                    model.program_order.add(a, b);
                }
            }
        }
        for a in 0..model.events.len() {
            for b in 0..model.events.len() {
                if a != b && model.are_morally_strong(a, b) {
                    model.morally_strong.add(a, b);
                }
            }
        }
        model
    }

    fn includes(&self, scope: Scope, one: usize, other: usize) -> bool {
        let (a, b) = (self.places[one], self.places[other]);
        match scope {
            Scope::Cta | Scope::Cluster => (a.device, a.block) == (b.device, b.block),
            Scope::Gpu => a.device == b.device,
            Scope::Sys => true,
        }
    }

    fn are_morally_strong(&self, a: usize, b: usize) -> bool {
        let (x, y) = (self.events[a], self.events[b]);
        if x.location.is_some() && y.location.is_some() && x.location != y.location {
            return false;
        }
        if self.program_order.has(a, b) || self.program_order.has(b, a) {
            return true;
        }
        match (x.scope, y.scope, x.thread, y.thread) {
            (Some(s), Some(t), Some(one), Some(other)) => {
                self.includes(s, one, other) && self.includes(t, other, one)
            }
            _ => false,
        }
    }

    /// Tries every write for every read.
    fn choose_reads(&self, allowed: &mut Allowed) {
        let reads: Vec<usize> = (0..self.events.len())
            .filter(|&e| self.events[e].kind == Kind::Read)
            .collect();
        let choices: Vec<Vec<usize>> = reads
            .iter()
            .map(|&r| {
                let writes = 0..self.events.len();
                writes
                    .filter(|&w| {
                        let (read, write) = (self.events[r], self.events[w]);
                        write.kind == Kind::Write
                            && write.location == read.location
                            // Nothing reads what its own thread writes later.
                            && !self.program_order.has(r, w)
                    })
                    .collect()
            })
            .collect();
        let mut picks = vec![0; reads.len()];
        loop {
            let mut from = vec![None; self.events.len()];
            for (read, (pick, choice)) in reads.iter().zip(picks.iter().zip(&choices)) {
                from[*read] = Some(choice[*pick]);
            }
            self.choose_coherence(&from, allowed);
            // The next combination.
            let mut at = 0;
            loop {
                if at == picks.len() {
                    return;
                }
                picks[at] += 1;
                if picks[at] < choices[at].len() {
                    break;
                }
                picks[at] = 0;
                at += 1;
            }
        }
    }

    /// The values of all events; None if they depend on themselves.
    fn values(&self, from: &[Option<usize>]) -> Option<Vec<u64>> {
        let mut values: Vec<Option<u64>> = vec![None; self.events.len()];
        for _ in 0..=self.events.len() {
            for (e, event) in self.events.iter().enumerate() {
                values[e] = match event.kind {
                    Kind::Fence => Some(0),
                    Kind::Read => from[e].and_then(|w| values[w]),
                    Kind::Write if event.adds => event
                        .partner
                        .and_then(|r| values[r])
                        .map(|read| (read + event.number) & 0xffff_ffff),
                    Kind::Write => Some(event.number),
                };
            }
        }
        values.into_iter().collect()
    }

    fn choose_coherence(&self, from: &[Option<usize>], allowed: &mut Allowed) {
        let Some(values) = self.values(from) else {
            return;
        };
        let mut orders: Vec<Vec<Vec<usize>>> = Vec::new();
        for (start, event) in self.events.iter().enumerate() {
            if event.thread.is_some() {
                break;
            }
            let others: Vec<usize> = (start + 1..self.events.len())
                .filter(|&w| {
                    let e = self.events[w];
                    e.kind == Kind::Write && e.thread.is_some() && e.location == event.location
                })
                .collect();
            let mut all = Vec::new();
            permutations(&others, &mut vec![start], &mut all);
            orders.push(all);
        }
        let mut picks = vec![0; orders.len()];
        loop {
            let chosen: Vec<&Vec<usize>> = orders.iter().zip(&picks).map(|(o, &p)| &o[p]).collect();
            self.judge(from, &values, &chosen, allowed);
            let mut at = 0;
            loop {
                if at == picks.len() {
                    return;
                }
                picks[at] += 1;
                if picks[at] < orders[at].len() {
                    break;
                }
                picks[at] = 0;
                at += 1;
            }
        }
    }

    fn state(&self, values: &[u64], coherence: &[&Vec<usize>]) -> State {
        let mut state = State {
            registers: vec![Vec::new(); self.test.threads.len()],
            memory: Vec::new(),
        };
        for (e, event) in self.events.iter().enumerate() {
            if let (Some(thread), Some(register)) = (event.thread, event.register) {
                let registers = &mut state.registers[thread];
                let at = register as usize;
                registers.resize(registers.len().max(at + 1), 0);
                registers[at] = values[e];
            }
        }
        let mut last = coherence
            .iter()
            .map(|order| values[*order.last().expect("a first write")]);
        for variable in &self.test.variables {
            state
                .memory
                .push(last.by_ref().take(variable.count as usize).collect());
        }
        state
    }

    fn judge(
        &self,
        from: &[Option<usize>],
        values: &[u64],
        coherence: &[&Vec<usize>],
        allowed: &mut Allowed,
    ) {
        let state = self.state(values, coherence);
        if allowed.in_order.contains(&state) {
            return;
        }
        let n = self.events.len();
        let mut reads_from = Relation::new(n);
        let mut order = Relation::new(n);
        for (read, write) in from.iter().enumerate() {
            if let Some(write) = write {
                reads_from.add(*write, read);
            }
        }
        for writes in coherence {
            for (i, &a) in writes.iter().enumerate() {
                writes[i + 1..].iter().for_each(|&b| order.add(a, b));
            }
        }
        let mut from_reads = Relation::new(n);
        for (read, write) in from.iter().enumerate() {
            if let Some(write) = write {
                from_reads.0[read] = order.0[*write] & !(1 << read);
            }
        }
        let in_order = reads_from.clone().union(&self.program_order).is_acyclic();
        if allowed.states.contains(&state) && !in_order {
            return;
        }
        if !self.atomic(&from_reads, &order)
            || !self.coherent_by_location(&reads_from, &order, &from_reads)
            || !self.out_of_thin_air(&reads_from)
        {
            return;
        }
        let observation = self.observation(&reads_from);
        let fences: Vec<usize> = (0..n)
            .filter(|&e| {
                self.events[e].kind == Kind::Fence && self.events[e].order == Order::SeqCst
            })
            .collect();
        let mut orders = Vec::new();
        permutations(&fences, &mut Vec::new(), &mut orders);
        let possible = orders.iter().any(|fences| {
            let mut fence_order = Relation::new(n);
            for (i, &a) in fences.iter().enumerate() {
                for &b in &fences[i + 1..] {
                    if self.morally_strong.has(a, b) {
                        fence_order.add(a, b);
                    }
                }
            }
            let synchronizes = self.synchronizes(&observation).union(&fence_order);
            let base = self.program_order.clone().union(&synchronizes).closure();
            let cause = base.clone().union(&observation.then(&base));
            // Coherence, Fence-SC, Causality.
            order.then(&cause).is_irreflexive()
                && fence_order.then(&cause).is_irreflexive()
                && reads_from.then(&cause).is_irreflexive()
                && from_reads.then(&cause).is_irreflexive()
        });
        if possible {
            if in_order {
                allowed.in_order.insert(state.clone());
            }
            allowed.states.insert(state);
        }
    }

    /// Nothing morally strong comes between what an atomic operation reads and what it writes.
    fn atomic(&self, from_reads: &Relation, order: &Relation) -> bool {
        let n = self.events.len();
        (0..n).all(|read| {
            let (event, Some(write)) = (self.events[read], self.events[read].partner) else {
                return true;
            };
            event.kind != Kind::Read
                || (0..n).all(|other| {
                    let between = from_reads.has(read, other) && order.has(other, write);
                    !between || !self.morally_strong.has(other, write)
                })
        })
    }

    /// SC per location: among morally strong operations communication does not contradict
    /// program order.
    fn coherent_by_location(
        &self,
        reads_from: &Relation,
        order: &Relation,
        from_reads: &Relation,
    ) -> bool {
        let n = self.events.len();
        let mut all = reads_from.clone().union(order).union(from_reads);
        for a in 0..n {
            all.0[a] &= self.morally_strong.0[a];
            for b in 0..n {
                let same = self.events[a].location == self.events[b].location;
                if same && self.events[a].location.is_some() && self.program_order.has(a, b) {
                    all.add(a, b);
                }
            }
        }
        all.is_acyclic()
    }

    fn out_of_thin_air(&self, reads_from: &Relation) -> bool {
        let mut all = reads_from.clone();
        for (e, event) in self.events.iter().enumerate() {
            if let (Kind::Read, Some(write)) = (event.kind, event.partner) {
                all.add(e, write);
            }
        }
        all.is_acyclic()
    }

    /// Writes to the reads that observe them, through atomic operations.
    fn observation(&self, reads_from: &Relation) -> Relation {
        let n = self.events.len();
        let mut strong = reads_from.clone();
        for a in 0..n {
            strong.0[a] &= self.morally_strong.0[a];
        }
        let mut all = strong.clone();
        let mut halves = Relation::new(n);
        for (e, event) in self.events.iter().enumerate() {
            if let (Kind::Read, Some(write)) = (event.kind, event.partner) {
                halves.add(e, write);
            }
        }
        for _ in 0..n {
            let longer = all.then(&halves).then(&strong);
            all = all.union(&longer);
        }
        all
    }

    /// Release patterns with the acquire patterns that they synchronise with: the first
    /// operation of the one with the last of the other.
    fn synchronizes(&self, observation: &Relation) -> Relation {
        let n = self.events.len();
        // The two halves of an atomic operation are one operation: its write, which comes second,
        // stands for it where a pattern begins, its read where one ends.
        let mut heads: Vec<(usize, usize)> = Vec::new();
        let mut tails: Vec<(usize, usize)> = Vec::new();
        for e in 0..n {
            let event = self.events[e];
            let strong = event.scope.is_some();
            if event.kind == Kind::Write && strong {
                if releases(event.order) {
                    heads.push((e, e));
                }
                for first in 0..n {
                    let f = self.events[first];
                    let pattern = f.kind == Kind::Fence
                        || (f.kind == Kind::Write && f.location == event.location);
                    let before = f.thread == event.thread && f.place < event.place;
                    if pattern && before && releases(f.order) {
                        heads.push((first, e));
                    }
                }
            }
            if event.kind == Kind::Read && strong {
                if acquires(event.order) {
                    tails.push((e, e));
                }
                for last in 0..n {
                    let l = self.events[last];
                    let pattern = l.kind == Kind::Fence
                        || (l.kind == Kind::Read && l.location == event.location);
                    let after = l.thread == event.thread && l.place > event.place;
                    if pattern && after && acquires(l.order) {
                        tails.push((e, last));
                    }
                }
            }
        }
        let mut all = Relation::new(n);
        for &(first, write) in &heads {
            for &(read, last) in &tails {
                if !observation.has(write, read) || !self.synchronizing(first, last) {
                    continue;
                }
                all.add(first, last);
            }
        }
        all
    }

    /// Whether the first operation of a release pattern and the last of an acquire pattern are
    /// morally strong: they need not access the same word.
    fn synchronizing(&self, first: usize, last: usize) -> bool {
        let (x, y) = (self.events[first], self.events[last]);
        let (Some(one), Some(other)) = (x.thread, y.thread) else {
            return false;
        };
        if one == other {
            return true;
        }
        match (x.scope, y.scope) {
            (Some(s), Some(t)) => self.includes(s, one, other) && self.includes(t, other, one),
            _ => false,
        }
    }
}

fn permutations(rest: &[usize], taken: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
    if rest.is_empty() {
        all.push(taken.clone());
        return;
    }
    for i in 0..rest.len() {
        let mut left = rest.to_vec();
        taken.push(left.remove(i));
        permutations(&left, taken, all);
        taken.pop();
    }
}
