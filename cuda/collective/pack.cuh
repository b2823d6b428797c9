// Packs: 16 bytes of elements, the unit in which collectives read, sum and write.
#pragma once

#include "../element.cuh"
#include "../ptx/memory.cuh"
#include "abi.h"

namespace collective {

// Elements of a pack.
template <typename T> constexpr uint32_t kPerPack = 16 / sizeof(T);

// Packs that hold `elements` elements, the last perhaps in part.
template <typename T> __device__ __forceinline__ uint64_t packs_of(uint64_t elements) {
    return (elements + kPerPack<T> - 1) / kPerPack<T>;
}

// The part of `n` that rank `rank` of `world_size` owns: parts differ by at most one, the longer
// ones come first.
struct Part {
    uint64_t first;
    uint64_t count;

    __device__ __forceinline__ Part(uint64_t n, uint32_t world_size, uint32_t rank)
        : first(rank * (n / world_size) + min(static_cast<uint64_t>(rank), n % world_size)),
          count(n / world_size + (rank < n % world_size ? 1 : 0)) {}
};

// A word of a pack. The index is a constant wherever loops are unrolled: no pack lives in memory.
__device__ __forceinline__ uint32_t &word_of(uint4 &pack, uint32_t index) {
    return index == 0 ? pack.x : index == 1 ? pack.y : index == 2 ? pack.z : pack.w;
}

__device__ __forceinline__ uint32_t word_of(const uint4 &pack, uint32_t index) {
    return index == 0 ? pack.x : index == 1 ? pack.y : index == 2 ? pack.z : pack.w;
}

// The bits of element `index` of a pack.
template <typename T>
__device__ __forceinline__ Bits<T> bits_of(const uint4 &pack, uint32_t index) {
    if (sizeof(T) == 4) return static_cast<Bits<T>>(word_of(pack, index));
    return static_cast<Bits<T>>(word_of(pack, index / 2) >> (16 * (index % 2)));
}

// Puts the bits of element `index` into a pack that has zeros there.
template <typename T>
__device__ __forceinline__ void put_bits(uint4 &pack, uint32_t index, Bits<T> bits) {
    if (sizeof(T) == 4)
        word_of(pack, index) = bits;
    else
        word_of(pack, index / 2) |= static_cast<uint32_t>(bits) << (16 * (index % 2));
}

// Whether packs can be moved whole to or from an address.
__device__ __forceinline__ bool is_aligned(uint64_t address) {
    return address % 16 == 0;
}

// Pack `index` of the `elements` elements at `base`, which may lie anywhere; zeros behind the last.
template <typename T>
__device__ __forceinline__ uint4 load_pack(uint64_t base, uint64_t index, uint64_t elements) {
    const uint64_t first = index * kPerPack<T>;
    if (is_aligned(base) && first + kPerPack<T> <= elements)
        return ptx::ld_global_v4(reinterpret_cast<const uint4 *>(base) + index);
    uint4 pack = make_uint4(0, 0, 0, 0);
    const auto *source = reinterpret_cast<const Bits<T> *>(base) + first;
#pragma unroll
    for (uint32_t i = 0; i < kPerPack<T>; ++i)
        if (first + i < elements) put_bits<T>(pack, i, ptx::ld_global(source + i));
    return pack;
}

// The inverse: what lies behind the last element is not written.
template <typename T>
__device__ __forceinline__ void store_pack(uint64_t base, uint64_t index, uint64_t elements,
                                           uint4 pack) {
    const uint64_t first = index * kPerPack<T>;
    if (is_aligned(base) && first + kPerPack<T> <= elements) {
        ptx::st_global_v4(reinterpret_cast<uint4 *>(base) + index, pack);
        return;
    }
    auto *target = reinterpret_cast<Bits<T> *>(base) + first;
#pragma unroll
    for (uint32_t i = 0; i < kPerPack<T>; ++i)
        if (first + i < elements) ptx::st_global(target + i, bits_of<T>(pack, i));
}

// The sum of packs in the order in which they are added, in f32, rounded once. A negative zero
// becomes a positive one, also one that rounding makes of a tiny negative sum, so that ranks agree
// bit for bit whatever the algorithm.
template <typename T> struct Sum {
    float values[kPerPack<T>];

    __device__ __forceinline__ explicit Sum(const uint4 &first) {
#pragma unroll
        for (uint32_t i = 0; i < kPerPack<T>; ++i)
            values[i] = Element<T>::to_f32(bits_of<T>(first, i));
    }

    __device__ __forceinline__ void add(const uint4 &pack) {
#pragma unroll
        for (uint32_t i = 0; i < kPerPack<T>; ++i)
            values[i] += Element<T>::to_f32(bits_of<T>(pack, i));
    }

    __device__ __forceinline__ uint4 round() const {
        uint4 pack = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t i = 0; i < kPerPack<T>; ++i) {
            Bits<T> bits = Element<T>::from_f32(values[i]);
            constexpr Bits<T> kNegativeZero = static_cast<Bits<T>>(1u << (8 * sizeof(T) - 1));
            if (bits == kNegativeZero) bits = 0;
            put_bits<T>(pack, i, bits);
        }
        return pack;
    }
};

// The sum over all ranks, in rank order, of the pack `at(rank)`. All loads come first: they are
// under way together.
template <typename T, typename At>
__device__ __forceinline__ uint4 sum_over_ranks(uint32_t world_size, At at) {
    uint4 terms[kMaxRanks];
#pragma unroll
    for (uint32_t rank = 0; rank < kMaxRanks; ++rank)
        if (rank < world_size) terms[rank] = ptx::ld_global_v4(at(rank));
    Sum<T> sum(terms[0]);
#pragma unroll
    for (uint32_t rank = 1; rank < kMaxRanks; ++rank)
        if (rank < world_size) sum.add(terms[rank]);
    return sum.round();
}

}  // namespace collective
