//! Events: points in a stream that others wait for.
//!
//! Not `cust`'s: its `Event` can only be recorded on its own `Stream`, and waited for by none.

use std::time::Duration;

use super::sys::{self, CUresult, check, check_in_drop};
use super::{Context, Stream};
use crate::error::Result;

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    context: Context,
    raw: sys::CUevent,
}

// SAFETY: a CUevent is a handle that any thread may use; calls on it are thread-safe.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event that orders and takes no time.
    pub fn new(context: &Context) -> Result<Self> {
        Self::with_flags(context, sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING.0)
    }

    /// An event that takes the time.
    pub fn timed(context: &Context) -> Result<Self> {
        Self::with_flags(context, sys::CUevent_flags_enum::CU_EVENT_DEFAULT.0)
    }

    fn with_flags(context: &Context, flags: u32) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { sys::cuEventCreate(&mut raw, flags) };
        check(code, "cuEventCreate", || {
            format!("making an event on CUDA device {}", context.ordinal())
        })?;
        Ok(Self {
            context: context.clone(),
            raw,
        })
    }

    pub(super) fn raw(&self) -> sys::CUevent {
        self.raw
    }

    fn name(&self) -> String {
        format!("an event of CUDA device {}", self.context.ordinal())
    }

    /// Sets the point to after what was put into `stream` so far.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let _entered = stream.context().enter()?;
        // SAFETY: both are alive.
        let code = unsafe { sys::cuEventRecord(self.raw, stream.raw()) };
        check(code, "cuEventRecord", || {
            format!("recording {}", self.name())
        })
    }

    /// Whether the stream has passed the point.
    pub fn is_done(&self) -> Result<bool> {
        let _entered = self.context.enter()?;
        // SAFETY: the event is alive.
        let code = unsafe { sys::cuEventQuery(self.raw) };
        if code == CUresult::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        check(code, "cuEventQuery", || {
            format!("asking about {}", self.name())
        })?;
        Ok(true)
    }

    /// Waits until the stream has passed the point.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: the event is alive.
        let code = unsafe { sys::cuEventSynchronize(self.raw) };
        check(code, "cuEventSynchronize", || {
            format!("waiting for {}", self.name())
        })
    }

    /// The time from `begin` to here; both are [timed](Self::timed) and done.
    pub fn elapsed_since(&self, begin: &Self) -> Result<Duration> {
        let _entered = self.context.enter()?;
        let mut milliseconds = 0.0;
        let code = match sys::optional().event_elapsed_time {
            // SAFETY: writes one float; both events are alive.
            Some(call) => unsafe { call(&mut milliseconds, begin.raw, self.raw) },
            None => CUresult::CUDA_ERROR_NOT_SUPPORTED,
        };
        check(code, "cuEventElapsedTime", || {
            format!(
                "taking the time between two events of device {}",
                self.context.ordinal()
            )
        })?;
        Ok(Duration::from_secs_f32((milliseconds / 1e3).max(0.0)))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: made here and not destroyed before; the driver waits for who waits for it.
            check_in_drop(
                unsafe { sys::cuEventDestroy_v2(self.raw) },
                "cuEventDestroy",
            );
        }
    }
}
