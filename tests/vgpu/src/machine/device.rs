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

    /// What a block of a kernel takes of a multiprocessor; None if it has not that much.
    pub(super) fn share(
        &self,
        kernel: &Kernel,
        threads: u32,
        dynamic_shared: u32,
    ) -> Option<Share> {
        if threads == 0 || threads > THREADS_PER_BLOCK {
            return None;
        }
        let warps = threads.div_ceil(32);
        // Registers are given to a warp in units of 256, shared memory in units of 128.
        let registers = kernel.registers.unwrap_or(DEFAULT_REGISTERS).max(1);
        let per_warp = (registers * 32).next_multiple_of(256);
        let shared = (kernel.dynamic_shared_at.max(kernel.static_shared) + SHARED_RESERVED)
            .saturating_add(dynamic_shared);
        let share = Share {
            registers: per_warp * warps,
            shared: shared.checked_next_multiple_of(128)?,
            threads: warps * 32,
            blocks: 1,
        };
        self.whole().fits(&share).then_some(share)
    }

    /// All of a multiprocessor.
    fn whole(&self) -> Share {
        Share {
            registers: self.registers_per_sm,
            shared: self.shared_per_sm,
            threads: self.threads_per_sm,
            blocks: self.blocks_per_sm,
        }
    }

    /// Blocks of a kernel that fit on one multiprocessor at once.
    pub fn resident_blocks(&self, kernel: &Kernel, threads: u32, dynamic_shared: u32) -> u32 {
        let Some(share) = self.share(kernel, threads, dynamic_shared) else {
            return 0;
        };
        self.blocks_per_sm
            .min(self.registers_per_sm / share.registers)
            .min(self.shared_per_sm / share.shared)
            .min(self.threads_per_sm / share.threads)
    }
}

/// Part of a multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    registers: u32,
    shared: u32,
    threads: u32,
    blocks: u32,
}

impl Share {
    fn fits(&self, part: &Share) -> bool {
        self.registers >= part.registers
            && self.shared >= part.shared
            && self.threads >= part.threads
            && self.blocks >= part.blocks
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
    /// What is left of each multiprocessor.
    free: Vec<Share>,
    /// Operations that warps have run on it.
    pub(super) operations: u64,
}

impl Device {
    /// Idle.
    pub(super) fn new(ordinal: u32, properties: Properties) -> Self {
        Self {
            ordinal,
            free: vec![properties.whole(); properties.multiprocessors as usize],
            properties,
            fault: None,
            operations: 0,
        }
    }

    /// How many more blocks like this fit beside what is there, whichever streams it is from;
    /// no more than `most` are counted.
    pub(super) fn room(&self, share: &Share, most: u64) -> u64 {
        let mut count = 0;
        for sm in &self.free {
            if count >= most {
                break;
            }
            let by = [
                sm.registers / share.registers,
                sm.shared / share.shared,
                sm.threads / share.threads,
                sm.blocks / share.blocks,
            ];
            count += u64::from(by.into_iter().min().unwrap_or(0));
        }
        count.min(most)
    }

    /// Puts a block on a multiprocessor, the first from `start` on that has room; its number.
    pub(super) fn occupy(&mut self, share: &Share, start: u64) -> Option<u32> {
        let n = self.free.len();
        let first = (start % n as u64) as usize;
        let sm = (first..n)
            .chain(0..first)
            .find(|&sm| self.free[sm].fits(share))?;
        let free = &mut self.free[sm];
        free.registers -= share.registers;
        free.shared -= share.shared;
        free.threads -= share.threads;
        free.blocks -= share.blocks;
        Some(sm as u32)
    }

    /// Takes a block off again.
    pub(super) fn vacate(&mut self, share: &Share, sm: u32) {
        let free = &mut self.free[sm as usize];
        free.registers += share.registers;
        free.shared += share.shared;
        free.threads += share.threads;
        free.blocks += share.blocks;
    }
}
