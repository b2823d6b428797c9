//! Every instruction of the inventory is understood, or belongs to a family that is named there
//! as one to come; and every one that is understood has a test.

use std::collections::{BTreeMap, BTreeSet};

use crate::bench::{Form, recorded};

/// The inventory: names, and the family of those that are refused.
fn inventory() -> BTreeMap<&'static str, Option<&'static str>> {
    include_str!("inventory.txt")
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| match line.split_once('\t') {
            Some((name, family)) => (name, Some(family)),
            None => (line, None),
        })
        .collect()
}

/// The register prefix and size in bytes of a type; 0 is a predicate.
fn register(ty: &str) -> Option<(&'static str, usize)> {
    Some(match ty {
        "pred" => ("%p", 0),
        "b8" | "u8" | "s8" | "b16" | "u16" | "s16" | "f16" | "bf16" | "e5m2x2" | "e4m3x2" => {
            ("%h", 2)
        }
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => ("%r", 4),
        "b64" | "u64" | "s64" | "f64" => ("%d", 8),
        _ => return None,
    })
}

/// The smallest valid use of an instruction, made from its name.
fn minimal(name: &str) -> String {
    let mut parts = name.split('.');
    let opcode = parts.next().expect("a name has a first part");
    let modifiers: Vec<&str> = parts.collect();
    let has = |m: &str| modifiers.contains(&m);
    let types: Vec<(&str, usize)> = modifiers.iter().filter_map(|m| register(m)).collect();
    let first = types.first().map_or("%r", |t| t.0);
    // d, a, b, …: registers of the first type, unless the opcode says otherwise.
    let plain = |n: usize| -> String {
        let list: Vec<String> = (0..=n).map(|i| format!("{first}{i}")).collect();
        list.join(", ")
    };
    let vector = |register: &str| {
        let n = match modifiers.iter().find(|m| matches!(**m, "v2" | "v4" | "v8")) {
            Some(v) => v[1..].parse().expect("a digit"),
            None => return format!("{register}0"),
        };
        let list: Vec<String> = (0..n).map(|i| format!("{register}{i}")).collect();
        format!("{{{}}}", list.join(", "))
    };
    let place = if has("shared") || has("shared::cta") {
        "[s]"
    } else if has("local") {
        "[l]"
    } else if has("const") {
        "[c]"
    } else if has("param") {
        if opcode == "ld" { "[p]" } else { "[q]" }
    } else {
        "[%d9]"
    };
    let policy = if has("L2::cache_hint") { ", %d8" } else { "" };
    let wide = |register: &str| match register {
        "%h" => "%r",
        _ => "%d",
    };
    let operands = match opcode {
        "ld" => format!("{}, {place}{policy}", vector(first)),
        "st" => format!("{place}, {}{policy}", vector(first)),
        "atom" if has("cas") => format!("{first}0, {place}, {first}1, {first}2"),
        "atom" => format!("{first}0, {place}, {first}1"),
        "red" => format!("{place}, {first}1"),
        "activemask" | "nanosleep" => "%r0".to_owned(),
        "bar" | "barrier" if has("warp") => "%r0".to_owned(),
        "bar" if has("arrive") => "1, 32".to_owned(),
        "bar" if has("red") => "%p0, 0, %p1".to_owned(),
        "bar" | "barrier" => "0".to_owned(),
        "bra" => "end".to_owned(),
        "call" => "f".to_owned(),
        "createpolicy" => "%d0, 0f3F800000".to_owned(),
        "cvt" => {
            let (d, a) = (types[0].0, types[1].0);
            let packs = modifiers.iter().any(|m| m.ends_with("x2")) && has("f32");
            if packs {
                format!("{d}0, {a}1, {a}2")
            } else {
                format!("{d}0, {a}1")
            }
        }
        "elect" => "%r0|%p0, %r1".to_owned(),
        "fence" | "griddepcontrol" | "membar" | "ret" | "trap" => String::new(),
        "lop3" => format!("{}, 0x96", plain(3)),
        "bfi" => format!("{first}0, {first}1, {first}2, %r3, %r4"),
        "prmt" | "shf" | "dp4a" | "fma" | "sad" => plain(3),
        "mad" | "mul" if has("wide") => {
            let last = if opcode == "mad" {
                format!(", {}2", wide(first))
            } else {
                String::new()
            };
            format!("{}0, {first}1, {first}1{last}", wide(first))
        }
        "mad" => plain(3),
        "match" | "redux" => "%r0, %r1, %r2".to_owned(),
        "selp" => format!("{}, %p1", plain(2)),
        "setmaxnreg" => "40".to_owned(),
        "setp" => format!("%p0, {first}1, {first}2"),
        "shfl" => "%r0|%p0, %r1, %r2, %r3, %r4".to_owned(),
        "vote" if has("ballot") => "%r0, %p1, %r2".to_owned(),
        "vote" => "%p0, %p1, %r2".to_owned(),
        "shl" | "shr" => format!("{first}0, {first}1, %r2"),
        "bfind" | "clz" | "popc" => format!("%r0, {first}1"),
        "abs" | "brev" | "cos" | "cvta" | "ex2" | "lg2" | "mov" | "neg" | "not" | "rcp"
        | "rsqrt" | "sin" | "sqrt" | "tanh" => plain(1),
        "add" | "and" | "copysign" | "div" | "max" | "min" | "or" | "rem" | "sub" | "xor"
        | "mul" => plain(2),
        other => panic!("the inventory has '{other}': say here how it is written"),
    };
    format!("{name} {operands};")
}

/// A module with one kernel around an instruction.
fn around(instruction: &str) -> String {
    format!(
        ".version 8.7\n.target sm_90\n.address_size 64\n\
         .const .align 32 .b8 c[64];\n\
         .func f() {{ ret; }}\n\
         .entry k(.param .align 32 .b8 p[64])\n{{\n\
         .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<16>; .reg .b64 %d<16>;\n\
         .shared .align 32 .b8 s[64]; .local .align 32 .b8 l[64];\n\
         .param .align 32 .b8 q[64];\n{instruction}\nend: ret;\n}}\n"
    )
}

fn load(text: &str) -> Result<(), String> {
    let module = vgpu::ptx::parse(text).map_err(|e| e.to_string())?;
    let mut rig = vgpu::rig::Rig::new(vgpu::machine::Config::default());
    rig.load(&module).map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn every_instruction_of_the_inventory_is_understood_or_of_a_family_to_come() {
    let mut wrong = Vec::new();
    let (mut understood, mut to_come) = (0, 0);
    for (name, family) in inventory() {
        match family {
            None => {
                understood += 1;
                if let Err(error) = load(&around(&minimal(name))) {
                    wrong.push(format!("{}: {error}", minimal(name)));
                }
            }
            Some(family) => {
                to_come += 1;
                // Refused by name, whatever its operands: never taken for something else.
                let operands = if name.starts_with("fence") {
                    ""
                } else {
                    "[s], [%d9]"
                };
                match load(&around(&format!("{name} {operands};"))) {
                    Err(error) if error.contains("not implemented") => {}
                    other => wrong.push(format!("{name} ({family}): {other:?}")),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("{understood} instructions understood, {to_come} of families to come");
}

/// Those of some names that nothing tested.
fn untested<'a>(names: impl Iterator<Item = &'a str>, tested: &BTreeSet<Form>) -> Vec<&'a str> {
    names
        .filter(|name| !tested.contains(&Form::of(name)))
        .collect()
}

#[test]
fn every_instruction_that_is_understood_has_a_test() {
    let tested = recorded(crate::EVERY_TEST);
    let understood = inventory()
        .into_iter()
        .filter(|(_, family)| family.is_none());
    let missing = untested(understood.map(|(name, _)| name), &tested);
    assert!(missing.is_empty(), "no test runs {missing:#?}");
    let opcodes: BTreeSet<&str> = tested.iter().map(|form| form.opcode.as_str()).collect();
    let missing: Vec<&&str> = vgpu::isa::OPCODES
        .iter()
        .filter(|opcode| !opcodes.contains(**opcode))
        .collect();
    assert!(missing.is_empty(), "no test runs any form of {missing:?}");
    // Order does not matter, and what is missing would be seen.
    let names = ["ld.acquire.gpu.global.b32", "add.rn.sat.f64", "popc.b16"];
    assert_eq!(
        untested(names.into_iter(), &tested),
        ["add.rn.sat.f64", "popc.b16"]
    );
    println!("{} forms of {} opcodes ran", tested.len(), opcodes.len());
}

#[test]
fn an_unknown_opcode_or_modifier_is_refused_by_name() {
    for (text, named) in [
        ("frobnicate.b32 %r0, %r1;", "frobnicate"),
        ("add.frob.u32 %r0, %r1, %r2;", "frob"),
        ("ld.global.frob.u32 %r0, [%d0];", "frob"),
        ("cp.async.cg.shared.global [s], [%d9], 16;", "cp"),
    ] {
        let error = load(&around(text)).expect_err(text);
        assert!(error.contains(named), "{text}: {error}");
        assert!(error.contains("line 11"), "{text}: {error}");
    }
}
