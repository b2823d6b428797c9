//! The paged KV cache in device memory.

use std::ops::Range;

use super::{DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut, Stream};
use crate::backend::KvShape;
use crate::error::{Error, Fault, Result};

/// The greatest head that the attention kernel takes.
const MAX_HEAD_DIM: usize = super::abi::kAttentionHeadDim as usize;

/// The pages of all layers of one rank.
///
/// Layout, in the storage type: per layer first keys, then values, each
/// `[num_blocks, num_kv_heads, block_size, head_dim rounded up to 8]`, where what is added is zeros.
#[derive(Debug)]
pub struct CudaKvPages {
    shape: KvShape,
    buffer: DeviceBuffer,
}

/// The pages of one layer, to read: also somebody else's.
#[derive(Clone, Copy, Debug)]
pub struct KvLayer<'a> {
    pub(super) keys: DeviceSlice<'a>,
    pub(super) values: DeviceSlice<'a>,
    pub(super) shape: KvShape,
}

/// The pages of one layer, to write: also somebody else's.
#[derive(Debug)]
pub struct KvLayerMut<'a> {
    pub(super) keys: DeviceSliceMut<'a>,
    pub(super) values: DeviceSliceMut<'a>,
    pub(super) shape: KvShape,
}

/// Elements of an entry in memory.
pub(super) fn padded(head_dim: usize) -> usize {
    let padding = super::abi::kHeadPadding as usize;
    head_dim
        .checked_next_multiple_of(padding)
        .unwrap_or(usize::MAX)
}

/// Bytes of the keys, or of the values, of a layer; `None` beyond `usize`.
fn half_bytes(shape: &KvShape) -> Option<usize> {
    [
        shape.num_kv_heads,
        shape.block_size,
        padded(shape.head_dim),
        shape.dtype.size(),
    ]
    .iter()
    .try_fold(shape.num_blocks, |product, &n| product.checked_mul(n))
}

fn check_shape(shape: &KvShape) -> Result<()> {
    let d = shape.head_dim;
    if d == 0 || !d.is_multiple_of(2) || d > MAX_HEAD_DIM {
        return Err(Error::input(
            "head_dim",
            format!("even, 2 to {MAX_HEAD_DIM}"),
            d,
            "run this model on the CPU",
        ));
    }
    if shape.block_size == 0 {
        return Err(Error::input(
            "block_size",
            "at least 1",
            0,
            "use 16, 32 or 64",
        ));
    }
    Ok(())
}

impl CudaKvPages {
    /// Zeroed pages; `stream` fills them.
    ///
    /// # Errors
    /// [`Error::Input`] for a head or block size that the kernels do not take;
    /// [`Error::OutOfMemory`], with the arithmetic.
    pub fn new(pool: &DevicePool, stream: &Stream, shape: KvShape) -> Result<Self> {
        check_shape(&shape)?;
        let bytes = Self::bytes_of(&shape);
        let full = |found: &dyn std::fmt::Display| {
            Error::OutOfMemory(Fault::new(
                format_args!("KV cache of CUDA device {}", pool.context().ordinal()),
                format_args!(
                    "{} layers x 2 x {} blocks x {} KV heads x {} positions x {} x {} bytes = {} \
                     bytes",
                    shape.num_layers,
                    shape.num_blocks,
                    shape.num_kv_heads,
                    shape.block_size,
                    padded(shape.head_dim),
                    shape.dtype.size(),
                    bytes.map_or("more than can be".to_owned(), |bytes| bytes.to_string()),
                ),
                found,
                "give the cache fewer blocks, or use more ranks",
            ))
        };
        let buffer = match bytes {
            None => return Err(full(&"a size beyond any memory")),
            Some(bytes) => pool.zeros(bytes, stream),
        };
        let buffer = buffer.map_err(|error| match error {
            Error::OutOfMemory(_) => full(&"less than that free"),
            other => other,
        })?;
        Ok(Self { shape, buffer })
    }

    /// Bytes that pages of these sizes take; `None` beyond `usize`.
    pub fn bytes_of(shape: &KvShape) -> Option<usize> {
        let half = half_bytes(shape)?;
        half.checked_mul(2)?.checked_mul(shape.num_layers)
    }

    /// The sizes.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Where the keys and the values of a layer are.
    fn ranges(&self, layer: usize) -> Result<[Range<usize>; 2]> {
        if layer >= self.shape.num_layers {
            return Err(Error::shape(
                "layer of the KV cache",
                format!("below {}", self.shape.num_layers),
                layer,
            ));
        }
        let half = self.buffer.len() / self.shape.num_layers / 2;
        let at = |i: usize| (2 * layer + i) * half..(2 * layer + i + 1) * half;
        Ok([at(0), at(1)])
    }

    /// A layer, to read.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such layer.
    pub fn layer(&self, layer: usize) -> Result<KvLayer<'_>> {
        let [keys, values] = self.ranges(layer)?;
        let all = self.buffer.as_ref();
        KvLayer::new(all.range(keys)?, all.range(values)?, self.shape)
    }

    /// A layer, to write.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> Result<KvLayerMut<'_>> {
        let [keys, values] = self.ranges(layer)?;
        let at = self.buffer.address();
        // SAFETY: two parts of the buffer that do not overlap, for as long as it is borrowed.
        let part = |range: Range<usize>| unsafe {
            DeviceSliceMut::from_raw(at + range.start as u64, range.len())
        };
        KvLayerMut::new(part(keys), part(values), self.shape)
    }
}

fn check_layer(keys: DeviceSlice<'_>, values: DeviceSlice<'_>, shape: &KvShape) -> Result<()> {
    check_shape(shape)?;
    for (what, slice) in [("keys", keys), ("values", values)] {
        let fits = half_bytes(shape).is_some_and(|bytes| bytes <= slice.len());
        if !fits || !slice.address().is_multiple_of(16) {
            return Err(Error::shape(
                format_args!("{what} of a layer of the KV cache"),
                format_args!(
                    "[{}, {}, {}, {}] of {} at a multiple of 16",
                    shape.num_blocks,
                    shape.num_kv_heads,
                    shape.block_size,
                    padded(shape.head_dim),
                    shape.dtype
                ),
                format_args!("{} bytes at {:#x}", slice.len(), slice.address()),
            ));
        }
    }
    Ok(())
}

impl<'a> KvLayer<'a> {
    /// The layer whose keys and values lie as those of [`CudaKvPages`] (`num_layers` is not looked
    /// at).
    ///
    /// # Errors
    /// [`Error::Shape`] if a slice is too short or not at a multiple of 16; [`Error::Input`] for
    /// sizes that the kernels do not take.
    pub fn new(keys: DeviceSlice<'a>, values: DeviceSlice<'a>, shape: KvShape) -> Result<Self> {
        check_layer(keys, values, &shape)?;
        Ok(Self {
            keys,
            values,
            shape,
        })
    }
}

impl<'a> KvLayerMut<'a> {
    /// As [`KvLayer::new`].
    ///
    /// # Errors
    /// As [`KvLayer::new`].
    pub fn new(
        keys: DeviceSliceMut<'a>,
        values: DeviceSliceMut<'a>,
        shape: KvShape,
    ) -> Result<Self> {
        check_layer(keys.as_ref(), values.as_ref(), &shape)?;
        Ok(Self {
            keys,
            values,
            shape,
        })
    }
}
