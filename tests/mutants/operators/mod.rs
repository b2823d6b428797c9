//! What may be wrong with an instruction: a file for each kind of fault.

pub(crate) mod barrier;
pub(crate) mod compare;
pub(crate) mod masks;
pub(crate) mod operands;
pub(crate) mod order;
pub(crate) mod scope;

use crate::listing::{Kernel, Statement};

/// What is written instead of a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// `acquire -> relaxed`, `dropped`
    pub(crate) name: String,
    /// The statement with the fault, without guard and semicolon; empty if it is dropped.
    pub(crate) text: String,
}

/// The faults of one kind in a kernel, by the index of the statement.
pub(crate) type Operator = fn(&Kernel) -> Vec<(usize, Fault)>;

fn dropped() -> Fault {
    Fault {
        name: "dropped".into(),
        text: String::new(),
    }
}

/// For each statement, what `faults` makes of it.
fn each(kernel: &Kernel, faults: impl Fn(&Statement) -> Vec<Fault>) -> Vec<(usize, Fault)> {
    let code = kernel.code.iter().enumerate();
    code.flat_map(|(index, statement)| {
        faults(statement)
            .into_iter()
            .map(move |fault| (index, fault))
    })
    .collect()
}

/// The statement with parts of its opcode replaced by others, or left out (`None`).
fn with_parts(statement: &Statement, change: impl Fn(&str) -> Option<String>) -> String {
    let opcode = statement.opcode();
    let parts: Vec<String> = opcode.split('.').filter_map(change).collect();
    format!("{}{}", parts.join("."), &statement.text[opcode.len()..])
}

/// The fault `from -> to` in the opcode.
fn replaced(statement: &Statement, from: &str, to: &str) -> Fault {
    Fault {
        name: format!("{from} -> {to}"),
        text: with_parts(statement, |part| {
            Some(if part == from { to } else { part }.to_owned())
        }),
    }
}
