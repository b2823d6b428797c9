// Sums over a block, in an order that depends on the number of threads alone.
#pragma once

#include <stdint.h>

#include "abi.h"

// The sum of `value` over the threads of a block of whole warps; every thread gets the same bits,
// since each level of a butterfly adds the same two numbers on both sides. One call a kernel:
// `partial` (shared) is not protected against the next.
__device__ __forceinline__ float block_sum(float value, float (&partial)[kMaxBlockWarps]) {
    const uint32_t lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    const uint32_t warps = blockDim.x / kWarpThreads;
#pragma unroll
    for (uint32_t step = kWarpThreads / 2; step > 0; step /= 2) {
        value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    if (lane == 0) partial[warp] = value;
    // Orders the writes of the warps' sums before the reads below.
    __syncthreads();
    value = lane < warps ? partial[lane] : 0.0f;
#pragma unroll
    for (uint32_t step = kWarpThreads / 2; step > 0; step /= 2) {
        value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    return value;
}
