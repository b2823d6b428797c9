//! The CUDA driver API. Handles are numbers in disguise, looked up and never followed, so that a
//! bad one is an error code. One lock guards the driver; whoever waits for a device drives it
//! (`actors`).

mod actors;
mod capture;
mod context;
mod copy;
mod device;
mod entry;
mod exec;
mod graph;
mod image;
mod launch;
mod library;
mod memory;
mod module;
mod node;
mod operation;
mod peer;
mod pool;
mod programs;
mod refused;
mod report;
mod rest;
mod status;
mod stream;
mod window;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use actors::wait_for;
use status::{Out, Outcome, Status};

use crate::finding::Kind;
use crate::loader::Loaded;
use crate::machine::{Approximation, Command, Config, EventId, Machine, StreamId};
use crate::memory::MAX_DEVICES;
use crate::program::Kernel;
use crate::race::Stale;

/// A handle of the API: a pointer in C.
pub(crate) type Handle = u64;

/// Exit status of a process that leaves findings unread.
const EXIT: i32 = 86;

const CONTEXT: u64 = 1 << 40;
const MODULE: u64 = 2 << 40;
const FUNCTION: u64 = 3 << 40;
const STREAM: u64 = 4 << 40;
const EVENT: u64 = 5 << 40;
const GRAPH: u64 = 6 << 40;
const NODE: u64 = 7 << 40;
const EXEC: u64 = 8 << 40;
const LIBRARY: u64 = 9 << 40;
const KERNEL: u64 = 10 << 40;
const POOL: u64 = 11 << 40;

struct Context {
    device: u32,
    primary: bool,
    flags: u32,
    /// The legacy default stream, and that of each thread (one for all of them here).
    default: StreamId,
    per_thread: StreamId,
    limits: BTreeMap<u32, u64>,
}

struct Module {
    context: Handle,
    loaded: Loaded,
    functions: BTreeMap<String, Handle>,
}

struct Function {
    module: Handle,
    kernel: Arc<Kernel>,
    /// What `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES` was set to.
    max_dynamic_shared: Option<u32>,
    /// Its code is on the device.
    loaded: bool,
}

struct Stream {
    context: Handle,
    id: StreamId,
    /// Does not wait for the legacy default stream, nor it for this.
    non_blocking: bool,
    flags: u32,
    priority: i32,
}

struct Event {
    context: Handle,
    id: EventId,
    timing: bool,
}

/// What an allocation is, besides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Device,
    Managed,
    /// Device memory from a pool.
    Pool(Handle),
    /// Made by the driver; freed by it.
    Host,
    /// The caller's own.
    Registered,
}

struct Driver {
    machine: Machine,
    initialised: bool,
    /// Whether the settings in the environment make sense.
    understood: bool,
    contexts: BTreeMap<Handle, Context>,
    /// The primary context of each device, and how often it is held.
    primaries: Vec<(Option<Handle>, u32, u32)>,
    /// Peer access, from context to context.
    peers: BTreeSet<(Handle, Handle)>,
    modules: BTreeMap<Handle, Module>,
    functions: BTreeMap<Handle, Function>,
    streams: BTreeMap<Handle, Stream>,
    events: BTreeMap<Handle, Event>,
    graphs: graph::Graphs,
    captures: capture::Captures,
    libraries: library::Libraries,
    programs: programs::Programs,
    pools: pool::Pools,
    /// Names that programs hold pointers to.
    names: BTreeMap<String, Box<[u8]>>,
    allocations: BTreeMap<u64, (Handle, Kept, u64)>,
    pinned: window::Pinned,
    /// Handles given out, by device, and how often everything began anew: what was given out
    /// before that means nothing any more.
    next: Vec<u64>,
    generation: u64,
    /// The program's threads.
    actors: actors::Actors,
    printed: usize,
}

static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(|| Mutex::new(Driver::new()));

thread_local! {
    static CURRENT: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = text.trim().parse().ok();
    if parsed.is_none() {
        eprintln!("vgpu: {name}={text} is no number; ignored");
    }
    parsed
}

/// What the environment asks for, and whether it could be understood: a run on other devices than
/// those that were meant would prove nothing.
fn configuration() -> (Config, bool) {
    let mut understood = true;
    let mut config = Config::default();
    if let Some(devices) = number("VGPU_DEVICES") {
        config.devices = devices.min(MAX_DEVICES.into()) as u32;
    }
    if let Some(arch) = number("VGPU_ARCH") {
        config.arch = arch.clamp(70, 200) as u32;
    }
    config.seed = number("VGPU_SEED").unwrap_or(0);
    if let Some(budget) = number("VGPU_BUDGET") {
        config.launch_budget = budget;
    }
    if let Ok(text) = std::env::var("VGPU_SCHEDULE") {
        match text.parse() {
            Ok(schedule) => config.schedule = schedule,
            Err(error) => {
                eprintln!("vgpu: VGPU_SCHEDULE: {error}");
                understood = false;
            }
        }
    }
    if let Ok(text) = std::env::var("VGPU_TOPOLOGY") {
        match text.parse() {
            Ok(topology) => config.topology = topology,
            Err(error) => {
                eprintln!("vgpu: VGPU_TOPOLOGY: {error}");
                understood = false;
            }
        }
    }
    if let Ok(which) = std::env::var("VGPU_APPROX") {
        match Approximation::by_name(which.trim()) {
            Some(approximation) => config.approximation = approximation,
            None => eprintln!("vgpu: VGPU_APPROX={which} is neither exact nor perturb; ignored"),
        }
    }
    if let Ok(which) = std::env::var("VGPU_STALE") {
        match Stale::by_name(which.trim()) {
            Some(stale) => config.stale = stale,
            None => eprintln!("vgpu: VGPU_STALE={which} is none of newest, random, oldest"),
        }
    }
    if let Ok(list) = std::env::var("VGPU_CHECK") {
        config.checks = match list.trim() {
            "all" => Kind::ALL.to_vec(),
            "none" => Vec::new(),
            list => list
                .split(',')
                .filter_map(|name| {
                    let kind = Kind::ALL.into_iter().find(|k| k.name() == name.trim());
                    if kind.is_none() {
                        eprintln!("vgpu: VGPU_CHECK: there is no check '{}'", name.trim());
                    }
                    kind
                })
                .collect(),
        };
    }
    (config, understood)
}

impl Driver {
    fn new() -> Self {
        let (config, understood) = configuration();
        let devices = config.devices as usize;
        let pinned = window::Pinned::new(config.devices);
        let mut machine = Machine::new(config);
        if let Some(bytes) = number("VGPU_MEMORY") {
            for device in &mut machine.devices {
                device.properties.memory = bytes;
            }
        }
        if report::wanted().is_some() {
            machine.world.report = Some(Box::default());
        }
        Self {
            machine,
            initialised: false,
            understood,
            contexts: BTreeMap::new(),
            primaries: vec![(None, 0, 0); devices],
            peers: BTreeSet::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            graphs: graph::Graphs::default(),
            captures: capture::Captures::default(),
            libraries: library::Libraries::default(),
            programs: programs::Programs::default(),
            pools: pool::Pools::default(),
            names: BTreeMap::new(),
            allocations: BTreeMap::new(),
            pinned,
            next: vec![0; devices.max(1)],
            generation: 0,
            actors: actors::Actors::default(),
            printed: 0,
        }
    }

    fn handle(&mut self, kind: u64) -> Handle {
        let current = CURRENT.with_borrow(|stack| stack.last().copied());
        let context = current.and_then(|handle| self.contexts.get(&handle));
        self.handle_on(kind, context.map_or(0, |c| c.device))
    }

    /// A handle of something on a device. Each device counts for itself: the threads that use
    /// different devices get the same handles in whatever order they come.
    fn handle_on(&mut self, kind: u64, device: u32) -> Handle {
        let next = &mut self.next[device as usize];
        *next += 1;
        // Aligned as a pointer is: some wrappers ask for that.
        self.generation << 44 | kind | u64::from(device) << 34 | *next << 4
    }

    /// Everything begins anew, as in a new process with this seed.
    fn reset(&mut self, seed: u64) {
        let host = self.allocations.iter().filter(|(_, a)| a.1 != Kept::Device);
        for at in host.map(|(at, _)| *at).collect::<Vec<_>>() {
            self.release(at);
        }
        let counted = self.machine.world.report.is_some();
        let before = std::mem::replace(self, Self::new());
        self.initialised = before.initialised;
        self.generation = before.generation + 1;
        self.actors = before.actors;
        self.actors.begin_anew();
        // Programs keep pointers to them.
        self.names = before.names;
        if counted {
            self.machine.world.report = Some(Box::default());
        }
        self.machine.set_seed(seed);
    }

    /// The calling thread's context.
    fn current(&self) -> Result<Handle, Status> {
        let top = CURRENT.with_borrow(|stack| stack.last().copied());
        let top = top.filter(|&c| c != 0).ok_or(Status::INVALID_CONTEXT)?;
        if self.contexts.contains_key(&top) {
            Ok(top)
        } else {
            Err(Status::CONTEXT_IS_DESTROYED)
        }
    }

    fn context(&self, handle: Handle) -> Result<&Context, Status> {
        self.contexts.get(&handle).ok_or(Status::INVALID_CONTEXT)
    }

    /// The calling thread's context, if its device has not faulted.
    fn healthy(&self) -> Result<Handle, Status> {
        let current = self.current()?;
        self.check(self.context(current)?.device)?;
        Ok(current)
    }

    fn check(&self, device: u32) -> Outcome {
        match self.machine.devices[device as usize].fault {
            Some(fault) => Err(Status(fault.code())),
            None => Ok(()),
        }
    }

    fn device(&self) -> Result<u32, Status> {
        Ok(self.context(self.current()?)?.device)
    }

    /// The stream of a handle in the current context: 0 and 1 are the legacy default stream, 2
    /// the thread's.
    fn stream(&self, handle: Handle) -> Result<(StreamId, Handle, bool), Status> {
        match handle {
            0..=2 => {
                let current = self.current()?;
                let context = self.context(current)?;
                Ok(if handle == 2 {
                    (context.per_thread, current, false)
                } else {
                    (context.default, current, false)
                })
            }
            handle => {
                let stream = self.streams.get(&handle).ok_or(Status::INVALID_HANDLE)?;
                Ok((stream.id, stream.context, stream.non_blocking))
            }
        }
    }

    /// Puts a command into a stream, with the waits that the legacy default stream implies.
    fn enqueue(&mut self, stream: Handle, command: Command) -> Result<u64, Status> {
        let (id, context, non_blocking) = self.stream(stream)?;
        let default = self.context(context)?.default;
        self.check(self.context(context)?.device)?;
        if id == default {
            let per_thread = self.context(context)?.per_thread;
            let blocking = self
                .streams
                .values()
                .filter(|s| s.context == context && !s.non_blocking)
                .map(|s| s.id);
            let others: Vec<StreamId> = blocking.chain([per_thread]).collect();
            self.machine.wait_for_streams(id, &others);
        } else if !non_blocking {
            self.machine.wait_for_streams(id, &[default]);
        }
        self.machine
            .enqueue(id, command)
            .ok_or(Status::INVALID_HANDLE)
    }

    /// Writes out what kernels printed and what the checks found.
    fn show(&mut self) {
        let output = std::mem::take(&mut self.machine.world.output);
        if !output.is_empty() {
            // Nothing can be done about an output that is closed.
            let _ = std::io::stdout().write_all(&output);
            let _ = std::io::stdout().flush();
        }
        for words in std::mem::take(&mut self.machine.world.notices) {
            eprintln!("vgpu: {words}");
        }
        let findings = self.machine.world.findings.list();
        let mut shown = 0;
        for finding in findings {
            shown += 1;
            if shown > self.printed {
                eprintln!("vgpu: {finding}");
            }
        }
        self.printed = self.printed.max(shown);
    }
}

type Guard = MutexGuard<'static, Driver>;

fn lock() -> Guard {
    DRIVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a call: takes the lock, keeps panics from crossing into C, names what is not supported.
fn call(name: &'static str, body: impl FnOnce(Guard) -> Outcome) -> u32 {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let driver = actors::enter(name);
        if !driver.initialised
            && !matches!(
                name,
                "cuInit" | "cuDriverGetVersion" | "cuGetErrorString" | "cuGetErrorName"
            )
            && !name.starts_with("cuGetProcAddress")
            && !name.starts_with("vgpu")
        {
            return Err(Status::NOT_INITIALIZED);
        }
        body(driver)
    }));
    match outcome {
        Ok(Ok(())) => 0,
        Ok(Err(status)) => {
            if status == Status::NOT_SUPPORTED {
                eprintln!("vgpu: {name} is not supported by the virtual GPU in this form");
            } else if status.is_of_capture()
                && let Some((_, words)) = status::describe(status.0)
            {
                eprintln!("vgpu: {name}: {}", words.trim_end_matches('\0'));
            }
            status.0
        }
        Err(_) => {
            eprintln!("vgpu: {name} failed inside the virtual GPU; please report this");
            Status::UNKNOWN.0
        }
    }
}

/// Says why a call failed, where a code is not enough.
fn explain(name: &str, words: impl std::fmt::Display) {
    eprintln!("vgpu: {name}: {words}");
}

/// Defines functions of the API and a table of them.
macro_rules! api {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) |$driver:ident| $body:block)*) => {
        $(#[unsafe(no_mangle)]
        #[allow(non_snake_case, clippy::too_many_arguments)]
        pub(crate) extern "C" fn $name($($arg: $ty),*) -> u32 {
            #[allow(unused_mut)]
            crate::driver::call(stringify!($name), move |mut $driver| {
                let _ = &mut $driver;
                $body
            })
        })*

        /// The functions defined here.
        pub(super) fn table() -> Vec<$crate::driver::entry::Function> {
            vec![$($crate::driver::entry::Function {
                name: stringify!($name),
                address: $name as *const () as usize,
                arguments: &[$((stringify!($arg), stringify!($ty))),*],
            }),*]
        }
    };
}
pub(crate) use api;

/// All functions of the API.
fn tables() -> Vec<Vec<entry::Function>> {
    vec![
        capture::table(),
        context::table(),
        copy::table(),
        device::table(),
        entry::table(),
        exec::table(),
        graph::table(),
        launch::table(),
        library::table(),
        memory::table(),
        module::table(),
        node::table(),
        peer::table(),
        pool::table(),
        refused::table(),
        report::table(),
        stream::table(),
        table(),
    ]
}

api! {
    fn cuInit(flags: u32) |driver| {
        if flags != 0 || !driver.understood {
            return Err(Status::INVALID_VALUE);
        }
        if driver.primaries.is_empty() {
            return Err(Status::NO_DEVICE);
        }
        if !driver.initialised {
            driver.initialised = true;
            // SAFETY: `at_exit` is a function for as long as the library is loaded, and nobody
            // unloads a driver.
            unsafe { libc::atexit(at_exit) };
            let (first, end, of_one) = driver.machine.world.memory.addresses();
            window::reserve(first, end, of_one);
        }
        Ok(())
    }

    fn cuGetErrorString(code: u32, text: Out<*const u8>) |_driver| {
        match status::describe(code) {
            Some((_, words)) => text.set(words.as_ptr()),
            None => {
                text.set_if_wanted(std::ptr::null());
                Err(Status::INVALID_VALUE)
            }
        }
    }

    fn cuGetErrorName(code: u32, text: Out<*const u8>) |_driver| {
        match status::describe(code) {
            Some((name, _)) => text.set(name.as_ptr()),
            None => {
                text.set_if_wanted(std::ptr::null());
                Err(Status::INVALID_VALUE)
            }
        }
    }

    fn vgpuSetSeed(seed: u64) |driver| {
        if !driver.machine.is_quiet() {
            explain("vgpuSetSeed", "the devices have work to do");
            return Err(Status::NOT_READY);
        }
        driver.machine.set_seed(seed);
        Ok(())
    }

    // Everything begins anew: contexts, memory, streams, clocks, findings and counts; what the
    // program still holds of them is unknown from then on. The environment is read again.
    fn vgpuReset(seed: u64) |driver| {
        if !driver.machine.is_quiet() {
            explain("vgpuReset", "the devices have work to do");
            return Err(Status::NOT_READY);
        }
        driver.reset(seed);
        Ok(())
    }

    fn vgpuExplore(seed: u64, devices: u32) |driver| {
        if !driver.machine.is_quiet() {
            explain("vgpuExplore", "the devices have work to do");
            return Err(Status::NOT_READY);
        }
        driver.machine.explore(seed, devices);
        Ok(())
    }

    fn vgpuIsReplayable(replayable: Out<i32>) |driver| {
        replayable.set(driver.actors.is_replayable().into())
    }

    fn vgpuTakeFindings(text: Out<u8>, capacity: u64, length: Out<u64>) |driver| {
        let findings = driver.machine.world.findings.list();
        let mut words = findings.map(ToString::to_string).collect::<Vec<_>>().join("\n");
        words.push('\0');
        length.set(words.len() as u64)?;
        // With too little room nothing is taken: the caller learns how much it needs.
        if words.len() as u64 <= capacity {
            text.write(words.as_bytes());
            driver.machine.world.findings.take();
            driver.printed = 0;
        }
        Ok(())
    }
}

/// Findings that nobody took make the process fail.
extern "C" fn at_exit() {
    let Ok(mut driver) = DRIVER.try_lock() else {
        return;
    };
    driver.show();
    driver.write_report();
    let left = driver.machine.world.findings.list().count();
    if left > 0 {
        eprintln!("vgpu: {left} findings; the process exits with status {EXIT}");
        // SAFETY: ends the process at once, which is what is wanted.
        unsafe { libc::_exit(EXIT) };
    }
}
