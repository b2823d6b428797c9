//! Libraries: modules that belong to no context. Their kernels are loaded into a context when
//! they are first used there, and a kernel's handle may stand wherever a function's may.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::image::Image;
use super::module::words;
use super::rest::{load_function, load_here};
use super::status::{In, Out, Outcome, Status};
use super::{Driver, Handle, KERNEL, LIBRARY, api, explain};
use crate::loader::Program;

struct Library {
    program: Arc<Program>,
    /// Its kernels.
    names: Vec<String>,
    /// The module it became in each context.
    loaded: BTreeMap<Handle, Handle>,
    kernels: BTreeMap<String, Handle>,
}

struct KernelHandle {
    library: Handle,
    name: String,
    /// Attributes that were set, for every context to come.
    attributes: BTreeMap<u32, i32>,
}

/// All libraries and the kernels asked for.
#[derive(Default)]
pub(super) struct Libraries {
    libraries: BTreeMap<Handle, Library>,
    kernels: BTreeMap<Handle, KernelHandle>,
}

impl Libraries {
    /// A context has ended, and with it the modules in it.
    pub(super) fn forget_context(&mut self, context: Handle) {
        for library in self.libraries.values_mut() {
            library.loaded.remove(&context);
        }
    }
}

impl Driver {
    fn library(&self, library: Handle) -> Result<&Library, Status> {
        let found = self.libraries.libraries.get(&library);
        found.ok_or(Status::INVALID_HANDLE)
    }

    fn kernel(&self, kernel: Handle) -> Result<&KernelHandle, Status> {
        self.libraries
            .kernels
            .get(&kernel)
            .ok_or(Status::INVALID_HANDLE)
    }

    fn load_library(&mut self, image: Image) -> Result<Handle, Status> {
        self.potentially_unsafe()?;
        let program = self.program(&image)?;
        let functions = program.module().functions.iter();
        let entries = functions.filter(|f| f.entry && f.body.is_some());
        let names = entries.map(|f| f.name.clone()).collect();
        let handle = self.handle(LIBRARY);
        let library = Library {
            program,
            names,
            loaded: BTreeMap::new(),
            kernels: BTreeMap::new(),
        };
        self.libraries.libraries.insert(handle, library);
        Ok(handle)
    }

    /// The module that a library is in a context.
    fn module_in(&mut self, library: Handle, context: Handle) -> Result<Handle, Status> {
        let known = self.library(library)?;
        if let Some(&module) = known.loaded.get(&context) {
            return Ok(module);
        }
        let program = known.program.clone();
        let module = self.place(&program, context)?;
        if let Some(library) = self.libraries.libraries.get_mut(&library) {
            library.loaded.insert(context, module);
        }
        Ok(module)
    }

    /// The function that a handle of either kind means in a context.
    pub(super) fn resolve(&mut self, handle: Handle, context: Handle) -> Result<Handle, Status> {
        let Some(kernel) = self.libraries.kernels.get(&handle) else {
            return Ok(handle);
        };
        let (library, name) = (kernel.library, kernel.name.clone());
        let attributes = kernel.attributes.clone();
        let module = self.module_in(library, context)?;
        let function = self.function(module, &name)?;
        for (number, value) in attributes {
            self.set_attribute(function, number, value)?;
        }
        Ok(function)
    }

    /// The same in the calling thread's context, which only a kernel needs.
    pub(super) fn resolve_here(&mut self, handle: Handle) -> Result<Handle, Status> {
        if self.libraries.kernels.contains_key(&handle) {
            let current = self.current()?;
            return self.resolve(handle, current);
        }
        Ok(handle)
    }

    fn kernel_of(&mut self, library: Handle, name: &str) -> Result<Handle, Status> {
        let known = self.library(library)?;
        if let Some(&handle) = known.kernels.get(name) {
            return Ok(handle);
        }
        if !known.names.iter().any(|n| n == name) {
            return Err(Status::NOT_FOUND);
        }
        let handle = self.handle(KERNEL);
        let kernel = KernelHandle {
            library,
            name: name.to_owned(),
            attributes: BTreeMap::new(),
        };
        self.libraries.kernels.insert(handle, kernel);
        if let Some(library) = self.libraries.libraries.get_mut(&library) {
            library.kernels.insert(name.to_owned(), handle);
        }
        Ok(handle)
    }

    fn global_of(&mut self, library: Handle, name: In<u8>) -> Result<(u64, u64), Status> {
        let current = self.healthy()?;
        let name = words(name)?;
        let module = self.module_in(library, current)?;
        self.global(module, &name)
    }

    /// A context of a device, for what concerns kernels there.
    fn context_on(&mut self, device: i32) -> Result<Handle, Status> {
        let device = u32::try_from(device).map_err(|_| Status::INVALID_DEVICE)?;
        let primary = self
            .primaries
            .get(device as usize)
            .ok_or(Status::INVALID_DEVICE)?
            .0;
        let current = self.current().ok();
        let here = current.filter(|&c| self.context(c).is_ok_and(|c| c.device == device));
        here.or(primary).ok_or(Status::INVALID_CONTEXT)
    }
}

fn load(driver: &mut Driver, library: Out<Handle>, image: Image) -> Outcome {
    let made = driver.load_library(image)?;
    library.set(made)
}

api! {
    fn cuLibraryLoadData(
        library: Out<Handle>, image: In<u8>,
        _options: u64, _values: u64, _n: u32,
        _library_options: u64, _library_values: u64, _m: u32,
    ) |driver| {
        load(&mut driver, library, Image::at(image))
    }

    fn cuLibraryLoadFromFile(
        library: Out<Handle>, path: In<u8>,
        _options: u64, _values: u64, _n: u32,
        _library_options: u64, _library_values: u64, _m: u32,
    ) |driver| {
        load(&mut driver, library, Image::read(path)?)
    }

    fn cuLibraryUnload(library: Handle) |driver| {
        driver.potentially_unsafe()?;
        let gone = driver.libraries.libraries.remove(&library).ok_or(Status::INVALID_HANDLE)?;
        driver.libraries.kernels.retain(|_, k| k.library != library);
        gone.loaded.values().for_each(|&module| driver.unload(module));
        Ok(())
    }

    fn cuLibraryGetModule(module: Out<Handle>, library: Handle) |driver| {
        let current = driver.healthy()?;
        let found = driver.module_in(library, current)?;
        module.set(found)
    }

    fn cuLibraryGetKernel(kernel: Out<Handle>, library: Handle, name: In<u8>) |driver| {
        let found = driver.kernel_of(library, &words(name)?)?;
        kernel.set(found)
    }

    fn cuLibraryGetKernelCount(count: Out<u32>, library: Handle) |driver| {
        count.set(driver.library(library)?.names.len() as u32)
    }

    fn cuLibraryEnumerateKernels(kernels: Out<Handle>, n: u32, library: Handle) |driver| {
        let names = driver.library(library)?.names.clone();
        for (i, name) in names.iter().take(n as usize).enumerate() {
            let found = driver.kernel_of(library, name)?;
            kernels.set_at(i, found);
        }
        Ok(())
    }

    fn cuLibraryGetGlobal(at: Out<u64>, bytes: Out<u64>, library: Handle, name: In<u8>) |driver| {
        let (address, size) = driver.global_of(library, name)?;
        at.set_if_wanted(address);
        bytes.set_if_wanted(size);
        Ok(())
    }

    fn cuKernelGetFunction(function: Out<Handle>, kernel: Handle) |driver| {
        driver.kernel(kernel)?;
        let (_driver, found) = load_here(driver, kernel)?;
        function.set(found)
    }

    fn cuKernelGetLibrary(library: Out<Handle>, kernel: Handle) |driver| {
        library.set(driver.kernel(kernel)?.library)
    }

    fn cuKernelGetName(name: Out<u64>, kernel: Handle) |driver| {
        let text = driver.kernel(kernel)?.name.clone();
        let kept = driver.keep_name(&text);
        name.set(kept)
    }

    fn cuKernelGetParamInfo(kernel: Handle, index: u64, offset: Out<u64>, size: Out<u64>) |driver| {
        driver.kernel(kernel)?;
        let function = driver.resolve_here(kernel)?;
        driver.param_info(function, index, offset, size)
    }

    fn cuKernelGetParamCount(kernel: Handle, count: Out<u64>) |driver| {
        driver.kernel(kernel)?;
        let function = driver.resolve_here(kernel)?;
        let found = driver.functions.get(&function).ok_or(Status::INVALID_HANDLE)?;
        count.set(found.kernel.params.len() as u64)
    }

    fn cuKernelGetAttribute(value: Out<i32>, number: u32, kernel: Handle, device: i32) |driver| {
        driver.kernel(kernel)?;
        let context = driver.context_on(device)?;
        let (driver, function) = load_function(driver, kernel, context)?;
        value.set(driver.attribute(number, function)?)
    }

    fn cuKernelSetAttribute(number: u32, value: i32, kernel: Handle, device: i32) |driver| {
        driver.kernel(kernel)?;
        let context = driver.context_on(device)?;
        let (mut driver, function) = load_function(driver, kernel, context)?;
        driver.set_attribute(function, number, value)?;
        if let Some(kernel) = driver.libraries.kernels.get_mut(&kernel) {
            kernel.attributes.insert(number, value);
        }
        Ok(())
    }

    fn cuKernelSetCacheConfig(kernel: Handle, _config: u32, _device: i32) |driver| {
        driver.kernel(kernel).map(|_| ())
    }

    fn cuLibraryGetManaged(_at: u64, _bytes: u64, library: Handle, name: In<u8>) |driver| {
        driver.library(library)?;
        explain("cuLibraryGetManaged", format_args!("{}: PTX has no managed variables here", words(name)?));
        Err(Status::NOT_FOUND)
    }
}
