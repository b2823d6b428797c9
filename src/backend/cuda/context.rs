//! Devices and their primary contexts.
//!
//! A primary context is the one that a device shares among all libraries of a process (the CUDA
//! runtime, cuBLAS, another engine), so what they allocated can be used here and the other way
//! round; contexts of one's own would take turns on the device. A call pushes the context when
//! it begins and pops it when it ends ([`Context::enter`]): nothing is assumed of the calling
//! thread, and nothing is left behind in it.

use std::marker::PhantomData;
use std::sync::Arc;

use cust::device::Device;

use super::sys::{self, CUdevice_attribute, CUresult, check, check_in_drop};
use crate::error::{Error, Result};

pub use super::sys::CUdevice_P2PAttribute_enum as P2pAttribute;
pub use super::sys::CUdevice_attribute_enum as DeviceAttribute;

/// A device's primary context, held as long as a clone of this lives.
#[derive(Clone, Debug)]
pub struct Context {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Holds the primary context; lets go of it when dropped.
    context: cust::context::Context,
    device: Device,
    ordinal: usize,
    name: String,
    limits: Limits,
}

/// What launches are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Compute capability: 90 for 9.0.
    pub compute_capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Blocks in each direction of a grid.
    pub grid: [u32; 3],
    /// Threads in each direction of a block.
    pub block: [u32; 3],
    /// Threads of a block.
    pub threads_per_block: u32,
    /// Bytes of shared memory of a block, with opting in.
    pub shared_per_block: u32,
    /// Whether cooperative launches are possible.
    pub cooperative: bool,
}

/// Initialises the driver; the first call in a process that can say that there is none.
fn initialise() -> Result<()> {
    // SAFETY: no arguments but the flags, which must be 0; may be called again.
    let code = unsafe { sys::cuInit(0) };
    check(code, "cuInit", || "starting the CUDA driver".to_owned())
}

impl Context {
    /// The devices that the driver shows.
    ///
    /// # Errors
    /// [`Error::Driver`]: no driver, or no device.
    pub fn device_count() -> Result<usize> {
        initialise()?;
        let mut count = 0;
        // SAFETY: writes one integer.
        let code = unsafe { sys::cuDeviceGetCount(&mut count) };
        check(code, "cuDeviceGetCount", || {
            "counting the devices".to_owned()
        })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The newest CUDA that the driver is for: 13000 for 13.0.
    pub fn driver_version() -> Result<i32> {
        let mut version = 0;
        // SAFETY: writes one integer.
        let code = unsafe { sys::cuDriverGetVersion(&mut version) };
        check(code, "cuDriverGetVersion", || {
            "asking the driver's version".to_owned()
        })?;
        Ok(version)
    }

    /// Whether the driver is this project's virtual GPU (`tests/vgpu`), whose clock measures
    /// nothing.
    pub fn is_virtual() -> bool {
        sys::is_virtual()
    }

    /// The primary context of device `ordinal`, counted from 0.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no such device; [`Error::Driver`] if it cannot be used.
    pub fn new(ordinal: usize) -> Result<Self> {
        let count = Self::device_count()?;
        let index = u32::try_from(ordinal).ok().filter(|_| ordinal < count);
        let Some(index) = index else {
            return Err(Error::input(
                "CUDA device",
                format!("one of the {count} devices, counted from 0"),
                ordinal,
                "name a device that there is (nvidia-smi lists them)",
            ));
        };
        let doing = || format!("opening CUDA device {ordinal}");
        let device = Device::get_device(index).map_err(|e| from_cust(e, "cuDeviceGet", doing()))?;
        let name = device
            .name()
            .map_err(|e| from_cust(e, "cuDeviceGetName", doing()))?;

        // Held here first, because only this call's code is checked as a number: a device that
        // another process has for itself is a code that cust's enum does not have.
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device.as_raw()) };
        check(code, "cuDevicePrimaryCtxRetain", doing)?;
        let context = keep_current(|| cust::context::Context::new(device));
        // SAFETY: gives back what was retained above.
        let code = unsafe { sys::cuDevicePrimaryCtxRelease_v2(device.as_raw()) };
        let context = context?.map_err(|e| from_cust(e, "cuDevicePrimaryCtxRetain", doing()))?;
        check(code, "cuDevicePrimaryCtxRelease", doing)?;

        let limits = Limits::of(device.as_raw())?;
        Ok(Self {
            inner: Arc::new(Inner {
                context,
                device,
                ordinal,
                name,
                limits,
            }),
        })
    }

    /// Makes the context current in this thread until the value is dropped.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context is held by `self`.
        let code = unsafe { sys::cuCtxPushCurrent_v2(self.raw()) };
        check(code, "cuCtxPushCurrent", || {
            format!("entering the context of CUDA device {}", self.ordinal())
        })?;
        Ok(Entered {
            _context: self,
            _this_thread: PhantomData,
        })
    }

    pub(super) fn raw(&self) -> sys::CUcontext {
        self.inner.context.as_raw().cast()
    }

    /// The device's number, from 0.
    pub fn ordinal(&self) -> usize {
        self.inner.ordinal
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What launches are checked against.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Bytes of the device's memory.
    pub fn total_memory(&self) -> Result<usize> {
        self.inner.device.total_memory().map_err(|e| {
            from_cust(
                e,
                "cuDeviceTotalMem",
                format!("asking CUDA device {}", self.ordinal()),
            )
        })
    }

    /// Bytes of the device's memory that are free now, and all of them. Other processes, and
    /// other ranks on the device, take of what is free.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        let code = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        check(code, "cuMemGetInfo", || {
            format!("asking CUDA device {} for its memory", self.ordinal())
        })?;
        Ok((free, total))
    }

    /// An attribute of the device.
    pub fn attribute(&self, attribute: DeviceAttribute) -> Result<i32> {
        attribute_of(self.inner.device.as_raw(), attribute)
    }

    /// Whether kernels of this device can reach memory of `peer`, another device.
    pub fn can_access(&self, peer: &Self) -> Result<bool> {
        let mut can = 0;
        let (own, other) = (self.inner.device.as_raw(), peer.inner.device.as_raw());
        // SAFETY: writes one integer.
        let code = unsafe { sys::cuDeviceCanAccessPeer(&mut can, own, other) };
        check(code, "cuDeviceCanAccessPeer", || {
            format!(
                "asking whether device {} reaches device {}",
                self.ordinal(),
                peer.ordinal()
            )
        })?;
        Ok(can != 0)
    }

    /// Lets kernels of this device reach what is and will be allocated on `peer`. On the device
    /// itself, and where it is so already, nothing needs to be done.
    pub fn enable_access(&self, peer: &Self) -> Result<()> {
        if self.ordinal() == peer.ordinal() {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: both contexts are held; the flags must be 0.
        let code = unsafe { sys::cuCtxEnablePeerAccess(peer.raw(), 0) };
        if code == CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED {
            return Ok(());
        }
        check(code, "cuCtxEnablePeerAccess", || {
            format!(
                "letting device {} reach device {}",
                self.ordinal(),
                peer.ordinal()
            )
        })
    }

    /// What the driver says of the way to `peer`, another device.
    pub fn p2p_attribute(&self, peer: &Self, attribute: P2pAttribute) -> Result<i32> {
        let mut value = 0;
        let (own, other) = (self.inner.device.as_raw(), peer.inner.device.as_raw());
        // SAFETY: writes one integer.
        let code = unsafe { sys::cuDeviceGetP2PAttribute(&mut value, attribute, own, other) };
        check(code, "cuDeviceGetP2PAttribute", || {
            format!(
                "asking about the way from device {} to device {}",
                self.ordinal(),
                peer.ordinal()
            )
        })?;
        Ok(value)
    }

    /// Whether peers that have access to this device reach the memory at `address`: memory of
    /// `cuMemAlloc` they do, that of stream-ordered pools, of the host and of other devices not
    /// by that alone.
    pub fn is_reached_by_peers(&self, address: u64) -> Result<bool> {
        use sys::CUpointer_attribute as A;
        let ask = |attribute: A| -> Result<u32> {
            let mut value: u32 = 0;
            // SAFETY: writes an integer, or a bool in its low byte.
            let code =
                unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), attribute, address) };
            if code == CUresult::CUDA_ERROR_INVALID_VALUE {
                return Ok(0);
            }
            check(code, "cuPointerGetAttribute", || {
                format!("asking about the memory at {address:#x}")
            })?;
            Ok(value)
        };
        let _entered = self.enter()?;
        // What can be shared with another process by the old calls came from cuMemAlloc.
        let plain = ask(A::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE)? & 0xff != 0;
        let device = ask(A::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)?;
        Ok(plain && device as usize == self.ordinal())
    }

    /// Waits for all work of the context. It waits as long as a kernel runs, so nothing that a
    /// peer may be spinning on belongs behind it.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: no arguments.
        let code = unsafe { sys::cuCtxSynchronize() };
        check(code, "cuCtxSynchronize", || {
            format!("waiting for CUDA device {}", self.ordinal())
        })
    }
}

/// A context that is current in this thread; popped when dropped.
#[derive(Debug)]
pub struct Entered<'a> {
    _context: &'a Context,
    /// Another thread's stack of contexts is not this one's.
    _this_thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: writes one pointer; `enter` pushed what is popped.
        check_in_drop(
            unsafe { sys::cuCtxPopCurrent_v2(&mut popped) },
            "cuCtxPopCurrent",
        );
    }
}

/// Runs `body`, which changes the thread's current context, and puts it back.
fn keep_current<T>(body: impl FnOnce() -> T) -> Result<T> {
    let doing = || "keeping the thread's current context".to_owned();
    let mut before = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    let code = unsafe { sys::cuCtxGetCurrent(&mut before) };
    check(code, "cuCtxGetCurrent", doing)?;
    let result = body();
    // SAFETY: `before` was current until now; null takes away.
    let code = unsafe { sys::cuCtxSetCurrent(before) };
    check(code, "cuCtxSetCurrent", doing)?;
    Ok(result)
}

fn attribute_of(device: i32, attribute: CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: writes one integer.
    let code = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
    check(code, "cuDeviceGetAttribute", || {
        format!("asking device {device} for attribute {}", attribute.0)
    })?;
    Ok(value)
}

impl Limits {
    fn of(device: i32) -> Result<Self> {
        use DeviceAttribute as A;
        let ask = |attribute| -> Result<u32> {
            Ok(u32::try_from(attribute_of(device, attribute)?).unwrap_or(0))
        };
        Ok(Self {
            compute_capability: ask(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + ask(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            multiprocessors: ask(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            grid: [
                ask(A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?,
                ask(A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y)?,
                ask(A::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z)?,
            ],
            block: [
                ask(A::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X)?,
                ask(A::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y)?,
                ask(A::CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z)?,
            ],
            threads_per_block: ask(A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            shared_per_block: ask(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            cooperative: ask(A::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0,
        })
    }
}

/// The error of a call that `cust` made.
fn from_cust(error: cust::error::CudaError, call: &'static str, doing: String) -> Error {
    sys::error(sys::cudaError_enum(error as u32), call, || doing)
}
