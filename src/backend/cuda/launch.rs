//! Launches, checked on the host before the driver sees them: an error then names the limit,
//! where the driver would say "invalid value".

use std::ffi::c_void;

use super::Stream;
use super::abi::KernelParams;
use super::module::Function;
use super::sys::{self, check};
use crate::error::{Error, Result};

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory a block.
    pub shared: u32,
    /// Whether all blocks must run at the same time.
    pub cooperative: bool,
}

impl Launch {
    /// `blocks` blocks of `threads` threads in a line.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared: 0,
            cooperative: false,
        }
    }

    /// With `bytes` of dynamic shared memory a block.
    pub fn shared(self, bytes: u32) -> Self {
        Self {
            shared: bytes,
            ..self
        }
    }

    /// With all blocks running at the same time, which a kernel needs whose blocks wait for each
    /// other. The check is against an empty device: who shares it keeps a budget.
    pub fn cooperative(self) -> Self {
        Self {
            cooperative: true,
            ..self
        }
    }

    /// Whether `function` can be launched so with `param_bytes` of parameters.
    fn check(&self, function: &Function, param_bytes: usize) -> Result<()> {
        let limits = function.context().limits();
        let attributes = function.attributes();
        let refuse = |expected: String, found: String| {
            Err(Error::shape(
                format!("launch of {}", function.name()),
                expected,
                found,
            ))
        };
        for (axis, (&n, &most)) in self.grid.iter().zip(&limits.grid).enumerate() {
            if n == 0 || n > most {
                let axis = ["x", "y", "z"][axis];
                return refuse(format!("1 to {most} blocks in {axis}"), n.to_string());
            }
        }
        for (axis, (&n, &most)) in self.block.iter().zip(&limits.block).enumerate() {
            if n == 0 || n > most {
                let axis = ["x", "y", "z"][axis];
                return refuse(format!("1 to {most} threads in {axis}"), n.to_string());
            }
        }
        let threads: u64 = self.block.iter().map(|&n| u64::from(n)).product();
        let most = limits.threads_per_block.min(attributes.max_threads);
        if threads > u64::from(most) {
            return refuse(
                format!("at most {most} threads a block"),
                threads.to_string(),
            );
        }
        if self.shared > attributes.max_dynamic_shared {
            return refuse(
                format!(
                    "at most {} bytes of dynamic shared memory",
                    attributes.max_dynamic_shared
                ),
                self.shared.to_string(),
            );
        }
        if let Some(expected) = attributes.param_bytes
            && expected != param_bytes
        {
            return refuse(
                format!("{expected} bytes of parameters"),
                param_bytes.to_string(),
            );
        }
        if self.cooperative {
            if !limits.cooperative {
                return refuse(
                    "a device with cooperative launches".into(),
                    "one without".into(),
                );
            }
            let threads = u32::try_from(threads).unwrap_or(u32::MAX);
            let fit = function.blocks_per_multiprocessor(threads, self.shared)?;
            let most = u64::from(fit) * u64::from(limits.multiprocessors);
            let blocks: u64 = self.grid.iter().map(|&n| u64::from(n)).product();
            if blocks > most {
                let expected = format!("at most {most} blocks, which fit on the device at once");
                return refuse(expected, blocks.to_string());
            }
        }
        Ok(())
    }
}

impl Stream {
    /// Puts a launch into the stream.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shape or the size of the parameters is not one that the kernel
    /// and the device take, or the kernel is loaded on another device; [`Error::Driver`].
    ///
    /// # Safety
    /// What the kernel does with `params` is sound: addresses in it are memory that the kernel
    /// may access so, for as long as it runs, and the shape is one that it is written for.
    pub unsafe fn launch<P: KernelParams>(
        &self,
        function: &Function,
        launch: Launch,
        params: &P,
    ) -> Result<()> {
        if function.context().ordinal() != self.context().ordinal() {
            return Err(Error::shape(
                format!("launch of {}", function.name()),
                format!("a stream of CUDA device {}", function.context().ordinal()),
                format!("one of device {}", self.context().ordinal()),
            ));
        }
        launch.check(function, size_of::<P>())?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { cooperative: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared,
            hStream: self.raw(),
            attrs: &mut attribute,
            numAttrs: u32::from(launch.cooperative),
        };
        let mut list = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        let _entered = self.context().enter()?;
        // SAFETY: the driver copies the parameters, whose size was checked where it can be, before
        // it returns; the caller vouches for what the kernel does with them.
        let code = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function.raw(),
                list.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(code, "cuLaunchKernelEx", || {
            format!(
                "launching {} on CUDA device {} with {launch:?}",
                function.name(),
                self.context().ordinal()
            )
        })
    }
}
