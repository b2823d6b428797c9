//! A kernel that writes a flag as a rank does: strongly, after all that it knows of. What the host
//! writes is different in one thing: nobody reads what was there before.

use ringtp::backend::cuda::abi::KernelParams;
use ringtp::backend::cuda::{Context, Family, Kernels, Launch, Stream};

use super::{Outcome, own_kernels, words};

/// `write_flag(flag, value)`
#[repr(C)]
#[derive(Clone, Copy)]
struct WriteFlag {
    flag: u64,
    value: u64,
}

// SAFETY: the kernel below takes an address and a number.
unsafe impl KernelParams for WriteFlag {}

const PTX: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry write_flag(.param .align 8 .b8 params[16])
{
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [params];
    ld.param.u64 %rd2, [params+8];
    st.release.sys.global.u64 [%rd1], %rd2;
    ret;
}
\0";

/// See the module.
pub(super) struct FlagWriter {
    kernels: Kernels,
}

impl FlagWriter {
    /// For a device.
    pub(super) fn new(context: &Context) -> Result<Self, String> {
        let family = Family {
            name: "flags",
            kernels: &["write_flag"],
        };
        Ok(Self {
            kernels: own_kernels(context, family, PTX)?,
        })
    }

    /// Puts the writing of a flag into a stream.
    pub(super) fn write(&self, stream: &Stream, flag: u64, value: u64) -> Outcome {
        let kernel = self.kernels.get("write_flag").map_err(words)?;
        let params = WriteFlag { flag, value };
        // SAFETY: a flag of an arena of the group, which all its devices reach.
        unsafe { stream.launch(kernel, Launch::linear(1, 1), &params) }.map_err(words)
    }
}
