//! The types in which weights and KV entries are stored.

use half::{bf16, f16};

use super::simd::{LANES, Lanes};
use crate::dtype::DType;

/// A storage type, widened to f32 on load.
pub(super) trait Stored {
    /// What one element is stored as.
    type Word: Copy;
    const DTYPE: DType;

    /// Sixteen consecutive elements.
    ///
    /// # Safety
    /// They must be readable, and the processor be the one that V is for.
    unsafe fn load<V: Lanes>(from: *const Self::Word) -> V;

    /// The two vectors of one column of a weight panel (see [`super::matrix`]).
    ///
    /// # Safety
    /// As for [`Self::load`], with thirty-two elements.
    unsafe fn load_pair<V: Lanes>(from: *const Self::Word) -> (V, V);

    /// The nearest value, ties to even.
    fn narrow(value: f32) -> Self::Word;
}

pub(super) struct F32;

impl Stored for F32 {
    type Word = f32;
    const DTYPE: DType = DType::F32;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const f32) -> V {
        // SAFETY: the caller vouches for the elements.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn load_pair<V: Lanes>(from: *const f32) -> (V, V) {
        // SAFETY: the caller vouches for the elements.
        unsafe { (V::load(from), V::load(from.add(LANES))) }
    }

    fn narrow(value: f32) -> f32 {
        value
    }
}

pub(super) struct Bf16;

impl Stored for Bf16 {
    type Word = u16;
    const DTYPE: DType = DType::Bf16;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u16) -> V {
        // SAFETY: the caller vouches for the elements.
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn load_pair<V: Lanes>(from: *const u16) -> (V, V) {
        // SAFETY: the caller vouches for the elements.
        unsafe { V::load_bf16_pairs(from) }
    }

    fn narrow(value: f32) -> u16 {
        bf16::from_f32(value).to_bits()
    }
}

pub(super) struct F16;

impl Stored for F16 {
    type Word = u16;
    const DTYPE: DType = DType::F16;

    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const u16) -> V {
        // SAFETY: the caller vouches for the elements.
        unsafe { V::load_f16(from) }
    }

    #[inline(always)]
    unsafe fn load_pair<V: Lanes>(from: *const u16) -> (V, V) {
        // SAFETY: the caller vouches for the elements.
        unsafe { (V::load_f16(from), V::load_f16(from.add(LANES))) }
    }

    fn narrow(value: f32) -> u16 {
        f16::from_f32(value).to_bits()
    }
}
