//! The special registers.

use crate::machine::Cx;
use crate::registers::FULL;

/// The value of a special register in a lane.
pub(super) type Read = fn(&mut Cx, usize) -> u64;

/// A special register by its name: the bits it has and how to read it.
pub(super) fn special(name: &str) -> Option<(u32, Read)> {
    macro_rules! axes {
        ($name:expr, $stem:literal, $($axis:literal => $read:expr),*) => {
            $(if $name == concat!($stem, $axis) { return Some((32, $read)); })*
        };
    }
    axes!(name, "%tid", ".x" => |cx, l| cx.warp.tid[0][l].into(),
        ".y" => |cx, l| cx.warp.tid[1][l].into(), ".z" => |cx, l| cx.warp.tid[2][l].into());
    axes!(name, "%ntid", ".x" => |cx, _| cx.launch.block[0].into(),
        ".y" => |cx, _| cx.launch.block[1].into(), ".z" => |cx, _| cx.launch.block[2].into());
    axes!(name, "%ctaid", ".x" => |cx, _| cx.block.index[0].into(),
        ".y" => |cx, _| cx.block.index[1].into(), ".z" => |cx, _| cx.block.index[2].into());
    axes!(name, "%nctaid", ".x" => |cx, _| cx.launch.grid[0].into(),
        ".y" => |cx, _| cx.launch.grid[1].into(), ".z" => |cx, _| cx.launch.grid[2].into());
    // Without clusters every block is a cluster of its own.
    axes!(name, "%clusterid", ".x" => |cx, _| cx.block.index[0].into(),
        ".y" => |cx, _| cx.block.index[1].into(), ".z" => |cx, _| cx.block.index[2].into());
    axes!(name, "%nclusterid", ".x" => |cx, _| cx.launch.grid[0].into(),
        ".y" => |cx, _| cx.launch.grid[1].into(), ".z" => |cx, _| cx.launch.grid[2].into());
    axes!(name, "%cluster_ctaid", ".x" => |_, _| 0, ".y" => |_, _| 0, ".z" => |_, _| 0);
    axes!(name, "%cluster_nctaid", ".x" => |_, _| 1, ".y" => |_, _| 1, ".z" => |_, _| 1);
    let read: (u32, Read) = match name {
        "%laneid" => (32, |_, l| l as u64),
        "%warpid" => (32, |cx, _| cx.warp.index.into()),
        "%nwarpid" => (32, |cx, _| cx.launch.threads().div_ceil(32).into()),
        "%smid" => (32, |cx, _| cx.block.sm.into()),
        "%nsmid" => (32, |cx, _| cx.launch.multiprocessors.into()),
        "%gridid" => (64, |cx, _| cx.launch.id.into()),
        "%lanemask_eq" => (32, |_, l| 1 << l),
        "%lanemask_le" => (32, |_, l| u64::from(FULL >> (31 - l))),
        "%lanemask_lt" => (32, |_, l| (1 << l) - 1),
        "%lanemask_ge" => (32, |_, l| u64::from(FULL << l)),
        "%lanemask_gt" => (32, |_, l| u64::from(FULL << l) & !(1 << l)),
        "%cluster_ctarank" => (32, |_, _| 0),
        "%cluster_nctarank" => (32, |_, _| 1),
        "%clock" => (32, |cx, _| clock(cx) & 0xffff_ffff),
        "%clock_hi" => (32, |cx, _| clock(cx) >> 32),
        "%clock64" => (64, |cx, _| clock(cx)),
        "%globaltimer" => (64, |cx, _| timer(cx)),
        "%globaltimer_lo" => (32, |cx, _| timer(cx) & 0xffff_ffff),
        "%globaltimer_hi" => (32, |cx, _| timer(cx) >> 32),
        "%dynamic_smem_size" => (32, |cx, _| cx.launch.dynamic_shared.into()),
        "%total_smem_size" | "%aggr_smem_size" => (32, |cx, _| {
            u64::from(cx.launch.kernel.dynamic_shared_at) + u64::from(cx.launch.dynamic_shared)
        }),
        "%current_graph_exec" => (64, |_, _| 0),
        // The grid-wide barrier of cooperative launches keeps its address in these two.
        "%envreg1" => (32, |cx, _| cx.launch.workspace >> 32),
        "%envreg2" => (32, |cx, _| cx.launch.workspace & 0xffff_ffff),
        _ if name
            .strip_prefix("%envreg")
            .and_then(|n| n.parse::<u32>().ok())
            .is_some_and(|n| n < 32) =>
        {
            (32, |_, _| 0)
        }
        _ => return None,
    };
    Some(read)
}

/// Virtual cycles of the multiprocessor: one a nanosecond.
fn clock(cx: &mut Cx) -> u64 {
    cx.world.clock_reads += 1;
    cx.world.now + cx.warp.instructions
}

/// Virtual nanoseconds.
fn timer(cx: &mut Cx) -> u64 {
    cx.world.clock_reads += 1;
    cx.world.now
}
