//! What is wrong with a safetensors file that its parser refused, tensor by tensor.

use std::cmp::Ordering;

use safetensors::{Dtype, SafeTensorError};
use serde_json::{Map, Value};

use super::json::{brief, parse_object};
use crate::error::Fault;

const LENGTH: usize = size_of::<u64>();
const AGAIN: &str = "fetch the file again: it is damaged or incomplete";
/// A file with more defects is damaged as a whole; the rest are counted.
const MAX_FAULTS: usize = 16;

/// Longer headers, which safetensors allows up to 100 MB, are taken for damage: the parser
/// would spend seconds and gigabytes on them. This holds some 30000 tensors.
const MAX_HEADER: u64 = 1 << 22;

/// The fault of a file whose first bytes claim a header that is not worth reading.
pub(super) fn huge_header(name: &str, bytes: &[u8]) -> Option<Fault> {
    let (length, _) = bytes.split_first_chunk::<LENGTH>()?;
    let length = u64::from_le_bytes(*length);
    (length > MAX_HEADER).then(|| {
        Fault::new(
            name,
            format_args!("a header of at most {MAX_HEADER} bytes"),
            format_args!("one that claims {length}"),
            "fetch the file again: it is damaged or no safetensors file",
        )
    })
}

/// The faults of file `name` with content `bytes`, which the parser refused with `error`.
pub(super) fn faults(name: &str, bytes: &[u8], error: &SafeTensorError) -> Vec<Fault> {
    let header = match header(name, bytes) {
        Ok(header) => header,
        Err(fault) => return vec![fault],
    };
    let data = bytes.len() - LENGTH - header.len();
    let mut faults = Vec::new();
    let map = match std::str::from_utf8(header) {
        Err(error) => Err(Fault::new("header", "UTF-8 text", error, AGAIN)),
        Ok(text) => parse_object(text),
    };
    match map {
        Err(mut fault) => {
            fault.what = format!("{name}: header: {}", fault.what);
            faults.push(fault);
        }
        Ok(map) => tensors(name, &map, data, &mut faults),
    }
    if faults.is_empty() {
        faults.push(Fault::new(name, "a valid safetensors file", error, AGAIN));
    }
    if faults.len() > MAX_FAULTS {
        let more = faults.split_off(MAX_FAULTS - 1).len();
        let found = format!("{more} more defects of its tensors");
        faults.push(Fault::new(name, "none", found, AGAIN));
    }
    faults
}

/// The bytes of the header.
fn header<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a [u8], Fault> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH>() else {
        return Err(Fault::new(
            name,
            "a safetensors file: the length of the header in 8 bytes, the header, the tensors",
            format_args!("{} bytes", bytes.len()),
            AGAIN,
        ));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|n| rest.get(..n));
    header.ok_or_else(|| {
        Fault::new(
            name,
            format_args!("a header of {length} bytes, as its first 8 bytes say"),
            format_args!("a file of {} bytes", bytes.len()),
            AGAIN,
        )
    })
}

/// The faults of the tensors of a header over `data` bytes.
fn tensors(file: &str, map: &Map<String, Value>, data: usize, faults: &mut Vec<Fault>) {
    let mut places = Vec::new();
    for (name, entry) in map.iter().filter(|(name, _)| *name != "__metadata__") {
        match place(entry) {
            Ok((start, end)) => places.push((start, end, name)),
            Err((expected, found)) => {
                faults.push(Fault::new(
                    format_args!("{file}: {name}"),
                    expected,
                    found,
                    AGAIN,
                ));
            }
        }
    }
    if !faults.is_empty() {
        return;
    }
    places.sort_unstable();
    let mut at = 0;
    let mut last = "the header";
    for (start, end, name) in places {
        let what = format!("{file}: {name}");
        if end > data as u64 {
            let expected = format!("offsets within the {data} bytes of data");
            faults.push(Fault::new(
                &what,
                expected,
                format!("[{start}, {end}]"),
                AGAIN,
            ));
        }
        let relation = match start.cmp(&at) {
            Ordering::Less => Some("an overlap with"),
            Ordering::Greater => Some("a gap after"),
            Ordering::Equal => None,
        };
        if let Some(relation) = relation {
            let expected = format!("offsets from {at}, where {last} ends");
            let found = format!("[{start}, {end}], {relation} it");
            faults.push(Fault::new(&what, expected, found, AGAIN));
        }
        (at, last) = (end, name);
    }
    if faults.is_empty() && at != data as u64 {
        let expected = format!("{at} bytes of data, as the header says");
        let found = format!("{data} bytes");
        faults.push(Fault::new(file, expected, found, AGAIN));
    }
}

/// The offsets of a tensor that is right in itself, or what was expected and found.
fn place(entry: &Value) -> Result<(u64, u64), (String, String)> {
    let field = |name: &str| entry.get(name).unwrap_or(&Value::Null);
    let numbers = |name: &str| -> Option<Vec<u64>> {
        let list = field(name).as_array()?;
        list.iter().map(Value::as_u64).collect()
    };
    let wrong = |name: &str, expected: &str| (format!("{expected} as {name}"), brief(field(name)));
    let dtype: Dtype = serde_json::from_value(field("dtype").clone())
        .map_err(|_| wrong("dtype", "a known element type"))?;
    let shape = numbers("shape").ok_or_else(|| wrong("shape", "a list of sizes"))?;
    let offsets = numbers("data_offsets").filter(|list| list.len() == 2 && list[0] <= list[1]);
    let Some(&[start, end]) = offsets.as_deref() else {
        let found = match field("data_offsets") {
            Value::Array(list) => Value::Array(list.iter().take(4).cloned().collect()).to_string(),
            other => brief(other),
        };
        return Err(("a start and an end as data_offsets".into(), found));
    };
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |bits, &n| bits.checked_mul(n));
    match bits {
        Some(bits) if bits == (end - start).saturating_mul(8) => Ok((start, end)),
        Some(bits) => Err((
            format!("{} bytes for shape {shape:?} of {dtype}", bits / 8),
            format!("{} bytes", end - start),
        )),
        None => Err((
            "a shape that can be in memory".into(),
            format!("{shape:?} of {dtype}"),
        )),
    }
}
