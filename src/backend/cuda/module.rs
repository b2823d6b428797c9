//! The crate's kernels on a device: every fatbin and every function, loaded at once and before
//! anything runs. Loading a function late would synchronise the device while a peer may be
//! spinning on it.
//!
//! Not `cust`'s `Module`: it turns the code of a driver that is too old for the PTX into
//! "unknown error", and that is the code a user will meet.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::Arc;

use super::Context;
use super::families;
use super::sys::{self, CUfunction_attribute, check, check_in_drop};
use crate::error::{Error, Result};

/// A fatbin that the build made.
pub(super) struct Fatbin {
    /// The path of its `.cu` under `cuda/`, without the ending.
    pub(super) name: &'static str,
    pub(super) image: &'static [u8],
}

/// Bytes where the driver wants them: at a multiple of 16.
#[repr(C, align(16))]
#[allow(dead_code, reason = "built without a toolkit, the list is empty")]
pub(super) struct Aligned<T: ?Sized>(pub(super) T);

#[allow(unused_imports, reason = "built without a toolkit, the list is empty")]
mod generated {
    use super::{Aligned, Fatbin};
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// A `.cu` file and the kernels that its launcher uses.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// The path of the `.cu` under `cuda/`, without the ending.
    pub name: &'static str,
    /// The names of its `extern "C"` kernels.
    pub kernels: &'static [&'static str],
}

/// The code of a family on a device.
#[derive(Debug)]
struct Module {
    context: Context,
    name: String,
    raw: sys::CUmodule,
}

// SAFETY: a CUmodule is a handle that any thread may use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    fn load(context: &Context, name: &str, image: &[u8]) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer; the image is a fatbin, whose header says how long it is.
        let code = unsafe { sys::cuModuleLoadData(&mut raw, image.as_ptr().cast()) };
        check(code, "cuModuleLoadData", || {
            let capability = context.limits().compute_capability;
            let device = context.ordinal();
            format!("loading the kernels of {name} on CUDA device {device} (sm_{capability})")
        })?;
        Ok(Self {
            context: context.clone(),
            name: name.to_owned(),
            raw,
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: loaded here and not unloaded before; functions hold the module.
            check_in_drop(unsafe { sys::cuModuleUnload(self.raw) }, "cuModuleUnload");
        }
    }
}

/// A kernel on a device, with what its launches are checked against.
#[derive(Clone, Debug)]
pub struct Function {
    module: Arc<Module>,
    raw: sys::CUfunction,
    name: &'static str,
    attributes: FunctionAttributes,
}

// SAFETY: a CUfunction is a handle that any thread may use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// What the compiler made of a kernel for this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionAttributes {
    /// Threads that a block may have.
    pub max_threads: u32,
    /// Bytes of shared memory that every block has.
    pub static_shared: u32,
    /// Bytes of shared memory that a launch may add.
    pub max_dynamic_shared: u32,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of local memory a thread.
    pub local: u32,
    /// Bytes of its one parameter; `None` if the driver cannot say (before CUDA 12.4).
    pub param_bytes: Option<usize>,
}

impl Function {
    fn load(module: &Arc<Module>, family: &str, name: &'static str) -> Result<Self> {
        let context = &module.context;
        let _entered = context.enter()?;
        let doing = || {
            format!(
                "loading kernel {name} of {family} on CUDA device {}",
                context.ordinal()
            )
        };
        let symbol = CString::new(name)
            .map_err(|_| Error::input("kernel", "a name without NUL", name, "mend the name"))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer; the name ends in zero.
        let code = unsafe { sys::cuModuleGetFunction(&mut raw, module.raw, symbol.as_ptr()) };
        check(code, "cuModuleGetFunction", doing)?;
        if let Some(load) = sys::optional().func_load {
            // SAFETY: a function of a loaded module.
            check(unsafe { load(raw) }, "cuFuncLoad", doing)?;
        }
        // Where there is no cuFuncLoad, asking for an attribute loads too.
        let ask = |attribute: CUfunction_attribute| -> Result<u32> {
            let mut value = 0;
            // SAFETY: writes one integer.
            let code = unsafe { sys::cuFuncGetAttribute(&mut value, attribute, raw) };
            check(code, "cuFuncGetAttribute", doing)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        use sys::CUfunction_attribute as A;
        let static_shared = ask(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let max_dynamic_shared = context
            .limits()
            .shared_per_block
            .saturating_sub(static_shared);
        // Opted into once, so that a launch sets nothing.
        let most = i32::try_from(max_dynamic_shared).unwrap_or(i32::MAX);
        let attribute = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: sets a number within the device's limit.
        let code = unsafe { sys::cuFuncSetAttribute(raw, attribute, most) };
        check(code, "cuFuncSetAttribute", doing)?;
        let attributes = FunctionAttributes {
            max_threads: ask(A::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            static_shared,
            max_dynamic_shared,
            registers: ask(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local: ask(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            param_bytes: param_bytes(raw),
        };
        Ok(Self {
            module: Arc::clone(module),
            raw,
            name,
            attributes,
        })
    }

    /// The family it is of.
    pub fn family(&self) -> &str {
        &self.module.name
    }

    /// The kernel's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The context it is loaded in.
    pub fn context(&self) -> &Context {
        &self.module.context
    }

    /// What the compiler made of it.
    pub fn attributes(&self) -> &FunctionAttributes {
        &self.attributes
    }

    pub(super) fn raw(&self) -> sys::CUfunction {
        self.raw
    }

    /// Blocks of `threads` threads and `shared` bytes of dynamic shared memory that fit on one
    /// multiprocessor of an empty device.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<u32> {
        let _entered = self.context().enter()?;
        let mut blocks = 0;
        // SAFETY: writes one integer.
        let code = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.raw,
                i32::try_from(threads).unwrap_or(i32::MAX),
                shared as usize,
            )
        };
        check(code, "cuOccupancyMaxActiveBlocksPerMultiprocessor", || {
            format!("asking how many blocks of {} fit", self.name)
        })?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }
}

/// Bytes of the parameters, by their offsets and sizes; they end where the last one does.
fn param_bytes(function: sys::CUfunction) -> Option<usize> {
    let info = sys::optional().func_get_param_info?;
    let mut end = 0;
    for index in 0.. {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: writes two integers; an index beyond the last is an error code.
        let code = unsafe { info(function, index, &mut offset, &mut size) };
        if code != sys::CUresult::CUDA_SUCCESS {
            // Nothing at all means that the call does not work here, not that there are none.
            return (index > 0).then_some(end);
        }
        end = end.max(offset + size);
    }
    None
}

/// All kernels of the crate on one device.
#[derive(Clone, Debug)]
pub struct Kernels {
    functions: Arc<BTreeMap<&'static str, Function>>,
    context: Context,
}

impl Kernels {
    /// Loads every kernel. It takes memory and synchronises the device: once a context, before
    /// anything runs.
    ///
    /// # Errors
    /// [`Error::Driver`]: the kernels were not built for this device, or the driver is too old.
    pub fn load(context: &Context) -> Result<Self> {
        let mut functions = BTreeMap::new();
        for family in families::ALL {
            let fatbin = generated::FATBINS.iter().find(|f| f.name == family.name);
            let Some(fatbin) = fatbin else {
                return Err(Error::input(
                    format!("kernels of {}", family.name),
                    "a fatbin made by the build",
                    "none",
                    "build with nvcc (without DOCS_RS)",
                ));
            };
            let module = Arc::new(Module::load(context, family.name, fatbin.image)?);
            for &kernel in family.kernels {
                functions.insert(kernel, Function::load(&module, family.name, kernel)?);
            }
        }
        Ok(Self {
            functions: Arc::new(functions),
            context: context.clone(),
        })
    }

    /// Loads other code: an image (fatbin, PTX ending in zero, or machine code) of an engine's or
    /// a test's own kernels. What it returns holds these alone.
    ///
    /// # Safety
    /// `image` is one of these, complete.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub unsafe fn from_image(context: &Context, family: Family, image: &[u8]) -> Result<Self> {
        let module = Arc::new(Module::load(context, family.name, image)?);
        let mut functions = BTreeMap::new();
        for &kernel in family.kernels {
            functions.insert(kernel, Function::load(&module, family.name, kernel)?);
        }
        Ok(Self {
            functions: Arc::new(functions),
            context: context.clone(),
        })
    }

    /// The same with other code for one family, as [`from_image`](Self::from_image) loads it: a
    /// variant of the crate's own kernels to try, or more of one's own.
    ///
    /// # Safety
    /// As for [`from_image`](Self::from_image); and launchers may use the kernels under these
    /// names: they take the same parameters and do the same.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub unsafe fn with_image(&self, family: Family, image: &[u8]) -> Result<Self> {
        // SAFETY: the caller vouches for the image.
        let other = unsafe { Self::from_image(&self.context, family, image)? };
        let mut functions = BTreeMap::clone(&self.functions);
        functions.extend(other.functions.iter().map(|(&name, f)| (name, f.clone())));
        Ok(Self {
            functions: Arc::new(functions),
            context: self.context.clone(),
        })
    }

    /// The context they are loaded in.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// A kernel by its name.
    ///
    /// # Errors
    /// [`Error::Input`] if no family has it.
    pub fn get(&self, name: &str) -> Result<&Function> {
        self.functions.get(name).ok_or_else(|| {
            Error::input(
                "kernel",
                "one of those loaded",
                name,
                "list it in its family",
            )
        })
    }

    /// All kernels, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Function> {
        self.functions.values()
    }
}

/// The fatbins that the build made: names and images. For checks of what is in them.
pub fn fatbins() -> impl Iterator<Item = (&'static str, &'static [u8])> {
    generated::FATBINS.iter().map(|f| (f.name, f.image))
}
