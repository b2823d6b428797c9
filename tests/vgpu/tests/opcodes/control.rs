//! Branches, calls, and the end of a thread.

use vgpu::finding::{Fault, Kind};

use crate::bench::Program;

/// One warp computes `%r0` in every lane.
fn lanes(module: &str, body: &str) -> Vec<u32> {
    let body = format!(
        "{body}\nend: mul.wide.u32 %d60, %t, 4; add.s64 %d60, %out, %d60;\n\
         st.global.u32 [%d60], %r0;"
    );
    let program = Program {
        module,
        ..Program::new(&body, &[0], 128)
    };
    program.run().clean().values()
}

fn each(f: impl Fn(u32) -> u32) -> Vec<u32> {
    (0..32).map(f).collect()
}

fn branches_go_where_the_guard_says() {
    // Loops of a different length in every lane.
    let found = lanes(
        "",
        "mov.u32 %r0, 0; mov.u32 %r1, %t;\n\
         again: setp.eq.u32 %p1, %r1, 0; @%p1 bra end; add.u32 %r0, %r0, %r1; sub.u32 %r1, %r1, 1;\n\
         bra.uni again;",
    );
    assert_eq!(found, each(|t| t * (t + 1) / 2));
    let found = lanes(
        "",
        "and.b32 %r1, %t, 3; setp.lt.u32 %p1, %r1, 2; mov.u32 %r0, 1;\n\
         @!%p1 bra high; mov.u32 %r0, 2; bra end;\nhigh: @%p1 bra end; add.u32 %r0, %r0, 8;",
    );
    assert_eq!(found, each(|t| if t % 4 < 2 { 2 } else { 9 }));
    // Guards on anything; nested blocks have labels of their own.
    let found = lanes(
        "",
        "mov.u32 %r0, 0; setp.gt.u32 %p1, %t, 9; @%p1 add.u32 %r0, %r0, 100;\n\
         @!%p1 add.u32 %r0, %r0, 7;\n\
         { .reg .pred %q; setp.gt.u32 %q, %t, 20; @%q bra in; add.u32 %r0, %r0, 1; in: }\n\
         { .reg .pred %q; setp.gt.u32 %q, %t, 25; @%q bra in; add.u32 %r0, %r0, 10; in: }",
    );
    let expected =
        each(|t| (if t > 9 { 100 } else { 7 }) + u32::from(t <= 20) + 10 * u32::from(t <= 25));
    assert_eq!(found, expected);
}

fn indexed_branches_take_the_entry() {
    for form in ["brx.idx", "brx.idx.uni"] {
        let index = if form.ends_with("uni") {
            "mov.u32 %r1, 2;"
        } else {
            "and.b32 %r1, %t, 3;"
        };
        let found = lanes(
            "",
            &format!(
                "{index} ts: .branchtargets a, b, c, b;\n{form} %r1, ts;\n\
                 a: mov.u32 %r0, 10; bra end;\nb: mov.u32 %r0, 20; bra end;\n\
                 c: mov.u32 %r0, 30;"
            ),
        );
        let table = [10, 20, 30, 20];
        let uniform = form.ends_with("uni");
        assert_eq!(
            found,
            each(|t| table[if uniform { 2 } else { t as usize % 4 }])
        );
    }
    let outcome = Program::new(
        "add.u32 %r1, %t, 1; ts: .branchtargets a; brx.idx %r1, ts; a: ret;",
        &[0],
        4,
    )
    .run();
    assert_eq!(outcome.result, Err(Fault::InvalidPc));
    assert_eq!(outcome.findings[0].kind, Kind::Trap);
}

const FUNCTIONS: &str = "
.func (.param .b32 r) twice(.param .b32 a)
{ .reg .b32 %x; ld.param.b32 %x, [a]; shl.b32 %x, %x, 1; st.param.b32 [r], %x; ret; }
.func (.param .b32 r) square(.param .b32 a)
{ .reg .b32 %x; ld.param.b32 %x, [a]; mul.lo.u32 %x, %x, %x; st.param.b32 [r], %x; ret; }
.func (.param .b32 r) fibonacci(.param .b32 a)
{ .reg .b32 %x, %y, %z; .reg .pred %p; ld.param.b32 %x, [a]; setp.lt.u32 %p, %x, 2;
  st.param.b32 [r], %x; @%p ret;
  { .param .b32 in; .param .b32 back; sub.u32 %y, %x, 1; st.param.b32 [in], %y;
    call (back), fibonacci, (in); ld.param.b32 %y, [back]; }
  { .param .b32 in; .param .b32 back; sub.u32 %z, %x, 2; st.param.b32 [in], %z;
    call (back), fibonacci, (in); ld.param.b32 %z, [back]; }
  add.u32 %y, %y, %z; st.param.b32 [r], %y; ret; }
.func (.param .align 8 .b8 r[16]) swap(.param .align 8 .b8 a[16])
{ .reg .b64 %x, %y; ld.param.v2.u64 {%x, %y}, [a]; st.param.v2.b64 [r], {%y, %x}; }
.func nothing() { ret; }
.global .align 8 .u64 table[2] = {twice, square};
";

/// Calls a function of one word with `%t`.
fn call(how: &str) -> String {
    format!(
        "{{ .param .b32 give; .param .b32 take; st.param.b32 [give], %t;\n{how}\n\
         ld.param.b32 %r0, [take]; }}"
    )
}

fn calls_hand_over_parameters_and_results() {
    let found = lanes(FUNCTIONS, &call("call.uni (take), twice, (give);"));
    assert_eq!(found, each(|t| 2 * t));
    let found = lanes(FUNCTIONS, &call("call (take), square, (give);"));
    assert_eq!(found, each(|t| t * t));
    // Some lanes call one, the others another; a guard on the call itself.
    let found = lanes(
        FUNCTIONS,
        &call(
            "and.b32 %r1, %t, 1; setp.eq.u32 %p1, %r1, 1;\n\
             @%p1 call (take), square, (give); @!%p1 call (take), twice, (give);",
        ),
    );
    assert_eq!(found, each(|t| if t % 2 == 1 { t * t } else { 2 * t }));
    let found = lanes(
        FUNCTIONS,
        &format!("call.uni nothing; {}", call("call (take), twice, (give);")),
    );
    assert_eq!(found, each(|t| 2 * t));
    // Structures by value.
    let found = lanes(
        FUNCTIONS,
        "{ .param .align 8 .b8 give[16]; .param .align 8 .b8 take[16]; cvt.u64.u32 %d1, %t;\n\
         st.param.b64 [give], %d1; st.param.b64 [give+8], 77; call.uni (take), swap, (give);\n\
         ld.param.v2.u32 {%r1, %r2}, [take]; ld.param.b32 %r3, [take+8]; }\n\
         mad.lo.u32 %r0, %r1, 1000, %r3;",
    );
    assert_eq!(found, each(|t| 77_000 + t));
}

fn functions_call_themselves() {
    let found = lanes(
        FUNCTIONS,
        &format!(
            "rem.u32 %r9, %t, 10; {}",
            call("st.param.b32 [give], %r9; call (take), fibonacci, (give);")
        ),
    );
    let numbers = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34];
    assert_eq!(found, each(|t| numbers[t as usize % 10]));
}

fn calls_through_addresses_go_to_the_function() {
    let indirect = "p: .callprototype (.param .b32 _) _ (.param .b32 _);";
    for (address, expected) in [
        ("mov.u64 %d1, square;", each(|t| t * t)),
        (
            "and.b32 %r1, %t, 1; mul.wide.u32 %d2, %r1, 8; mov.u64 %d1, table;\n\
             add.s64 %d1, %d1, %d2; ld.global.u64 %d1, [%d1];",
            each(|t| if t % 2 == 1 { t * t } else { 2 * t }),
        ),
    ] {
        let how = format!("{address} {indirect} call (take), %d1, (give), p;");
        assert_eq!(lanes(FUNCTIONS, &call(&how)), expected, "{address}");
    }
    let how = format!("mov.u64 %d1, 12345; {indirect} call (take), %d1, (give), p;");
    let outcome = Program {
        module: FUNCTIONS,
        ..Program::new(&call(&how), &[0], 4)
    }
    .run();
    assert_eq!(outcome.result, Err(Fault::InvalidPc));
}

fn threads_end_where_they_are_told_to() {
    let store = "mul.wide.u32 %d1, %t, 4; add.s64 %d1, %out, %d1; st.global.u32 [%d1], 9;";
    for end in ["ret", "ret.uni", "exit"] {
        let guard = if end == "ret.uni" { "" } else { "@%p1 " };
        let body = format!("setp.lt.u32 %p1, %t, 12; {guard}{end}; {store}");
        let found = Program::new(&body, &[0], 128).run().clean().values::<u32>();
        let all = end == "ret.uni";
        assert_eq!(found, each(|t| if all || t < 12 { 0 } else { 9 }), "{end}");
    }
    // `exit` in a function ends the thread, `ret` the call.
    let module = ".func leave() { exit; } .func back() { ret; }";
    for (function, stays) in [("leave", false), ("back", true)] {
        let body = format!("setp.lt.u32 %p1, %t, 12; @%p1 call {function}; {store}");
        let program = Program {
            module,
            ..Program::new(&body, &[0], 128)
        };
        let found = program.run().clean().values::<u32>();
        assert_eq!(
            found,
            each(|t| if stays || t >= 12 { 9 } else { 0 }),
            "{function}"
        );
    }
}

tests![
    branches_go_where_the_guard_says,
    indexed_branches_take_the_entry,
    calls_hand_over_parameters_and_results,
    functions_call_themselves,
    calls_through_addresses_go_to_the_function,
    threads_end_where_they_are_told_to,
];
