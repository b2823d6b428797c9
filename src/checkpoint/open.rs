//! A model directory, checked as a whole.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::weights::{Tensor, Weights};
use super::{GenerationConfig, LlamaConfig};
use crate::dtype::DType;
use crate::error::{Error, Fault, Faults, Result};
use crate::host::HostMatrix;
use crate::shard::{Dims, ShardPlan, TensorPlan};

const LM_HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// An open model directory: its configurations, and its weights in memory maps.
///
/// The files must not be changed while it is open: a write shows in the weights, and reading
/// past the end of a file that became shorter ends the process (as with any memory map).
pub struct Checkpoint {
    dir: PathBuf,
    config: LlamaConfig,
    generation_config: GenerationConfig,
    weights: Weights,
    dtype: DType,
    unused: Vec<String>,
}

impl Checkpoint {
    /// Opens a model directory: config.json, generation_config.json (optional), and
    /// model.safetensors or else model.safetensors.index.json with its files.
    ///
    /// Every tensor that the configuration asks for is there, in its shape, in f32, f16 or
    /// bf16 (mixed as they like). All that is wrong is in one [`Error::Model`]. Tensors nobody
    /// asked for are warned of.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        Self::open_faults(dir).map_err(|faults| Error::Model(Faults::new(dir.display(), faults)))
    }

    /// The directory, as given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// config.json.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// generation_config.json; the default where there is none.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// The storage type of dtype `auto`: the one config.json names, else that of most weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The longest sequence in tokens; see [`LlamaConfig::max_context`].
    pub fn max_context(&self) -> usize {
        self.config.max_context()
    }

    /// The tensors nobody asked for, sorted; the `rotary_emb.inv_freq` of old checkpoints and
    /// the copy of a tied embedding are left out.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The whole tensor `[rows, cols]`, borrowed from the memory map; a vector is one row.
    ///
    /// An error where there is no such tensor, or one of another element type or more
    /// dimensions.
    pub fn tensor(&self, name: &str) -> Result<HostMatrix<'_>> {
        let Some(tensor) = self.weights.get(name) else {
            return Err(Error::input(
                name,
                "a tensor of the checkpoint",
                "none",
                "name one that it has",
            ));
        };
        let Some(dtype) = tensor.element() else {
            return Err(Error::Input(wrong_type(name, tensor)));
        };
        let (rows, cols) = match tensor.shape.as_slice() {
            &[] => (1, 1),
            &[cols] => (1, cols),
            &[rows, cols] => (rows, cols),
            more => {
                let expected = "a matrix or a vector";
                let found = format!("shape {more:?}");
                return Err(Error::input(name, expected, found, "name a weight"));
            }
        };
        HostMatrix::new(self.weights.bytes(tensor), dtype, rows, cols)
    }

    /// The slice of a tensor that `rank` takes of a [`ShardPlan`], borrowed; a vector is one
    /// row.
    pub fn shard(&self, plan: &TensorPlan, rank: usize) -> Result<HostMatrix<'_>> {
        let whole = self.tensor(&plan.name)?;
        if rank >= plan.ranges.len() {
            return Err(Error::input(
                format_args!("rank of {}", plan.name),
                format_args!("0 to {}", plan.ranges.len().saturating_sub(1)),
                rank,
                "name a rank of the plan",
            ));
        }
        let slice = plan.slice(rank);
        let shape = [whole.rows(), whole.cols()];
        match (plan.shape.as_slice(), slice.as_slice()) {
            (&[n], [cols]) if shape == [1, n] => whole.slice(0..1, cols.clone()),
            (wanted, [rows, cols]) if wanted == shape => whole.slice(rows.clone(), cols.clone()),
            (wanted, _) => Err(Error::shape(
                format_args!("shard of {}", plan.name),
                format_args!("shape {wanted:?}, as in the plan"),
                format_args!("{shape:?}"),
            )),
        }
    }

    fn open_faults(dir: &Path) -> Result<Self, Vec<Fault>> {
        check_dir(dir).map_err(|fault| vec![fault])?;
        let mut faults = Vec::new();
        let config = LlamaConfig::read_faults(dir);
        let vocab_size = config.as_ref().ok().map(|config| config.dims.vocab_size);
        let config = keep(config, &mut faults);
        let generation = GenerationConfig::read_faults(dir, vocab_size);
        let generation_config = keep(generation, &mut faults);
        let before = faults.len();
        let weights = Weights::open(dir, &mut faults);
        // Where a file could not be read, all of its tensors would be missing.
        let readable = faults.len() == before;
        let mut unused = Vec::new();
        if let Some(config) = &config
            && readable
        {
            unused = check_tensors(&config.dims, &weights, &mut faults);
        }
        let (Some(config), Some(generation_config), true) =
            (config, generation_config, faults.is_empty())
        else {
            return Err(faults);
        };
        if !unused.is_empty() {
            tracing::warn!(
                "{}: {} tensors that this model has no use for: {}{}",
                dir.display(),
                unused.len(),
                unused[..unused.len().min(4)].join(", "),
                if unused.len() > 4 { ", …" } else { "" },
            );
        }
        let dtype = config.dtype.unwrap_or_else(|| most(&weights));
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            generation_config,
            weights,
            dtype,
            unused,
        })
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.dir)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

fn keep<T>(result: Result<T, Vec<Fault>>, faults: &mut Vec<Fault>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(more) => {
            faults.extend(more);
            None
        }
    }
}

fn check_dir(dir: &Path) -> Result<(), Fault> {
    let remedy = "give the directory that holds config.json and model.safetensors";
    let wrong = |found: &dyn std::fmt::Display| {
        Err(Fault::new("model directory", "a directory", found, remedy))
    };
    match fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => wrong(&"a file"),
        Err(error) => wrong(&error),
    }
}

/// Compares the tensors with those that `dims` asks for; returns those it does not ask for.
fn check_tensors(dims: &Dims, weights: &Weights, faults: &mut Vec<Fault>) -> Vec<String> {
    let plan = match ShardPlan::new(dims, 1) {
        Ok(plan) => plan,
        Err(error) => {
            faults.push(Fault::new(
                "config.json",
                "sizes to plan by",
                error,
                "correct them",
            ));
            return Vec::new();
        }
    };
    for wanted in plan.tensors() {
        let name = &wanted.name;
        let Some(tensor) = weights.get(name) else {
            faults.push(Fault::new(
                name,
                format_args!("a tensor of shape {:?}", wanted.shape),
                "none",
                "fetch the complete weights, or correct config.json",
            ));
            continue;
        };
        if tensor.shape != wanted.shape {
            faults.push(Fault::new(
                name,
                format_args!("shape {:?}, by config.json", wanted.shape),
                format_args!("{:?}", tensor.shape),
                "use the config.json that belongs to these weights",
            ));
        }
        if tensor.element().is_none() {
            faults.push(wrong_type(name, tensor));
        }
    }
    if dims.tie_word_embeddings {
        check_tied(weights, faults);
    }
    let wanted: BTreeSet<_> = plan.tensors().iter().map(|tensor| &tensor.name).collect();
    weights
        .iter()
        .map(|(name, _)| name)
        .filter(|name| !wanted.contains(name))
        .filter(|name| !name.ends_with("rotary_emb.inv_freq"))
        .filter(|name| !(dims.tie_word_embeddings && *name == LM_HEAD))
        .cloned()
        .collect()
}

/// A tied LM head that is nevertheless stored must be the embedding: where it differs,
/// transformers 4 ignores it and transformers 5 uses it.
fn check_tied(weights: &Weights, faults: &mut Vec<Fault>) {
    let (Some(head), Some(embedding)) = (weights.get(LM_HEAD), weights.get(EMBEDDING)) else {
        return;
    };
    let same = head.dtype == embedding.dtype
        && head.shape == embedding.shape
        && weights.bytes(head) == weights.bytes(embedding);
    if !same {
        faults.push(Fault::new(
            LM_HEAD,
            format_args!("none, or a copy of {EMBEDDING}, since tie_word_embeddings is true"),
            "another tensor",
            "set tie_word_embeddings to false to use it, or remove it",
        ));
    }
}

fn wrong_type(name: &str, tensor: &Tensor) -> Fault {
    Fault::new(
        name,
        "element type F32, F16 or BF16",
        tensor.dtype,
        "convert the weights to one of these",
    )
}

/// The type that most elements have.
fn most(weights: &Weights) -> DType {
    let elements = |dtype: DType| -> usize {
        let of = weights.iter().map(|(_, tensor)| tensor);
        of.filter(|tensor| tensor.element() == Some(dtype))
            .map(|tensor| weights.bytes(tensor).len() / dtype.size())
            .sum()
    };
    let mut best = DType::F32;
    for dtype in DType::ALL {
        if elements(dtype) > elements(best) {
            best = dtype;
        }
    }
    best
}
