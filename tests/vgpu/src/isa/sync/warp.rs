//! Shuffles, votes, matches and reductions over the lanes of a warp.

use super::super::expect_operands;
use crate::lowering::{LoadError, Lowering, Modifiers, bad, size_of, unsupported};
use crate::program::{Action, Part, WarpSync};
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{FULL, LANES, Pred, R32, R64, lanes};

/// `shfl`, `vote`, `match`, `redux`, `elect`.
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Result<Action, LoadError> {
    if !m.take("sync") {
        return Err(unsupported(format!("'{}' without .sync", i.opcode)));
    }
    match i.opcode.as_str() {
        "shfl" => shuffle(i, m, f),
        "vote" => vote(i, m, f),
        "match" => matching(i, m, f),
        "redux" => reduce(i, m, f),
        _ => elect(i, m, f),
    }
}

fn sync(i: &Instruction, members: R32, publish: Part, collect: Part) -> Action {
    let mut key = i.opcode.clone();
    for modifier in &i.modifiers {
        key.push('.');
        key.push_str(modifier);
    }
    Action::WarpSync(WarpSync {
        key: key.into(),
        aligned: false,
        members: Some(members),
        publish,
        collect,
        orders_memory: false,
    })
}

/// `d|p`, or `d` alone.
fn pair(operand: &Operand, f: &mut Lowering) -> Result<(Operand, Option<Pred>), LoadError> {
    match operand {
        Operand::Pair(d, p) => Ok(((**d).clone(), Some(f.dst_pred(p)?))),
        d => Ok((d.clone(), None)),
    }
}

fn shuffle(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let mode = m
        .take_any(&["up", "down", "bfly", "idx"])
        .ok_or_else(|| bad("'shfl' wants .up, .down, .bfly or .idx"))?
        .to_owned();
    if m.ty()? != Type::B32 {
        return Err(bad("'shfl' moves .b32"));
    }
    expect_operands(i, 5..=5)?;
    let (d, p) = pair(&i.operands[0], f)?;
    let d = f.dst32(&d)?;
    let a = f.src32(&i.operands[1], Type::B32)?;
    let b = f.src32(&i.operands[2], Type::U32)?;
    let c = f.src32(&i.operands[3], Type::U32)?;
    let members = f.src32(&i.operands[4], Type::B32)?;
    let publish: Part = Box::new(move |cx| {
        let value = *cx.regs.get32(a);
        let planes = cx.regs.undef32(a);
        for lane in lanes(cx.mask) {
            cx.exchange.value[lane] = value[lane].into();
        }
        for (to, from) in cx.exchange.undef_bytes.iter_mut().zip(planes) {
            *to = (*to & !cx.mask) | (from & cx.mask);
        }
    });
    // Who reads from whom, as in the ISA's pseudocode for shfl.sync.
    let source = move |lane: usize, b: u32, c: u32| -> (u32, bool) {
        let lane = lane as u32;
        let (b, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
        let highest = (lane & segment) | (clamp & !segment);
        let lowest = lane & segment;
        let (from, inside) = match mode.as_str() {
            "up" => {
                let from = lane as i32 - b as i32;
                (from as u32, from >= highest as i32)
            }
            "down" => (lane + b, lane + b <= highest),
            "bfly" => (lane ^ b, (lane ^ b) <= highest),
            _ => {
                let from = lowest | (b & !segment);
                (from, from <= highest)
            }
        };
        (if inside { from } else { lane }, inside)
    };
    let collect: Part = Box::new(move |cx| {
        let (b_values, c_values) = (*cx.regs.get32(b), *cx.regs.get32(c));
        let unsure = cx.regs.any_undef32(b) | cx.regs.any_undef32(c);
        let mut out = [0; LANES];
        let mut planes = [0; 4];
        let mut inside = 0u32;
        for lane in lanes(cx.mask) {
            let (from, valid) = source(lane, b_values[lane], c_values[lane]);
            inside |= u32::from(valid) << lane;
            out[lane] = cx.exchange.value[from as usize] as u32;
            // What a lane that does not take part would give is unspecified.
            let absent = cx.members >> from & 1 == 0;
            for (plane, from_plane) in planes.iter_mut().zip(cx.exchange.undef_bytes) {
                let undef = absent || from_plane >> from & 1 != 0 || unsure >> lane & 1 != 0;
                *plane |= u32::from(undef) << lane;
            }
        }
        cx.regs.set32(d, cx.mask, &out, planes);
        if let Some(p) = p {
            cx.regs.set_pred(p, cx.mask, inside, unsure);
        }
    });
    Ok(sync(i, members, publish, collect))
}

fn vote(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let mode = m
        .take_any(&["all", "any", "uni", "ballot"])
        .ok_or_else(|| bad("'vote' wants .all, .any, .uni or .ballot"))?
        .to_owned();
    let ty = m.ty()?;
    expect_operands(i, 3..=3)?;
    let (a, negated) = f.src_pred(&i.operands[1])?;
    let flip = if negated { FULL } else { 0 };
    let members = f.src32(&i.operands[2], Type::B32)?;
    let publish: Part = Box::new(move |cx| {
        let value = cx.regs.pred(a) ^ flip;
        let undef = cx.regs.pred_undef(a);
        let exchange = &mut cx.exchange;
        exchange.predicate = (exchange.predicate & !cx.mask) | (value & cx.mask);
        exchange.undef = (exchange.undef & !cx.mask) | (undef & cx.mask);
    });
    let collect: Part = match (mode.as_str(), ty) {
        ("ballot", Type::B32) => {
            let d = f.dst32(&i.operands[0])?;
            Box::new(move |cx| {
                let value = cx.exchange.predicate & cx.members;
                let undef = if cx.exchange.undef & cx.members != 0 {
                    FULL
                } else {
                    0
                };
                cx.regs.set32(d, cx.mask, &[value; LANES], [undef; 4]);
            })
        }
        ("all" | "any" | "uni", Type::Pred) => {
            let d = f.dst_pred(&i.operands[0])?;
            Box::new(move |cx| {
                let value = cx.exchange.predicate & cx.members;
                let all = value == cx.members;
                let holds = match mode.as_str() {
                    "all" => all,
                    "any" => value != 0,
                    _ => all || value == 0,
                };
                let undef = if cx.exchange.undef & cx.members != 0 {
                    FULL
                } else {
                    0
                };
                cx.regs
                    .set_pred(d, cx.mask, if holds { FULL } else { 0 }, undef);
            })
        }
        (mode, ty) => return Err(bad(format!("'vote.{mode}' of {ty:?}"))),
    };
    Ok(sync(i, members, publish, collect))
}

#[derive(Debug, Clone, Copy)]
enum Any {
    Narrow(R32),
    Wide(R64),
}

/// Publishes a register of either width.
fn publish_value(a: Any) -> Part {
    Box::new(move |cx| {
        let (value, undef) = match a {
            Any::Narrow(a) => (cx.regs.get32(a).map(u64::from), cx.regs.any_undef32(a)),
            Any::Wide(a) => (*cx.regs.get64(a), cx.regs.any_undef64(a)),
        };
        for lane in lanes(cx.mask) {
            cx.exchange.value[lane] = value[lane];
        }
        cx.exchange.undef = (cx.exchange.undef & !cx.mask) | (undef & cx.mask);
    })
}

fn matching(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let all = match m.take_any(&["any", "all"]) {
        Some("any") => false,
        Some(_) => true,
        None => return Err(bad("'match' wants .any or .all")),
    };
    let ty = m.ty()?;
    expect_operands(i, 3..=3)?;
    let (d, p) = pair(&i.operands[0], f)?;
    if p.is_some() && !all {
        return Err(bad("'match.any' has no predicate"));
    }
    let d = f.dst32(&d)?;
    let a = match size_of(ty) {
        8 => Any::Wide(f.src64(&i.operands[1], ty)?),
        4 => Any::Narrow(f.src32(&i.operands[1], ty)?),
        _ => return Err(bad(format!("'match' of {ty:?}"))),
    };
    let members = f.src32(&i.operands[2], Type::B32)?;
    let collect: Part = Box::new(move |cx| {
        let value = cx.exchange.value;
        let same = |lane: usize| {
            lanes(cx.members).fold(0u32, |mask, other| {
                mask | u32::from(value[other] == value[lane]) << other
            })
        };
        let mut out = [0; LANES];
        let mut equal = 0u32;
        for lane in lanes(cx.mask) {
            let mask = same(lane);
            let everyone = mask == cx.members;
            equal |= u32::from(everyone) << lane;
            out[lane] = if all && !everyone { 0 } else { mask };
        }
        let undef = if cx.exchange.undef & cx.members != 0 {
            FULL
        } else {
            0
        };
        cx.regs.set32(d, cx.mask, &out, [undef; 4]);
        if let Some(p) = p {
            cx.regs.set_pred(p, cx.mask, equal, undef);
        }
    });
    Ok(sync(i, members, publish_value(a), collect))
}

fn reduce(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    let operation = m
        .take_any(&["add", "min", "max", "and", "or", "xor"])
        .ok_or_else(|| bad("'redux' wants an operation"))?;
    let absolute = m.take("abs");
    let nan = m.take("NaN");
    let ty = m.ty()?;
    expect_operands(i, 3..=3)?;
    let d = f.dst32(&i.operands[0])?;
    let a = f.src32(&i.operands[1], ty)?;
    let members = f.src32(&i.operands[2], Type::B32)?;
    if ty == Type::F32 && matches!(operation, "min" | "max") {
        return Ok(sync(
            i,
            members,
            publish_value(Any::Narrow(a)),
            reduce_f32(d, operation == "max", absolute, nan),
        ));
    }
    if absolute || nan {
        return Err(bad("'.abs' and '.NaN' on 'redux' want .f32"));
    }
    let combine: fn(u32, u32) -> u32 = match (operation, ty) {
        ("add", Type::U32 | Type::S32) => u32::wrapping_add,
        ("min", Type::U32) => |a, b| a.min(b),
        ("max", Type::U32) => |a, b| a.max(b),
        ("min", Type::S32) => |a, b| (a as i32).min(b as i32) as u32,
        ("max", Type::S32) => |a, b| (a as i32).max(b as i32) as u32,
        ("and", Type::B32) => |a, b| a & b,
        ("or", Type::B32) => |a, b| a | b,
        ("xor", Type::B32) => |a, b| a ^ b,
        (operation, ty) => return Err(bad(format!("'redux.{operation}' of {ty:?}"))),
    };
    let collect: Part = Box::new(move |cx| {
        let value = lanes(cx.members)
            .map(|lane| cx.exchange.value[lane] as u32)
            .reduce(combine)
            .unwrap_or(0);
        let undef = if cx.exchange.undef & cx.members != 0 {
            FULL
        } else {
            0
        };
        cx.regs.set32(d, cx.mask, &[value; LANES], [undef; 4]);
    });
    Ok(sync(i, members, publish_value(Any::Narrow(a)), collect))
}

fn reduce_f32(d: R32, max: bool, absolute: bool, nan: bool) -> Part {
    Box::new(move |cx| {
        let values = lanes(cx.members).map(|lane| {
            let value = f32::from_bits(cx.exchange.value[lane] as u32);
            if absolute { value.abs() } else { value }
        });
        let mut poisoned = false;
        let mut best: Option<f32> = None;
        for value in values {
            if value.is_nan() {
                poisoned = true;
                continue;
            }
            // -0 lies below +0.
            best = Some(match best {
                None => value,
                Some(b) if (value.total_cmp(&b) == std::cmp::Ordering::Greater) == max => value,
                Some(b) => b,
            });
        }
        let out = match best {
            Some(best) if !(nan && poisoned) => best.to_bits(),
            _ => 0x7fff_ffff,
        };
        let undef = if cx.exchange.undef & cx.members != 0 {
            FULL
        } else {
            0
        };
        cx.regs.set32(d, cx.mask, &[out; LANES], [undef; 4]);
    })
}

fn elect(i: &Instruction, _m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    expect_operands(i, 2..=2)?;
    let (d, p) = pair(&i.operands[0], f)?;
    let d = f.dst32(&d)?;
    let members = f.src32(&i.operands[1], Type::B32)?;
    let collect: Part = Box::new(move |cx| {
        // Which lane is elected is the implementation's choice, the same each time.
        let leader = cx.members.trailing_zeros();
        cx.regs.set32(d, cx.mask, &[leader; LANES], [0; 4]);
        if let Some(p) = p {
            cx.regs.set_pred(p, cx.mask, 1 << leader, 0);
        }
    });
    Ok(sync(i, members, Box::new(|_| {}), collect))
}
