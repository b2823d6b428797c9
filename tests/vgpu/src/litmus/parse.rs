//! The text of a litmus test.

use std::fmt;

use super::{
    Claim, Condition, Location, Op, Placement, Races, Statement, Test, Thread, Value, Variable,
};
use crate::finding::Reason;
use crate::memory::{Order, Scope};

/// What is wrong with a litmus test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    line: Option<usize>,
    message: String,
}

impl ParseError {
    pub(super) fn new(message: String) -> Self {
        Self {
            line: None,
            message,
        }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ParseError {}

fn bad<T>(message: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError::new(message.into()))
}

/// See [`super`].
pub(super) fn test(text: &str) -> Result<Test, ParseError> {
    let mut test = Test {
        name: String::new(),
        about: String::new(),
        variables: Vec::new(),
        threads: Vec::new(),
        claims: Vec::new(),
        races: Races::None,
    };
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or("").trim();
        if line.is_empty() {
            continue;
        }
        one_line(&mut test, line).map_err(|error| ParseError {
            line: Some(number + 1),
            ..error
        })?;
    }
    if test.name.is_empty() || test.threads.is_empty() {
        return bad("a test begins with 'PTX name' and has threads");
    }
    let shared = test.variables.iter().any(|v| v.shared);
    let block = |t: &Thread| (t.at.device, t.at.block);
    if shared
        && test
            .threads
            .iter()
            .any(|t| block(t) != block(&test.threads[0]))
    {
        return bad("with a shared variable all threads are in one block");
    }
    Ok(test)
}

fn one_line(test: &mut Test, line: &str) -> Result<(), ParseError> {
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let claim = match word {
        "PTX" => {
            test.name = rest.trim().to_owned();
            return Ok(());
        }
        "races" => {
            test.races = match rest.trim() {
                "none" => Races::None,
                "some" => Races::Some,
                name => match Reason::ALL.into_iter().find(|r| r.name() == name) {
                    Some(reason) => Races::Because(reason),
                    None => return bad(format!("there is no reason '{name}' for a race")),
                },
            };
            return Ok(());
        }
        "forbidden" => Some(Claim::Forbidden),
        "forall" => Some(Claim::Forall),
        "allowed" => Some(Claim::Allowed),
        "unreached" => Some(Claim::Unreached),
        _ => None,
    };
    if let Some(claim) = claim {
        let mut tokens = Tokens::new(rest);
        let condition = disjunction(&mut tokens, test)?;
        tokens.end()?;
        test.claims.push((claim, condition, rest.trim().to_owned()));
    } else if line.starts_with('"') {
        test.about = line.trim_matches('"').to_owned();
    } else if line.starts_with('{') {
        let inner = line.trim_start_matches('{').trim_end_matches('}');
        for declaration in inner.split(';').map(str::trim).filter(|d| !d.is_empty()) {
            let variable = variable(declaration)?;
            test.variables.push(variable);
        }
    } else if let Some(row) = line.strip_suffix(';') {
        let cells = row.split('|').map(str::trim);
        if test.threads.is_empty() {
            for cell in cells {
                let warps = test
                    .threads
                    .iter()
                    .map(|t: &Thread| t.at)
                    .collect::<Vec<_>>();
                let thread = header(cell, &warps)?;
                test.threads.push(thread);
            }
            return Ok(());
        }
        let cells: Vec<&str> = cells.collect();
        if cells.len() != test.threads.len() {
            return bad(format!(
                "{} columns for {} threads",
                cells.len(),
                test.threads.len()
            ));
        }
        for (at, cell) in cells.into_iter().enumerate() {
            if !cell.is_empty() {
                let statement = statement(cell, test)?;
                test.threads[at].program.push(statement);
            }
        }
    } else {
        return bad(format!("'{line}' is not understood"));
    }
    Ok(())
}

fn variable(text: &str) -> Result<Variable, ParseError> {
    let (left, initial) = text.split_once('=').unwrap_or((text, "0"));
    let mut variable = Variable {
        name: String::new(),
        bytes: 4,
        count: 1,
        shared: false,
        initial: number(initial.trim())?,
    };
    for word in left.split_whitespace() {
        match word {
            "shared" => variable.shared = true,
            "u64" => variable.bytes = 8,
            "u32" => variable.bytes = 4,
            name => {
                let (name, count) = name.split_once('[').unwrap_or((name, "1]"));
                variable.name = name.to_owned();
                variable.count = number(count.trim_end_matches(']'))? as u32;
            }
        }
    }
    if variable.name.is_empty() || !(1..=8).contains(&variable.count) {
        return bad(format!("'{text}' declares no variable"));
    }
    Ok(variable)
}

fn header(text: &str, before: &[Placement]) -> Result<Thread, ParseError> {
    let (name, place) = text.split_once('@').unwrap_or((text, ""));
    let mut at = Placement {
        device: 0,
        block: 0,
        warp: 0,
        lane: 0,
    };
    let mut warp = None;
    for part in place.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let Some((what, which)) = part.split_once(' ') else {
            return bad(format!(
                "'{part}' places no thread: 'gpu 0,cta 0,warp 0,lane 0'"
            ));
        };
        let which = number(which.trim())? as u32;
        match what {
            "gpu" if which < 8 => at.device = which,
            "cta" if which < 64 => at.block = which,
            "warp" if which < 32 => warp = Some(which),
            "lane" if which < 32 => at.lane = which,
            _ => return bad(format!("'{part}' places no thread")),
        }
    }
    let here = before
        .iter()
        .filter(|b| (b.device, b.block) == (at.device, at.block));
    at.warp = warp.unwrap_or(here.count() as u32);
    if before.contains(&at) {
        return bad(format!("{name} stands where another thread does"));
    }
    Ok(Thread {
        name: name.trim().to_owned(),
        at,
        program: Vec::new(),
    })
}

fn number(text: &str) -> Result<u64, ParseError> {
    text.parse()
        .or_else(|_| bad(format!("'{text}' is no number")))
}

fn statement(text: &str, test: &Test) -> Result<Statement, ParseError> {
    let mut guard = None;
    let mut rest = text;
    if let Some(after) = text.strip_prefix("if") {
        let mut tokens = Tokens::new(after);
        tokens.expect("(")?;
        let register = register(&tokens.next()?)?;
        let equal = equality(&tokens.next()?)?;
        let value = number(&tokens.next()?)?;
        tokens.expect(")")?;
        guard = Some((register, value, equal));
        rest = tokens.rest();
    }
    let rest = rest.trim();
    let (opcode, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let mut tokens = Tokens::new(operands);
    let mut words = opcode.split('.');
    let kind = words.next().unwrap_or("");
    let (mut order, mut scope, mut update, mut vector) = (None, None, None, 1);
    for word in words {
        match word {
            "weak" => order = Some(Order::Weak),
            "volatile" => (order, scope) = (Some(Order::Volatile), Some(Scope::Sys)),
            "relaxed" => order = Some(Order::Relaxed),
            "acquire" => order = Some(Order::Acquire),
            "release" => order = Some(Order::Release),
            "acq_rel" => order = Some(Order::AcqRel),
            "sc" => order = Some(Order::SeqCst),
            "cta" => scope = Some(Scope::Cta),
            "gl" | "gpu" => scope = Some(Scope::Gpu),
            "sys" => scope = Some(Scope::Sys),
            "v2" => vector = 2,
            "v4" => vector = 4,
            "mmio" | "sync" => {}
            other => update = Some(other.to_owned()),
        }
    }
    let op = match kind {
        "ld" => {
            let to = list(&mut tokens, vector, |t| register(&t.next()?))?;
            tokens.expect(",")?;
            Op::Load {
                order: order.unwrap_or(Order::Weak),
                scope: scope.unwrap_or(Scope::Cta),
                to,
                from: location(&mut tokens, test)?,
            }
        }
        "st" => {
            let to = location(&mut tokens, test)?;
            tokens.expect(",")?;
            Op::Store {
                order: order.unwrap_or(Order::Weak),
                scope: scope.unwrap_or(Scope::Cta),
                to,
                values: list(&mut tokens, vector, value)?,
            }
        }
        "atom" | "red" => {
            let Some(update) = update else {
                return bad(format!("'{opcode}' wants an operation"));
            };
            let mut to = None;
            if kind == "atom" {
                to = Some(register(&tokens.next()?)?);
                tokens.expect(",")?;
            }
            let at = location(&mut tokens, test)?;
            let mut operands = Vec::new();
            while tokens.peek() == Some(",") {
                tokens.expect(",")?;
                operands.push(value(&mut tokens)?);
            }
            Op::Atomic {
                order: order.unwrap_or(Order::Relaxed),
                scope: scope.unwrap_or(Scope::Gpu),
                update,
                to,
                at,
                operands,
            }
        }
        "fence" | "membar" => Op::Fence {
            order: match kind {
                "membar" => Order::SeqCst,
                _ => order.unwrap_or(Order::AcqRel),
            },
            scope: match scope {
                Some(scope) => scope,
                None => return bad(format!("'{opcode}' wants a scope")),
            },
        },
        "bar" | "barrier" => {
            let id = number(&tokens.next()?)? as u32;
            let mut threads = None;
            if tokens.peek() == Some(",") {
                tokens.expect(",")?;
                threads = Some(number(&tokens.next()?)? as u32);
            }
            Op::Barrier { id, threads }
        }
        _ => return bad(format!("'{opcode}' is no statement of a litmus test")),
    };
    tokens.end()?;
    Ok(Statement {
        guard,
        opcode: opcode.to_owned(),
        op,
    })
}

fn list<T>(
    tokens: &mut Tokens,
    count: usize,
    mut one: impl FnMut(&mut Tokens) -> Result<T, ParseError>,
) -> Result<Vec<T>, ParseError> {
    if count == 1 {
        return Ok(vec![one(tokens)?]);
    }
    tokens.expect("{")?;
    let mut all = Vec::new();
    for n in 0..count {
        if n > 0 {
            tokens.expect(",")?;
        }
        all.push(one(tokens)?);
    }
    tokens.expect("}")?;
    Ok(all)
}

fn register(text: &str) -> Result<u32, ParseError> {
    match text.strip_prefix('r').and_then(|n| n.parse().ok()) {
        Some(register) if register < 32 => Ok(register),
        _ => bad(format!("'{text}' is no register")),
    }
}

fn value(tokens: &mut Tokens) -> Result<Value, ParseError> {
    let token = tokens.next()?;
    if token.starts_with('r') {
        return Ok(Value::Register(register(&token)?));
    }
    Ok(Value::Number(number(&token)?))
}

fn location(tokens: &mut Tokens, test: &Test) -> Result<Location, ParseError> {
    let name = tokens.next()?;
    named(&name, tokens, test)
}

fn named(name: &str, tokens: &mut Tokens, test: &Test) -> Result<Location, ParseError> {
    let Some(variable) = test.variables.iter().position(|v| v.name == name) else {
        return bad(format!("there is no variable '{name}'"));
    };
    let mut element = 0;
    if tokens.peek() == Some("[") {
        tokens.expect("[")?;
        element = number(&tokens.next()?)? as u32;
        tokens.expect("]")?;
    }
    if element >= test.variables[variable].count {
        return bad(format!("{name} has no element {element}"));
    }
    Ok(Location { variable, element })
}

fn equality(text: &str) -> Result<bool, ParseError> {
    match text {
        "==" | "=" => Ok(true),
        "!=" => Ok(false),
        _ => bad(format!("'{text}' where == or != was expected")),
    }
}

fn disjunction(tokens: &mut Tokens, test: &Test) -> Result<Condition, ParseError> {
    let mut all = conjunction(tokens, test)?;
    while tokens.peek() == Some("\\/") {
        tokens.expect("\\/")?;
        all = Condition::Or(Box::new(all), Box::new(conjunction(tokens, test)?));
    }
    Ok(all)
}

fn conjunction(tokens: &mut Tokens, test: &Test) -> Result<Condition, ParseError> {
    let mut all = atom(tokens, test)?;
    while tokens.peek() == Some("/\\") {
        tokens.expect("/\\")?;
        all = Condition::And(Box::new(all), Box::new(atom(tokens, test)?));
    }
    Ok(all)
}

fn atom(tokens: &mut Tokens, test: &Test) -> Result<Condition, ParseError> {
    let token = tokens.next()?;
    if token == "~" {
        return Ok(Condition::Not(Box::new(atom(tokens, test)?)));
    }
    if token == "(" {
        let inner = disjunction(tokens, test)?;
        tokens.expect(")")?;
        return Ok(inner);
    }
    if tokens.peek() == Some(":") {
        tokens.expect(":")?;
        let Some(thread) = test.threads.iter().position(|t| t.name == token) else {
            return bad(format!("there is no thread '{token}'"));
        };
        let register = register(&tokens.next()?)?;
        let equal = equality(&tokens.next()?)?;
        let value = number(&tokens.next()?)?;
        return Ok(Condition::Register(thread, register, value, equal));
    }
    let at = named(&token, tokens, test)?;
    if test.variables[at.variable].shared {
        return bad(format!("'{token}' is gone at the end: load it"));
    }
    let equal = equality(&tokens.next()?)?;
    let value = number(&tokens.next()?)?;
    Ok(Condition::Memory(at, value, equal))
}

/// Words and signs.
struct Tokens<'a> {
    text: &'a str,
}

impl<'a> Tokens<'a> {
    fn new(text: &'a str) -> Self {
        Self { text: text.trim() }
    }

    fn split(&self) -> Option<(&'a str, &'a str)> {
        let text = self.text.trim_start();
        let first = text.chars().next()?;
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let len = if is_word(first) {
            text.find(|c| !is_word(c)).unwrap_or(text.len())
        } else {
            let two = ["==", "!=", "/\\", "\\/"];
            match two.iter().find(|t| text.starts_with(**t)) {
                Some(_) => 2,
                None => first.len_utf8(),
            }
        };
        Some(text.split_at(len))
    }

    fn peek(&self) -> Option<&'a str> {
        self.split().map(|s| s.0)
    }

    fn next(&mut self) -> Result<String, ParseError> {
        let Some((token, rest)) = self.split() else {
            return bad("something is missing at the end");
        };
        self.text = rest;
        Ok(token.to_owned())
    }

    fn expect(&mut self, wanted: &str) -> Result<(), ParseError> {
        let found = self.next()?;
        if found != wanted {
            return bad(format!("'{wanted}' was expected, not '{found}'"));
        }
        Ok(())
    }

    fn rest(&self) -> &'a str {
        self.text
    }

    fn end(&self) -> Result<(), ParseError> {
        match self.peek() {
            None => Ok(()),
            Some(token) => bad(format!("'{token}' was not expected")),
        }
    }
}
