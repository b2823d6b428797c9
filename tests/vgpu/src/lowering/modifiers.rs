//! What stands behind the dots of an instruction.

use super::{LoadError, bad, type_of, unsupported};
use crate::ptx::ast::{Instruction, Type};

/// The modifiers of an instruction, ticked off one by one: what nobody asked for is an error.
/// Their order varies between compilers, so they are a set.
pub struct Modifiers<'a> {
    opcode: &'a str,
    left: Vec<&'a str>,
}

impl<'a> Modifiers<'a> {
    /// Those of an instruction.
    pub fn new(instruction: &'a Instruction) -> Self {
        Self {
            opcode: &instruction.opcode,
            left: instruction.modifiers.iter().map(String::as_str).collect(),
        }
    }

    /// Whether the modifier stands there; takes it.
    pub fn take(&mut self, modifier: &str) -> bool {
        let at = self.left.iter().position(|&m| m == modifier);
        at.map(|at| self.left.remove(at)).is_some()
    }

    /// The first that is one of these; takes it.
    pub fn take_any(&mut self, modifiers: &[&str]) -> Option<&'a str> {
        let at = self.left.iter().position(|m| modifiers.contains(m))?;
        Some(self.left.remove(at))
    }

    /// The first type among them, in the order of the text (of `cvt.d.s` the destination).
    pub fn take_type(&mut self) -> Option<Type> {
        let at = self.left.iter().position(|m| type_of(m).is_some())?;
        type_of(self.left.remove(at))
    }

    /// As [`take_type`](Self::take_type); an error where there is none.
    pub fn ty(&mut self) -> Result<Type, LoadError> {
        let opcode = self.opcode;
        self.take_type()
            .ok_or_else(|| bad(format!("'{opcode}' has no type")))
    }

    /// What is left, in the order of the text.
    pub fn rest(&self) -> &[&'a str] {
        &self.left
    }

    /// An error if any is left.
    pub fn finish(&self) -> Result<(), LoadError> {
        match self.left.first() {
            None => Ok(()),
            Some(left) => Err(unsupported(format!("'.{left}' on '{}'", self.opcode))),
        }
    }
}
