//! Machine code as `nvdisasm -gi` prints it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Kernel, Line, Statement};

/// The kernels of a listing. Panics at what it does not understand.
pub(crate) fn kernels(text: &str) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    let mut reader: Option<(String, Reader)> = None;
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix(".section\t") {
            kernels.extend(reader.take().map(|(name, reader)| reader.finish(name)));
            let name = rest.trim().strip_prefix(".text.");
            let name = name.and_then(|name| name.split([',', '"']).next());
            reader = name.map(|name| (name.to_owned(), Reader::default()));
        } else if let Some((_, reader)) = &mut reader {
            reader.line(line);
        }
    }
    kernels.extend(reader.take().map(|(name, reader)| reader.finish(name)));
    kernels
}

#[derive(Default)]
struct Reader {
    code: Vec<Statement>,
    labels: BTreeMap<String, usize>,
    place: Vec<Line>,
    /// Whether the lines of the place have all come: the next one begins another.
    placed: bool,
}

impl Reader {
    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("//##") {
            if self.placed {
                self.place.clear();
                self.placed = false;
            }
            self.source(rest);
        } else if let Some(label) = line.strip_suffix(':') {
            self.labels.insert(label.to_owned(), self.code.len());
        } else if line.starts_with("/*")
            && let Some((_, rest)) = line.split_once("*/")
            && let Some((instruction, _)) = rest.split_once(';')
        {
            self.placed = true;
            self.instruction(instruction.trim());
        }
    }

    /// `File "/a/b.cuh", line 7 inlined at "/a/c.cu", line 9`
    fn source(&mut self, rest: &str) {
        let mut words = rest.split('"');
        let path = words.nth(1).unwrap_or_default();
        let number = |text: &str| -> u32 {
            let digits = text.split("line").nth(1).unwrap_or_default().trim();
            let end = digits.find(|c: char| !c.is_ascii_digit());
            digits[..end.unwrap_or(digits.len())].parse().unwrap_or(0)
        };
        let own = Line::new(path, number(words.next().unwrap_or_default()));
        self.place.push(own);
    }

    fn instruction(&mut self, text: &str) {
        let (guard, text) = match text.split_once(char::is_whitespace) {
            Some((guard, rest)) if guard.starts_with('@') => (Some(guard.to_owned()), rest.trim()),
            _ => (None, text),
        };
        if text.is_empty() {
            return;
        }
        self.code.push(Statement {
            text: text.to_owned(),
            guard,
            scope: (0, Vec::new()),
            range: 0..0,
            place: self.place.clone(),
        });
    }

    fn finish(self, name: String) -> Kernel {
        let next = (0..self.code.len()).map(|i| self.followers(i)).collect();
        Kernel {
            name,
            code: self.code,
            next,
        }
    }

    /// The label between `(` and `)`.
    fn target(&self, statement: &Statement) -> Option<usize> {
        let (_, rest) = statement.text.split_once("`(")?;
        self.labels.get(rest.split(')').next()?).copied()
    }

    /// `(*"BRANCH_TARGETS .L_x_1,.L_x_2"*)`
    fn targets(&self, statement: &Statement) -> Vec<usize> {
        let list = statement.text.split_once("BRANCH_TARGETS ");
        let list = list.and_then(|(_, rest)| rest.split('"').next());
        let labels = list.unwrap_or_default().split(',');
        labels
            .filter_map(|label| self.labels.get(label.trim()).copied())
            .collect()
    }

    fn followers(&self, index: usize) -> BTreeSet<usize> {
        let statement = &self.code[index];
        let mut next = BTreeSet::new();
        // A guard that is always false is nobody's; one that is always true is none.
        let guarded = statement
            .guard
            .as_deref()
            .is_some_and(|guard| guard != "@PT");
        let falls_through = match statement.name() {
            "BRA" => {
                let target = self.target(statement);
                next.insert(target.unwrap_or_else(|| panic!("no target: {}", statement.text)));
                // A branch may have a condition of its own besides the guard: `BRA.DIV UR4, ...`,
                // `BRA.U !UP0, ...`, `BRA P1, ...`.
                let operands = super::operands(&statement.text);
                guarded || operands.len() > 1
            }
            "EXIT" | "RET" => guarded,
            // Threads wait for each other, and go on where the barrier register says: behind it, as
            // a rule.
            "BSYNC" => {
                let register = super::operands(&statement.text).first().copied();
                let entries = self.code.iter().filter(|other| {
                    other.name() == "BSSY"
                        && super::operands(&other.text).first().copied() == register
                });
                let targets: Vec<usize> = entries.filter_map(|entry| self.target(entry)).collect();
                if !targets.contains(&(index + 1)) {
                    next.extend(targets);
                }
                true
            }
            "BRX" => {
                next.extend(self.targets(statement));
                assert!(!next.is_empty(), "no targets: {}", statement.text);
                guarded
            }
            // Calls a function that the compiler put behind the kernel (a division), or jumps.
            "CALL" => {
                let target = self.target(statement);
                let target = target.unwrap_or_else(|| panic!("no target: {}", statement.text));
                let mut ahead = self.code[target..].iter().map(Statement::name);
                let returns = ahead.find(|name| matches!(*name, "RET" | "EXIT")) == Some("RET");
                if !returns {
                    next.insert(target);
                }
                guarded || returns
            }
            "BRXU" | "JMP" | "JMX" => panic!("{} is not followed", statement.text),
            _ => true,
        };
        if falls_through && index + 1 < self.code.len() {
            next.insert(index + 1);
        }
        next
    }
}
