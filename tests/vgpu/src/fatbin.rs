//! Fatbins: the container in which nvcc puts machine code and PTX for several architectures.
//!
//! A header (magic, version, header size, size of what follows), then entries, each with a header
//! of its own: what it is (1 PTX, 2 machine code), where the payload is, for which architecture,
//! how it is compressed. The layout is not documented; these fields are what nvcc 12 and 13
//! write.

use std::io::Read;

const MAGIC: u32 = 0xba55_ed50;
/// The wrapper that programs built with the CUDA runtime put around it.
const WRAPPER: u32 = 0x4662_43b1;
const HEADER: usize = 16;
const ZSTD: u64 = 0x8000;
const LZ4: u64 = 0x2000;
/// The largest text taken.
const MOST: usize = 256 << 20;

/// Why a fatbin cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FatbinError(pub String);

impl std::fmt::Display for FatbinError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FatbinError {}

fn bad(message: impl Into<String>) -> FatbinError {
    FatbinError(message.into())
}

/// Whether this begins like a fatbin (and not like text).
pub fn is_fatbin(image: &[u8]) -> bool {
    u32_at(image, 0) == Some(MAGIC)
}

/// Whether this begins like the wrapper of a fatbin, whose address is 8 bytes on.
pub fn is_wrapper(image: &[u8]) -> bool {
    u32_at(image, 0) == Some(WRAPPER)
}

/// Whether this begins like an ELF file: machine code and no PTX.
pub fn is_elf(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(field.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

/// Bytes of the whole fatbin, from its first 16.
pub fn size(header: &[u8]) -> Result<usize, FatbinError> {
    let short = || bad("a fatbin whose header is cut off");
    if u32_at(header, 0) != Some(MAGIC) {
        return Err(bad("no fatbin: its first word is not 0xba55ed50"));
    }
    let own = usize::from(u16_at(header, 6).ok_or_else(short)?);
    let rest = u64_at(header, 8).ok_or_else(short)?;
    usize::try_from(rest)
        .ok()
        .and_then(|rest| rest.checked_add(own))
        .filter(|&n| n <= MOST)
        .ok_or_else(|| bad(format!("a fatbin of {rest} bytes")))
}

/// One PTX text of a fatbin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// The architecture it was compiled for, 80, 90, ….
    pub arch: u32,
    /// The PTX.
    pub ptx: String,
}

/// The PTX texts of a fatbin.
pub fn texts(image: &[u8]) -> Result<Vec<Text>, FatbinError> {
    let end = size(image)?.min(image.len());
    let mut at = usize::from(u16_at(image, 6).ok_or_else(|| bad("a fatbin cut off"))?).max(HEADER);
    let mut texts = Vec::new();
    while at + 64 <= end {
        let entry = &image[at..end];
        let cut = || bad(format!("the fatbin's entry at byte {at} is cut off"));
        let kind = u16_at(entry, 0).ok_or_else(cut)?;
        let header = u32_at(entry, 4).ok_or_else(cut)? as usize;
        let payload = usize::try_from(u64_at(entry, 8).ok_or_else(cut)?).map_err(|_| cut())?;
        let compressed = u64_at(entry, 16).ok_or_else(cut)? as u32 as usize;
        let arch = u32_at(entry, 28).ok_or_else(cut)?;
        let flags = u64_at(entry, 40).ok_or_else(cut)?;
        let raw = usize::try_from(u64_at(entry, 56).ok_or_else(cut)?).map_err(|_| cut())?;
        let stop = header.checked_add(payload).ok_or_else(cut)?;
        let body = entry.get(header..stop).ok_or_else(cut)?;
        if kind == 1 {
            let text = unpack(body, compressed, flags, raw)
                .map_err(|e| bad(format!("the fatbin's entry at byte {at}: {e}")))?;
            // The text ends at the first zero.
            let len = text.iter().position(|&b| b == 0).unwrap_or(text.len());
            let ptx = String::from_utf8(text[..len].to_vec())
                .map_err(|_| bad(format!("the fatbin's entry at byte {at} is no text")))?;
            texts.push(Text { arch, ptx });
        }
        at += stop.max(64);
    }
    Ok(texts)
}

fn unpack(body: &[u8], compressed: usize, flags: u64, raw: usize) -> Result<Vec<u8>, String> {
    if flags & (ZSTD | LZ4) == 0 {
        return Ok(body.to_vec());
    }
    if raw > MOST {
        return Err(format!("{raw} bytes of PTX are more than {MOST}"));
    }
    let packed = match compressed {
        0 => body,
        n => body.get(..n).ok_or("its compressed text is cut off")?,
    };
    if flags & LZ4 != 0 {
        return lz4_flex::block::decompress(packed, raw).map_err(|e| format!("LZ4: {e}"));
    }
    let mut decoder =
        ruzstd::decoding::StreamingDecoder::new(packed).map_err(|e| format!("zstd: {e}"))?;
    let mut text = Vec::new();
    decoder
        .by_ref()
        .take(raw as u64)
        .read_to_end(&mut text)
        .map_err(|e| format!("zstd: {e}"))?;
    Ok(text)
}

/// The PTX to run on an architecture: the newest that it can run.
pub fn choose(mut texts: Vec<Text>, arch: u32) -> Result<Text, FatbinError> {
    let found: Vec<u32> = texts.iter().map(|t| t.arch).collect();
    texts.retain(|t| t.arch <= arch);
    texts.into_iter().max_by_key(|t| t.arch).ok_or_else(|| {
        bad(match found.as_slice() {
            [] => "the fatbin holds no PTX; compile with code=compute_XX as well".to_owned(),
            archs => format!("the fatbin holds PTX for {archs:?} only; the device is {arch}"),
        })
    })
}
