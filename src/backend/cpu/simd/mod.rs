//! Sixteen f32 lanes, on whatever the processor has.
//!
//! Every kernel is written once, over [`Lanes`], and compiled for each instruction set by
//! [`dispatch!`]. All instruction sets give the same bits: each lane does the same IEEE
//! operations in the same order, every `mul_add` is fused, and reductions over lanes follow
//! the one tree of [`reduce_add`]. So a result does not depend on the processor either, and
//! the portable lanes are the tests' reference for the others.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// The instruction set that kernels run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with AVX-512 F and BW.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the target guarantees (NEON on aarch64). On x86-64 without FMA it is right, and
    /// slow: fused operations are done in software.
    Portable,
}

impl Isa {
    /// The best that this processor has.
    pub fn detect() -> Self {
        *Self::available()
            .first()
            .expect("portable lanes are always available")
    }

    /// All that this processor has, best first.
    pub fn available() -> Vec<Self> {
        let mut list = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                list.push(Self::Avx512);
            }
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                list.push(Self::Avx2);
            }
        }
        list.push(Self::Portable);
        list
    }
}

/// Sixteen f32 values.
///
/// # Safety
/// The methods are unsafe because they may use instructions that only some processors have:
/// call them only below a [`dispatch!`] entry. Loads and stores need that many valid
/// elements at the pointer, unaligned is fine.
pub(super) trait Lanes: Copy {
    /// The instruction set of these lanes.
    const ISA: Isa;

    /// Rows of a matrix-product tile for which accumulators fit in registers.
    const TILE_ROWS: usize;
    /// Chains of dependent multiply-adds side by side, 4 or 8: enough to cover their latency, and
    /// no more than fit in registers.
    const CHAINS: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// Sixteen bf16 values, widened.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Sixteen f16 values, widened.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Thirty-two bf16 values stored alternately: the even ones, the odd ones.
    unsafe fn load_bf16_pairs(from: *const u16) -> (Self, Self);
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The greater; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The lesser; `other` where either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// The nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// Asks for the cache line at `address`, which may be any.
    unsafe fn prefetch(address: *const u8);
    /// `2^self` for integers in -126..=127.
    unsafe fn exp2_int(self) -> Self;

    /// The lanes as an array.
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { self.store(out.as_mut_ptr()) };
        out
    }
}

/// The sum of the lanes, as a balanced tree: halves are added until one is left.
#[inline(always)]
pub(super) unsafe fn reduce_add<V: Lanes>(lanes: V) -> f32 {
    // SAFETY: the caller runs on the processor that V is for.
    let mut values = unsafe { lanes.to_array() };
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            values[lane] += values[lane + width];
        }
        width /= 2;
    }
    values[0]
}

/// The greatest lane, NaN aside.
#[inline(always)]
pub(super) unsafe fn reduce_max<V: Lanes>(lanes: V) -> f32 {
    // SAFETY: the caller runs on the processor that V is for.
    unsafe { lanes.to_array() }
        .into_iter()
        .fold(f32::NEG_INFINITY, f32::max)
}

/// e^x to within two units in the last place, for x in [-87, 88]; beyond, the value at the
/// bound; NaN for NaN. (Reduction by ln 2 in two parts, then the Taylor polynomial of degree 7 on
/// |r| <= ln 2 / 2, whose remainder is below 2^-27.)
#[inline(always)]
pub(super) unsafe fn exp<V: Lanes>(x: V) -> V {
    // SAFETY: the caller runs on the processor that V is for.
    unsafe {
        let x = V::splat(-87.0).max(V::splat(88.0).min(x)); // in this order NaN stays NaN
        let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
        // ln 2 = 355/512 - 2.12194440e-4; the first part times n is exact.
        let r = n.mul_add(V::splat(-355.0 / 512.0), x);
        let r = n.mul_add(V::splat(2.121_944_4e-4), r);
        let mut p = V::splat(1.0 / 5040.0);
        for c in [
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
            1.0,
            1.0,
        ] {
            p = p.mul_add(r, V::splat(c));
        }
        p.mul(n.exp2_int())
    }
}

/// Declares `fn $name(isa, args)`, which runs the generic `$kernel::<V>(args)` compiled for
/// the instruction set. The kernel must be `#[inline(always)]`, or it is not.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $kernel:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::backend::cpu::simd::Isa, $($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $type),*) $(-> $ret)? {
                // SAFETY: this function is only called where AVX-512 was detected.
                unsafe { $kernel::<$crate::backend::cpu::simd::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $type),*) $(-> $ret)? {
                // SAFETY: this function is only called where AVX2 was detected.
                unsafe { $kernel::<$crate::backend::cpu::simd::Avx2>($($arg),*) }
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa` values come from detection.
                $crate::backend::cpu::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::backend::cpu::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: portable lanes need no instruction that the target lacks.
                $crate::backend::cpu::simd::Isa::Portable => unsafe {
                    $kernel::<$crate::backend::cpu::simd::Portable>($($arg),*)
                },
            }
        }
    };
}
pub(super) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    unsafe fn exp_kernel<V: Lanes>(x: &[f32; LANES], out: &mut [f32; LANES]) {
        // SAFETY: both arrays have sixteen elements.
        unsafe { exp(V::load(x.as_ptr())).store(out.as_mut_ptr()) }
    }
    dispatch!(fn exp_lanes = exp_kernel(x: &[f32; LANES], out: &mut [f32; LANES]));

    #[inline(always)]
    unsafe fn widen_kernel<V: Lanes>(x: &[u16; 32], out: &mut [[f32; LANES]; 4]) {
        // SAFETY: the arrays have the elements that the loads and stores name.
        unsafe {
            V::load_bf16(x.as_ptr()).store(out[0].as_mut_ptr());
            V::load_f16(x.as_ptr()).store(out[1].as_mut_ptr());
            let (even, odd) = V::load_bf16_pairs(x.as_ptr());
            even.store(out[2].as_mut_ptr());
            odd.store(out[3].as_mut_ptr());
        }
    }
    dispatch!(fn widen = widen_kernel(x: &[u16; 32], out: &mut [[f32; LANES]; 4]));

    #[test]
    fn exp_is_within_two_ulp_and_equal_on_all_instruction_sets() {
        let mut worst = 0.0_f64;
        for step in 0..40_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|lane| -87.0 + 175.0 * (step * 16 + lane) as f32 / 640_000.0);
            let mut expected = [0.0; LANES];
            exp_lanes(Isa::Portable, &x, &mut expected);
            for isa in Isa::available() {
                let mut out = [0.0; LANES];
                exp_lanes(isa, &x, &mut out);
                assert_eq!(
                    out.map(f32::to_bits),
                    expected.map(f32::to_bits),
                    "{isa:?} {x:?}"
                );
            }
            for (x, y) in x.into_iter().zip(expected) {
                let exact = f64::from(x).exp();
                let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1) - exact as f32);
                worst = worst.max((f64::from(y) - exact).abs() / ulp);
            }
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn every_half_widens_exactly_on_all_instruction_sets() {
        for start in (0..=u16::MAX).step_by(32) {
            let x: [u16; 32] = std::array::from_fn(|i| start + i as u16);
            for isa in Isa::available() {
                let mut out = [[0.0; LANES]; 4];
                widen(isa, &x, &mut out);
                for lane in 0..LANES {
                    let same = |found: f32, expected: f32| {
                        found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan()
                    };
                    assert!(same(out[0][lane], half::bf16::from_bits(x[lane]).to_f32()));
                    assert!(same(out[1][lane], half::f16::from_bits(x[lane]).to_f32()));
                    assert!(same(
                        out[2][lane],
                        half::bf16::from_bits(x[2 * lane]).to_f32()
                    ));
                    assert!(same(
                        out[3][lane],
                        half::bf16::from_bits(x[2 * lane + 1]).to_f32()
                    ));
                }
            }
        }
    }
}
