//! `mov`: copies, literals, special registers, addresses, packing and unpacking.

use super::super::{expect_operands, special};
use crate::lowering::{
    LoadError, Lowering, Modifiers, Symbol, bad, code_address, size_of, unsupported,
};
use crate::memory::FRAME_PARAMS;
use crate::program::Action;
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{DEFINED, DEFINED64, FULL, LANES, R32, R64, Undef};

/// A register of either width.
#[derive(Debug, Clone, Copy)]
enum Any {
    Narrow(R32),
    Wide(R64),
}

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    (i.opcode == "mov").then(|| mov(i, m, f))
}

fn mov(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let ty = m.ty()?;
    expect_operands(i, 2..=2)?;
    let (d, a) = (&i.operands[0], &i.operands[1]);
    match (d, a) {
        (_, Operand::Vector(parts)) => return pack(d, parts, ty, f),
        (Operand::Vector(parts), _) => return unpack(parts, a, ty, f),
        _ => {}
    }
    if ty == Type::Pred {
        let d = f.dst_pred(d)?;
        let (a, negated) = f.src_pred(a)?;
        let flip = if negated { FULL } else { 0 };
        return Ok(Action::simple(move |cx| {
            let (value, undef) = (cx.regs.pred(a) ^ flip, cx.regs.pred_undef(a));
            cx.regs.set_pred(d, cx.mask, value, undef);
        }));
    }
    let bytes = size_of(ty);
    if let Some(bits) = f.register_bits(d)
        && bits != 8 * bytes
    {
        return Err(bad(format!("'mov' of {ty:?} to a register of {bits} bits")));
    }
    if bytes == 16 {
        return Err(unsupported("'mov.b128'"));
    }
    if let Operand::Name(name) = a {
        if name == "WARP_SZ" {
            return constant(d, 32, bytes, f);
        }
        if let Some((_, read)) = special::special(name) {
            return from_special(d, bytes, read, f);
        }
    }
    let (symbol, offset) = match a {
        Operand::Name(name) => (Some(f.lookup(name)?), 0),
        Operand::NameOffset(name, offset) => (Some(f.lookup(name)?), *offset),
        _ => (None, 0),
    };
    if let Some(symbol) = symbol {
        let address = match symbol {
            Symbol::Reg32(_, _) | Symbol::Reg64(_, _) => None,
            Symbol::RegPred(_) => return Err(bad("'mov' of a predicate to a register")),
            Symbol::Address(_, at) => Some(at),
            Symbol::Shared(at) | Symbol::KernelParam(at, _) => Some(at.into()),
            Symbol::FrameParam(at, _) => Some(FRAME_PARAMS + u64::from(at)),
            Symbol::Function(number) => Some(code_address(number)),
            Symbol::Local(at) => {
                let at = i64::from(at) + offset;
                return local(d, at, bytes, f);
            }
        };
        if let Some(address) = address {
            return constant(d, address.wrapping_add(offset as u64), bytes, f);
        }
    }
    if bytes == 8 {
        let d = f.dst64(d)?;
        let a = f.src64(a, ty)?;
        Ok(Action::simple(move |cx| {
            let (value, undef) = (*cx.regs.get64(a), cx.regs.undef64(a));
            cx.regs.set64(d, cx.mask, &value, undef);
        }))
    } else {
        let d = f.dst32(d)?;
        let a = f.src32(a, ty)?;
        let keep = if bytes == 2 { 0xffff } else { u32::MAX };
        Ok(Action::simple(move |cx| {
            let value = cx.regs.get32(a).map(|v| v & keep);
            let undef = cx.regs.undef32(a);
            cx.regs.set32(d, cx.mask, &value, undef);
        }))
    }
}

fn constant(d: &Operand, value: u64, bytes: u32, f: &mut Lowering) -> Result<Action, LoadError> {
    if bytes == 8 {
        let d = f.dst64(d)?;
        return Ok(Action::simple(move |cx| {
            cx.regs.set64(d, cx.mask, &[value; LANES], DEFINED64);
        }));
    }
    let value = u32::try_from(value)
        .ok()
        .filter(|&v| bytes == 4 || v < 1 << 16)
        .ok_or_else(|| bad(format!("the address {value:#x} does not fit the register")))?;
    let d = f.dst32(d)?;
    Ok(Action::simple(move |cx| {
        cx.regs.set32(d, cx.mask, &[value; LANES], DEFINED);
    }))
}

fn local(d: &Operand, at: i64, bytes: u32, f: &mut Lowering) -> Result<Action, LoadError> {
    match bytes {
        8 => {
            let d = f.dst64(d)?;
            Ok(Action::simple(move |cx| {
                let value = (i64::from(cx.local_base) + at) as u64;
                cx.regs.set64(d, cx.mask, &[value; LANES], DEFINED64);
            }))
        }
        4 => {
            let d = f.dst32(d)?;
            Ok(Action::simple(move |cx| {
                let value = (i64::from(cx.local_base) + at) as u32;
                cx.regs.set32(d, cx.mask, &[value; LANES], DEFINED);
            }))
        }
        _ => Err(bad("an address in a register of 16 bits")),
    }
}

fn from_special(
    d: &Operand,
    bytes: u32,
    read: special::Read,
    f: &mut Lowering,
) -> Result<Action, LoadError> {
    if bytes == 8 {
        let d = f.dst64(d)?;
        return Ok(Action::simple(move |cx| {
            let value = std::array::from_fn(|lane| read(cx, lane));
            cx.regs.set64(d, cx.mask, &value, DEFINED64);
        }));
    }
    let d = f.dst32(d)?;
    let keep = if bytes == 2 { 0xffff } else { u32::MAX };
    Ok(Action::simple(move |cx| {
        let value = std::array::from_fn(|lane| read(cx, lane) as u32 & keep);
        cx.regs.set32(d, cx.mask, &value, DEFINED);
    }))
}

/// The type of one part of a packed value.
fn part_type(ty: Type, parts: usize) -> Result<Type, LoadError> {
    Ok(match 8 * size_of(ty) / parts.max(1) as u32 {
        8 => Type::B8,
        16 => Type::B16,
        32 => Type::B32,
        64 => return Err(unsupported("'mov.b128'")),
        _ => return Err(bad(format!("{parts} parts of {ty:?}"))),
    })
}

/// `mov.b32 d, {low, high}`
fn pack(d: &Operand, parts: &[Operand], ty: Type, f: &mut Lowering) -> Result<Action, LoadError> {
    let part = part_type(ty, parts.len())?;
    let bits = 8 * size_of(part);
    let mut sources = Vec::new();
    for operand in parts {
        if matches!(f.register_bits(operand), Some(b) if b != bits) {
            return Err(bad(format!("a part of {bits} bits was expected")));
        }
        sources.push(f.src32(operand, part)?);
    }
    let d = match size_of(ty) {
        8 => Any::Wide(f.dst64(d)?),
        _ => Any::Narrow(f.dst32(d)?),
    };
    let keep = if bits == 32 {
        u32::MAX
    } else {
        (1 << bits) - 1
    };
    Ok(Action::simple(move |cx| {
        let mut words = [[0u32; LANES]; 2];
        let mut undef: [Undef; 2] = [[0; 4]; 2];
        for (n, &source) in sources.iter().enumerate() {
            let at = n * bits as usize;
            let (word, shift) = (at / 32, at % 32);
            let value = cx.regs.get32(source);
            for lane in 0..LANES {
                words[word][lane] |= (value[lane] & keep) << shift;
            }
            let planes = cx.regs.undef32(source);
            for byte in 0..bits as usize / 8 {
                undef[word][shift / 8 + byte] = planes[byte];
            }
        }
        match d {
            Any::Narrow(d) => cx.regs.set32(d, cx.mask, &words[0], undef[0]),
            Any::Wide(d) => {
                let value = std::array::from_fn(|lane| {
                    u64::from(words[1][lane]) << 32 | u64::from(words[0][lane])
                });
                let mut planes = [0; 8];
                planes[..4].copy_from_slice(&undef[0]);
                planes[4..].copy_from_slice(&undef[1]);
                cx.regs.set64(d, cx.mask, &value, planes);
            }
        }
    }))
}

/// `mov.b32 {low, high}, a`
fn unpack(parts: &[Operand], a: &Operand, ty: Type, f: &mut Lowering) -> Result<Action, LoadError> {
    let part = part_type(ty, parts.len())?;
    let bits = 8 * size_of(part);
    let a = match size_of(ty) {
        8 => Any::Wide(f.src64(a, ty)?),
        _ => Any::Narrow(f.src32(a, ty)?),
    };
    let mut targets = Vec::new();
    for operand in parts {
        if matches!(f.register_bits(operand), Some(b) if b != bits) {
            return Err(bad(format!("a part of {bits} bits was expected")));
        }
        targets.push(match operand {
            Operand::Sink => None,
            operand => Some(f.dst32(operand)?),
        });
    }
    let keep = if bits == 32 {
        u32::MAX
    } else {
        (1 << bits) - 1
    };
    Ok(Action::simple(move |cx| {
        let mut planes = [0; 8];
        let value: [u64; LANES] = match a {
            Any::Narrow(a) => {
                planes[..4].copy_from_slice(&cx.regs.undef32(a));
                cx.regs.get32(a).map(u64::from)
            }
            Any::Wide(a) => {
                planes = cx.regs.undef64(a);
                *cx.regs.get64(a)
            }
        };
        for (n, target) in targets.iter().enumerate() {
            let Some(target) = target else { continue };
            let at = n * bits as usize;
            let out = value.map(|v| (v >> at) as u32 & keep);
            let mut undef = DEFINED;
            for byte in 0..bits as usize / 8 {
                undef[byte] = planes[at / 8 + byte];
            }
            cx.regs.set32(*target, cx.mask, &out, undef);
        }
    }))
}
