//! Prints the two limits that inference on a CPU runs into: reading memory (decode) and
//! multiply-adds (prefill).
//!
//! ```text
//! cargo bench --bench limits
//! ```

#[path = "common/limits.rs"]
mod limits;

fn main() {
    // `cargo test --benches` only sees whether it runs.
    let measure = std::env::args().any(|arg| arg == "--bench");
    // Beyond the caches of today's servers.
    let bytes: usize = if measure { 1 << 30 } else { 4 << 20 };
    for threads in [1, 2] {
        let read = limits::read_bandwidth(threads, bytes);
        println!(
            "read, {threads} thread(s), {} MiB in huge pages: {:7.2} GB/s ({})",
            bytes >> 20,
            read.giga_per_second,
            read.how
        );
        let fma = limits::fma_peak(threads);
        println!(
            "f32 FMA, {threads} thread(s), in registers: {:7.1} GFLOP/s ({})",
            fma.giga_per_second, fma.how
        );
    }
}
