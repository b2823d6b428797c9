//! `ringtp logits`.

use std::fs::{self, File};
use std::io::{BufWriter, Write, stderr, stdout};
use std::path::{Path, PathBuf};

use ringtp::Error;
use ringtp::generate::{Prompt, SamplingParams};
use ringtp::llama::{Batch, Group};
use serde_json::json;

use crate::Failure;
use crate::args::LogitsArgs;
use crate::progress::LoadBar;

/// Bytes of logits that one step may return.
const STEP_BYTES: usize = 64 << 20;

pub(crate) fn logits(args: &LogitsArgs) -> Result<(), Failure> {
    let ids = &args.ids.0;
    let builder = args
        .model
        .builder()
        .max_batch_tokens(args.max_batch_tokens)
        .num_blocks(ids.len().div_ceil(BLOCK_SIZE).max(1));
    let (bar, builder) = LoadBar::new(builder);
    let model = builder.open()?;
    model.requests(&[(Prompt::Ids(ids.clone()), SamplingParams::greedy())])?;
    // Found out now rather than after the work.
    let mut out = WholeFile::create(&args.out)?;
    let mut llm = bar.load(model, args.model.ranks())?;

    let vocab_size = llm.limits().vocab_size;
    let header = header(ids.len(), vocab_size);
    out.write(&header)?;
    let rows = (STEP_BYTES / (4 * vocab_size)).clamp(1, args.max_batch_tokens);
    for start in (0..ids.len()).step_by(rows) {
        let end = ids.len().min(start + rows);
        let logits = forward(llm.group(), ids, start..end)?;
        for row in logits.chunks(vocab_size) {
            let bytes: Vec<u8> = row.iter().flat_map(|logit| logit.to_le_bytes()).collect();
            out.write(&bytes)?;
        }
    }
    out.finish()?;
    let bytes = header.len() + ids.len() * vocab_size * 4;
    let report = match args.json {
        true => json!({
            "out": args.out.display().to_string(),
            "tensor": "logits",
            "dtype": "F32",
            "shape": [ids.len(), vocab_size],
            "bytes": bytes,
            "tp": args.model.ranks(),
        })
        .to_string(),
        false => format!(
            "{}: logits f32 [{}, {vocab_size}], {bytes} bytes",
            args.out.display(),
            ids.len(),
        ),
    };
    writeln!(stdout(), "{report}")?;
    // The file is there; nobody to tell if this cannot be.
    let _ = stderr().write_all(crate::memory::lines(&llm).as_bytes());
    Ok(())
}

/// Positions in a block of the cache: the group's default.
const BLOCK_SIZE: usize = 16;

/// The logits of positions `rows` of `ids`, all earlier ones being in the cache.
fn forward(
    group: &mut Group,
    ids: &[u32],
    rows: std::ops::Range<usize>,
) -> ringtp::Result<Vec<f32>> {
    let limits = group.limits();
    let blocks: Vec<u32> = (0..rows.end.div_ceil(limits.block_size) as u32).collect();
    let mut batch = Batch::new();
    let all = batch.push(
        &ids[rows.clone()],
        rows.start as u32,
        ids.len() as u32,
        &blocks,
    );
    batch.logits_rows = all.collect();
    group.forward(&batch)
}

/// The beginning of a safetensors file with one f32 tensor `logits` `[rows, cols]`.
fn header(rows: usize, cols: usize) -> Vec<u8> {
    let entry = json!({
        "logits": {
            "dtype": "F32",
            "shape": [rows, cols],
            "data_offsets": [0, rows * cols * 4],
        }
    });
    let mut text = entry.to_string().into_bytes();
    // The data begins at a multiple of eight.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

/// A file that appears under its name when it is whole, and not at all before. A symbolic link
/// stays one. What is no regular file (a pipe, /dev/null) is written to, not replaced.
struct WholeFile {
    path: PathBuf,
    temporary: Option<PathBuf>,
    writer: Option<BufWriter<File>>,
}

impl WholeFile {
    fn create(path: &Path) -> ringtp::Result<Self> {
        if path.file_name().is_none() {
            return Err(Error::input(
                "--out",
                "the name of a file",
                format_args!("{:?}", path.display().to_string()),
                "name a file to write",
            ));
        }
        if path.is_dir() {
            return Err(Error::input(
                format_args!("--out {}", path.display()),
                "the name of a file",
                "a directory",
                "name a file in it",
            ));
        }
        let direct = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let temporary = match direct {
            true => None,
            false => Some(target.with_file_name(format!(".ringtp-{}.tmp", std::process::id()))),
        };
        let file = File::create(temporary.as_ref().unwrap_or(&target))
            .map_err(|error| Error::io(path, "write", &error))?;
        Ok(Self {
            path: target,
            temporary,
            writer: Some(BufWriter::new(file)),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> ringtp::Result<()> {
        match &mut self.writer {
            Some(writer) => writer
                .write_all(bytes)
                .map_err(|error| Error::io(&self.path, "write", &error)),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> ringtp::Result<()> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let closed = writer.into_inner().map_err(|error| error.into_error());
        let renamed = closed.and_then(|file| {
            drop(file);
            match &self.temporary {
                Some(temporary) => fs::rename(temporary, &self.path),
                None => Ok(()),
            }
        });
        renamed.map_err(|error| {
            self.discard();
            Error::io(&self.path, "write", &error)
        })
    }
}

impl WholeFile {
    fn discard(&self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            self.discard();
        }
    }
}
