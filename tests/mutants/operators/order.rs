//! Memory order: releases, acquires and relaxed accesses one step weaker and wholly weak; fences
//! dropped.

use super::{Fault, dropped, each, replaced, with_parts};
use crate::listing::{Kernel, Statement};

const ORDERS: [&str; 5] = ["acq_rel", "acquire", "release", "relaxed", "volatile"];
const SCOPES: [&str; 4] = ["cta", "cluster", "gpu", "sys"];

/// See the module.
pub(crate) fn faults(kernel: &Kernel) -> Vec<(usize, Fault)> {
    each(kernel, |statement| match statement.name() {
        "fence" if statement.has("sc") => {
            vec![replaced(statement, "sc", "acq_rel"), dropped()]
        }
        "fence" | "membar" => vec![dropped()],
        "ld" | "st" => {
            let mut faults = weaker(statement);
            if let Some(order) = order(statement) {
                faults.push(weak(statement, order));
            }
            faults
        }
        // A read-modify-write cannot be weak.
        "atom" | "red" => weaker(statement),
        _ => Vec::new(),
    })
}

fn order(statement: &Statement) -> Option<&'static str> {
    ORDERS.into_iter().find(|order| statement.has(order))
}

fn weaker(statement: &Statement) -> Vec<Fault> {
    let to: &[&str] = match order(statement) {
        Some("acq_rel") => &["acquire", "release", "relaxed"],
        Some("acquire" | "release") => &["relaxed"],
        _ => &[],
    };
    let from = order(statement).unwrap_or_default();
    to.iter().map(|to| replaced(statement, from, to)).collect()
}

fn weak(statement: &Statement, order: &str) -> Fault {
    let goes = |part: &str| part == order || SCOPES.contains(&part);
    Fault {
        name: format!("{order} -> weak"),
        text: with_parts(statement, |part| (!goes(part)).then(|| part.to_owned())),
    }
}
