//! The grammar.

use std::collections::HashMap;
use std::sync::Arc;

use super::ParseError;
use super::ast::{
    Function, Guard, Immediate, Init, Instruction, Linkage, Location, Module, Operand, Space,
    Statement, Type, Variable,
};
use super::lexer::{Spanned, Token, tokens};

/// Blocks in blocks, and braces in initialisers and operands.
const MAX_DEPTH: u32 = 64;
/// Text longer than this is no kernel.
const MAX_TEXT: usize = 256 << 20;

/// Parses a whole module.
pub fn parse(text: &str) -> Result<Module, ParseError> {
    if text.len() > MAX_TEXT {
        return Err(ParseError {
            line: 0,
            column: 0,
            found: format!("{} bytes of text", text.len()),
            expected: format!("at most {MAX_TEXT}"),
        });
    }
    let tokens = tokens(text)?;
    let mut parser = Parser {
        tokens: &tokens,
        at: 0,
        location: None,
        labels_of_locations: HashMap::new(),
    };
    parser.module()
}

struct Parser<'t, 'a> {
    tokens: &'t [Spanned<'a>],
    at: usize,
    location: Option<Arc<Location>>,
    /// The last location seen with each (file, line, column), to find what a line was inlined at.
    labels_of_locations: HashMap<(u32, u32, u32), Arc<Location>>,
}

type Result_<T> = Result<T, ParseError>;

impl<'a> Parser<'_, 'a> {
    fn peek(&self) -> Option<&Token<'a>> {
        self.tokens.get(self.at).map(|t| &t.token)
    }

    fn peek_at(&self, ahead: usize) -> Option<&Token<'a>> {
        self.tokens.get(self.at + ahead).map(|t| &t.token)
    }

    fn next(&mut self) -> Option<Token<'a>> {
        let token = self.peek().cloned();
        self.at += 1;
        token
    }

    fn line(&self) -> u32 {
        let last = self.tokens.last().map_or(1, |t| t.line);
        self.tokens.get(self.at).map_or(last, |t| t.line)
    }

    fn error<T>(&self, expected: impl Into<String>) -> Result_<T> {
        let found = self
            .peek()
            .map_or("the end of the text".to_owned(), Token::describe);
        Err(ParseError {
            line: self.line(),
            column: self.tokens.get(self.at).map_or(1, |t| t.column),
            found,
            expected: expected.into(),
        })
    }

    fn eat(&mut self, c: char) -> bool {
        let here = self.peek() == Some(&Token::Punct(c));
        self.at += usize::from(here);
        here
    }

    fn expect(&mut self, c: char, wherein: &str) -> Result_<()> {
        if self.eat(c) {
            return Ok(());
        }
        self.error(format!("'{c}' {wherein}"))
    }

    fn eat_dot(&mut self, word: &str) -> bool {
        let here = self.peek() == Some(&Token::Dot(word));
        self.at += usize::from(here);
        here
    }

    fn name(&mut self, what: &str) -> Result_<&'a str> {
        match self.peek() {
            Some(&Token::Name(name)) => {
                self.at += 1;
                Ok(name)
            }
            _ => self.error(what),
        }
    }

    /// An integer with its sign, as two's complement.
    fn integer(&mut self, what: &str) -> Result_<u64> {
        let negative = self.eat('-');
        match self.peek() {
            Some(&Token::Number(Immediate::Int(value))) => {
                self.at += 1;
                Ok(if negative {
                    value.wrapping_neg()
                } else {
                    value
                })
            }
            _ => self.error(what),
        }
    }

    fn small(&mut self, what: &str) -> Result_<u32> {
        let value = self.integer(what)?;
        match u32::try_from(value) {
            Ok(value) => Ok(value),
            Err(_) => {
                self.at -= 1;
                self.error(format!("{what} below 2^32"))
            }
        }
    }

    fn module(&mut self) -> Result_<Module> {
        let mut module = Module::default();
        let mut linkage = Linkage::Internal;
        while let Some(token) = self.peek() {
            let Token::Dot(word) = *token else {
                return self.error("a directive of the module");
            };
            self.at += 1;
            match word {
                "version" => module.version = self.version()?,
                "target" => self.target(&mut module)?,
                "address_size" => {
                    let size = self.small("the address size")?;
                    if size != 64 {
                        self.at -= 1;
                        return self.error("an address size of 64");
                    }
                }
                "file" => {
                    let index = self.small("the number of a file")?;
                    let Some(&Token::Text(path)) = self.peek() else {
                        return self.error("the path of a file");
                    };
                    self.at += 1;
                    module.files.push((index, path.to_owned()));
                    while self.eat(',') {
                        self.integer("a time stamp or a size")?;
                    }
                }
                "loc" => self.loc()?,
                "section" => self.section()?,
                "pragma" => self.skip_to_semicolon()?,
                "visible" => linkage = Linkage::Visible,
                "extern" => linkage = Linkage::Extern,
                "weak" => linkage = Linkage::Weak,
                "common" => linkage = Linkage::Common,
                "entry" | "func" => {
                    let function = self.function(word == "entry", linkage)?;
                    module.functions.push(function);
                    linkage = Linkage::Internal;
                }
                "global" | "const" | "shared" => {
                    let space = space_of(word).unwrap_or(Space::Global);
                    self.variables(space, linkage, &mut |v| module.variables.push(v))?;
                    linkage = Linkage::Internal;
                }
                _ => {
                    self.at -= 1;
                    return self.error(
                        "a directive that the virtual GPU knows (.version .target .address_size \
                         .file .loc .section .pragma .visible .extern .weak .common .entry .func \
                         .global .const .shared)",
                    );
                }
            }
        }
        if module.version == (0, 0) {
            return self.error("'.version' at the start of the module");
        }
        if module.arch == 0 {
            return self.error("'.target sm_…' at the start of the module");
        }
        Ok(module)
    }

    /// `9.5`, which the lexer reads as one number.
    fn version(&mut self) -> Result_<(u32, u32)> {
        let Some(&Token::Number(Immediate::F64(value))) = self.peek() else {
            return self.error("a version such as 8.5");
        };
        if !(1.0..100.0).contains(&value) {
            return self.error("a version from 1.0 to 99.9");
        }
        self.at += 1;
        let tenths = (value * 10.0).round() as u32;
        Ok((tenths / 10, tenths % 10))
    }

    fn target(&mut self, module: &mut Module) -> Result_<()> {
        let at = self.at;
        let name = self.name("a target such as sm_90")?;
        let digits = name.strip_prefix("sm_").unwrap_or("");
        let end = digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len());
        match digits[..end].parse() {
            Ok(arch) if (10..1000).contains(&arch) => module.arch = arch,
            _ => {
                self.at = at;
                return self.error("a target such as sm_90");
            }
        }
        module.arch_suffix = digits[end..].to_owned();
        while self.eat(',') {
            self.name("an option of the target")?;
        }
        Ok(())
    }

    fn skip_to_semicolon(&mut self) -> Result_<()> {
        loop {
            match self.next() {
                Some(Token::Punct(';')) => return Ok(()),
                Some(_) => {}
                None => return self.error("';'"),
            }
        }
    }

    /// `.section name { … }`: debugging data, which holds no braces of its own.
    fn section(&mut self) -> Result_<()> {
        if matches!(self.peek(), Some(Token::Dot(_) | Token::Name(_))) {
            self.at += 1;
        }
        self.expect('{', "after the name of a section")?;
        loop {
            match self.next() {
                Some(Token::Punct('}')) => return Ok(()),
                Some(_) => {}
                None => return self.error("'}' at the end of a section"),
            }
        }
    }

    /// `.loc file line column [, function_name label [+ n] [, inlined_at file line column]]`
    fn loc(&mut self) -> Result_<()> {
        let file = self.small("the file of a '.loc'")?;
        let line = self.small("the line of a '.loc'")?;
        let column = self.small("the column of a '.loc'")?;
        let mut inlined_at = None;
        while self.eat(',') {
            match self.name("'function_name' or 'inlined_at'")? {
                "function_name" => {
                    self.name("the label of a function's name")?;
                    if self.eat('+') {
                        self.integer("an offset")?;
                    }
                }
                "inlined_at" => {
                    let file = self.small("the file of the place inlined at")?;
                    let line = self.small("its line")?;
                    let column = self.small("its column")?;
                    let known = self.labels_of_locations.get(&(file, line, column));
                    inlined_at = Some(known.cloned().unwrap_or_else(|| {
                        Arc::new(Location {
                            file,
                            line,
                            column,
                            inlined_at: None,
                        })
                    }));
                }
                _ => {
                    self.at -= 1;
                    return self.error("'function_name' or 'inlined_at'");
                }
            }
        }
        // A chain that grows without end would be a loop in the text; real ones are short.
        let mut depth = 0;
        let mut place = inlined_at.as_deref();
        while let Some(p) = place {
            depth += 1;
            place = p.inlined_at.as_deref();
        }
        if depth > MAX_DEPTH {
            inlined_at = None;
        }
        let location = Arc::new(Location {
            file,
            line,
            column,
            inlined_at,
        });
        self.labels_of_locations
            .insert((file, line, column), location.clone());
        self.location = Some(location);
        Ok(())
    }

    fn function(&mut self, entry: bool, linkage: Linkage) -> Result_<Function> {
        self.location = None;
        let line = self.line();
        let mut directives = Vec::new();
        // `.func .noreturn`? nvcc writes it after the name; both are accepted.
        let mut returns = Vec::new();
        if !entry && self.eat('(') {
            returns = self.parameters()?;
        }
        let name = self.name("the name of a function")?.to_owned();
        let params = if self.eat('(') {
            self.parameters()?
        } else {
            Vec::new()
        };
        loop {
            match self.peek() {
                Some(&Token::Dot(word)) => {
                    self.at += 1;
                    if word == "pragma" {
                        self.skip_to_semicolon()?;
                        continue;
                    }
                    const KNOWN: [&str; 15] = [
                        "maxntid",
                        "reqntid",
                        "minnctapersm",
                        "maxnctapersm",
                        "maxnreg",
                        "noreturn",
                        "reqnctapercluster",
                        "explicitcluster",
                        "maxclusterrank",
                        "blocksareclusters",
                        "abi_preserve",
                        "abi_preserve_control",
                        "unified",
                        "attribute",
                        "loc",
                    ];
                    if !KNOWN.contains(&word) || word == "attribute" {
                        self.at -= 1;
                        return self.error("a directive of a function, '{' or ';'");
                    }
                    if word == "loc" {
                        self.loc()?;
                        continue;
                    }
                    let mut values = Vec::new();
                    if matches!(self.peek(), Some(Token::Number(_))) {
                        values.push(self.integer("a number")?);
                        while self.eat(',') {
                            values.push(self.integer("a number")?);
                        }
                    }
                    directives.push((word.to_owned(), values));
                }
                Some(Token::Punct(';')) => {
                    self.at += 1;
                    return Ok(Function {
                        entry,
                        linkage,
                        name,
                        returns,
                        params,
                        directives,
                        body: None,
                        line,
                    });
                }
                Some(Token::Punct('{')) => {
                    self.at += 1;
                    let body = self.block(1)?;
                    return Ok(Function {
                        entry,
                        linkage,
                        name,
                        returns,
                        params,
                        directives,
                        body: Some(body),
                        line,
                    });
                }
                _ => return self.error("'{' or ';' after the head of a function"),
            }
        }
    }

    /// A parameter list, after its `(`.
    fn parameters(&mut self) -> Result_<Vec<Variable>> {
        let mut params = Vec::new();
        if self.eat(')') {
            return Ok(params);
        }
        loop {
            let space = match self.peek() {
                Some(Token::Dot("param")) => Space::Param,
                Some(Token::Dot("reg")) => Space::Reg,
                _ => return self.error("'.param' or '.reg'"),
            };
            self.at += 1;
            params.push(self.variable(space, Linkage::Internal)?);
            if self.eat(')') {
                return Ok(params);
            }
            self.expect(',', "or ')' between parameters")?;
        }
    }

    /// The declarations of one statement: `.reg .b32 %r<5>, %x;`
    fn variables(
        &mut self,
        space: Space,
        linkage: Linkage,
        keep: &mut dyn FnMut(Variable),
    ) -> Result_<()> {
        let first = self.variable(space, linkage)?;
        let (align, ty, vector) = (first.align, first.ty, first.vector);
        keep(first);
        while self.eat(',') {
            keep(self.declarator(space, linkage, align, ty, vector)?);
        }
        self.expect(';', "after a declaration")
    }

    fn variable(&mut self, space: Space, linkage: Linkage) -> Result_<Variable> {
        let mut align = None;
        let mut vector = 1;
        let mut ty = None;
        while let Some(&Token::Dot(word)) = self.peek() {
            self.at += 1;
            match word {
                "align" => {
                    let value = self.small("an alignment")?;
                    if !value.is_power_of_two() || value > 1 << 16 {
                        self.at -= 1;
                        return self.error("an alignment that is a power of two up to 65536");
                    }
                    align = Some(value);
                }
                "v2" => vector = 2,
                "v4" => vector = 4,
                "v8" => vector = 8,
                // `.param .u64 .ptr .global .align 16 name` tells about what is pointed to.
                "ptr" => {
                    while let Some(&Token::Dot(word)) = self.peek() {
                        self.at += 1;
                        match word {
                            "align" => {
                                self.small("an alignment")?;
                            }
                            "global" | "shared" | "const" | "local" | "generic" => {}
                            _ => {
                                self.at -= 1;
                                return self.error("a state space or '.align' after '.ptr'");
                            }
                        }
                    }
                }
                _ => match crate::lowering::type_of(word) {
                    Some(found) if ty.is_none() => ty = Some(found),
                    _ => {
                        self.at -= 1;
                        return self.error("a type, '.align', '.v2' or '.v4' of a declaration");
                    }
                },
            }
        }
        let Some(ty) = ty else {
            return self.error("the type of a declaration");
        };
        self.declarator(space, linkage, align, ty, vector)
    }

    fn declarator(
        &mut self,
        space: Space,
        linkage: Linkage,
        align: Option<u32>,
        ty: Type,
        vector: u32,
    ) -> Result_<Variable> {
        let line = self.line();
        let name = self.name("the name of a variable")?.to_owned();
        let mut variable = Variable {
            space,
            linkage,
            align,
            ty,
            vector,
            name,
            count: None,
            dims: Vec::new(),
            init: Vec::new(),
            line,
        };
        if self.eat('<') {
            variable.count = Some(self.small("how many registers")?);
            self.expect('>', "after the number of registers")?;
        }
        while self.eat('[') {
            if self.eat(']') {
                variable.dims.push(0);
                continue;
            }
            variable.dims.push(self.integer("the length of an array")?);
            self.expect(']', "after the length of an array")?;
        }
        if self.eat('=') {
            self.initialiser(&mut variable.init, 0)?;
        }
        Ok(variable)
    }

    fn initialiser(&mut self, init: &mut Vec<Init>, depth: u32) -> Result_<()> {
        if depth > MAX_DEPTH {
            return self.error("fewer braces in braces");
        }
        if self.eat('{') {
            if self.eat('}') {
                return Ok(());
            }
            loop {
                self.initialiser(init, depth + 1)?;
                if self.eat('}') {
                    return Ok(());
                }
                self.expect(',', "or '}' in an initialiser")?;
            }
        }
        match self.peek() {
            Some(&Token::Name(name)) => {
                self.at += 1;
                let (name, generic) = if name == "generic" && self.eat('(') {
                    let inner = self.name("the name of a variable in 'generic()'")?;
                    self.expect(')', "after the name in 'generic()'")?;
                    (inner, true)
                } else if self.peek() == Some(&Token::Punct('(')) {
                    return self.error("'generic()' or a name (other operators are not known)");
                } else {
                    (name, false)
                };
                let mut offset = 0;
                // A minus sign belongs to the integer.
                if self.eat('+') || self.peek() == Some(&Token::Punct('-')) {
                    offset = self.integer("an offset")? as i64;
                }
                init.push(Init::Address {
                    name: name.to_owned(),
                    generic,
                    offset,
                });
                Ok(())
            }
            _ => {
                let value = self.immediate("an initial value")?;
                init.push(Init::Value(value));
                Ok(())
            }
        }
    }

    fn immediate(&mut self, what: &str) -> Result_<Immediate> {
        let negative = self.eat('-');
        let Some(&Token::Number(value)) = self.peek() else {
            return self.error(what);
        };
        self.at += 1;
        Ok(match value {
            Immediate::Int(value) if negative => Immediate::Int(value.wrapping_neg()),
            Immediate::F32(bits) if negative => Immediate::F32(bits ^ 1 << 31),
            Immediate::F64(value) if negative => Immediate::F64(-value),
            value => value,
        })
    }

    /// The statements of a block, after its `{`.
    fn block(&mut self, depth: u32) -> Result_<Vec<Statement>> {
        if depth > MAX_DEPTH {
            return self.error("fewer blocks in blocks");
        }
        let mut statements = Vec::new();
        loop {
            let Some(token) = self.peek() else {
                return self.error("'}' at the end of a block");
            };
            match *token {
                Token::Punct('}') => {
                    self.at += 1;
                    return Ok(statements);
                }
                Token::Punct('{') => {
                    self.at += 1;
                    statements.push(Statement::Block(self.block(depth + 1)?));
                }
                Token::Punct(';') => self.at += 1,
                Token::Punct('@') => {
                    let instruction = self.instruction()?;
                    statements.push(Statement::Instruction(instruction));
                }
                Token::Dot(word) => {
                    self.at += 1;
                    match word {
                        "loc" => self.loc()?,
                        "pragma" => self.skip_to_semicolon()?,
                        _ => {
                            let Some(space) = space_of(word) else {
                                self.at -= 1;
                                return self.error("a declaration, a label or an instruction");
                            };
                            let mut keep = |v| statements.push(Statement::Variable(v));
                            self.variables(space, Linkage::Internal, &mut keep)?;
                        }
                    }
                }
                Token::Name(name) if self.peek_at(1) == Some(&Token::Punct(':')) => {
                    self.at += 2;
                    let statement = self.after_label(name)?;
                    statements.push(statement);
                }
                Token::Name(_) => {
                    let instruction = self.instruction()?;
                    statements.push(Statement::Instruction(instruction));
                }
                _ => return self.error("a declaration, a label or an instruction"),
            }
        }
    }

    /// What follows `name:`.
    fn after_label(&mut self, name: &str) -> Result_<Statement> {
        let name = name.to_owned();
        if self.eat_dot("branchtargets") || self.eat_dot("calltargets") {
            let mut targets = vec![self.name("a label")?.to_owned()];
            while self.eat(',') {
                targets.push(self.name("a label")?.to_owned());
            }
            self.expect(';', "after a list of targets")?;
            return Ok(Statement::BranchTargets(name, targets));
        }
        if self.eat_dot("callprototype") {
            let returns = if self.eat('(') {
                self.parameters()?
            } else {
                Vec::new()
            };
            self.name("'_' in a prototype")?;
            let params = if self.eat('(') {
                self.parameters()?
            } else {
                Vec::new()
            };
            while !self.eat(';') {
                if self.next().is_none() {
                    return self.error("';' after a prototype");
                }
            }
            return Ok(Statement::CallPrototype(name, returns, params));
        }
        Ok(Statement::Label(name))
    }

    fn instruction(&mut self) -> Result_<Instruction> {
        let line = self.line();
        let guard = if self.eat('@') {
            let negated = self.eat('!');
            let register = self.name("a predicate after '@'")?.to_owned();
            Some(Guard { negated, register })
        } else {
            None
        };
        let opcode = self.name("an instruction")?.to_owned();
        let mut modifiers = Vec::new();
        while let Some(Spanned {
            token: Token::Dot(word),
            ..
        }) = self.tokens.get(self.at)
        {
            self.at += 1;
            modifiers.push((*word).to_owned());
        }
        let mut operands = Vec::new();
        if !self.eat(';') {
            loop {
                operands.push(self.operand(0)?);
                if self.eat(';') {
                    break;
                }
                if !self.eat(',') {
                    return self.error(format!("',' or ';' after an operand of '{opcode}'"));
                }
            }
        }
        Ok(Instruction {
            guard,
            opcode,
            modifiers,
            operands,
            line,
            location: self.location.clone(),
        })
    }

    fn operand(&mut self, depth: u32) -> Result_<Operand> {
        if depth > 4 {
            return self.error("fewer braces in an operand");
        }
        let first = self.simple_operand(depth)?;
        if self.eat('|') {
            let second = self.simple_operand(depth)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn simple_operand(&mut self, depth: u32) -> Result_<Operand> {
        let Some(token) = self.peek() else {
            return self.error("an operand");
        };
        match *token {
            Token::Name("_") => {
                self.at += 1;
                Ok(Operand::Sink)
            }
            Token::Name(name) => {
                self.at += 1;
                // `%tid.x`: a dimension belongs to the name.
                let mut name = name.to_owned();
                while let Some(Spanned {
                    token: Token::Dot(word),
                    spaced: false,
                    ..
                }) = self.tokens.get(self.at)
                {
                    self.at += 1;
                    name.push('.');
                    name.push_str(word);
                }
                match self.peek() {
                    Some(Token::Punct('+')) => {
                        self.at += 1;
                        let offset = self.integer("an offset after '+'")? as i64;
                        Ok(Operand::NameOffset(name, offset))
                    }
                    Some(Token::Punct('-')) => {
                        let offset = self.integer("an offset after '-'")? as i64;
                        Ok(Operand::NameOffset(name, offset))
                    }
                    _ => Ok(Operand::Name(name)),
                }
            }
            Token::Number(_) | Token::Punct('-') => {
                Ok(Operand::Immediate(self.immediate("a number")?))
            }
            Token::Punct('!') => {
                self.at += 1;
                Ok(Operand::Not(self.name("a predicate after '!'")?.to_owned()))
            }
            Token::Punct('[') => {
                self.at += 1;
                let address = match self.peek() {
                    Some(&Token::Name(name)) => {
                        self.at += 1;
                        let offset = match self.peek() {
                            Some(Token::Punct('+')) => {
                                self.at += 1;
                                self.integer("a number of bytes after '+'")? as i64
                            }
                            Some(Token::Punct('-')) => {
                                self.integer("a number of bytes after '-'")? as i64
                            }
                            _ => 0,
                        };
                        Operand::Address {
                            base: Some(name.to_owned()),
                            offset,
                        }
                    }
                    _ => Operand::Address {
                        base: None,
                        offset: self.integer("an address")? as i64,
                    },
                };
                self.expect(']', "after an address")?;
                Ok(address)
            }
            Token::Punct('{') => {
                self.at += 1;
                Ok(Operand::Vector(self.list('}', depth)?))
            }
            Token::Punct('(') => {
                self.at += 1;
                Ok(Operand::List(self.list(')', depth)?))
            }
            _ => self.error("an operand"),
        }
    }

    fn list(&mut self, end: char, depth: u32) -> Result_<Vec<Operand>> {
        let mut list = Vec::new();
        if self.eat(end) {
            return Ok(list);
        }
        loop {
            list.push(self.operand(depth + 1)?);
            if self.eat(end) {
                return Ok(list);
            }
            self.expect(',', &format!("or '{end}' in a list of operands"))?;
        }
    }
}

fn space_of(word: &str) -> Option<Space> {
    Some(match word {
        "reg" => Space::Reg,
        "global" => Space::Global,
        "const" => Space::Const,
        "shared" => Space::Shared,
        "local" => Space::Local,
        "param" => Space::Param,
        _ => return None,
    })
}
