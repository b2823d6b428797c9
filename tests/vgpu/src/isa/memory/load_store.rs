//! `ld`, `st`, `ldu`, and the conversions of addresses.

use super::super::expect_operands;
use super::{Target, take_cache_hints, take_order, take_space};
use crate::finding::{Fault, Kind};
use crate::lowering::{LoadError, Lowering, Modifiers, Symbol, bad, size_of, unsupported};
use crate::memory::{
    self, Access, Data, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Space, space_of,
};
use crate::program::{Action, Step};
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{LANES, R32, R64, lanes};

/// See [`super::super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match i.opcode.as_str() {
        "ld" | "ldu" => load(i, m, f),
        "st" => store(i, m, f),
        "cvta" => cvta(i, m, f),
        "isspacep" => isspacep(i, m, f),
        _ => return None,
    })
}

/// A register that takes part of what is moved.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// With the width of the register in bits.
    Narrow(R32, u32),
    Wide(R64),
    Nothing,
}

/// The elements of an access: how many, of which type, and the registers.
fn parts(
    operand: &Operand,
    vector: usize,
    ty: Type,
    destination: bool,
    f: &mut Lowering,
) -> Result<Vec<Part>, LoadError> {
    let list = match (operand, vector) {
        (Operand::Vector(list), n) if list.len() == n => list.as_slice(),
        (Operand::Vector(list), n) => {
            return Err(bad(format!("{} registers for {n} elements", list.len())));
        }
        (one, 1) => std::slice::from_ref(one),
        (_, n) => return Err(bad(format!("{n} elements want {{…}}"))),
    };
    list.iter()
        .map(|operand| {
            if matches!(operand, Operand::Sink) && destination {
                return Ok(Part::Nothing);
            }
            let bits = f.register_bits(operand).unwrap_or(8 * size_of(ty));
            if bits < 8 * size_of(ty) {
                return Err(bad(format!("{ty:?} in a register of {bits} bits")));
            }
            Ok(match (bits, destination) {
                (64, true) => Part::Wide(f.dst64(operand)?),
                (64, false) => Part::Wide(f.src64(operand, ty)?),
                (_, true) => Part::Narrow(f.dst32(operand)?, bits),
                (_, false) => Part::Narrow(f.src32(operand, ty)?, bits),
            })
        })
        .collect()
}

fn take_vector(m: &mut Modifiers) -> usize {
    match m.take_any(&["v2", "v4", "v8"]) {
        None => 1,
        Some(v) => usize::from(v.as_bytes()[1] - b'0'),
    }
}

fn operands_without_policy(
    i: &Instruction,
    policy: bool,
) -> Result<(&Operand, &Operand), LoadError> {
    let n = if policy { 3 } else { 2 };
    expect_operands(i, n..=n)?;
    Ok((&i.operands[0], &i.operands[1]))
}

fn check_size(vector: usize, ty: Type) -> Result<(u32, u32), LoadError> {
    let element = size_of(ty);
    let bytes = element * vector as u32;
    if element == 0 || element == 16 || bytes > 32 {
        return Err(bad(format!("{vector} elements of {ty:?} in one access")));
    }
    Ok((element, bytes))
}

fn report_address(cx: &mut crate::machine::Cx, undef: u32) {
    let lane = undef.trailing_zeros() as usize;
    let message = "a value nobody wrote decides the address";
    cx.report(Kind::Uninitialised, lane, None, message.to_owned());
}

fn load(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let (order, scope) = take_order(m, false)?;
    let space = take_space(m)?;
    let policy = take_cache_hints(m);
    let non_coherent = m.take("nc");
    m.take("unified");
    let vector = take_vector(m);
    let ty = m.ty()?;
    let (element, bytes) = check_size(vector, ty)?;
    let (d, a) = operands_without_policy(i, policy)?;
    let target = Target::of(space, f.address(a)?)?;
    let parts = parts(d, vector, ty, true, f)?;
    let signed = matches!(ty, Type::S8 | Type::S16 | Type::S32);
    if let (Space::Param, Some(Symbol::KernelParam(_, _)), None) =
        (target.space, target.address.symbol, target.address.base)
    {
        return parameter(target.address.offset, parts, element, bytes, signed);
    }
    Ok(Action::plain(move |cx| {
        let (addresses, undef) = target.addresses(cx);
        if undef & cx.mask != 0 {
            report_address(cx, undef & cx.mask);
        }
        let access = Access {
            space: target.space,
            addresses: &addresses,
            mask: cx.mask,
            bytes,
            element,
            order,
            scope,
            non_coherent,
        };
        let mut data = cx.exchange.data.take().unwrap_or_default();
        data.clear(bytes);
        if let Err(fault) = memory::load(cx, &access, &mut data) {
            return Step::Fault(fault);
        }
        let mut at = 0;
        for part in &parts {
            scatter(cx, &data, at, element as usize, signed, *part);
            at += element as usize;
        }
        cx.exchange.data = Some(data);
        Step::Next
    }))
}

/// A kernel's parameter at a known place: the same for all lanes.
fn parameter(
    offset: i64,
    parts: Vec<Part>,
    element: u32,
    bytes: u32,
    signed: bool,
) -> Result<Action, LoadError> {
    let at = usize::try_from(offset).map_err(|_| bad("a parameter before the first"))?;
    if at % bytes as usize != 0 {
        return Err(bad(format!("{bytes} bytes of parameters at offset {at}")));
    }
    Ok(Action::plain(move |cx| {
        let Some(source) = cx.launch.params.get(at..at + bytes as usize) else {
            let lane = cx.mask.trailing_zeros() as usize;
            let message = format!("a read of {bytes} bytes beyond the parameters");
            cx.report(Kind::OutOfBounds, lane, Some(at as u64), message);
            return Step::Fault(Fault::IllegalAddress);
        };
        let mut data = Data::default();
        for (words, chunk) in data.words.iter_mut().zip(source.chunks(4)) {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            *words = [u32::from_le_bytes(word); LANES];
        }
        let mut from = 0;
        for part in &parts {
            scatter(cx, &data, from, element as usize, signed, *part);
            from += element as usize;
        }
        Step::Next
    }))
}

/// Puts element bytes `at..at + size` of the data into a register.
#[inline(always)]
fn scatter(
    cx: &mut crate::machine::Cx,
    data: &Data,
    at: usize,
    size: usize,
    signed: bool,
    part: Part,
) {
    let word = at / 4;
    match part {
        Part::Nothing => {}
        Part::Narrow(register, _) if size == 4 => {
            cx.regs
                .set32(register, cx.mask, &data.words[word], data.undef[word]);
        }
        Part::Wide(register) if size == 8 => {
            let (low, high) = (&data.words[word], &data.words[word + 1]);
            let value = std::array::from_fn(|l| u64::from(high[l]) << 32 | u64::from(low[l]));
            let (ul, uh) = (data.undef[word], data.undef[word + 1]);
            let undef = [ul[0], ul[1], ul[2], ul[3], uh[0], uh[1], uh[2], uh[3]];
            cx.regs.set64(register, cx.mask, &value, undef);
        }
        // An element narrower than the register: extended by its sign or by zeros.
        part => {
            let shift = 8 * (at % 4);
            let keep = if size == 4 {
                u32::MAX
            } else {
                (1 << (8 * size)) - 1
            };
            let fill = 32 - 8 * size as u32;
            let value: [i64; LANES] = std::array::from_fn(|l| {
                let bits = data.words[word][l] >> shift & keep;
                if signed {
                    i64::from((bits << fill) as i32 >> fill)
                } else {
                    i64::from(bits)
                }
            });
            let mut undef = [0; 8];
            for (byte, plane) in undef.iter_mut().enumerate() {
                if byte < size {
                    *plane = data.undef[word][at % 4 + byte];
                } else if signed {
                    *plane = data.undef[word][at % 4 + size - 1];
                }
            }
            match part {
                Part::Narrow(register, bits) => {
                    let keep = if bits >= 32 {
                        u32::MAX
                    } else {
                        (1 << bits) - 1
                    };
                    let value = value.map(|v| v as u32 & keep);
                    let mut planes = [0; 4];
                    let used = bits as usize / 8;
                    planes[..used].copy_from_slice(&undef[..used]);
                    cx.regs.set32(register, cx.mask, &value, planes);
                }
                Part::Wide(register) => {
                    let value = value.map(|v| v as u64);
                    cx.regs.set64(register, cx.mask, &value, undef);
                }
                Part::Nothing => {}
            }
        }
    }
}

fn store(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let (order, scope) = take_order(m, true)?;
    let space = take_space(m)?;
    let policy = take_cache_hints(m);
    let vector = take_vector(m);
    let ty = m.ty()?;
    let (element, bytes) = check_size(vector, ty)?;
    let (a, d) = operands_without_policy(i, policy)?;
    let target = Target::of(space, f.address(a)?)?;
    if target.space == Space::Const {
        return Err(bad("'st' to constant memory"));
    }
    let parts = parts(d, vector, ty, false, f)?;
    Ok(Action::plain(move |cx| {
        let (addresses, undef) = target.addresses(cx);
        if undef & cx.mask != 0 {
            report_address(cx, undef & cx.mask);
        }
        let mut data = cx.exchange.data.take().unwrap_or_default();
        data.clear(bytes);
        let mut at = 0;
        for part in &parts {
            gather(cx, &mut data, at, element as usize, *part);
            at += element as usize;
        }
        let access = Access {
            space: target.space,
            addresses: &addresses,
            mask: cx.mask,
            bytes,
            element,
            order,
            scope,
            non_coherent: false,
        };
        let stored = memory::store(cx, &access, &data);
        cx.exchange.data = Some(data);
        match stored {
            Ok(()) => Step::Next,
            Err(fault) => Step::Fault(fault),
        }
    }))
}

/// Takes element bytes `at..at + size` of the data from a register.
#[inline(always)]
fn gather(cx: &crate::machine::Cx, data: &mut Data, at: usize, size: usize, part: Part) {
    let word = at / 4;
    match part {
        Part::Nothing => {}
        Part::Narrow(register, _) if size == 4 => {
            data.words[word] = *cx.regs.get32(register);
            data.undef[word] = cx.regs.undef32(register);
        }
        Part::Wide(register) if size == 8 => {
            let value = cx.regs.get64(register);
            data.words[word] = value.map(|v| v as u32);
            data.words[word + 1] = value.map(|v| (v >> 32) as u32);
            let undef = cx.regs.undef64(register);
            data.undef[word].copy_from_slice(&undef[..4]);
            data.undef[word + 1].copy_from_slice(&undef[4..]);
        }
        part => {
            let (value, undef): ([u32; LANES], [u32; 4]) = match part {
                Part::Narrow(register, _) => (*cx.regs.get32(register), cx.regs.undef32(register)),
                Part::Wide(register) => {
                    let undef = cx.regs.undef64(register);
                    (
                        cx.regs.get64(register).map(|v| v as u32),
                        [undef[0], undef[1], undef[2], undef[3]],
                    )
                }
                Part::Nothing => return,
            };
            let shift = 8 * (at % 4);
            let keep = if size == 4 {
                u32::MAX
            } else {
                (1 << (8 * size)) - 1
            };
            for (to, from) in data.words[word].iter_mut().zip(value) {
                *to |= (from & keep) << shift;
            }
            data.undef[word][at % 4..at % 4 + size].copy_from_slice(&undef[..size]);
        }
    }
}

/// Generic addresses to those of a space and back.
fn cvta(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let to = m.take("to");
    let space = take_space(m)?;
    let ty = m.ty()?;
    if ty != Type::U64 {
        return Err(unsupported(format!("'cvta' of {ty:?}")));
    }
    expect_operands(i, 2..=2)?;
    let window = match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        Space::Global | Space::Const => 0,
        Space::Generic => return Err(bad("'cvta' wants a space")),
    };
    let change = if to { window.wrapping_neg() } else { window };
    let d = f.dst64(&i.operands[0])?;
    // `cvta.shared.u64 d, variable;` takes the variable's address at once.
    if let Operand::Name(_) | Operand::NameOffset(..) = &i.operands[1]
        && f.register_bits(&i.operands[1]).is_none()
    {
        let (name, offset) = match &i.operands[1] {
            Operand::NameOffset(name, offset) => (name.clone(), *offset),
            Operand::Name(name) => (name.clone(), 0),
            _ => return Err(bad("'cvta' of nothing")),
        };
        let address = Operand::Address {
            base: Some(name),
            offset,
        };
        let target = Target::of(space, f.address(&address)?)?;
        return Ok(Action::simple(move |cx| {
            let (value, _) = target.addresses(cx);
            let value = value.map(|v| v.wrapping_add(change));
            cx.regs.set64(d, cx.mask, &value, [0; 8]);
        }));
    }
    let a = f.src64(&i.operands[1], ty)?;
    Ok(Action::simple(move |cx| {
        let value = cx.regs.get64(a).map(|v| v.wrapping_add(change));
        let undef = cx.regs.undef64(a);
        cx.regs.set64(d, cx.mask, &value, undef);
    }))
}

fn isspacep(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let space = take_space(m)?;
    expect_operands(i, 2..=2)?;
    let d = f.dst_pred(&i.operands[0])?;
    let a = f.src64(&i.operands[1], Type::U64)?;
    Ok(Action::simple(move |cx| {
        let value = *cx.regs.get64(a);
        let mut out = 0;
        for lane in lanes(cx.mask) {
            let found = space_of(value[lane]);
            let is = match space {
                Space::Const => found == Space::Global && cx.world.memory.is_constant(value[lane]),
                Space::Global => {
                    found == Space::Global && !cx.world.memory.is_constant(value[lane])
                }
                space => found == space,
            };
            out |= u32::from(is) << lane;
        }
        let undef = cx.regs.any_undef64(a);
        cx.regs.set_pred(d, cx.mask, out, undef);
    }))
}
