//! What the compiler made of the kernels, without running them: no stack and no spills, registers
//! and shared memory as recorded, wide accesses where kernels are bound by memory, and every
//! kernel loaded.
//!
//! `RINGTP_UPDATE_GATES=1 cargo test --features cuda --test cuda_gates` writes the record anew; its
//! change then shows in the diff. Counts are compared under the compiler that
//! `tests/setup-cuda` fetches, and printed under others.
#![cfg(feature = "cuda")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringtp::backend::cuda::{families, fatbins};

/// The release of nvcc that the record is of.
const PINNED: &str = "13.5";

/// The kernels that stream through memory: all of these families.
const STREAMING: [&str; 5] = ["norm", "gemm", "rope", "attention", "rows"];

fn tool(name: &str) -> Command {
    Command::new(Path::new(env!("RINGTP_CUDA_BIN")).join(name))
}

fn output(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A fatbin of the build as a file.
fn file(name: &str, image: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "gates-{}-{}.fatbin",
        std::process::id(),
        name.replace('/', "-")
    ));
    std::fs::write(&path, image).expect("a file in the target directory");
    path
}

/// What a kernel uses on an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    registers: u32,
    stack: u32,
    shared: u32,
    local: u32,
}

/// By architecture (`sm_80`) and kernel, from what `cuobjdump -res-usage` prints.
fn usage(text: &str) -> BTreeMap<(String, String), Usage> {
    let (mut arch, mut kernel) = (String::new(), String::new());
    let mut all = BTreeMap::new();
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("arch = ") {
            arch = rest.to_owned();
        } else if let Some(rest) = line.strip_prefix("Function ") {
            kernel = rest.trim_end_matches(':').to_owned();
        } else if line.starts_with("REG:") {
            let field = |name: &str| {
                let field = line.split_whitespace().find_map(|f| f.strip_prefix(name));
                field
                    .and_then(|f| f.parse().ok())
                    .expect("a number of cuobjdump")
            };
            let usage = Usage {
                registers: field("REG:"),
                stack: field("STACK:"),
                shared: field("SHARED:"),
                local: field("LOCAL:"),
            };
            all.insert((arch.clone(), kernel.clone()), usage);
        }
    }
    all
}

fn usage_of(path: &Path) -> BTreeMap<(String, String), Usage> {
    usage(&output(tool("cuobjdump").arg("-res-usage").arg(path)))
}

/// Kernels that use local memory, and how.
fn stacks(all: &BTreeMap<(String, String), Usage>) -> Vec<String> {
    all.iter()
        .filter(|(_, usage)| usage.stack > 0 || usage.local > 0)
        .map(|((arch, kernel), usage)| format!("{kernel} on {arch}: {usage:?}"))
        .collect()
}

/// The instructions of each kernel on an architecture: `LDG.E.128 R4, …`.
fn machine_code(path: &Path, arch: &str) -> BTreeMap<String, Vec<String>> {
    let text = output(tool("cuobjdump").args(["-sass", "-arch", arch]).arg(path));
    let mut kernel = String::new();
    let mut code: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("Function : ") {
            kernel = name.to_owned();
        } else if let Some((_, rest)) = line.split_once("*/") {
            let instruction = rest.split(';').next().unwrap_or_default().trim();
            // After a predicate, if there is one.
            let bare = match instruction.split_once(' ') {
                Some((predicate, rest)) if predicate.starts_with('@') => rest.trim(),
                _ => instruction,
            };
            if bare.starts_with(|c: char| c.is_ascii_uppercase()) {
                code.entry(kernel.clone())
                    .or_default()
                    .push(bare.to_owned());
            }
        }
    }
    code
}

#[test]
fn no_kernel_has_a_stack_or_spills() {
    for (name, image) in fatbins() {
        let all = usage_of(&file(name, image));
        assert!(!all.is_empty(), "{name}: no machine code");
        assert_eq!(stacks(&all), Vec::<String>::new(), "{name}");
    }
}

/// The gate above would see one.
#[test]
fn a_stack_is_caught() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_gates/faulty.cu");
    let object = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faulty.cubin");
    let arch = "-arch=sm_90";
    output(
        tool("nvcc")
            .args([arch, "-cubin", "-o"])
            .arg(&object)
            .arg(source),
    );
    let found = stacks(&usage_of(&object));
    assert_eq!(found.len(), 1, "{found:?}");
    let code = machine_code(&object, "sm_90");
    assert!(!is_wide(&code["has_a_stack"]), "its loads are narrow");
}

#[test]
fn every_kernel_that_is_built_is_loaded() {
    let listed: BTreeSet<(&str, &str)> = families()
        .iter()
        .flat_map(|family| family.kernels.iter().map(|&kernel| (family.name, kernel)))
        .collect();
    let mut names = BTreeSet::new();
    for &(_, kernel) in &listed {
        assert!(names.insert(kernel), "{kernel} is the name of two kernels");
    }
    for (name, image) in fatbins() {
        let built: BTreeSet<String> = usage_of(&file(name, image))
            .into_keys()
            .map(|(_, kernel)| kernel)
            .collect();
        for kernel in &built {
            assert!(
                listed.contains(&(name, kernel.as_str())),
                "cuda/{name}.cu: {kernel} is in no Family of src/backend/cuda"
            );
        }
        for (_, kernel) in listed.iter().filter(|(family, _)| *family == name) {
            assert!(built.contains(*kernel), "{kernel} is not in cuda/{name}.cu");
        }
    }
}

#[test]
fn registers_and_shared_memory_are_as_recorded() {
    let record = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_gates/resources.tsv");
    let mut found = String::from("kernel\tarch\tregisters\tshared\n");
    let mut rows = BTreeMap::new();
    for (name, image) in fatbins() {
        for ((arch, kernel), usage) in usage_of(&file(name, image)) {
            let number: u32 = arch.trim_start_matches("sm_").parse().unwrap_or(0);
            let row = format!(
                "{name}/{kernel}\t{arch}\t{}\t{}",
                usage.registers, usage.shared
            );
            rows.insert((name, kernel, number), row);
        }
    }
    for row in rows.values() {
        let _ = writeln!(found, "{row}");
    }
    if env!("RINGTP_NVCC_RELEASE") != PINNED {
        test_driver::skipped(format_args!(
            "the record is of nvcc {PINNED}, and not compared"
        ));
        println!("{found}");
        return;
    }
    if std::env::var_os("RINGTP_UPDATE_GATES").is_some() {
        std::fs::write(&record, &found).expect("the record is written");
    }
    let recorded = std::fs::read_to_string(&record).expect("the record");
    // A build may be for some of the architectures only.
    let expected: BTreeSet<&str> = recorded.lines().collect();
    let architectures: BTreeSet<&str> =
        found.lines().filter_map(|l| l.split('\t').nth(1)).collect();
    let found: BTreeSet<&str> = found.lines().collect();
    let missing = expected.difference(&found).filter(|line| {
        let arch = line.split('\t').nth(1);
        arch.is_some_and(|arch| architectures.contains(arch))
    });
    let differences: Vec<String> = found
        .difference(&expected)
        .map(|line| format!("+ {line}"))
        .chain(missing.map(|line| format!("- {line}")))
        .collect();
    assert!(
        differences.is_empty(),
        "tests/cuda_gates/resources.tsv (kernel, arch, registers, shared):\n{}\n\
         if that is meant: RINGTP_UPDATE_GATES=1 cargo test --features cuda --test cuda_gates",
        differences.join("\n")
    );
}

/// Loads and stores of global memory are 16 bytes wide, but for the path of what is not aligned.
fn is_wide(code: &[String]) -> bool {
    let has = |what: &str| {
        code.iter()
            .any(|line| line.starts_with(what) && line.contains(".128"))
    };
    has("LDG") && has("STG")
}

#[test]
fn kernels_that_stream_have_accesses_of_16_bytes() {
    for (name, image) in fatbins().filter(|(name, _)| STREAMING.contains(name)) {
        let path = file(name, image);
        let built: BTreeSet<String> = usage_of(&path).into_keys().map(|(arch, _)| arch).collect();
        for arch in built
            .iter()
            .filter(|arch| ["sm_80", "sm_90"].contains(&arch.as_str()))
        {
            let code = machine_code(&path, arch);
            assert!(!code.is_empty(), "{name} on {arch}: no machine code");
            for (kernel, code) in code {
                assert!(
                    is_wide(&code),
                    "{kernel} on {arch} has no accesses of 16 bytes"
                );
                // Generic accesses would mean that the compiler lost track of the space.
                let generic = code
                    .iter()
                    .find(|l| l.starts_with("LD.") || l.starts_with("ST."));
                assert_eq!(generic, None, "{kernel} on {arch}");
            }
        }
    }
}
