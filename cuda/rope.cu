// The rotary embedding (Su et al., 2021) and the append to the KV cache, in one pass over the
// queries, keys and values of a batch's new rows:
//
//   queries  rotated in place, rounded to the element type
//   keys     rotated, rounded and written to the row's slot of the pages
//   values   copied to the row's slot of the pages
//
// Pairs are (i, i + head_dim / 2), as in Hugging Face checkpoints. The angles come as tables, so
// that every kind of scaling is the host's business.
//
// Pages of a layer: keys and values [num_blocks, kv_heads, page_size, padded] each, where padded is
// head_dim rounded up to kHeadPadding: an entry is whole packs. The padding is zeros.
//
// Grid: one block a row. Block: kRopeThreads. No shared memory. Memory-bound; the floor is each
// element read once and written once.

#include "abi.h"
#include "pack.cuh"

namespace {

template <typename T> __device__ __forceinline__ void rope_append(const RopeParams &params) {
    const uint64_t row = blockIdx.x;
    const uint32_t head_dim = params.head_dim, half = head_dim / 2;
    const uint32_t padded = (head_dim + kHeadPadding - 1) / kHeadPadding * kHeadPadding;
    const bool aligned = params.aligned != 0;
    const bool half_aligned = aligned && half % Pack<T>::kSize == 0;
    T *qkv = static_cast<T *>(params.qkv) + row * params.qkv_stride;
    const float *cos = params.cos + row * half, *sin = params.sin + row * half;

    // Where the row's entry of a KV head is, in both halves of the cache.
    const uint64_t block = params.slots[2 * row], slot = params.slots[2 * row + 1];
    auto entry = [&](uint32_t head) {
        return ((block * params.kv_heads + head) * params.page_size + slot) * padded;
    };

    const uint32_t rotated = params.q_heads + params.kv_heads;
    const uint32_t half_packs = (half + Pack<T>::kSize - 1) / Pack<T>::kSize;
    for (uint32_t i = threadIdx.x; i < rotated * half_packs; i += blockDim.x) {
        const uint32_t head = i / half_packs, first = i % half_packs * Pack<T>::kSize;
        T *from = qkv + static_cast<uint64_t>(head) * head_dim;
        const Pack<T> low = Pack<T>::load(from, first, half, half_aligned);
        const Pack<T> high = Pack<T>::load(from + half, first, half, half_aligned);
        const VectorPack<T> c = VectorPack<T>::load(cos, first, half, params.tables_aligned != 0);
        const VectorPack<T> s = VectorPack<T>::load(sin, first, half, params.tables_aligned != 0);
        const Pack<T> turned_low = Pack<T>::of([&](uint32_t e) {
            return __fsub_rn(__fmul_rn(low[e], c[e]), __fmul_rn(high[e], s[e]));
        });
        const Pack<T> turned_high = Pack<T>::of([&](uint32_t e) {
            return __fadd_rn(__fmul_rn(high[e], c[e]), __fmul_rn(low[e], s[e]));
        });
        T *to = head < params.q_heads
                    ? from
                    : static_cast<T *>(params.keys) + entry(head - params.q_heads);
        turned_low.store(to, first, half, half_aligned);
        turned_high.store(to + half, first, half, half_aligned);
    }

    for (uint32_t i = threadIdx.x; i < params.kv_heads * (padded - head_dim); i += blockDim.x) {
        const uint32_t head = i / (padded - head_dim), at = head_dim + i % (padded - head_dim);
        static_cast<T *>(params.keys)[entry(head) + at] = Element<T>::of(0);
    }

    const uint32_t packs = padded / Pack<T>::kSize;
    const T *values = qkv + static_cast<uint64_t>(rotated) * head_dim;
    for (uint32_t i = threadIdx.x; i < params.kv_heads * packs; i += blockDim.x) {
        const uint32_t head = i / packs, first = i % packs * Pack<T>::kSize;
        const T *from = values + static_cast<uint64_t>(head) * head_dim;
        T *to = static_cast<T *>(params.values) + entry(head);
        // An entry is whole packs.
        Pack<T>::load(from, first, head_dim, aligned).store(to + first);
    }
}

}  // namespace

#define RINGTP_ROPE(suffix, T)                                                           \
    extern "C" __global__ void __launch_bounds__(kRopeThreads)                           \
        rope_append_##suffix(const __grid_constant__ RopeParams params) {                \
        rope_append<T>(params);                                                          \
    }

RINGTP_ROPE(f32, float)
RINGTP_ROPE(f16, f16)
RINGTP_ROPE(bf16, bf16)
