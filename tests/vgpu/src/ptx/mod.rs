//! PTX text to a syntax tree. Knows the grammar, no opcode: what an instruction means, and
//! which modifiers it may carry, is the business of `isa`.

pub mod ast;
mod lexer;
mod parser;

use std::fmt;

pub use parser::parse;

/// Where the text stops being PTX.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// From 1.
    pub line: u32,
    /// From 1.
    pub column: u32,
    /// What stands there.
    pub found: String,
    /// What should.
    pub expected: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PTX line {}, column {}: expected {}, found {}",
            self.line, self.column, self.expected, self.found
        )
    }
}

impl std::error::Error for ParseError {}
