//! Launches the kernel of `cuda/sampling.cu`.

use super::abi::{self, RecordRequest, RecordsParams};
use super::launch::Launch;
use super::module::{Family, Kernels};
use super::view::{Rows, count};
use super::{BUFFER_ALIGN, DevicePool, DeviceSliceMut, Stream};
use crate::backend::WantedRecord;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::llama::sampling::{Candidate, Record};
use crate::shard::VocabShard;

pub(super) const FAMILY: Family = Family {
    name: "sampling",
    kernels: &["sampling_records"],
};

/// What decides how much memory records take, on any of the ranks that gather them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RecordsSize {
    pub(crate) records: usize,
    /// Of all records of a rank.
    pub(crate) words: usize,
    /// Penalised and banned.
    pub(crate) ids: usize,
    /// Logits of the rows that have such ids, on the rank with most.
    pub(crate) edited: usize,
}

impl RecordsSize {
    /// Somewhat more than these need, so that not every new id of a list makes a size that was not
    /// seen before.
    pub(crate) fn of(wanted: &[WantedRecord<'_>], shard: &VocabShard) -> Self {
        let records = wanted.len().next_multiple_of(16);
        let words = words_of(wanted);
        let listed = |w: &WantedRecord<'_>| w.sample.penalized.len() + w.sample.banned.len();
        let ids: usize = wanted.iter().map(listed).sum();
        Self {
            records,
            words: words.next_power_of_two(),
            ids: ids.next_power_of_two(),
            edited: match ids {
                0 => 0,
                _ => records.saturating_mul(shard.padded_rows),
            },
        }
    }

    /// Words of no more requests and ids than these.
    pub(super) fn sent_at_most(&self) -> usize {
        let requests = self.records * size_of::<RecordRequest>() / size_of::<u32>();
        requests.saturating_add(self.ids)
    }

    /// No records of up to this size take more bytes, those that `ranks` ranks gather included.
    pub(super) fn bytes_at_most(&self, ranks: usize) -> usize {
        let words = self.words.saturating_mul(ranks + 2);
        let words = words.saturating_add(self.ids).saturating_add(self.edited);
        let requests = self.records * size_of::<RecordRequest>();
        words
            .saturating_mul(size_of::<u32>())
            .saturating_add(requests + 6 * BUFFER_ALIGN)
    }
}

/// The records from which ranks choose tokens together (see [`crate::llama::sampling`]), one after
/// another: of rows of `logits` in f32, this rank's part of the vocabulary from `first_id` on. The
/// words are those of the CPU's records. It waits for the logits; `pool` lends memory meanwhile.
///
/// # Errors
/// [`Error::Shape`] if the operands do not fit each other; memory; [`Error::Driver`].
pub fn sampling_records(
    kernels: &Kernels,
    stream: &Stream,
    pool: &DevicePool,
    logits: Rows<'_>,
    first_id: usize,
    wanted: &[WantedRecord<'_>],
) -> Result<Vec<u32>> {
    let mut records = vec![0; words_of(wanted)];
    let mut out = pool.buffer(size_of_val(records.as_slice()))?;
    let send = |words: &[u32], to: &mut DeviceSliceMut<'_>| stream.upload(words, to);
    put_records(
        kernels,
        stream,
        pool,
        logits,
        first_id,
        wanted,
        send,
        &mut out.as_mut(),
    )?;
    stream.download(out.as_ref(), &mut records)?;
    sort_lists(&mut records, wanted);
    Ok(records)
}

/// Words of all these records.
pub(crate) fn words_of(wanted: &[WantedRecord<'_>]) -> usize {
    wanted.iter().map(|wanted| wanted.record.words()).sum()
}

/// Puts the kernel into `stream` that leaves records in `out`, one after another, with lists of
/// candidates in any order: see [`sort_lists`]. `send` puts words into device memory.
#[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
pub(super) fn put_records(
    kernels: &Kernels,
    stream: &Stream,
    pool: &DevicePool,
    logits: Rows<'_>,
    first_id: usize,
    wanted: &[WantedRecord<'_>],
    send: impl FnOnce(&[u32], &mut DeviceSliceMut<'_>) -> Result<()>,
    out: &mut DeviceSliceMut<'_>,
) -> Result<()> {
    let layout = *logits.layout();
    if layout.dtype != DType::F32 {
        return Err(Error::shape(
            "records: logits",
            "f32 (as Backend::logits makes them)",
            layout.dtype,
        ));
    }
    if let Some(wanted) = wanted.iter().find(|wanted| wanted.row >= layout.rows) {
        let rows = format_args!("a row below {}", layout.rows).to_string();
        return Err(Error::shape("records: logits", rows, wanted.row));
    }
    let end = first_id.checked_add(layout.cols);
    if end.is_none_or(|end| end > u32::MAX as usize) {
        return Err(Error::shape(
            "records: ids of the logits",
            "below 2^32",
            format_args!("{} from {first_id} on", layout.cols),
        ));
    }
    if wanted.is_empty() {
        return Ok(());
    }

    let (mut requests, mut ids, mut words) = (Vec::new(), Vec::<u32>::new(), 0);
    let shard = first_id as u32..(first_id + layout.cols) as u32;
    for record in wanted {
        let mut listed = |list: &[u32]| {
            let start = ids.len();
            ids.extend(list.iter().filter(|id| shard.contains(id)));
            [start as u32, (ids.len() - start) as u32]
        };
        let row = record.sample;
        let no_penalty = row.repetition_penalty == 1.0;
        let penalized = listed(if no_penalty { &[] } else { &row.penalized });
        let banned = listed(&row.banned);
        let (kind, listed) = match record.record {
            Record::Best => (abi::kRecordBest, 0),
            Record::Drawn => (abi::kRecordDrawn, 0),
            Record::Candidates { count } => (abi::kRecordCandidates, count),
        };
        requests.push(RecordRequest {
            seed: row.seed,
            draw: row.draw,
            row: count("rows of logits", record.row, i32::MAX as u32)?,
            kind,
            count: count("candidates", listed, 1 << 28)?,
            wants_mass: Record::wants_mass(row).into(),
            temperature: row.temperature,
            penalty: row.repetition_penalty,
            penalized: penalized[0],
            penalized_count: penalized[1],
            banned: banned[0],
            banned_count: banned[1],
            out: count("words of records", words, i32::MAX as u32)?,
            words: count("words of a record", record.record.words(), i32::MAX as u32)?,
        });
        words += record.record.words();
    }
    let blocks = count("records", wanted.len(), i32::MAX as u32)?;
    if out.len() != words * size_of::<u32>() {
        let bytes = words * size_of::<u32>();
        return Err(Error::shape(
            "records: bytes of the output",
            bytes,
            out.len(),
        ));
    }
    let edited = if ids.is_empty() { 0 } else { wanted.len() };
    // Requests, then ids.
    let mut image: Vec<u32> = bytemuck::cast_slice(&image_of(&requests)).to_vec();
    let ids_at = size_of_val(image.as_slice()) as u64;
    image.extend(ids);
    let mut device_image = pool.buffer(size_of_val(image.as_slice()))?;
    send(&image, &mut device_image.as_mut())?;
    let edited = pool.buffer(edited * layout.cols * size_of::<f32>())?;
    let params = RecordsParams {
        logits: logits.address() as *const _,
        edited: edited.address() as *mut _,
        requests: device_image.address() as *const _,
        ids: (device_image.address() + ids_at) as *const _,
        out: out.address() as *mut _,
        stride: layout.stride as u64,
        cols: layout.cols as u32,
        first_id: shard.start,
    };
    let shape = Launch::linear(blocks, abi::kRecordThreads);
    // SAFETY: the rows are of the logits, the ids of the shard, and every record has its words of
    // the output and, where any has ids, its row of the copies. One block a record.
    unsafe { stream.launch(kernels.get("sampling_records")?, shape, &params) }
}

/// Puts the lists of candidates in `records`, those of one rank, into the order in which the CPU has
/// them: best first.
pub(super) fn sort_lists(records: &mut [u32], wanted: &[WantedRecord<'_>]) {
    let mut rest = records;
    for record in wanted {
        let (words, tail) = rest.split_at_mut(record.record.words());
        if let Record::Candidates { .. } = record.record {
            sort(&mut words[Record::CANDIDATES_AT..]);
        }
        rest = tail;
    }
}

/// Puts a list of candidates, which the kernel leaves in any order, best first.
fn sort(words: &mut [u32]) {
    let mut list: Vec<_> = words
        .as_chunks()
        .0
        .iter()
        .map(|&w| Candidate::from_words(w))
        .collect();
    list.sort_unstable();
    for (words, candidate) in words.as_chunks_mut().0.iter_mut().zip(list) {
        *words = candidate.to_words();
    }
}

/// The requests as words of 64 bits.
fn image_of(requests: &[RecordRequest]) -> Vec<u64> {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let words = |r: &RecordRequest| {
        [
            r.seed,
            r.draw,
            pair(r.row, r.kind),
            pair(r.count, r.wants_mass),
            pair(r.temperature.to_bits(), r.penalty.to_bits()),
            pair(r.penalized, r.penalized_count),
            pair(r.banned, r.banned_count),
            pair(r.out, r.words),
        ]
    };
    requests.iter().flat_map(words).collect()
}
