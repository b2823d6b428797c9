//! Puts a parsed module onto a device: places its variables, writes their initial values, lowers
//! its kernels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::lowering::{
    self, LoadError, ModuleSymbols, SharedKernels, bad, code_address, immediate_bits, size_of,
    variable_align, variable_bytes,
};
use crate::memory::{Memory, SHARED_WINDOW};
use crate::program::Kernel;
use crate::ptx::ast::{Init, Module, Space, Statement, Variable};

/// Bytes of all variables of a module.
const MAX_VARIABLES: u64 = 1 << 30;

/// A module on a device.
#[derive(Default)]
pub struct Loaded {
    /// By name.
    pub kernels: HashMap<String, Arc<Kernel>>,
    /// The `.global` and `.const` variables: name, address and bytes.
    pub variables: HashMap<String, (u64, u64)>,
}

/// A module to be loaded any number of times, onto any devices: its kernels are lowered once,
/// except for those that name its variables, which lie elsewhere each time.
pub struct Program {
    module: Module,
    shared: Mutex<SharedKernels>,
}

impl Program {
    /// Of a parsed module.
    pub fn new(module: Module) -> Self {
        Self {
            module,
            shared: Mutex::default(),
        }
    }

    /// The module.
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// Loads it onto a device.
    pub fn load(&self, memory: &mut Memory, device: u32) -> Result<Loaded, LoadError> {
        // What a panic leaves behind is whole: kernels are added one by one.
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        load_with(&self.module, memory, device, &|_| None, &mut shared)
    }
}

/// Loads a module onto a device. `registers` is as for
/// [`lower_module`](lowering::lower_module).
pub fn load(
    module: &Module,
    memory: &mut Memory,
    device: u32,
    registers: &dyn Fn(&str) -> Option<u32>,
) -> Result<Loaded, LoadError> {
    load_with(module, memory, device, registers, &mut SharedKernels::new())
}

fn load_with(
    module: &Module,
    memory: &mut Memory,
    device: u32,
    registers: &dyn Fn(&str) -> Option<u32>,
    shared: &mut SharedKernels,
) -> Result<Loaded, LoadError> {
    let mut loaded = Loaded::default();
    let result = fill(&mut loaded, module, memory, device, registers, shared);
    if let Err(error) = result {
        unload(&loaded, memory);
        return Err(error);
    }
    Ok(loaded)
}

/// Frees a module's variables.
pub fn unload(loaded: &Loaded, memory: &mut Memory) {
    for &(address, _) in loaded.variables.values() {
        // The addresses came from `allocate`; there is nothing to be done if one is gone.
        let _ = memory.free(address);
    }
}

fn fill(
    loaded: &mut Loaded,
    module: &Module,
    memory: &mut Memory,
    device: u32,
    registers: &dyn Fn(&str) -> Option<u32>,
    shared: &mut SharedKernels,
) -> Result<(), LoadError> {
    let mut variables: Vec<&Variable> = module.variables.iter().collect();
    for function in &module.functions {
        collect(function.body.as_deref().unwrap_or_default(), &mut variables);
    }
    variables.retain(|v| matches!(v.space, Space::Global | Space::Const));
    let mut symbols = ModuleSymbols::default();
    let mut total = 0u64;
    for variable in &variables {
        let with_line = |message: String| LoadError {
            line: variable.line,
            ..bad(message)
        };
        let bytes = variable_bytes(variable).filter(|&b| b <= MAX_VARIABLES);
        let bytes = bytes.ok_or_else(|| with_line(format!("'{}' is too large", variable.name)))?;
        total += bytes;
        if total > MAX_VARIABLES {
            return Err(with_line("the module's variables are too large".to_owned()));
        }
        if loaded.variables.contains_key(&variable.name) {
            return Err(with_line(format!("'{}' is declared twice", variable.name)));
        }
        let align = variable_align(variable);
        let address = memory
            .allocate_variable(device, bytes.max(1), align, variable.space == Space::Const)
            .map_err(|e| with_line(e.0))?;
        loaded
            .variables
            .insert(variable.name.clone(), (address, bytes));
        symbols
            .variables
            .insert(variable.name.clone(), (variable.space, address));
    }
    for variable in &variables {
        let (address, bytes) = loaded.variables[&variable.name];
        let mut image = vec![0u8; bytes as usize];
        initialise(variable, module, &loaded.variables, &mut image).map_err(|e| LoadError {
            line: variable.line,
            ..e
        })?;
        memory.write_image(address, &image).map_err(|e| bad(e.0))?;
    }
    for kernel in lowering::lower_module(module, &symbols, registers, shared)? {
        loaded.kernels.insert(kernel.name.clone(), kernel);
    }
    Ok(())
}

fn collect<'a>(statements: &'a [Statement], variables: &mut Vec<&'a Variable>) {
    for statement in statements {
        match statement {
            Statement::Variable(variable) => variables.push(variable),
            Statement::Block(inner) => collect(inner, variables),
            _ => {}
        }
    }
}

fn initialise(
    variable: &Variable,
    module: &Module,
    variables: &HashMap<String, (u64, u64)>,
    image: &mut [u8],
) -> Result<(), LoadError> {
    let size = size_of(variable.ty) as usize;
    if variable.init.len() * size > image.len() {
        return Err(bad(format!(
            "'{}' has {} initial values in {} bytes",
            variable.name,
            variable.init.len(),
            image.len()
        )));
    }
    for (init, place) in variable
        .init
        .iter()
        .zip(image.chunks_exact_mut(size.max(1)))
    {
        let bits = match init {
            Init::Value(value) => immediate_bits(*value, variable.ty)?,
            Init::Address { name, offset, .. } => {
                if size != 8 {
                    return Err(bad(format!(
                        "the address of '{name}' needs 8 bytes, not {size}"
                    )));
                }
                let function = module
                    .functions
                    .iter()
                    .rposition(|f| f.name == *name && (f.body.is_some() || !f.entry));
                let shared = module
                    .variables
                    .iter()
                    .any(|v| v.name == *name && v.space == Space::Shared);
                let base = match (variables.get(name), function) {
                    (Some(&(address, _)), _) => address,
                    (None, Some(number)) => code_address(number),
                    (None, None) if shared => SHARED_WINDOW,
                    (None, None) => return Err(bad(format!("'{name}' is not declared"))),
                };
                base.wrapping_add(*offset as u64)
            }
        };
        place.copy_from_slice(&bits.to_le_bytes()[..size]);
    }
    Ok(())
}
