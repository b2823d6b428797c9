//! Blocks of running kernels: which are on a device, and what becomes of them.

use std::sync::Arc;

use super::device::Share;
use super::engine::Machine;
use super::streams::StreamId;
use super::{Barriers, Block, Launch, Warp};
use crate::memory::SharedMemory;
use crate::race::{self, BlockClock, StreamClock};
use crate::registers::LANES;

/// Blocks of a kernel kept going at once at first. Few at a time are quick to run to their end;
/// the number grows while none of them ends, for they may wait for those to come.
const FIRST_WINDOW: u32 = 4;

/// A kernel in progress.
pub(super) struct Grid {
    pub(super) launch: Arc<Launch>,
    pub(super) stream: StreamId,
    pub(super) next_block: u64,
    pub(super) finished: u64,
    pub(super) resident: u32,
    window: u32,
    share: Option<Share>,
    pub(super) operations: u64,
    /// What its ended blocks knew.
    clock: StreamClock,
}

/// A block on a device.
pub(super) struct Resident {
    pub(super) launch: Arc<Launch>,
    pub(super) grid: u32,
    pub(super) block: Block,
    pub(super) warps: Vec<Warp>,
    pub(super) live: Vec<u32>,
    pub(super) existing: Vec<u32>,
    share: Share,
}

impl Grid {
    pub(super) fn new(launch: Launch, stream: StreamId, share: Option<Share>) -> Self {
        Self {
            launch: Arc::new(launch),
            stream,
            next_block: 0,
            finished: 0,
            resident: 0,
            window: FIRST_WINDOW,
            share,
            operations: 0,
            clock: StreamClock::default(),
        }
    }

    /// Blocks that have not been on the device yet.
    pub(super) fn waiting(&self) -> u64 {
        self.launch.blocks() - self.next_block
    }
}

impl Machine {
    /// Brings blocks onto the devices, as many as the chips hold and the windows ask for.
    pub(super) fn place_blocks(&mut self) {
        if self.grids.values().all(|g| g.waiting() == 0) {
            return;
        }
        let ids: Vec<u32> = self.grids.keys().copied().collect();
        for id in ids {
            // All blocks of a cooperative launch come at once, or none.
            let together = self
                .grids
                .get(&id)
                .filter(|g| g.launch.cooperative && g.waiting() > 0);
            let together = together.and_then(|g| Some((g.launch.device, g.share?, g.waiting())));
            if let Some((device, share, blocks)) = together
                && self.devices[device as usize].room(&share, blocks) < blocks
            {
                continue;
            }
            while let Some(grid) = self.grids.get(&id) {
                let enough = together.is_none() && grid.resident >= grid.window;
                if grid.waiting() == 0 || enough || !self.place_block(id) {
                    break;
                }
            }
        }
    }

    /// Lets more blocks in, if there are any that fit.
    pub(super) fn widen(&mut self) -> bool {
        let before = self.resident.len();
        for grid in self.grids.values_mut().filter(|g| g.waiting() > 0) {
            grid.window = grid.window.saturating_mul(2);
        }
        self.place_blocks();
        self.resident.len() > before
    }

    /// Brings a kernel's next block onto its device; false if there is no room.
    fn place_block(&mut self, id: u32) -> bool {
        let Some(grid) = self.grids.get_mut(&id) else {
            return false;
        };
        let launch = grid.launch.clone();
        let device = &mut self.devices[launch.device as usize];
        let flat = grid.next_block;
        let Some(share) = grid.share else {
            return false;
        };
        let Some(sm) = device.occupy(&share, flat) else {
            return false;
        };
        grid.next_block += 1;
        grid.resident += 1;
        let [width, height, _] = launch.grid.map(u64::from);
        let index = [flat % width, flat / width % height, flat / width / height].map(|i| i as u32);
        let warps = launch.threads().div_ceil(LANES as u32);
        let mut block = Block {
            uid: 0,
            index,
            shared: SharedMemory::new(
                launch.kernel.dynamic_shared_at + launch.dynamic_shared,
                self.world.memory.race.is_on(),
            ),
            barriers: Barriers::new(warps as usize),
            clock: BlockClock::default(),
            sm,
        };
        let mut warps: Vec<Warp> = (0..warps).map(|w| Warp::new(&launch, w)).collect();
        for warp in &mut warps {
            warp.priority = self.first_priority();
        }
        race::start_block(&mut self.world.memory.race, &launch, &mut block);
        self.warps += warps.len() as u64;
        self.resident.push(Resident {
            grid: id,
            existing: warps.iter().map(|w| w.existing).collect(),
            live: warps.iter().map(|w| w.live).collect(),
            share,
            launch,
            block,
            warps,
        });
        true
    }

    /// Barriers that are complete now, warps and blocks that have ended.
    pub(super) fn after_run(&mut self, b: usize) {
        let resident = &mut self.resident[b];
        let mut exited = false;
        for (live, warp) in resident.live.iter_mut().zip(&resident.warps) {
            exited |= *live != warp.live;
            *live = warp.live;
        }
        let touched = std::mem::take(&mut resident.block.barriers.touched);
        let candidates = if exited { u32::MAX } else { touched };
        for id in 0..super::barrier::BARRIERS as u32 {
            if candidates >> id & 1 == 0 {
                continue;
            }
            let barriers = &mut resident.block.barriers;
            let Some(done) = barriers.complete(id, &resident.existing, &resident.live) else {
                continue;
            };
            if let Some(report) = &mut self.world.report {
                report.barrier(&resident.launch);
            }
            race::barrier(
                resident.block.uid,
                &mut resident.warps,
                &done.arrived,
                &done.waiting,
            );
            let launch = resident.launch.clone();
            for (warp, &waiting) in resident.warps.iter_mut().zip(&done.waiting) {
                let block = &mut resident.block;
                warp.release(id, waiting, done.result, &launch, block, &mut self.world);
            }
        }
        if exited && resident.live.iter().all(|&l| l == 0) {
            let ended = self.resident.swap_remove(b);
            self.devices[ended.launch.device as usize].vacate(&ended.share, ended.block.sm);
            self.warps -= ended.warps.len() as u64;
            let lanes: u64 = ended.warps.iter().map(|w| w.lane_instructions).sum();
            self.world.lane_instructions += lanes;
            self.scheduler.block_ended();
            if let Some(grid) = self.grids.get_mut(&ended.grid) {
                grid.clock.learn(&ended.warps);
            }
            self.world.memory.race.end_block(ended.block.uid);
            self.end_block(ended.grid);
        }
    }

    fn end_block(&mut self, id: u32) {
        let Some(grid) = self.grids.get_mut(&id) else {
            return;
        };
        grid.finished += 1;
        grid.resident -= 1;
        self.completions += 1;
        if grid.finished == grid.launch.blocks()
            && let Some(grid) = self.grids.remove(&id)
            && let Some(stream) = self.streams.get_mut(&grid.stream)
        {
            stream.busy = false;
            stream.finished += 1;
            stream.clock.join(&grid.clock);
            stream.clock.tick(grid.stream.0);
            stream.clock.prune(&self.world.memory.race);
            if let Some(report) = &mut self.world.report {
                report.end(&grid.launch);
            }
        }
    }

    /// Takes what these streams run off the devices.
    pub(super) fn clear_blocks(&mut self, streams: &[StreamId]) {
        let mut grids = Vec::new();
        self.grids.retain(|&id, grid| {
            let gone = streams.contains(&grid.stream);
            if gone {
                grids.push(id);
                if let Some(report) = &mut self.world.report {
                    report.end(&grid.launch);
                }
            }
            !gone
        });
        let (gone, left): (Vec<Resident>, _) = std::mem::take(&mut self.resident)
            .into_iter()
            .partition(|r| grids.contains(&r.grid));
        self.resident = left;
        for block in gone {
            self.devices[block.launch.device as usize].vacate(&block.share, block.block.sm);
            self.warps -= block.warps.len() as u64;
        }
    }
}
