//! The functions that the driver provides to kernels.

use crate::finding::{Fault, Kind};
use crate::lowering::{LoadError, Lowering, bad, unsupported};
use crate::machine::Cx;
use crate::memory::{self, Access, Data, Order, Scope, Space};
use crate::program::{Action, CallSite, Step};
use crate::registers::lanes;

/// Longest text taken from a kernel.
const LONGEST: usize = 1 << 12;

/// A call of a function that the driver provides: `vprintf`, `__assertfail`, `malloc`, ….
pub(in super::super) fn system_call(
    name: &str,
    site: &CallSite,
    _f: &mut Lowering,
) -> Result<Action, LoadError> {
    let site = site.clone();
    match name {
        "vprintf" => {
            let &[format, arguments] = site.arguments.as_slice() else {
                return Err(bad("'vprintf' takes two arguments"));
            };
            let result = site.results.first().copied();
            Ok(Action::plain(move |cx| {
                for lane in lanes(cx.mask) {
                    let printed = print(cx, lane, format.0, arguments.0);
                    let count = match printed {
                        Ok(count) => count,
                        Err(fault) => return Step::Fault(fault),
                    };
                    if let Some((at, _)) = result {
                        for (i, byte) in count.to_le_bytes().into_iter().enumerate() {
                            let at = u64::from(at) + i as u64;
                            cx.params.set_byte(lane, at, byte, false);
                        }
                    }
                }
                Step::Next
            }))
        }
        "__assertfail" => {
            let &[message, file, line, function, _size] = site.arguments.as_slice() else {
                return Err(bad("'__assertfail' takes five arguments"));
            };
            Ok(Action::plain(move |cx| {
                let lane = cx.mask.trailing_zeros() as usize;
                let read = |cx: &mut Cx, at: u32| -> Result<String, Fault> {
                    let address = parameter(cx, lane, at, 8);
                    let bytes = text(cx, lane, address)?;
                    Ok(String::from_utf8_lossy(&bytes).into_owned())
                };
                let words = (|| -> Result<String, Fault> {
                    let message = read(cx, message.0)?;
                    let file = read(cx, file.0)?;
                    let function = read(cx, function.0)?;
                    let line = parameter(cx, lane, line.0, 4);
                    Ok(format!(
                        "{file}:{line}: {function}: assertion `{message}` failed"
                    ))
                })();
                match words {
                    Ok(words) => {
                        cx.report(Kind::Trap, lane, None, words);
                        Step::Fault(Fault::Assert)
                    }
                    Err(fault) => Step::Fault(fault),
                }
            }))
        }
        _ => Err(unsupported(format!(
            "'call' of '{name}', which has no body,"
        ))),
    }
}

/// An integer among the arguments of a call.
fn parameter(cx: &Cx, lane: usize, at: u32, bytes: u64) -> u64 {
    (0..bytes).fold(0, |value, i| {
        let byte = cx.params.byte(lane, u64::from(at) + i);
        value | u64::from(byte.map_or(0, |b| b.0)) << (8 * i)
    })
}

/// Reads one lane's memory by its generic address.
fn read(cx: &mut Cx, lane: usize, address: u64, bytes: u32) -> Result<u64, Fault> {
    let mut data = Data::default();
    let access = Access {
        space: Space::Generic,
        addresses: &[address; 32],
        mask: 1 << lane,
        bytes,
        element: bytes,
        order: Order::Weak,
        scope: Scope::Cta,
        non_coherent: false,
    };
    memory::load(cx, &access, &mut data)?;
    let (low, high) = (data.words[0][lane], data.words[1][lane]);
    Ok(u64::from(high) << 32 | u64::from(low))
}

/// A string that ends in 0.
fn text(cx: &mut Cx, lane: usize, address: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    while bytes.len() < LONGEST {
        let byte = read(cx, lane, address + bytes.len() as u64, 1)? as u8;
        if byte == 0 {
            break;
        }
        bytes.push(byte);
    }
    Ok(bytes)
}

/// Formats as C's `printf` does and appends to the output; the number of arguments, as CUDA has
/// it, or -1.
fn print(cx: &mut Cx, lane: usize, format_at: u32, arguments_at: u32) -> Result<i32, Fault> {
    let format_address = parameter(cx, lane, format_at, 8);
    let mut arguments = parameter(cx, lane, arguments_at, 8);
    let format = text(cx, lane, format_address)?;
    let mut out = Vec::new();
    let mut count = 0;
    let mut rest = format.as_slice();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let Some(spec) = Spec::parse(&mut rest) else {
            out.push(b'%');
            continue;
        };
        if spec.conversion == b'%' {
            out.push(b'%');
            continue;
        }
        let mut star = |cx: &mut Cx, wanted: bool| -> Result<Option<i32>, Fault> {
            if !wanted {
                return Ok(None);
            }
            arguments = arguments.next_multiple_of(4);
            let value = read(cx, lane, arguments, 4)? as i32;
            arguments += 4;
            Ok(Some(value))
        };
        let width = star(cx, spec.star_width)?;
        let precision = star(cx, spec.star_precision)?;
        let bytes = spec.bytes();
        arguments = arguments.next_multiple_of(bytes.into());
        let value = read(cx, lane, arguments, bytes)?;
        arguments += u64::from(bytes);
        count += 1;
        let words = if spec.conversion == b's' {
            text(cx, lane, value)?
        } else {
            Vec::new()
        };
        spec.format(&mut out, value, &words, width, precision);
    }
    cx.world.output.extend_from_slice(&out);
    Ok(count)
}

/// A conversion of a format string.
#[derive(Debug, Default)]
struct Spec {
    left: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    zero: bool,
    width: usize,
    star_width: bool,
    precision: Option<usize>,
    star_precision: bool,
    long: bool,
    short: u32,
    conversion: u8,
}

impl Spec {
    /// What follows a `%`; None if it makes no sense.
    fn parse(rest: &mut &[u8]) -> Option<Self> {
        let mut spec = Self::default();
        let mut at = 0;
        let bytes = *rest;
        let number = |at: &mut usize| {
            let mut value = 0usize;
            while let Some(digit) = bytes.get(*at).filter(|b| b.is_ascii_digit()) {
                value = (value * 10 + usize::from(digit - b'0')).min(LONGEST);
                *at += 1;
            }
            value
        };
        loop {
            match bytes.get(at)? {
                b'-' => spec.left = true,
                b'+' => spec.plus = true,
                b' ' => spec.space = true,
                b'#' => spec.alternate = true,
                b'0' => spec.zero = true,
                _ => break,
            }
            at += 1;
        }
        if bytes.get(at) == Some(&b'*') {
            spec.star_width = true;
            at += 1;
        } else {
            spec.width = number(&mut at);
        }
        if bytes.get(at) == Some(&b'.') {
            at += 1;
            if bytes.get(at) == Some(&b'*') {
                spec.star_precision = true;
                at += 1;
            } else {
                spec.precision = Some(number(&mut at));
            }
        }
        while let Some(byte) = bytes.get(at) {
            match byte {
                b'l' | b'j' | b'z' | b't' => spec.long = true,
                b'h' => spec.short += 1,
                _ => break,
            }
            at += 1;
        }
        spec.conversion = *bytes.get(at)?;
        if !b"diouxXcsfFeEgGaAp%".contains(&spec.conversion) {
            return None;
        }
        *rest = &bytes[at + 1..];
        Some(spec)
    }

    fn is_float(&self) -> bool {
        b"fFeEgGaA".contains(&self.conversion)
    }

    /// Bytes the argument has in the buffer.
    fn bytes(&self) -> u32 {
        if self.long || self.is_float() || matches!(self.conversion, b's' | b'p') {
            8
        } else {
            4
        }
    }

    fn format(
        &self,
        out: &mut Vec<u8>,
        value: u64,
        words: &[u8],
        width: Option<i32>,
        precision: Option<i32>,
    ) {
        let left = self.left || width.is_some_and(|w| w < 0);
        let width = width.map_or(self.width, |w| (w.unsigned_abs() as usize).min(LONGEST));
        let precision = match precision {
            Some(p) => usize::try_from(p).ok().map(|p| p.min(LONGEST)),
            None => self.precision,
        };
        let signed = match (self.long, self.short) {
            (true, _) => value as i64,
            (false, 0) => i64::from(value as i32),
            (false, 1) => i64::from(value as i16),
            (false, _) => i64::from(value as i8),
        };
        let unsigned = match (self.long, self.short) {
            (true, _) => value,
            (false, 0) => u64::from(value as u32),
            (false, 1) => u64::from(value as u16),
            (false, _) => u64::from(value as u8),
        };
        let plus = if self.plus {
            "+"
        } else if self.space {
            " "
        } else {
            ""
        };
        let digits = |text: String| match precision {
            Some(0) if unsigned == 0 => String::new(),
            Some(p) if text.len() < p => format!("{}{text}", "0".repeat(p - text.len())),
            _ => text,
        };
        let (sign, body): (String, Vec<u8>) = match self.conversion {
            b'd' | b'i' => {
                let sign = if signed < 0 { "-" } else { plus };
                let body = digits(signed.unsigned_abs().to_string());
                (sign.to_owned(), body.into_bytes())
            }
            b'u' => (String::new(), digits(unsigned.to_string()).into_bytes()),
            b'o' => {
                let sign = if self.alternate { "0" } else { "" };
                (
                    sign.to_owned(),
                    digits(format!("{unsigned:o}")).into_bytes(),
                )
            }
            b'x' => {
                let sign = if self.alternate && unsigned != 0 {
                    "0x"
                } else {
                    ""
                };
                (
                    sign.to_owned(),
                    digits(format!("{unsigned:x}")).into_bytes(),
                )
            }
            b'X' => {
                let sign = if self.alternate && unsigned != 0 {
                    "0X"
                } else {
                    ""
                };
                (
                    sign.to_owned(),
                    digits(format!("{unsigned:X}")).into_bytes(),
                )
            }
            b'p' => ("0x".to_owned(), format!("{value:x}").into_bytes()),
            b'c' => (String::new(), vec![value as u8]),
            b's' => {
                let n = precision.unwrap_or(usize::MAX).min(words.len());
                (String::new(), words[..n].to_vec())
            }
            conversion => {
                let value = f64::from_bits(value);
                let sign = if value.is_sign_negative() { "-" } else { plus };
                let body = float(value.abs(), conversion, precision, self.alternate);
                (sign.to_owned(), body.into_bytes())
            }
        };
        let len = sign.len() + body.len();
        let padding = width.saturating_sub(len);
        let integer = b"diouxX".contains(&self.conversion);
        let finite = !self.is_float() || f64::from_bits(value).is_finite();
        let zeros =
            self.zero && !left && finite && (self.is_float() || (integer && precision.is_none()));
        if !left && !zeros {
            out.extend(std::iter::repeat_n(b' ', padding));
        }
        out.extend_from_slice(sign.as_bytes());
        if zeros {
            out.extend(std::iter::repeat_n(b'0', padding));
        }
        out.extend_from_slice(&body);
        if left {
            out.extend(std::iter::repeat_n(b' ', padding));
        }
    }
}

/// A number that is not negative, as `%f`, `%e`, `%g` or `%a` write it.
fn float(value: f64, conversion: u8, precision: Option<usize>, alternate: bool) -> String {
    let upper = conversion.is_ascii_uppercase();
    let text = if value.is_nan() {
        "nan".to_owned()
    } else if value.is_infinite() {
        "inf".to_owned()
    } else {
        match conversion.to_ascii_lowercase() {
            b'f' => format!("{value:.*}", precision.unwrap_or(6)),
            b'e' => exponential(value, precision.unwrap_or(6)),
            b'a' => hexadecimal(value, precision),
            _ => general(value, precision.unwrap_or(6).max(1), alternate),
        }
    };
    if upper { text.to_uppercase() } else { text }
}

fn exponential(value: f64, precision: usize) -> String {
    let text = format!("{value:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn general(value: f64, precision: usize, alternate: bool) -> String {
    let scientific = exponential(value, precision - 1);
    let exponent: i32 = scientific
        .split_once('e')
        .and_then(|(_, e)| e.parse().ok())
        .unwrap_or(0);
    let (digits, tail) = if exponent < -4 || exponent >= precision as i32 {
        let (digits, tail) = scientific.split_once('e').unwrap_or((&scientific, "+00"));
        (digits.to_owned(), format!("e{tail}"))
    } else {
        let places = (precision as i32 - 1 - exponent).max(0) as usize;
        (format!("{value:.places$}"), String::new())
    };
    if alternate || !digits.contains('.') {
        return digits + &tail;
    }
    digits
        .trim_end_matches('0')
        .trim_end_matches('.')
        .to_owned()
        + &tail
}

fn hexadecimal(value: f64, precision: Option<usize>) -> String {
    let bits = value.to_bits();
    let field = (bits >> 52 & 0x7ff) as i32;
    let mut fraction = bits & ((1 << 52) - 1);
    let mut lead = u64::from(field != 0);
    let exponent = match (field, fraction) {
        (0, 0) => 0,
        (0, _) => -1022,
        (field, _) => field - 1023,
    };
    let places = precision.unwrap_or(13).min(13);
    let shift = 52 - 4 * places as u32;
    if shift > 0 {
        let whole = lead << 52 | fraction;
        let half = 1u64 << (shift - 1);
        let kept = whole >> shift;
        let left = whole & ((1 << shift) - 1);
        let up = left > half || (left == half && kept & 1 != 0);
        let rounded = (kept + u64::from(up)) << shift;
        lead = rounded >> 52;
        fraction = rounded & ((1 << 52) - 1);
    }
    let mut digits = format!("{fraction:013x}");
    digits.truncate(places);
    if precision.is_none() {
        digits.truncate(digits.trim_end_matches('0').len());
    }
    let point = if digits.is_empty() { "" } else { "." };
    format!("0x{lead}{point}{digits}p{exponent:+}")
}
