//! Kernels as the compiler's listings show them: PTX and machine code as graphs of statements
//! with the lines of source they come from, so that tests can say what stands before what.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod flow;
pub(crate) mod ptx;
pub(crate) mod sass;

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

/// A line of a source file, by the file's name without directories.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Line {
    pub(crate) file: String,
    pub(crate) line: u32,
}

impl Line {
    pub(crate) fn new(path: &str, line: u32) -> Self {
        let file = path.rsplit('/').next().unwrap_or(path).to_owned();
        Self { file, line }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// One instruction.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    /// The instruction, without what guards it and what ends it: `ld.acquire.sys.global.u64 %rd5,
    /// [%rd6]`.
    pub(crate) text: String,
    /// The guard: `@%p1`, `@!P0`.
    pub(crate) guard: Option<String>,
    /// Registers of PTX that are of an inner scope, and which that is: others of the same names
    /// may be outside.
    pub(crate) scope: (usize, Vec<String>),
    /// Where it stands in a listing of PTX, from the guard to the semicolon.
    pub(crate) range: Range<usize>,
    /// The source: the innermost line first, then where that function was inlined, and so on.
    pub(crate) place: Vec<Line>,
}

impl Statement {
    /// `ld.acquire.sys.global.u64`
    pub(crate) fn opcode(&self) -> &str {
        self.text.split_whitespace().next().unwrap_or_default()
    }

    /// Whether the opcode has this part between dots.
    pub(crate) fn has(&self, part: &str) -> bool {
        self.opcode().split('.').any(|p| p == part)
    }

    /// The first part of the opcode.
    pub(crate) fn name(&self) -> &str {
        self.opcode().split('.').next().unwrap_or_default()
    }
}

/// A kernel: its statements, and which may follow each. The end is followed by nothing.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Statement>,
    pub(crate) next: Vec<BTreeSet<usize>>,
}

/// Operands at the top level: split at commas outside of brackets.
pub(crate) fn operands(text: &str) -> Vec<&str> {
    let Some((_, rest)) = text.split_once(char::is_whitespace) else {
        return Vec::new();
    };
    let (mut depth, mut from, mut parts) = (0, 0, Vec::new());
    for (at, c) in rest.char_indices() {
        match c {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(rest[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(rest[from..].trim());
    parts
}
