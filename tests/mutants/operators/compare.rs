//! Comparisons, shifted by one or turned round: all of them, or those of what was read from a flag
//! or agreed on at a barrier. Which those are follows from the registers: whatever is computed from a strong load or
//! from a reduction at a barrier.

use super::{Fault, replaced};
use crate::listing::{Kernel, Statement, flow, operands};

/// See the module.
pub(crate) fn flags(kernel: &Kernel) -> Vec<(usize, Fault)> {
    let strong = ["acquire", "relaxed", "volatile", "acq_rel"];
    let from_flags = flow::derived(kernel, |statement| match statement.name() {
        "ld" => strong.iter().any(|order| statement.has(order)),
        "atom" => true,
        "bar" | "barrier" => statement.has("red"),
        _ => false,
    });
    let code = kernel.code.iter().enumerate();
    let compares = code.filter(|(_, s)| {
        s.name() == "setp" && flow::reads(s).iter().any(|r| from_flags.contains(r))
    });
    compares
        .flat_map(|(index, statement)| shifted(statement).into_iter().map(move |f| (index, f)))
        .collect()
}

/// All comparisons: bounds of loops and of operands, and what depends on values.
pub(crate) fn bounds(kernel: &Kernel) -> Vec<(usize, Fault)> {
    let code = kernel.code.iter().enumerate();
    code.filter(|(_, statement)| statement.name() == "setp")
        .flat_map(|(index, statement)| shifted(statement).into_iter().map(move |f| (index, f)))
        .collect()
}

fn shifted(statement: &Statement) -> Vec<Fault> {
    const OTHERS: [(&str, &[&str]); 10] = [
        ("eq", &["ne"]),
        ("ne", &["eq"]),
        ("lt", &["le"]),
        ("le", &["lt"]),
        ("gt", &["ge"]),
        ("ge", &["gt"]),
        ("lo", &["ls"]),
        ("ls", &["lo"]),
        ("hi", &["hs"]),
        ("hs", &["hi"]),
    ];
    let mut faults = Vec::new();
    for (from, others) in OTHERS {
        if statement.has(from) {
            faults.extend(others.iter().map(|to| replaced(statement, from, to)));
        }
    }
    // Off by one, where it is compared with a constant. A truth value has no neighbours.
    let operands = operands(&statement.text);
    if let Some(number) = operands.get(2).and_then(|o| o.parse::<i64>().ok())
        && !operands[0].contains('|')
    {
        for (name, other) in [
            ("- 1", number.wrapping_sub(1)),
            ("+ 1", number.wrapping_add(1)),
        ] {
            faults.push(Fault {
                name: format!("{number} -> {number} {name}"),
                text: format!(
                    "{} {}, {}, {other}",
                    statement.opcode(),
                    operands[0],
                    operands[1]
                ),
            });
        }
    }
    faults
}
