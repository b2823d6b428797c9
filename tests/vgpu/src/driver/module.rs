//! Modules, libraries and functions.

use std::collections::BTreeMap;

use super::device::found;
use super::status::{In, Out, Status};
use super::{Driver, FUNCTION, Function, Handle, MODULE, Module, api, explain};
use crate::fatbin;
use crate::machine::SHARED_PER_BLOCK;
use crate::{loader, ptx};

/// The longest PTX text taken.
const LONGEST: usize = 256 << 20;

/// The PTX behind a pointer to an image: text, a fatbin, or the wrapper around one.
fn text_of(image: In<u8>, arch: u32) -> Result<String, Status> {
    let name = "cuModuleLoadData";
    let head = image.bytes(4)?;
    if fatbin::is_elf(&head) {
        explain(
            name,
            "machine code; the virtual GPU runs PTX: compile with code=compute_XX",
        );
        return Err(Status::NO_BINARY_FOR_GPU);
    }
    if fatbin::is_wrapper(&head) {
        let inner = In::<u64>::index(In::from_address(image.address()), 1)?;
        return text_of(In::at(inner), arch);
    }
    if fatbin::is_fatbin(&head) {
        let refuse = |error: fatbin::FatbinError| {
            explain(name, error);
            Status::INVALID_IMAGE
        };
        let size = fatbin::size(&image.bytes(16)?).map_err(refuse)?;
        let texts = fatbin::texts(&image.bytes(size)?).map_err(refuse)?;
        let chosen = fatbin::choose(texts, arch).map_err(|error| {
            explain(name, error);
            Status::NO_BINARY_FOR_GPU
        })?;
        return Ok(chosen.ptx);
    }
    let text = image.c_string()?;
    if text.len() > LONGEST {
        return Err(Status::INVALID_IMAGE);
    }
    String::from_utf8(text).map_err(|_| {
        explain(name, "the image is neither PTX nor a fatbin");
        Status::INVALID_IMAGE
    })
}

impl Driver {
    fn load(&mut self, text: &str) -> Result<Handle, Status> {
        let context = self.healthy()?;
        let device = self.context(context)?.device;
        let arch = self.machine.world.config.arch;
        let name = "cuModuleLoadData";
        let module = ptx::parse(text).map_err(|error| {
            explain(name, error);
            Status::INVALID_PTX
        })?;
        if module.arch > arch {
            explain(
                name,
                format_args!("PTX for {}, the device is {arch}", module.arch),
            );
            return Err(Status::NO_BINARY_FOR_GPU);
        }
        let memory = &mut self.machine.world.memory;
        let loaded = loader::load(&module, memory, device, &|_| None).map_err(|error| {
            explain(name, &error);
            if error.unsupported {
                Status::NOT_SUPPORTED
            } else {
                Status::INVALID_PTX
            }
        })?;
        let handle = self.handle(MODULE);
        let module = Module {
            context,
            loaded,
            functions: BTreeMap::new(),
        };
        self.modules.insert(handle, module);
        Ok(handle)
    }

    /// Forgets a module and its functions.
    pub(super) fn unload(&mut self, handle: Handle) {
        if let Some(module) = self.modules.remove(&handle) {
            loader::unload(&module.loaded, &mut self.machine.world.memory);
            self.functions.retain(|_, f| f.module != handle);
        }
    }

    fn function(&mut self, module: Handle, name: &str) -> Result<Handle, Status> {
        let found = self.modules.get(&module).ok_or(Status::INVALID_HANDLE)?;
        if let Some(&handle) = found.functions.get(name) {
            return Ok(handle);
        }
        let kernel = found
            .loaded
            .kernels
            .get(name)
            .ok_or(Status::NOT_FOUND)?
            .clone();
        let handle = self.handle(FUNCTION);
        let function = Function {
            module,
            kernel,
            max_dynamic_shared: None,
        };
        self.functions.insert(handle, function);
        if let Some(module) = self.modules.get_mut(&module) {
            module.functions.insert(name.to_owned(), handle);
        }
        Ok(handle)
    }

    fn global(&self, module: Handle, name: &str) -> Result<(u64, u64), Status> {
        let module = self.modules.get(&module).ok_or(Status::INVALID_HANDLE)?;
        module
            .loaded
            .variables
            .get(name)
            .copied()
            .ok_or(Status::NOT_FOUND)
    }

    fn attribute(&self, number: u32, function: Handle) -> Result<i32, Status> {
        let function = self
            .functions
            .get(&function)
            .ok_or(Status::INVALID_HANDLE)?;
        let kernel = &function.kernel;
        let default = SHARED_PER_BLOCK.saturating_sub(kernel.static_shared);
        Ok(match number {
            0 => kernel.max_threads.unwrap_or(1024).min(1024) as i32,
            1 => kernel.static_shared as i32,
            2 => 0,
            3 => kernel.local_bytes as i32,
            4 => kernel.registers.unwrap_or(64) as i32,
            5 | 6 => kernel.arch as i32,
            7 => 0,
            8 => function.max_dynamic_shared.unwrap_or(default) as i32,
            9 => -1,
            10..=15 => 0,
            _ => return Err(Status::INVALID_VALUE),
        })
    }

    fn set_attribute(&mut self, function: Handle, number: u32, value: i32) -> Result<(), Status> {
        let known = self
            .functions
            .get(&function)
            .ok_or(Status::INVALID_HANDLE)?;
        let module = self
            .modules
            .get(&known.module)
            .ok_or(Status::INVALID_HANDLE)?;
        let device = self.context(module.context)?.device;
        let most = self.machine.devices[device as usize]
            .properties
            .shared_per_block_optin;
        let fixed = known.kernel.static_shared;
        match number {
            8 => {
                let value = u32::try_from(value).map_err(|_| Status::INVALID_VALUE)?;
                if value.saturating_add(fixed) > most {
                    return Err(Status::INVALID_VALUE);
                }
                let function = self.functions.get_mut(&function);
                function.ok_or(Status::INVALID_HANDLE)?.max_dynamic_shared = Some(value);
                Ok(())
            }
            // The carve-out between cache and shared memory is a hint.
            9 if (-1..=100).contains(&value) => Ok(()),
            _ => Err(Status::INVALID_VALUE),
        }
    }
}

impl<T> In<T> {
    pub(super) fn from_address(address: u64) -> Self {
        // SAFETY: `In` is a transparent pointer; any address is a valid value of it.
        unsafe { std::mem::transmute::<*const T, Self>(address as *const T) }
    }
}

fn words(name: In<u8>) -> Result<String, Status> {
    String::from_utf8(name.c_string()?).map_err(|_| Status::INVALID_VALUE)
}

api! {
    fn cuModuleLoadData(module: Out<Handle>, image: In<u8>) |driver| {
        let arch = driver.machine.world.config.arch;
        let handle = driver.load(&text_of(image, arch)?)?;
        module.set(handle)
    }

    fn cuModuleLoadDataEx(module: Out<Handle>, image: In<u8>, _n: u32, _options: u64, _values: u64) |driver| {
        let arch = driver.machine.world.config.arch;
        let handle = driver.load(&text_of(image, arch)?)?;
        module.set(handle)
    }

    fn cuModuleLoadFatBinary(module: Out<Handle>, image: In<u8>) |driver| {
        let arch = driver.machine.world.config.arch;
        let handle = driver.load(&text_of(image, arch)?)?;
        module.set(handle)
    }

    fn cuModuleLoad(module: Out<Handle>, path: In<u8>) |driver| {
        let arch = driver.machine.world.config.arch;
        let mut image = std::fs::read(words(path)?).map_err(|_| Status::FILE_NOT_FOUND)?;
        image.extend([0; 16]);
        let handle = driver.load(&text_of(In::at(image.as_ptr() as u64), arch)?)?;
        module.set(handle)
    }

    fn cuModuleUnload(module: Handle) |driver| {
        found(driver.modules.contains_key(&module))?;
        driver.unload(module);
        Ok(())
    }

    fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: In<u8>) |driver| {
        let handle = driver.function(module, &words(name)?)?;
        function.set(handle)
    }

    fn cuModuleGetGlobal_v2(at: Out<u64>, bytes: Out<u64>, module: Handle, name: In<u8>) |driver| {
        let (address, size) = driver.global(module, &words(name)?)?;
        at.set_if_wanted(address);
        bytes.set_if_wanted(size);
        Ok(())
    }

    fn cuModuleGetFunctionCount(count: Out<u32>, module: Handle) |driver| {
        let module = driver.modules.get(&module).ok_or(Status::INVALID_HANDLE)?;
        count.set(module.loaded.kernels.len() as u32)
    }

    // A library is a module of the current context.
    fn cuLibraryLoadData(
        library: Out<Handle>,
        image: In<u8>,
        _options: u64,
        _values: u64,
        _n: u32,
        _library_options: u64,
        _library_values: u64,
        _m: u32,
    ) |driver| {
        let arch = driver.machine.world.config.arch;
        let handle = driver.load(&text_of(image, arch)?)?;
        library.set(handle)
    }

    fn cuLibraryUnload(library: Handle) |driver| {
        found(driver.modules.contains_key(&library))?;
        driver.unload(library);
        Ok(())
    }

    fn cuLibraryGetModule(module: Out<Handle>, library: Handle) |driver| {
        found(driver.modules.contains_key(&library))?;
        module.set(library)
    }

    fn cuLibraryGetKernel(kernel: Out<Handle>, library: Handle, name: In<u8>) |driver| {
        let handle = driver.function(library, &words(name)?)?;
        kernel.set(handle)
    }

    fn cuKernelGetFunction(function: Out<Handle>, kernel: Handle) |driver| {
        found(driver.functions.contains_key(&kernel))?;
        function.set(kernel)
    }

    fn cuLibraryGetGlobal(at: Out<u64>, bytes: Out<u64>, library: Handle, name: In<u8>) |driver| {
        let (address, size) = driver.global(library, &words(name)?)?;
        at.set_if_wanted(address);
        bytes.set_if_wanted(size);
        Ok(())
    }

    fn cuFuncGetAttribute(value: Out<i32>, number: u32, function: Handle) |driver| {
        let found = driver.attribute(number, function)?;
        value.set(found)
    }

    fn cuFuncSetAttribute(function: Handle, number: u32, value: i32) |driver| {
        driver.set_attribute(function, number, value)
    }

    fn cuFuncGetModule(module: Out<Handle>, function: Handle) |driver| {
        let known = driver.functions.get(&function).ok_or(Status::INVALID_HANDLE)?;
        module.set(known.module)
    }

    fn cuFuncSetCacheConfig(function: Handle, _config: u32) |driver| {
        found(driver.functions.contains_key(&function))
    }

    fn cuFuncSetSharedMemConfig(function: Handle, _config: u32) |driver| {
        found(driver.functions.contains_key(&function))
    }
}
