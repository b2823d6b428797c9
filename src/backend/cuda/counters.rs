//! What the virtual GPU counts, where others take the time.

use std::ffi::c_char;

use super::sys;
use crate::error::{Error, Result};

type SetReport = unsafe extern "C" fn(u32) -> sys::CUresult;
type TakeReport = unsafe extern "C" fn(*mut c_char, usize, *mut usize) -> sys::CUresult;

/// The counters of the virtual GPU (`tests/vgpu`): of kernels and copies of the whole process.
/// Counting costs time, and ends when this is dropped.
#[derive(Debug)]
pub struct Counters {
    set: SetReport,
    take: TakeReport,
}

impl Counters {
    /// Begins to count, from nothing; `None` on a real driver, which does not count.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn begin() -> Result<Option<Self>> {
        let set = sys::look_up(c"vgpuSetReport", sys::VERSION_OF_EXTRAS);
        let take = sys::look_up(c"vgpuTakeReport", sys::VERSION_OF_EXTRAS);
        let (Some(set), Some(take)) = (set, take) else {
            return Ok(None);
        };
        // SAFETY: the virtual GPU exports these names with these types.
        let counters = unsafe {
            Self {
                set: std::mem::transmute::<*mut std::ffi::c_void, SetReport>(set),
                take: std::mem::transmute::<*mut std::ffi::c_void, TakeReport>(take),
            }
        };
        counters.set(1)?;
        Ok(Some(counters))
    }

    fn set(&self, on: u32) -> Result<()> {
        // SAFETY: takes a number.
        let code = unsafe { (self.set)(on) };
        sys::check(code, "vgpuSetReport", || "counting".to_owned())
    }

    /// What was counted since the last time: JSON, as `tests/vgpu/src/report/shape.rs` describes
    /// it.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn take(&mut self) -> Result<serde_json::Value> {
        let (mut text, mut length) = (Vec::<u8>::new(), 1 << 16);
        // With too little room nothing is taken, and the length that is needed is told.
        while text.len() < length {
            text.resize(length, 0);
            // SAFETY: writes at most that many bytes, and one number.
            let code = unsafe { (self.take)(text.as_mut_ptr().cast(), text.len(), &mut length) };
            sys::check(code, "vgpuTakeReport", || "reading counters".to_owned())?;
        }
        let words = text[..length]
            .strip_suffix(b"\0")
            .unwrap_or(&text[..length]);
        serde_json::from_slice(words).map_err(|error| {
            Error::input(
                "the virtual GPU's report",
                "JSON",
                error,
                "build the virtual GPU and ringtp from one source",
            )
        })
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        // SAFETY: takes a number.
        sys::check_in_drop(unsafe { (self.set)(0) }, "vgpuSetReport");
    }
}
