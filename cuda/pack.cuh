// Sixteen bytes of elements: what a thread of a memory-bound kernel reads and writes at a time.
// Arithmetic is in f32 always; elements are rounded once, to the nearest, ties to even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "ptx/memory.cuh"

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T> __device__ T from_f32(float value);
template <> __device__ __forceinline__ float from_f32<float>(float value) { return value; }
template <> __device__ __forceinline__ __half from_f32<__half>(float value) {
    return __float2half_rn(value);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Sixteen bytes as they lie in memory: four registers, whatever the type.
template <typename T> struct alignas(16) Pack {
    static constexpr uint32_t kSize = 16 / sizeof(T);
    T elements[kSize];

    __device__ __forceinline__ float operator[](uint32_t i) const { return to_f32(elements[i]); }
    __device__ __forceinline__ void set(uint32_t i, float value) { elements[i] = from_f32<T>(value); }

    // The pack of a row that starts at element `first`; elements from `cols` on are zero.
    // `aligned`: the row starts at a multiple of 16 bytes.
    static __device__ __forceinline__ Pack load(const T *row, uint32_t first, uint32_t cols,
                                                bool aligned) {
        Pack pack;
        if (aligned && first + kSize <= cols) {
            *reinterpret_cast<uint4 *>(pack.elements) = ptx::ld_global_v4(row + first);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kSize; i++) {
                pack.elements[i] = first + i < cols ? row[first + i] : from_f32<T>(0.0f);
            }
        }
        return pack;
    }

    __device__ __forceinline__ void store(T *row, uint32_t first, uint32_t cols,
                                          bool aligned) const {
        if (aligned && first + kSize <= cols) {
            ptx::st_global_v4(row + first, *reinterpret_cast<const uint4 *>(elements));
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kSize; i++) {
                if (first + i < cols) row[first + i] = elements[i];
            }
        }
    }
};

// As many f32 of a vector as a pack of T has elements, from element `first` on.
template <typename T> struct VectorPack {
    static constexpr uint32_t kParts = Pack<T>::kSize / Pack<float>::kSize;
    Pack<float> parts[kParts];

    static __device__ __forceinline__ VectorPack load(const float *vector, uint32_t first,
                                                      uint32_t cols, bool aligned) {
        VectorPack pack;
#pragma unroll
        for (uint32_t i = 0; i < kParts; i++) {
            pack.parts[i] =
                Pack<float>::load(vector, first + i * Pack<float>::kSize, cols, aligned);
        }
        return pack;
    }

    __device__ __forceinline__ float operator[](uint32_t i) const {
        return parts[i / Pack<float>::kSize][i % Pack<float>::kSize];
    }
};
