//! The block's barriers and the warp's.

use super::super::expect_operands;
use crate::finding::{Fault, Kind};
use crate::lowering::{LoadError, Lowering, Modifiers, bad, unsupported};
use crate::machine::Cx;
use crate::program::{Action, Barrier, BarrierRequest, Part, WarpSync};
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::{FULL, R32, lanes};

/// `bar`, `barrier`, `bar.warp.sync`.
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Result<Action, LoadError> {
    if m.take("cluster") {
        return Err(unsupported("'barrier.cluster'"));
    }
    if m.take("warp") {
        if !m.take("sync") {
            return Err(bad("'bar.warp' wants .sync"));
        }
        expect_operands(i, 1..=1)?;
        let members = f.src32(&i.operands[0], Type::B32)?;
        return Ok(Action::WarpSync(WarpSync {
            key: "bar.warp.sync".into(),
            aligned: false,
            members: Some(members),
            publish: Box::new(|_| {}),
            collect: Box::new(|_| {}),
            orders_memory: true,
        }));
    }
    m.take("cta");
    // `bar` is `barrier.aligned`.
    let aligned = m.take("aligned") || i.opcode == "bar";
    let operation = m
        .take_any(&["sync", "arrive", "red"])
        .ok_or_else(|| bad(format!("'{}' wants .sync, .arrive or .red", i.opcode)))?;
    match operation {
        "red" => reduction(i, m, f, aligned),
        operation => {
            let arrive_only = operation == "arrive";
            expect_operands(i, if arrive_only { 2..=2 } else { 1..=2 })?;
            let request = request(&i.operands[0], i.operands.get(1), aligned, arrive_only, f)?;
            Ok(Action::Barrier(Barrier {
                request,
                predicate: None,
                finish: None,
            }))
        }
    }
}

/// Reads an operand that must be the same in all lanes.
fn uniform(cx: &mut Cx, register: R32, what: &str) -> Result<u32, Fault> {
    let first = cx.mask.trailing_zeros() as usize;
    let undef = cx.regs.any_undef32(register) & cx.mask;
    if undef != 0 {
        let lane = undef.trailing_zeros() as usize;
        let message = format!("a value nobody wrote is the {what} of a barrier");
        cx.report(Kind::Uninitialised, lane, None, message);
    }
    let values = *cx.regs.get32(register);
    let value = values[first];
    if let Some(lane) = lanes(cx.mask).find(|&l| values[l] != value) {
        let message = format!(
            "lanes {first} and {lane} of a warp give a barrier different values of its {what}: \
             {value} and {}",
            values[lane]
        );
        cx.report(Kind::Barrier, lane, None, message);
        return Err(Fault::LaunchFailed);
    }
    Ok(value)
}

fn request(
    id: &Operand,
    threads: Option<&Operand>,
    aligned: bool,
    arrive_only: bool,
    f: &mut Lowering,
) -> Result<crate::program::Request, LoadError> {
    let id = f.src32(id, Type::U32)?;
    let threads = threads.map(|t| f.src32(t, Type::U32)).transpose()?;
    Ok(Box::new(move |cx| {
        let id = uniform(cx, id, "number")?;
        let lane = cx.mask.trailing_zeros() as usize;
        if id >= 16 {
            let message = format!("barrier {id}: a block has barriers 0 to 15");
            cx.report(Kind::Barrier, lane, None, message);
            return Err(Fault::IllegalInstruction);
        }
        let threads = match threads {
            None => None,
            Some(threads) => Some(uniform(cx, threads, "thread count")?),
        };
        if let Some(n) = threads
            && (n == 0 || n % 32 != 0 || n > 1024)
        {
            let message =
                format!("a barrier of {n} threads: it must be a multiple of 32 up to 1024");
            cx.report(Kind::Barrier, lane, None, message);
            return Err(Fault::IllegalInstruction);
        }
        Ok(BarrierRequest {
            id,
            threads,
            aligned,
            arrive_only,
        })
    }))
}

/// `bar.red.popc.u32 d, a, b, p` and `bar.red.and.pred p, a, b, q`
fn reduction(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
    aligned: bool,
) -> Result<Action, LoadError> {
    let operation = m
        .take_any(&["popc", "and", "or"])
        .ok_or_else(|| bad("'.red' wants .popc, .and or .or"))?;
    let ty = m.ty()?;
    expect_operands(i, 3..=4)?;
    let last = i.operands.len() - 1;
    let threads = (last == 3).then(|| &i.operands[2]);
    let predicate = f.src_pred(&i.operands[last])?;
    let request = request(&i.operands[1], threads, aligned, false, f)?;
    let finish: Part = match (operation, ty) {
        ("popc", Type::U32) => {
            let d = f.dst32(&i.operands[0])?;
            Box::new(move |cx| {
                let value = [cx.barrier_result.population; 32];
                cx.regs.set32(d, cx.mask, &value, [0; 4]);
            })
        }
        ("and" | "or", Type::Pred) => {
            let d = f.dst_pred(&i.operands[0])?;
            let all = operation == "and";
            Box::new(move |cx| {
                let result = cx.barrier_result;
                let value = if all {
                    result.population == result.threads
                } else {
                    result.population != 0
                };
                cx.regs
                    .set_pred(d, cx.mask, if value { FULL } else { 0 }, 0);
            })
        }
        (operation, ty) => return Err(bad(format!("'.red.{operation}' of {ty:?}"))),
    };
    Ok(Action::Barrier(Barrier {
        request,
        predicate: Some(predicate),
        finish: Some(finish),
    }))
}
