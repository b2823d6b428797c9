//! The paged KV cache.

use super::memory::Memory;
use super::simd::LANES;
use crate::backend::KvShape;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The pages of all layers of one rank.
///
/// Layout, per layer, in the storage type:
/// - keys `[num_blocks, num_kv_heads, block_size / 16, head_dim, 16]`: sixteen positions side
///   by side, so that a vector of scores is made of one load an element of the head;
/// - values `[num_blocks, num_kv_heads, block_size, head_dim rounded up to 16]`.
///
/// Memory is touched, and so taken, only where entries are written.
#[derive(Debug)]
pub struct CpuKvPages {
    shape: KvShape,
    keys: Memory,
    values: Memory,
}

impl CpuKvPages {
    pub(super) fn new(shape: KvShape) -> Result<Self> {
        if shape.block_size == 0 || !shape.block_size.is_multiple_of(LANES) {
            return Err(Error::input(
                "block_size",
                "a multiple of 16",
                shape.block_size,
                "use 16, 32 or 64",
            ));
        }
        let entries = [
            shape.num_layers,
            shape.num_blocks,
            shape.num_kv_heads,
            shape.block_size,
        ]
        .iter()
        .try_fold(shape.dtype.size(), |product, &n| product.checked_mul(n));
        let bytes = |head: usize| {
            entries
                .and_then(|n| n.checked_mul(head))
                .unwrap_or(usize::MAX)
        };
        let keys = Memory::zeroed(bytes(shape.head_dim), "keys of the KV cache")?;
        // A head that cannot be padded has no memory either, unless there is no entry.
        let padded = shape.head_dim.checked_next_multiple_of(LANES);
        let values = bytes(padded.unwrap_or(usize::MAX));
        Ok(Self {
            keys,
            values: Memory::zeroed(values, "values of the KV cache")?,
            shape,
        })
    }

    /// Bytes of memory, whether touched or not.
    pub fn bytes(&self) -> usize {
        self.keys.bytes().len() + self.values.bytes().len()
    }

    /// The sizes.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    pub(super) fn dtype(&self) -> DType {
        self.shape.dtype
    }

    /// Keys and values of one layer, as words of the storage type.
    pub(super) fn layer<W: bytemuck::Pod>(&self, layer: usize) -> (&[W], &[W]) {
        let keys = self.shape.key_words();
        let values = self.shape.value_words();
        (
            &bytemuck::cast_slice(self.keys.bytes())[layer * keys..][..keys],
            &bytemuck::cast_slice(self.values.bytes())[layer * values..][..values],
        )
    }

    /// As [`Self::layer`], to write.
    pub(super) fn layer_mut<W: bytemuck::Pod>(&mut self, layer: usize) -> (&mut [W], &mut [W]) {
        let keys = self.shape.key_words();
        let values = self.shape.value_words();
        (
            &mut bytemuck::cast_slice_mut(self.keys.bytes_mut())[layer * keys..][..keys],
            &mut bytemuck::cast_slice_mut(self.values.bytes_mut())[layer * values..][..values],
        )
    }
}

impl KvShape {
    /// Elements of a value in memory.
    pub(super) fn padded_head(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    fn key_words(&self) -> usize {
        self.num_blocks * self.num_kv_heads * self.block_size * self.head_dim
    }

    fn value_words(&self) -> usize {
        self.num_blocks * self.num_kv_heads * self.block_size * self.padded_head()
    }

    /// Where the keys of the sixteen positions around `slot` of `block` start.
    #[inline(always)]
    pub(super) fn key_at(&self, block: usize, head: usize, slot: usize) -> usize {
        let groups = self.block_size / LANES;
        ((block * self.num_kv_heads + head) * groups + slot / LANES) * self.head_dim * LANES
    }

    /// Where the value of `slot` of `block` starts.
    #[inline(always)]
    pub(super) fn value_at(&self, block: usize, head: usize, slot: usize) -> usize {
        ((block * self.num_kv_heads + head) * self.block_size + slot) * self.padded_head()
    }
}
