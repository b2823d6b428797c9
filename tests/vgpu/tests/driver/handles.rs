//! Calls in any order with any handles and numbers: an error code, never a crash or a hang.
//!
//! What a caller of a C function must vouch for stays true: pointers are null or point to enough
//! room, counts of arrays are not more than there is, memory of the host that was freed is not
//! passed again. Everything else is random.

use std::ffi::CString;

use crate::cuda::{Cuda, KERNELS, call};
use crate::here;
use crate::random::{Random, cases, fuzz};
use crate::symbols::all;

const SECONDS: u64 = 15;
/// Bytes of each piece of memory handed out as a pointer.
const ROOM: usize = 1 << 16;
/// Pieces of it.
const PIECES: usize = 8;

extern "C" fn callback(_: u64, _: u64, _: u64) -> u64 {
    0
}

struct Caller<'a> {
    cuda: &'a Cuda,
    random: Random,
    /// Pieces of memory that calls read and write.
    room: &'a mut [Vec<u64>],
    /// An array of pointers to them, some of them null, that calls only read.
    pointers: &'a mut [u64],
    /// What calls gave back, newest last.
    handles: Vec<u64>,
    contexts: Vec<u64>,
    /// Memory of the host that the driver made or knows.
    host: Vec<u64>,
    image: CString,
    /// Whether to say what is called, for a case that is run alone.
    trace: bool,
}

const NAMES: [&[u8]; 6] = [
    b"add\0",
    b"copy\0",
    b"spin\0",
    b"counter\0",
    b"cuMemAlloc\0",
    b"\xff\xfe\0",
];

impl Caller<'_> {
    /// Fills the array of pointers anew.
    fn refresh(&mut self) {
        for n in 0..self.pointers.len() {
            self.pointers[n] = if self.random.one_in(20) {
                0
            } else {
                self.piece()
            };
        }
    }

    fn piece(&mut self) -> u64 {
        let n = self.random.below(PIECES);
        self.room[n].as_ptr() as u64
    }

    fn handle(&mut self) -> u64 {
        match self.random.below(12) {
            0 => self.random.below(4) as u64,
            1 => self.random.next(),
            2 => (1 + self.random.below(12) as u64) << 40 | (self.random.below(100) as u64) << 4,
            _ if self.handles.is_empty() => 0,
            3..=6 => {
                let recent = self.handles.len().min(12);
                self.handles[self.handles.len() - 1 - self.random.below(recent)]
            }
            _ => *self.random.of(&self.handles),
        }
    }

    fn number(&mut self) -> u64 {
        match self.random.below(8) {
            0 => self.random.next(),
            1 => *self
                .random
                .of(&[u64::MAX, 1 << 63, 1 << 32, u64::from(u32::MAX), 1 << 31]),
            2 => 1 << self.random.below(40),
            3 => 4096,
            _ => self.random.below(20) as u64,
        }
    }

    /// A number of bytes or elements that there is room for.
    fn little(&mut self) -> u64 {
        *self.random.of(&[0, 1, 2, 4, 7, 16, 100, 256, 4096])
    }

    /// An address in device memory, of a piece, or of nothing that is ever followed.
    fn address(&mut self, followed: bool) -> u64 {
        match self.random.below(6) {
            0 => 0,
            1 if !followed => self.random.next(),
            2 if !self.host.is_empty() => *self.random.of(&self.host),
            3 | 4 => {
                let device = |h: &&u64| **h >> 44 == 1;
                let known: Vec<u64> = self.handles.iter().filter(device).copied().collect();
                match known.is_empty() {
                    true => self.piece(),
                    false => *self.random.of(&known) + self.random.below(2) as u64 * 4,
                }
            }
            _ => self.piece(),
        }
    }

    /// Writes a structure into a piece, word by word; its address.
    fn structure(&mut self, words: &[u64]) -> u64 {
        let n = self.random.below(PIECES);
        self.room[n][..words.len()].copy_from_slice(words);
        self.room[n].as_ptr() as u64
    }

    /// One side of a copy: offsets, kind, addresses, pitch, height.
    fn side(&mut self, dimensions: usize) -> Vec<u64> {
        let mut words: Vec<u64> = (0..dimensions)
            .map(|_| self.random.below(3) as u64)
            .collect();
        if dimensions == 3 {
            words.push(self.random.below(20) as u64 / 19);
        }
        words.push(*self.random.of(&[1, 2, 2, 2, 3, 4, 9]));
        // Offsets are added: only a piece has room for them on the host.
        let host = std::mem::take(&mut self.host);
        words.extend([self.piece(), self.address(true), self.handle()]);
        self.host = host;
        if dimensions == 3 {
            words.push(self.handle());
        }
        words.push(*self.random.of(&[0, 4, 16, 64, 512]));
        if dimensions == 3 {
            words.push(self.random.below(5) as u64);
        }
        words
    }

    fn copy(&mut self, dimensions: usize) -> u64 {
        let mut words = self.side(dimensions);
        words.extend(self.side(dimensions));
        words.extend((0..dimensions).map(|_| self.random.below(6) as u64));
        self.structure(&words)
    }

    fn kernel(&mut self) -> Vec<u64> {
        let (function, block) = (self.handle(), self.random.below(70) as u64);
        // grid 1 × 1 × 1, block n × 1 × 1, no shared memory
        let params = self.pointers.as_ptr() as u64;
        vec![
            function,
            1 | 1 << 32,
            1 | block << 32,
            1 | 1 << 32,
            0,
            params,
            0,
        ]
    }

    fn pointer(&mut self, kind: &str) -> u64 {
        if self.random.one_in(12) {
            return 0;
        }
        match kind {
            "Copy2d" => self.copy(2),
            "Copy3d" => self.copy(3),
            "KernelParamsV1" => {
                let words = self.kernel();
                self.structure(&words)
            }
            "KernelParams" => {
                let mut words = self.kernel();
                words.extend([self.handle(), *self.random.of(&[0, 0, 1]) * self.handle()]);
                self.structure(&words)
            }
            "LaunchConfig" => {
                let attributes = self.piece();
                // A few of them are known, most are not.
                let (stream, block) = (self.handle(), self.random.below(70) as u64);
                let count = self.random.below(3) as u64;
                self.structure(&[
                    1 | 1 << 32,
                    1 | block << 32,
                    1 | 1 << 32,
                    0,
                    stream,
                    attributes,
                    count,
                ])
            }
            "MemsetParams" => {
                let (at, pitch) = (self.address(false), self.number());
                let unit = *self.random.of(&[1u64, 2, 4, 4, 8]);
                let (width, height) = (self.number(), self.number());
                self.structure(&[at, pitch, 7 | unit << 32, width, height])
            }
            "HostParams" => {
                let function = self.random.below(4) as u64;
                let function = if function == 0 {
                    0
                } else {
                    callback as *const () as u64
                };
                self.structure(&[function, 0])
            }
            "PoolProps" => {
                let (kind, place) = (self.random.below(5) as u64 / 4, self.random.below(3) as u64);
                let most = self.number();
                self.structure(&[1 + kind, 1 | place << 32, 0, most])
            }
            "Access" => {
                let (device, flags) = (self.random.below(3) as u64, self.random.below(4) as u64);
                self.structure(&[
                    1 | device << 32,
                    flags | 1 << 32,
                    device | flags << 32,
                    1,
                    0,
                ])
            }
            "Handle" => {
                let words: Vec<u64> = (0..16).map(|_| self.handle()).collect();
                self.structure(&words)
            }
            "u64" => self.pointers.as_ptr() as u64,
            _ => self.piece(),
        }
    }

    fn argument(&mut self, function: &str, name: &str, kind: &str) -> u64 {
        let copies = function.starts_with("cuMemcpy") || function.starts_with("cuMemHostRegister");
        if let Some(inner) = kind
            .strip_prefix("Out<")
            .or_else(|| kind.strip_prefix("In<"))
        {
            let inner = inner.trim_end_matches('>');
            return match (name, inner) {
                ("image", _) => match self.random.below(3) {
                    0 => self.image.as_ptr() as u64,
                    1 => self.random.next(),
                    _ => self.piece(),
                },
                ("name" | "path", "u8") if kind.starts_with("In") => {
                    self.random.of(&NAMES).as_ptr() as u64
                }
                ("count", "u64") => {
                    // How much room there is, for those that fill an array.
                    let count = self.little();
                    self.structure(&[count])
                }
                _ if kind.starts_with("Out") => match self.random.below(12) {
                    0 => 0,
                    _ => self.piece(),
                },
                _ => self.pointer(inner),
            };
        }
        match (name, kind) {
            _ if kind.starts_with("Option<") => match self.random.below(3) {
                0 => 0,
                _ => callback as *const () as u64,
            },
            ("n" | "count" | "size", _) if !function.starts_with("cuMemset") => {
                self.little().min(16)
            }
            ("capacity", _) => self.little(),
            ("bytes", _) if copies => self.little(),
            ("at", "u64") if function.starts_with("cuMemHostRegister") => self.piece(),
            ("to" | "from" | "host" | "at", "u64") => self.address(copies),
            ("data", "u64") => match self.random.below(8) {
                0 => 0,
                _ => self.piece(),
            },
            // What is behind these is not looked at.
            ("params" | "options" | "values", "u64") => 0,
            ("device" | "peer" | "ordinal", "i32") => self.random.below(4) as u64,
            (_, "Handle") => self.handle(),
            ("gx" | "gy" | "gz", _) => match self.random.below(20) {
                0 => self.number(),
                n => n as u64 / 18 + 1,
            },
            ("flags" | "mode", _) => match self.random.below(6) {
                0 => self.number(),
                n => n as u64 - 1,
            },
            _ => self.number(),
        }
    }

    /// A call; what it puts where a handle may be is kept.
    fn step(&mut self, functions: &[(String, Vec<(String, String)>)]) {
        let (name, arguments) = self.random.of(functions);
        let args: Vec<u64> = arguments
            .iter()
            .map(|(argument, kind)| self.argument(name, argument, kind))
            .collect();
        let at = self.cuda.address(name).expect("a function of the table");
        if self.trace {
            eprintln!("{name} {args:x?}");
        }
        if call(at, &args) != 0 {
            return;
        }
        for ((_, kind), &at) in arguments.iter().zip(&args) {
            if matches!(kind.as_str(), "Out<Handle>" | "Out<u64>") && at != 0 {
                // SAFETY: a piece of memory, which the call has written to.
                let value = unsafe { (at as *const u64).read() };
                if value != 0 {
                    self.handles.push(value);
                }
                if name.starts_with("cuCtxCreate") {
                    self.contexts.push(value);
                }
                if name.starts_with("cuMemAllocHost")
                    || name.starts_with("cuMemHostAlloc")
                    || name == "cuMemAllocManaged"
                {
                    self.host.push(value);
                }
            }
        }
        // Freed, in one way or another.
        if name.starts_with("cuMemFree")
            || name.contains("CtxDestroy")
            || name.starts_with("cuDevicePrimaryCtxRe")
        {
            let gone = std::mem::take(&mut self.host);
            self.handles.retain(|h| !gone.contains(h));
        }
        if self.handles.len() > 200 {
            self.handles.drain(..100);
        }
    }
}

#[test]
fn no_sequence_of_calls_ends_the_process() {
    let variables = [
        ("VGPU_DEVICES", "2"),
        ("VGPU_BUDGET", "5000"),
        ("VGPU_MEMORY", "16777216"),
    ];
    fuzz(here!(), &variables, |cuda| {
        let mut functions = all(cuda);
        functions.retain(|(name, _)| !name.starts_with("vgpu"));
        // Those without arguments that are refused have nothing to go wrong.
        functions.retain(|(name, arguments)| {
            !arguments.is_empty() || name.contains("Ctx") || name.starts_with("cuProfiler")
        });
        cuda.call("cuInit", &[0]);
        // They stay: graphs of one case may be launched in another.
        let mut room = vec![vec![0; ROOM / 8]; PIECES];
        let mut pointers = vec![0; 1024];
        cases(SECONDS, |seed| {
            let mut caller = Caller {
                cuda,
                random: Random::new(seed),
                room: &mut room,
                pointers: &mut pointers,
                handles: Vec::new(),
                contexts: Vec::new(),
                host: Vec::new(),
                image: CString::new(KERNELS).expect("a text"),
                trace: std::env::var_os("VGPU_FUZZ_FROM").is_some(),
            };
            caller.refresh();
            for device in 0..2u64 {
                cuda.call("cuDevicePrimaryCtxReset_v2", &[device]);
            }
            let context = cuda.context(0);
            caller.handles.push(context);
            let module = cuda.module(KERNELS);
            caller.handles.extend([
                module,
                cuda.function(module, "add"),
                cuda.stream(),
                cuda.put(&[1; 1024]),
            ]);
            for step in 0..300 {
                if step % 20 == 19 {
                    caller.refresh();
                }
                caller.step(&functions);
            }
            // The next case begins with nothing under way.
            for &context in &caller.contexts {
                cuda.call("cuCtxDestroy_v2", &[context]);
            }
            for device in 0..2u64 {
                cuda.call("cuDevicePrimaryCtxReset_v2", &[device]);
            }
            cuda.findings();
        });
    });
}
