//! A node of devices without the driver API: one machine, and the kernels of a file.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use vgpu::finding::{Fault, Finding};
use vgpu::machine::{
    Command, Config, EventId, Exploration, Launch, Machine, Progress, StreamId, World,
};
use vgpu::memory::Memory;
use vgpu::program::Kernel;
use vgpu::race::LaunchClock;

use crate::compile::ptx;

/// The kernels of a file, which any device can run: they have no variables.
pub(crate) type Kernels = HashMap<String, Arc<Kernel>>;

fn kernels(file: &str) -> Kernels {
    let module = vgpu::ptx::parse(&ptx(file)).expect("the PTX of nvcc is understood");
    let mut memory = Memory::new(&Config::default());
    let loaded = vgpu::loader::load(&module, &mut memory, 0, &|_| None).expect("it loads");
    assert!(loaded.variables.is_empty(), "{file} has variables");
    loaded.kernels
}

pub(crate) static CLEAN: LazyLock<Kernels> = LazyLock::new(|| kernels("clean.cu"));
pub(crate) static MUTANTS: LazyLock<Kernels> = LazyLock::new(|| kernels("mutants.cu"));

/// A configuration for a seed: the seeds go through schedules, slow devices and links, and the
/// ways of reading old values.
pub(crate) fn explore(devices: u32, seed: u64) -> Config {
    Exploration::config(seed, devices)
}

/// A machine whose devices all have peer access, with a stream for each rank.
pub(crate) struct Node {
    pub(crate) machine: Machine,
    kernels: &'static Kernels,
    /// The device and the stream of each rank.
    ranks: Vec<(u32, StreamId)>,
}

impl Node {
    /// One rank a device.
    pub(crate) fn new(kernels: &'static Kernels, config: Config) -> Self {
        let devices: Vec<u32> = (0..config.devices).collect();
        Self::with_ranks(kernels, config, &devices)
    }

    /// With ranks on these devices.
    pub(crate) fn with_ranks(kernels: &'static Kernels, config: Config, devices: &[u32]) -> Self {
        let mut machine = Machine::new(config);
        let count = machine.devices.len() as u32;
        for from in 0..count {
            for to in (0..count).filter(|&to| to != from) {
                machine.world.memory.links.enable(from, to, true);
            }
        }
        let ranks = devices
            .iter()
            .map(|&device| (device, machine.create_stream(device)))
            .collect();
        Self {
            machine,
            kernels,
            ranks,
        }
    }

    pub(crate) fn world(&self) -> u64 {
        self.ranks.len() as u64
    }

    pub(crate) fn stream(&self, rank: usize) -> StreamId {
        self.ranks[rank].1
    }

    /// Words on the device of a rank.
    pub(crate) fn put(&mut self, rank: usize, words: &[u64]) -> u64 {
        let at = self.room(rank, words.len());
        let memory = &mut self.machine.world.memory;
        memory
            .write(at, bytemuck::cast_slice(words))
            .expect("just allocated");
        at
    }

    /// Words on the device of a rank that nobody has written.
    pub(crate) fn room(&mut self, rank: usize, words: usize) -> u64 {
        let memory = &mut self.machine.world.memory;
        memory
            .allocate(self.ranks[rank].0, 8 * words as u64)
            .expect("a test asks for little")
    }

    pub(crate) fn get(&mut self, at: u64, words: usize) -> Vec<u64> {
        let mut bytes = vec![0u8; 8 * words];
        self.machine
            .world
            .memory
            .read(at, &mut bytes)
            .expect("it is allocated");
        bytemuck::pod_collect_to_vec(&bytes)
    }

    /// Launches in a stream with parameters of 8 bytes each.
    pub(crate) fn launch(
        &mut self,
        stream: StreamId,
        kernel: &str,
        grid: u32,
        block: u32,
        args: &[u64],
    ) {
        self.launch_with(stream, kernel, grid, block, 0, args);
    }

    /// As [`launch`](Self::launch), with dynamic shared memory.
    pub(crate) fn launch_with(
        &mut self,
        stream: StreamId,
        kernel: &str,
        grid: u32,
        block: u32,
        shared: u32,
        args: &[u64],
    ) {
        let kernel = self
            .kernels
            .get(kernel)
            .unwrap_or_else(|| panic!("no kernel {kernel}"));
        let mut params: Vec<u8> = bytemuck::cast_slice(args).to_vec();
        assert_eq!(params.len(), kernel.param_bytes as usize, "{}", kernel.name);
        params.resize(kernel.param_bytes as usize, 0);
        let launch = Launch {
            id: 0,
            device: self.machine.device_of(stream).expect("a stream"),
            kernel: kernel.clone(),
            grid: [grid, 1, 1],
            block: [block, 1, 1],
            dynamic_shared: shared,
            params,
            cooperative: false,
            workspace: 0,
            multiprocessors: 0,
            clock: LaunchClock::default(),
        };
        self.machine
            .enqueue(stream, Command::Kernel(Box::new(launch)));
    }

    /// Flags and data for every rank: `flags` and `data` words each, all `fill`; the addresses of
    /// the data, and what [`on_all`](Self::on_all) gives every rank.
    pub(crate) fn ranks(
        &mut self,
        flags: usize,
        data: usize,
        fill: u64,
    ) -> (Vec<u64>, Vec<[u64; 4]>) {
        let n = self.ranks.len();
        let flags: Vec<u64> = (0..n).map(|r| self.put(r, &vec![0; flags])).collect();
        let data: Vec<u64> = (0..n).map(|r| self.put(r, &vec![fill; data])).collect();
        let structs = (0..n)
            .map(|r| [r as u64, n as u64, self.put(r, &flags), self.put(r, &data)])
            .collect();
        (data, structs)
    }

    /// Launches a kernel on every rank, with the rank's structure, its output and these.
    pub(crate) fn on_all(
        &mut self,
        kernel: &str,
        grid: u32,
        block: u32,
        ranks: &[[u64; 4]],
        outs: &[u64],
        args: &[u64],
    ) {
        for rank in 0..self.ranks.len() {
            let mut all = ranks[rank].to_vec();
            all.push(outs[rank]);
            all.extend(args);
            self.launch(self.stream(rank), kernel, grid, block, &all);
        }
    }

    /// An output of so many words on every rank.
    pub(crate) fn outs(&mut self, words: usize) -> Vec<u64> {
        (0..self.ranks.len()).map(|r| self.room(r, words)).collect()
    }

    /// Something done by a stream at its turn, as a copy is.
    pub(crate) fn work(&mut self, stream: StreamId, f: impl FnOnce(&mut World) + Send + 'static) {
        let work = Box::new(move |world: &mut World| {
            f(world);
            Ok(())
        });
        self.machine.enqueue(stream, Command::Work(work));
    }

    /// A copy between any two places.
    pub(crate) fn copy(&mut self, stream: StreamId, to: u64, from: u64, words: usize) {
        self.work(stream, move |world| {
            world
                .memory
                .copy(to, from, 8 * words)
                .expect("both are allocated");
        });
    }

    pub(crate) fn record(&mut self, stream: StreamId) -> EventId {
        let event = self.machine.create_event();
        self.machine.enqueue(stream, Command::Record(event));
        event
    }

    pub(crate) fn wait(&mut self, stream: StreamId, event: EventId) {
        self.machine.enqueue(stream, Command::Wait(event));
    }

    /// Runs until there is nothing left to do; what became of the devices.
    pub(crate) fn run(&mut self) -> Vec<Option<Fault>> {
        loop {
            match self.machine.step() {
                Progress::Advanced | Progress::Released | Progress::TooEarly => {}
                Progress::Idle => break,
                Progress::Stuck => self.machine.declare_deadlock(&[]),
                Progress::HostFunction(stream, function) => {
                    function();
                    self.machine.host_function_done(stream);
                }
            }
        }
        for (_, stream) in self.ranks.clone() {
            self.machine.host_synchronised(stream);
        }
        self.machine.devices.iter().map(|d| d.fault).collect()
    }

    pub(crate) fn findings(&mut self) -> Vec<Finding> {
        self.machine.world.findings.take()
    }
}
