//! What stands before what, on all ways through a kernel.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Kernel, Statement};

/// For each statement a set of events, or of none: see [`last_before`] and [`next_after`].
pub(crate) struct Events<E> {
    /// The events by number; the first is none.
    events: Vec<Option<E>>,
    /// A bit for each.
    sets: Vec<Vec<u64>>,
}

impl<E: Ord + Clone> Events<E> {
    /// The set of a statement: empty if no way leads there.
    pub(crate) fn at(&self, index: usize) -> BTreeSet<Option<E>> {
        let set = &self.sets[index];
        let numbers = (0..self.events.len()).filter(|n| set[n / 64] >> (n % 64) & 1 != 0);
        numbers.map(|n| self.events[n].clone()).collect()
    }
}

/// For each statement, the events that may be the last one before it; `None` stands for the
/// kernel's start. `event` names those statements that are events, by their index.
pub(crate) fn last_before<E: Ord + Clone>(
    kernel: &Kernel,
    event: impl Fn(usize) -> Option<E>,
) -> Events<E> {
    let starts = (!kernel.code.is_empty()).then_some(0);
    spread(kernel, &kernel.next, starts.into_iter().collect(), event)
}

/// For each statement, the events that may be the next one after it; `None` stands for the
/// kernel's end.
pub(crate) fn next_after<E: Ord + Clone>(
    kernel: &Kernel,
    event: impl Fn(usize) -> Option<E>,
) -> Events<E> {
    let count = kernel.code.len();
    let mut previous = vec![BTreeSet::new(); count];
    for (at, next) in kernel.next.iter().enumerate() {
        for &next in next {
            previous[next].insert(at);
        }
    }
    // A guarded end may be passed by.
    let ends = |at: &usize| {
        matches!(
            kernel.code[*at].name(),
            "ret" | "exit" | "trap" | "EXIT" | "RET"
        ) || kernel.next[*at].is_empty()
    };
    spread(kernel, &previous, (0..count).filter(ends).collect(), event)
}

/// Hands events on along `next`, from the statements where there is none yet.
fn spread<E: Ord + Clone>(
    kernel: &Kernel,
    next: &[BTreeSet<usize>],
    none: Vec<usize>,
    event: impl Fn(usize) -> Option<E>,
) -> Events<E> {
    let named: Vec<Option<E>> = (0..kernel.code.len()).map(event).collect();
    let distinct: BTreeSet<E> = named.iter().flatten().cloned().collect();
    let events: Vec<Option<E>> = std::iter::once(None)
        .chain(distinct.into_iter().map(Some))
        .collect();
    let number = |e: &Option<E>| events.binary_search(e).expect("it is one of them");
    let own: Vec<Option<usize>> = named
        .iter()
        .map(|e| e.is_some().then(|| number(e)))
        .collect();
    let words = events.len().div_ceil(64);
    let mut sets = vec![vec![0u64; words]; kernel.code.len()];
    let mut work: VecDeque<usize> = VecDeque::new();
    for at in none {
        sets[at][0] |= 1;
        work.push_back(at);
    }
    work.extend((0..kernel.code.len()).filter(|&at| own[at].is_some()));
    while let Some(at) = work.pop_front() {
        let after = match own[at] {
            Some(number) => {
                let mut set = vec![0u64; words];
                set[number / 64] |= 1 << (number % 64);
                set
            }
            None => sets[at].clone(),
        };
        for &to in &next[at] {
            let mut grew = false;
            for (word, more) in sets[to].iter_mut().zip(&after) {
                grew |= *more & !*word != 0;
                *word |= more;
            }
            if grew && own[to].is_none() {
                work.push_back(to);
            }
        }
    }
    Events { events, sets }
}

/// The statements that a way leads to from `from` (not itself, unless in a circle) without
/// passing one that `stops`; those that stop are among them.
pub(crate) fn reached(
    kernel: &Kernel,
    from: usize,
    stops: impl Fn(&Statement) -> bool,
) -> BTreeSet<usize> {
    let mut seen = BTreeSet::new();
    let mut work: Vec<usize> = kernel.next[from].iter().copied().collect();
    while let Some(at) = work.pop() {
        if seen.insert(at) && !stops(&kernel.code[at]) {
            work.extend(&kernel.next[at]);
        }
    }
    seen
}

/// Registers whose value comes from where `source` says, by way of arithmetic: not through memory.
pub(crate) fn derived(kernel: &Kernel, source: impl Fn(&Statement) -> bool) -> BTreeSet<String> {
    let mut tainted: BTreeSet<String> = BTreeSet::new();
    let mut uses: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut work = Vec::new();
    for (index, statement) in kernel.code.iter().enumerate() {
        for register in reads(statement) {
            uses.entry(register).or_default().push(index);
        }
        if source(statement) {
            work.extend(writes(statement));
        }
    }
    while let Some(register) = work.pop() {
        if !tainted.insert(register.clone()) {
            continue;
        }
        for &index in uses.get(&register).into_iter().flatten() {
            if !matches!(
                kernel.code[index].name(),
                "ld" | "st" | "atom" | "red" | "bra"
            ) {
                work.extend(writes(&kernel.code[index]));
            }
        }
    }
    tainted
}

/// The registers in a part of a statement: `%rd12`, and `%p1 of 3` if it is of an inner scope.
fn registers(statement: &Statement, text: &str) -> Vec<String> {
    let words = text.split(|c: char| !(c.is_alphanumeric() || c == '%' || c == '_'));
    let (scope, inner) = &statement.scope;
    words
        .filter(|word| word.starts_with('%'))
        .map(|word| match inner.iter().any(|name| name == word) {
            true => format!("{word} of {scope}"),
            false => word.to_owned(),
        })
        .collect()
}

fn has_result(statement: &Statement) -> bool {
    let none = [
        "st",
        "red",
        "bra",
        "membar",
        "fence",
        "ret",
        "exit",
        "nanosleep",
    ];
    let barrier = statement.name().starts_with("bar");
    !none.contains(&statement.name()) && (!barrier || statement.has("red"))
}

/// The registers that a statement of PTX writes.
pub(crate) fn writes(statement: &Statement) -> Vec<String> {
    match super::operands(&statement.text).first() {
        Some(first) if has_result(statement) => registers(statement, first),
        _ => Vec::new(),
    }
}

/// The registers that it reads.
pub(crate) fn reads(statement: &Statement) -> Vec<String> {
    let all = super::operands(&statement.text);
    let skip = usize::from(has_result(statement));
    let guard = statement.guard.as_deref().unwrap_or_default();
    all.into_iter()
        .skip(skip)
        .chain([guard])
        .flat_map(|part| registers(statement, part))
        .collect()
}
