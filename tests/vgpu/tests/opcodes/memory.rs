//! Loads, stores, and the conversion of addresses. What is loaded was put there byte by byte, and
//! what was stored is fetched byte by byte.

use crate::bench::{Program, noise, note};

const TYPES: [(&str, usize); 14] = [
    ("b8", 1),
    ("u8", 1),
    ("s8", 1),
    ("b16", 2),
    ("u16", 2),
    ("s16", 2),
    ("b32", 4),
    ("u32", 4),
    ("s32", 4),
    ("f32", 4),
    ("b64", 8),
    ("u64", 8),
    ("s64", 8),
    ("f64", 8),
];

const LANES: usize = 64;

/// The registers that may take an element of a type: the letter of the name, and the bytes.
fn registers(ty: &str, size: usize) -> Vec<(&'static str, usize)> {
    let all = [("%h", 2), ("%r", 4), ("%d", 8)];
    let exact = ty.starts_with('f');
    all.into_iter()
        .filter(|r| if exact { r.1 == size } else { r.1 >= size })
        .collect()
}

/// A value as the type extends it to a wider register.
fn extended(bytes: &[u8], signed: bool, to: usize) -> Vec<u8> {
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let fill = if signed && negative { 0xff } else { 0 };
    let mut out = bytes.to_vec();
    out.resize(to, fill);
    out
}

/// A place where every thread has some bytes of its own.
struct Place {
    /// As the instruction names it.
    space: &'static str,
    /// Its declaration, if it is a variable, for so many bytes a thread.
    declare: fn(usize) -> String,
    /// Puts the address into `%d20`; `%d10` holds the offset in the input or the output.
    address: &'static str,
    /// The space in which single bytes reach the same place, and the register.
    bytes: &'static str,
}

const PLACES: [Place; 7] = [
    Place {
        space: ".global",
        declare: |_| String::new(),
        address: "add.s64 %d20, %in, %d10;",
        bytes: "global",
    },
    Place {
        space: "",
        declare: |_| String::new(),
        address: "add.s64 %d20, %in, %d10;",
        bytes: "global",
    },
    Place {
        space: ".shared",
        declare: |n| format!(".shared .align 32 .b8 s[{}];", LANES * n),
        address: "mov.u64 %d20, s; add.s64 %d20, %d20, %d10;",
        bytes: "shared",
    },
    Place {
        space: ".shared::cta",
        declare: |n| format!(".shared .align 32 .b8 s[{}];", LANES * n),
        address: "mov.u64 %d20, s; add.s64 %d20, %d20, %d10;",
        bytes: "shared",
    },
    Place {
        space: "",
        declare: |n| format!(".shared .align 32 .b8 s[{}];", LANES * n),
        address: "cvta.shared.u64 %d20, s; add.s64 %d20, %d20, %d10;",
        bytes: "generic",
    },
    Place {
        space: ".local",
        declare: |n| format!(".local .align 32 .b8 l[{}];", n.max(4)),
        address: "mov.u64 %d20, l;",
        bytes: "local",
    },
    Place {
        space: "",
        declare: |n| format!(".local .align 32 .b8 l[{}];", n.max(4)),
        address: "mov.u64 %d20, l; cvta.local.u64 %d20, %d20;",
        bytes: "generic",
    },
];

fn list(register: &str, n: usize) -> String {
    let names: Vec<String> = (0..n).map(|i| format!("{register}{i}")).collect();
    match n {
        1 => names[0].clone(),
        _ => format!("{{{}}}", names.join(", ")),
    }
}

fn vector(n: usize) -> String {
    match n {
        1 => String::new(),
        n => format!(".v{n}"),
    }
}

/// Copies bytes, one at a time.
fn copy(n: usize, from: (&str, &str), to: (&str, &str)) -> String {
    let space = |s: &str| match s {
        "generic" => String::new(),
        s => format!(".{s}"),
    };
    let (load, store) = (space(from.0), space(to.0));
    (0..n)
        .map(|i| {
            format!(
                "ld{load}.u8 %h50, [{}+{i}]; st{store}.u8 [{}+{i}], %h50;\n",
                from.1, to.1
            )
        })
        .collect()
}

/// Loads with this instruction from the place and compares with the bytes.
fn check_load(name: &str, place: &Place, ty: &str, size: usize, n: usize, policy: bool) {
    if note(name) {
        return;
    }
    let bytes = size * n;
    for (register, width) in registers(ty, size) {
        let fill = if place.bytes == "global" {
            String::new()
        } else {
            copy(bytes, ("global", "%d21"), (place.bytes, "%d20"))
        };
        let stores: String = (0..n)
            .map(|i| {
                let bits = 8 * width;
                format!("st.global.b{bits} [%d22+{}], {register}{i};", width * i)
            })
            .collect();
        let operands = list(register, n);
        let policy = if policy { ", %d40" } else { "" };
        let body = format!(
            "{}\nmov.b64 %d40, 0; mul.wide.u32 %d10, %t, {bytes}; {}\nadd.s64 %d21, %in, %d10;\n\
             mul.wide.u32 %d11, %t, {}; add.s64 %d22, %out, %d11;\n{fill}\
             {name} {operands}, [%d20]{policy};\n{stores}",
            (place.declare)(bytes),
            place.address,
            width * n
        );
        let input = noise(LANES * bytes);
        let found = Program::new(&body, &input, LANES * width * n)
            .threads(LANES as u32)
            .run()
            .clean();
        let expected: Vec<u8> = input
            .chunks(size)
            .flat_map(|element| extended(element, ty.starts_with('s'), width))
            .collect();
        assert!(found.out == expected, "{name} into {register}");
    }
}

/// Stores with this instruction and compares the bytes.
fn check_store(name: &str, place: &Place, ty: &str, size: usize, n: usize, policy: bool) {
    if note(name) {
        return;
    }
    let bytes = size * n;
    for (register, width) in registers(ty, size) {
        let loads: String = (0..n)
            .map(|i| {
                let bits = 8 * width;
                format!("ld.global.b{bits} {register}{i}, [%d21+{}];", width * i)
            })
            .collect();
        // What goes to global memory is the output itself.
        let (address, fetch) = if place.bytes == "global" {
            ("add.s64 %d20, %out, %d10;".to_owned(), String::new())
        } else {
            let fetch = copy(bytes, (place.bytes, "%d20"), ("global", "%d22"));
            (place.address.to_owned(), fetch)
        };
        let operands = list(register, n);
        let policy = if policy { ", %d40" } else { "" };
        let body = format!(
            "{}\nmov.b64 %d40, 0; mul.wide.u32 %d10, %t, {bytes}; {address}\n\
             mul.wide.u32 %d11, %t, {}; add.s64 %d21, %in, %d11;\n\
             add.s64 %d22, %out, %d10;\n{loads}{name} [%d20], {operands}{policy};\n{fetch}",
            (place.declare)(bytes),
            width * n,
        );
        let input = noise(LANES * width * n);
        let found = Program::new(&body, &input, LANES * bytes)
            .threads(LANES as u32)
            .run()
            .clean();
        let expected: Vec<u8> = input
            .chunks(width)
            .flat_map(|value| value[..size].to_vec())
            .collect();
        assert!(found.out == expected, "{name} from {register}");
    }
}

/// Calls `f` for every type and vector that fit one access.
fn shapes(f: impl Fn(&str, usize, usize)) {
    for (ty, size) in TYPES {
        for n in [1, 2, 4] {
            if size * n <= 16 {
                f(ty, size, n);
            }
        }
    }
}

fn every_type_and_vector_is_loaded_from_every_space() {
    for place in &PLACES {
        shapes(|ty, size, n| {
            let name = format!("ld{}{}.{ty}", place.space, vector(n));
            check_load(&name, place, ty, size, n, false);
        });
    }
}

fn every_type_and_vector_is_stored_to_every_space() {
    for place in &PLACES {
        shapes(|ty, size, n| {
            let name = format!("st{}{}.{ty}", place.space, vector(n));
            check_store(&name, place, ty, size, n, false);
        });
    }
}

fn accesses_of_thirty_two_bytes() {
    for (ty, size, n) in [("b32", 4, 8), ("f32", 4, 8), ("b64", 8, 4), ("f64", 8, 4)] {
        let name = |opcode: &str| format!("{opcode}.global{}.{ty}", vector(n));
        check_load(&name("ld"), &PLACES[0], ty, size, n, false);
        check_store(&name("st"), &PLACES[0], ty, size, n, false);
    }
}

fn hints_and_orders_change_no_value() {
    let hints = [
        "ca",
        "cg",
        "cs",
        "lu",
        "cv",
        "L1::evict_normal",
        "L1::evict_unchanged",
        "L1::evict_first",
        "L1::evict_last",
        "L1::no_allocate",
        "L2::64B",
        "L2::128B",
        "L2::256B",
        "nc",
        "nc.L1::no_allocate.L2::128B",
        "L2::evict_first",
        "L2::cache_hint",
        "nc.L2::cache_hint",
        "L1::evict_last.L2::cache_hint",
        "weak",
    ];
    let global = &PLACES[0];
    for hint in hints {
        let policy = hint.contains("cache_hint");
        for (ty, size, n) in [
            ("u8", 1, 1),
            ("u16", 2, 1),
            ("b16", 2, 1),
            ("u32", 4, 1),
            ("f32", 4, 1),
            ("u32", 4, 2),
            ("u32", 4, 4),
            ("s32", 4, 4),
            ("f32", 4, 4),
            ("u64", 8, 2),
        ] {
            let name = format!("ld.global.{hint}{}.{ty}", vector(n));
            check_load(&name, global, ty, size, n, policy);
        }
    }
    let hints = [
        "wb",
        "cg",
        "cs",
        "wt",
        "L1::evict_first",
        "L1::no_allocate",
        "L2::cache_hint",
        "weak",
    ];
    for hint in hints {
        let policy = hint.contains("cache_hint");
        for (ty, size, n) in [
            ("b16", 2, 1),
            ("f32", 4, 1),
            ("u32", 4, 1),
            ("s32", 4, 4),
            ("f32", 4, 4),
            ("u64", 8, 2),
        ] {
            let name = format!("st.global.{hint}{}.{ty}", vector(n));
            check_store(&name, global, ty, size, n, policy);
        }
    }
    let orders = |acquire: &str| -> Vec<String> {
        let mut list = vec!["volatile".to_owned(), "mmio.relaxed.sys".to_owned()];
        for scope in ["cta", "cluster", "gpu", "sys"] {
            list.push(format!("relaxed.{scope}"));
            list.push(format!("{acquire}.{scope}"));
        }
        list
    };
    for place in &PLACES[..3] {
        for order in orders("acquire") {
            for (ty, size) in [
                ("u8", 1),
                ("u16", 2),
                ("b32", 4),
                ("u32", 4),
                ("f32", 4),
                ("b64", 8),
            ] {
                check_load(
                    &format!("ld.{order}{}.{ty}", place.space),
                    place,
                    ty,
                    size,
                    1,
                    false,
                );
            }
        }
        for order in orders("release") {
            for (ty, size) in [
                ("u8", 1),
                ("u16", 2),
                ("b32", 4),
                ("u32", 4),
                ("f32", 4),
                ("b64", 8),
            ] {
                check_store(
                    &format!("st.{order}{}.{ty}", place.space),
                    place,
                    ty,
                    size,
                    1,
                    false,
                );
            }
        }
    }
    check_load("ldu.global.f32", global, "f32", 4, 1, false);
    check_load("ldu.global.v4.u32", global, "u32", 4, 4, false);
}

fn every_narrow_value_is_extended() {
    for (ty, size) in &TYPES[..6] {
        let input: Vec<u8> = match size {
            1 => (0..1 << 16).map(|v| v as u8).collect(),
            _ => (0..1u32 << 16)
                .flat_map(|v| (v as u16).to_le_bytes())
                .collect(),
        };
        for (register, width) in registers(ty, *size) {
            let body = format!(
                "mul.wide.u32 %d1, %t, {size}; add.s64 %d1, %in, %d1;\n\
                 mul.wide.u32 %d2, %t, {width}; add.s64 %d2, %out, %d2;\n\
                 ld.global.{ty} {register}0, [%d1]; st.global.b{} [%d2], {register}0;",
                8 * width
            );
            let found = Program::new(&body, &input, width << 16)
                .threads(1 << 16)
                .run()
                .clean();
            let expected: Vec<u8> = input
                .chunks(*size)
                .flat_map(|v| extended(v, ty.starts_with('s'), width))
                .collect();
            assert!(found.out == expected, "ld.global.{ty} into {register}");
        }
    }
}

fn constants_are_loaded() {
    let bytes: Vec<u8> = noise(64 * 16);
    let text: Vec<String> = bytes.iter().map(ToString::to_string).collect();
    let module = format!(
        ".const .align 32 .b8 c[{}] = {{{}}};",
        bytes.len(),
        text.join(", ")
    );
    shapes(|ty, size, n| {
        for (register, width) in registers(ty, size) {
            let stores: String = (0..n)
                .map(|i| {
                    format!(
                        "st.global.b{} [%d52+{}], {register}{i};",
                        8 * width,
                        width * i
                    )
                })
                .collect();
            let body = format!(
                "mul.wide.u32 %d51, %t, {}; mov.u64 %d53, c; add.s64 %d51, %d51, %d53;\n\
                 mul.wide.u32 %d52, %t, {}; add.s64 %d52, %out, %d52;\n\
                 ld.const{}.{ty} {}, [%d51];\n{stores}",
                size * n,
                width * n,
                vector(n),
                list(register, n)
            );
            let found = Program {
                module: &module,
                ..Program::new(&body, &[0], 32 * width * n)
            }
            .run()
            .clean();
            let expected: Vec<u8> = bytes[..32 * size * n]
                .chunks(size)
                .flat_map(|v| extended(v, ty.starts_with('s'), width))
                .collect();
            assert!(
                found.out == expected,
                "ld.const of {n} {ty} into {register}"
            );
        }
    });
}

fn parameters_of_a_kernel_are_loaded() {
    // Sixty-four bytes behind the others, the same for all.
    let bytes = crate::bench::extra_parameters();
    shapes(|ty, size, n| {
        for (register, width) in registers(ty, size) {
            for at in [0, 32] {
                let stores: String = (0..n)
                    .map(|i| {
                        format!(
                            "st.global.b{} [%d52+{}], {register}{i};",
                            8 * width,
                            width * i
                        )
                    })
                    .collect();
                let body = format!(
                    "mul.wide.u32 %d52, %t, {}; add.s64 %d52, %out, %d52;\n\
                     ld.param{}.{ty} {}, [extra+{at}];\n{stores}",
                    width * n,
                    vector(n),
                    list(register, n)
                );
                let found = Program::new(&body, &[0], 32 * width * n).run().clean();
                let one: Vec<u8> = bytes[at..at + size * n]
                    .chunks(size)
                    .flat_map(|v| extended(v, ty.starts_with('s'), width))
                    .collect();
                assert!(found.out == one.repeat(32), "ld.param of {n} {ty} at {at}");
            }
        }
    });
    // Through the generic address, as a kernel that takes the address of a parameter does.
    let body = "mov.b64 %d1, extra; cvta.param.u64 %d2, %d1; ld.u32 %r1, [%d2+8];\n\
                mul.wide.u32 %d3, %t, 4; add.s64 %d3, %out, %d3; st.global.u32 [%d3], %r1;";
    let found = Program::new(body, &[0], 128).run().clean();
    assert_eq!(found.out, bytes[8..12].repeat(32));
}

fn parameters_of_functions_are_stored_and_loaded() {
    shapes(|ty, size, n| {
        // The caller stores with the type, the callee loads with it; registers as wide as that.
        let (register, width) = registers(ty, size)[0];
        let per = width * n;
        let (loads, stores): (String, String) = (0..n)
            .map(|i| {
                let at = width * i;
                (
                    format!("ld.global.b{} {register}{i}, [%d1+{at}];", 8 * width),
                    format!("st.global.b{} [%o+{at}], {register}{i};", 8 * width),
                )
            })
            .unzip();
        let module = format!(
            ".func f(.param .align 32 .b8 a[32], .param .b64 o)\n{{\n\
             .reg .b16 %h<8>; .reg .b32 %r<8>; .reg .b64 %d<8>; .reg .b64 %o;\n\
             ld.param.u64 %o, [o]; ld.param{}.{ty} {}, [a+{}];\n{stores} ret;\n}}\n",
            vector(n),
            list(register, n),
            16 % (size * n).max(1)
        );
        let body = format!(
            "mul.wide.u32 %d9, %t, {per}; add.s64 %d1, %in, %d9; add.s64 %d2, %out, %d9;\n{loads}\n\
             {{ .param .align 32 .b8 x[32]; .param .b64 y;\n\
             st.param{}.{ty} [x+{}], {}; st.param.b64 [y], %d2;\n\
             call.uni f, (x, y); }}",
            vector(n),
            16 % (size * n).max(1),
            list(register, n)
        );
        let input = noise(32 * per);
        let found = Program {
            module: &module,
            ..Program::new(&body, &input, 32 * per)
        }
        .run()
        .clean();
        let expected: Vec<u8> = input
            .chunks(width)
            .flat_map(|v| extended(&v[..size], ty.starts_with('s'), width))
            .collect();
        assert!(found.out == expected, "parameters of {n} {ty}");
    });
}

fn addresses_convert_and_tell_their_space() {
    // Of each kind of address: generic and back, and what isspacep says of it.
    let module = ".global .b32 g; .const .b32 c = 7;";
    let body = ".shared .b32 s; .local .b32 l;\n\
        mov.u64 %d1, g; cvta.global.u64 %d2, %d1; cvta.to.global.u64 %d3, %d2;\n\
        mov.u64 %d4, s; cvta.shared.u64 %d5, %d4; cvta.to.shared.u64 %d6, %d5;\n\
        mov.u64 %d7, l; cvta.local.u64 %d8, %d7; cvta.to.local.u64 %d9, %d8;\n\
        mov.u64 %d10, c; cvta.const.u64 %d11, %d10; cvta.to.const.u64 %d12, %d11;\n\
        mov.b64 %d13, extra; cvta.param.u64 %d14, %d13; cvta.to.param.u64 %d15, %d14;\n\
        setp.eq.s64 %p1, %d1, %d3; setp.eq.s64 %p2, %d4, %d6; setp.eq.s64 %p3, %d7, %d9;\n\
        setp.eq.s64 %p4, %d10, %d12; setp.eq.s64 %p5, %d13, %d15;\n\
        selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; selp.u32 %r3, 4, 0, %p3;\n\
        selp.u32 %r4, 8, 0, %p4; selp.u32 %r5, 16, 0, %p5;\n\
        or.b32 %r1, %r1, %r2; or.b32 %r1, %r1, %r3; or.b32 %r1, %r1, %r4; or.b32 %r1, %r1, %r5;\n\
        st.global.u32 [%out], %r1;\n";
    let mut text = body.to_owned();
    let spaces = ["global", "shared", "local", "const", "param"];
    for (row, register) in ["%d2", "%d5", "%d8", "%d11", "%d14"].iter().enumerate() {
        for (column, space) in spaces.iter().enumerate() {
            let at = 4 + row * 5 + column;
            text += &format!(
                "isspacep.{space} %p9, {register}; selp.u16 %h1, 1, 0, %p9; \
                 st.global.u8 [%out+{at}], %h1;\n"
            );
        }
    }
    text += "isspacep.shared::cta %p9, %d5; selp.u16 %h1, 1, 0, %p9; st.global.u8 [%out+29], %h1;";
    let program = Program {
        module,
        block: [1, 1, 1],
        ..Program::new(&text, &[0], 32)
    };
    let found = program.run().clean();
    assert_eq!(found.out[..4], [31, 0, 0, 0], "there and back");
    for (row, space) in spaces.iter().enumerate() {
        let expected: Vec<u8> = (0..5).map(|column| u8::from(row == column)).collect();
        assert_eq!(found.out[4 + 5 * row..][..5], expected, "{space}");
    }
    assert_eq!(found.out[29], 1);
}

fn misaligned_and_foreign_accesses_fault() {
    use vgpu::finding::{Fault, Kind};
    let run = |body: &str| Program::new(body, &[0; 64], 64).run();
    for (body, kind, fault) in [
        (
            "ld.global.u32 %r1, [%in+2];",
            Kind::Misaligned,
            Fault::MisalignedAddress,
        ),
        (
            "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%in+8];",
            Kind::Misaligned,
            Fault::MisalignedAddress,
        ),
        (
            "st.global.u64 [%out+4], %d1;",
            Kind::Misaligned,
            Fault::MisalignedAddress,
        ),
        (
            "ld.global.u32 %r1, [%in+64];",
            Kind::OutOfBounds,
            Fault::IllegalAddress,
        ),
        (
            "mov.u32 %r1, 0; st.global.u32 [%out+64], %r1;",
            Kind::OutOfBounds,
            Fault::IllegalAddress,
        ),
        (
            ".shared .b32 s; ld.shared.u32 %r1, [s+4];",
            Kind::OutOfBounds,
            Fault::IllegalAddress,
        ),
        (
            ".local .b32 l; ld.local.u32 %r1, [l+4];",
            Kind::OutOfBounds,
            Fault::IllegalAddress,
        ),
        (
            "atom.global.add.u32 %r1, [%out+2], 1;",
            Kind::Misaligned,
            Fault::MisalignedAddress,
        ),
    ] {
        let outcome = run(body);
        assert_eq!(outcome.result, Err(fault), "{body}");
        assert!(
            outcome.findings.iter().any(|f| f.kind == kind),
            "{body}: {:?}",
            outcome.findings
        );
    }
}

fn fences_and_hints_to_caches_run() {
    let mut body = String::new();
    for order in ["sc", "acq_rel", "acquire", "release"] {
        for scope in ["cta", "cluster", "gpu", "sys"] {
            body += &format!("fence.{order}.{scope};\n");
        }
    }
    body += "membar.cta; membar.gl; membar.sys; fence.proxy.alias;\n\
             prefetch.global.L1 [%in]; prefetch.global.L2 [%in]; prefetch.L1 [%in];\n\
             prefetch.local.L2 [%in]; prefetchu.L1 [%in];\n\
             prefetch.global.L2::evict_last [%in]; prefetch.global.L2::evict_normal [%in];\n\
             applypriority.global.L2::evict_normal [%in], 128; discard.global.L2 [%in], 128;\n\
             createpolicy.fractional.L2::evict_first.b64 %d1, 0f3F800000;\n\
             createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %d1, 0f3F000000;\n\
             ld.global.L2::cache_hint.u32 %r1, [%in], %d1;\n\
             mul.wide.u32 %d2, %t, 4; add.s64 %d2, %out, %d2; st.global.u32 [%d2], %r1;";
    let found = Program::new(&body, &[1, 2, 3, 4], 128).run().clean();
    assert_eq!(found.out, [1, 2, 3, 4].repeat(32));
}

tests![
    every_type_and_vector_is_loaded_from_every_space,
    every_type_and_vector_is_stored_to_every_space,
    accesses_of_thirty_two_bytes,
    hints_and_orders_change_no_value,
    every_narrow_value_is_extended,
    constants_are_loaded,
    parameters_of_a_kernel_are_loaded,
    parameters_of_functions_are_stored_and_loaded,
    addresses_convert_and_tell_their_space,
    misaligned_and_foreign_accesses_fault,
    fences_and_hints_to_caches_run,
];
