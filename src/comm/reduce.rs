//! The arithmetic of reductions: sums in f32, in the order given, rounded once.
//!
//! Every result goes through `Wide::narrow`, where a negative zero becomes a positive one
//! (also one that rounding makes of a tiny negative sum), so that ranks agree bit for bit
//! whatever the algorithm. NaN stays NaN.
//!
//! Plain loops over slices of equal length: the compiler vectorises them, for each instruction
//! set by itself (`with_widest_vectors`); the bits are the same. bf16 is converted by integer
//! arithmetic for that reason, f16 by `half`'s slice conversion, which uses F16C.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::error::CommError;
use super::wire::Wire;
use crate::dtype::DType;

/// Elements summed at a time: small enough for the stack and for L1, a multiple of any
/// vector.
const BLOCK: usize = 512;

trait Wide: Pod {
    /// Widens; the slices have equal lengths.
    fn widen(from: &[Self], to: &mut [f32]);
    /// Rounds to nearest, ties to even, and turns -0 into +0.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Wide for f32 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            // -0 + +0 is +0; anything else stays.
            *to = from + 0.0;
        }
    }
}

impl Wide for bf16 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let quiet_nan = bits >> 16 | 0x40;
            let rounded = if from.is_nan() { quiet_nan } else { nearest };
            *to = Self::from_bits(if rounded == 0x8000 { 0 } else { rounded as u16 });
        }
    }
}

impl Wide for f16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
        for to in to {
            if to.to_bits() == 0x8000 {
                *to = Self::ZERO;
            }
        }
    }
}

/// Writes the sum of `sources`, element by element, in their order: in f32, rounded to
/// `dtype` once. All slices have the length of `out`; there is at least one source.
///
/// # Errors
/// [`CommError::Argument`] if lengths differ or bytes are not whole, aligned elements.
pub fn sum(
    wire: &Wire<'_>,
    dtype: DType,
    out: &mut [u8],
    sources: &[&[u8]],
) -> Result<(), CommError> {
    check_lengths(wire, out.len(), sources)?;
    with_widest_vectors(
        #[inline(always)]
        || match dtype {
            DType::F32 => sum_f32(wire, out, sources),
            DType::Bf16 => sum_wide::<bf16>(wire, out, sources),
            DType::F16 => sum_wide::<f16>(wire, out, sources),
        },
    )
}

/// Replaces `data`, source number `position` of the sum, by the sum of it and `others` in
/// their order: [`sum`] in place.
///
/// # Errors
/// As [`sum`].
pub fn sum_in_place(
    wire: &Wire<'_>,
    dtype: DType,
    data: &mut [u8],
    position: usize,
    others: &[&[u8]],
) -> Result<(), CommError> {
    check_lengths(wire, data.len(), others)?;
    if position > others.len() {
        return Err(wire.argument(format!("no position {position} in the sum")));
    }
    with_widest_vectors(
        #[inline(always)]
        || match dtype {
            DType::F32 => sum_in_place_wide::<f32>(wire, data, position, others),
            DType::Bf16 => sum_in_place_wide::<bf16>(wire, data, position, others),
            DType::F16 => sum_in_place_wide::<f16>(wire, data, position, others),
        },
    )
}

fn check_lengths(wire: &Wire<'_>, len: usize, sources: &[&[u8]]) -> Result<(), CommError> {
    match sources.iter().find(|source| source.len() != len) {
        None => Ok(()),
        Some(source) => Err(wire.argument(format!(
            "a sum of {} bytes into {len}; reduce slices of one length",
            source.len()
        ))),
    }
}

/// Runs `f` as compiled for the widest vectors that this processor has. Only what is inlined
/// into it, `#[inline(always)]`, is.
#[inline(always)]
fn with_widest_vectors<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the processor has these features.
            return unsafe { avx512(f) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has this feature.
            return unsafe { avx2(f) };
        }
    }
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// f32 needs no conversion: straight from the sources.
#[inline(always)]
fn sum_f32(wire: &Wire<'_>, out: &mut [u8], sources: &[&[u8]]) -> Result<(), CommError> {
    if let [a, b] = sources {
        let (a, b) = (wire.cast::<f32>(a)?, wire.cast::<f32>(b)?);
        for ((out, a), b) in wire.cast_mut::<f32>(out)?.iter_mut().zip(a).zip(b) {
            *out = a + b + 0.0;
        }
        return Ok(());
    }
    sum_wide::<f32>(wire, out, sources)
}

#[inline(always)]
fn sum_wide<T: Wide>(wire: &Wire<'_>, out: &mut [u8], sources: &[&[u8]]) -> Result<(), CommError> {
    let (mut total, mut term) = ([0.0; BLOCK], [0.0; BLOCK]);
    for (block, out) in wire.cast_mut::<T>(out)?.chunks_mut(BLOCK).enumerate() {
        let range = block * BLOCK..block * BLOCK + out.len();
        let (total, term) = (&mut total[..out.len()], &mut term[..out.len()]);
        for (number, source) in sources.iter().enumerate() {
            add::<T>(&wire.cast::<T>(source)?[range.clone()], number, total, term);
        }
        T::narrow(total, out);
    }
    Ok(())
}

#[inline(always)]
fn sum_in_place_wide<T: Wide>(
    wire: &Wire<'_>,
    data: &mut [u8],
    position: usize,
    others: &[&[u8]],
) -> Result<(), CommError> {
    let (mut total, mut term) = ([0.0; BLOCK], [0.0; BLOCK]);
    for (block, data) in wire.cast_mut::<T>(data)?.chunks_mut(BLOCK).enumerate() {
        let range = block * BLOCK..block * BLOCK + data.len();
        let (total, term) = (&mut total[..data.len()], &mut term[..data.len()]);
        for number in 0..=others.len() {
            if number == position {
                add::<T>(data, number, total, term);
            } else {
                let source = others[number - usize::from(number > position)];
                add::<T>(&wire.cast::<T>(source)?[range.clone()], number, total, term);
            }
        }
        T::narrow(total, data);
    }
    Ok(())
}

/// Adds source number `number` to `total`, or starts it with the first.
#[inline(always)]
fn add<T: Wide>(source: &[T], number: usize, total: &mut [f32], term: &mut [f32]) {
    if number == 0 {
        T::widen(source, total);
    } else {
        T::widen(source, term);
        for (total, term) in total.iter_mut().zip(term) {
            *total += *term;
        }
    }
}
