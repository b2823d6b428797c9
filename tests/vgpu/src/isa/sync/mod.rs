//! Barriers, warp-wide operations, and what ends or delays a thread.

mod barrier;
mod system;
mod warp;

use super::expect_operands;
use crate::finding::{Fault, Kind};
use crate::lowering::{LoadError, Lowering, Modifiers, bad, unsupported};
use crate::program::{Action, Step};
use crate::ptx::ast::{Instruction, Type};
use crate::registers::lanes;

pub(super) use system::system_call;

/// See [`super::lower`].
pub(super) fn lower(
    i: &Instruction,
    m: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match i.opcode.as_str() {
        "bar" | "barrier" => barrier::lower(i, m, f),
        "shfl" | "vote" | "match" | "redux" | "elect" => warp::lower(i, m, f),
        "activemask" => activemask(i, m, f),
        "nanosleep" => nanosleep(i, m, f),
        "trap" => expect_operands(i, 0..=0).map(|()| {
            Action::plain(|cx| {
                let lane = cx.mask.trailing_zeros() as usize;
                cx.report(Kind::Trap, lane, None, "'trap' was executed".to_owned());
                Step::Fault(Fault::LaunchFailed)
            })
        }),
        "brkpt" => expect_operands(i, 0..=0).map(|()| {
            Action::plain(|cx| {
                let lane = cx.mask.trailing_zeros() as usize;
                let message = "'brkpt' was executed and there is no debugger";
                cx.report(Kind::Trap, lane, None, message.to_owned());
                Step::Fault(Fault::LaunchFailed)
            })
        }),
        // Hints to the scheduler and the profiler.
        "pmevent" => {
            m.take("mask");
            expect_operands(i, 1..=1).map(|()| Action::simple(|_| {}))
        }
        // Launches do not overlap here: what the previous grid did is done.
        "griddepcontrol" => match m.take_any(&["launch_dependents", "wait"]) {
            Some(_) => expect_operands(i, 0..=0).map(|()| Action::simple(|_| {})),
            None => Err(bad("'griddepcontrol' wants .launch_dependents or .wait")),
        },
        // Registers are not rationed here.
        "setmaxnreg" => {
            m.take_any(&["inc", "dec"]);
            m.take("sync");
            m.take("aligned");
            m.take("u32");
            expect_operands(i, 1..=1).map(|()| Action::simple(|_| {}))
        }
        "alloca" | "stacksave" | "stackrestore" => Err(unsupported(format!("'{}'", i.opcode))),
        _ => return None,
    })
}

fn activemask(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    if m.ty()? != Type::B32 {
        return Err(bad("'activemask' gives .b32"));
    }
    expect_operands(i, 1..=1)?;
    let d = f.dst32(&i.operands[0])?;
    Ok(Action::simple(move |cx| {
        cx.regs.set32(d, cx.mask, &[cx.mask; 32], [0; 4]);
    }))
}

fn nanosleep(i: &Instruction, m: &mut Modifiers, f: &mut Lowering) -> Result<Action, LoadError> {
    if m.ty()? != Type::U32 {
        return Err(bad("'nanosleep' takes .u32"));
    }
    expect_operands(i, 1..=1)?;
    let a = f.src32(&i.operands[0], Type::U32)?;
    Ok(Action::plain(move |cx| {
        let value = cx.regs.get32(a);
        // The hardware sleeps at most a millisecond at a time.
        let longest = lanes(cx.mask).map(|lane| value[lane]).max().unwrap_or(0);
        cx.sleep = u64::from(longest.min(1_000_000));
        Step::Sleep
    }))
}
