//! A test bench: a machine with one stream, driven without the driver API, for the tests of
//! opcodes and checks.

use std::sync::Arc;

use crate::finding::{Fault, Finding};
use crate::loader::{self, Loaded};
use crate::lowering::LoadError;
use crate::machine::{Command, Config, Launch, Machine, Progress, StreamId};
use crate::program::Kernel;
use crate::ptx::ast::Module;
use crate::race::LaunchClock;

/// A machine and a stream of each of its devices.
pub struct Rig {
    /// The machine.
    pub machine: Machine,
    /// The stream of device 0, into which everything goes that names no other.
    pub stream: StreamId,
    /// The streams of all devices.
    pub streams: Vec<StreamId>,
}

impl Rig {
    /// With this configuration. Every device has peer access to every other that it can reach.
    pub fn new(config: Config) -> Self {
        let devices = config.devices;
        let mut machine = Machine::new(config);
        let streams: Vec<StreamId> = (0..devices).map(|d| machine.create_stream(d)).collect();
        let links = &mut machine.world.memory.links;
        for from in 0..devices {
            for to in 0..devices {
                if links.can_access(from, to) {
                    links.enable(from, to, true);
                }
            }
        }
        Self {
            machine,
            stream: streams[0],
            streams,
        }
    }

    /// Loads a parsed module.
    pub fn load(&mut self, module: &Module) -> Result<Loaded, LoadError> {
        loader::load(module, &mut self.machine.world.memory, 0, &|_| None)
    }

    /// Device memory that nobody has written.
    pub fn allocate(&mut self, bytes: u64) -> u64 {
        let memory = &mut self.machine.world.memory;
        memory.allocate(0, bytes).expect("a test asks for little")
    }

    /// Device memory with these bytes.
    pub fn upload(&mut self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len() as u64);
        let memory = &mut self.machine.world.memory;
        memory.write(address, bytes).expect("just allocated");
        address
    }

    /// Reads device memory.
    pub fn download(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        let memory = &mut self.machine.world.memory;
        memory
            .read(address, &mut out)
            .expect("a test reads what it allocated");
        out
    }

    /// Launches without waiting. `params` are the parameter bytes as laid out by the kernel.
    pub fn launch(
        &mut self,
        kernel: &Arc<Kernel>,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        params: &[u8],
    ) {
        self.launch_on(0, kernel, grid, block, dynamic_shared, params);
    }

    /// The same on another device.
    pub fn launch_on(
        &mut self,
        device: u32,
        kernel: &Arc<Kernel>,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        params: &[u8],
    ) {
        let mut bytes = params.to_vec();
        bytes.resize(kernel.param_bytes as usize, 0);
        let launch = Launch {
            id: 0,
            device,
            kernel: kernel.clone(),
            grid,
            block,
            dynamic_shared,
            params: bytes,
            cooperative: false,
            workspace: 0,
            multiprocessors: 0,
            clock: LaunchClock::default(),
        };
        self.machine.enqueue(
            self.streams[device as usize],
            Command::Kernel(Box::new(launch)),
        );
    }

    /// Runs until there is nothing left to do.
    pub fn synchronise(&mut self) -> Result<(), Fault> {
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
        for &stream in &self.streams {
            self.machine.host_synchronised(stream);
        }
        let devices = &mut self.machine.devices;
        match devices.iter_mut().find_map(|device| device.fault.take()) {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    }

    /// Takes what the checks found.
    pub fn findings(&mut self) -> Vec<Finding> {
        self.machine.world.findings.take()
    }
}
