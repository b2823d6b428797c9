// Sixteen bytes of elements: what a thread of a memory-bound kernel reads and writes at a time.
// Arithmetic is in f32 always; elements are rounded once, to the nearest, ties to even.
#pragma once

#include <stdint.h>

#include "element.cuh"
#include "ptx/memory.cuh"

// Sixteen bytes as they lie in memory. Four registers whatever the type: halves stay in pairs,
// since one in a register of its own would double them.
template <typename T> struct Pack {
    static constexpr uint32_t kSize = 16 / sizeof(T);
    static constexpr uint32_t kPerWord = 4 / sizeof(T);
    static constexpr uint32_t kBits = 8 * sizeof(T);
    uint32_t words[4];

    __device__ __forceinline__ float operator[](uint32_t i) const {
        const uint32_t word = words[i / kPerWord] >> (i % kPerWord * kBits);
        return Element<T>::to_f32(static_cast<Bits<T>>(word));
    }

    // Only on a pack of zeros: puts in the bits of element i.
    __device__ __forceinline__ void put(uint32_t i, Bits<T> bits) {
        words[i / kPerWord] |= static_cast<uint32_t>(bits) << (i % kPerWord * kBits);
    }

    // The pack of f(0), f(1), …, each rounded to T.
    template <typename F> static __device__ __forceinline__ Pack of(F f) {
        Pack pack = {};
#pragma unroll
        for (uint32_t i = 0; i < kSize; i++) pack.put(i, Element<T>::from_f32(f(i)));
        return pack;
    }

    // A whole pack, at a multiple of 16 bytes.
    static __device__ __forceinline__ Pack load(const T *at) {
        const uint4 words = ptx::ld_global_v4(at);
        return {{words.x, words.y, words.z, words.w}};
    }
    __device__ __forceinline__ void store(T *at) const {
        ptx::st_global_v4(at, make_uint4(words[0], words[1], words[2], words[3]));
    }

    // The pack of a row that starts at element `first`; elements from `cols` on are zero.
    // `aligned`: the row starts at a multiple of 16 bytes.
    static __device__ __forceinline__ Pack load(const T *row, uint32_t first, uint32_t cols,
                                                bool aligned) {
        Pack pack = {};
        if (aligned && first + kSize <= cols) {
            pack = load(row + first);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kSize; i++) {
                if (first + i < cols) pack.put(i, Element<T>::bits(row[first + i]));
            }
        }
        return pack;
    }

    __device__ __forceinline__ void store(T *row, uint32_t first, uint32_t cols,
                                          bool aligned) const {
        if (aligned && first + kSize <= cols) {
            store(row + first);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kSize; i++) {
                const uint32_t word = words[i / kPerWord] >> (i % kPerWord * kBits);
                if (first + i < cols) row[first + i] = Element<T>::of(static_cast<Bits<T>>(word));
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

// Four elements, as f32: what a thread of a tile reads and writes at a time where it has four
// adjacent columns. Sixteen bytes, or eight of halves.
template <typename T> struct Quad {
    static constexpr uint32_t kSize = 4;
    float values[kSize];

    // From element `first` of a row on; elements from `cols` on are zero. `aligned`: the row
    // starts, and `first` is, at a multiple of four elements.
    static __device__ __forceinline__ Quad load(const T *row, uint32_t first, uint32_t cols,
                                                bool aligned) {
        Quad quad = {};
        if (aligned && first + kSize <= cols) {
            if constexpr (sizeof(T) == 4) {
                const uint4 words = ptx::ld_global_v4(row + first);
                quad.values[0] = __uint_as_float(words.x);
                quad.values[1] = __uint_as_float(words.y);
                quad.values[2] = __uint_as_float(words.z);
                quad.values[3] = __uint_as_float(words.w);
            } else {
                const uint2 words = ptx::ld_global_v2(row + first);
                quad.values[0] = Element<T>::to_f32(static_cast<uint16_t>(words.x));
                quad.values[1] = Element<T>::to_f32(static_cast<uint16_t>(words.x >> 16));
                quad.values[2] = Element<T>::to_f32(static_cast<uint16_t>(words.y));
                quad.values[3] = Element<T>::to_f32(static_cast<uint16_t>(words.y >> 16));
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kSize; i++) {
                if (first + i >= cols) continue;
                quad.values[i] = Element<T>::to_f32(Element<T>::bits(row[first + i]));
            }
        }
        return quad;
    }

    __device__ __forceinline__ void store(T *row, uint32_t first, uint32_t cols,
                                          bool aligned) const {
        // Words even of halves, which the wide store puts together in pairs.
        uint32_t bits[kSize];
#pragma unroll
        for (uint32_t i = 0; i < kSize; i++) bits[i] = Element<T>::from_f32(values[i]);
        if (aligned && first + kSize <= cols) {
            if constexpr (sizeof(T) == 4) {
                ptx::st_global_v4(row + first, make_uint4(bits[0], bits[1], bits[2], bits[3]));
            } else {
                ptx::st_global_v2(row + first,
                                  make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16));
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kSize; i++) {
                if (first + i < cols) row[first + i] = Element<T>::of(static_cast<Bits<T>>(bits[i]));
            }
        }
    }
};
