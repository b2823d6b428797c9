//! Modules, libraries and functions.

use std::collections::BTreeMap;

use super::device::found;
use super::image::Image;
use super::rest::{device_at_rest, load_here};
use super::status::{In, Out, Status};
use super::{Driver, FUNCTION, Function, Guard, Handle, MODULE, Module, api, explain};
use crate::loader::{self, Program};
use crate::machine::SHARED_PER_BLOCK;

fn load(mut driver: Guard, image: Image) -> Result<Handle, Status> {
    let context = driver.healthy()?;
    driver.potentially_unsafe()?;
    let program = driver.program(&image)?;
    if Driver::loads_eagerly() {
        driver = device_at_rest(driver)?;
    }
    driver.place(&program, context)
}

impl Driver {
    /// Puts a program into a context.
    pub(super) fn place(&mut self, program: &Program, context: Handle) -> Result<Handle, Status> {
        let device = self.context(context)?.device;
        let memory = &mut self.machine.world.memory;
        let loaded = program.load(memory, device).map_err(|error| {
            explain("cuModuleLoadData", &error);
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

    /// The offset and size of a parameter.
    pub(super) fn param_info(
        &self,
        function: Handle,
        index: u64,
        offset: Out<u64>,
        size: Out<u64>,
    ) -> Result<(), Status> {
        let known = self
            .functions
            .get(&function)
            .ok_or(Status::INVALID_HANDLE)?;
        let index = usize::try_from(index).map_err(|_| Status::INVALID_VALUE)?;
        let param = known
            .kernel
            .params
            .get(index)
            .ok_or(Status::INVALID_VALUE)?;
        offset.set(param.offset.into())?;
        size.set_if_wanted(param.size.into());
        Ok(())
    }

    /// A name as C has it, kept for as long as the library: programs keep the pointer.
    pub(super) fn keep_name(&mut self, name: &str) -> u64 {
        let kept = self.names.entry(name.to_owned()).or_insert_with(|| {
            let mut bytes = name.as_bytes().to_vec();
            bytes.push(0);
            bytes.into()
        });
        kept.as_ptr() as u64
    }

    /// Forgets a module and its functions.
    pub(super) fn unload(&mut self, handle: Handle) {
        if let Some(module) = self.modules.remove(&handle) {
            loader::unload(&module.loaded, &mut self.machine.world.memory);
            self.functions.retain(|_, f| f.module != handle);
        }
    }

    pub(super) fn function(&mut self, module: Handle, name: &str) -> Result<Handle, Status> {
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
            loaded: Driver::loads_eagerly(),
        };
        self.functions.insert(handle, function);
        if let Some(module) = self.modules.get_mut(&module) {
            module.functions.insert(name.to_owned(), handle);
        }
        Ok(handle)
    }

    pub(super) fn global(&self, module: Handle, name: &str) -> Result<(u64, u64), Status> {
        let module = self.modules.get(&module).ok_or(Status::INVALID_HANDLE)?;
        module
            .loaded
            .variables
            .get(name)
            .copied()
            .ok_or(Status::NOT_FOUND)
    }

    pub(super) fn attribute(&self, number: u32, function: Handle) -> Result<i32, Status> {
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

    pub(super) fn set_attribute(
        &mut self,
        function: Handle,
        number: u32,
        value: i32,
    ) -> Result<(), Status> {
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

pub(super) fn words(name: In<u8>) -> Result<String, Status> {
    String::from_utf8(name.c_string()?).map_err(|_| Status::INVALID_VALUE)
}

api! {
    fn cuModuleLoadData(module: Out<Handle>, image: In<u8>) |driver| {
        let handle = load(driver, Image::at(image))?;
        module.set(handle)
    }

    fn cuModuleLoadDataEx(module: Out<Handle>, image: In<u8>, _n: u32, _options: u64, _values: u64) |driver| {
        let handle = load(driver, Image::at(image))?;
        module.set(handle)
    }

    fn cuModuleLoadFatBinary(module: Out<Handle>, image: In<u8>) |driver| {
        let handle = load(driver, Image::at(image))?;
        module.set(handle)
    }

    fn cuModuleLoad(module: Out<Handle>, path: In<u8>) |driver| {
        let handle = load(driver, Image::read(path)?)?;
        module.set(handle)
    }

    fn cuModuleUnload(module: Handle) |driver| {
        found(driver.modules.contains_key(&module))?;
        driver.unload(module);
        Ok(())
    }

    fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: In<u8>) |driver| {
        let handle = driver.function(module, &words(name)?)?;
        let (_driver, handle) = load_here(driver, handle)?;
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

    fn cuModuleEnumerateFunctions(functions: Out<Handle>, n: u32, module: Handle) |driver| {
        let known = driver.modules.get(&module).ok_or(Status::INVALID_HANDLE)?;
        let mut names: Vec<String> = known.loaded.kernels.keys().cloned().collect();
        names.sort();
        for (i, name) in names.iter().take(n as usize).enumerate() {
            let found = driver.function(module, name)?;
            functions.set_at(i, found);
        }
        Ok(())
    }

    // CU_MODULE_EAGER_LOADING, CU_MODULE_LAZY_LOADING
    fn cuModuleGetLoadingMode(mode: Out<u32>) |_driver| {
        mode.set(if Driver::loads_eagerly() { 1 } else { 2 })
    }

    fn cuFuncGetAttribute(value: Out<i32>, number: u32, function: Handle) |driver| {
        let (driver, function) = load_here(driver, function)?;
        let found = driver.attribute(number, function)?;
        value.set(found)
    }

    fn cuFuncSetAttribute(function: Handle, number: u32, value: i32) |driver| {
        let (mut driver, function) = load_here(driver, function)?;
        driver.set_attribute(function, number, value)
    }

    fn cuFuncGetModule(module: Out<Handle>, function: Handle) |driver| {
        let function = driver.resolve_here(function)?;
        let known = driver.functions.get(&function).ok_or(Status::INVALID_HANDLE)?;
        module.set(known.module)
    }

    fn cuFuncGetName(name: Out<u64>, function: Handle) |driver| {
        let function = driver.resolve_here(function)?;
        let known = driver.functions.get(&function).ok_or(Status::INVALID_HANDLE)?;
        let text = known.kernel.name.clone();
        let kept = driver.keep_name(&text);
        name.set(kept)
    }

    fn cuFuncGetParamInfo(function: Handle, index: u64, offset: Out<u64>, size: Out<u64>) |driver| {
        let function = driver.resolve_here(function)?;
        driver.param_info(function, index, offset, size)
    }

    fn cuFuncGetParamCount(function: Handle, count: Out<u64>) |driver| {
        let function = driver.resolve_here(function)?;
        let known = driver.functions.get(&function).ok_or(Status::INVALID_HANDLE)?;
        count.set(known.kernel.params.len() as u64)
    }

    fn cuFuncIsLoaded(state: Out<u32>, function: Handle) |driver| {
        let function = driver.resolve_here(function)?;
        let known = driver.functions.get(&function).ok_or(Status::INVALID_HANDLE)?;
        state.set(known.loaded.into())
    }

    fn cuFuncLoad(function: Handle) |driver| {
        let (driver, function) = load_here(driver, function)?;
        found(driver.functions.contains_key(&function))
    }

    fn cuFuncSetCacheConfig(function: Handle, _config: u32) |driver| {
        let (driver, function) = load_here(driver, function)?;
        found(driver.functions.contains_key(&function))
    }

    fn cuFuncSetSharedMemConfig(function: Handle, _config: u32) |driver| {
        let (driver, function) = load_here(driver, function)?;
        found(driver.functions.contains_key(&function))
    }
}
