//! What the driver provides to kernels (`printf`, `assert`), and what ends or delays a thread.

use std::ffi::CString;

use vgpu::finding::{Fault, Kind};

use crate::bench::{Program, note};

const DECLARED: &str = "
.extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);
.extern .func __assertfail(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 s);
";

/// A string as an initialised variable.
fn variable(name: &str, text: &[u8]) -> String {
    let bytes: Vec<String> = text.iter().chain([&0]).map(ToString::to_string).collect();
    format!(
        ".global .align 1 .b8 {name}[{}] = {{{}}};\n",
        bytes.len(),
        bytes.join(", ")
    )
}

/// What a kernel prints with a format and the bytes of the arguments, and what `vprintf` gives.
fn print(format: &[u8], arguments: &[u8], more: &str) -> (String, i32) {
    let module = format!("{DECLARED}{}{more}", variable("format", format));
    let body = "mov.u64 %d1, format; cvta.global.u64 %d1, %d1;\n\
        { .param .b64 f; .param .b64 a; .param .b32 r; st.param.b64 [f], %d1;\n\
        st.param.b64 [a], %in; call.uni (r), vprintf, (f, a); ld.param.b32 %r1, [r]; }\n\
        st.global.u32 [%out], %r1;";
    let program = Program {
        module: &module,
        block: [1, 1, 1],
        ..Program::new(body, arguments, 4)
    };
    let outcome = program.run().clean();
    let count = outcome.values::<i32>()[0];
    (outcome.printed, count)
}

/// What C prints; the closure calls `snprintf` with the value.
fn in_c(
    format: &str,
    call: impl Fn(*mut libc::c_char, usize, *const libc::c_char) -> i32,
) -> String {
    let format = CString::new(format).expect("no zero inside");
    let mut buffer = vec![0u8; 8192];
    let n = call(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr());
    let n = usize::try_from(n).expect("snprintf succeeds");
    String::from_utf8_lossy(&buffer[..n]).into_owned()
}

/// Every combination of flags, with these widths and precisions.
fn specifications(conversion: &str) -> Vec<String> {
    let mut list = Vec::new();
    for flags in 0..32u32 {
        let flags: String = "-+ #0"
            .chars()
            .enumerate()
            .filter(|(n, _)| flags >> n & 1 != 0)
            .map(|(_, c)| c)
            .collect();
        for width in ["", "1", "9", "20"] {
            for precision in ["", ".", ".0", ".1", ".3", ".12"] {
                list.push(format!("%{flags}{width}{precision}{conversion}"));
            }
        }
    }
    list
}

fn printf_prints_integers_as_c_does() {
    if note("call.uni (r), vprintf, (f, a);") {
        return;
    }
    let values = [
        0u64,
        1,
        7,
        42,
        255,
        65_535,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 63,
        u64::MAX,
    ];
    for conversion in ["d", "i", "u", "o", "x", "X", "c"] {
        // One kernel prints all forms of a value: the formats are joined.
        for length in ["", "l", "ll", "h", "hh", "z", "j", "t"] {
            if conversion == "c" && !length.is_empty() {
                continue;
            }
            let wide = matches!(length, "l" | "ll" | "z" | "j" | "t");
            let forms = specifications(&format!("{length}{conversion}"));
            for forms in forms.chunks(64) {
                for value in values {
                    if conversion == "c" && value as u8 == 0 {
                        continue;
                    }
                    let format: String = forms.iter().map(|f| format!("[{f}]")).collect();
                    let expected: String = forms
                        .iter()
                        .map(|f| {
                            in_c(&format!("[{f}]"), |to, n, f| {
                                // SAFETY: the buffer has n bytes, and the format takes one
                                // argument of this size.
                                unsafe {
                                    if wide {
                                        libc::snprintf(to, n, f, value)
                                    } else {
                                        libc::snprintf(to, n, f, value as libc::c_uint)
                                    }
                                }
                            })
                        })
                        .collect();
                    let arguments: Vec<u8> = forms
                        .iter()
                        .flat_map(|_| {
                            let bytes = value.to_le_bytes();
                            bytes[..if wide { 8 } else { 4 }].to_vec()
                        })
                        .collect();
                    let found = print(format.as_bytes(), &arguments, "");
                    let expected = String::from_utf8_lossy(expected.as_bytes()).into_owned();
                    assert_eq!(found.0, expected, "{format} of {value:#x}");
                    assert_eq!(found.1, forms.len() as i32);
                }
            }
        }
    }
}

fn printf_prints_floats_as_c_does() {
    let values = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        0.1,
        0.5,
        2.5,
        9.999_999,
        123.456,
        1e-5,
        1.5e-5,
        99999.5,
        1e6,
        123_456_789.0,
        1e22,
        1e100,
        5e-324,
        2.2e-308,
        f64::MAX,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
    ];
    for conversion in ["f", "F", "e", "E", "g", "G", "a", "A"] {
        let forms = specifications(conversion);
        for forms in forms.chunks(96) {
            for value in values {
                let format: String = forms.iter().map(|f| format!("[{f}]")).collect();
                let expected: String = forms
                    .iter()
                    .map(|f| {
                        in_c(&format!("[{f}]"), |to, n, f| {
                            // SAFETY: the buffer has n bytes, and the format takes one double.
                            unsafe { libc::snprintf(to, n, f, value) }
                        })
                    })
                    .collect();
                let arguments: Vec<u8> = forms
                    .iter()
                    .flat_map(|_| f64::to_bits(value).to_le_bytes())
                    .collect();
                if note("call.uni (r), vprintf, (f, a);") {
                    return;
                }
                assert_eq!(
                    print(format.as_bytes(), &arguments, "").0,
                    expected,
                    "{format} of {value}"
                );
            }
        }
    }
}

fn printf_prints_strings_pointers_and_stars() {
    let more = variable("text", b"a few words");
    let module = format!(
        "{DECLARED}{}{more}",
        variable("format", b"<%s|%5s|%-14s|%.3s|%14.2s>")
    );
    let body = ".local .align 8 .b8 l[40]; mov.u64 %d1, format; cvta.global.u64 %d1, %d1;\n\
        mov.u64 %d2, text; cvta.global.u64 %d2, %d2; mov.u64 %d3, l; cvta.local.u64 %d4, %d3;\n\
        st.local.v2.u64 [l], {%d2, %d2}; st.local.v2.u64 [l+16], {%d2, %d2}; st.local.u64 [l+32], %d2;\n\
        { .param .b64 f; .param .b64 a; .param .b32 r; st.param.b64 [f], %d1;\n\
        st.param.b64 [a], %d4; call.uni (r), vprintf, (f, a); }";
    let program = Program {
        module: &module,
        block: [1, 1, 1],
        ..Program::new(body, &[0], 4)
    };
    let printed = program.run().clean().printed;
    assert_eq!(
        printed,
        "<a few words|a few words|a few words   |a f|            a >"
    );
    // Width and precision among the arguments; a negative width is a flag, a negative precision
    // is none.
    for (width, precision) in [(8, 3), (-8, 3), (0, 0), (12, -1), (-3, 7)] {
        let mut arguments = Vec::new();
        for n in [width, precision, -42i32] {
            arguments.extend(n.to_le_bytes());
        }
        let expected = in_c("[%*.*d]", |to, n, f| {
            // SAFETY: the buffer has n bytes, and the format takes three integers.
            unsafe { libc::snprintf(to, n, f, width, precision, -42) }
        });
        assert_eq!(print(b"[%*.*d]", &arguments, "").0, expected);
    }
    for pointer in [0u64, 0x1234, 0x7fff_ffff_ffff] {
        for form in ["%p", "%20p", "%-20p"] {
            let expected = in_c(form, |to, n, f| {
                // SAFETY: the buffer has n bytes, and the format takes one pointer.
                unsafe { libc::snprintf(to, n, f, pointer as *const libc::c_void) }
            });
            assert_eq!(
                print(form.as_bytes(), &pointer.to_le_bytes(), "").0,
                expected,
                "{form}"
            );
        }
    }
    assert_eq!(
        print(b"100%% %d%%\n", &7i32.to_le_bytes(), ""),
        ("100% 7%\n".to_owned(), 1)
    );
    // An argument of 8 bytes after one of 4 lies at a multiple of 8.
    let mut mixed = 3u32.to_le_bytes().to_vec();
    mixed.extend([0xee; 4]);
    mixed.extend(2.5f64.to_bits().to_le_bytes());
    mixed.extend(5u32.to_le_bytes());
    assert_eq!(print(b"%u %.1f %u", &mixed, ""), ("3 2.5 5".to_owned(), 3));
}

fn an_assertion_names_itself_and_ends_the_context() {
    let module = format!(
        "{DECLARED}{}{}{}",
        variable("what", b"x > 0"),
        variable("file", b"some.cu"),
        variable("name", b"void kernel(int)")
    );
    let body = "setp.ne.u32 %p1, %t, 5; @%p1 bra fine;\n\
        mov.u64 %d1, what; cvta.global.u64 %d1, %d1; mov.u64 %d2, file; cvta.global.u64 %d2, %d2;\n\
        mov.u64 %d3, name; cvta.global.u64 %d3, %d3;\n\
        { .param .b64 m; .param .b64 f; .param .b32 l; .param .b64 n; .param .b64 s;\n\
        st.param.b64 [m], %d1; st.param.b64 [f], %d2; st.param.b32 [l], 77;\n\
        st.param.b64 [n], %d3; st.param.b64 [s], 1;\n\
        call.uni __assertfail, (m, f, l, n, s); }\nfine: ret;";
    let program = Program {
        module: &module,
        ..Program::new(body, &[0], 4)
    };
    let outcome = program.run();
    assert_eq!(outcome.result, Err(Fault::Assert));
    let finding = &outcome.findings[0];
    assert_eq!(finding.kind, Kind::Trap);
    assert_eq!(finding.thread.as_ref().map(|t| t.thread), Some([5, 0, 0]));
    assert_eq!(
        finding.message,
        "some.cu:77: void kernel(int): assertion `x > 0` failed"
    );
}

fn traps_end_the_context() {
    for (body, words) in [
        ("setp.eq.u32 %p1, %t, 9; @%p1 trap;", "'trap'"),
        ("setp.eq.u32 %p1, %t, 9; @%p1 brkpt;", "'brkpt'"),
    ] {
        let outcome = Program::new(body, &[0], 4).run();
        assert_eq!(outcome.result, Err(Fault::LaunchFailed));
        assert_eq!(outcome.findings[0].kind, Kind::Trap);
        assert!(outcome.findings[0].message.contains(words));
        let thread = outcome.findings[0].thread.as_ref().map(|t| t.thread);
        assert_eq!(thread, Some([9, 0, 0]));
    }
    // Nobody gets there.
    let body = "setp.eq.u32 %p1, %t, 99; @%p1 trap; @%p1 brkpt;";
    Program::new(body, &[0], 4).run().clean();
}

fn sleepers_let_others_go_on() {
    // Lane 0 waits for what lane 31 writes later, asleep or not.
    for wait in ["nanosleep.u32 100;", "nanosleep.u32 %t;", ""] {
        let body = format!(
            "setp.ne.u32 %p1, %t, 0; @%p1 bra other;\n\
             again: {wait} ld.volatile.global.u32 %r1, [%out]; setp.eq.u32 %p2, %r1, 0;\n\
             @%p2 bra again; add.u32 %r1, %r1, 1; st.global.u32 [%out+4], %r1; ret;\n\
             other: setp.ne.u32 %p1, %t, 31; @%p1 ret; mov.u32 %r2, 41;\n\
             st.volatile.global.u32 [%out], %r2;"
        );
        let found = Program::new(&body, &[0], 8).run().clean();
        assert_eq!(found.values::<u32>(), [41, 42], "{wait}");
    }
}

fn hints_to_the_scheduler_run() {
    let body = "griddepcontrol.wait; setmaxnreg.inc.sync.aligned.u32 64;\n\
        setmaxnreg.dec.sync.aligned.u32 40; pmevent 7; pmevent.mask 3;\n\
        griddepcontrol.launch_dependents; mul.wide.u32 %d1, %t, 4; add.s64 %d1, %out, %d1;\n\
        st.global.u32 [%d1], %t;";
    let found = Program::new(body, &[0], 128).run().clean();
    assert_eq!(found.values::<u32>(), (0..32).collect::<Vec<u32>>());
}

tests![
    printf_prints_integers_as_c_does,
    printf_prints_floats_as_c_does,
    printf_prints_strings_pointers_and_stars,
    an_assertion_names_itself_and_ends_the_context,
    traps_end_the_context,
    sleepers_let_others_go_on,
    hints_to_the_scheduler_run,
];
