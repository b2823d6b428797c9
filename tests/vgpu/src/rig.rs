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

/// A machine and a stream of its device 0.
pub struct Rig {
    /// The machine.
    pub machine: Machine,
    /// The stream everything goes into.
    pub stream: StreamId,
}

impl Rig {
    /// With this configuration.
    pub fn new(config: Config) -> Self {
        let mut machine = Machine::new(config);
        let stream = machine.create_stream(0);
        Self { machine, stream }
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
        let mut bytes = params.to_vec();
        bytes.resize(kernel.param_bytes as usize, 0);
        let launch = Launch {
            id: 0,
            device: 0,
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
        self.machine
            .enqueue(self.stream, Command::Kernel(Box::new(launch)));
    }

    /// Runs until there is nothing left to do.
    pub fn synchronise(&mut self) -> Result<(), Fault> {
        loop {
            match self.machine.step() {
                Progress::Advanced => {}
                Progress::Idle => break,
                Progress::Stuck => self.machine.declare_deadlock(&[]),
                Progress::HostFunction(stream, function) => {
                    function();
                    self.machine.host_function_done(stream);
                }
            }
        }
        self.machine.host_synchronised(self.stream);
        match self.machine.devices[0].fault.take() {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    }

    /// Takes what the checks found.
    pub fn findings(&mut self) -> Vec<Finding> {
        self.machine.world.findings.take()
    }
}
