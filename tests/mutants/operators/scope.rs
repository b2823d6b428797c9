//! Scopes of accesses and fences, narrower: system to device and to block, device to block.

use super::{Fault, each, replaced};
use crate::listing::Kernel;

/// See the module.
pub(crate) fn faults(kernel: &Kernel) -> Vec<(usize, Fault)> {
    each(kernel, |statement| {
        if !matches!(
            statement.name(),
            "ld" | "st" | "atom" | "red" | "fence" | "membar"
        ) {
            return Vec::new();
        }
        // A membar spells the scopes differently.
        let scopes: &[&str] = match statement.name() {
            "membar" => &["sys", "gl", "cta"],
            _ => &["sys", "gpu", "cta"],
        };
        let Some(own) = scopes.iter().position(|scope| statement.has(scope)) else {
            return Vec::new();
        };
        let narrower = &scopes[own + 1..];
        let narrower = narrower.iter();
        narrower
            .map(|scope| replaced(statement, scopes[own], scope))
            .collect()
    })
}
