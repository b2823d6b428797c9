//! Streams: what is put into one runs in order.
//!
//! Not `cust`'s: its `Stream::new` takes the flag `NON_BLOCKING` away, and a stream without it
//! waits for the NULL stream, which any library in the process may use; nor does it take in a
//! foreign `CUstream`.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::event::Event;
use super::sys::{self, CUresult, check, check_in_drop};
use super::{Context, DeviceSlice, DeviceSliceMut};
use crate::error::{Error, Result};

/// A queue of work on one device. A rank has one.
#[derive(Debug)]
pub struct Stream {
    context: Context,
    raw: sys::CUstream,
    /// Whether this made it and must destroy it.
    own: bool,
    waits: AtomicU64,
}

// SAFETY: a CUstream is a handle that any thread may use; calls on it are thread-safe.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream that does not wait for the NULL stream.
    pub fn new(context: &Context) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING.0;
        // SAFETY: writes one pointer.
        let code = unsafe { sys::cuStreamCreate(&mut raw, flags) };
        check(code, "cuStreamCreate", || {
            format!("making a stream on CUDA device {}", context.ordinal())
        })?;
        Ok(Self {
            context: context.clone(),
            raw,
            own: true,
            waits: AtomicU64::new(0),
        })
    }

    /// A stream of somebody else's: a `CUstream` (or `cudaStream_t`) of the device's primary
    /// context. It is used and not destroyed.
    ///
    /// # Safety
    /// `raw` is such a stream and outlives this value.
    pub unsafe fn from_raw(context: &Context, raw: *mut c_void) -> Self {
        Self {
            context: context.clone(),
            raw: raw.cast(),
            own: false,
            waits: AtomicU64::new(0),
        }
    }

    /// The `CUstream`, for other libraries.
    pub fn as_raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// The context that the stream is of.
    pub fn context(&self) -> &Context {
        &self.context
    }

    fn name(&self) -> String {
        format!("the stream of CUDA device {}", self.context.ordinal())
    }

    /// How often the host has waited for work of the stream, through this value.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    fn count_a_wait(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until the stream has passed `event`, which was recorded in it.
    pub(super) fn wait_until_past(&self, event: &Event) -> Result<()> {
        self.count_a_wait();
        event.synchronize()
    }

    /// Waits until all that was put in has run. It waits without a bound: see
    /// [`Self::wait_until_idle`] where peers are involved.
    ///
    /// # Errors
    /// [`Error::Driver`], also of work that failed.
    pub fn synchronize(&self) -> Result<()> {
        self.count_a_wait();
        let _entered = self.context.enter()?;
        // SAFETY: the stream is alive.
        let code = unsafe { sys::cuStreamSynchronize(self.raw) };
        check(code, "cuStreamSynchronize", || {
            format!("waiting for {}", self.name())
        })
    }

    /// Whether all that was put in has run.
    ///
    /// # Errors
    /// [`Error::Driver`], also of work that failed.
    pub fn is_idle(&self) -> Result<bool> {
        let _entered = self.context.enter()?;
        // SAFETY: the stream is alive.
        let code = unsafe { sys::cuStreamQuery(self.raw) };
        if code == CUresult::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        check(code, "cuStreamQuery", || {
            format!("asking about {}", self.name())
        })?;
        Ok(true)
    }

    /// Waits until all that was put in has run, but no longer than `most`; whether it has.
    ///
    /// # Errors
    /// [`Error::Driver`], also of work that failed.
    pub fn wait_until_idle(&self, most: Duration) -> Result<bool> {
        self.count_a_wait();
        let begin = Instant::now();
        let mut pause = Duration::from_micros(10);
        while !self.is_idle()? {
            if begin.elapsed() >= most {
                return Ok(false);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        Ok(true)
    }

    /// Makes what is put in from now on wait for `event`.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: both are alive; the flags must be 0.
        let code = unsafe { sys::cuStreamWaitEvent(self.raw, event.raw(), 0) };
        check(code, "cuStreamWaitEvent", || {
            format!("making {} wait for an event", self.name())
        })
    }

    /// Makes what is put in from now on wait for what was put into `other` so far.
    pub fn wait_for_stream(&self, other: &Self) -> Result<()> {
        let event = Event::new(other.context())?;
        event.record(other)?;
        self.wait_for(&event)
    }

    /// Copies from the host and waits for it, so that `from` may go when it returns.
    ///
    /// # Errors
    /// [`Error::Shape`] if the lengths in bytes differ; [`Error::Driver`].
    pub fn upload<T: bytemuck::NoUninit>(
        &self,
        from: &[T],
        to: &mut DeviceSliceMut<'_>,
    ) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(from);
        same_length("upload", bytes.len(), to.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let entered = self.context.enter()?;
        // SAFETY: both sides have that many bytes, and stay until the stream is synchronized.
        let code = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address(), bytes.as_ptr().cast(), bytes.len(), self.raw)
        };
        check(code, "cuMemcpyHtoDAsync", || {
            format!(
                "copying {} bytes to CUDA device {}",
                bytes.len(),
                self.context.ordinal()
            )
        })?;
        drop(entered);
        self.synchronize()
    }

    /// Copies to the host and waits for it, and so for all that was put in before.
    ///
    /// # Errors
    /// [`Error::Shape`] if the lengths in bytes differ; [`Error::Driver`].
    pub fn download<T: bytemuck::NoUninit + bytemuck::AnyBitPattern>(
        &self,
        from: DeviceSlice<'_>,
        to: &mut [T],
    ) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(to);
        same_length("download", from.len(), bytes.len())?;
        if bytes.is_empty() {
            return self.synchronize();
        }
        let entered = self.context.enter()?;
        // SAFETY: both sides have that many bytes, and stay until the stream is synchronized.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                bytes.as_mut_ptr().cast(),
                from.address(),
                bytes.len(),
                self.raw,
            )
        };
        check(code, "cuMemcpyDtoHAsync", || {
            format!(
                "copying {} bytes from CUDA device {}",
                bytes.len(),
                self.context.ordinal()
            )
        })?;
        drop(entered);
        self.synchronize()
    }

    /// Copies between device memories, also of different devices.
    ///
    /// # Errors
    /// [`Error::Shape`] if the lengths differ; [`Error::Driver`].
    pub fn copy(&self, from: DeviceSlice<'_>, to: &mut DeviceSliceMut<'_>) -> Result<()> {
        same_length("copy", from.len(), to.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: both sides have that many bytes. The pool that they are of keeps them until
        // work of its stream is done; see `DevicePool`.
        let code =
            unsafe { sys::cuMemcpyAsync(to.address(), from.address(), from.len(), self.raw) };
        check(code, "cuMemcpyAsync", || {
            format!(
                "copying {} bytes on CUDA device {}",
                from.len(),
                self.context.ordinal()
            )
        })
    }

    /// Sets every byte.
    pub fn fill(&self, value: u8, to: &mut DeviceSliceMut<'_>) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: `to` has that many bytes.
        let code = unsafe { sys::cuMemsetD8Async(to.address(), value, to.len(), self.raw) };
        check(code, "cuMemsetD8Async", || {
            format!(
                "filling {} bytes on CUDA device {}",
                to.len(),
                self.context.ordinal()
            )
        })
    }
}

fn same_length(operation: &str, from: usize, to: usize) -> Result<()> {
    if from == to {
        Ok(())
    } else {
        Err(Error::shape(
            operation,
            format!("{from} bytes to write to"),
            to,
        ))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.own {
            return;
        }
        // Destroying a stream does not wait: the driver lets its work end first.
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: made here and not destroyed before.
            check_in_drop(
                unsafe { sys::cuStreamDestroy_v2(self.raw) },
                "cuStreamDestroy",
            );
        }
    }
}
