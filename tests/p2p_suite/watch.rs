//! A kernel that reads what a rank leaves for the host when it gives up, as the host does: it waits
//! for the word that says that all is there, and then reads the rest. The virtual GPU does not see
//! what the host's processor loads, and sees this.

use ringtp::backend::cuda::abi::KernelParams;
use ringtp::backend::cuda::{Context, DeviceBuffer, DevicePool, Family, Kernels, Launch, Stream};

use super::{own_kernels, words};

/// `read_record(record, out)`
#[repr(C)]
#[derive(Clone, Copy)]
struct ReadRecord {
    record: u64,
    out: u64,
}

// SAFETY: the kernel below takes two addresses.
unsafe impl KernelParams for ReadRecord {}

const PTX: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry read_record(.param .align 8 .b8 params[16])
{
    .reg .pred %p<2>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [params];
    ld.param.u64 %rd2, [params+8];
again:
    nanosleep.u32 4096;
    ld.acquire.sys.global.u64 %rd3, [%rd1];
    setp.eq.u64 %p1, %rd3, 0;
    @%p1 bra again;
    ld.global.u64 %rd4, [%rd1+8];
    ld.global.u64 %rd5, [%rd1+16];
    ld.global.u64 %rd6, [%rd1+24];
    ld.global.u64 %rd7, [%rd1+32];
    ld.global.u64 %rd8, [%rd1+40];
    st.global.u64 [%rd2], %rd4;
    st.global.u64 [%rd2+8], %rd5;
    st.global.u64 [%rd2+16], %rd6;
    st.global.u64 [%rd2+24], %rd7;
    st.global.u64 [%rd2+32], %rd8;
    ret;
}
\0";

/// A kernel that watches a record, on a device that did not write it.
pub(super) struct Watch {
    stream: Stream,
    out: DeviceBuffer,
    kernels: Kernels,
}

impl Watch {
    /// Gets ready on a device.
    pub(super) fn new(context: &Context) -> Result<Self, String> {
        let family = Family {
            name: "watch",
            kernels: &["read_record"],
        };
        let kernels = own_kernels(context, family, PTX)?;
        let stream = Stream::new(context).map_err(words)?;
        let out = DevicePool::new(context, 0).zeros(40, &stream);
        stream.synchronize().map_err(words)?;
        Ok(Self {
            out: out.map_err(words)?,
            kernels,
            stream,
        })
    }

    /// Begins to watch.
    pub(super) fn start(&self, record: u64) -> Result<(), String> {
        let kernel = self.kernels.get("read_record").map_err(words)?;
        let out = self.out.address();
        let params = ReadRecord { record, out };
        // SAFETY: the record has six words and lives as long as its group; the other address has
        // five.
        let launched = unsafe { self.stream.launch(kernel, Launch::linear(1, 1), &params) };
        launched.map_err(words)
    }

    /// The reason that was read, once there is one.
    pub(super) fn reason(&self) -> Result<u32, String> {
        Ok(self.record()?.reason)
    }

    /// What was read, once there is something.
    pub(super) fn record(&self) -> Result<Record, String> {
        let mut read = [0u64; 5];
        let out = self.out.as_ref();
        self.stream.download(out, &mut read).map_err(words)?;
        let [reason_step, block_peer, epoch, ..] = read;
        Ok(Record {
            reason: reason_step as u32,
            step: (reason_step >> 32) as u32,
            peer: (block_peer >> 32) as u32,
            epoch,
        })
    }
}

/// The parts of a `CollectiveRecord` that do not depend on time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) reason: u32,
    pub(super) step: u32,
    pub(super) peer: u32,
    pub(super) epoch: u64,
}
