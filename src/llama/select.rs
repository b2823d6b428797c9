//! The next tokens of a step, chosen by all ranks together from sharded logits.

use super::SampleRow;
use super::sampling::{Choice, Record, choose};
use crate::backend::{Backend, WantedRecord};
use crate::comm::Communicator;
use crate::error::{Error, Result};
use crate::layers::{ParallelLmHead, Rank};

/// The token of each row of `logits` (this rank's part of the vocabulary); all ranks return the
/// same. Only records of candidates travel; a row whose filters reach further than its first
/// record is asked for a longer one.
///
/// # Errors
/// Another number of `rows` than the logits have; [`super::sampling::SamplingError`], the same on
/// all ranks, after which the group can go on; a communication failure.
pub fn select<B: Backend, C: Communicator<B>>(
    rank: &mut Rank<'_, B, C>,
    head: &ParallelLmHead<B>,
    logits: &B::Tensor,
    rows: &[SampleRow],
) -> Result<Vec<u32>> {
    let shard = head.shard();
    let record = |row| Record::first(row, shard.padded_rows);
    let mut open: Vec<_> = rows
        .iter()
        .enumerate()
        .map(|(row, sample)| WantedRecord {
            row,
            sample,
            record: record(sample),
        })
        .collect();
    let mut tokens = vec![0; rows.len()];
    while !open.is_empty() {
        let words: usize = open.iter().map(|wanted| wanted.record.words()).sum();
        let (backend, comm) = (&mut *rank.backend, &mut *rank.comm);
        let all = comm.gather_records(backend, logits, &shard, &open)?;
        let mut at = 0;
        let mut next = Vec::new();
        for wanted in open {
            let size = wanted.record.words();
            let gathered: Vec<_> = all
                .chunks_exact(words)
                .map(|words| &words[at..at + size])
                .collect();
            at += size;
            match choose(wanted.row, wanted.sample, wanted.record, &gathered)
                .map_err(Error::from)?
            {
                Choice::Token(token) => tokens[wanted.row] = token,
                Choice::More(record) => next.push(WantedRecord { record, ..wanted }),
            }
        }
        open = next;
    }
    Ok(tokens)
}
