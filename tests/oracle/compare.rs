//! Comparing a result with the oracle.

use super::Rows;

/// The first element of `found` (`[rows, cols]` in order) that is not within `error` of
/// `expected`, in words; NaN never is.
pub(crate) fn within(found: &[f32], expected: &Rows, error: &Rows) -> Result<(), String> {
    let flat = |rows: &Rows| -> Vec<f64> { rows.iter().flatten().copied().collect() };
    let (values, error) = (flat(expected), flat(error));
    if found.len() != values.len() || values.len() != error.len() {
        return Err(format!(
            "{} elements for {}, {} bounds",
            found.len(),
            values.len(),
            error.len()
        ));
    }
    for i in 0..found.len() {
        let off = (f64::from(found[i]) - values[i]).abs();
        if off.is_nan() || off > error[i] {
            return Err(format!(
                "element {i} of {}: {} is not within {:e} of {}",
                found.len(),
                found[i],
                error[i],
                values[i]
            ));
        }
    }
    Ok(())
}

/// The first element whose bits differ, in words.
pub(crate) fn same_bits(found: &[f32], expected: &[f32]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} elements for {}", found.len(), expected.len()));
    }
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        if f.to_bits() != e.to_bits() {
            return Err(format!("element {i} of {}: {f} for {e}", found.len()));
        }
    }
    Ok(())
}
