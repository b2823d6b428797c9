//! Damaged PTX and fatbins: an error or a module that runs, never a crash, a hang or a panic.
//!
//! What loads is launched too, with small grids and a small budget: an instruction that was
//! changed may be one that the parser takes and the interpreter should not.

use crate::cuda::Cuda;
use crate::here;
use crate::programs::compile;
use crate::random::{Random, cases, fuzz};

const VARIABLES: &[(&str, &str)] = &[
    ("VGPU_BUDGET", "20000"),
    ("VGPU_MEMORY", "67108864"),
    ("VGPU_ARCH", "120"),
];
const SECONDS: u64 = 15;

/// PTX text in pieces: what stands before the kernels, and the kernels.
struct Text {
    head: String,
    kernels: Vec<String>,
}

fn corpus() -> Vec<Text> {
    let mut texts = Vec::new();
    for (file, arch) in [
        ("kernels/clean.cu", "-arch=compute_80"),
        ("kernels/clean.cu", "-arch=compute_100"),
        ("kernels/mutants.cu", "-arch=compute_90"),
        ("driver/program.cu", "-arch=compute_80"),
    ] {
        let ptx = compile(file, "ptx", &[arch]);
        let ptx = String::from_utf8(ptx).expect("PTX is text");
        let mut text = Text {
            head: String::new(),
            kernels: Vec::new(),
        };
        let mut kernel = None::<String>;
        let mut depth = 0;
        for line in ptx.lines() {
            if kernel.is_none() && line.contains(".entry ") {
                kernel = Some(String::new());
            }
            let place = kernel.as_mut().unwrap_or(&mut text.head);
            *place += line;
            place.push('\n');
            let before = depth;
            depth += line.matches('{').count();
            depth -= line.matches('}').count();
            if depth == 0
                && before > 0
                && let Some(kernel) = kernel.take()
            {
                text.kernels.push(kernel);
            }
        }
        texts.push(text);
    }
    texts
}

/// Where words begin and end: names with their dots, numbers, single characters.
fn tokens(text: &[u8]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let start = at;
        let word = |b: u8| b.is_ascii_alphanumeric() || b"_$%.".contains(&b);
        if word(text[at]) {
            at += 1;
            while at < text.len() && word(text[at]) && text[at] != b'.' {
                at += 1;
            }
        } else {
            at += 1;
        }
        if !text[start].is_ascii_whitespace() {
            found.push((start, at));
        }
    }
    found
}

const NUMBERS: &[&str] = &[
    "0",
    "1",
    "-1",
    "31",
    "32",
    "33",
    "255",
    "4096",
    "65535",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "99999999999999999999999",
    "0xffffffffffffffff",
    "0f7FC00000",
    "0dFFF0000000000000",
    "1e999",
    "0.",
];

const WORDS: &[&str] = &[
    ".u8",
    ".s16",
    ".f16x2",
    ".bf16",
    ".b64",
    ".f64",
    ".b128",
    ".pred",
    ".v2",
    ".v4",
    ".v8",
    ".wide",
    ".sat",
    ".ftz",
    ".rn",
    ".shared",
    ".local",
    ".param",
    ".const",
    ".global",
    ".cta",
    ".sys",
    ".acquire",
    ".release",
    ".volatile",
    ".sync",
    ".aligned",
    ".uni",
    ".x",
    ".reg",
    ".entry",
    ".func",
    ".align",
    ".extern",
    ".weak",
    "%tid",
    "%laneid",
    "%clock64",
    "%r1",
    "%rd1",
    "%p1",
    "%f1",
    "_",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    ";",
    ",",
    "|",
    "@",
    "!",
    "-",
    "<",
    ">",
    "=",
    "/*",
    "*/",
    "\"",
    "bra",
    "call",
    "ret",
    "exit",
    "trap",
    "shfl",
    "bar",
    "mad",
    "cvt",
    "atom",
    "ld",
    "st",
    "mov",
    "setp",
    "selp",
];

/// Changes a text in one place.
fn change(random: &mut Random, text: &mut Vec<u8>, other: &[u8]) {
    let places = tokens(text);
    let lines: Vec<usize> = text
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'\n')
        .map(|(at, _)| at)
        .collect();
    if places.is_empty() || lines.len() < 2 {
        return;
    }
    let (start, end) = *random.of(&places);
    let line = random.below(lines.len() - 1);
    let (from, to) = (lines[line], lines[line + 1]);
    match random.below(14) {
        0 => text[start] = random.next() as u8,
        1 => text[start] ^= 1 << random.below(8),
        2 => drop(text.drain(start..end)),
        // A word for another of the same text: registers, labels, modifiers change places.
        3..=5 => {
            let (a, b) = *random.of(&places);
            let word = text[a..b].to_vec();
            drop(text.splice(start..end, word));
        }
        6 => drop(text.splice(start..end, random.of(WORDS).bytes())),
        7 | 8 => {
            let digits = |&&(a, _): &&(usize, usize)| text[a].is_ascii_digit();
            let numbers: Vec<_> = places.iter().filter(digits).collect();
            if let Some(&&(a, b)) = (!numbers.is_empty()).then(|| random.of(&numbers)) {
                drop(text.splice(a..b, random.of(NUMBERS).bytes()));
            }
        }
        9 => drop(text.drain(from..to)),
        10 => {
            let copy = text[from..to].to_vec();
            let at = *random.of(&lines);
            drop(text.splice(at..at, copy));
        }
        11 => {
            // A piece of another kernel.
            let a = random.below(other.len());
            let b = (a + random.below(200)).min(other.len());
            drop(text.splice(from..from, other[a..b].iter().copied()));
        }
        12 => text.truncate(start),
        _ => {
            let deep = random.of(&[
                "{",
                "(",
                "[",
                "@",
                "-",
                "!",
                "/*",
                ".reg .b32 %x<100000>;\n",
            ]);
            let many = deep.repeat(1 << random.below(17));
            drop(text.splice(from..from, many.bytes()));
        }
    }
}

/// Changes a text so that it may well load: a register for another of its kind, a number, a
/// modifier, an instruction left out or repeated.
fn nudge(random: &mut Random, text: &mut Vec<u8>) {
    let places = tokens(text);
    let kind = |&(a, b): &(usize, usize)| -> Vec<u8> {
        let word = &text[a..b];
        let end = word.iter().position(u8::is_ascii_digit);
        word[..end.unwrap_or(word.len())].to_vec()
    };
    let chosen = *random.of(&places);
    let (start, end) = chosen;
    let of_kind = kind(&chosen);
    let replacement = match text[start] {
        b'%' | b'$' => {
            let alike: Vec<_> = places.iter().filter(|p| kind(p) == of_kind).collect();
            let &&(a, b) = random.of(&alike);
            text[a..b].to_vec()
        }
        b'.' => {
            let dotted: Vec<_> = places.iter().filter(|p| text[p.0] == b'.').collect();
            let &&(a, b) = random.of(&dotted);
            text[a..b].to_vec()
        }
        byte if byte.is_ascii_digit() => random.of(NUMBERS).as_bytes().to_vec(),
        b';' => {
            // The instruction after this one goes, or comes twice.
            let next = places.iter().find(|p| p.0 > start && text[p.0] == b';');
            let Some(&(_, next)) = next else {
                return;
            };
            let instruction = text[end..next].to_vec();
            if random.one_in(2) {
                drop(text.drain(end..next));
            } else {
                drop(text.splice(end..end, instruction));
            }
            return;
        }
        _ => return,
    };
    drop(text.splice(start..end, replacement));
}

fn damaged_text(random: &mut Random, corpus: &[Text]) -> Vec<u8> {
    let text = random.of(corpus);
    let mut damaged = Vec::new();
    if !random.one_in(50) {
        damaged.extend(text.head.bytes());
    }
    let mut kernel = random.of(&text.kernels).clone().into_bytes();
    let other = random.of(corpus);
    let other = random.of(&other.kernels).as_bytes();
    // The kernel's part is what is changed most: headers fail early and teach little.
    if random.one_in(3) {
        for _ in 0..=random.below(3) {
            change(random, &mut kernel, other);
        }
    } else {
        for _ in 0..=random.below(8) {
            nudge(random, &mut kernel);
        }
    }
    damaged.extend(kernel);
    if random.one_in(10) {
        change(random, &mut damaged, other);
    }
    damaged
}

/// Device memory for kernels to work on.
struct Bench {
    at: u64,
    first: bool,
    /// Images that loaded, and launches.
    loaded: u64,
    launched: u64,
}

impl Drop for Bench {
    fn drop(&mut self) {
        println!("{} images loaded, {} launches", self.loaded, self.launched);
    }
}

impl Bench {
    fn new() -> Self {
        Self {
            at: 0,
            first: true,
            loaded: 0,
            launched: 0,
        }
    }

    fn prepare(&mut self, cuda: &Cuda) {
        if self.at != 0 {
            return;
        }
        if self.first {
            cuda.call("cuInit", &[0]);
            self.first = false;
        } else {
            cuda.call("cuDevicePrimaryCtxReset_v2", &[0]);
        }
        cuda.context(0);
        self.at = cuda.put(&[1; 4096]);
    }

    /// Loads an image and launches what is in it.
    fn run(&mut self, cuda: &Cuda, random: &mut Random, image: &[u8]) {
        self.prepare(cuda);
        let mut module = 0u64;
        let loaded = cuda.call(
            "cuModuleLoadData",
            &[&raw mut module as u64, image.as_ptr() as u64],
        );
        if loaded != 0 {
            return;
        }
        self.loaded += 1;
        let mut count = 0u32;
        cuda.call("cuModuleGetFunctionCount", &[&raw mut count as u64, module]);
        let mut functions = vec![0u64; count as usize];
        let place = functions.as_mut_ptr() as u64;
        cuda.call("cuModuleEnumerateFunctions", &[place, count.into(), module]);
        for _ in 0..functions.len().min(2) {
            self.prepare(cuda);
            let function = *random.of(&functions);
            // Eight bytes for each parameter: an address, or a small number.
            let params: Vec<[u64; 512]> = (0..64)
                .map(|_| {
                    let number = random.below(70) as u64;
                    [if random.one_in(3) { number } else { self.at }; 512]
                })
                .collect();
            let mut sizes = Vec::new();
            for n in 0..64u64 {
                let (mut offset, mut size) = (0u64, 0u64);
                let out = [function, n, &raw mut offset as u64, &raw mut size as u64];
                if cuda.call("cuFuncGetParamInfo", &out) != 0 {
                    break;
                }
                sizes.push(size);
            }
            // A parameter larger than what is given would be read beyond its end.
            if sizes.len() == 64 || sizes.iter().any(|&size| size > 4096) {
                continue;
            }
            let pointers: Vec<u64> = params.iter().map(|p| p.as_ptr() as u64).collect();
            let pointers = pointers.as_ptr() as u64;
            let blocks = 1 + random.below(3) as u64;
            let threads = *random.of(&[1, 31, 32, 64, 100]);
            let shared = *random.of(&[0, 0, 1024, 40_000]);
            let launch = [
                function, blocks, 1, 1, threads, 1, 1, shared, 0, pointers, 0,
            ];
            self.launched += u64::from(cuda.call("cuLaunchKernel", &launch) == 0);
            if cuda.call("cuStreamSynchronize", &[0]) != 0 {
                // The context is lost, and the module with it.
                self.at = 0;
                break;
            }
        }
        cuda.call("cuModuleUnload", &[module]);
        cuda.findings();
    }
}

#[test]
fn damaged_ptx_is_an_error_or_runs() {
    fuzz(here!(), VARIABLES, |cuda| {
        let corpus = corpus();
        let mut bench = Bench::new();
        cases(SECONDS, |seed| {
            let mut random = Random::new(seed);
            let mut text = damaged_text(&mut random, &corpus);
            text.push(0);
            bench.run(cuda, &mut random, &text);
        });
    });
}

#[test]
fn damaged_fatbins_are_an_error_or_run() {
    fuzz(here!(), VARIABLES, |cuda| {
        let mut fatbins = Vec::new();
        for options in [
            &["-arch=compute_80"][..],
            &["-arch=sm_90"],
            &["-arch=compute_80", "--no-compress"],
            &["-arch=compute_80", "--compress-mode=speed"],
        ] {
            fatbins.push(compile("driver/program.cu", "fatbin", options));
        }
        let mut bench = Bench::new();
        cases(SECONDS, |seed| {
            let mut random = Random::new(seed);
            let mut image = random.of(&fatbins).clone();
            for _ in 0..=random.below(3) {
                damage(&mut random, &mut image, &fatbins);
            }
            bench.run(cuda, &mut random, &image);
        });
    });
}

/// Changes bytes of a fatbin, most of all in its headers.
fn damage(random: &mut Random, image: &mut Vec<u8>, all: &[Vec<u8>]) {
    if image.len() < 128 {
        return;
    }
    let header = random.below(96);
    let anywhere = random.below(image.len());
    match random.below(8) {
        0 | 1 => image[header] = random.next() as u8,
        2 => image[anywhere] = random.next() as u8,
        3 => image[anywhere] ^= 1 << random.below(8),
        4 => {
            // A field of 4 or 8 bytes.
            let values = [
                0,
                1,
                15,
                16,
                63,
                64,
                65,
                1 << 20,
                u64::from(u32::MAX),
                1 << 31,
                u64::MAX,
                1 << 63,
            ];
            let value = random.of(&values).to_le_bytes();
            let n = *random.of(&[2, 4, 8]);
            let at = header / n * n;
            image[at..at + n].copy_from_slice(&value[..n]);
        }
        5 => image.truncate(anywhere),
        6 => {
            let other = random.of(all);
            let a = random.below(other.len());
            let b = (a + random.below(300)).min(other.len());
            drop(image.splice(anywhere..anywhere, other[a..b].iter().copied()));
        }
        _ => drop(image.drain(anywhere..(anywhere + random.below(64)).min(image.len()))),
    }
}
