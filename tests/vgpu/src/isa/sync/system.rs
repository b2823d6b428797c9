//! The functions that the driver provides to kernels.

use crate::finding::{Fault, Kind};
use crate::lowering::{LoadError, Lowering, bad, unsupported};
use crate::machine::Cx;
use crate::memory::{self, Access, Data, Order, Scope, Space};
use crate::program::{Action, CallSite, Step};
use crate::registers::lanes;

/// Longest text taken from a kernel.
const LONGEST: usize = 1 << 12;
/// Largest width or precision.
const LONGEST_PART: i32 = 1 << 12;

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
        let width = star(cx, spec.star_width)?.unwrap_or(spec.width);
        let precision = star(cx, spec.star_precision)?.unwrap_or(spec.precision);
        let width = width.clamp(-LONGEST_PART, LONGEST_PART);
        let precision = precision.clamp(-1, LONGEST_PART);
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
    width: i32,
    star_width: bool,
    /// Negative is none.
    precision: i32,
    star_precision: bool,
    long: bool,
    short: u32,
    conversion: u8,
}

impl Spec {
    /// What follows a `%`; None if it makes no sense.
    fn parse(rest: &mut &[u8]) -> Option<Self> {
        let mut spec = Self {
            precision: -1,
            ..Self::default()
        };
        let mut at = 0;
        let bytes = *rest;
        let number = |at: &mut usize| {
            let mut value = 0;
            while let Some(digit) = bytes.get(*at).filter(|b| b.is_ascii_digit()) {
                value = (value * 10 + i32::from(digit - b'0')).min(LONGEST_PART);
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
                spec.precision = number(&mut at);
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

    /// Appends the formatted value, as the host's own `printf` formats it: on a device too it is
    /// the host that does. Without an argument the width is 0 and the precision negative.
    fn format(&self, out: &mut Vec<u8>, value: u64, words: &[u8], width: i32, precision: i32) {
        let mut format = vec![b'%'];
        let flags = [
            (self.left, b'-'),
            (self.plus, b'+'),
            (self.space, b' '),
            (self.alternate, b'#'),
            (self.zero, b'0'),
        ];
        format.extend(flags.iter().filter(|f| f.0).map(|f| f.1));
        format.extend(b"*.*");
        if !self.is_float() && !matches!(self.conversion, b'c' | b's' | b'p') {
            format.extend(match (self.long, self.short) {
                (true, _) => &b"ll"[..],
                (false, 0) => b"",
                (false, 1) => b"h",
                (false, _) => b"hh",
            });
        }
        format.extend([self.conversion, 0]);
        let words: Vec<u8> = words.iter().copied().chain([0]).collect();
        let at = format.as_ptr().cast::<libc::c_char>();
        let print = |to: *mut libc::c_char, room: usize| {
            // SAFETY: the format is one conversion of the list in `parse`, with two stars before
            // it; the arguments are those that it takes. `to` has `room` bytes.
            unsafe {
                match self.conversion {
                    b's' => libc::snprintf(to, room, at, width, precision, words.as_ptr()),
                    b'p' => {
                        let pointer = std::ptr::without_provenance::<libc::c_void>(value as usize);
                        libc::snprintf(to, room, at, width, precision, pointer)
                    }
                    _ if self.is_float() => {
                        libc::snprintf(to, room, at, width, precision, f64::from_bits(value))
                    }
                    _ if self.long => libc::snprintf(to, room, at, width, precision, value),
                    _ => libc::snprintf(to, room, at, width, precision, value as libc::c_int),
                }
            }
        };
        let length = usize::try_from(print(std::ptr::null_mut(), 0)).unwrap_or(0);
        let mut text = vec![0; length + 1];
        print(text.as_mut_ptr().cast(), text.len());
        out.extend(&text[..length]);
    }
}
