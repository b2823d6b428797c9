//! One function: its scopes, registers, constants and labels, and what its operands mean.

mod operands;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{
    LoadError, MAX_BYTES, ModuleSymbols, bad, layout_params, size_of, too_large, unsupported,
    variable_align, variable_bytes,
};
use crate::finding::Place;
use crate::isa;
use crate::program::{CallSite, Function, Op};
use crate::ptx::ast::{self, Instruction, Space, Statement, Type, Variable};
use crate::race::Touch;
use crate::registers::{Pred, R32, R64, Registers};

/// Operations are numbered, over all modules, so that tables can name them by a word.
static NEXT_OP: AtomicU32 = AtomicU32::new(1);
const OP_MASK: u32 = (1 << Touch::OP_BITS) - 1;
/// Registers (in rows) a function may declare.
const MAX_ROWS: usize = 1 << 17;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Symbol {
    /// A register of 8, 16 or 32 bits.
    Reg32(R32, Type),
    /// A register of 64 bits.
    Reg64(R64, Type),
    /// A predicate.
    RegPred(Pred),
    /// A `.global` or `.const` variable: its generic address.
    Address(Space, u64),
    /// A `.shared` variable: its offset.
    Shared(u32),
    /// A `.local` variable: its offset in the frame's local memory.
    Local(u32),
    /// A parameter of the kernel: its offset in the parameter bytes, and its size.
    KernelParam(u32, u32),
    /// A parameter in the frame's parameter bytes, and its size.
    FrameParam(u32, u32),
    /// A function of the module, by its number.
    Function(usize),
}

/// A memory operand: `[base + offset]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The register with the address; None for an address known when the module is loaded.
    pub base: Option<Base>,
    /// Bytes added: to the base, or to nothing.
    pub offset: i64,
    /// The address counts from the frame's local memory.
    pub in_frame: bool,
    /// The operand named a variable: where it lives. `ld.param` of a function's formal and of a
    /// kernel's parameter differ by this alone.
    pub symbol: Option<Symbol>,
}

/// The width of an address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Base {
    R32(R32),
    R64(R64),
}

/// The lowering of one function; what `isa` sees.
pub struct Lowering<'a> {
    scopes: Vec<HashMap<String, Symbol>>,
    labels: Vec<HashMap<String, u32>>,
    branch_targets: HashMap<String, Vec<String>>,
    registers: Registers,
    rows: usize,
    preds: usize,
    constants32: HashMap<u32, R32>,
    constants64: HashMap<u64, R64>,
    constants_pred: [Option<Pred>; 2],
    carry: Option<Pred>,
    local_bytes: u64,
    param_bytes: u64,
    calls: Vec<CallSite>,
    module: &'a ast::Module,
    functions: &'a HashMap<&'a str, usize>,
    kernel_functions: &'a HashMap<usize, u32>,
    shared: &'a HashMap<(Option<usize>, String), u32>,
    number: usize,
    /// Whether it is a kernel.
    pub entry: bool,
    pc: u32,
}

/// Lowers a function as part of a kernel.
pub(super) fn lower_function<'a>(
    module: &'a ast::Module,
    symbols: &ModuleSymbols,
    functions: &'a HashMap<&'a str, usize>,
    kernel_functions: &'a HashMap<usize, u32>,
    shared: &'a HashMap<(Option<usize>, String), u32>,
    number: usize,
) -> Result<Function, LoadError> {
    let function = &module.functions[number];
    let body = function.body.as_deref().unwrap_or_default();
    let mut globals: HashMap<String, Symbol> = HashMap::new();
    for (name, &(space, address)) in &symbols.variables {
        globals.insert(name.clone(), Symbol::Address(space, address));
    }
    for (name, &n) in functions {
        globals.insert((*name).to_owned(), Symbol::Function(n));
    }
    for ((owner, name), &offset) in shared {
        if owner.is_none() {
            globals.insert(name.clone(), Symbol::Shared(offset));
        }
    }
    let mut f = Lowering {
        scopes: vec![globals, HashMap::new()],
        labels: Vec::new(),
        branch_targets: HashMap::new(),
        registers: Registers::new(0, 0),
        rows: 0,
        preds: 0,
        constants32: HashMap::new(),
        constants64: HashMap::new(),
        constants_pred: [None; 2],
        carry: None,
        local_bytes: 0,
        param_bytes: 0,
        calls: Vec::new(),
        module,
        functions,
        kernel_functions,
        shared,
        number,
        entry: function.entry,
        pc: 0,
    };
    let mut formals = Vec::new();
    let mut results = Vec::new();
    if function.entry {
        let (places, _) = layout_params(&function.params)?;
        for (param, (offset, size)) in function.params.iter().zip(places) {
            f.define(&param.name, Symbol::KernelParam(offset, size));
        }
    } else {
        for (list, places) in [
            (&function.params, &mut formals),
            (&function.returns, &mut results),
        ] {
            for param in list {
                if param.space == Space::Reg {
                    return Err(LoadError {
                        line: param.line,
                        ..unsupported(format!("a '.reg' parameter of '{}'", function.name))
                    });
                }
                f.declare(param)?;
                match f.lookup(&param.name)? {
                    Symbol::FrameParam(offset, size) => places.push((offset, size)),
                    _ => return Err(bad(format!("parameter '{}' has no place", param.name))),
                }
            }
        }
    }
    let mut ops = Vec::new();
    f.lower_block(body, &mut ops, 0)?;
    // Falling off the end returns.
    let end = Instruction {
        guard: None,
        opcode: "ret".to_owned(),
        modifiers: Vec::new(),
        operands: Vec::new(),
        line: function.line,
        location: None,
    };
    ops.push(f.lower_instruction(&end)?);
    Ok(Function {
        name: function.name.clone(),
        ops,
        template: f.registers,
        local_bytes: f.local_bytes as u32,
        param_bytes: f.param_bytes as u32,
        formals,
        results,
        calls: f.calls,
    })
}

impl Lowering<'_> {
    fn define(&mut self, name: &str, symbol: Symbol) {
        let scope = self.scopes.last_mut().expect("a function has a scope");
        scope.insert(name.to_owned(), symbol);
    }

    fn lower_block(
        &mut self,
        statements: &[Statement],
        ops: &mut Vec<Op>,
        start: u32,
    ) -> Result<u32, LoadError> {
        // Labels may be used before they stand, so their operations are counted first.
        let mut labels = HashMap::new();
        count_labels(statements, start, &mut labels);
        self.labels.push(labels);
        self.scopes.push(HashMap::new());
        for statement in statements {
            if let Statement::BranchTargets(name, targets) = statement {
                self.branch_targets.insert(name.clone(), targets.clone());
            }
        }
        let mut pc = start;
        for statement in statements {
            match statement {
                Statement::Variable(variable) => self.declare(variable)?,
                Statement::Label(_)
                | Statement::BranchTargets(..)
                | Statement::CallPrototype(..) => {}
                Statement::Block(inner) => pc = self.lower_block(inner, ops, pc)?,
                Statement::Instruction(instruction) => {
                    self.pc = pc;
                    ops.push(self.lower_instruction(instruction)?);
                    pc += 1;
                }
            }
        }
        self.scopes.pop();
        self.labels.pop();
        Ok(pc)
    }

    fn lower_instruction(&mut self, instruction: &Instruction) -> Result<Op, LoadError> {
        let with_line = |error: LoadError| LoadError {
            line: instruction.line,
            ..error
        };
        let guard = match &instruction.guard {
            None => None,
            Some(guard) => match self.lookup(&guard.register).map_err(with_line)? {
                Symbol::RegPred(pred) => Some((pred, guard.negated)),
                _ => {
                    return Err(with_line(bad(format!(
                        "the guard '{}' is no predicate",
                        guard.register
                    ))));
                }
            },
        };
        let action = isa::lower(instruction, self).map_err(with_line)?;
        let mut name = instruction.opcode.clone();
        for modifier in &instruction.modifiers {
            name.push('.');
            name.push_str(modifier);
        }
        let mut source = Vec::new();
        let mut location = instruction.location.as_deref();
        while let Some(place) = location {
            let file = self.module.files.iter().find(|f| f.0 == place.file);
            let file = file.map_or("?", |f| f.1.rsplit('/').next().unwrap_or(&f.1));
            source.push((file.to_owned(), place.line));
            location = place.inlined_at.as_deref();
        }
        Ok(Op {
            id: NEXT_OP.fetch_add(1, Ordering::Relaxed) & OP_MASK,
            action,
            guard,
            place: Arc::new(Place {
                kernel: self.module.functions[self.number].name.clone(),
                ptx_line: instruction.line,
                source,
                instruction: name,
            }),
        })
    }

    fn declare(&mut self, variable: &Variable) -> Result<(), LoadError> {
        let with_line = |error: LoadError| LoadError {
            line: variable.line,
            ..error
        };
        match variable.space {
            Space::Reg => {
                let count = variable.count.unwrap_or(1);
                for i in 0..count {
                    let name = match variable.count {
                        Some(_) => format!("{}{i}", variable.name),
                        None => variable.name.clone(),
                    };
                    let symbol = self.new_register(variable.ty).map_err(with_line)?;
                    self.define(&name, symbol);
                }
            }
            Space::Local => {
                let offset = place_in(&mut self.local_bytes, variable)?;
                self.define(&variable.name, Symbol::Local(offset));
            }
            Space::Param => {
                let bytes = variable_bytes(variable).ok_or_else(|| too_large(variable))?;
                let offset = place_in(&mut self.param_bytes, variable)?;
                self.define(&variable.name, Symbol::FrameParam(offset, bytes as u32));
            }
            Space::Shared => {
                let key = (Some(self.number), variable.name.clone());
                let offset = self.shared.get(&key).copied().unwrap_or(0);
                self.define(&variable.name, Symbol::Shared(offset));
            }
            Space::Global | Space::Const => {
                // Static variables inside a function are placed with the module's.
                if self.lookup(&variable.name).is_err() {
                    return Err(with_line(bad(format!(
                        "'{}' has no address",
                        variable.name
                    ))));
                }
            }
        }
        Ok(())
    }

    fn new_register(&mut self, ty: Type) -> Result<Symbol, LoadError> {
        let rows = match ty {
            Type::Pred => 0,
            Type::B128 => return Err(unsupported("a register of 128 bits")),
            ty if size_of(ty) == 8 => 2,
            _ => 1,
        };
        if self.rows + rows > MAX_ROWS || self.preds > MAX_ROWS {
            return Err(bad(format!("more than {MAX_ROWS} registers")));
        }
        Ok(match rows {
            0 => {
                self.preds += 1;
                Symbol::RegPred(self.registers.push_pred())
            }
            1 => {
                self.rows += 1;
                Symbol::Reg32(self.registers.push_row(), ty)
            }
            _ => {
                self.rows += 2;
                let low = self.registers.push_row();
                self.registers.push_row();
                Symbol::Reg64(R64(low.0), ty)
            }
        })
    }

    /// What a name stands for, from the innermost scope out.
    pub fn lookup(&self, name: &str) -> Result<Symbol, LoadError> {
        let found = self.scopes.iter().rev().find_map(|scope| scope.get(name));
        found
            .copied()
            .ok_or_else(|| bad(format!("'{name}' is not declared here")))
    }
}

fn count_labels(statements: &[Statement], start: u32, labels: &mut HashMap<String, u32>) -> u32 {
    let mut pc = start;
    for statement in statements {
        match statement {
            Statement::Label(name) => {
                labels.insert(name.clone(), pc);
            }
            Statement::Instruction(_) => pc += 1,
            // A block's labels are its own.
            Statement::Block(inner) => pc = count_labels(inner, pc, &mut HashMap::new()),
            _ => {}
        }
    }
    pc
}

fn place_in(end: &mut u64, variable: &Variable) -> Result<u32, LoadError> {
    let bytes = variable_bytes(variable).ok_or_else(|| too_large(variable))?;
    let at = end.next_multiple_of(variable_align(variable));
    *end = at.saturating_add(bytes);
    if *end > MAX_BYTES {
        return Err(too_large(variable));
    }
    Ok(at as u32)
}
