//! Kernels that get a rank into trouble: one that stays long, one that traps.

use std::ffi::CStr;
use std::time::Duration;

use ringtp::backend::cuda::{Family, Kernels, Launch, abi};

use super::Rank;

/// `stay` waits for `elements` nanoseconds by its device's clock; `fault` traps.
const IMAGE: &CStr = c"
.version 7.0
.target sm_80
.address_size 64

.visible .entry stay(.param .align 8 .b8 args[120])
{
    .reg .pred %p;
    .reg .b64 %begin, %now, %most;
    ld.param.u64 %most, [args+24];
    mov.u64 %begin, %globaltimer;
again:
    nanosleep.u32 100000;
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %begin;
    setp.lt.u64 %p, %now, %most;
    @%p bra again;
    ret;
}

.visible .entry fault(.param .align 8 .b8 args[120])
{
    trap;
    ret;
}
";

/// The kernels on a rank's device.
pub(crate) fn load(rank: &Rank) -> Kernels {
    let family = Family {
        name: "faulty",
        kernels: &["stay", "fault"],
    };
    // SAFETY: PTX that ends in zero.
    let kernels = unsafe {
        Kernels::from_image(
            rank.comm.stream().context(),
            family,
            IMAGE.to_bytes_with_nul(),
        )
    };
    kernels.expect("the kernels load")
}

/// Puts one of them into the rank's stream.
pub(crate) fn launch(rank: &Rank, kernels: &Kernels, name: &str, time: Duration) {
    let args = abi::CollectiveArgs {
        elements: time.as_nanos() as u64,
        ..Default::default()
    };
    let kernel = kernels.get(name).expect("the kernel");
    let stream = rank.comm.stream();
    // SAFETY: the kernels read their parameters and no memory.
    let launched = unsafe { stream.launch(kernel, Launch::linear(1, 32), &args) };
    launched.expect("a launch");
}
