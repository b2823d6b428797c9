//! What the tests of whole models share: the fixtures, groups on them, SPMD ranks, bits.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use ringtp::checkpoint::Checkpoint;
use ringtp::comm::{self, TensorComm};
use ringtp::llama::{Batch, Group, GroupOptions};

pub(crate) type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The directory of a fixture.
pub(crate) fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    match name {
        "austen" => fixtures.join(name),
        _ => fixtures.join("llama").join(name),
    }
}

pub(crate) fn open(name: &str) -> ringtp::Result<Arc<Checkpoint>> {
    Checkpoint::open(fixture(name)).map(Arc::new)
}

pub(crate) fn load(name: &str, options: GroupOptions) -> ringtp::Result<Group> {
    Group::load(open(name)?, options)
}

/// `count` ids of a vocabulary, spread over it; another `start` gives others.
pub(crate) fn some_ids(vocab_size: usize, start: usize, count: usize) -> Vec<u32> {
    (0..count)
        .map(|i| ((start + i) * 7919 % vocab_size) as u32)
        .collect()
}

/// A batch of one sequence's `ids` from `position`, the logits of all its rows wanted.
pub(crate) fn batch(ids: &[u32], position: usize, prompt_len: usize, table: &[u32]) -> Batch {
    let mut batch = Batch::new();
    let rows = batch.push(ids, position as u32, prompt_len as u32, table);
    batch.logits_rows = rows.collect();
    batch
}

/// Bits, so that equal means equal, -0 and NaN included.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Runs `body` as an engine of ranks would: one thread a rank, which owns its end of the
/// group. A panic of `body` unwinds through it; then the rank's result is `None`.
pub(crate) fn spmd<R: Send>(
    tp: usize,
    options: comm::GroupOptions,
    body: impl Fn(TensorComm) -> R + Sync,
) -> ringtp::Result<Vec<Option<R>>> {
    let (_group, comms) = comm::Group::new(tp, options)?;
    let body = &body;
    Ok(thread::scope(|scope| {
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| scope.spawn(move || body(TensorComm::new(comm))))
            .collect();
        threads.into_iter().map(|t| t.join().ok()).collect()
    }))
}
