// A program in C that knows the driver API and nothing of the virtual GPU: loads the fatbin it is
// given, runs a kernel from it directly and in a graph, and compares.

#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call)                                                         \
    do {                                                                    \
        CUresult result = (call);                                           \
        if (result != CUDA_SUCCESS) {                                       \
            const char* text = "?";                                         \
            cuGetErrorString(result, &text);                                \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, text); \
            exit(1);                                                        \
        }                                                                   \
    } while (0)

enum { N = 1000 };

int main(int argc, char** argv) {
    if (argc != 2) {
        return 2;
    }
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction saxpy;
    CUstream stream;
    CUgraph graph;
    CUgraphExec exec;
    CUdeviceptr x, y;
    static float values[N];
    char name[64];
    int major = 0;

    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDeviceGetName(name, sizeof name, device));
    CHECK(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoad(&module, argv[1]));
    CHECK(cuModuleGetFunction(&saxpy, module, "saxpy"));
    CHECK(cuMemAlloc(&x, sizeof values));
    CHECK(cuMemAlloc(&y, sizeof values));
    for (int i = 0; i < N; ++i) {
        values[i] = (float)i;
    }
    CHECK(cuMemcpyHtoD(x, values, sizeof values));
    CHECK(cuMemsetD32(y, 0, N));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));

    float a = 2.0f;
    int n = N;
    void* params[] = {&a, &x, &y, &n};
    CHECK(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    CHECK(cuLaunchKernel(saxpy, (N + 127) / 128, 1, 1, 128, 1, 1, 0, stream, params, NULL));
    CHECK(cuStreamEndCapture(stream, &graph));
    CHECK(cuGraphInstantiate(&exec, graph, 0));
    CHECK(cuGraphLaunch(exec, stream));
    CHECK(cuGraphLaunch(exec, stream));

    CUlaunchAttribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE, .value.cooperative = 1};
    CUlaunchConfig config = {
        .gridDimX = (N + 127) / 128, .gridDimY = 1, .gridDimZ = 1,
        .blockDimX = 128, .blockDimY = 1, .blockDimZ = 1,
        .hStream = stream, .attrs = &attribute, .numAttrs = 1,
    };
    CHECK(cuLaunchKernelEx(&config, saxpy, params, NULL));
    CHECK(cuStreamSynchronize(stream));
    CHECK(cuMemcpyDtoH(values, y, sizeof values));
    for (int i = 0; i < N; ++i) {
        if (values[i] != 6.0f * (float)i) {
            fprintf(stderr, "y[%d] = %g\n", i, values[i]);
            return 1;
        }
    }
    CHECK(cuGraphExecDestroy(exec));
    CHECK(cuGraphDestroy(graph));
    CHECK(cuStreamDestroy(stream));
    CHECK(cuMemFree(x));
    CHECK(cuMemFree(y));
    CHECK(cuModuleUnload(module));
    CHECK(cuDevicePrimaryCtxRelease(device));
    printf("%s, compute capability %d: %d values are right\n", name, major, N);
    return 0;
}
