//! How many blocks of the KV cache fit on devices beside the weights: arithmetic alone.

use std::collections::BTreeMap;

use crate::backend::cuda::CudaKvPages;
use crate::backend::{KvShape, cuda};
use crate::dtype::DType;
use crate::error::{Error, Fault, Result};
use crate::shard::{HeadShard, ShardPlan};

/// Bytes that a rank takes beside weights and cache: the slab of its steps, what its slab of weights
/// leaves over, staging of collectives, kernels.
const RANK_RESERVE: usize = 256 << 20;

/// Of what is free on a device, the hundredths that are used: other processes come and go.
const USED_PERCENT: usize = 95;

/// What a group needs of its devices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs<'a> {
    pub(super) plan: &'a ShardPlan,
    /// The device of each rank.
    pub(super) devices: &'a [usize],
    pub(super) dtype: DType,
    pub(super) block_size: usize,
    /// Blocks of one of the longest sequences.
    pub(super) longest: usize,
}

impl Needs<'_> {
    /// Bytes of a rank's weights: matrices as they are stored, vectors in f32.
    fn weights(&self, rank: usize) -> usize {
        let bytes = |tensor: &crate::shard::TensorPlan| {
            let size = if tensor.shape.len() == 1 {
                size_of::<f32>()
            } else {
                self.dtype.size()
            };
            tensor.elements(rank) * size
        };
        self.plan.tensors().iter().map(bytes).sum()
    }

    /// Bytes of a block of a rank's cache, all layers.
    fn block(&self, rank: usize) -> usize {
        let dims = self.plan.dims();
        let shape = KvShape {
            num_layers: dims.num_hidden_layers,
            num_blocks: 1,
            block_size: self.block_size,
            num_kv_heads: HeadShard::new(dims, self.plan.tp(), rank).kv.len(),
            head_dim: dims.head_dim,
            dtype: self.dtype,
        };
        CudaKvPages::bytes_of(&shape).unwrap_or(usize::MAX)
    }

    /// Blocks that fit on every device, given the bytes that are free on each.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if not even the longest sequence fits, with the arithmetic of the
    /// device where that is so.
    pub(super) fn blocks(&self, free: &BTreeMap<usize, usize>) -> Result<usize> {
        let mut fit = usize::MAX;
        for (&device, &free) in free {
            let ranks = || (0..self.devices.len()).filter(|&rank| self.devices[rank] == device);
            let weights: usize = ranks().map(|rank| self.weights(rank)).sum();
            let block: usize = ranks().map(|rank| self.block(rank)).sum();
            let reserve = ranks().count() * RANK_RESERVE;
            let usable = free / 100 * USED_PERCENT;
            let left = usable.saturating_sub(weights + reserve);
            let blocks = left / block.max(1);
            if blocks < self.longest {
                return Err(Error::OutOfMemory(Fault::new(
                    format_args!("KV cache on CUDA device {device}"),
                    format_args!(
                        "{} blocks of {block} bytes for the longest sequence",
                        self.longest
                    ),
                    format_args!(
                        "room for {blocks}: {free} bytes free, of them {USED_PERCENT} % usable, \
                         less {weights} of weights and {reserve} of workspace"
                    ),
                    "lower max_model_len, use more ranks or a narrower dtype, or free memory on \
                     the device",
                )));
            }
            fit = fit.min(blocks);
        }
        Ok(fit)
    }
}

/// Bytes that are free now on each of these devices.
pub(super) fn free(devices: &[usize]) -> Result<BTreeMap<usize, usize>> {
    devices
        .iter()
        .map(|&device| Ok((device, cuda::Context::new(device)?.memory()?.0)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::Dims;

    fn dims() -> Dims {
        Dims {
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 8,
            num_key_value_heads: 2,
            head_dim: 8,
            vocab_size: 100,
            tie_word_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
        }
    }

    #[test]
    fn the_fullest_device_decides_and_shared_ones_hold_both_ranks() {
        let plan = ShardPlan::new(&dims(), 2).expect("a plan");
        let needs = |devices| Needs {
            plan: &plan,
            devices,
            dtype: DType::Bf16,
            block_size: 16,
            longest: 3,
        };
        // Two layers, keys and values, one head of eight: 512 B a position of both ranks.
        let apart = needs(&[0, 1]);
        assert_eq!(apart.block(0), 2 * 2 * 16 * 8 * 2);
        let room = |blocks: usize, ranks: &[usize]| {
            let of =
                |&rank: &usize| apart.weights(rank) + RANK_RESERVE + blocks * apart.block(rank);
            ranks.iter().map(of).sum::<usize>().div_ceil(USED_PERCENT) * 100
        };
        let blocks = |needs: &Needs<'_>, free: &[usize]| {
            needs.blocks(&free.iter().copied().enumerate().collect())
        };
        let close = |found: usize, expected: usize| {
            assert!(
                (expected..expected + 2).contains(&found),
                "{found} for {expected}"
            );
        };
        close(
            blocks(&apart, &[room(50, &[0]), room(90, &[1])]).expect("room"),
            50,
        );
        close(
            blocks(&needs(&[0, 0]), &[room(50, &[0, 1])]).expect("room"),
            50,
        );
        let Err(Error::OutOfMemory(fault)) = blocks(&apart, &[room(50, &[0]), room(1, &[1])])
        else {
            panic!("the second device is full");
        };
        for part in ["device 1", "3 blocks of 1024 bytes", "room for", "weights"] {
            assert!(fault.to_string().contains(part), "{part} in {fault}");
        }
    }
}
