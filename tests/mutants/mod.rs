//! Mutants of shipped PTX: copies with one fault each, which a suite of tests must notice.
//!
//! | piece | what |
//! |---|---|
//! | `operators/` | one file a kind of fault: what may be done to an instruction |
//! | [`shipped`] | the PTX of a fatbin |
//! | [`Mutant`] | one fault at one place |
//! | `survivors` | the list of those that no test can notice, with the reason for each |
//! | `judge` | runs a suite on mutants and holds the outcome against that list |
//!
//! A mutant differs from the PTX in the text of one statement. It is named by the kernel, the lines
//! of source it comes from, the instruction and the fault, and by no number of a line: names
//! outlive changes elsewhere.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod judge;
pub(crate) mod operators;
pub(crate) mod survivors;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::listing::{Kernel, Line, Statement, ptx};
use operators::Operator;

/// The PTX that a fatbin has for the architecture of the virtual GPU.
pub(crate) fn shipped(family: &str, image: &[u8]) -> String {
    let stem = format!(
        "mutants-{}-{}",
        std::process::id(),
        family.replace('/', "-")
    );
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(&stem);
    std::fs::create_dir_all(&directory).expect("a directory");
    let fatbin = directory.join("image.fatbin");
    std::fs::write(&fatbin, image).expect("a file");
    let tool = Path::new(env!("RINGTP_CUDA_BIN")).join("cuobjdump");
    let output = Command::new(tool)
        .args(["-xptx", "all"])
        .arg(&fatbin)
        .current_dir(&directory)
        .output()
        .expect("cuobjdump runs");
    assert!(output.status.success(), "{output:?}");
    // `image.1.sm_80.ptx`: the newest that it would run.
    let architecture = |path: &Path| {
        let stem = path.file_name()?.to_str()?.strip_suffix(".ptx")?;
        stem.rsplit_once("sm_")?.1.parse().ok()
    };
    let files = std::fs::read_dir(&directory).expect("a directory");
    let (_, ptx) = files
        .map(|entry| entry.expect("an entry").path())
        .filter_map(|path| Some((architecture(&path)?, path)))
        .filter(|&(number, _): &(u32, _)| number <= 90)
        .max()
        .expect("PTX for sm_90 or older");
    let text = std::fs::read_to_string(ptx).expect("PTX");
    let _ = std::fs::remove_dir_all(&directory);
    text
}

/// One fault at one place.
#[derive(Clone, Debug)]
pub(crate) struct Mutant {
    /// The kernel it is in.
    pub(crate) kernel: String,
    /// The source: the innermost line that is no wrapper of an instruction, and those from which
    /// it is called, as they are written.
    pub(crate) place: String,
    /// The opcode.
    pub(crate) instruction: String,
    /// What was done to it.
    pub(crate) fault: String,
    /// Which of those that all this is said of, in the order of the listing: copies of an unrolled
    /// loop's body, mostly. Counted from 1.
    pub(crate) copy: usize,
    range: Range<usize>,
    text: String,
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\t{}\t{}\t{}",
            self.kernel, self.place, self.instruction, self.fault
        )
    }
}

impl Mutant {
    /// The line that names it, without the kernel.
    pub(crate) fn fault_line(&self) -> String {
        format!("{}\t{}\t{}", self.place, self.instruction, self.fault)
    }

    /// The PTX with the fault, ending in zero as the driver wants it.
    pub(crate) fn apply(&self, ptx: &str) -> Vec<u8> {
        let mut text = ptx.to_owned();
        text.replace_range(self.range.clone(), &self.text);
        text.push('\0');
        text.into_bytes()
    }
}

/// Every mutant of the kernels in a listing that these operators make.
pub(crate) fn of(text: &str, operators: &[Operator], sources: &Sources) -> Vec<Mutant> {
    let mut mutants = Vec::new();
    let mut copies: BTreeMap<String, usize> = BTreeMap::new();
    for kernel in ptx::kernels(text) {
        for operator in operators {
            for (index, fault) in operator(&kernel) {
                let statement = &kernel.code[index];
                // What ends a statement goes with it, so that nothing may be left of one.
                let text = match (&statement.guard, fault.text.is_empty()) {
                    (_, true) => String::new(),
                    (Some(guard), _) => format!("{guard} {};", fault.text),
                    (None, _) => format!("{};", fault.text),
                };
                let mut mutant = Mutant {
                    kernel: kernel.name.clone(),
                    place: sources.place(&kernel, statement),
                    instruction: statement.opcode().to_owned(),
                    fault: fault.name,
                    copy: 1,
                    range: statement.range.clone(),
                    text,
                };
                let copies = copies.entry(mutant.to_string()).or_default();
                *copies += 1;
                mutant.copy = *copies;
                mutants.push(mutant);
            }
        }
    }
    mutants
}

/// The lines of the source files, to name places by what is written there.
pub(crate) struct Sources {
    files: BTreeMap<String, Vec<String>>,
}

impl Sources {
    /// Of all files in these directories.
    pub(crate) fn read(directories: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = BTreeMap::new();
        for directory in directories {
            let entries = std::fs::read_dir(root.join(directory)).expect("a directory of sources");
            for path in entries.map(|e| e.expect("an entry").path()) {
                let Ok(text) = std::fs::read_to_string(&path) else {
                    continue;
                };
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let lines = text.lines().map(|line| line.trim().to_owned());
                files.insert(name.into_owned(), lines.collect());
            }
        }
        Self { files }
    }

    fn text(&self, line: &Line) -> Option<&str> {
        let lines = self.files.get(&line.file)?;
        lines
            .get((line.line as usize).checked_sub(1)?)
            .map(String::as_str)
    }

    fn place(&self, kernel: &Kernel, statement: &Statement) -> String {
        // The outermost line is the macro that makes the kernel of a template.
        let inner = statement
            .place
            .iter()
            .take(statement.place.len().max(2) - 1);
        let mut known = inner.filter_map(|line| Some((line, self.text(line)?)));
        let Some((line, text)) = known.next() else {
            return kernel.name.clone();
        };
        let callers = known.map(|(_, text)| format!(" <- {text}"));
        format!("{}: {text}{}", line.file, callers.collect::<String>())
    }
}
