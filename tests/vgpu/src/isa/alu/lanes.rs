//! Operations lane by lane: a function of scalars becomes an operation of a whole warp.
//!
//! The functions must be total: they also run for lanes that are switched off, whose results
//! are thrown away; that is cheaper than to skip them, and it lets the loops be vectorised.

use super::super::expect_operands;
use crate::lowering::{LoadError, Lowering, bad, size_of};
use crate::program::Action;
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{LANES, R32, R64, Registers, Undef, Undef64, spread, spread64};

/// The bits of a register in one lane.
pub(super) trait Bits: Copy + Default + Send + Sync + 'static {
    fn widen(self) -> u64;
    fn narrow(value: u64) -> Self;
}

impl Bits for u32 {
    #[inline(always)]
    fn widen(self) -> u64 {
        u64::from(self)
    }
    #[inline(always)]
    fn narrow(value: u64) -> Self {
        value as u32
    }
}

impl Bits for u64 {
    #[inline(always)]
    fn widen(self) -> u64 {
        self
    }
    #[inline(always)]
    fn narrow(value: u64) -> Self {
        value
    }
}

/// A register of one of the two widths.
pub(super) trait Slot: Copy + Send + Sync + 'static {
    type Bits: Bits;
    fn source(f: &mut Lowering, operand: &Operand, ty: Type) -> Result<Self, LoadError>;
    fn destination(f: &mut Lowering, operand: &Operand, ty: Type) -> Result<Self, LoadError>;
    fn values(self, registers: &Registers) -> &[Self::Bits; LANES];
    fn any_undef(self, registers: &Registers) -> u32;
    /// The undefined bytes of one lane, as a mask of its bits.
    fn undef_bits(self, registers: &Registers, lane: usize) -> u64;
    fn write(self, registers: &mut Registers, mask: u32, value: &[Self::Bits; LANES], undef: u32);
    /// As `write`; `undef` holds a mask of undefined bits for each lane.
    fn write_bits(
        self,
        registers: &mut Registers,
        mask: u32,
        value: &[Self::Bits; LANES],
        undef: &[u64; LANES],
    );
}

fn bytes_to_bits(planes: &[u32], lane: usize) -> u64 {
    let bytes = planes.iter().enumerate();
    bytes.fold(0, |bits, (byte, plane)| {
        bits | (0xff * u64::from(plane >> lane & 1)) << (8 * byte)
    })
}

fn bits_to_bytes(bits: &[u64; LANES], planes: &mut [u32]) {
    for (byte, plane) in planes.iter_mut().enumerate() {
        *plane = (0..LANES).fold(0, |plane, lane| {
            plane | u32::from(bits[lane] >> (8 * byte) & 0xff != 0) << lane
        });
    }
}

fn check_width(f: &Lowering, operand: &Operand, ty: Type) -> Result<(), LoadError> {
    match f.register_bits(operand) {
        Some(bits) if bits != 8 * size_of(ty) => Err(bad(format!(
            "a register of {bits} bits where the type has {}",
            8 * size_of(ty)
        ))),
        _ => Ok(()),
    }
}

impl Slot for R32 {
    type Bits = u32;
    fn source(f: &mut Lowering, operand: &Operand, ty: Type) -> Result<Self, LoadError> {
        check_width(f, operand, ty)?;
        f.src32(operand, ty)
    }
    fn destination(f: &mut Lowering, operand: &Operand, ty: Type) -> Result<Self, LoadError> {
        check_width(f, operand, ty)?;
        f.dst32(operand)
    }
    #[inline(always)]
    fn values(self, registers: &Registers) -> &[u32; LANES] {
        registers.get32(self)
    }
    #[inline(always)]
    fn any_undef(self, registers: &Registers) -> u32 {
        registers.any_undef32(self)
    }
    fn undef_bits(self, registers: &Registers, lane: usize) -> u64 {
        bytes_to_bits(&registers.undef32(self), lane)
    }
    #[inline(always)]
    fn write(self, registers: &mut Registers, mask: u32, value: &[u32; LANES], undef: u32) {
        registers.set32(self, mask, value, spread(undef));
    }
    fn write_bits(
        self,
        registers: &mut Registers,
        mask: u32,
        value: &[u32; LANES],
        undef: &[u64; LANES],
    ) {
        let mut planes: Undef = [0; 4];
        bits_to_bytes(undef, &mut planes);
        registers.set32(self, mask, value, planes);
    }
}

impl Slot for R64 {
    type Bits = u64;
    fn source(f: &mut Lowering, operand: &Operand, ty: Type) -> Result<Self, LoadError> {
        f.src64(operand, ty)
    }
    fn destination(f: &mut Lowering, operand: &Operand, _ty: Type) -> Result<Self, LoadError> {
        f.dst64(operand)
    }
    #[inline(always)]
    fn values(self, registers: &Registers) -> &[u64; LANES] {
        registers.get64(self)
    }
    #[inline(always)]
    fn any_undef(self, registers: &Registers) -> u32 {
        registers.any_undef64(self)
    }
    fn undef_bits(self, registers: &Registers, lane: usize) -> u64 {
        bytes_to_bits(&registers.undef64(self), lane)
    }
    #[inline(always)]
    fn write(self, registers: &mut Registers, mask: u32, value: &[u64; LANES], undef: u32) {
        registers.set64(self, mask, value, spread64(undef));
    }
    fn write_bits(
        self,
        registers: &mut Registers,
        mask: u32,
        value: &[u64; LANES],
        undef: &[u64; LANES],
    ) {
        let mut planes: Undef64 = [0; 8];
        bits_to_bytes(undef, &mut planes);
        registers.set64(self, mask, value, planes);
    }
}

/// The type of an operand as the arithmetic sees it.
pub(super) trait Scalar: Copy + Send + Sync + 'static {
    type Slot: Slot;
    const TYPE: Type;
    fn decode(bits: <Self::Slot as Slot>::Bits) -> Self;
    fn encode(self) -> <Self::Slot as Slot>::Bits;
}

macro_rules! scalar {
    ($($ty:ty, $name:ident, $slot:ty, $bits:ident => $decode:expr, $value:ident => $encode:expr;)*) => {
        $(impl Scalar for $ty {
            type Slot = $slot;
            const TYPE: Type = Type::$name;
            #[inline(always)]
            fn decode($bits: <$slot as Slot>::Bits) -> Self { $decode }
            #[inline(always)]
            fn encode(self) -> <$slot as Slot>::Bits { let $value = self; $encode }
        })*
    };
}

scalar! {
    u16, U16, R32, bits => bits as u16, v => u32::from(v);
    i16, S16, R32, bits => bits as i16, v => u32::from(v as u16);
    u32, U32, R32, bits => bits, v => v;
    i32, S32, R32, bits => bits as i32, v => v as u32;
    u64, U64, R64, bits => bits, v => v;
    i64, S64, R64, bits => bits as i64, v => v as u64;
    f32, F32, R32, bits => f32::from_bits(bits), v => v.to_bits();
    f64, F64, R64, bits => f64::from_bits(bits), v => v.to_bits();
}

/// A source operand of a type.
pub(super) fn source<T: Scalar>(f: &mut Lowering, operand: &Operand) -> Result<T::Slot, LoadError> {
    T::Slot::source(f, operand, T::TYPE)
}

/// A destination of a type.
pub(super) fn destination<T: Scalar>(
    f: &mut Lowering,
    operand: &Operand,
) -> Result<T::Slot, LoadError> {
    T::Slot::destination(f, operand, T::TYPE)
}

type BitsOf<T> = <<T as Scalar>::Slot as Slot>::Bits;

/// `d = op(a)`
pub(super) fn map1<D: Scalar, A: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    op: impl Fn(A) -> D + Send + Sync + 'static,
) -> Result<Action, LoadError> {
    expect_operands(i, 2..=2)?;
    let d = destination::<D>(f, &i.operands[0])?;
    let a = source::<A>(f, &i.operands[1])?;
    Ok(Action::simple(move |cx| {
        let mut out = [BitsOf::<D>::default(); LANES];
        let x = a.values(cx.regs);
        for lane in 0..LANES {
            out[lane] = op(A::decode(x[lane])).encode();
        }
        let undef = a.any_undef(cx.regs);
        d.write(cx.regs, cx.mask, &out, undef);
    }))
}

/// `d = op(a, b)`
pub(super) fn map2<D: Scalar, A: Scalar, B: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    op: impl Fn(A, B) -> D + Send + Sync + 'static,
) -> Result<Action, LoadError> {
    map2_where(i, f, op, |_, _| true)
}

/// `d = op(a, b)`, undefined where `defined` says no.
pub(super) fn map2_where<D: Scalar, A: Scalar, B: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    op: impl Fn(A, B) -> D + Send + Sync + 'static,
    defined: impl Fn(A, B) -> bool + Send + Sync + 'static,
) -> Result<Action, LoadError> {
    expect_operands(i, 3..=3)?;
    let d = destination::<D>(f, &i.operands[0])?;
    let a = source::<A>(f, &i.operands[1])?;
    let b = source::<B>(f, &i.operands[2])?;
    Ok(Action::simple(move |cx| {
        let mut out = [BitsOf::<D>::default(); LANES];
        let (x, y) = (a.values(cx.regs), b.values(cx.regs));
        let mut undef = a.any_undef(cx.regs) | b.any_undef(cx.regs);
        for lane in 0..LANES {
            let (x, y) = (A::decode(x[lane]), B::decode(y[lane]));
            out[lane] = op(x, y).encode();
            undef |= u32::from(!defined(x, y)) << lane;
        }
        d.write(cx.regs, cx.mask, &out, undef);
    }))
}

/// `d = op(a, b, c)`
pub(super) fn map3<D: Scalar, A: Scalar, B: Scalar, C: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    op: impl Fn(A, B, C) -> D + Send + Sync + 'static,
) -> Result<Action, LoadError> {
    expect_operands(i, 4..=4)?;
    let d = destination::<D>(f, &i.operands[0])?;
    let a = source::<A>(f, &i.operands[1])?;
    let b = source::<B>(f, &i.operands[2])?;
    let c = source::<C>(f, &i.operands[3])?;
    Ok(Action::simple(move |cx| {
        let mut out = [BitsOf::<D>::default(); LANES];
        let (x, y, z) = (a.values(cx.regs), b.values(cx.regs), c.values(cx.regs));
        for lane in 0..LANES {
            out[lane] = op(A::decode(x[lane]), B::decode(y[lane]), C::decode(z[lane])).encode();
        }
        let undef = a.any_undef(cx.regs) | b.any_undef(cx.regs) | c.any_undef(cx.regs);
        d.write(cx.regs, cx.mask, &out, undef);
    }))
}

/// The undefined bits of a result, from the operands' values and undefined bits.
pub(super) type UndefRule<const N: usize> = Box<dyn Fn([u64; N], [u64; N]) -> u64 + Send + Sync>;

/// `d = op(a)` where the result's undefined bytes follow from the operand's byte by byte.
pub(super) fn bits1<D: Scalar, A: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    op: impl Fn(A) -> D + Send + Sync + 'static,
    rule: UndefRule<1>,
) -> Result<Action, LoadError> {
    expect_operands(i, 2..=2)?;
    let d = destination::<D>(f, &i.operands[0])?;
    let a = source::<A>(f, &i.operands[1])?;
    Ok(Action::simple(move |cx| {
        let mut out = [BitsOf::<D>::default(); LANES];
        let x = a.values(cx.regs);
        for lane in 0..LANES {
            out[lane] = op(A::decode(x[lane])).encode();
        }
        if a.any_undef(cx.regs) & cx.mask == 0 {
            return d.write(cx.regs, cx.mask, &out, 0);
        }
        let undef =
            std::array::from_fn(|lane| rule([x[lane].widen()], [a.undef_bits(cx.regs, lane)]));
        d.write_bits(cx.regs, cx.mask, &out, &undef);
    }))
}

/// As [`bits1`], for two operands.
pub(super) fn bits2<D: Scalar, A: Scalar, B: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    op: impl Fn(A, B) -> D + Send + Sync + 'static,
    rule: UndefRule<2>,
) -> Result<Action, LoadError> {
    expect_operands(i, 3..=3)?;
    let d = destination::<D>(f, &i.operands[0])?;
    let a = source::<A>(f, &i.operands[1])?;
    let b = source::<B>(f, &i.operands[2])?;
    Ok(Action::simple(move |cx| {
        let mut out = [BitsOf::<D>::default(); LANES];
        let (x, y) = (a.values(cx.regs), b.values(cx.regs));
        for lane in 0..LANES {
            out[lane] = op(A::decode(x[lane]), B::decode(y[lane])).encode();
        }
        if (a.any_undef(cx.regs) | b.any_undef(cx.regs)) & cx.mask == 0 {
            return d.write(cx.regs, cx.mask, &out, 0);
        }
        let undef = std::array::from_fn(|lane| {
            let values = [x[lane].widen(), y[lane].widen()];
            let undef = [a.undef_bits(cx.regs, lane), b.undef_bits(cx.regs, lane)];
            rule(values, undef)
        });
        d.write_bits(cx.regs, cx.mask, &out, &undef);
    }))
}

/// As [`bits1`], for three operands.
pub(super) fn bits3<D: Scalar, A: Scalar, B: Scalar, C: Scalar>(
    i: &Instruction,
    f: &mut Lowering,
    op: impl Fn(A, B, C) -> D + Send + Sync + 'static,
    rule: UndefRule<3>,
) -> Result<Action, LoadError> {
    expect_operands(i, 4..=4)?;
    let d = destination::<D>(f, &i.operands[0])?;
    let a = source::<A>(f, &i.operands[1])?;
    let b = source::<B>(f, &i.operands[2])?;
    let c = source::<C>(f, &i.operands[3])?;
    Ok(Action::simple(move |cx| {
        let mut out = [BitsOf::<D>::default(); LANES];
        let (x, y, z) = (a.values(cx.regs), b.values(cx.regs), c.values(cx.regs));
        for lane in 0..LANES {
            out[lane] = op(A::decode(x[lane]), B::decode(y[lane]), C::decode(z[lane])).encode();
        }
        let any = a.any_undef(cx.regs) | b.any_undef(cx.regs) | c.any_undef(cx.regs);
        if any & cx.mask == 0 {
            return d.write(cx.regs, cx.mask, &out, 0);
        }
        let undef = std::array::from_fn(|lane| {
            let values = [x[lane].widen(), y[lane].widen(), z[lane].widen()];
            let undef = [
                a.undef_bits(cx.regs, lane),
                b.undef_bits(cx.regs, lane),
                c.undef_bits(cx.regs, lane),
            ];
            rule(values, undef)
        });
        d.write_bits(cx.regs, cx.mask, &out, &undef);
    }))
}
