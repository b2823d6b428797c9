//! Operands, as the instructions ask for them.

use std::collections::HashMap;

use super::{Address, Base, Lowering, Symbol};
use crate::lowering::{LoadError, bad, code_address, immediate_bits, size_of};
use crate::program::CallSite;
use crate::ptx::ast::{self, Immediate, Operand, Type};
use crate::registers::{Pred, R32, R64};

impl Lowering<'_> {
    /// A fresh scratch register of up to 32 bits: the destination of `_`, or a temporary.
    pub fn scratch32(&mut self) -> R32 {
        self.registers.push_row()
    }

    /// A fresh scratch register of 64 bits.
    pub fn scratch64(&mut self) -> R64 {
        let low = self.registers.push_row();
        self.registers.push_row();
        R64(low.0)
    }

    /// A fresh scratch predicate.
    pub fn scratch_pred(&mut self) -> Pred {
        self.registers.push_pred()
    }

    /// A destination of up to 32 bits, or `_`.
    pub fn dst32(&mut self, operand: &Operand) -> Result<R32, LoadError> {
        match operand {
            Operand::Sink => Ok(self.scratch32()),
            Operand::Name(name) => match self.lookup(name)? {
                Symbol::Reg32(register, _) => Ok(register),
                _ => Err(bad(format!("'{name}' is no register of up to 32 bits"))),
            },
            other => Err(bad(format!(
                "expected a destination register, found {other:?}"
            ))),
        }
    }

    /// A destination of 64 bits, or `_`.
    pub fn dst64(&mut self, operand: &Operand) -> Result<R64, LoadError> {
        match operand {
            Operand::Sink => Ok(self.scratch64()),
            Operand::Name(name) => match self.lookup(name)? {
                Symbol::Reg64(register, _) => Ok(register),
                _ => Err(bad(format!("'{name}' is no register of 64 bits"))),
            },
            other => Err(bad(format!(
                "expected a destination register, found {other:?}"
            ))),
        }
    }

    /// A destination predicate, or `_`.
    pub fn dst_pred(&mut self, operand: &Operand) -> Result<Pred, LoadError> {
        match operand {
            Operand::Sink => Ok(self.scratch_pred()),
            Operand::Name(name) => match self.lookup(name)? {
                Symbol::RegPred(register) => Ok(register),
                _ => Err(bad(format!("'{name}' is no predicate"))),
            },
            other => Err(bad(format!("expected a predicate, found {other:?}"))),
        }
    }

    /// The declared width of a register in bits (1 for a predicate, 16 for `.b16`, …).
    pub fn register_bits(&self, operand: &Operand) -> Option<u32> {
        let Operand::Name(name) = operand else {
            return None;
        };
        match self.lookup(name).ok()? {
            Symbol::Reg32(_, ty) | Symbol::Reg64(_, ty) => Some(8 * size_of(ty)),
            Symbol::RegPred(_) => Some(1),
            _ => None,
        }
    }

    /// A source of up to 32 bits: a register, or an immediate as the type reads it. Addresses
    /// of shared and local variables and special registers are the business of `mov`.
    pub fn src32(&mut self, operand: &Operand, ty: Type) -> Result<R32, LoadError> {
        match operand {
            Operand::Name(name) => match self.lookup(name)? {
                Symbol::Reg32(register, _) => Ok(register),
                _ => Err(bad(format!("'{name}' is no register of up to 32 bits"))),
            },
            Operand::Immediate(immediate) => {
                let bits = immediate_bits(*immediate, ty)? as u32;
                let bits = match size_of(ty) {
                    1 => bits & 0xff,
                    2 => bits & 0xffff,
                    _ => bits,
                };
                Ok(self.constant32(bits))
            }
            other => Err(bad(format!(
                "expected a register or a literal, found {other:?}"
            ))),
        }
    }

    /// A source of 64 bits: a register, or an immediate as the type reads it.
    pub fn src64(&mut self, operand: &Operand, ty: Type) -> Result<R64, LoadError> {
        match operand {
            Operand::Name(name) => match self.lookup(name)? {
                Symbol::Reg64(register, _) => Ok(register),
                _ => Err(bad(format!("'{name}' is no register of 64 bits"))),
            },
            Operand::Immediate(immediate) => {
                let bits = immediate_bits(*immediate, ty)?;
                Ok(self.constant64(bits))
            }
            other => Err(bad(format!(
                "expected a register or a literal, found {other:?}"
            ))),
        }
    }

    /// A source predicate, and whether it is to be negated. `0` and `1` are allowed.
    pub fn src_pred(&mut self, operand: &Operand) -> Result<(Pred, bool), LoadError> {
        let (name, negated) = match operand {
            Operand::Name(name) => (name, false),
            Operand::Not(name) => (name, true),
            Operand::Immediate(Immediate::Int(value)) => {
                return Ok((self.constant_pred(*value != 0), false));
            }
            other => return Err(bad(format!("expected a predicate, found {other:?}"))),
        };
        match self.lookup(name)? {
            Symbol::RegPred(register) => Ok((register, negated)),
            _ => Err(bad(format!("'{name}' is no predicate"))),
        }
    }

    /// A register that holds a constant in every lane.
    pub fn constant32(&mut self, value: u32) -> R32 {
        let registers = &mut self.registers;
        *self
            .constants32
            .entry(value)
            .or_insert_with(|| registers.push_constant32(value))
    }

    /// A register that holds a constant in every lane.
    pub fn constant64(&mut self, value: u64) -> R64 {
        let registers = &mut self.registers;
        *self
            .constants64
            .entry(value)
            .or_insert_with(|| registers.push_constant64(value))
    }

    /// A predicate that is the same in every lane.
    pub fn constant_pred(&mut self, value: bool) -> Pred {
        let registers = &mut self.registers;
        *self.constants_pred[usize::from(value)]
            .get_or_insert_with(|| registers.push_constant_pred(value))
    }

    /// The carry flag of extended-precision arithmetic.
    pub fn carry(&mut self) -> Pred {
        let registers = &mut self.registers;
        *self.carry.get_or_insert_with(|| registers.push_pred())
    }

    /// A memory operand.
    pub fn address(&mut self, operand: &Operand) -> Result<Address, LoadError> {
        let Operand::Address { base, offset } = operand else {
            return Err(bad(format!(
                "expected an address in brackets, found {operand:?}"
            )));
        };
        let mut address = Address {
            base: None,
            offset: *offset,
            in_frame: false,
            symbol: None,
        };
        let Some(name) = base else {
            return Ok(address);
        };
        let symbol = self.lookup(name)?;
        match symbol {
            Symbol::Reg32(register, _) => address.base = Some(Base::R32(register)),
            Symbol::Reg64(register, _) => address.base = Some(Base::R64(register)),
            Symbol::RegPred(_) | Symbol::Function(_) => {
                return Err(bad(format!("'{name}' is no address")));
            }
            Symbol::Address(_, at) => address.offset = offset.wrapping_add(at as i64),
            Symbol::Shared(at) | Symbol::KernelParam(at, _) | Symbol::FrameParam(at, _) => {
                address.offset = offset.wrapping_add(i64::from(at));
            }
            Symbol::Local(at) => {
                address.offset = offset.wrapping_add(i64::from(at));
                address.in_frame = true;
            }
        }
        if address.base.is_none() {
            address.symbol = Some(symbol);
        }
        Ok(address)
    }

    /// The operation a label of this scope stands before.
    pub fn label(&self, operand: &Operand) -> Result<u32, LoadError> {
        let Operand::Name(name) = operand else {
            return Err(bad(format!("expected a label, found {operand:?}")));
        };
        self.label_named(name)
    }

    fn label_named(&self, name: &str) -> Result<u32, LoadError> {
        let found = self.labels.iter().rev().find_map(|scope| scope.get(name));
        found
            .copied()
            .ok_or_else(|| bad(format!("there is no label '{name}' here")))
    }

    /// The targets of a `.branchtargets` list.
    pub fn branch_targets(&self, operand: &Operand) -> Result<Vec<u32>, LoadError> {
        let Operand::Name(name) = operand else {
            return Err(bad(format!(
                "expected a list of targets, found {operand:?}"
            )));
        };
        let list = self.branch_targets.get(name);
        let list =
            list.ok_or_else(|| bad(format!("there is no '.branchtargets' list '{name}'")))?;
        list.iter().map(|label| self.label_named(label)).collect()
    }

    /// The number, in the kernel, of a function of the module; None if it has no body.
    pub fn callee(&self, function: usize) -> Option<u32> {
        self.kernel_functions.get(&function).copied()
    }

    /// A function's declaration.
    pub fn function(&self, number: usize) -> &ast::Function {
        &self.module.functions[number]
    }

    /// The number of a function of the module.
    pub fn function_named(&self, name: &str) -> Option<usize> {
        self.functions.get(name).copied()
    }

    /// The kernel's number of each function that can be called through its address.
    pub fn code_addresses(&self) -> HashMap<u64, u32> {
        self.kernel_functions
            .iter()
            .map(|(&number, &at)| (code_address(number), at))
            .collect()
    }

    /// Notes a call site; the number is what [`Step::Call`](crate::program::Step) carries.
    pub fn call_site(&mut self, site: CallSite) -> u32 {
        self.calls.push(site);
        self.calls.len() as u32 - 1
    }

    /// The number of the operation being lowered.
    pub fn pc(&self) -> u32 {
        self.pc
    }
}
