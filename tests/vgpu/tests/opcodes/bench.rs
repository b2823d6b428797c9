//! A kernel around one instruction.

use std::cell::RefCell;
use std::collections::BTreeSet;

use vgpu::finding::{Fault, Finding};
use vgpu::machine::Config;
use vgpu::rig::Rig;

/// An instruction's name, its modifiers without their order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Form {
    pub(crate) opcode: String,
    modifiers: Vec<String>,
}

impl Form {
    pub(crate) fn of(name: &str) -> Self {
        let mut parts = name.split('.').map(str::to_owned);
        let opcode = parts.next().unwrap_or_default();
        let mut modifiers: Vec<String> = parts.collect();
        modifiers.sort();
        Self { opcode, modifiers }
    }
}

thread_local! {
    static RECORDING: RefCell<Option<BTreeSet<Form>>> = const { RefCell::new(None) };
}

/// The forms that these tests compare with a reference. [`check`] only notes what it would run
/// (it runs where the tests stand); tests that look at results themselves run in full.
pub(crate) fn recorded(tests: &[&[fn()]]) -> BTreeSet<Form> {
    RECORDING.with_borrow_mut(|r| *r = Some(BTreeSet::new()));
    tests.iter().copied().flatten().for_each(|test| test());
    RECORDING.with_borrow_mut(Option::take).unwrap_or_default()
}

/// Notes the instructions of some PTX text; whether anybody is interested.
pub(crate) fn note(text: &str) -> bool {
    RECORDING.with_borrow_mut(|recording| {
        let Some(forms) = recording else { return false };
        for statement in text.split([';', '{', '}', '\n']) {
            // Labels and guards stand before it.
            let name = statement
                .split_whitespace()
                .find(|word| !word.starts_with('@') && !word.ends_with(':'))
                .unwrap_or_default();
            if name.starts_with(|c: char| c.is_ascii_lowercase()) {
                forms.insert(Form::of(name));
            }
        }
        true
    })
}

/// A type of a register: its PTX name, and its size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ty(pub(crate) &'static str, pub(crate) usize);

pub(crate) const B16: Ty = Ty("b16", 2);
pub(crate) const B32: Ty = Ty("b32", 4);
pub(crate) const B64: Ty = Ty("b64", 8);
pub(crate) const PRED: Ty = Ty("pred", 0);

/// Keeps the bits of a size.
pub(crate) fn low(bits: u64, bytes: usize) -> u64 {
    match bytes {
        0 => bits & 1,
        8 => bits,
        n => bits & ((1 << (8 * n)) - 1),
    }
}

/// The value of the low bits as an unsigned or signed integer.
pub(crate) fn int(bits: u64, bytes: usize, signed: bool) -> i128 {
    let shift = 128 - 8 * bytes as u32;
    let wide = (bits as u128) << shift;
    if signed {
        (wide as i128) >> shift
    } else {
        (wide >> shift) as i128
    }
}

/// splitmix64
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Operands that are worth a test of their own: limits of integers and of every floating-point
/// format, one step around them, shift amounts.
pub(crate) fn edges(bytes: usize) -> Vec<u64> {
    let mut list: Vec<u64> = vec![0, 1, 2, 3, 15, 16, 31, 32, 33, 63, 64, 65, 255];
    let bits = 8 * bytes as u32;
    let top = 1u64 << (bits - 1);
    list.extend([
        top - 1,
        top,
        top + 1,
        top | (top - 1),
        low(u64::MAX - 1, bytes),
    ]);
    let formats: &[(u32, u32)] = match bytes {
        2 => &[(5, 10), (8, 7)],
        4 => &[(8, 23)],
        _ => &[(11, 52)],
    };
    for &(exponent, mantissa) in formats {
        let infinity = ((1u64 << exponent) - 1) << mantissa;
        let one = ((1u64 << (exponent - 1)) - 1) << mantissa;
        for value in [
            infinity,
            infinity - 1,
            infinity + 1,
            infinity | (1 << (mantissa - 1)),
            one,
            one - 1,
            one + 1,
            1 << mantissa,
            (1 << mantissa) - 1,
            one + (1 << mantissa) + (1 << (mantissa - 1)),
        ] {
            list.extend([value, value | top]);
        }
    }
    list.sort_unstable();
    list.dedup();
    list
}

/// Tuples of operands for types of these sizes: all combinations of edges as far as that is
/// possible, then random ones, a third of them close to each other or of small magnitude.
pub(crate) fn operands(sizes: &[usize], random: usize) -> Vec<Vec<u64>> {
    let edge_lists: Vec<Vec<u64>> = sizes.iter().map(|&s| edges(s.max(2))).collect();
    let mut list: Vec<Vec<u64>> = Vec::new();
    if sizes == [2] {
        return (0..1 << 16).map(|v| vec![v]).collect();
    }
    if sizes == [2, 2] {
        // Every value on either side, against a few of each kind on the other.
        for other in [0x3c01, 0x83ff] {
            list.extend((0..1 << 16).map(|v| vec![v, other]));
            list.extend((0..1 << 16).map(|v| vec![other, v]));
        }
    }
    let combinations: usize = edge_lists.iter().map(Vec::len).product();
    let stride = (combinations / 4096).max(1) | 1;
    for number in (0..combinations).step_by(stride) {
        let mut rest = number;
        list.push(
            edge_lists
                .iter()
                .map(|e| {
                    let value = e[rest % e.len()];
                    rest /= e.len();
                    value
                })
                .collect(),
        );
    }
    let mut r = Random(0x5eed ^ sizes.len() as u64);
    for n in 0..random {
        let mut previous = 0;
        list.push(
            sizes
                .iter()
                .map(|&size| {
                    let value = match n % 3 {
                        0 => r.next(),
                        1 => r.next() >> (r.next() % 64),
                        _ => (previous ^ (r.next() & 0xff)).wrapping_add(r.next() & 3),
                    };
                    previous = if n % 3 == 2 && previous == 0 {
                        r.next()
                    } else {
                        value
                    };
                    low(value, size)
                })
                .collect(),
        );
    }
    list
}

/// Runs `body` (which reads `%a`, `%b`, `%c` and writes `%d`) for each tuple of operands.
pub(crate) fn run(body: &str, d: Ty, sources: &[Ty], tuples: &[Vec<u64>]) -> Vec<u64> {
    run_on(Config::default(), body, d, sources, tuples)
}

/// As [`run`], on a machine of one's own.
pub(crate) fn run_on(
    config: Config,
    body: &str,
    d: Ty,
    sources: &[Ty],
    tuples: &[Vec<u64>],
) -> Vec<u64> {
    note(body);
    let names = ["%a", "%b", "%c", "%e", "%f"];
    let mut text = String::from(
        ".version 8.7\n.target sm_90\n.address_size 64\n\
         .visible .entry k(.param .u64 out, .param .u64 in, .param .u32 n)\n{\n\
         .reg .b64 %po, %pi, %off;\n.reg .b32 %i, %t, %n;\n.reg .pred %skip;\n",
    );
    let reg = |ty: Ty, name: &str| format!(".reg .{} {name};\n", ty.0);
    text += &reg(d, "%d");
    for (ty, name) in sources.iter().zip(names) {
        text += &reg(*ty, name);
    }
    text += "ld.param.u64 %po, [out]; ld.param.u64 %pi, [in]; ld.param.u32 %n, [n];\n\
             mov.u32 %i, %ctaid.x; mov.u32 %t, %ntid.x; mul.lo.u32 %i, %i, %t;\n\
             mov.u32 %t, %tid.x; add.u32 %i, %i, %t;\n\
             setp.ge.u32 %skip, %i, %n; @%skip ret;\n";
    let stride = 8 * sources.len();
    text += &format!("mul.wide.u32 %off, %i, {stride}; add.u64 %pi, %pi, %off;\n");
    text += "mul.wide.u32 %off, %i, 8; add.u64 %po, %po, %off;\n";
    for (n, (ty, name)) in sources.iter().zip(names).enumerate() {
        if *ty == PRED {
            text += &format!(
                "{{ .reg .b32 %v; ld.global.b32 %v, [%pi+{}]; and.b32 %v, %v, 1;\n\
                 setp.ne.b32 {name}, %v, 0; }}\n",
                8 * n
            );
        } else {
            text += &format!("ld.global.{} {name}, [%pi+{}];\n", ty.0, 8 * n);
        }
    }
    text += body;
    text += "\n";
    text += &match d {
        PRED => "{ .reg .b32 %v; selp.b32 %v, 1, 0, %d; st.global.b32 [%po], %v; }\n".to_owned(),
        ty => format!("st.global.{} [%po], %d;\n", ty.0),
    };
    text += "ret;\n}\n";
    let module = vgpu::ptx::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut rig = Rig::new(config);
    let loaded = rig.load(&module).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let n = tuples.len();
    let flat: Vec<u64> = tuples.iter().flatten().copied().collect();
    let input = rig.upload(bytemuck::cast_slice(&flat));
    let output = rig.upload(&vec![0; 8 * n]);
    let mut params = Vec::new();
    params.extend(output.to_le_bytes());
    params.extend(input.to_le_bytes());
    params.extend((n as u32).to_le_bytes());
    let grid = [n.div_ceil(128) as u32, 1, 1];
    rig.launch(&loaded.kernels["k"], grid, [128, 1, 1], 0, &params);
    rig.synchronise().expect("the kernel runs");
    let out = rig.download(output, 8 * n);
    let findings: Vec<String> = rig
        .findings()
        .iter()
        .filter(|f| !f.message.contains("nobody wrote"))
        .map(ToString::to_string)
        .collect();
    assert!(findings.is_empty(), "{findings:?}");
    bytemuck::pod_collect_to_vec::<u8, u64>(&out)
}

/// Compares an instruction with a reference; None of the reference means "unspecified".
pub(crate) fn check(
    instruction: &str,
    d: Ty,
    sources: &[Ty],
    reference: impl Fn(&[u64]) -> Option<u64>,
) {
    let sizes: Vec<usize> = sources.iter().map(|s| s.1).collect();
    if sizes == [2, 2] && std::env::var_os("VGPU_EXHAUSTIVE").is_some() {
        // All 2^32 pairs: some minutes for each instruction.
        for a in 0..1 << 16 {
            let tuples: Vec<Vec<u64>> = (0..1 << 16).map(|b| vec![a, b]).collect();
            check_on_all(instruction, d, sources, &tuples, &reference);
        }
    }
    check_on(instruction, d, sources, &operands(&sizes, 3000), reference);
}

/// As [`check`], on given operands.
pub(crate) fn check_on(
    instruction: &str,
    d: Ty,
    sources: &[Ty],
    tuples: &[Vec<u64>],
    reference: impl Fn(&[u64]) -> Option<u64>,
) {
    if note(instruction) {
        return;
    }
    let compared = check_on_all(instruction, d, sources, tuples, &reference);
    assert!(compared > 0, "{instruction}: nothing was compared");
}

fn check_on_all(
    instruction: &str,
    d: Ty,
    sources: &[Ty],
    tuples: &[Vec<u64>],
    reference: &impl Fn(&[u64]) -> Option<u64>,
) -> usize {
    let out = run(instruction, d, sources, tuples);
    let mut compared = 0;
    for (tuple, &found) in tuples.iter().zip(&out) {
        if let Some(expected) = reference(tuple) {
            let expected = low(expected, d.1);
            assert_eq!(
                found, expected,
                "{instruction} of {tuple:x?}: found {found:#x}, expected {expected:#x}"
            );
            compared += 1;
        }
    }
    compared
}

/// `op d, a, b` with as many sources as there are.
pub(crate) fn plain(opcode: &str, n: usize) -> String {
    let list = ["%d", "%a", "%b", "%c", "%e", "%f"];
    format!("{opcode} {};", list[..=n].join(", "))
}

/// What a kernel came to.
pub(crate) struct Outcome {
    pub(crate) out: Vec<u8>,
    pub(crate) result: Result<(), Fault>,
    pub(crate) findings: Vec<Finding>,
    pub(crate) printed: String,
}

impl Outcome {
    /// The output as values.
    pub(crate) fn values<T: bytemuck::Pod>(&self) -> Vec<T> {
        bytemuck::pod_collect_to_vec(&self.out)
    }

    /// It ran, and the checks found nothing.
    pub(crate) fn clean(self) -> Self {
        let words: Vec<String> = self.findings.iter().map(ToString::to_string).collect();
        assert!(words.is_empty(), "{words:#?}");
        self.result.expect("the kernel runs");
        self
    }
}

/// A kernel of one's own, and the block or grid that runs it.
///
/// The body finds `%out` and `%in`, the addresses of the output and the input, `%t`, the number
/// of its thread in the grid, and registers to use: `%h` of 16 bits, `%r` of 32, `%d` of 64,
/// `%p` predicates, sixty-four of each.
pub(crate) struct Program<'a> {
    /// What stands before the kernel.
    pub(crate) module: &'a str,
    pub(crate) body: &'a str,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) dynamic_shared: u32,
    pub(crate) input: &'a [u8],
    /// Bytes of the output, zero at first.
    pub(crate) output: usize,
    pub(crate) config: Config,
}

impl<'a> Program<'a> {
    /// One warp.
    pub(crate) fn new(body: &'a str, input: &'a [u8], output: usize) -> Self {
        Self {
            module: "",
            body,
            grid: [1, 1, 1],
            block: [32, 1, 1],
            dynamic_shared: 0,
            input,
            output,
            config: Config::default(),
        }
    }

    pub(crate) fn threads(self, threads: u32) -> Self {
        Self {
            block: [threads.min(256), 1, 1],
            grid: [threads.div_ceil(256), 1, 1],
            ..self
        }
    }

    pub(crate) fn text(&self) -> String {
        format!(
            ".version 8.7\n.target sm_90\n.address_size 64\n{}\n\
             .visible .entry k(.param .u64 out, .param .u64 in, .param .u32 five,\n\
             .param .align 32 .b8 extra[64])\n{{\n\
             .reg .b64 %out, %in; .reg .b32 %t, %block; .reg .pred %p<64>;\n\
             .reg .b16 %h<64>; .reg .b32 %r<64>; .reg .b64 %d<64>;\n\
             ld.param.u64 %out, [out]; ld.param.u64 %in, [in];\n\
             mov.u32 %t, %ctaid.x; mov.u32 %block, %ntid.x; mul.lo.u32 %t, %t, %block;\n\
             mov.u32 %block, %tid.x; add.u32 %t, %t, %block;\n{}\nret;\n}}\n",
            self.module, self.body
        )
    }

    pub(crate) fn run(self) -> Outcome {
        note(self.body);
        note(self.module);
        let text = self.text();
        let module = vgpu::ptx::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let mut rig = Rig::new(self.config);
        let loaded = rig.load(&module).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let input = rig.upload(self.input);
        let output = rig.upload(&vec![0; self.output]);
        let mut params = Vec::new();
        params.extend(output.to_le_bytes());
        params.extend(input.to_le_bytes());
        params.extend(5u32.to_le_bytes());
        params.resize(32, 0);
        params.extend(extra_parameters());
        let kernel = &loaded.kernels["k"];
        rig.launch(kernel, self.grid, self.block, self.dynamic_shared, &params);
        let result = rig.synchronise();
        let out = rig.download(output, self.output);
        let printed = String::from_utf8_lossy(&rig.machine.world.output).into_owned();
        Outcome {
            out,
            result,
            findings: rig.findings(),
            printed,
        }
    }
}

/// Bytes without a pattern.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut r = Random(0xb17e5);
    (0..bytes).map(|_| r.next() as u8).collect()
}

/// The bytes of the parameter `extra`.
pub(crate) fn extra_parameters() -> Vec<u8> {
    noise(64).into_iter().map(|b| b ^ 0x5a).collect()
}
