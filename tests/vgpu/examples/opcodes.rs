//! Prints how often each opcode, with its modifiers, stands in a PTX file:
//! `cargo run -p vgpu --example opcodes kernel.ptx`

use std::collections::BTreeMap;
use std::process::ExitCode;

use vgpu::ptx::ast::Statement;

fn count(statements: &[Statement], counts: &mut BTreeMap<String, usize>) {
    for statement in statements {
        match statement {
            Statement::Instruction(instruction) => {
                let mut name = instruction.opcode.clone();
                for modifier in &instruction.modifiers {
                    name.push('.');
                    name.push_str(modifier);
                }
                *counts.entry(name).or_default() += 1;
            }
            Statement::Block(inner) => count(inner, counts),
            _ => {}
        }
    }
}

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: opcodes <file of PTX>");
        return ExitCode::from(2);
    };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let module = match vgpu::ptx::parse(&text) {
        Ok(module) => module,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut counts = BTreeMap::new();
    for function in &module.functions {
        count(function.body.as_deref().unwrap_or_default(), &mut counts);
    }
    for (opcode, n) in counts {
        println!("{opcode}\t{n}");
    }
    ExitCode::SUCCESS
}
