//! The list of mutants that no test can notice, each with the reason why it is as good as the
//! original.
//!
//! A file of lines with five columns between tabs: kernels, place, instruction, fault, reason. `*`
//! in the first four stands for anything. Of several mutants of the same name, a fault that ends in
//! `#2` is that of the second. A line that begins with `#` is a comment.

use std::path::Path;

use super::Mutant;

/// One line of the list.
#[derive(Clone, Debug)]
pub(crate) struct Survivor {
    columns: [String; 4],
    /// Why it is equivalent.
    pub(crate) reason: String,
}

impl Survivor {
    /// Whether the line may be about mutants of a kernel.
    pub(crate) fn is_of(&self, kernel: &str) -> bool {
        matches(&self.columns[0], kernel)
    }

    /// Whether this is what the line is about.
    pub(crate) fn is(&self, mutant: &Mutant) -> bool {
        let [kernel, place, instruction, fault] = &self.columns;
        matches(kernel, &mutant.kernel)
            && matches(place, &mutant.place)
            && matches(instruction, &mutant.instruction)
            && match fault.rsplit_once(" #") {
                Some((fault, copy)) => {
                    copy == mutant.copy.to_string() && matches(fault, &mutant.fault)
                }
                None => matches(fault, &mutant.fault),
            }
    }

    /// The line without its reason.
    pub(crate) fn name(&self) -> String {
        self.columns.join("\t")
    }
}

/// The list in a file of the repository.
pub(crate) fn read(path: &str) -> Vec<Survivor> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{path}: {e}"));
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, text)| {
            line(text).unwrap_or_else(|why| panic!("{path}:{}: {why}", number + 1))
        })
        .collect()
}

/// What a line says.
pub(crate) fn line(text: &str) -> Result<Survivor, &'static str> {
    let columns: Vec<&str> = text.split('\t').map(str::trim).collect();
    let [kernels, place, instruction, fault, reason] = columns[..] else {
        return Err("expected five columns between tabs");
    };
    if reason.split_whitespace().count() < 5 {
        return Err("a reason is an argument");
    }
    Ok(Survivor {
        columns: [kernels, place, instruction, fault].map(str::to_owned),
        reason: reason.to_owned(),
    })
}

/// Whether `text` is what `pattern` says, where `*` stands for anything.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(text) = text.strip_prefix(head) else {
        return false;
    };
    let mut ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    ends.any(|at| matches(rest, &text[at..]))
}
