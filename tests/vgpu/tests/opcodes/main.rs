//! Every opcode against what the PTX ISA says it does, computed independently: integers in 128
//! bits, floating point by a soft-float library, the rest by loops over bits.
//!
//! Operands are edge cases in all combinations, and random ones from a fixed seed. Unary
//! operations on 16 bits run through all operands.

mod bench;
mod conversion;
mod floating;
mod integer;
mod logic;
