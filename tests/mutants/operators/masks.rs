//! Masks: the lanes that take part, the bits that are kept, and the lanes and words of exchanges
//! and permutations.

use super::{Fault, each};
use crate::listing::{Kernel, Statement, operands};

/// See the module.
pub(crate) fn narrowed(kernel: &Kernel) -> Vec<(usize, Fault)> {
    each(kernel, |statement| match statement.name() {
        // Of all lanes, half.
        "shfl" | "vote" | "match" | "redux" => halved(statement),
        "and" | "bfe" | "bfi" | "prmt" => halved(statement),
        _ => Vec::new(),
    })
}

/// The last operand, a constant, with half of its bits.
fn halved(statement: &Statement) -> Vec<Fault> {
    let mut operands = operands(&statement.text);
    let Some(last) = operands.last_mut() else {
        return Vec::new();
    };
    let Ok(bits) = last.parse::<i64>() else {
        return Vec::new();
    };
    // As many bits as lanes or a word has.
    let half = ((bits as u64 & 0xffff_ffff) >> 1).to_string();
    let name = format!("mask {bits} -> {half}");
    *last = &half;
    vec![Fault {
        name,
        text: format!("{} {}", statement.opcode(), operands.join(", ")),
    }]
}
