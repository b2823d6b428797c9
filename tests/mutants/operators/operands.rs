//! Operands that do not commute, swapped; what counts for the greatest, the least, and the other
//! way round.

use super::{Fault, each, replaced};
use crate::listing::{Kernel, Statement, operands};

/// See the module.
pub(crate) fn swapped(kernel: &Kernel) -> Vec<(usize, Fault)> {
    each(kernel, |statement| match statement.name() {
        "sub" | "div" | "rem" | "selp" => vec![swap(statement, 1, 2)],
        // The bits to shift by are 32 always.
        "shl" | "shr" if statement.has("b32") || statement.has("u32") || statement.has("s32") => {
            vec![swap(statement, 1, 2)]
        }
        // The product of a wide one has another type than its sum.
        "fma" | "mad" if !statement.has("wide") => vec![swap(statement, 1, 3)],
        "min" => vec![replaced(statement, "min", "max")],
        "max" => vec![replaced(statement, "max", "min")],
        _ => Vec::new(),
    })
}

fn swap(statement: &Statement, a: usize, b: usize) -> Fault {
    let mut operands = operands(&statement.text);
    // Constants tell apart what one line of source comes to.
    let constants: Vec<_> = operands.iter().filter(|o| !o.contains('%')).collect();
    let constants: String = constants.iter().map(|c| format!(" {c}")).collect();
    operands.swap(a, b);
    Fault {
        name: format!("operands {a} and {b} swapped{constants}"),
        text: format!("{} {}", statement.opcode(), operands.join(", ")),
    }
}
