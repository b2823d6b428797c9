//! PTX as nvcc prints it with `-lineinfo`.

use std::collections::{BTreeMap, BTreeSet};

use super::{Kernel, Line, Statement};

/// A place as `.loc` gives it: file, line, column.
type At = (u32, u32, u32);

/// The kernels of a listing. Panics at what it does not understand.
pub(crate) fn kernels(text: &str) -> Vec<Kernel> {
    let files = files(text);
    let mut kernels = Vec::new();
    let mut reader: Option<Reader> = None;
    let (mut name, mut depth, mut offset) = (String::new(), 0, 0);
    for line in text.split_inclusive('\n') {
        let bare = line.split("//").next().unwrap_or_default();
        if let Some((_, rest)) = bare.split_once(".entry ") {
            name = rest.split('(').next().unwrap_or(rest).trim().to_owned();
        } else if depth == 0 && !name.is_empty() && bare.starts_with('{') {
            reader = Some(Reader::default());
        } else if let Some(reader) = reader
            .as_mut()
            .filter(|_| depth > 1 || !bare.starts_with('}'))
        {
            reader.line(bare, offset);
        }
        depth += bare.matches('{').count();
        depth -= bare.matches('}').count();
        if let (0, Some(whole)) = (depth, reader.take_if(|_| depth == 0)) {
            kernels.push(whole.finish(std::mem::take(&mut name), &files));
        }
        offset += line.len();
    }
    kernels
}

/// The listing with nothing in the bodies of the kernels but one.
pub(crate) fn alone(text: &str, kernel: &str) -> String {
    let (mut own, mut depth, mut left) = (true, 0, String::with_capacity(text.len()));
    for line in text.split_inclusive('\n') {
        let bare = line.split("//").next().unwrap_or_default();
        if let Some((_, rest)) = bare.split_once(".entry ") {
            own = rest.split('(').next().unwrap_or(rest).trim() == kernel;
        }
        let before = depth;
        depth += bare.matches('{').count();
        depth -= bare.matches('}').count();
        match (own, before, depth) {
            (true, ..) | (_, 0, 0) => left.push_str(line),
            (false, 0, _) => left.push_str("{\nret;\n"),
            (false, _, 0) => {
                left.push_str("}\n");
                own = true;
            }
            _ => {}
        }
    }
    left
}

/// `.file 1 "path"`
fn files(text: &str) -> BTreeMap<u32, String> {
    let file = |line: &str| {
        let rest = line.trim().strip_prefix(".file")?.trim();
        let (number, path) = rest.split_once(char::is_whitespace)?;
        let path = path.trim().strip_prefix('"')?.split('"').next()?;
        Some((number.parse().ok()?, path.to_owned()))
    };
    text.lines().filter_map(file).collect()
}

#[derive(Default)]
struct Reader {
    code: Vec<Statement>,
    /// Places, before the files' names are put in.
    places: Vec<Vec<At>>,
    labels: BTreeMap<String, usize>,
    /// The chain of the current `.loc`, and the last one for each place.
    place: Vec<At>,
    chains: BTreeMap<At, Vec<At>>,
    /// The inner scope, counted; 0 outside of all. And the registers that it declares.
    scope: usize,
    scopes: usize,
    inner: Vec<String>,
}

impl Reader {
    fn line(&mut self, line: &str, offset: usize) {
        let trimmed = line.trim();
        if let Some(rest) = trimmed.strip_prefix(".loc") {
            self.loc(rest);
            return;
        }
        let mut from = 0;
        for (at, c) in line.char_indices() {
            // Braces around registers of a vector belong to their statement.
            let scope = line[from..at].trim().is_empty();
            match c {
                ';' => {
                    self.statement(line, from, at + 1, offset);
                    from = at + 1;
                }
                '{' if scope => {
                    self.scopes += 1;
                    self.scope = self.scopes;
                    from = at + 1;
                }
                '}' if scope => {
                    self.scope = 0;
                    self.inner.clear();
                    from = at + 1;
                }
                ':' => {
                    let label = line[from..at].trim();
                    if !label.contains(char::is_whitespace) {
                        self.labels.insert(label.to_owned(), self.code.len());
                        from = at + 1;
                    }
                }
                _ => {}
            }
        }
        let rest = line[from..].trim();
        assert!(rest.is_empty(), "PTX that is not understood: {line:?}");
    }

    fn loc(&mut self, rest: &str) {
        let at = |words: &str| -> At {
            let mut numbers = words.split_whitespace().map(|w| w.parse().unwrap_or(0));
            let mut next = || numbers.next().unwrap_or(0);
            (next(), next(), next())
        };
        let own = at(rest.split(',').next().unwrap_or_default());
        let caller = rest
            .split_once("inlined_at")
            .map(|(_, words)| at(words.trim()));
        self.place = vec![own];
        if let Some(caller) = caller {
            let chain = self.chains.get(&caller).cloned();
            self.place.extend(chain.unwrap_or_else(|| vec![caller]));
        }
        self.chains.insert(own, self.place.clone());
    }

    fn statement(&mut self, line: &str, from: usize, to: usize, offset: usize) {
        let from = from + line[from..to].len() - line[from..to].trim_start().len();
        let text = line[from..to - 1].trim();
        if let Some(declared) = text.strip_prefix(".reg").filter(|_| self.scope > 0) {
            let names = declared.split([',', ' ']).map(str::trim);
            let names = names.filter(|name| name.starts_with('%'));
            self.inner.extend(names.map(str::to_owned));
        }
        if text.starts_with('.') || text.is_empty() {
            return;
        }
        let (guard, text) = match text.split_once(char::is_whitespace) {
            Some((guard, rest)) if guard.starts_with('@') => (Some(guard.to_owned()), rest.trim()),
            _ => (None, text),
        };
        self.places.push(self.place.clone());
        self.code.push(Statement {
            text: text.to_owned(),
            guard,
            scope: (self.scope, self.inner.clone()),
            range: offset + from..offset + to,
            place: Vec::new(),
        });
    }

    fn finish(mut self, name: String, files: &BTreeMap<u32, String>) -> Kernel {
        for (statement, place) in self.code.iter_mut().zip(&self.places) {
            let line = |&(file, line, _): &At| {
                Line::new(files.get(&file).map_or("", String::as_str), line)
            };
            statement.place = place.iter().map(line).collect();
        }
        let next = (0..self.code.len()).map(|i| self.followers(i)).collect();
        Kernel {
            name,
            code: self.code,
            next,
        }
    }

    fn followers(&self, index: usize) -> BTreeSet<usize> {
        let statement = &self.code[index];
        let mut next = BTreeSet::new();
        let falls_through = match statement.name() {
            "bra" => {
                let label = statement.text.split_whitespace().last().unwrap_or_default();
                let target = self.labels.get(label);
                next.insert(*target.unwrap_or_else(|| panic!("no label {label:?}")));
                statement.guard.is_some()
            }
            "ret" | "exit" | "trap" => statement.guard.is_some(),
            "brx" | "call" => panic!("{} is not followed", statement.text),
            _ => true,
        };
        if falls_through && index + 1 < self.code.len() {
            next.insert(index + 1);
        }
        next
    }
}
