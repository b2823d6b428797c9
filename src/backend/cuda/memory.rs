//! Device memory: slabs, buffers cut from them, and views.
//!
//! A slab is one `cuMemAlloc`, which peers reach once they have access to the device (memory of
//! the stream-ordered pools is not covered by that). Buffers are cut from slabs, so that a step
//! neither allocates nor frees in the driver: both would synchronise the device, and a peer may
//! be spinning on it.
//!
//! Not `cust`'s `DeviceBuffer`: it frees in the driver when dropped, in whatever context is
//! current, and has no slabs.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::Context;
use super::sys::{self, CUresult, check, check_in_drop};
use crate::error::{Error, Fault, Result};

/// Buffers start at multiples of this many bytes: 16-byte accesses, and no two buffers in one
/// sector or cache line of 128.
pub const BUFFER_ALIGN: usize = 256;

/// One allocation of the driver.
#[derive(Debug)]
struct Slab {
    context: Context,
    address: u64,
    len: usize,
}

impl Slab {
    fn new(context: &Context, len: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: writes one address.
        let code = unsafe { sys::cuMemAlloc_v2(&mut address, len) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory(Fault::new(
                format!("memory of CUDA device {}", context.ordinal()),
                format!("{len} bytes in one piece"),
                "less than that free",
                "use smaller sizes or more ranks, or free memory on the device",
            )));
        }
        check(code, "cuMemAlloc", || {
            format!(
                "allocating {len} bytes on CUDA device {}",
                context.ordinal()
            )
        })?;
        Ok(Self {
            context: context.clone(),
            address,
            len,
        })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: allocated here and not freed before; every buffer of it holds the pool.
            check_in_drop(unsafe { sys::cuMemFree_v2(self.address) }, "cuMemFree");
        }
    }
}

/// A slab and the ranges of it that are free, in order and never adjacent.
#[derive(Debug)]
struct Shared {
    slab: Slab,
    free: Vec<Range<usize>>,
}

impl Shared {
    /// Takes `len` bytes from the first range that has them.
    fn take(&mut self, len: usize) -> Option<usize> {
        let at = self.free.iter().position(|range| range.len() >= len)?;
        let start = self.free[at].start;
        self.free[at].start += len;
        if self.free[at].is_empty() {
            self.free.remove(at);
        }
        Some(start)
    }

    fn give_back(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let at = self.free.partition_point(|other| other.start < range.start);
        self.free.insert(at, range);
        if at + 1 < self.free.len() && self.free[at].end == self.free[at + 1].start {
            self.free[at].end = self.free[at + 1].end;
            self.free.remove(at + 1);
        }
        if at > 0 && self.free[at - 1].end == self.free[at].start {
            self.free[at - 1].end = self.free[at].end;
            self.free.remove(at);
        }
    }
}

/// A device's memory for one rank. Clones share the slabs.
///
/// A buffer that is dropped may be handed out again at once, while work that uses it is still in
/// a stream. That is right as long as the work on the pool's buffers is in one stream, the
/// rank's; who uses several, or lets peers use a buffer, keeps it until they are done.
#[derive(Clone, Debug)]
pub struct DevicePool {
    context: Context,
    slab_len: usize,
    slabs: Arc<Mutex<Vec<Shared>>>,
}

impl DevicePool {
    /// A pool that allocates slabs of `slab_len` bytes (and larger ones for larger buffers).
    ///
    /// With 0, every buffer is an allocation of its own of exactly its bytes, freed when it is
    /// dropped: the virtual GPU and compute-sanitizer then see its bounds.
    pub fn new(context: &Context, slab_len: usize) -> Self {
        Self {
            context: context.clone(),
            slab_len,
            slabs: Arc::default(),
        }
    }

    /// The context that the memory is of.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Bytes of a slab: see [`Self::new`].
    pub fn slab_len(&self) -> usize {
        self.slab_len
    }

    /// Takes memory now that buffers need later, if they have no more than `len` bytes together, each
    /// rounded up to [`BUFFER_ALIGN`], and go in the reverse of the order in which they come: such
    /// buffers are cut from the front of one piece, so that what is left of it is whole. No others
    /// may be made from the pool then. Without slabs it does nothing: every buffer is on its own.
    ///
    /// # Errors
    /// As [`Self::buffer`].
    pub fn reserve(&self, len: usize) -> Result<()> {
        match self.slab_len {
            0 => Ok(()),
            _ => self.buffer(len).map(drop),
        }
    }

    /// A buffer of `len` bytes, whatever they hold, at a multiple of [`BUFFER_ALIGN`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn buffer(&self, len: usize) -> Result<DeviceBuffer> {
        if self.slab_len == 0 {
            let slab = Slab::new(&self.context, len.max(1))?;
            return Ok(DeviceBuffer {
                address: slab.address,
                len,
                home: Home::Own(slab),
            });
        }
        let whole = len.max(1).checked_next_multiple_of(BUFFER_ALIGN);
        let whole = whole.ok_or_else(|| {
            Error::input(
                "device buffer",
                "a size in memory",
                len,
                "use smaller sizes",
            )
        })?;
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let found = slabs.iter_mut().find_map(|shared| {
            let start = shared.take(whole)?;
            Some(shared.slab.address + start as u64)
        });
        let address = match found {
            Some(address) => address,
            None => {
                let slab = match Slab::new(&self.context, whole.max(self.slab_len)) {
                    // Perhaps there is less left than a slab, and yet enough.
                    Err(Error::OutOfMemory(_)) if whole < self.slab_len => {
                        Slab::new(&self.context, whole)?
                    }
                    slab => slab?,
                };
                let address = slab.address;
                let mut shared = Shared {
                    free: Vec::new(),
                    slab,
                };
                shared.give_back(whole..shared.slab.len);
                slabs.push(shared);
                address
            }
        };
        drop(slabs);
        Ok(DeviceBuffer {
            address,
            len,
            home: Home::Pool(self.clone()),
        })
    }

    /// A buffer of zeros; `stream` fills it.
    pub fn zeros(&self, len: usize, stream: &super::Stream) -> Result<DeviceBuffer> {
        let mut buffer = self.buffer(len)?;
        stream.fill(0, &mut buffer.as_mut())?;
        Ok(buffer)
    }

    /// A buffer with the bytes of `values`.
    pub fn upload<T: bytemuck::NoUninit>(
        &self,
        values: &[T],
        stream: &super::Stream,
    ) -> Result<DeviceBuffer> {
        let mut buffer = self.buffer(size_of_val(values))?;
        stream.upload(values, &mut buffer.as_mut())?;
        Ok(buffer)
    }

    /// Bytes of all slabs, and of those the bytes that no buffer has.
    pub fn usage(&self) -> (usize, usize) {
        let slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let total = slabs.iter().map(|shared| shared.slab.len).sum();
        let free = slabs
            .iter()
            .flat_map(|s| s.free.iter().map(Range::len))
            .sum();
        (total, free)
    }

    /// Bytes that a buffer of `len` takes of a slab.
    pub(super) fn taken_by(&self, len: usize) -> usize {
        len.max(1).next_multiple_of(BUFFER_ALIGN)
    }

    fn give_back(&self, address: u64, len: usize) {
        let whole = self.taken_by(len);
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let home = slabs.iter_mut().find(|shared| {
            (shared.slab.address..shared.slab.address + shared.slab.len as u64).contains(&address)
        });
        if let Some(shared) = home {
            let start = (address - shared.slab.address) as usize;
            shared.give_back(start..start + whole);
        }
    }
}

#[derive(Debug)]
enum Home {
    Pool(DevicePool),
    Own(#[expect(dead_code, reason = "kept until the buffer goes")] Slab),
}

/// Bytes of device memory; back in the pool when dropped.
#[derive(Debug)]
pub struct DeviceBuffer {
    address: u64,
    len: usize,
    home: Home,
}

impl DeviceBuffer {
    /// The device address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, to read.
    pub fn as_ref(&self) -> DeviceSlice<'_> {
        // SAFETY: the buffer has these bytes and outlives the view.
        unsafe { DeviceSlice::from_raw(self.address, self.len) }
    }

    /// All of it, to write.
    pub fn as_mut(&mut self) -> DeviceSliceMut<'_> {
        // SAFETY: the buffer has these bytes, outlives the view and is borrowed for it alone.
        unsafe { DeviceSliceMut::from_raw(self.address, self.len) }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Home::Pool(pool) = &self.home {
            pool.give_back(self.address, self.len);
        }
    }
}

/// A view of device memory, to read: an address and a number of bytes.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a> {
    address: u64,
    len: usize,
    _memory: PhantomData<&'a [u8]>,
}

/// A view of device memory, to write.
#[derive(Debug)]
pub struct DeviceSliceMut<'a> {
    address: u64,
    len: usize,
    _memory: PhantomData<&'a mut [u8]>,
}

/// `range` within `len` bytes, or an error.
fn part(address: u64, len: usize, range: Range<usize>) -> Result<(u64, usize)> {
    if range.start <= range.end && range.end <= len {
        Ok((address + range.start as u64, range.len()))
    } else {
        Err(Error::shape(
            "a part of device memory",
            format!("bytes within 0..{len}"),
            format!("{}..{}", range.start, range.end),
        ))
    }
}

impl<'a> DeviceSlice<'a> {
    /// Memory of somebody else's.
    ///
    /// # Safety
    /// `len` bytes from `address` on are memory that the device (of the stream it is used in)
    /// can read, and stay so for `'a` and until the work that uses the view is done.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self {
            address,
            len,
            _memory: PhantomData,
        }
    }

    /// The device address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// These bytes of it.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are not all within.
    pub fn range(self, range: Range<usize>) -> Result<Self> {
        let (address, len) = part(self.address, self.len, range)?;
        // SAFETY: a part of this view.
        Ok(unsafe { Self::from_raw(address, len) })
    }
}

impl<'a> DeviceSliceMut<'a> {
    /// Memory of somebody else's.
    ///
    /// # Safety
    /// `len` bytes from `address` on are memory that the device (of the stream it is used in)
    /// can read and write, and stay so for `'a` and until the work that uses the view is done.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self {
            address,
            len,
            _memory: PhantomData,
        }
    }

    /// The device address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// These bytes of it.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are not all within.
    pub fn range(self, range: Range<usize>) -> Result<Self> {
        let (address, len) = part(self.address, self.len, range)?;
        // SAFETY: a part of this view.
        Ok(unsafe { Self::from_raw(address, len) })
    }

    /// The same memory for a shorter time.
    pub fn reborrow(&mut self) -> DeviceSliceMut<'_> {
        // SAFETY: this view is borrowed for as long.
        unsafe { DeviceSliceMut::from_raw(self.address, self.len) }
    }

    /// The same memory, to read.
    pub fn as_ref(&self) -> DeviceSlice<'_> {
        // SAFETY: this view is borrowed for as long.
        unsafe { DeviceSlice::from_raw(self.address, self.len) }
    }
}
