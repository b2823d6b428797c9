//! From a litmus test to PTX: one kernel a device, in which every thread finds its program by
//! its block and number and writes its registers out at the end.

use std::fmt::Write;

use super::{Op, ParseError, State, Statement, Test, Value};

/// Where the variables and the registers lie.
pub(super) struct Layout {
    /// Offset of each variable, in global or in shared memory.
    offsets: Vec<u32>,
    /// The variables in global memory at first.
    pub(super) image: Vec<u8>,
    shared_bytes: u32,
    /// Registers of each thread, each with its bytes.
    registers: Vec<Vec<u32>>,
    pub(super) out_bytes: usize,
}

/// Bytes of the registers of one thread, written out.
const OUT: usize = 256;

pub(super) fn kernel_name(device: u32) -> String {
    format!("device{device}")
}

impl Layout {
    fn new(test: &Test) -> Result<Self, ParseError> {
        let (mut image, mut shared_bytes) = (Vec::new(), 0u32);
        let mut offsets = Vec::new();
        for variable in &test.variables {
            let size = (variable.bytes * variable.count).next_multiple_of(32);
            if variable.shared {
                offsets.push(shared_bytes);
                shared_bytes += size;
            } else {
                let at = image.len();
                offsets.push(at as u32);
                image.resize(at + size as usize, 0);
                for element in 0..variable.count as usize {
                    let n = variable.bytes as usize;
                    let at = at + element * n;
                    image[at..at + n].copy_from_slice(&variable.initial.to_le_bytes()[..n]);
                }
            }
        }
        let mut registers = Vec::new();
        for thread in &test.threads {
            let mut widths: Vec<u32> = Vec::new();
            for statement in &thread.program {
                let (loaded, at): (Vec<u32>, _) = match &statement.op {
                    Op::Load { to, from, .. } => (to.clone(), from),
                    Op::Atomic { to, at, .. } => (to.iter().copied().collect(), at),
                    _ => continue,
                };
                let bytes = test.variables[at.variable].bytes;
                for register in loaded {
                    let at = register as usize;
                    if 8 * at >= OUT {
                        return Err(ParseError::new(format!("r{register}: too many registers")));
                    }
                    widths.resize(widths.len().max(at + 1), 0);
                    if widths[at] != 0 && widths[at] != bytes {
                        return Err(ParseError::new(format!(
                            "{}: r{register} is of {} and of {bytes} bytes",
                            thread.name, widths[at]
                        )));
                    }
                    widths[at] = bytes;
                }
            }
            registers.push(widths);
        }
        image.resize(image.len().max(4), 0);
        Ok(Self {
            offsets,
            image,
            shared_bytes,
            out_bytes: OUT * registers.len().max(1),
            registers,
        })
    }

    /// The final state from the bytes of memory.
    pub(super) fn state(&self, test: &Test, image: &[u8], out: &[u8]) -> State {
        let read = |bytes: &[u8], at: usize, n: u32| {
            let mut all = [0; 8];
            all[..n as usize].copy_from_slice(&bytes[at..at + n as usize]);
            u64::from_le_bytes(all)
        };
        let registers = self.registers.iter().enumerate().map(|(thread, widths)| {
            let one = |(r, _): (usize, &u32)| read(out, OUT * thread + 8 * r, 8);
            widths.iter().enumerate().map(one).collect()
        });
        let memory = test.variables.iter().zip(&self.offsets).map(|(v, &at)| {
            let one = |element: u32| {
                let at = (at + element * v.bytes) as usize;
                if v.shared {
                    0
                } else {
                    read(image, at, v.bytes)
                }
            };
            (0..v.count).map(one).collect()
        });
        State {
            registers: registers.collect(),
            memory: memory.collect(),
        }
    }
}

/// The PTX of a test.
pub(super) fn generate(test: &Test) -> Result<(String, Layout), ParseError> {
    let layout = Layout::new(test)?;
    let mut text = ".version 8.5\n.target sm_90\n.address_size 64\n".to_owned();
    let devices = 1 + test.threads.iter().map(|t| t.at.device).max().unwrap_or(0);
    for device in 0..devices {
        let here: Vec<usize> = (0..test.threads.len())
            .filter(|&t| test.threads[t].at.device == device)
            .collect();
        if !here.is_empty() {
            kernel(test, &layout, device, &here, &mut text)?;
        }
    }
    Ok((text, layout))
}

fn kernel(
    test: &Test,
    layout: &Layout,
    device: u32,
    here: &[usize],
    text: &mut String,
) -> Result<(), ParseError> {
    let name = kernel_name(device);
    // Writing to a string does not fail.
    let mut line = |words: std::fmt::Arguments| {
        let _ = writeln!(text, "{words}");
    };
    line(format_args!(
        ".visible .entry {name}(.param .u64 memory, .param .u64 out)\n{{"
    ));
    line(format_args!(
        ".reg .b64 %m, %o, %w<64>;\n.reg .b32 %id, %n, %k, %a<64>;\n.reg .pred %p;"
    ));
    if layout.shared_bytes > 0 {
        let bytes = layout.shared_bytes;
        line(format_args!(".shared .align 16 .b8 box[{bytes}];"));
    }
    line(format_args!(
        "ld.param.u64 %m, [memory];\nld.param.u64 %o, [out];\nmov.u32 %id, %tid.x;\n\
         mov.u32 %n, %ctaid.x;\nshl.b32 %n, %n, 16;\nadd.u32 %id, %id, %n;"
    ));
    for &thread in here {
        let at = test.threads[thread].at;
        let id = at.block << 16 | (32 * at.warp + at.lane);
        line(format_args!(
            "setp.eq.u32 %p, %id, {id};\n@%p bra T{thread};"
        ));
    }
    line(format_args!("ret;"));
    for &thread in here {
        line(format_args!("T{thread}:"));
        for (register, &bytes) in layout.registers[thread].iter().enumerate() {
            match bytes {
                8 => line(format_args!("mov.b64 %w{register}, 0;")),
                _ => line(format_args!("mov.b32 %a{register}, 0;")),
            }
        }
        if layout.shared_bytes > 0 {
            if thread == here[0] {
                for (variable, at) in test.variables.iter().zip(&layout.offsets) {
                    for element in (0..variable.count).filter(|_| variable.shared) {
                        line(format_args!(
                            "st.shared.u{} [box+{}], {};",
                            8 * variable.bytes,
                            at + element * variable.bytes,
                            variable.initial
                        ));
                    }
                }
            }
            line(format_args!("barrier.sync 15;"));
        }
        for words in &test.threads[thread].program {
            line(format_args!("{}", statement(test, layout, thread, words)?));
        }
        for (register, &bytes) in layout.registers[thread].iter().enumerate() {
            let at = OUT * thread + 8 * register;
            match bytes {
                0 => {}
                8 => line(format_args!("st.global.b64 [%o+{at}], %w{register};")),
                _ => line(format_args!("st.global.b32 [%o+{at}], %a{register};")),
            }
        }
        line(format_args!("ret;"));
    }
    line(format_args!("}}"));
    Ok(())
}

/// One statement in PTX.
fn statement(
    test: &Test,
    layout: &Layout,
    thread: usize,
    statement: &Statement,
) -> Result<String, ParseError> {
    let registers = &layout.registers[thread];
    let name = |register: u32| match registers.get(register as usize) {
        Some(8) => Ok(format!("%w{register}")),
        Some(4) => Ok(format!("%a{register}")),
        _ => Err(ParseError::new(format!("r{register} is never loaded"))),
    };
    let value = |value: &Value| match value {
        Value::Register(register) => name(*register),
        Value::Number(number) => Ok(number.to_string()),
    };
    let list = |words: Vec<String>| match words.as_slice() {
        [one] => one.clone(),
        many => format!("{{{}}}", many.join(", ")),
    };
    let opcode = &statement.opcode;
    let place = |at: &super::Location| {
        let variable = &test.variables[at.variable];
        let offset = layout.offsets[at.variable] + at.element * variable.bytes;
        let bits = 8 * variable.bytes;
        match variable.shared {
            true => ("shared", format!("[box+{offset}]"), bits),
            false => ("global", format!("[%m+{offset}]"), bits),
        }
    };
    let guard = match statement.guard {
        None => String::new(),
        Some((register, number, equal)) => {
            let (register, is) = (name(register)?, if equal { "eq" } else { "ne" });
            let bits = if register.starts_with("%w") { 64 } else { 32 };
            format!("setp.{is}.u{bits} %p, {register}, {number};\n@%p ")
        }
    };
    let body = match &statement.op {
        Op::Load { to, from, .. } => {
            let (space, at, bits) = place(from);
            let to: Result<Vec<String>, _> = to.iter().map(|&r| name(r)).collect();
            format!("{opcode}.{space}.b{bits} {}, {at};", list(to?))
        }
        Op::Store { to, values, .. } => {
            let (space, at, bits) = place(to);
            let values: Result<Vec<String>, _> = values.iter().map(value).collect();
            format!("{opcode}.{space}.b{bits} {at}, {};", list(values?))
        }
        Op::Atomic {
            update,
            to,
            at,
            operands,
            ..
        } => {
            let (space, at, bits) = place(at);
            let kind = match update.as_str() {
                "add" | "inc" | "dec" | "min" | "max" => 'u',
                _ => 'b',
            };
            let operands: Result<Vec<String>, _> = operands.iter().map(value).collect();
            let operands = operands?.join(", ");
            match to {
                Some(to) => format!(
                    "{opcode}.{space}.{kind}{bits} {}, {at}, {operands};",
                    name(*to)?
                ),
                None => format!("{opcode}.{space}.{kind}{bits} {at}, {operands};"),
            }
        }
        Op::Fence { .. } => format!("{opcode};"),
        Op::Barrier { id, threads: None } => format!("barrier.sync {id};"),
        Op::Barrier {
            id,
            threads: Some(threads),
        } => format!("barrier.sync {id}, {threads};"),
    };
    Ok(guard + &body)
}
