//! Barriers of a block or a warp dropped; reductions at a barrier that each thread makes for
//! itself, or that want all where one is enough.

use super::{Fault, dropped, each, replaced};
use crate::listing::{Kernel, operands};

/// See the module.
pub(crate) fn faults(kernel: &Kernel) -> Vec<(usize, Fault)> {
    each(kernel, |statement| {
        if !matches!(statement.name(), "bar" | "barrier") {
            return Vec::new();
        }
        if !statement.has("red") {
            return vec![dropped()];
        }
        let operands = operands(&statement.text);
        let own = match operands.last().map(|last| (last, last.strip_prefix('!'))) {
            Some((_, Some(negated))) => format!("not.pred {}, {negated}", operands[0]),
            Some((last, None)) => format!("mov.pred {}, {last}", operands[0]),
            None => return Vec::new(),
        };
        let mut faults = vec![Fault {
            name: "dropped, each thread for itself".into(),
            text: own,
        }];
        if statement.has("or") {
            faults.push(replaced(statement, "or", "and"));
        } else if statement.has("and") {
            faults.push(replaced(statement, "and", "or"));
        }
        faults
    })
}
