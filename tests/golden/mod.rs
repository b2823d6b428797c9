//! What transformers computed of a fixture, and how logits and ids are held against it.
#![allow(dead_code, reason = "each test file uses its part")]

use std::error::Error;
use std::fs;
use std::path::Path;

use ringtp::DType;
use safetensors::{Dtype, SafeTensors};

/// See `tests/fixtures/README.md`.
pub(crate) struct Golden {
    pub(crate) ids: Vec<u32>,
    /// Of the stored weights widened to f32, `[ids, vocabulary]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) greedy: Vec<u32>,
    /// Best logit less the second, at each greedy step.
    pub(crate) margins: Vec<f32>,
    /// What transformers itself computed in the type of the file, with that type.
    pub(crate) in_storage_type: Option<(DType, Vec<f32>)>,
}

impl Golden {
    pub(crate) fn read(dir: &Path) -> Result<Self, Box<dyn Error>> {
        let bytes = fs::read(dir.join("golden.safetensors"))?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let in_storage_type = [("logits_bf16", DType::Bf16), ("logits_f16", DType::F16)]
            .into_iter()
            .find(|(name, _)| tensors.tensor(name).is_ok())
            .map(|(name, dtype)| floats(&tensors, name).map(|logits| (dtype, logits)))
            .transpose()?;
        Ok(Self {
            ids: integers(&tensors, "ids")?,
            logits: floats(&tensors, "logits")?,
            greedy: integers(&tensors, "greedy")?,
            margins: floats(&tensors, "greedy_margins")?,
            in_storage_type,
        })
    }

    /// The first `rows` positions of a fixture in bf16 or f16, with what may be wrong of them: twice
    /// the error of transformers in that type, and one rounding. `None` for a fixture in f32.
    pub(crate) fn narrow(&self, rows: usize) -> Option<Narrow<'_>> {
        let (dtype, theirs) = self.in_storage_type.as_ref()?;
        let reference = &self.logits[..rows * (self.logits.len() / self.ids.len())];
        let theirs = max_error(&theirs[..reference.len()], reference);
        let greatest = reference.iter().fold(0.0_f32, |m, l| m.max(l.abs()));
        // Half the distance of neighbours, relative.
        let rounding = match dtype {
            DType::Bf16 => greatest * 2.0_f32.powi(-8),
            _ => greatest * 2.0_f32.powi(-11),
        };
        Some(Narrow {
            dtype: *dtype,
            reference,
            theirs,
            bound: 2.0 * theirs + rounding,
        })
    }
}

/// The reference of a fixture in a narrow type.
pub(crate) struct Narrow<'a> {
    pub(crate) dtype: DType,
    /// `[rows, vocabulary]`, in f32.
    pub(crate) reference: &'a [f32],
    /// The greatest error of transformers in this type.
    pub(crate) theirs: f32,
    /// The greatest error that is allowed.
    pub(crate) bound: f32,
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Result<Vec<f32>, Box<dyn Error>> {
    let view = tensors.tensor(name)?;
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let (values, rest) = view.data().as_chunks::<4>();
    assert!(rest.is_empty(), "{name}");
    Ok(values.iter().map(|&b| f32::from_le_bytes(b)).collect())
}

fn integers(tensors: &SafeTensors<'_>, name: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    let view = tensors.tensor(name)?;
    assert_eq!(view.dtype(), Dtype::I64, "{name}");
    let (values, rest) = view.data().as_chunks::<8>();
    assert!(rest.is_empty(), "{name}");
    let values = values.iter().map(|&b| u32::try_from(i64::from_le_bytes(b)));
    Ok(values.collect::<Result<_, _>>()?)
}

/// The greatest difference; not a number in either makes it infinite.
pub(crate) fn max_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "number of logits");
    let differences = found.iter().zip(expected).map(|(f, e)| (f - e).abs());
    differences.fold(0.0, |worst, d| match d.is_nan() {
        true => f32::INFINITY,
        false => worst.max(d),
    })
}

/// From the least to the greatest.
pub(crate) fn range(logits: &[f32]) -> f32 {
    let least = logits.iter().copied().fold(f32::INFINITY, f32::min);
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) - least
}

/// Holds the greedy choice of each position against the best logit of `reference`, `[positions,
/// vocabulary]`, where that is the best by more than twice `error`: the best may have lost as much
/// as `error`, and another one gained as much. The number of these positions, or the first one
/// where another id was chosen.
pub(crate) fn choices_where_the_margin_decides(
    chosen: &[u32],
    reference: &[f32],
    error: f32,
) -> Result<usize, String> {
    assert!(!chosen.is_empty() && reference.len().is_multiple_of(chosen.len()));
    let vocab = reference.len() / chosen.len();
    let mut decided = 0;
    for (position, (row, &id)) in reference.chunks_exact(vocab).zip(chosen).enumerate() {
        let (mut best, mut second) = ((0, f32::NEG_INFINITY), f32::NEG_INFINITY);
        for (id, &logit) in row.iter().enumerate() {
            if logit > best.1 {
                (best, second) = ((id, logit), best.1);
            } else {
                second = second.max(logit);
            }
        }
        let margin = best.1 - second;
        if margin <= 2.0 * error {
            continue;
        }
        if id as usize != best.0 {
            return Err(format!(
                "position {position}: id {id}, expected {}, the best by {margin}",
                best.0
            ));
        }
        decided += 1;
    }
    Ok(decided)
}
