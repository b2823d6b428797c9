//! Activations in device memory: rows of elements.

use super::{DeviceSlice, DeviceSliceMut};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// How rows lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    /// Element type.
    pub dtype: DType,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Elements from the start of a row to that of the next.
    pub stride: usize,
}

impl RowLayout {
    /// `[rows, cols]` without gaps.
    pub fn contiguous(dtype: DType, rows: usize, cols: usize) -> Self {
        Self {
            dtype,
            rows,
            cols,
            stride: cols,
        }
    }

    /// Bytes from the first element to the end of the last; `None` beyond `usize`.
    pub fn bytes(&self) -> Option<usize> {
        if self.rows == 0 || self.cols == 0 {
            return Some(0);
        }
        let elements = (self.rows - 1)
            .checked_mul(self.stride)?
            .checked_add(self.cols)?;
        elements.checked_mul(self.dtype.size())
    }

    /// Bytes of the elements, gaps left out.
    pub fn payload(&self) -> u64 {
        (self.rows * self.cols * self.dtype.size()) as u64
    }

    /// Whether rows, the first at `address`, start at multiples of 16 bytes.
    pub(super) fn is_aligned(&self, address: u64) -> bool {
        address.is_multiple_of(16)
            && (self.rows <= 1 || (self.stride * self.dtype.size()).is_multiple_of(16))
    }

    fn check(&self, address: u64, len: usize, writes: bool) -> Result<()> {
        let size = self.dtype.size();
        if !address.is_multiple_of(size as u64) {
            return Err(Error::shape(
                "rows in device memory",
                format!("an address that is a multiple of {size}"),
                format!("{address:#x}"),
            ));
        }
        // Rows that overlap can be read, not written.
        if writes && self.rows > 1 && self.stride < self.cols {
            return Err(Error::shape(
                "rows in device memory",
                format!("a stride of at least {} elements", self.cols),
                self.stride,
            ));
        }
        match self.bytes() {
            Some(bytes) if bytes <= len => Ok(()),
            bytes => Err(Error::shape(
                "rows in device memory",
                format!(
                    "at least {} bytes for {self:?}",
                    bytes.unwrap_or(usize::MAX)
                ),
                len,
            )),
        }
    }
}

/// Rows to read, `[rows, cols]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: DeviceSlice<'a>,
    layout: RowLayout,
}

/// Rows to write, `[rows, cols]`.
#[derive(Debug)]
pub struct RowsMut<'a> {
    data: DeviceSliceMut<'a>,
    layout: RowLayout,
}

impl<'a> Rows<'a> {
    /// The rows that lie so in `data`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is too short or not at a multiple of the element's size.
    pub fn new(data: DeviceSlice<'a>, layout: RowLayout) -> Result<Self> {
        layout.check(data.address(), data.len(), false)?;
        Ok(Self { data, layout })
    }

    /// The bytes that they lie in.
    pub fn data(&self) -> DeviceSlice<'a> {
        self.data
    }

    /// The address of the first element.
    pub fn address(&self) -> u64 {
        self.data.address()
    }

    /// How they lie.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }
}

impl<'a> RowsMut<'a> {
    /// The rows that lie so in `data`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` is too short or not at a multiple of the element's size, or
    /// if rows overlap.
    pub fn new(data: DeviceSliceMut<'a>, layout: RowLayout) -> Result<Self> {
        layout.check(data.address(), data.len(), true)?;
        Ok(Self { data, layout })
    }

    /// The bytes that they lie in.
    pub fn into_data(self) -> DeviceSliceMut<'a> {
        self.data
    }

    /// The address of the first element.
    pub fn address(&self) -> u64 {
        self.data.address()
    }

    /// How they lie.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }
}

/// `[len]` f32, or an error that names `what`.
pub(super) fn check_vector(what: &str, vector: DeviceSlice<'_>, len: usize) -> Result<()> {
    if !vector.address().is_multiple_of(4) || vector.len() != len * size_of::<f32>() {
        return Err(Error::shape(
            what,
            format!("{len} f32 at a multiple of 4"),
            format!("{} bytes at {:#x}", vector.len(), vector.address()),
        ));
    }
    Ok(())
}

/// `n` as the kernels count, if it is at most `most`.
pub(super) fn count(what: &str, n: usize, most: u32) -> Result<u32> {
    let count = u32::try_from(n).ok().filter(|&n| n <= most);
    count.ok_or_else(|| Error::shape(what, format!("at most {most}"), n))
}
