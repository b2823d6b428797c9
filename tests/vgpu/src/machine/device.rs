//! What a device is like: the limits of a real chip of its architecture, so that occupancy,
//! residency and refusals are those of the chip.

use crate::finding::Fault;
use crate::program::Kernel;

/// Limits of a chip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// The name the driver gives.
    pub name: String,
    /// Compute capability, `(9, 0)`.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Resident threads of a multiprocessor.
    pub threads_per_sm: u32,
    /// Resident blocks of a multiprocessor.
    pub blocks_per_sm: u32,
    /// Registers of a multiprocessor, and the most a block may have.
    pub registers_per_sm: u32,
    /// Shared memory of a multiprocessor in bytes.
    pub shared_per_sm: u32,
    /// Shared memory a block may have after asking for it with the function attribute.
    pub shared_per_block_optin: u32,
    /// Device memory in bytes, as reported.
    pub memory: u64,
}

/// Shared memory a block may have without asking.
pub const SHARED_PER_BLOCK: u32 = 48 << 10;
/// Shared memory the driver keeps for itself in every block (compute capability 8.0 on).
pub(super) const SHARED_RESERVED: u32 = 1 << 10;
/// Threads a block may have.
pub const THREADS_PER_BLOCK: u32 = 1024;
/// Registers a thread is taken to have where no machine code tells.
pub(super) const DEFAULT_REGISTERS: u32 = 64;

impl Properties {
    /// Of the chip with this compute capability (CUDA C++ Programming Guide, "Technical
    /// Specifications per Compute Capability"; multiprocessors of the products named). An
    /// architecture between two takes the one below.
    pub fn of(arch: u32) -> Self {
        let (name, sms, threads, blocks, shared, optin, memory) = match arch {
            ..=89 => ("A100", 108, 2048, 32, 167_936, 166_912, 40u64 << 30),
            90..=99 => ("H100", 132, 2048, 32, 233_472, 232_448, 80 << 30),
            100..=119 => ("B200", 148, 2048, 32, 233_472, 232_448, 180 << 30),
            _ => ("RTX 5090", 170, 1536, 24, 102_400, 101_376, 32 << 30),
        };
        Self {
            name: format!("Virtual GPU (like {name})"),
            capability: (arch / 10, arch % 10),
            multiprocessors: sms,
            threads_per_sm: threads,
            blocks_per_sm: blocks,
            registers_per_sm: 65_536,
            shared_per_sm: shared,
            shared_per_block_optin: optin,
            memory,
        }
    }

    /// Blocks of a kernel that fit on one multiprocessor at once.
    pub fn resident_blocks(&self, kernel: &Kernel, threads: u32, dynamic_shared: u32) -> u32 {
        if threads == 0 || threads > THREADS_PER_BLOCK {
            return 0;
        }
        let warps = threads.div_ceil(32);
        // Registers are given to a warp in units of 256.
        let registers = kernel.registers.unwrap_or(DEFAULT_REGISTERS).max(1);
        let per_warp = (registers * 32).next_multiple_of(256);
        let by_registers = self.registers_per_sm / (per_warp * warps);
        let shared = (kernel.dynamic_shared_at.max(kernel.static_shared) + SHARED_RESERVED)
            .saturating_add(dynamic_shared);
        let by_shared = self.shared_per_sm / shared.next_multiple_of(128);
        let by_threads = self.threads_per_sm / (warps * 32);
        self.blocks_per_sm
            .min(by_registers)
            .min(by_shared)
            .min(by_threads)
    }
}

/// A device of the machine.
#[derive(Debug)]
pub struct Device {
    /// Its number.
    pub ordinal: u32,
    /// What it is like.
    pub properties: Properties,
    /// What ended its context, until that is reset.
    pub fault: Option<Fault>,
}
