//! Kernels: which functions each needs, and where its shared variables and parameters lie.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::function::lower_function;
use super::{LoadError, MAX_BYTES, layout_params, too_large, variable_align, variable_bytes};
use crate::program::{Kernel, KernelParam};
use crate::ptx::ast::{self, Operand, Space, Statement, Variable};

/// Where the module's variables and functions are, for one device.
#[derive(Debug, Clone, Default)]
pub struct ModuleSymbols {
    /// Generic addresses of `.global` and `.const` variables.
    pub variables: HashMap<String, (Space, u64)>,
}

/// Kernels that are the same wherever their module is loaded, because they name none of its
/// variables: by their number in the module.
pub type SharedKernels = BTreeMap<usize, Arc<Kernel>>;

/// Lowers all kernels of a module. `registers` gives the registers a thread of a kernel, where
/// machine code beside the PTX tells. Those in `shared` are taken from there, and those that can
/// be shared are left there.
pub fn lower_module(
    module: &ast::Module,
    symbols: &ModuleSymbols,
    registers: &dyn Fn(&str) -> Option<u32>,
    shared: &mut SharedKernels,
) -> Result<Vec<Arc<Kernel>>, LoadError> {
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
        if !function.entry || function.body.is_none() {
            continue;
        }
        if let Some(kernel) = shared.get(&number) {
            kernels.push(kernel.clone());
            continue;
        }
        let parts = parts(module, &functions, &address_taken, number);
        let names_variables = symbols
            .variables
            .keys()
            .any(|name| parts.named.contains(name.as_str()));
        let registers = registers(&function.name);
        let kernel = lower_kernel(module, symbols, &functions, &parts, registers)?;
        let kernel = Arc::new(kernel);
        if !names_variables {
            shared.insert(number, kernel.clone());
        }
        kernels.push(kernel);
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

/// What a kernel is made of.
struct Parts<'a> {
    /// The functions that may run, by number: the entry first.
    order: Vec<usize>,
    /// The names that stand in them.
    named: BTreeSet<&'a str>,
}

/// What may run: the entry, what it names, and whatever a table of functions holds.
fn parts<'a>(
    module: &'a ast::Module,
    functions: &HashMap<&str, usize>,
    address_taken: &BTreeSet<usize>,
    entry: usize,
) -> Parts<'a> {
    let mut order = vec![entry];
    let mut seen: BTreeSet<usize> = BTreeSet::from([entry]);
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
    Parts { order, named }
}

fn lower_kernel(
    module: &ast::Module,
    symbols: &ModuleSymbols,
    functions: &HashMap<&str, usize>,
    Parts { order, named }: &Parts,
    registers: Option<u32>,
) -> Result<Kernel, LoadError> {
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
        shared_end = shared_end.saturating_add(bytes);
        if shared_end > MAX_BYTES {
            return Err(too_large(v));
        }
        Ok(())
    };
    let of_module = module.variables.iter().filter(|v| v.space == Space::Shared);
    for variable in of_module.filter(|v| named.contains(v.name.as_str())) {
        place(None, variable)?;
    }
    for &number in order {
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
    for &number in order {
        lowered.push(lower_function(
            module,
            symbols,
            functions,
            &kernel_functions,
            &shared,
            number,
        )?);
    }

    let function = &module.functions[order[0]];
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
