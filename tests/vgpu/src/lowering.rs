//! From the syntax tree to kernels ready to run: scopes, registers, variables, labels and calls.
//! What each instruction does comes from `isa`.
//!
//! Every kernel gets its own copy of the functions it may call, because their shared variables
//! lie where the kernel's layout puts them.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::finding::Place;
use crate::isa;
use crate::program::{CallSite, Function, Kernel, KernelParam, Op};
use crate::ptx::ast::{self, Immediate, Instruction, Operand, Space, Statement, Type, Variable};
use crate::registers::{Pred, R32, R64, Registers};

/// Generic addresses of functions: this plus 16 for each function of the module, in its order.
pub const CODE_WINDOW: u64 = 1 << 36;
/// Operations are numbered, over all modules, so that tables can name them by a word; the race
/// checks have 27 bits for it.
static NEXT_OP: AtomicU32 = AtomicU32::new(1);
const OP_MASK: u32 = (1 << 27) - 1;
/// Registers (in rows) a function may declare.
const MAX_ROWS: usize = 1 << 17;
/// Bytes of local, shared or parameter variables a function may declare.
const MAX_BYTES: u64 = 1 << 20;

/// Why a module cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// Line in the PTX text, from 1; 0 when it is the module as a whole.
    pub line: u32,
    /// What stands there, and what was expected.
    pub message: String,
    /// Whether the instruction exists but this interpreter lacks it (rather than bad PTX).
    pub unsupported: bool,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for LoadError {}

/// Size of a type in bytes; predicates have none.
pub fn size_of(ty: Type) -> u32 {
    match ty {
        Type::Pred => 0,
        Type::B8 | Type::U8 | Type::S8 => 1,
        Type::B16 | Type::U16 | Type::S16 | Type::F16 | Type::BF16 => 2,
        Type::B32 | Type::U32 | Type::S32 | Type::F32 | Type::F16x2 | Type::BF16x2 => 4,
        Type::B64 | Type::U64 | Type::S64 | Type::F64 => 8,
        Type::B128 => 16,
    }
}

/// The type a modifier names.
pub fn type_of(modifier: &str) -> Option<Type> {
    Some(match modifier {
        "pred" => Type::Pred,
        "b8" => Type::B8,
        "b16" => Type::B16,
        "b32" => Type::B32,
        "b64" => Type::B64,
        "b128" => Type::B128,
        "u8" => Type::U8,
        "u16" => Type::U16,
        "u32" => Type::U32,
        "u64" => Type::U64,
        "s8" => Type::S8,
        "s16" => Type::S16,
        "s32" => Type::S32,
        "s64" => Type::S64,
        "f16" => Type::F16,
        "f16x2" => Type::F16x2,
        "bf16" => Type::BF16,
        "bf16x2" => Type::BF16x2,
        "f32" => Type::F32,
        "f64" => Type::F64,
        _ => return None,
    })
}

/// Bytes of a variable: elements times vector times type. None if that overflows.
pub fn variable_bytes(variable: &Variable) -> Option<u64> {
    let mut bytes = u64::from(size_of(variable.ty)) * u64::from(variable.vector);
    for (i, &dim) in variable.dims.iter().enumerate() {
        // `[]` takes its size from the initialiser.
        let dim = if dim == 0 && i == 0 {
            variable.init.len() as u64
        } else {
            dim
        };
        bytes = bytes.checked_mul(dim)?;
    }
    Some(bytes)
}

/// Alignment of a variable in bytes.
pub fn variable_align(variable: &Variable) -> u64 {
    let natural = u64::from(size_of(variable.ty)) * u64::from(variable.vector);
    u64::from(variable.align.unwrap_or(0))
        .max(natural)
        .max(1)
        .next_power_of_two()
}

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

/// Bad PTX; the line is filled in by the caller.
pub fn bad(message: impl Into<String>) -> LoadError {
    LoadError {
        line: 0,
        message: message.into(),
        unsupported: false,
    }
}

/// An instruction or form that this interpreter lacks; the line is filled in by the caller.
pub fn unsupported(message: impl Into<String>) -> LoadError {
    LoadError {
        line: 0,
        message: format!("{} is not implemented by the virtual GPU", message.into()),
        unsupported: true,
    }
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

/// Where the module's variables and functions are, for one device.
#[derive(Debug, Clone, Default)]
pub struct ModuleSymbols {
    /// Generic addresses of `.global` and `.const` variables.
    pub variables: HashMap<String, (Space, u64)>,
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

/// Lowers all kernels of a module. `registers` gives the registers a thread of a kernel, where
/// machine code beside the PTX tells.
pub fn lower_module(
    module: &ast::Module,
    symbols: &ModuleSymbols,
    registers: &dyn Fn(&str) -> Option<u32>,
) -> Result<Vec<Kernel>, LoadError> {
    // A definition wins over a declaration of the same name.
    let mut functions: HashMap<&str, usize> = HashMap::new();
    for (i, function) in module.functions.iter().enumerate() {
        let known = functions.get(function.name.as_str());
        if known.is_none_or(|&k| module.functions[k].body.is_none()) {
            functions.insert(&function.name, i);
        }
    }
    let address_taken = address_taken(module, &functions);
    let mut kernels = Vec::new();
    for (number, function) in module.functions.iter().enumerate() {
        if function.entry && function.body.is_some() {
            kernels.push(lower_kernel(
                module,
                symbols,
                &functions,
                &address_taken,
                number,
                registers(&function.name),
            )?);
        }
    }
    Ok(kernels)
}

/// The number of each function whose address some variable's initialiser holds.
fn address_taken(module: &ast::Module, functions: &HashMap<&str, usize>) -> BTreeSet<usize> {
    let inits = module.variables.iter().flat_map(|v| &v.init);
    inits
        .filter_map(|init| match init {
            ast::Init::Address { name, .. } => functions.get(name.as_str()).copied(),
            ast::Init::Value(_) => None,
        })
        .collect()
}

fn visit<'a>(statements: &'a [Statement], f: &mut impl FnMut(&'a Statement)) {
    for statement in statements {
        f(statement);
        if let Statement::Block(inner) = statement {
            visit(inner, f);
        }
    }
}

fn names_in<'a>(operand: &'a Operand, f: &mut impl FnMut(&'a str)) {
    match operand {
        Operand::Name(name) | Operand::NameOffset(name, _) => f(name),
        Operand::Address {
            base: Some(name), ..
        } => f(name),
        Operand::Vector(list) | Operand::List(list) => list.iter().for_each(|o| names_in(o, f)),
        Operand::Pair(a, b) => {
            names_in(a, f);
            names_in(b, f);
        }
        _ => {}
    }
}

fn lower_kernel(
    module: &ast::Module,
    symbols: &ModuleSymbols,
    functions: &HashMap<&str, usize>,
    address_taken: &BTreeSet<usize>,
    entry: usize,
    registers: Option<u32>,
) -> Result<Kernel, LoadError> {
    // What may run: the entry, what it names, and whatever a table of functions holds.
    let mut order = vec![entry];
    let mut seen: BTreeSet<usize> = BTreeSet::from([entry]);
    let mut used_shared: Vec<&Variable> = Vec::new();
    let mut named: BTreeSet<&str> = BTreeSet::new();
    let mut at = 0;
    while at < order.len() {
        let function = &module.functions[order[at]];
        at += 1;
        visit(function.body.as_deref().unwrap_or_default(), &mut |s| {
            if let Statement::Instruction(instruction) = s {
                for operand in &instruction.operands {
                    names_in(operand, &mut |name| {
                        named.insert(name);
                        if let Some(&number) = functions.get(name)
                            && module.functions[number].body.is_some()
                            && seen.insert(number)
                        {
                            order.push(number);
                        }
                    });
                }
            }
        });
        if at == order.len() {
            let more: Vec<usize> = address_taken
                .iter()
                .copied()
                .filter(|n| module.functions[*n].body.is_some() && seen.insert(*n))
                .collect();
            order.extend(more);
        }
    }

    // Shared variables: the module's that are named, and the functions' own.
    let mut shared: HashMap<(Option<usize>, String), u32> = HashMap::new();
    let mut shared_end = 0u64;
    let mut dynamic: Vec<(Option<usize>, &Variable)> = Vec::new();
    let mut place = |owner: Option<usize>, variable| -> Result<(), LoadError> {
        let v: &Variable = variable;
        let bytes = variable_bytes(v).ok_or_else(|| too_large(v))?;
        if bytes == 0 {
            dynamic.push((owner, v));
            return Ok(());
        }
        shared_end = shared_end.next_multiple_of(variable_align(v));
        shared.insert((owner, v.name.clone()), shared_end as u32);
        shared_end += bytes;
        if shared_end > MAX_BYTES {
            return Err(too_large(v));
        }
        Ok(())
    };
    used_shared.extend(module.variables.iter().filter(|v| v.space == Space::Shared));
    for variable in used_shared
        .iter()
        .filter(|v| named.contains(v.name.as_str()))
    {
        place(None, variable)?;
    }
    for &number in &order {
        let mut own = Vec::new();
        visit(
            module.functions[number].body.as_deref().unwrap_or_default(),
            &mut |s| {
                if let Statement::Variable(v) = s
                    && v.space == Space::Shared
                {
                    own.push(v);
                }
            },
        );
        for variable in own {
            place(Some(number), variable)?;
        }
    }
    // All dynamic arrays begin at the same place, after the static ones.
    let align = dynamic
        .iter()
        .map(|(_, v)| variable_align(v))
        .max()
        .unwrap_or(1);
    let dynamic_shared_at = shared_end.next_multiple_of(align) as u32;
    let dynamic: Vec<(Option<usize>, String)> = dynamic
        .iter()
        .map(|(owner, v)| (*owner, v.name.clone()))
        .collect();
    for key in dynamic {
        shared.insert(key, dynamic_shared_at);
    }

    let kernel_functions: HashMap<usize, u32> = order
        .iter()
        .enumerate()
        .map(|(i, &n)| (n, i as u32))
        .collect();
    let mut lowered = Vec::new();
    for &number in &order {
        lowered.push(lower_function(
            module,
            symbols,
            functions,
            &kernel_functions,
            &shared,
            number,
        )?);
    }

    let function = &module.functions[entry];
    let (params, param_bytes) = layout_params(&function.params)?;
    let directive = |name: &str| {
        let found = function.directives.iter().find(|d| d.0 == name)?;
        let axis = |i: usize| {
            found
                .1
                .get(i)
                .map_or(1, |&n| n.min(u64::from(u32::MAX)) as u32)
        };
        Some([axis(0), axis(1), axis(2)])
    };
    let product = |[x, y, z]: [u32; 3]| x.saturating_mul(y).saturating_mul(z);
    let required_block = directive("reqntid");
    Ok(Kernel {
        name: function.name.clone(),
        params: params
            .iter()
            .map(|&(offset, size)| KernelParam { offset, size })
            .collect(),
        param_bytes,
        static_shared: shared_end as u32,
        dynamic_shared_at,
        max_threads: required_block.or_else(|| directive("maxntid")).map(product),
        required_block,
        registers,
        local_bytes: lowered[0].local_bytes,
        functions: lowered,
        arch: module.arch,
    })
}

fn too_large(variable: &Variable) -> LoadError {
    LoadError {
        line: variable.line,
        ..bad(format!(
            "'{}' is larger than {MAX_BYTES} bytes",
            variable.name
        ))
    }
}

/// Offsets and sizes of parameters laid out one after the other, and the bytes in all.
fn layout_params(params: &[Variable]) -> Result<(Vec<(u32, u32)>, u32), LoadError> {
    let mut end = 0u64;
    let mut places = Vec::new();
    for param in params {
        let bytes = variable_bytes(param).ok_or_else(|| too_large(param))?;
        end = end.next_multiple_of(variable_align(param));
        places.push((end as u32, bytes.min(MAX_BYTES) as u32));
        end = end.saturating_add(bytes);
        if end > MAX_BYTES {
            return Err(too_large(param));
        }
    }
    Ok((places, end as u32))
}

fn lower_function<'a>(
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

/// The generic address of a function of the module.
pub fn code_address(number: usize) -> u64 {
    CODE_WINDOW + 16 * number as u64
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

/// The bits of a literal as an operand of this type.
pub fn immediate_bits(immediate: Immediate, ty: Type) -> Result<u64, LoadError> {
    Ok(match (immediate, ty) {
        (Immediate::F32(bits), Type::F64) => f64::from(f32::from_bits(bits)).to_bits(),
        (Immediate::F32(bits), _) => u64::from(bits),
        (Immediate::F64(value), Type::F32) => u64::from((value as f32).to_bits()),
        (Immediate::F64(value), Type::F64 | Type::B64) => value.to_bits(),
        (Immediate::F64(_), _) => {
            return Err(bad("a floating-point literal where the type is an integer"));
        }
        (Immediate::Int(value), Type::F32) => u64::from((value as i64 as f32).to_bits()),
        (Immediate::Int(value), Type::F64) => (value as i64 as f64).to_bits(),
        (Immediate::Int(value), _) => value,
    })
}
