//! Reading JSON objects field by field, so that every defect is reported and names its field.

use std::cell::RefCell;
use std::fmt;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Fault;

/// Larger sizes are taken for damage: nothing may allocate by them.
pub(super) const MAX_SIZE: usize = 1 << 24;

/// The text of file `path`, `None` where there is no such file.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<Option<String>, Fault> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unreadable = |found: &dyn fmt::Display| {
        Fault::new(
            &name,
            "a readable file",
            found,
            "check the path and its permissions",
        )
    };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(&error)),
    };
    // Opening a pipe would wait for its writer.
    if !metadata.is_file() {
        return Err(unreadable(&"something that is not a file"));
    }
    let too_long = |length: u64| {
        Fault::new(
            &name,
            format_args!("at most {limit} bytes"),
            format_args!("{length} bytes"),
            "check that it is the file it is named after",
        )
    };
    if metadata.len() > limit {
        return Err(too_long(metadata.len()));
    }
    let mut bytes = Vec::new();
    // It may grow, or not know its length.
    fs::File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|error| unreadable(&error))?;
    if bytes.len() as u64 > limit {
        return Err(too_long(bytes.len() as u64));
    }
    String::from_utf8(bytes).map(Some).map_err(|error| {
        Fault::new(
            &name,
            "UTF-8 text",
            error.utf8_error(),
            "fetch the file again: it is damaged",
        )
    })
}

/// The object that `text` is.
pub(super) fn parse_object(text: &str) -> Result<Map<String, Value>, Fault> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(Fault::new(
            "JSON",
            "an object",
            brief(&other),
            "check that it is the file it is named after",
        )),
        Err(error) => {
            let line = text.lines().nth(error.line().saturating_sub(1));
            let near = excerpt(line.unwrap_or_default(), error.column());
            let remedy = if ["NaN", "Infinity"].iter().any(|word| near.contains(word)) {
                "JSON has neither NaN nor Infinity: write a finite number"
            } else if error.to_string().starts_with("number out of range") {
                "write a finite number"
            } else {
                "correct the file or fetch it again"
            };
            let found = format!("{error}, near `{near}`");
            Err(Fault::new("JSON", "a valid object", found, remedy))
        }
    }
}

/// The text around column `column` of a line.
fn excerpt(line: &str, column: usize) -> String {
    let end = line.len().min(column.saturating_add(16));
    let start = end.min(column.saturating_sub(48));
    let text = String::from_utf8_lossy(&line.as_bytes()[start..end]);
    text.trim().to_string()
}

/// `value` on one short line.
pub(super) fn brief(value: &Value) -> String {
    let text = match value {
        Value::Array(list) => return format!("a list of {}", list.len()),
        Value::Object(map) => return format!("an object of {} fields", map.len()),
        other => other.to_string(),
    };
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// An object whose fields are taken one by one; what is wrong with them is collected.
///
/// `null` counts as absent, as everywhere in transformers.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: String,
    faults: &'a RefCell<Vec<Fault>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, faults: &'a RefCell<Vec<Fault>>) -> Self {
        Self {
            map,
            prefix: String::new(),
            faults,
        }
    }

    /// The fields of the object `name`; `None` where it is absent, empty or no object.
    pub(super) fn object(&self, name: &str) -> Option<Fields<'a>> {
        match self.get(name)? {
            Value::Object(map) if map.is_empty() => None,
            Value::Object(map) => Some(Fields {
                map,
                prefix: format!("{}{name}.", self.prefix),
                faults: self.faults,
            }),
            other => {
                self.fault(name, "an object or null", brief(other), "correct it");
                None
            }
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    pub(super) fn fault(
        &self,
        name: &str,
        expected: impl fmt::Display,
        found: impl fmt::Display,
        remedy: impl fmt::Display,
    ) {
        let what = format!("{}{name}", self.prefix);
        self.faults
            .borrow_mut()
            .push(Fault::new(what, expected, found, remedy));
    }

    /// A field without which the model cannot be built.
    pub(super) fn required(&self, name: &str) {
        self.fault(
            name,
            "a value",
            "none",
            "add the field as the model's author has it",
        );
    }

    /// A whole number in `1..=max`; `None` where it is absent, or wrong and reported.
    pub(super) fn size(&self, name: &str, max: usize) -> Option<usize> {
        let value = self.get(name)?;
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
        let size = size.filter(|n| (1..=max).contains(n));
        if size.is_none() {
            let expected = format!("a whole number from 1 to {max}");
            self.fault(name, expected, brief(value), "correct the number");
        }
        size
    }

    /// A size that must be there.
    pub(super) fn required_size(&self, name: &str, max: usize) -> Option<usize> {
        if self.get(name).is_none() {
            self.required(name);
        }
        self.size(name, max)
    }

    /// A finite number of which `holds` is true; `expected` says what that means.
    pub(super) fn number(
        &self,
        name: &str,
        expected: &str,
        holds: impl Fn(f64) -> bool,
    ) -> Option<f64> {
        let value = self.get(name)?;
        let number = value.as_f64().filter(|&n| n.is_finite() && holds(n));
        if number.is_none() {
            self.fault(name, expected, brief(value), "correct the number");
        }
        number
    }

    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        let value = self.get(name)?;
        if value.as_bool().is_none() {
            self.fault(name, "true or false", brief(value), "correct it");
        }
        value.as_bool()
    }

    pub(super) fn text(&self, name: &str) -> Option<&'a str> {
        let value = self.get(name)?;
        if value.as_str().is_none() {
            self.fault(name, "a string", brief(value), "correct it");
        }
        value.as_str()
    }

    /// One token id or a list of them, each below `vocab_size`.
    pub(super) fn ids(&self, name: &str, vocab_size: Option<usize>) -> Option<Vec<u32>> {
        let value = self.get(name)?;
        let list = match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        let bound = vocab_size.unwrap_or(MAX_SIZE) as u64;
        let mut ids = Vec::with_capacity(list.len());
        for value in list {
            match value.as_u64().filter(|&id| id < bound) {
                Some(id) => ids.push(id as u32),
                None => {
                    let expected = format!("token ids from 0 to {}", bound - 1);
                    self.fault(name, expected, brief(value), "name ids of the vocabulary");
                    // A list may be long; its first defect says what is wrong with it.
                    break;
                }
            }
        }
        Some(ids)
    }
}
