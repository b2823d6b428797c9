//! Words, numbers and punctuation of PTX text, each with the place where it stands.

use super::ParseError;
use super::ast::Immediate;

/// A token.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token<'a> {
    /// An identifier, with the dots inside an opcode split off: `%r1`, `$L__BB0_2`, `ld`.
    Name(&'a str),
    /// `.word`: a directive, a modifier, or the dimension of a special register. `::` belongs to
    /// the word (`.L2::128B`), and it may begin with a digit (`.1d`).
    Dot(&'a str),
    /// A literal.
    Number(Immediate),
    /// A string, without its quotes.
    Text(&'a str),
    /// Any other character.
    Punct(char),
}

impl Token<'_> {
    /// As it stood in the text, for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Token::Name(name) => format!("'{}'", short(name)),
            Token::Dot(word) => format!("'.{}'", short(word)),
            Token::Number(Immediate::Int(value)) => format!("the number {}", *value as i64),
            Token::Number(Immediate::F32(bits)) => format!("the number 0f{bits:08X}"),
            Token::Number(Immediate::F64(value)) => format!("the number {value}"),
            Token::Text(text) => format!("the string \"{}\"", short(text)),
            Token::Punct(c) => format!("'{}'", c.escape_default()),
        }
    }
}

/// The first characters of a word: messages stay readable whatever the input.
fn short(word: &str) -> String {
    const SHOWN: usize = 60;
    match word.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &word[..at]),
        None => word.to_owned(),
    }
}

/// A token with its place, line and column from 1.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Spanned<'a> {
    pub(super) token: Token<'a>,
    pub(super) line: u32,
    pub(super) column: u32,
    /// Whether white space stands before it: `a .b` is not `a.b`.
    pub(super) spaced: bool,
}

/// Splits the text. Comments are white space.
pub(super) fn tokens(text: &str) -> Result<Vec<Spanned<'_>>, ParseError> {
    let mut lexer = Lexer {
        text,
        bytes: text.as_bytes(),
        at: 0,
        line: 1,
        line_start: 0,
    };
    let mut out = Vec::new();
    loop {
        let before = lexer.at;
        lexer.skip_space()?;
        let spaced = lexer.at > before || before == 0;
        let Some(&byte) = lexer.bytes.get(lexer.at) else {
            return Ok(out);
        };
        let (line, column) = lexer.place();
        let token = lexer.token(byte)?;
        out.push(Spanned {
            token,
            line,
            column,
            spaced,
        });
    }
}

struct Lexer<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    line: u32,
    line_start: usize,
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%')
}

impl<'a> Lexer<'a> {
    fn place(&self) -> (u32, u32) {
        (self.line, (self.at - self.line_start + 1) as u32)
    }

    fn error(&self, found: &str, expected: &str) -> ParseError {
        let (line, column) = self.place();
        ParseError {
            line,
            column,
            found: found.to_owned(),
            expected: expected.to_owned(),
        }
    }

    fn newline(&mut self) {
        self.line += 1;
        self.line_start = self.at;
    }

    fn skip_space(&mut self) -> Result<(), ParseError> {
        while let Some(&byte) = self.bytes.get(self.at) {
            let rest = &self.bytes[self.at..];
            if byte == b'\n' {
                self.at += 1;
                self.newline();
            } else if byte.is_ascii_whitespace() {
                self.at += 1;
            } else if rest.starts_with(b"//") {
                while self.bytes.get(self.at).is_some_and(|&b| b != b'\n') {
                    self.at += 1;
                }
            } else if rest.starts_with(b"/*") {
                self.at += 2;
                while !self.bytes[self.at..].starts_with(b"*/") {
                    match self.bytes.get(self.at) {
                        None => return Err(self.error("the end of the text", "'*/'")),
                        Some(b'\n') => {
                            self.at += 1;
                            self.newline();
                        }
                        Some(_) => self.at += 1,
                    }
                }
                self.at += 2;
            } else {
                break;
            }
        }
        Ok(())
    }

    fn take_while(&mut self, keep: impl Fn(u8) -> bool) -> &'a str {
        let start = self.at;
        while self.bytes.get(self.at).is_some_and(|&b| keep(b)) {
            self.at += 1;
        }
        &self.text[start..self.at]
    }

    fn token(&mut self, byte: u8) -> Result<Token<'a>, ParseError> {
        if byte.is_ascii_digit() {
            return self.number();
        }
        if is_word(byte) {
            return Ok(Token::Name(self.take_while(is_word)));
        }
        if byte == b'.' {
            let next = self.bytes.get(self.at + 1).copied().unwrap_or(b' ');
            if is_word(next) {
                self.at += 1;
                return Ok(Token::Dot(self.dotted_word()));
            }
        }
        if byte == b'"' {
            self.at += 1;
            let start = self.at;
            while let Some(&b) = self.bytes.get(self.at) {
                match b {
                    b'"' => {
                        self.at += 1;
                        return Ok(Token::Text(&self.text[start..self.at - 1]));
                    }
                    b'\n' => break,
                    b'\\' if self.bytes.get(self.at + 1).is_some_and(|&b| b != b'\n') => {
                        self.at += 2;
                    }
                    _ => self.at += 1,
                }
            }
            return Err(self.error("the end of the line", "'\"' at the end of a string"));
        }
        let c = self.text[self.at..].chars().next().unwrap_or('\0');
        self.at += c.len_utf8();
        Ok(Token::Punct(c))
    }

    /// A word after a dot, with the `::` inside it.
    fn dotted_word(&mut self) -> &'a str {
        let start = self.at;
        loop {
            self.take_while(is_word);
            let rest = &self.bytes[self.at..];
            if rest.starts_with(b"::") && rest.get(2).is_some_and(|&b| is_word(b)) {
                self.at += 2;
            } else {
                return &self.text[start..self.at];
            }
        }
    }

    fn number(&mut self) -> Result<Token<'a>, ParseError> {
        let start = self.at;
        let rest = &self.bytes[start..];
        let hex_digits = |n: usize| {
            rest.get(2..2 + n)
                .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        };
        if let [b'0', b'f' | b'F', ..] = rest {
            let bits = hex_digits(8);
            let bits = bits.ok_or_else(|| self.error("'0f'", "8 hexadecimal digits after it"))?;
            self.at += 10;
            return Ok(Token::Number(Immediate::F32(bits as u32)));
        }
        if let [b'0', b'd' | b'D', ..] = rest {
            let bits = hex_digits(16);
            let bits = bits.ok_or_else(|| self.error("'0d'", "16 hexadecimal digits after it"))?;
            self.at += 18;
            return Ok(Token::Number(Immediate::F64(f64::from_bits(bits))));
        }
        let radix = match rest {
            [b'0', b'x' | b'X', ..] => 16,
            [b'0', b'b' | b'B', ..] => 2,
            _ => 10,
        };
        if radix != 10 {
            self.at += 2;
            let digits = self.take_while(|b| (b as char).is_digit(radix));
            let value = u64::from_str_radix(digits, radix);
            let value = value.map_err(|_| self.error(digits, "a number of at most 64 bits"))?;
            self.skip_suffix();
            return Ok(Token::Number(Immediate::Int(value)));
        }
        self.take_while(|b| b.is_ascii_digit());
        let mut float = false;
        // `1.5`, `0.`, `1e3`; but `1.u32` cannot occur, so a dot after digits is a fraction.
        if self.bytes.get(self.at) == Some(&b'.') {
            float = true;
            self.at += 1;
            self.take_while(|b| b.is_ascii_digit());
        }
        if let Some(b'e' | b'E') = self.bytes.get(self.at) {
            let sign = usize::from(matches!(self.bytes.get(self.at + 1), Some(b'+' | b'-')));
            if self
                .bytes
                .get(self.at + 1 + sign)
                .is_some_and(u8::is_ascii_digit)
            {
                float = true;
                self.at += 1 + sign;
                self.take_while(|b| b.is_ascii_digit());
            }
        }
        let digits = &self.text[start..self.at];
        if float {
            let value = digits.parse::<f64>();
            let value = value.map_err(|_| self.error(digits, "a decimal number"))?;
            return Ok(Token::Number(Immediate::F64(value)));
        }
        let octal = digits.len() > 1 && digits.starts_with('0');
        let value = u64::from_str_radix(digits, if octal { 8 } else { 10 });
        let value = value.map_err(|_| self.error(digits, "a number of at most 64 bits"))?;
        self.skip_suffix();
        Ok(Token::Number(Immediate::Int(value)))
    }

    fn skip_suffix(&mut self) {
        if let Some(b'U' | b'u') = self.bytes.get(self.at) {
            self.at += 1;
        }
    }
}
