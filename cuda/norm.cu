// RMSNorm, alone and after the residual sum:
//
//   rms_norm      out = x / sqrt(mean(x²) + eps) * weight
//   add_rms_norm  residual += x (+ bias), rounded to the element type; out = rms_norm(residual)
//
// (Zhang and Sennrich, 2019.) What is normalised is the residual as it is stored, so that the
// fused kernel has the bits of a sum followed by a norm.
//
// Grid: one block a row. Block: whole warps, chosen from the width alone. Shared memory: one float
// a warp. Memory-bound; the floor is each input read once and each output written once: a thread
// keeps its first kKept packs in registers and reads again only what of a row goes beyond
// (8192 f32 or 16384 halves with 512 threads).
//
// The same elements meet in the same order whether accesses are wide or not, so a row's bits
// depend on its values, its width and its type, not on where it lies.

#include "abi.h"
#include "pack.cuh"
#include "reduce.cuh"

constexpr uint32_t kKept = 4;

namespace {

template <typename T> __device__ __forceinline__ float squares(const Pack<T> &pack, float sum) {
#pragma unroll
    for (uint32_t i = 0; i < Pack<T>::kSize; i++) {
        sum = __fmaf_rn(pack[i], pack[i], sum);
    }
    return sum;
}

template <typename T, bool kAdd> __device__ __forceinline__ void norm(const NormParams &params) {
    __shared__ float partial[kMaxBlockWarps];
    const uint32_t cols = params.cols;
    const bool aligned = params.aligned != 0;
    const uint64_t index = blockIdx.x;
    const T *x = static_cast<const T *>(params.x) + index * params.x_stride;
    T *residual = static_cast<T *>(params.residual) + index * params.residual_stride;
    T *out = static_cast<T *>(params.out) + index * params.out_stride;

    // The value to be normalised at element `first` of the row, for the first time.
    auto enter = [&](uint32_t first) {
        Pack<T> pack = Pack<T>::load(x, first, cols, aligned);
        if constexpr (kAdd) {
            const bool biased = params.bias != nullptr;
            VectorPack<T> bias;
            if (biased) bias = VectorPack<T>::load(params.bias, first, cols, aligned);
            const Pack<T> before = Pack<T>::load(residual, first, cols, aligned);
            pack = Pack<T>::of([&](uint32_t i) {
                return __fadd_rn(before[i], biased ? __fadd_rn(pack[i], bias[i]) : pack[i]);
            });
            pack.store(residual, first, cols, aligned);
        }
        return pack;
    };
    const uint32_t begin = threadIdx.x * Pack<T>::kSize, step = blockDim.x * Pack<T>::kSize;
    Pack<T> kept[kKept];
    float sum = 0.0f;
#pragma unroll
    for (uint32_t k = 0; k < kKept; k++) {
        const uint32_t first = begin + k * step;
        if (first < cols) {
            kept[k] = enter(first);
            sum = squares(kept[k], sum);
        }
    }
    for (uint32_t first = begin + kKept * step; first < cols; first += step) {
        sum = squares(enter(first), sum);
    }
    sum = block_sum(sum, partial);
    const float mean = __fdiv_rn(sum, static_cast<float>(cols));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, params.eps)));

    auto leave = [&](Pack<T> pack, uint32_t first) {
        const VectorPack<T> weight = VectorPack<T>::load(params.weight, first, cols, aligned);
        pack = Pack<T>::of([&](uint32_t i) {
            return __fmul_rn(__fmul_rn(pack[i], scale), weight[i]);
        });
        pack.store(out, first, cols, aligned);
    };
#pragma unroll
    for (uint32_t k = 0; k < kKept; k++) {
        const uint32_t first = begin + k * step;
        if (first < cols) leave(kept[k], first);
    }
    // Each thread reads what it wrote itself, or the input.
    const T *again = kAdd ? residual : x;
    for (uint32_t first = begin + kKept * step; first < cols; first += step) {
        leave(Pack<T>::load(again, first, cols, aligned), first);
    }
}

}  // namespace

// One block a multiprocessor is enough: without that second bound ptxas aims at two and spills.
#define RINGTP_NORM(suffix, T)                                                           \
    extern "C" __global__ void __launch_bounds__(kNormThreads, 1)                        \
        rms_norm_##suffix(const __grid_constant__ NormParams params) {                   \
        norm<T, false>(params);                                                          \
    }                                                                                    \
    extern "C" __global__ void __launch_bounds__(kNormThreads, 1)                        \
        add_rms_norm_##suffix(const __grid_constant__ NormParams params) {               \
        norm<T, true>(params);                                                           \
    }

RINGTP_NORM(f32, float)
RINGTP_NORM(f16, f16)
RINGTP_NORM(bf16, bf16)
