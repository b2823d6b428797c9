//! The tensors of the safetensors files of a directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Component, Path};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::diagnosis;
use super::json::{brief, parse_object, read_text};
use crate::dtype::DType;
use crate::error::Fault;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// An index of more bytes is not one.
const MAX_INDEX_BYTES: u64 = 1 << 23;
/// An index with more bad entries is bad as a whole.
const MAX_ENTRY_FAULTS: usize = 16;
/// Room for the handles of as many files; the largest models have some 200.
const MAX_FILES: usize = 4096;

/// One tensor: where it lies, and what it is.
pub(super) struct Tensor {
    file: usize,
    bytes: Range<usize>,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Tensor {
    /// The element type, where it is one of ours.
    pub(super) fn element(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::BF16 => Some(DType::Bf16),
            Dtype::F16 => Some(DType::F16),
            _ => None,
        }
    }
}

/// The mapped files and their tensors by name.
#[derive(Default)]
pub(super) struct Weights {
    files: Vec<Mmap>,
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Maps the weights of `dir`; what is wrong goes to `faults`.
    pub(super) fn open(dir: &Path, faults: &mut Vec<Fault>) -> Self {
        let mut weights = Self::default();
        if dir.join(SINGLE).exists() {
            weights.add_file(dir, SINGLE, faults, |_| true);
            return weights;
        }
        match read_text(&dir.join(INDEX), MAX_INDEX_BYTES) {
            Ok(Some(text)) => weights.add_indexed(dir, &text, faults),
            Ok(None) => faults.push(no_weights(dir)),
            Err(fault) => faults.push(fault),
        }
        weights
    }

    pub(super) fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter()
    }

    /// The elements of a tensor of these weights.
    pub(super) fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.files[tensor.file][tensor.bytes.clone()]
    }

    fn add_indexed(&mut self, dir: &Path, text: &str, faults: &mut Vec<Fault>) {
        let Some(map) = weight_map(text, faults) else {
            return;
        };
        let mut files: Vec<&str> = map.values().map(String::as_str).collect();
        files.sort_unstable();
        files.dedup();
        if files.len() > MAX_FILES {
            faults.push(Fault::new(
                format_args!("{INDEX}: weight_map"),
                format_args!("at most {MAX_FILES} files"),
                files.len(),
                "save the model in fewer files",
            ));
            return;
        }
        for file in files {
            let before = faults.len();
            // A tensor that the index puts elsewhere, or does not know and another file had.
            let seen: Vec<String> = self.tensors.keys().cloned().collect();
            let wanted = |name: &str| match map.get(name) {
                Some(place) => place == file,
                None => seen
                    .binary_search_by(|seen| seen.as_str().cmp(name))
                    .is_err(),
            };
            self.add_file(dir, file, faults, wanted);
            if faults.len() > before {
                continue;
            }
            for name in map
                .iter()
                .filter(|(_, place)| *place == file)
                .map(|(n, _)| n)
            {
                if !self.tensors.contains_key(name) {
                    faults.push(Fault::new(
                        name,
                        format_args!("a tensor of {file}, where {INDEX} puts it"),
                        "no such tensor there",
                        "fetch the index and the weights again: they do not belong together",
                    ));
                }
            }
        }
    }

    fn add_file(
        &mut self,
        dir: &Path,
        name: &str,
        faults: &mut Vec<Fault>,
        wanted: impl Fn(&str) -> bool,
    ) {
        let map = match map_file(dir, name) {
            Ok(map) => map,
            Err(fault) => return faults.push(fault),
        };
        if let Some(fault) = diagnosis::huge_header(name, &map) {
            return faults.push(fault);
        }
        let (header, metadata) = match SafeTensors::read_metadata(&map) {
            Ok(parsed) => parsed,
            Err(error) => return faults.extend(diagnosis::faults(name, &map, &error)),
        };
        let start = size_of::<u64>() + header;
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            if wanted(&name) {
                let (from, to) = info.data_offsets;
                let tensor = Tensor {
                    file,
                    bytes: start + from..start + to,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                };
                self.tensors.insert(name, tensor);
            }
        }
        self.files.push(map);
    }
}

fn map_file(dir: &Path, name: &str) -> Result<Mmap, Fault> {
    let path = dir.join(name);
    let metadata = fs::metadata(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Fault::new(
            name,
            format_args!("a file beside {INDEX}, which names it"),
            "none",
            "fetch the missing file",
        ),
        _ => unreadable(name, &error),
    })?;
    // Opening a pipe would wait for its writer.
    if !metadata.is_file() || metadata.len() == 0 {
        let found = match metadata.is_file() {
            true => "an empty file",
            false => "something that is not a file",
        };
        let remedy = "fetch the file again";
        return Err(Fault::new(name, "a safetensors file", found, remedy));
    }
    let file = File::open(&path).map_err(|error| unreadable(name, &error))?;
    // SAFETY: the map is read-only and its bytes are read as plain numbers, of which every
    // pattern is valid. The files of a model are not written to while it is open, which the
    // documentation of `Checkpoint` asks of the caller.
    unsafe { Mmap::map(&file) }.map_err(|error| unreadable(name, &error))
}

fn unreadable(name: &str, error: &std::io::Error) -> Fault {
    let remedy = "check the file and its permissions";
    Fault::new(name, "a readable file", error, remedy)
}

/// Tensor to file, from the text of an index.
fn weight_map(text: &str, faults: &mut Vec<Fault>) -> Option<BTreeMap<String, String>> {
    let before = faults.len();
    let mut map = BTreeMap::new();
    match parse_object(text) {
        Err(mut fault) => {
            fault.what = format!("{INDEX}: {}", fault.what);
            faults.push(fault);
        }
        Ok(index) => match index.get("weight_map") {
            Some(Value::Object(entries)) => {
                for (name, file) in entries {
                    if faults.len() - before == MAX_ENTRY_FAULTS {
                        break;
                    }
                    match file.as_str().filter(|file| is_plain(file)) {
                        Some(file) => {
                            map.insert(name.clone(), file.to_string());
                        }
                        None => faults.push(Fault::new(
                            format_args!("{INDEX}: weight_map.{name}"),
                            "the plain name of a file in the model's directory",
                            brief(file),
                            "do not trust this index: fetch it again from a source you know",
                        )),
                    }
                }
            }
            other => faults.push(Fault::new(
                format_args!("{INDEX}: weight_map"),
                "an object of tensor to file",
                other.map_or_else(|| "none".into(), brief),
                "fetch the file again",
            )),
        },
    }
    (faults.len() == before).then_some(map)
}

/// Whether `file` is a name without any directory.
fn is_plain(file: &str) -> bool {
    let mut components = Path::new(file).components();
    let plain = matches!(components.next(), Some(Component::Normal(name)) if name == file);
    plain && components.next().is_none() && !file.contains(['\\', '\0'])
}

/// What to say where there are no safetensors at all.
fn no_weights(dir: &Path) -> Fault {
    let names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let ending = |ending: &str| names.iter().filter(|name| name.ends_with(ending)).min();
    let other = [".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack"]
        .iter()
        .find_map(|&format| ending(format));
    let (found, remedy) = match (ending(".safetensors"), other) {
        (Some(name), _) => (
            format!("only {name}"),
            "fetch the index, or name the file model.safetensors if it is the whole model",
        ),
        (None, Some(name)) => (
            format!("only {name}"),
            "convert to safetensors: save_pretrained of transformers writes them",
        ),
        (None, None) => (
            "neither".to_string(),
            "give the directory that holds the weights, or fetch them",
        ),
    };
    Fault::new(
        "weights",
        format_args!("{SINGLE} or {INDEX}"),
        found,
        remedy,
    )
}
