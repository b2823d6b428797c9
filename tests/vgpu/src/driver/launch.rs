//! Launches and occupancy.

use std::sync::Arc;

use super::operation::Operation;
use super::rest::{load_function, load_here};
use super::status::{In, Out, Outcome, Status};
use super::{Driver, Guard, Handle, api, explain};
use crate::finding::Fault;
use crate::machine::{Command, Launch, SHARED_PER_BLOCK, THREADS_PER_BLOCK, World};
use crate::program::Kernel;
use crate::race::LaunchClock;

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) shared: u32,
    pub(super) cooperative: bool,
}

/// A launch with its parameters as they were when it was asked for.
#[derive(Clone)]
pub(super) struct KernelLaunch {
    pub(super) function: Handle,
    pub(super) shape: Shape,
    kernel: Arc<Kernel>,
    device: u32,
    params: Arc<[u8]>,
    /// The address of each parameter in `params`, for whoever asks a node for them.
    pub(super) pointers: Arc<[u64]>,
}

impl KernelLaunch {
    /// The launch, with the workspace of the grid-wide barrier around it if it is cooperative.
    pub(super) fn commands(&self, driver: &mut Driver) -> Result<Vec<Command>, Status> {
        let mut workspace = 0;
        if self.shape.cooperative {
            // The barrier's counter, zero at the start.
            let memory = &mut driver.machine.world.memory;
            workspace = memory
                .allocate(self.device, 64)
                .map_err(|_| Status::OUT_OF_MEMORY)?;
            let zeroed = memory.write(workspace, &[0; 64]);
            zeroed.map_err(|_| Status::UNKNOWN)?;
        }
        let launch = Launch {
            id: 0,
            device: self.device,
            kernel: self.kernel.clone(),
            grid: self.shape.grid,
            block: self.shape.block,
            dynamic_shared: self.shape.shared,
            params: self.params.to_vec(),
            cooperative: self.shape.cooperative,
            workspace,
            multiprocessors: 0,
            clock: LaunchClock::default(),
        };
        let mut commands = vec![Command::Kernel(Box::new(launch))];
        if workspace != 0 {
            commands.push(Command::Work(Box::new(move |world: &mut World| {
                let freed = world.memory.free(workspace);
                freed.map(|_| ()).map_err(|_| Fault::IllegalAddress)
            })));
        }
        Ok(commands)
    }
}

/// `CUlaunchConfig`
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: Handle,
    attributes: u64,
    count: u32,
}

/// `CUlaunchAttribute`: a number and 64 bytes of value.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct LaunchAttribute {
    number: u32,
    padding: [u8; 4],
    value: [u64; 8],
}

impl Driver {
    /// Blocks of a kernel that fit on a multiprocessor.
    fn occupancy(&self, function: Handle, threads: i32, shared: u64) -> Result<u32, Status> {
        let known = self
            .functions
            .get(&function)
            .ok_or(Status::INVALID_HANDLE)?;
        let module = self
            .modules
            .get(&known.module)
            .ok_or(Status::INVALID_HANDLE)?;
        let device = self.context(module.context)?.device;
        let properties = &self.machine.devices[device as usize].properties;
        let threads = u32::try_from(threads).map_err(|_| Status::INVALID_VALUE)?;
        let shared = u32::try_from(shared).unwrap_or(u32::MAX);
        if threads == 0 || threads > THREADS_PER_BLOCK {
            return Err(Status::INVALID_VALUE);
        }
        if known.kernel.max_threads.is_some_and(|most| threads > most) {
            return Ok(0);
        }
        Ok(properties.resident_blocks(&known.kernel, threads, shared))
    }

    /// The parameter bytes: from a pointer to each, or from one buffer.
    fn gather(&self, function: Handle, params: In<u64>, extra: In<u64>) -> Result<Vec<u8>, Status> {
        let known = self
            .functions
            .get(&function)
            .ok_or(Status::INVALID_HANDLE)?;
        let kernel = &known.kernel;
        let mut bytes = vec![0; kernel.param_bytes as usize];
        if !extra.is_null() {
            if !params.is_null() {
                return Err(Status::INVALID_VALUE);
            }
            let (mut buffer, mut size) = (0, 0);
            for n in (0..64).step_by(2) {
                match extra.index(n)? {
                    0 => break,
                    1 => buffer = extra.index(n + 1)?,
                    2 => size = In::<u64>::from_address(extra.index(n + 1)?).get()?,
                    _ => return Err(Status::INVALID_VALUE),
                }
            }
            let size = usize::try_from(size).map_err(|_| Status::INVALID_VALUE)?;
            if size > bytes.len() {
                explain(
                    "cuLaunchKernel",
                    format_args!(
                        "{size} bytes of parameters; {} takes {}",
                        kernel.name,
                        bytes.len()
                    ),
                );
                return Err(Status::INVALID_VALUE);
            }
            bytes[..size].copy_from_slice(&In::at(buffer).bytes(size)?);
            return Ok(bytes);
        }
        if params.is_null() && !kernel.params.is_empty() {
            explain(
                "cuLaunchKernel",
                format_args!(
                    "no parameters; {} takes {}",
                    kernel.name,
                    kernel.params.len()
                ),
            );
            return Err(Status::INVALID_VALUE);
        }
        for (n, param) in kernel.params.iter().enumerate() {
            let source = In::at(params.index(n)?).bytes(param.size as usize)?;
            let at = param.offset as usize;
            bytes[at..at + source.len()].copy_from_slice(&source);
        }
        Ok(bytes)
    }

    fn check_shape(&self, function: Handle, device: u32, shape: &Shape) -> Outcome {
        let known = self
            .functions
            .get(&function)
            .ok_or(Status::INVALID_HANDLE)?;
        let kernel = &known.kernel;
        let refuse = |status: Status, words: String| {
            explain("cuLaunchKernel", format_args!("{}: {words}", kernel.name));
            Err(status)
        };
        let Shape {
            grid,
            block,
            shared,
            ..
        } = *shape;
        if grid.contains(&0) || grid[0] > i32::MAX as u32 || grid[1] > 65_535 || grid[2] > 65_535 {
            return refuse(Status::INVALID_VALUE, format!("a grid of {grid:?} blocks"));
        }
        // Three numbers of 32 bits: their product may have 96.
        let threads = block.iter().map(|&n| u128::from(n)).product::<u128>();
        if threads == 0 || threads > u128::from(THREADS_PER_BLOCK) || block[2] > 64 {
            return refuse(
                Status::INVALID_VALUE,
                format!("a block of {block:?} threads"),
            );
        }
        let threads = threads as u32;
        if let Some(required) = kernel.required_block
            && required != block
        {
            let words = format!("a block of {block:?} threads where {required:?} are required");
            return refuse(Status::INVALID_VALUE, words);
        }
        if let Some(most) = kernel.max_threads
            && threads > most
        {
            let words = format!("{threads} threads a block; __launch_bounds__ says {most}");
            return refuse(Status::LAUNCH_OUT_OF_RESOURCES, words);
        }
        let allowed = known
            .max_dynamic_shared
            .unwrap_or(SHARED_PER_BLOCK.saturating_sub(kernel.static_shared))
            .max(SHARED_PER_BLOCK.saturating_sub(kernel.static_shared));
        if shared > allowed {
            let words = format!(
                "{shared} bytes of dynamic shared memory, {allowed} allowed; raise \
                 CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
            );
            return refuse(Status::INVALID_VALUE, words);
        }
        let blocks = self.occupancy(function, threads as i32, shared.into())?;
        if blocks == 0 {
            let words = "a block needs more than a multiprocessor has".to_owned();
            return refuse(Status::LAUNCH_OUT_OF_RESOURCES, words);
        }
        let sms = self.machine.devices[device as usize]
            .properties
            .multiprocessors;
        let total = grid.iter().map(|&n| u64::from(n)).product::<u64>();
        if shape.cooperative && total > u64::from(blocks) * u64::from(sms) {
            let words = format!(
                "{total} blocks; {} fit at once",
                u64::from(blocks) * u64::from(sms)
            );
            return refuse(Status::COOPERATIVE_LAUNCH_TOO_LARGE, words);
        }
        Ok(())
    }
}

impl Driver {
    /// Everything about a launch in a context but when: checked, and its parameters read.
    pub(super) fn prepare(
        &mut self,
        function: Handle,
        context: Handle,
        shape: Shape,
        params: In<u64>,
        extra: In<u64>,
    ) -> Result<KernelLaunch, Status> {
        let device = self.context(context)?.device;
        let function = self.resolve(function, context)?;
        self.check_shape(function, device, &shape)?;
        let params = self.gather(function, params, extra)?;
        let known = self
            .functions
            .get(&function)
            .ok_or(Status::INVALID_HANDLE)?;
        let module = self
            .modules
            .get(&known.module)
            .ok_or(Status::INVALID_HANDLE)?;
        if self.context(module.context)?.device != device {
            return Err(Status::INVALID_HANDLE);
        }
        let kernel = known.kernel.clone();
        let params: Arc<[u8]> = params.into();
        let base = params.as_ptr() as u64;
        let pointers = kernel.params.iter().map(|p| base + u64::from(p.offset));
        Ok(KernelLaunch {
            function,
            shape,
            pointers: pointers.collect(),
            kernel,
            device,
            params,
        })
    }
}

fn launch(
    driver: Guard,
    function: Handle,
    stream: Handle,
    shape: Shape,
    params: In<u64>,
    extra: In<u64>,
) -> Outcome {
    driver.healthy()?;
    let (_, context, _) = driver.stream(stream)?;
    let (mut driver, function) = load_function(driver, function, context)?;
    let launch = driver.prepare(function, context, shape, params, extra)?;
    driver.submit(stream, Operation::Kernel(launch))
}

api! {
    fn cuLaunchKernel(
        function: Handle,
        gx: u32, gy: u32, gz: u32,
        bx: u32, by: u32, bz: u32,
        shared: u32,
        stream: Handle,
        params: In<u64>,
        extra: In<u64>,
    ) |driver| {
        let shape = Shape {
            grid: [gx, gy, gz],
            block: [bx, by, bz],
            shared,
            cooperative: false,
        };
        launch(driver, function, stream, shape, params, extra)
    }

    fn cuLaunchCooperativeKernel(
        function: Handle,
        gx: u32, gy: u32, gz: u32,
        bx: u32, by: u32, bz: u32,
        shared: u32,
        stream: Handle,
        params: In<u64>,
    ) |driver| {
        let shape = Shape {
            grid: [gx, gy, gz],
            block: [bx, by, bz],
            shared,
            cooperative: true,
        };
        launch(driver, function, stream, shape, params, In::from_address(0))
    }

    fn cuLaunchKernelEx(config: In<LaunchConfig>, function: Handle, params: In<u64>, extra: In<u64>) |driver| {
        let config = config.get()?;
        let mut cooperative = false;
        for n in 0..config.count as usize {
            let attribute = In::<LaunchAttribute>::from_address(config.attributes).index(n)?;
            let first = attribute.value[0] as u32;
            match attribute.number {
                // Hints, and what is one block's business only.
                0 | 1 | 3 | 8 | 9 => {}
                2 => cooperative = first != 0,
                // A cluster of one block is a block.
                4 if attribute.value[0] == 0x1_0000_0001 && attribute.value[1] as u32 == 1 => {}
                // Programmatic serialisation: launches of a stream follow each other anyway.
                6 => {}
                _ => return Err(Status::NOT_SUPPORTED),
            }
        }
        let shape = Shape {
            grid: config.grid,
            block: config.block,
            shared: config.shared,
            cooperative,
        };
        launch(driver, function, config.stream, shape, params, extra)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: Out<i32>, function: Handle, threads: i32, shared: u64,
    ) |driver| {
        let (driver, function) = load_here(driver, function)?;
        let found = driver.occupancy(function, threads, shared)?;
        blocks.set(found as i32)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: Out<i32>, function: Handle, threads: i32, shared: u64, _flags: u32,
    ) |driver| {
        let (driver, function) = load_here(driver, function)?;
        let found = driver.occupancy(function, threads, shared)?;
        blocks.set(found as i32)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(
        bytes: Out<u64>, function: Handle, blocks: i32, threads: i32,
    ) |driver| {
        let (driver, function) = load_here(driver, function)?;
        let wanted = u32::try_from(blocks).map_err(|_| Status::INVALID_VALUE)?;
        let fits = |shared: u64| driver.occupancy(function, threads, shared);
        let (mut low, mut high) = (0u64, 256 << 10);
        if fits(0)? < wanted {
            return bytes.set(0);
        }
        while high - low > 1 {
            let middle = (low + high) / 2;
            if fits(middle)? >= wanted { low = middle } else { high = middle }
        }
        bytes.set(low)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<i32>,
        block: Out<i32>,
        function: Handle,
        shared_of: Option<extern "C" fn(i32) -> u64>,
        shared: u64,
        limit: i32,
    ) |driver| {
        best_block(driver, (grid, block), function, shared_of, shared, limit)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<i32>,
        block: Out<i32>,
        function: Handle,
        shared_of: Option<extern "C" fn(i32) -> u64>,
        shared: u64,
        limit: i32,
        flags: u32,
    ) |driver| {
        // 1 only changes what is assumed of the cache.
        if flags > 1 {
            return Err(Status::INVALID_VALUE);
        }
        best_block(driver, (grid, block), function, shared_of, shared, limit)
    }
}

/// The block size that keeps most threads resident, and the blocks that fill the device.
fn best_block(
    driver: Guard,
    (grid, block): (Out<i32>, Out<i32>),
    function: Handle,
    shared_of: Option<extern "C" fn(i32) -> u64>,
    shared: u64,
    limit: i32,
) -> Outcome {
    let (driver, function) = load_here(driver, function)?;
    let most = if limit <= 0 { 1024 } else { limit.min(1024) };
    let device = driver.device()?;
    let sms = driver.machine.devices[device as usize]
        .properties
        .multiprocessors as i32;
    let sizes: Vec<i32> = (1..=most / 32).rev().map(|n| 32 * n).collect();
    // The function is the caller's and may call the driver.
    drop(driver);
    let shared = sizes
        .iter()
        .map(|&threads| shared_of.map_or(shared, |f| f(threads)));
    let sizes: Vec<(i32, u64)> = sizes.iter().copied().zip(shared).collect();
    let driver = super::lock();
    let mut best = (0, 0, 0);
    for (threads, bytes) in sizes {
        let blocks = driver.occupancy(function, threads, bytes)? as i32;
        if blocks * threads > best.0 {
            best = (blocks * threads, threads, blocks);
        }
    }
    grid.set(best.2 * sms)?;
    block.set(best.1)
}
