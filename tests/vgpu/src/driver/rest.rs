//! Calls that happen to wait for the devices.
//!
//! "Any CUDA API call may block or synchronize for various reasons" and nothing undocumented
//! should be relied upon (CUDA Driver API, "API synchronization behavior"). So a call that is
//! known to need a device at rest waits here for all that the device had to do when it was called,
//! and orders nothing by it: whoever relies on its not waiting deadlocks, and whoever relies on its
//! waiting races. These are:
//!
//! - device and pinned host memory, made and given back ("Implicit Synchronization" in the CUDA
//!   C++ Programming Guide has both among what kernels of two streams cannot run beside). Pinned
//!   memory is mapped for every device, and waits for all of them; stream-ordered allocation for
//!   none.
//! - a kernel that is loaded lazily: "loading may require context synchronization" (the same,
//!   "Lazy Loading"). `cuModuleGetFunction` loads its kernel; one that was enumerated, or comes
//!   from a library, is loaded by the first call that needs it: `cuFuncLoad`, its attributes, its
//!   launch. With `CUDA_MODULE_LOADING=EAGER` a module's kernels are loaded with it.
//! - a graph's upload: `cuGraphUpload`, instantiation with that flag, or else the first launch.
//! - peer access, when it is enabled (`peer`).

use super::actors::wait_for_devices;
use super::{Driver, Guard, Handle, Status};

/// Waits until these devices (as bits) have done all that they have to do now.
pub(super) fn at_rest(driver: Guard, devices: u64) -> Result<Guard, Status> {
    let current = driver.healthy()?;
    let own = driver.context(current)?.device;
    let driver = wait_for_devices(driver, devices);
    driver.check(own)?;
    Ok(driver)
}

/// The same for the calling thread's device.
pub(super) fn device_at_rest(driver: Guard) -> Result<Guard, Status> {
    let device = driver.device()?;
    at_rest(driver, 1 << device)
}

/// The same for all devices that the process uses.
pub(super) fn all_at_rest(driver: Guard) -> Result<Guard, Status> {
    let devices = driver.contexts.values().map(|c| c.device);
    let devices = devices.fold(0, |all, device| all | 1 << device);
    at_rest(driver, devices)
}

impl Driver {
    /// Whether kernels are loaded with their module.
    pub(super) fn loads_eagerly() -> bool {
        std::env::var("CUDA_MODULE_LOADING").is_ok_and(|mode| mode == "EAGER")
    }
}

/// Loads the kernel of a handle of either kind into a context, where it is not yet; the function.
pub(super) fn load_function(
    mut driver: Guard,
    handle: Handle,
    context: Handle,
) -> Result<(Guard, Handle), Status> {
    let function = driver.resolve(handle, context)?;
    let loaded = driver.functions.get(&function).is_none_or(|f| f.loaded);
    if !loaded {
        let device = driver.context(context)?.device;
        driver = wait_for_devices(driver, 1 << device);
        driver.check(device)?;
        if let Some(function) = driver.functions.get_mut(&function) {
            function.loaded = true;
        }
    }
    Ok((driver, function))
}

/// The same in the calling thread's context, which only a kernel of a library needs.
pub(super) fn load_here(driver: Guard, handle: Handle) -> Result<(Guard, Handle), Status> {
    let of = driver.functions.get(&handle).map(|f| f.module);
    let known = of.and_then(|module| Some(driver.modules.get(&module)?.context));
    let context = match known {
        Some(context) => context,
        None => driver.current()?,
    };
    load_function(driver, handle, context)
}
