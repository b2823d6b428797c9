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
    cuArrayCreate_v2
    cuArrayDestroy
    cuArrayGetDescriptor_v2
    cuCoredumpGetAttribute
    cuCtxGetExecAffinity
    cuCtxRecordEvent
    cuCtxWaitEvent
    cuDestroyExternalMemory
    cuDestroyExternalSemaphore
    cuDeviceGetGraphMemAttribute
    cuDeviceGetLuid
    cuDeviceGraphMemTrim
    cuDeviceSetGraphMemAttribute
    cuExternalMemoryGetMappedBuffer
    cuExternalMemoryGetMappedMipmappedArray
    cuFlushGPUDirectRDMAWrites
    cuGraphAddBatchMemOpNode
    cuGraphAddExternalSemaphoresSignalNode
    cuGraphAddExternalSemaphoresWaitNode
    cuGraphAddMemAllocNode
    cuGraphAddMemFreeNode
    cuGraphAddNode_v2
    cuGraphChildGraphNodeGetGraph
    cuGraphConditionalHandleCreate
    cuGraphDebugDotPrint
    cuGraphExecChildGraphNodeSetParams
    cuGraphKernelNodeCopyAttributes
    cuGraphKernelNodeGetAttribute
    cuGraphKernelNodeSetAttribute
    cuGraphReleaseUserObject
    cuGraphRetainUserObject
    cuGreenCtxCreate
    cuImportExternalMemory
    cuImportExternalSemaphore
    cuIpcCloseMemHandle
    cuIpcGetEventHandle
    cuIpcGetMemHandle
    cuIpcOpenEventHandle
    cuIpcOpenMemHandle_v2
    cuLaunchCooperativeKernelMultiDevice
    cuLibraryGetUnifiedFunction
    cuLinkAddData_v2
    cuLinkAddFile_v2
    cuLinkComplete
    cuLinkCreate_v2
    cuLinkDestroy
    cuMemAddressFree
    cuMemAddressReserve
    cuMemCreate
    cuMemExportToShareableHandle
    cuMemGetAccess
    cuMemGetAllocationGranularity
    cuMemGetHandleForAddressRange
    cuMemImportFromShareableHandle
    cuMemMap
    cuMemPoolExportPointer
    cuMemPoolExportToShareableHandle
    cuMemPoolImportFromShareableHandle
    cuMemPoolImportPointer
    cuMemRangeGetAttribute
    cuMemRelease
    cuMemRetainAllocationHandle
    cuMemSetAccess
    cuMemUnmap
    cuMemcpy3DBatchAsync_v2
    cuMemcpyAtoA_v2
    cuMemcpyAtoD_v2
    cuMemcpyAtoHAsync_v2
    cuMemcpyAtoH_v2
    cuMemcpyBatchAsync_v2
    cuMemcpyDtoA_v2
    cuMemcpyHtoAAsync_v2
    cuMemcpyHtoA_v2
    cuMipmappedArrayCreate
    cuMipmappedArrayDestroy
    cuModuleGetSurfRef
    cuModuleGetTexRef
    cuMulticastAddDevice
    cuMulticastBindAddr
    cuMulticastBindMem
    cuMulticastCreate
    cuMulticastGetGranularity
    cuMulticastUnbind
    cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialClusterSize
    cuSignalExternalSemaphoresAsync
    cuStreamAttachMemAsync
    cuStreamBatchMemOp_v2
    cuStreamCopyAttributes
    cuStreamGetAttribute
    cuStreamSetAttribute
    cuSurfObjectCreate
    cuSurfObjectDestroy
    cuSurfObjectGetResourceDesc
    cuTensorMapEncodeIm2col
    cuTensorMapEncodeTiled
    cuTensorMapReplaceAddress
    cuTexObjectCreate
    cuTexObjectDestroy
    cuTexObjectGetResourceDesc
    cuTexObjectGetResourceViewDesc
    cuUserObjectCreate
    cuUserObjectRelease
    cuUserObjectRetain
    cuWaitExternalSemaphoresAsync
}
