//! What an operation costs at the least, from its shapes: what a measured time is held against.

/// The floor of an operation: no kernel moves fewer bytes or does fewer operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes of device memory, each input read once and each output written once.
    pub bytes: u64,
    /// Floating-point operations, a fused one counted as two.
    pub flops: u64,
}
