//! From the syntax tree to kernels ready to run: scopes, registers, variables, labels and calls.
//! What each instruction does comes from `isa`.
//!
//! Every kernel gets its own copy of the functions it may call, because their shared variables
//! lie where the kernel's layout puts them.

mod function;
mod kernel;
mod modifiers;

use std::fmt;

pub use function::{Address, Base, Lowering, Symbol};
pub use kernel::{ModuleSymbols, SharedKernels, lower_module};
pub use modifiers::Modifiers;

use crate::ptx::ast::{Immediate, Type, Variable};

/// Generic addresses of functions: this plus 16 for each function of the module, in its order.
pub const CODE_WINDOW: u64 = 1 << 36;
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

/// The generic address of a function of the module.
pub fn code_address(number: usize) -> u64 {
    CODE_WINDOW + 16 * number as u64
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
