//! Host memory that devices reach: pinned, mapped and portable.
//!
//! Not `cust`'s `LockedBuffer`: `cuMemAllocHost` takes no flags, and a control page must be
//! mapped for every device, whichever context was current.

use std::marker::PhantomData;

use super::sys::{self, check, check_in_drop};
use super::{Context, DeviceSliceMut};
use crate::error::{Error, Result};

/// `len` values in host memory that every device can read and write while the host does: for
/// control blocks and diagnosis. It can be read even when a context is lost.
///
/// The host reads and writes one value at a time with [`read`](Self::read) and
/// [`write`](Self::write), which are volatile; values are one scalar, so that a device sees them
/// whole. What orders them is the protocol's business.
#[derive(Debug)]
pub struct Pinned<T: bytemuck::Pod> {
    context: Context,
    host: *mut T,
    device: u64,
    len: usize,
    _values: PhantomData<T>,
}

// SAFETY: the memory is of the process, not of a thread; accesses are volatile scalars.
unsafe impl<T: bytemuck::Pod + Send> Send for Pinned<T> {}
// SAFETY: as above; `write` through a shared reference races with no reference to the values,
// since none is given out.
unsafe impl<T: bytemuck::Pod + Sync> Sync for Pinned<T> {}

impl<T: bytemuck::Pod> Pinned<T> {
    /// `len` values of zero bytes. Allocating it synchronises devices: do it before the first
    /// collective.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`Error::Input`] if the bytes are more than can be.
    pub fn zeros(context: &Context, len: usize) -> Result<Self> {
        let bytes = len
            .max(1)
            .checked_mul(size_of::<T>().max(1))
            .ok_or_else(|| {
                Error::input(
                    "pinned memory",
                    "a size in memory",
                    len,
                    "use smaller sizes",
                )
            })?;
        let _entered = context.enter()?;
        let mut host = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: writes one pointer.
        let code = unsafe { sys::cuMemHostAlloc(&mut host, bytes, flags) };
        check(code, "cuMemHostAlloc", || {
            format!("pinning {bytes} bytes of host memory")
        })?;
        // SAFETY: the driver gave this many bytes, aligned to a page.
        unsafe { std::ptr::write_bytes(host.cast::<u8>(), 0, bytes) };
        let mut pinned = Self {
            context: context.clone(),
            host: host.cast(),
            device: 0,
            len,
            _values: PhantomData,
        };
        // SAFETY: writes one address; the memory is mapped.
        let code = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut pinned.device, host, 0) };
        check(code, "cuMemHostGetDevicePointer", || {
            format!("mapping {bytes} bytes of host memory")
        })?;
        Ok(pinned)
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address for devices.
    pub fn device_address(&self) -> u64 {
        self.device
    }

    /// The address for the host.
    pub fn as_ptr(&self) -> *mut T {
        self.host
    }

    /// The memory as the device sees it.
    pub fn as_device(&mut self) -> DeviceSliceMut<'_> {
        // SAFETY: mapped for as long as `self` lives.
        unsafe { DeviceSliceMut::from_raw(self.device, self.len * size_of::<T>()) }
    }

    fn at(&self, index: usize) -> *mut T {
        assert!(
            index < self.len,
            "value {index} of {} pinned ones",
            self.len
        );
        // SAFETY: within the allocation.
        unsafe { self.host.add(index) }
    }

    /// Reads one value.
    ///
    /// # Panics
    /// If there is none at `index`.
    pub fn read(&self, index: usize) -> T {
        // SAFETY: any bytes are a value of a Pod type; within the allocation.
        unsafe { self.at(index).read_volatile() }
    }

    /// Writes one value.
    ///
    /// # Panics
    /// If there is none at `index`.
    pub fn write(&self, index: usize, value: T) {
        // SAFETY: within the allocation, to which no reference exists.
        unsafe { self.at(index).write_volatile(value) }
    }
}

impl<T: bytemuck::Pod> Drop for Pinned<T> {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: allocated here and not freed before.
            check_in_drop(
                unsafe { sys::cuMemFreeHost(self.host.cast()) },
                "cuMemFreeHost",
            );
        }
    }
}
