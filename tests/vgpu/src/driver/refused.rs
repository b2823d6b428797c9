//! Functions that programs link against and the virtual GPU does not have: each refuses, and
//! says its name.

use super::api;
use super::status::Status;

macro_rules! refuse {
    ($($name:ident)*) => {
        api! {
            $(fn $name() |_driver| { Err(Status::NOT_SUPPORTED) })*
        }
    };
}

refuse! {
    cuArray3DCreate_v2
    cuArray3DGetDescriptor_v2
    cuArrayDestroy
    cuDestroyExternalMemory
    cuExternalMemoryGetMappedBuffer
    cuGraphAddKernelNode
    cuGraphCreate
    cuGraphDebugDotPrint
    cuGraphDestroy
    cuGraphGetEdges
    cuGraphGetNodes
    cuGraphKernelNodeGetParams
    cuGraphNodeGetType
    cuImportExternalMemory
    cuIpcCloseMemHandle
    cuIpcGetEventHandle
    cuIpcGetMemHandle
    cuIpcOpenEventHandle
    cuIpcOpenMemHandle_v2
    cuLinkAddData_v2
    cuLinkComplete
    cuLinkCreate_v2
    cuLinkDestroy
    cuMemcpyAtoH_v2
    cuMemcpyHtoA_v2
    cuStreamBeginCapture_v2
    cuStreamEndCapture
    cuSurfObjectCreate
    cuSurfObjectDestroy
    cuSurfObjectGetResourceDesc
    cuTexObjectCreate
    cuTexObjectDestroy
    cuTexObjectGetResourceDesc
    cuTexObjectGetResourceViewDesc
}
