//! What the compiler made of the collectives, beside their PTX: the virtual GPU checks the order
//! of accesses in PTX, and here it is seen that the machine code keeps it.
//!
//! For every kernel of `cuda/collective` on every architecture:
//! - flags are stored and polled by strong accesses at system scope, of one word (of the abort word,
//!   which orders nothing, perhaps only the half with the generation);
//! - a membar at system scope stands directly before each releasing store, and the first-level
//!   cache is emptied directly after each acquiring load, on all ways through the kernel;
//! - every access to memory stands between the same barriers, polls and flags as in the PTX: no
//!   load has moved above the poll that guards it, no store behind the flag that announces it;
//! - nothing is read through the constant or the texture cache;
//! - messages move in 16 bytes.
//!
//! Each gate is shown to close: on kernels that are wrong, and on the listings with one line changed.
#![cfg(feature = "cuda")]

mod listing;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use listing::{Kernel, Line, Statement, flow, ptx, sass};
use ringtp::backend::cuda::fatbins;

/// Wrappers of instructions that flags are read and written with, and of data.
const WRAPPERS: [&str; 8] = [
    "st_release_sys",
    "st_relaxed_sys",
    "ld_acquire_sys",
    "ld_relaxed_sys",
    "ld_global_v4",
    "st_global_v4",
    "ld_global",
    "st_global",
];

/// The names of the wrappers, by the lines that they take in a source file.
struct Wrappers(BTreeMap<String, Vec<(u32, &'static str)>>);

impl Wrappers {
    fn read(files: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let read = |file: &&str| {
            let text = std::fs::read_to_string(root.join(file)).expect("a source file");
            let lines = text.lines().zip(1..);
            let starts = lines.filter_map(|(line, number)| {
                let is = |name: &&&str| {
                    line.contains(&format!(" {name}(")) && line.contains("__device__")
                };
                Some((number, *WRAPPERS.iter().find(is)?))
            });
            (Line::new(file, 0).file, starts.collect())
        };
        Self(files.iter().map(read).collect())
    }

    /// The wrapper that a statement is of.
    fn of(&self, statement: &Statement) -> Option<&'static str> {
        let known = |line: &Line| {
            let starts = self.0.get(&line.file)?;
            let before = starts.iter().rev().find(|(start, _)| *start <= line.line)?;
            // No wrapper has more lines.
            (line.line < before.0 + 10).then_some(before.1)
        };
        statement.place.iter().find_map(known)
    }
}

fn is_load(s: &Statement) -> bool {
    matches!(s.name(), "ld" | "LD" | "LDG") && !is_local(s)
}

fn is_store(s: &Statement) -> bool {
    matches!(s.name(), "st" | "ST" | "STG") && !is_local(s)
}

/// Of shared memory, parameters or the constant bank.
fn is_local(s: &Statement) -> bool {
    s.has("shared") || s.has("param") || s.has("const")
}

fn is_access(s: &Statement) -> bool {
    is_load(s) || is_store(s) || matches!(s.name(), "atom" | "red" | "ATOM" | "ATOMG" | "RED")
}

fn is_block_barrier(s: &Statement) -> bool {
    matches!(s.name(), "bar" | "barrier" | "BAR")
}

fn is_strong(s: &Statement) -> bool {
    s.has("STRONG") && s.has("SYS")
}

/// Where a statement comes from, as both listings say it: the innermost line of the project, and
/// the line of the kernel's file that it serves. What lies between is not the same in both, nor
/// is always the file of the innermost line, which the compiler of machine code mistakes for its
/// caller's now and then: its number stands for it.
fn place(statement: &Statement) -> String {
    let own: Vec<_> = statement
        .place
        .iter()
        .filter(|line| !line.file.ends_with(".hpp"))
        .collect();
    // The outermost is the macro that makes a kernel of a template.
    match own.as_slice() {
        [] => "nowhere".to_owned(),
        [only] => only.to_string(),
        [first, .., from, _] | [first, from] => format!("line {} for {from}", first.line),
    }
}

fn at_place(what: &str, s: &Statement) -> String {
    format!("{what}: {} ({})", s.text, place(s))
}

/// What is wrong with the machine code of a kernel, given its PTX.
fn faults(code: &Kernel, from: &Kernel, wrappers: &Wrappers) -> Vec<String> {
    let mut faults = flags(code, wrappers);
    faults.extend(caches(code));
    faults.extend(order(code, from, wrappers));
    faults
}

/// What comes next after each statement: an emptied cache, an access that is no strong load, a
/// barrier.
fn before_data(code: &Kernel) -> flow::Events<String> {
    flow::next_after(code, |at| {
        let s = &code.code[at];
        let other_flag = is_load(s) && is_strong(s);
        let concerns = is_access(s) && !other_flag || is_block_barrier(s) || s.name() == "CCTL";
        concerns.then(|| s.opcode().to_owned())
    })
}

fn emptied(after: &Option<String>) -> bool {
    after.as_deref() == Some("CCTL.IVALL")
}

/// Flags: strong, at system scope, of 64 bits; a membar before a release, an emptied cache after
/// an acquire.
fn flags(code: &Kernel, wrappers: &Wrappers) -> Vec<String> {
    let all = &code.code;
    let before = flow::last_before(code, |at| {
        let s = &all[at];
        (is_access(s) || is_block_barrier(s) || s.name() == "MEMBAR").then(|| s.opcode().to_owned())
    });
    let after = before_data(code);
    let membar = |before: &Option<String>| {
        let opcode = before.as_deref().unwrap_or_default();
        opcode.starts_with("MEMBAR.") && opcode.ends_with(".SYS")
    };
    let mut faults = Vec::new();
    for (at, statement) in all.iter().enumerate().filter(|(_, s)| is_access(s)) {
        let name = wrappers.of(statement).unwrap_or_default();
        let is_flag = ["release", "acquire", "relaxed"]
            .iter()
            .any(|o| name.contains(o));
        // Of a word that orders nothing the compiler may load the half that is looked at: the word is
        // stored at once, so the half is that of some whole word.
        let is_whole = statement.has("64") || name == "ld_relaxed_sys";
        if is_flag && !(is_strong(statement) && is_whole) {
            faults.push(at_place(
                "a flag, and not strong at system scope",
                statement,
            ));
        }
        if name == "st_release_sys" && !before.at(at).iter().all(membar) {
            faults.push(at_place("a release with no membar before it", statement));
        }
        if name == "ld_acquire_sys" && !after.at(at).iter().all(emptied) {
            faults.push(at_place(
                "an acquire with no emptied cache after it",
                statement,
            ));
        }
    }
    faults
}

/// No way around the coherent caches.
fn caches(code: &Kernel) -> Vec<String> {
    let around = code.code.iter().filter(|s| {
        is_load(s) && s.has("CONSTANT") || matches!(s.name(), "TEX" | "TLD" | "TLD4" | "SULD")
    });
    around
        .map(|s| at_place("read through a cache that nobody keeps coherent", s))
        .collect()
}

/// The barriers and flags that may come last before an access, and next after it.
type Around = (BTreeSet<Option<String>>, BTreeSet<Option<String>>);

/// What is around the accesses of a kernel, by their places: those of one place together, as the
/// compiler may have made several of one.
fn around(kernel: &Kernel, wrappers: &Wrappers) -> BTreeMap<String, Around> {
    let event = |at: usize| {
        let s = &kernel.code[at];
        let flag = || matches!(wrappers.of(s), Some("st_release_sys" | "ld_acquire_sys"));
        (is_block_barrier(s) || is_access(s) && flag()).then(|| place(s))
    };
    let (last, next) = (
        flow::last_before(kernel, event),
        flow::next_after(kernel, event),
    );
    let mut around: BTreeMap<String, Around> = BTreeMap::new();
    for (at, statement) in kernel.code.iter().enumerate() {
        if is_access(statement) {
            let known = around.entry(place(statement)).or_default();
            known.0.extend(last.at(at));
            known.1.extend(next.at(at));
        }
    }
    around
}

/// Every access between the same barriers, polls and flags as in the PTX.
fn order(code: &Kernel, from: &Kernel, wrappers: &Wrappers) -> Vec<String> {
    let (meant, found) = (around(from, wrappers), around(code, wrappers));
    let mut faults = Vec::new();
    for (name, found) in &found {
        let Some(meant) = meant.get(name) else {
            faults.push(format!("an access that the PTX does not have: {name}"));
            continue;
        };
        for (way, meant, found) in [
            ("after", &meant.0, &found.0),
            ("before", &meant.1, &found.1),
        ] {
            let moved: Vec<_> = found.difference(meant).collect();
            if !moved.is_empty() {
                faults.push(format!("moved: now {way} {moved:?}: {name}"));
            }
        }
    }
    // Two accesses of data may have become one, under the name of either; flags are all there.
    let flags = |kernel: &Kernel| -> BTreeSet<String> {
        let flags = kernel.code.iter().filter(|s| {
            let name = wrappers.of(s).unwrap_or_default();
            is_access(s) && (name.contains("release") || name.contains("acquire"))
        });
        flags.map(place).collect()
    };
    let lost = flags(from).into_iter().filter(|f| !found.contains_key(f));
    faults.extend(lost.map(|flag| format!("a flag that only the PTX has: {flag}")));
    faults
}

fn tool(name: &str) -> Command {
    Command::new(Path::new(env!("RINGTP_CUDA_BIN")).join(name))
}

fn output(command: &mut Command) -> String {
    let output = command.output().expect("a tool of the toolkit runs");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The listings of a fatbin: of each architecture the machine code, and the PTX that it was made
/// from.
fn listings(fatbin: &Path) -> Vec<(String, String, String)> {
    let directory = fatbin.with_extension("extracted");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).expect("a directory");
    for what in ["-xelf", "-xptx"] {
        let mut extract = tool("cuobjdump");
        extract
            .args([what, "all"])
            .arg(fatbin)
            .current_dir(&directory);
        output(&mut extract);
    }
    let files = || {
        let entries = std::fs::read_dir(&directory).expect("a directory");
        entries.map(|entry| entry.expect("an entry").path())
    };
    let has = |path: &Path, ending: &str| path.to_string_lossy().ends_with(ending);
    let mut listings = Vec::new();
    for arch in ["sm_80", "sm_90", "sm_100", "sm_120"] {
        let find = |ending: &str| files().find(|path| has(path, &format!(".{arch}.{ending}")));
        let (Some(cubin), Some(ptx)) = (find("cubin"), find("ptx")) else {
            continue;
        };
        let code = output(tool("nvdisasm").args(["-gi", "-c"]).arg(cubin));
        let ptx = std::fs::read_to_string(ptx).expect("PTX");
        listings.push((arch.to_owned(), code, ptx));
    }
    let _ = std::fs::remove_dir_all(&directory);
    listings
}

fn scratch(name: &str) -> PathBuf {
    let name = format!("order-{}-{}", std::process::id(), name.replace('/', "-"));
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// A kernel on an architecture: the machine code, and the PTX that it was made from.
struct Listing {
    family: String,
    arch: String,
    code: Kernel,
    from: Kernel,
}

/// The kernels of a fatbin.
fn kernels(family: &str, fatbin: &Path) -> Vec<Listing> {
    let mut all = Vec::new();
    for (arch, code, ptx) in listings(fatbin) {
        let mut from = ptx::kernels(&ptx);
        let code = sass::kernels(&code);
        assert_eq!(code.len(), from.len(), "{family} on {arch}");
        for code in code {
            let at = from.iter().position(|from| from.name == code.name);
            let from = from.swap_remove(at.expect("its PTX"));
            all.push(Listing {
                family: family.to_owned(),
                arch: arch.clone(),
                code,
                from,
            });
        }
    }
    assert!(!all.is_empty(), "{family}: no PTX beside its machine code");
    all
}

static TREE: &[u8] = include_bytes!(concat!(
    env!("OUT_DIR"),
    "/examples-custom_collective-tree.fatbin"
));

/// All kernels of the collectives of the build.
static COLLECTIVES: LazyLock<Vec<Listing>> = LazyLock::new(|| {
    let all = fatbins().filter(|(name, _)| name.starts_with("collective/"));
    // And that of the example.
    all.chain([("example", TREE)])
        .flat_map(|(name, image)| {
            let path = scratch(name).with_extension("fatbin");
            std::fs::write(&path, image).expect("a file in the target directory");
            kernels(name, &path)
        })
        .collect()
});

const SOURCES: [&str; 1] = ["cuda/ptx/memory.cuh"];

#[test]
fn machine_code_keeps_the_order_of_the_ptx() {
    let wrappers = Wrappers::read(&SOURCES);
    let mut wrong = Vec::new();
    for Listing {
        arch, code, from, ..
    } in COLLECTIVES.iter()
    {
        let faults = faults(code, from, &wrappers).into_iter();
        wrong.extend(faults.map(|fault| format!("{} on {arch}: {fault}", code.name)));
    }
    assert!(
        wrong.is_empty(),
        "{} faults:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// A kernel with one statement replaced, or taken out.
fn with(kernel: &Kernel, at: usize, text: &str) -> Kernel {
    let mut other = kernel.clone();
    other.code[at].text = text.to_owned();
    other
}

/// A kernel with two statements at each other's places.
fn swapped(kernel: &Kernel, one: usize, other: usize) -> Kernel {
    let mut swapped = kernel.clone();
    swapped.code.swap(one, other);
    swapped
}

/// Every fault of its kind that can be made in a kernel, in words.
fn broken(kernel: &Kernel, wrappers: &Wrappers) -> Vec<(String, Kernel)> {
    let mut all = Vec::new();
    let after = before_data(kernel);
    for (at, statement) in kernel.code.iter().enumerate() {
        let text = &statement.text;
        let mut add = |what: &str, kernel: Kernel| all.push((format!("{what}: {text}"), kernel));
        // Where the cache is emptied again before any data is read, once is enough.
        let again = statement.name() == "CCTL" && after.at(at).iter().all(emptied);
        if matches!(statement.name(), "MEMBAR" | "CCTL") && !again {
            add("taken out", with(kernel, at, "NOP"));
        }
        if is_access(statement) && is_strong(statement) {
            add("weak", with(kernel, at, &text.replace(".STRONG.SYS", "")));
            add("narrow", with(kernel, at, &text.replace(".SYS", ".GPU")));
        }
        if is_load(statement) && statement.has("128") {
            add(
                "constant",
                with(kernel, at, &text.replace(".128", ".128.CONSTANT")),
            );
        }
        if is_block_barrier(statement) {
            // The nearest access on each side changes to the other.
            let straight = |at: &usize| kernel.next[*at].contains(&(at + 1));
            let data = |at: &usize| {
                let statement = &kernel.code[*at];
                let name = wrappers.of(statement).unwrap_or_default();
                is_access(statement) && name.contains("global")
            };
            let after = (at + 1..kernel.code.len()).take_while(|i| straight(&(i - 1)));
            if let Some(load) = after.take(200).find(data) {
                add("a later access before", swapped(kernel, at, load));
            }
            let before = (0..at).rev().take_while(straight);
            if let Some(store) = before.take(200).find(data) {
                add("an earlier access behind", swapped(kernel, at, store));
            }
        }
    }
    all
}

#[test]
fn each_line_that_matters_is_missed() {
    let wrappers = Wrappers::read(&SOURCES);
    let mut made = BTreeMap::new();
    let shots = COLLECTIVES
        .iter()
        .filter(|l| l.code.name.ends_with("_shot_bf16"));
    for Listing {
        arch, code, from, ..
    } in shots
    {
        for (what, other) in broken(code, &wrappers) {
            let found = faults(&other, from, &wrappers);
            assert!(
                !found.is_empty(),
                "{} on {arch}, not missed: {what}",
                code.name
            );
            let kind = what.split(':').next().unwrap_or_default().to_owned();
            *made.entry(kind).or_insert(0) += 1;
        }
    }
    println!("{made:?}");
    assert_eq!(made.len(), 6, "kinds of faults: {made:?}");
}

/// What the compiler itself gets wrong where it is promised too much.
#[test]
fn a_load_that_was_hoisted_above_its_poll_is_caught() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_gates/order.cu");
    let fatbin = scratch("hoisted").with_extension("fatbin");
    let code = "-gencode=arch=compute_90,code=[compute_90,sm_90]";
    let options = ["-O3", "-std=c++17", "-lineinfo", "-fatbin", code, "-o"];
    output(tool("nvcc").args(options).arg(&fatbin).arg(source));
    let wrappers = Wrappers::read(&SOURCES);
    let judged = |name: &str| {
        let all = kernels("order", &fatbin);
        let listing = all.iter().find(|l| l.code.name == name).expect("a kernel");
        faults(&listing.code, &listing.from, &wrappers)
    };
    assert_eq!(judged("is_right"), Vec::<String>::new());
    let found = judged("reads_what_it_calls_constant").join("\n");
    assert!(found.contains("that nobody keeps coherent"), "{found}");
    assert!(found.contains("moved"), "{found}");
}

#[test]
fn messages_move_in_16_bytes_and_ptx_has_no_non_coherent_load() {
    for Listing {
        family,
        arch,
        code,
        from,
    } in COLLECTIVES.iter()
    {
        let name = &code.name;
        let found = from.code.iter().find(|s| s.has("nc") && is_load(s));
        assert!(found.is_none(), "{name} on {arch}: {found:?}");
        // These are about words.
        let words = ["collective/probe", "collective/leave"].contains(&family.as_str());
        for is in [is_load, is_store] {
            let wide = code.code.iter().any(|s| is(s) && s.has("128"));
            assert!(wide || words, "{name} on {arch}: no access of 16 bytes");
        }
    }
}
