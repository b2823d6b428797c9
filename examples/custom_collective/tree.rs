//! An all-reduce that is not of the crate: along a binary tree, by the kernels in `tree.cu`.

use ringtp::DType;
use ringtp::backend::cuda::Family;
use ringtp::comm::Rounding;
use ringtp::comm::p2p::{DeviceAllReduce, Image, Reach};

/// Sums go up a binary tree to rank 0, and the total comes down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tree {
    /// The code, which the build made of `tree.cu`.
    pub(crate) image: &'static [u8],
}

/// As the driver wants it: at a multiple of 16.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
    env!("OUT_DIR"),
    "/examples-custom_collective-tree.fatbin"
)));

/// The algorithm with the code that the build made.
pub(crate) static TREE: Tree = Tree { image: &IMAGE.0 };

/// Edges between rank 0 and the rank that is farthest from it.
fn depth(world_size: usize) -> usize {
    world_size.ilog2() as usize
}

impl DeviceAllReduce for Tree {
    fn name(&self) -> &'static str {
        "tree"
    }

    fn rounding(&self) -> Rounding {
        Rounding::PerHop
    }

    /// Of the rank that sends most: one with a parent and two children.
    fn bytes_sent(&self, world_size: usize, bytes: usize) -> usize {
        bytes * (world_size - 1).min(3)
    }

    fn hops(&self, world_size: usize) -> usize {
        2 * depth(world_size)
    }

    fn reach(&self) -> Reach {
        Reach::Mesh
    }

    fn kernel(&self, dtype: DType) -> &'static str {
        match dtype {
            DType::F32 => "tree_f32",
            DType::Bf16 => "tree_bf16",
            DType::F16 => "tree_f16",
        }
    }

    fn image(&self) -> Option<Image> {
        const FAMILY: Family = Family {
            name: "tree",
            kernels: &["tree_f32", "tree_bf16", "tree_f16"],
        };
        // SAFETY: what the build made of tree.cu, whose comments argue that it keeps to the protocol.
        Some(unsafe { Image::new(FAMILY, self.image) })
    }
}
