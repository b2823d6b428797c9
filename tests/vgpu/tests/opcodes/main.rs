//! Every opcode against what the PTX ISA says it does, computed independently: integers in 128
//! bits, floating point by a soft-float library, the rest by loops over bits.
//!
//! Operands are edge cases in all combinations, and random ones from a fixed seed. Unary
//! operations on 16 bits run through all operands.

/// The tests of a file: each runs by itself, and the inventory wants to know what they run.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub(crate) const TESTS: &[fn()] = &[$($name),*];

        mod each {
            $(
                #[test]
                fn $name() {
                    super::$name();
                }
            )*
        }
    };
}

mod approximation;
mod atomic;
mod barrier;
mod bench;
mod control;
mod conversion;
mod floating;
mod integer;
mod inventory;
mod logic;
mod memory;
mod special;
mod system;
mod undefined;
mod warp;

/// All tests that run instructions.
const EVERY_TEST: &[&[fn()]] = &[
    approximation::TESTS,
    atomic::TESTS,
    barrier::TESTS,
    control::TESTS,
    conversion::TESTS,
    floating::TESTS,
    integer::TESTS,
    logic::TESTS,
    memory::TESTS,
    special::TESTS,
    system::TESTS,
    undefined::TESTS,
    warp::TESTS,
];
