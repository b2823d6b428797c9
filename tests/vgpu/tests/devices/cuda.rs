//! The driver API as a program sees it, as far as these tests use it.

use std::ffi::{CString, c_void};
use std::ptr::null_mut;

// The functions are in the library under test.
use vgpu as _;

/// A handle.
pub(crate) type Handle = u64;

unsafe extern "C" {
    pub(crate) fn cuInit(flags: u32) -> u32;
    pub(crate) fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: i32) -> u32;
    pub(crate) fn cuDevicePrimaryCtxReset_v2(device: i32) -> u32;
    pub(crate) fn cuDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) -> u32;
    pub(crate) fn cuDeviceGetP2PAttribute(v: *mut i32, number: u32, from: i32, to: i32) -> u32;
    pub(crate) fn cuCtxSetCurrent(context: Handle) -> u32;
    pub(crate) fn cuCtxEnablePeerAccess(context: Handle, flags: u32) -> u32;
    pub(crate) fn cuCtxDisablePeerAccess(context: Handle) -> u32;
    pub(crate) fn cuModuleLoadData(module: *mut Handle, image: *const u8) -> u32;
    pub(crate) fn cuModuleGetFunction(f: *mut Handle, module: Handle, name: *const i8) -> u32;
    pub(crate) fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> u32;
    pub(crate) fn cuMemHostAlloc(at: *mut *mut c_void, bytes: usize, flags: u32) -> u32;
    pub(crate) fn cuMemsetD8_v2(at: u64, value: u8, bytes: usize) -> u32;
    pub(crate) fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> u32;
    pub(crate) fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> u32;
    pub(crate) fn cuMemcpyPeer(to: u64, tc: Handle, from: u64, fc: Handle, bytes: usize) -> u32;
    pub(crate) fn cuMemcpyPeerAsync(
        to: u64,
        tc: Handle,
        from: u64,
        fc: Handle,
        bytes: usize,
        stream: Handle,
    ) -> u32;
    pub(crate) fn cuMemFree_v2(at: u64) -> u32;
    pub(crate) fn cuCtxSynchronize() -> u32;
    pub(crate) fn cuIpcGetMemHandle(handle: *mut c_void, at: u64) -> u32;
    pub(crate) fn cuIpcGetEventHandle(handle: *mut c_void, event: Handle) -> u32;
    pub(crate) fn cuStreamCreate(stream: *mut Handle, flags: u32) -> u32;
    pub(crate) fn cuStreamSynchronize(stream: Handle) -> u32;
    pub(crate) fn cuStreamQuery(stream: Handle) -> u32;
    pub(crate) fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) -> u32;
    pub(crate) fn cuEventCreate(event: *mut Handle, flags: u32) -> u32;
    pub(crate) fn cuEventRecord(event: Handle, stream: Handle) -> u32;
    pub(crate) fn cuEventElapsedTime(ms: *mut f32, start: Handle, end: Handle) -> u32;
    pub(crate) fn cuLaunchKernel(
        function: Handle,
        gx: u32,
        gy: u32,
        gz: u32,
        bx: u32,
        by: u32,
        bz: u32,
        shared: u32,
        stream: Handle,
        params: *const *const c_void,
        extra: *const *const c_void,
    ) -> u32;
    pub(crate) fn vgpuTakeFindings(text: *mut u8, capacity: usize, length: *mut usize) -> u32;
    pub(crate) fn vgpuIsReplayable(replayable: *mut i32) -> u32;
}

/// A call that must succeed.
macro_rules! cu {
    ($f:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: the arguments are as the function wants them.
        let code = unsafe { crate::cuda::$f($($arg),*) };
        assert_eq!(code, 0, "{}", stringify!($f));
    }};
}
/// A call whose code is wanted.
macro_rules! code {
    ($f:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: the arguments are as the function wants them.
        unsafe { crate::cuda::$f($($arg),*) }
    }};
}
pub(crate) use {code, cu};

/// The findings so far, which are then forgotten.
pub(crate) fn findings() -> Vec<String> {
    let mut text = vec![0u8; 1 << 20];
    let mut length = 0;
    cu!(vgpuTakeFindings(text.as_mut_ptr(), text.len(), &mut length));
    text.truncate(length - 1);
    let text = String::from_utf8(text).expect("words");
    text.lines().map(str::to_owned).collect()
}

/// Whether the run depends on its seed alone.
pub(crate) fn is_replayable() -> bool {
    let mut replayable = 0;
    cu!(vgpuIsReplayable(&mut replayable));
    replayable != 0
}

/// The context of a device, with a module and a stream.
#[derive(Clone, Copy)]
pub(crate) struct Gpu {
    pub(crate) context: Handle,
    pub(crate) module: Handle,
    pub(crate) stream: Handle,
}

impl Gpu {
    pub(crate) fn new(device: i32, ptx: &str) -> Self {
        cu!(cuInit(0));
        let (mut context, mut module, mut stream) = (0, 0, 0);
        cu!(cuDevicePrimaryCtxRetain(&mut context, device));
        cu!(cuCtxSetCurrent(context));
        let image = CString::new(ptx).expect("no zeros");
        cu!(cuModuleLoadData(&mut module, image.as_ptr().cast()));
        cu!(cuStreamCreate(&mut stream, 1));
        Self {
            context,
            module,
            stream,
        }
    }

    pub(crate) fn enter(&self) {
        cu!(cuCtxSetCurrent(self.context));
    }

    pub(crate) fn room(&self, bytes: usize) -> u64 {
        self.enter();
        let mut at = 0;
        cu!(cuMemAlloc_v2(&mut at, bytes));
        cu!(cuMemsetD8_v2(at, 0, bytes));
        at
    }

    pub(crate) fn put<T: bytemuck::Pod>(&self, values: &[T]) -> u64 {
        let bytes = size_of_val(values);
        let at = self.room(bytes);
        cu!(cuMemcpyHtoD_v2(at, values.as_ptr().cast(), bytes));
        at
    }

    pub(crate) fn get<T: bytemuck::Pod>(&self, at: u64, n: usize) -> Vec<T> {
        self.enter();
        let mut values = vec![T::zeroed(); n];
        let bytes = n * size_of::<T>();
        cu!(cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), at, bytes));
        values
    }

    pub(crate) fn function(&self, name: &str) -> Handle {
        self.enter();
        let name = CString::new(name).expect("no zeros");
        let mut function = 0;
        cu!(cuModuleGetFunction(
            &mut function,
            self.module,
            name.as_ptr()
        ));
        function
    }

    /// Launches with these words as its parameters.
    pub(crate) fn launch(&self, name: &str, grid: u32, block: u32, args: &[u64]) {
        let function = self.function(name);
        let code = self.try_launch(function, grid, block, args);
        assert_eq!(code, 0, "cuLaunchKernel of {name}");
    }

    /// The same with a function; the call's code.
    pub(crate) fn try_launch(&self, function: Handle, grid: u32, block: u32, args: &[u64]) -> u32 {
        let bytes = size_of_val(args);
        // CU_LAUNCH_PARAM_BUFFER_POINTER, …_SIZE, …_END
        let extra: [usize; 5] = [1, args.as_ptr() as usize, 2, &raw const bytes as usize, 0];
        let (stream, extra) = (self.stream, extra.as_ptr().cast());
        code!(cuLaunchKernel(
            function,
            grid,
            1,
            1,
            block,
            1,
            1,
            0,
            stream,
            null_mut(),
            extra
        ))
    }
}
