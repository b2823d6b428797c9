//! A device for tests of kernels, and operands in its memory with guard bytes around them.
#![allow(dead_code, reason = "each test file uses its part")]

use ringtp::backend::WantedRecord;
use ringtp::backend::cuda::{
    Context, DeviceBuffer, DevicePool, Kernels, RowLayout, Rows, RowsMut, Stream, sampling_records,
};
use ringtp::dtype::Element;
use ringtp::llama::SampleRow;
use ringtp::llama::sampling::Record;
use ringtp::{DType, Result};
use test_driver::Taken;

/// A device with all that launches need. Dropping it checks that the virtual GPU found nothing.
pub(crate) struct Gpu {
    pub(crate) context: Context,
    pub(crate) stream: Stream,
    /// Every buffer is an allocation of its own, so that the virtual GPU sees its bounds.
    pub(crate) pool: DevicePool,
    pub(crate) kernels: Kernels,
    pub(crate) driver: Taken,
}

impl Gpu {
    /// Device 0, or `None` where tests are to leave this driver out.
    pub(crate) fn take() -> Option<Self> {
        let driver = test_driver::take()?;
        let context = Context::new(0).expect("device 0");
        let stream = Stream::new(&context).expect("a stream");
        let kernels = Kernels::load(&context).expect("the kernels load");
        Some(Self {
            pool: DevicePool::new(&context, 0),
            context,
            stream,
            kernels,
            driver,
        })
    }

    /// The bytes of a buffer.
    pub(crate) fn download(&self, buffer: &DeviceBuffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.len()];
        self.stream
            .download(buffer.as_ref(), &mut bytes)
            .expect("a download");
        bytes
    }

    /// The records of rows of logits: of each its row, and how it is sampled.
    pub(crate) fn records(
        &self,
        logits: &Operand,
        first_id: usize,
        wanted: &[(usize, SampleRow, Record)],
    ) -> Result<Vec<u32>> {
        let wanted = wanted.iter().map(|(row, sample, record)| WantedRecord {
            row: *row,
            sample,
            record: *record,
        });
        let wanted: Vec<_> = wanted.collect();
        let (kernels, stream, pool) = (&self.kernels, &self.stream, &self.pool);
        sampling_records(kernels, stream, pool, logits.rows(), first_id, &wanted)
    }
}

/// The bytes of `value` as `dtype`.
fn encode(value: f32, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
    }
}

fn decode(bytes: &[u8], dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes(bytes.try_into().expect("four bytes")),
        DType::Bf16 => half::bf16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
        DType::F16 => half::f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32(),
    }
}

/// What bytes outside of an operand hold; as elements, NaN.
const GUARD: u8 = 0xFF;

/// Rows in device memory with `guard` bytes before, between (as far as the stride leaves) and
/// after them.
pub(crate) struct Operand {
    pub(crate) buffer: DeviceBuffer,
    pub(crate) layout: RowLayout,
    guard: usize,
}

impl Operand {
    /// With these values, `[rows, cols]`, or poisoned: all bytes as the guard's.
    pub(crate) fn new(gpu: &Gpu, layout: RowLayout, guard: usize, values: Option<&[f32]>) -> Self {
        let bytes = layout.bytes().expect("a size");
        let mut image = vec![GUARD; guard + bytes + guard];
        let size = layout.dtype.size();
        if let Some(values) = values {
            assert_eq!(values.len(), layout.rows * layout.cols);
            for row in 0..layout.rows {
                for col in 0..layout.cols {
                    let at = guard + (row * layout.stride + col) * size;
                    let value = encode(values[row * layout.cols + col], layout.dtype);
                    image[at..at + size].copy_from_slice(&value);
                }
            }
        }
        Self {
            buffer: gpu.pool.upload(&image, &gpu.stream).expect("an upload"),
            layout,
            guard,
        }
    }

    fn bytes(&self) -> std::ops::Range<usize> {
        self.guard..self.buffer.len() - self.guard
    }

    pub(crate) fn rows(&self) -> Rows<'_> {
        let data = self.buffer.as_ref().range(self.bytes()).expect("a part");
        Rows::new(data, self.layout).expect("rows")
    }

    pub(crate) fn rows_mut(&mut self) -> RowsMut<'_> {
        let (bytes, layout) = (self.bytes(), self.layout);
        let data = self.buffer.as_mut().range(bytes).expect("a part");
        RowsMut::new(data, layout).expect("rows")
    }

    /// The values, `[rows, cols]`. Panics if a byte outside of them was written.
    pub(crate) fn values(&self, gpu: &Gpu) -> Vec<f32> {
        let mut image = gpu.download(&self.buffer);
        let size = self.layout.dtype.size();
        let mut values = Vec::new();
        for row in 0..self.layout.rows {
            for col in 0..self.layout.cols {
                let at = self.guard + (row * self.layout.stride + col) * size;
                values.push(decode(&image[at..at + size], self.layout.dtype));
                image[at..at + size].fill(GUARD);
            }
        }
        let touched = image.iter().position(|&byte| byte != GUARD);
        assert_eq!(
            touched, None,
            "a guard byte of {:?} was written",
            self.layout
        );
        values
    }
}

/// A vector of f32 in device memory that starts `offset` bytes into its buffer.
pub(crate) struct Vector {
    buffer: DeviceBuffer,
    offset: usize,
}

impl Vector {
    pub(crate) fn new(gpu: &Gpu, values: &[f32], offset: usize) -> Self {
        let mut image = vec![GUARD; offset];
        image.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        Self {
            buffer: gpu.pool.upload(&image, &gpu.stream).expect("an upload"),
            offset,
        }
    }

    pub(crate) fn view(&self) -> ringtp::backend::cuda::DeviceSlice<'_> {
        let whole = self.buffer.as_ref();
        whole.range(self.offset..whole.len()).expect("a part")
    }
}

/// `values` rounded to the element type.
pub(crate) fn rounded<T: Element>(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| T::from_f32(v).to_f32()).collect()
}
