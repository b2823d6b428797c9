//! What memory the ranks of a model have, in words.

use indicatif::BinaryBytes;
use ringtp::generate::Llm;

/// A line for each rank.
pub(crate) fn lines(llm: &Llm) -> String {
    let line = |(rank, memory): (usize, &ringtp::backend::MemoryUse)| {
        let device = llm.devices().and_then(|devices| devices.get(rank));
        let place = device.map_or(String::new(), |device| format!(" (CUDA device {device})"));
        let kinds = memory.by_kind().into_iter().filter(|&(_, bytes)| bytes > 0);
        let kinds: Vec<_> = kinds
            .map(|(kind, bytes)| format!("{kind} {}", BinaryBytes(bytes as u64)))
            .collect();
        format!(
            "memory of rank {rank}{place}: {} = {}\n",
            kinds.join(" + "),
            BinaryBytes(memory.total() as u64)
        )
    };
    llm.memory().iter().enumerate().map(line).collect()
}
