//! CUDA graphs: what was put into a stream once, put in again as a whole.

use super::sys::{self, check, check_in_drop};
use super::{Context, Stream};
use crate::error::Result;

/// Recorded work, ready to be run any number of times.
///
/// It holds addresses and no memory: whoever replays it keeps what it uses.
#[derive(Debug)]
pub struct Graph {
    context: Context,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: the handles may be used by any thread; launches take a stream each.
unsafe impl Send for Graph {}

impl Stream {
    /// Records what `record` puts into this stream, which then does not run, and makes it ready.
    /// Calls that wait, copy to or from pageable memory, or allocate are errors in `record`.
    /// Other threads are not affected (the mode is `THREAD_LOCAL`).
    ///
    /// # Errors
    /// That of `record`; [`Error::Driver`](crate::Error::Driver).
    pub fn capture(&self, record: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let context = self.context();
        let _entered = context.enter()?;
        let doing = || format!("recording a graph on CUDA device {}", context.ordinal());
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        let code = unsafe { sys::cuStreamBeginCapture_v2(self.raw(), mode) };
        check(code, "cuStreamBeginCapture", doing)?;
        let recorded = record();
        let mut graph = Graph {
            context: context.clone(),
            graph: std::ptr::null_mut(),
            exec: std::ptr::null_mut(),
        };
        // SAFETY: writes one pointer; ends the capture begun above, also after an error.
        let code = unsafe { sys::cuStreamEndCapture(self.raw(), &mut graph.graph) };
        recorded?;
        check(code, "cuStreamEndCapture", doing)?;
        // SAFETY: writes one pointer; the graph was just recorded.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&mut graph.exec, graph.graph, 0) };
        check(code, "cuGraphInstantiate", doing)?;
        Ok(graph)
    }
}

impl Graph {
    /// Puts what the first run needs onto the device. Without it the first [`launch`](Self::launch)
    /// does, and may synchronise the device while a peer is spinning.
    pub fn upload(&self, stream: &Stream) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: both are alive.
        let code = unsafe { sys::cuGraphUpload(self.exec, stream.raw()) };
        check(code, "cuGraphUpload", || {
            format!(
                "uploading a graph to CUDA device {}",
                self.context.ordinal()
            )
        })
    }

    /// Puts the recorded work into `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// As for each launch that was recorded: what its parameters point to is still there.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: both are alive; the caller vouches for what the kernels do.
        let code = unsafe { sys::cuGraphLaunch(self.exec, stream.raw()) };
        check(code, "cuGraphLaunch", || {
            format!(
                "replaying a graph on CUDA device {}",
                self.context.ordinal()
            )
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else {
            return;
        };
        if !self.exec.is_null() {
            // SAFETY: made here and not destroyed before.
            check_in_drop(
                unsafe { sys::cuGraphExecDestroy(self.exec) },
                "cuGraphExecDestroy",
            );
        }
        if !self.graph.is_null() {
            // SAFETY: as above.
            check_in_drop(unsafe { sys::cuGraphDestroy(self.graph) }, "cuGraphDestroy");
        }
    }
}
