//! The syntax tree of a PTX module.

use std::sync::Arc;

/// A whole translation unit.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Module {
    /// `.version 9.5` is `(9, 5)`.
    pub version: (u32, u32),
    /// The number in `.target sm_90a`: 90.
    pub arch: u32,
    /// What follows the number (`a`, `f`) or nothing.
    pub arch_suffix: String,
    /// `.file` entries: index and path.
    pub files: Vec<(u32, String)>,
    /// `.global`, `.const`, `.shared` and `.extern .shared` variables at module scope.
    pub variables: Vec<Variable>,
    /// Kernels and functions, declarations (without a body) included, in order.
    pub functions: Vec<Function>,
}

/// A state space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Space {
    Reg,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// A fundamental type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    BF16,
    BF16x2,
    F32,
    F64,
}

/// How a name is seen by other modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub enum Linkage {
    #[default]
    Internal,
    Visible,
    Extern,
    Weak,
    Common,
}

/// A declared variable: `.shared .align 16 .b8 name[1024];`
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    /// Where it lives.
    pub space: Space,
    /// See [`Linkage`].
    pub linkage: Linkage,
    /// `.align n`; otherwise the natural alignment of the type times the vector.
    pub align: Option<u32>,
    /// Element type.
    pub ty: Type,
    /// 1, or 2 or 4 for `.v2`, `.v4`.
    pub vector: u32,
    /// For `%r<5>`, the stem `%r`; see `count`.
    pub name: String,
    /// `Some(5)` for `%r<5>`: the names `%r0` to `%r4`.
    pub count: Option<u32>,
    /// Array dimensions; `[]` is 0, whose size comes from the initialiser or the launch.
    pub dims: Vec<u64>,
    /// Flattened initialiser, row by row; shorter than the array means zeros after it.
    pub init: Vec<Init>,
    /// Line in the PTX text, from 1.
    pub line: u32,
}

/// One element of an initialiser.
#[derive(Debug, Clone, PartialEq)]
pub enum Init {
    /// A literal.
    Value(Immediate),
    /// The address of a name, `generic(name)+8` or `name+8`, with `mask(…)` refused.
    Address {
        /// The variable or function.
        name: String,
        /// Whether `generic()` stood around it.
        generic: bool,
        /// Bytes added.
        offset: i64,
    },
}

/// A literal operand.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Immediate {
    /// An integer (decimal, hex, octal, binary, with its sign), as 64 bits of two's complement.
    Int(u64),
    /// `0fXXXXXXXX`: the bits of an f32.
    F32(u32),
    /// `0dXXXXXXXXXXXXXXXX` or a decimal literal such as `0.5`, `1e3`.
    F64(f64),
}

/// A kernel or a function.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// `.entry` rather than `.func`.
    pub entry: bool,
    /// See [`Linkage`].
    pub linkage: Linkage,
    /// The (mangled) name.
    pub name: String,
    /// Return parameters.
    pub returns: Vec<Variable>,
    /// Parameters.
    pub params: Vec<Variable>,
    /// `.maxntid 256, 1, 1` as `("maxntid", [256, 1, 1])`; `.noreturn` as `("noreturn", [])`.
    pub directives: Vec<(String, Vec<u64>)>,
    /// None for a declaration.
    pub body: Option<Vec<Statement>>,
    /// Line in the PTX text, from 1.
    pub line: u32,
}

/// What stands between the braces of a body.
#[derive(Debug, Clone, PartialEq)]
pub enum Statement {
    /// A declaration, visible to the end of the block.
    Variable(Variable),
    /// `name:`
    Label(String),
    /// `name: .branchtargets a, b, c;`
    BranchTargets(String, Vec<String>),
    /// `name: .callprototype (.param .b32 _) _ (.param .b64 _);`
    CallPrototype(String, Vec<Variable>, Vec<Variable>),
    /// An instruction.
    Instruction(Instruction),
    /// `{ … }`, a scope of its own for registers and labels.
    Block(Vec<Statement>),
}

/// `@!%p1 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+16];`
#[derive(Debug, Clone, PartialEq)]
pub struct Instruction {
    /// The guarding predicate.
    pub guard: Option<Guard>,
    /// `ld`
    pub opcode: String,
    /// `["global", "v4", "u32"]`, in the order of the text; `L2::128B` is one modifier.
    pub modifiers: Vec<String>,
    /// In the order of the text.
    pub operands: Vec<Operand>,
    /// Line in the PTX text, from 1.
    pub line: u32,
    /// From the last `.loc` before it in this body.
    pub location: Option<Arc<Location>>,
}

/// `@%p` or `@!%p`.
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    /// `@!`
    pub negated: bool,
    /// The predicate register.
    pub register: String,
}

/// A place in the CUDA source, from `.loc`.
#[derive(Debug, Clone, PartialEq)]
pub struct Location {
    /// Index into [`Module::files`].
    pub file: u32,
    /// From 1.
    pub line: u32,
    /// From 1.
    pub column: u32,
    /// `inlined_at`: the place of the call this line was inlined into.
    pub inlined_at: Option<Arc<Location>>,
}

/// An operand.
#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    /// A register, label, variable, function or special register (`%tid.x` with its dot).
    Name(String),
    /// `!%p`
    Not(String),
    /// A literal.
    Immediate(Immediate),
    /// `name+8` outside brackets, as in `mov.u64 %rd1, array+8`.
    NameOffset(String, i64),
    /// `[%rd1+16]`, `[name]`, `[name+%r1]` is refused; `[123]` has no base.
    Address {
        /// Register or variable.
        base: Option<String>,
        /// Bytes added.
        offset: i64,
    },
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `%r|%p`: two destinations.
    Pair(Box<Operand>, Box<Operand>),
    /// `_`
    Sink,
    /// `(a, b)` of a call; may be empty.
    List(Vec<Operand>),
}
