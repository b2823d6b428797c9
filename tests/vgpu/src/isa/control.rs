//! Branches, calls and the end of a thread.

use super::expect_operands;
use crate::finding::{Fault, Kind};
use crate::lowering::{LoadError, Lowering, Modifiers, Symbol, bad, code_address, unsupported};
use crate::program::{Action, CallSite, Step};
use crate::ptx::ast::{Instruction, Operand, Type};
use crate::registers::lanes;

/// See [`super::lower`].
pub(super) fn lower(
    instruction: &Instruction,
    modifiers: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    Some(match instruction.opcode.as_str() {
        "bra" => {
            modifiers.take("uni");
            branch(instruction, f)
        }
        "brx" => {
            modifiers.take("idx");
            modifiers.take("uni");
            indexed_branch(instruction, f)
        }
        "ret" => {
            modifiers.take("uni");
            expect_operands(instruction, 0..=0).map(|()| Action::plain(|_| Step::Return))
        }
        "exit" => expect_operands(instruction, 0..=0).map(|()| Action::plain(|_| Step::Exit)),
        "call" => {
            modifiers.take("uni");
            call(instruction, f)
        }
        _ => return None,
    })
}

fn branch(instruction: &Instruction, f: &mut Lowering) -> Result<Action, LoadError> {
    expect_operands(instruction, 1..=1)?;
    let target = f.label(&instruction.operands[0])?;
    Ok(Action::plain(move |_| Step::Jump(target)))
}

fn indexed_branch(instruction: &Instruction, f: &mut Lowering) -> Result<Action, LoadError> {
    expect_operands(instruction, 2..=2)?;
    let index = f.src32(&instruction.operands[0], Type::U32)?;
    let targets = f.branch_targets(&instruction.operands[1])?;
    Ok(Action::plain(move |cx| {
        let values = *cx.regs.get32(index);
        let undef = cx.regs.any_undef32(index) & cx.mask;
        if undef != 0 {
            let lane = undef.trailing_zeros() as usize;
            let message = "a value nobody wrote decides where a branch goes";
            cx.report(Kind::Uninitialised, lane, None, message.to_owned());
        }
        for lane in lanes(cx.mask) {
            match targets.get(values[lane] as usize) {
                Some(&target) => cx.targets[lane] = target,
                None => {
                    let message = format!(
                        "a branch takes entry {} of a table of {}",
                        values[lane],
                        targets.len()
                    );
                    cx.report(Kind::Trap, lane, None, message);
                    return Step::Fault(Fault::InvalidPc);
                }
            }
        }
        Step::JumpEach
    }))
}

/// `call (results), target, (arguments), prototype;` where each list may be missing.
fn call(instruction: &Instruction, f: &mut Lowering) -> Result<Action, LoadError> {
    let mut operands = instruction.operands.as_slice();
    let list = |operands: &mut &[Operand]| -> Vec<Operand> {
        match operands.split_first() {
            Some((Operand::List(list), rest)) => {
                *operands = rest;
                list.clone()
            }
            _ => Vec::new(),
        }
    };
    let results = list(&mut operands);
    let Some((target, rest)) = operands.split_first() else {
        return Err(bad("'call' names no function"));
    };
    operands = rest;
    let arguments = list(&mut operands);
    let Operand::Name(name) = target else {
        return Err(bad(format!("'call' of {target:?}")));
    };
    let places = |f: &mut Lowering, list: &[Operand]| -> Result<Vec<(u32, u32)>, LoadError> {
        list.iter()
            .map(|operand| match operand {
                Operand::Name(name) => match f.lookup(name)? {
                    Symbol::FrameParam(offset, size) => Ok((offset, size)),
                    _ => Err(unsupported(format!("'{name}', no '.param', in a call"))),
                },
                other => Err(unsupported(format!("{other:?} in a call"))),
            })
            .collect()
    };
    let site = CallSite {
        arguments: places(f, &arguments)?,
        results: places(f, &results)?,
    };
    match f.lookup(name)? {
        Symbol::Function(number) => {
            let function = f.function(number);
            if function.entry {
                return Err(bad(format!("'call' of the kernel '{name}'")));
            }
            let counts = (function.params.len(), function.returns.len());
            if counts != (site.arguments.len(), site.results.len()) {
                return Err(bad(format!(
                    "'{name}' takes {} and returns {}; the call gives {} and takes {}",
                    counts.0,
                    counts.1,
                    site.arguments.len(),
                    site.results.len()
                )));
            }
            match f.callee(number) {
                Some(callee) => {
                    let site = f.call_site(site);
                    Ok(Action::plain(move |cx| {
                        cx.targets = [callee; 32];
                        Step::Call(site)
                    }))
                }
                None => super::sync::system_call(name, &site, f),
            }
        }
        Symbol::Reg64(register, _) => {
            let code = f.code_addresses();
            let site = f.call_site(site);
            Ok(Action::plain(move |cx| {
                let addresses = *cx.regs.get64(register);
                let undef = cx.regs.any_undef64(register) & cx.mask;
                if undef != 0 {
                    let lane = undef.trailing_zeros() as usize;
                    let message = "a value nobody wrote decides which function is called";
                    cx.report(Kind::Uninitialised, lane, None, message.to_owned());
                }
                for lane in lanes(cx.mask) {
                    match code.get(&addresses[lane]) {
                        Some(&callee) => cx.targets[lane] = callee,
                        None => {
                            let message = "a call through an address that is no function";
                            cx.report(Kind::Trap, lane, Some(addresses[lane]), message.to_owned());
                            return Step::Fault(Fault::InvalidPc);
                        }
                    }
                }
                Step::Call(site)
            }))
        }
        _ => Err(bad(format!(
            "'{name}' is no function (functions are at {:#x})",
            code_address(0)
        ))),
    }
}
