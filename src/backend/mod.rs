//! What computes: one module a kind of device.

pub mod cpu;
