// What device code and Rust must agree on: the structs that kernels take, and limits. bindgen reads
// this file for the Rust side and nvcc for the other, so that the two cannot drift; the sizes are
// asserted on both sides (here, and in tests/cuda_abi.rs).
//
// Plain C: fixed-width integers, floats and pointers to device memory. A kernel takes one struct,
// `const __grid_constant__`, and its launcher fills it.
#ifndef RINGTP_ABI_H
#define RINGTP_ABI_H

#include <stdint.h>

// Says how large a struct is, to both compilers.
#ifdef __cplusplus
#define RINGTP_ABI_SIZE(type, bytes)                                                     \
    static_assert(sizeof(type) == (bytes), "cuda/abi.h: the size of " #type);            \
    enum { k##type##Bytes = (bytes) };
#else
#define RINGTP_ABI_SIZE(type, bytes) enum { k##type##Bytes = (bytes) };
#endif

// Threads that a block of any kernel may have, and its warps.
enum { kMaxBlockThreads = 1024, kWarpThreads = 32, kMaxBlockWarps = 32 };

// Threads of a block of cuda/norm.cu: few enough that a thread may keep its elements in registers.
enum { kNormThreads = 512 };

// cuda/norm.cu. `x`, `residual` and `out` are [rows, cols] of the kernel's element type, with
// strides in elements; `weight` and `bias` are [cols] in f32. `bias` may be null; rms_norm does
// not look at `bias` and `residual`.
typedef struct NormParams {
    const void *x;
    const float *bias;
    void *residual;
    const float *weight;
    void *out;
    uint64_t x_stride;
    uint64_t residual_stride;
    uint64_t out_stride;
    uint32_t rows;
    uint32_t cols;
    float eps;
    // Whether the rows, and the vectors, start at multiples of 16 bytes.
    uint32_t aligned;
} NormParams;
RINGTP_ABI_SIZE(NormParams, 80)

#include "collective/abi.h"

#endif
