// Elements of activations, weights and caches: f32, f16 and bf16. The halves are types of our own:
// all that kernels want of them is their bits and three conversions, and the toolkit's headers cost
// the compiler a second a file.
#pragma once

#include <stdint.h>

#include "ptx/convert.cuh"

struct f16 {
    uint16_t bits;
};

struct bf16 {
    uint16_t bits;
};

// The bits of an element, and what they stand for. Arithmetic is in f32 always.
template <typename T> struct Element;

template <> struct Element<float> {
    using Bits = uint32_t;
    static __device__ __forceinline__ Bits bits(float element) { return __float_as_uint(element); }
    static __device__ __forceinline__ float of(Bits bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ float to_f32(Bits bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ Bits from_f32(float value) { return __float_as_uint(value); }
};

template <> struct Element<f16> {
    using Bits = uint16_t;
    static __device__ __forceinline__ Bits bits(f16 element) { return element.bits; }
    static __device__ __forceinline__ f16 of(Bits bits) { return {bits}; }
    static __device__ __forceinline__ float to_f32(Bits bits) { return ptx::cvt_f32_f16(bits); }
    static __device__ __forceinline__ Bits from_f32(float value) {
        return ptx::cvt_rn_f16_f32(value);
    }
};

template <> struct Element<bf16> {
    using Bits = uint16_t;
    static __device__ __forceinline__ Bits bits(bf16 element) { return element.bits; }
    static __device__ __forceinline__ bf16 of(Bits bits) { return {bits}; }
    // The upper half of an f32.
    static __device__ __forceinline__ float to_f32(Bits bits) {
        return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    }
    static __device__ __forceinline__ Bits from_f32(float value) {
        return ptx::cvt_rn_bf16_f32(value);
    }
};

// Where elements are moved and not looked at, any type of their width does.
template <> struct Element<uint32_t> {
    using Bits = uint32_t;
};

template <> struct Element<uint16_t> {
    using Bits = uint16_t;
};

template <typename T> using Bits = typename Element<T>::Bits;
