// Causal attention of new rows over their sequences' entries in the paged KV cache, prefill and
// decode mixed, with grouped queries.
//
// The unit is a query vector: one head of one row. An item is some consecutive rows of one
// sequence; its query vectors of a KV head go in tiles of kAttentionQueries, each of which shares
// what a block reads of keys and values.
//
// A context is cut into chunks of kAttentionChunk positions, counted from the sequence's start. For
// each chunk, in three steps: the scores of its positions; softmax over them (the greatest
// subtracted); the weighted sum of the values, position after position. Chunks are folded in their
// order, each result rescaled to the greater maximum (Milakov and Gimelshein, 2018). Who computes a
// chunk changes no bit: an item either walks through all its chunks, or covers one of them and
// leaves its result in memory, where the block that arrives last folds them the same way (split-KV,
// for a few rows over a long context, which would otherwise keep only a few multiprocessors busy).
// So a row's bits depend on its sequence alone.
//
// Pages of a layer: keys and values [num_blocks, kv_heads, page_size, padded] each, where padded is
// head_dim, at most kAttentionHeadDim, rounded up to kHeadPadding; the padding is zeros, and adds
// nothing to a score. They start at multiples of 16 bytes.
//
// Grid: x over the items, y over the KV heads, z over the tiles of the largest item. Block:
// kAttentionThreads; query vector q of a tile is warp q % 4's. Dynamic shared memory:
// attention_shared_bytes (src/backend/cuda/attention.rs), laid out as Shared below. The floor of
// decode is each entry read once for up to kAttentionQueries heads of a group; that of prefill
// 4 * head_dim operations for every query vector and position.

#include <math_constants.h>

#include "abi.h"
#include "pack.cuh"
#include "ptx/atomic.cuh"

namespace {

constexpr uint32_t kWarps = kAttentionThreads / kWarpThreads;
// Query vectors of a warp.
constexpr uint32_t kMine = kAttentionQueries / kWarps;
// Entries in shared memory at a time: a lane each, where scores are computed.
constexpr uint32_t kEntries = kWarpThreads;
// Groups of four elements of a head that a lane sums.
constexpr uint32_t kQuads = kAttentionHeadDim / 4 / kWarpThreads;

// The parts of the block's dynamic shared memory.
struct Shared {
    // [kAttentionChunk]: where in the pages each position of the chunk is.
    uint64_t *offsets;
    // [kAttentionQueries, padded]
    float *queries;
    // [kEntries, padded + 4]: four elements more, so that lanes that read the same columns of
    // different entries meet in no bank.
    float *entries;
    // [kAttentionQueries, kAttentionChunk]
    float *scores;
    uint32_t padded;

    __device__ __forceinline__ explicit Shared(uint32_t head_dim)
        : padded((head_dim + kHeadPadding - 1) / kHeadPadding * kHeadPadding) {
        extern __shared__ uint64_t memory[];
        offsets = memory;
        queries = reinterpret_cast<float *>(memory + kAttentionChunk);
        entries = queries + kAttentionQueries * padded;
        scores = entries + kEntries * (padded + 4);
    }
    __device__ __forceinline__ float4 query(uint32_t q, uint32_t quad) const {
        return *reinterpret_cast<const float4 *>(&queries[q * padded + 4 * quad]);
    }
    __device__ __forceinline__ float4 entry(uint32_t i, uint32_t quad) const {
        return *reinterpret_cast<const float4 *>(&entries[i * (padded + 4) + 4 * quad]);
    }
    __device__ __forceinline__ float &score(uint32_t q, uint32_t i) const {
        return scores[q * kAttentionChunk + i];
    }
};

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
    sum = __fmaf_rn(a.x, b.x, sum);
    sum = __fmaf_rn(a.y, b.y, sum);
    sum = __fmaf_rn(a.z, b.z, sum);
    return __fmaf_rn(a.w, b.w, sum);
}

// p * v + sum
__device__ __forceinline__ float4 add_scaled(float p, float4 v, float4 sum) {
    return make_float4(__fmaf_rn(p, v.x, sum.x), __fmaf_rn(p, v.y, sum.y),
                       __fmaf_rn(p, v.z, sum.z), __fmaf_rn(p, v.w, sum.w));
}

__device__ __forceinline__ float4 scaled(float4 v, float by) {
    return make_float4(__fmul_rn(v.x, by), __fmul_rn(v.y, by), __fmul_rn(v.z, by),
                       __fmul_rn(v.w, by));
}

// e^(scale * (score - greatest))
__device__ __forceinline__ float weight(float scale, float score, float greatest) {
    return expf(__fmul_rn(scale, __fsub_rn(score, greatest)));
}

// What some positions come to for one query vector: their greatest score, the sum of their weights
// relative to it, and the weighted sum of their values. A lane has its columns of the last.
struct Part {
    float greatest;
    float sum;
    float4 values[kQuads];

    static __device__ __forceinline__ Part empty() {
        Part part = {};
        part.greatest = -CUDART_INF_F;
        return part;
    }

    // Takes in the positions after these.
    __device__ __forceinline__ void fold(const Part &next, float scale) {
        const float most = fmaxf(greatest, next.greatest);
        const float ours = weight(scale, greatest, most);
        const float theirs = weight(scale, next.greatest, most);
        greatest = most;
        sum = __fmaf_rn(next.sum, theirs, __fmul_rn(sum, ours));
#pragma unroll
        for (uint32_t i = 0; i < kQuads; i++) {
            values[i] = add_scaled(theirs, next.values[i], scaled(values[i], ours));
        }
    }
};

// A tile of query vectors: which they are.
struct Tile {
    AttentionItem item;
    uint32_t kv_head, group;
    // The first of them among the item's of this KV head, row after row, and how many.
    uint32_t first, queries;

    __device__ __forceinline__ explicit Tile(const AttentionParams &params)
        : item(params.items[blockIdx.x]), kv_head(blockIdx.y),
          group(params.q_heads / params.kv_heads), first(blockIdx.z * kAttentionQueries) {
        const uint32_t all = item.rows * group;
        queries = first < all ? min(all - first, kAttentionQueries) : 0;
    }
    // The row of query vector q, among the item's.
    __device__ __forceinline__ uint32_t row(uint32_t q) const { return (first + q) / group; }
    __device__ __forceinline__ uint32_t head(uint32_t q) const {
        return kv_head * group + (first + q) % group;
    }
    // Positions that it attends to: its own and those before.
    __device__ __forceinline__ uint32_t length(uint32_t q) const {
        return item.position + row(q) + 1;
    }
    __device__ __forceinline__ uint32_t longest() const { return length(queries - 1); }
};

template <typename T>
__device__ __forceinline__ void load_queries(const AttentionParams &params, const Tile &tile,
                                             const Shared &shared) {
    const uint32_t packs = shared.padded / Pack<T>::kSize;
    for (uint32_t i = threadIdx.x; i < tile.queries * packs; i += kAttentionThreads) {
        const uint32_t q = i / packs, first = i % packs * Pack<T>::kSize;
        const uint64_t row = tile.item.first_row + tile.row(q);
        const T *from = static_cast<const T *>(params.qkv) + row * params.qkv_stride +
                        static_cast<uint64_t>(tile.head(q)) * params.head_dim;
        const Pack<T> pack = Pack<T>::load(from, first, params.head_dim, params.qkv_aligned != 0);
#pragma unroll
        for (uint32_t e = 0; e < Pack<T>::kSize; e++) {
            shared.queries[q * shared.padded + first + e] = pack[e];
        }
    }
}

// Looks up where the chunk's `count` positions from `begin` on are.
__device__ __forceinline__ void locate(const AttentionParams &params, const Tile &tile,
                                       const Shared &shared, uint32_t begin, uint32_t count) {
    // Two turns at most.
#pragma unroll
    for (uint32_t turn = 0; turn < kAttentionChunk / kAttentionThreads; turn++) {
        const uint32_t i = turn * kAttentionThreads + threadIdx.x;
        if (i >= count) break;
        const uint32_t position = begin + i;
        const uint64_t block = params.tables[tile.item.table + position / params.page_size];
        const uint64_t head = block * params.kv_heads + tile.kv_head;
        const uint64_t entry = head * params.page_size + position % params.page_size;
        shared.offsets[i] = entry * shared.padded;
    }
}

// Brings kEntries entries of the chunk from `first` on, widened; zeros from `count` on.
template <typename T>
__device__ __forceinline__ void load_entries(const void *pages, const Shared &shared,
                                             uint32_t first, uint32_t count) {
    const uint32_t packs = shared.padded / Pack<T>::kSize;
    uint32_t entry = threadIdx.x / packs, at = threadIdx.x % packs;
    const uint32_t entries_on = kAttentionThreads / packs, packs_on = kAttentionThreads % packs;
    while (entry < kEntries) {
        Pack<T> pack = {};
        if (first + entry < count) {
            const T *from = static_cast<const T *>(pages) + shared.offsets[first + entry];
            pack = Pack<T>::load(from + at * Pack<T>::kSize);
        }
        float *to = &shared.entries[entry * (shared.padded + 4) + at * Pack<T>::kSize];
#pragma unroll
        for (uint32_t e = 0; e < Pack<T>::kSize; e += 4) {
            *reinterpret_cast<float4 *>(to + e) =
                make_float4(pack[e], pack[e + 1], pack[e + 2], pack[e + 3]);
        }
        entry += entries_on;
        at += packs_on;
        if (at >= packs) {
            at -= packs;
            entry++;
        }
    }
}

// The scores of the entries in shared memory, positions `first`.. of the chunk: a lane has one of
// them, for all of the warp's query vectors.
__device__ __forceinline__ void score(const Shared &shared, uint32_t first, uint32_t mine) {
    const uint32_t lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    float sums[kMine] = {};
    for (uint32_t quad = 0; quad < shared.padded / 4; quad++) {
        const float4 key = shared.entry(lane, quad);
#pragma unroll
        for (uint32_t i = 0; i < kMine; i++) {
            if (i >= mine) break;
            sums[i] = dot(shared.query(warp + i * kWarps, quad), key, sums[i]);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < kMine; i++) {
        if (i < mine) shared.score(warp + i * kWarps, first + lane) = sums[i];
    }
}

// Turns the chunk's scores of query vector q into weights, and says their greatest and their sum.
// The warp's own: no other touches them.
__device__ __forceinline__ Part softmax(const Shared &shared, uint32_t q, uint32_t count,
                                        float scale) {
    const uint32_t lane = threadIdx.x % kWarpThreads;
    Part part = Part::empty();
    for (uint32_t i = lane; i < count; i += kWarpThreads) {
        part.greatest = fmaxf(part.greatest, shared.score(q, i));
    }
#pragma unroll
    for (uint32_t far = kWarpThreads / 2; far > 0; far /= 2) {
        part.greatest = fmaxf(part.greatest, __shfl_xor_sync(0xffffffffu, part.greatest, far));
    }
    for (uint32_t i = lane; i < count; i += kWarpThreads) {
        float &score = shared.score(q, i);
        score = weight(scale, score, part.greatest);
        part.sum = __fadd_rn(part.sum, score);
    }
#pragma unroll
    for (uint32_t far = kWarpThreads / 2; far > 0; far /= 2) {
        part.sum = __fadd_rn(part.sum, __shfl_xor_sync(0xffffffffu, part.sum, far));
    }
    return part;
}

// Adds the weighted values in shared memory, positions `first`.. of the chunk. A query vector takes
// what it attends to and touches nothing beyond: zero times what lies there need not be zero.
__device__ __forceinline__ void add_values(const Shared &shared, uint32_t first, uint32_t mine,
                                           const uint32_t (&lengths)[kMine],
                                           Part (&parts)[kMine]) {
    const uint32_t lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    for (uint32_t j = 0; j < kEntries; j++) {
        float4 value[kQuads];
#pragma unroll
        for (uint32_t k = 0; k < kQuads; k++) {
            const uint32_t quad = lane + k * kWarpThreads;
            const bool is_there = quad < shared.padded / 4;
            value[k] = is_there ? shared.entry(j, quad) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (uint32_t i = 0; i < kMine; i++) {
            if (i >= mine || first + j >= lengths[i]) continue;
            const float p = shared.score(warp + i * kWarps, first + j);
#pragma unroll
            for (uint32_t k = 0; k < kQuads; k++) {
                parts[i].values[k] = add_scaled(p, value[k], parts[i].values[k]);
            }
        }
    }
}

// One chunk, for all query vectors of the tile; every thread of the block calls it. `lengths` are
// counted from the chunk's start.
template <typename T>
__device__ __forceinline__ void attend(const AttentionParams &params, const Tile &tile,
                                       const Shared &shared, uint32_t begin, uint32_t mine,
                                       const uint32_t (&lengths)[kMine], Part (&parts)[kMine]) {
    const uint32_t warp = threadIdx.x / kWarpThreads;
    const uint32_t count = min(tile.longest() - begin, kAttentionChunk);
    locate(params, tile, shared, begin, count);
    // Orders the offsets' (and queries') writes before their reads.
    __syncthreads();
    for (uint32_t first = 0; first < count; first += kEntries) {
        load_entries<T>(params.keys, shared, first, count);
        // Orders the entries' writes before their reads, and below the reverse.
        __syncthreads();
        score(shared, first, mine);
        __syncthreads();
    }
#pragma unroll
    for (uint32_t i = 0; i < kMine; i++) {
        if (i >= mine || lengths[i] == 0) continue;
        const uint32_t own = min(lengths[i], kAttentionChunk);
        parts[i] = softmax(shared, warp + i * kWarps, own, params.scale);
    }
    for (uint32_t first = 0; first < count; first += kEntries) {
        load_entries<T>(params.values, shared, first, count);
        // As above; the first one also orders the weights' writes before other lanes' reads.
        __syncthreads();
        add_values(shared, first, mine, lengths, parts);
        __syncthreads();
    }
}

// The results of an item's chunk, [partial rows, q_heads, padded] and [partial rows, q_heads, 2]:
// the same threads write and read the same columns of the same query vectors.
struct Partials {
    float *values;
    float *stats;
    uint32_t padded;

    __device__ __forceinline__ Partials(const AttentionParams &params, const Tile &tile,
                                        const Shared &shared, uint32_t chunk, uint32_t q)
        : padded(shared.padded) {
        const uint64_t row = tile.item.partials + chunk * tile.item.rows + tile.row(q);
        const uint64_t index = row * params.q_heads + tile.head(q);
        values = params.partials + index * padded;
        stats = params.stats + 2 * index;
    }
    __device__ __forceinline__ void store(const Part &part) const {
        const uint32_t lane = threadIdx.x % kWarpThreads;
        if (lane == 0) {
            stats[0] = part.greatest;
            stats[1] = part.sum;
        }
#pragma unroll
        for (uint32_t k = 0; k < kQuads; k++) {
            const uint32_t quad = lane + k * kWarpThreads;
            if (quad < padded / 4) reinterpret_cast<float4 *>(values)[quad] = part.values[k];
        }
    }
    __device__ __forceinline__ Part load() const {
        const uint32_t lane = threadIdx.x % kWarpThreads;
        Part part = Part::empty();
        part.greatest = stats[0];
        part.sum = stats[1];
#pragma unroll
        for (uint32_t k = 0; k < kQuads; k++) {
            const uint32_t quad = lane + k * kWarpThreads;
            if (quad < padded / 4) part.values[k] = reinterpret_cast<float4 *>(values)[quad];
        }
        return part;
    }
};

// Whether this block is the last of its tile's to have left its chunk in memory. If so, the others'
// chunks can be read.
__device__ __forceinline__ bool arrives_last(const AttentionParams &params, const Tile &tile) {
    __shared__ bool last;
    // Orders this block's partials before the arrival, which releases them.
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t index =
            (tile.item.tile * params.kv_heads + tile.kv_head) * gridDim.z + blockIdx.z;
        uint32_t *arrivals = params.arrivals + index;
        last = ptx::atom_add_acq_rel_gpu(arrivals, 1) + 1 == tile.item.chunks;
        // As the next launch expects it; nobody else of this one comes.
        if (last) *arrivals = 0;
    }
    // Orders the arrival, which acquired the others' partials, before the reads of them.
    __syncthreads();
    return last;
}

template <typename T> __device__ __forceinline__ void attention(const AttentionParams &params) {
    const Tile tile(params);
    // Items have different numbers of tiles; the whole block leaves.
    if (tile.queries == 0) return;
    const Shared shared(params.head_dim);
    const uint32_t lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    const uint32_t mine = (tile.queries + kWarps - 1 - warp) / kWarps;
    const bool split = tile.item.chunks != 0;
    load_queries<T>(params, tile, shared);

    Part totals[kMine];
#pragma unroll
    for (uint32_t i = 0; i < kMine; i++) totals[i] = Part::empty();
    const uint32_t chunks = (tile.longest() + kAttentionChunk - 1) / kAttentionChunk;
    const uint32_t from = split ? tile.item.chunk : 0, to = split ? from + 1 : chunks;
    // Of a tile that is shorter than its item, a late chunk has nothing.
    for (uint32_t chunk = from; chunk < min(to, chunks); chunk++) {
        const uint32_t begin = chunk * kAttentionChunk;
        uint32_t lengths[kMine];
        Part parts[kMine];
#pragma unroll
        for (uint32_t i = 0; i < kMine; i++) {
            const uint32_t length = i < mine ? tile.length(warp + i * kWarps) : 0;
            lengths[i] = length > begin ? length - begin : 0;
            parts[i] = Part::empty();
        }
        attend<T>(params, tile, shared, begin, mine, lengths, parts);
#pragma unroll
        for (uint32_t i = 0; i < kMine; i++) {
            if (lengths[i] == 0) continue;
            if (split) {
                Partials(params, tile, shared, chunk, warp + i * kWarps).store(parts[i]);
            } else {
                totals[i].fold(parts[i], params.scale);
            }
        }
    }
    if (split) {
        if (!arrives_last(params, tile)) return;
#pragma unroll
        for (uint32_t i = 0; i < kMine; i++) {
            if (i >= mine) break;
            const uint32_t q = warp + i * kWarps;
            for (uint32_t chunk = 0; chunk * kAttentionChunk < tile.length(q); chunk++) {
                totals[i].fold(Partials(params, tile, shared, chunk, q).load(), params.scale);
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < kMine; i++) {
        if (i >= mine) break;
        const uint32_t q = warp + i * kWarps;
        const uint64_t row = tile.item.first_row + tile.row(q);
        T *out = static_cast<T *>(params.out) + row * params.out_stride +
                 static_cast<uint64_t>(tile.head(q)) * params.head_dim;
#pragma unroll
        for (uint32_t k = 0; k < kQuads; k++) {
            const uint32_t quad = lane + k * kWarpThreads;
            if (quad >= shared.padded / 4) continue;
            const float4 v = totals[i].values[k];
            const Quad<T> result = {{__fdiv_rn(v.x, totals[i].sum), __fdiv_rn(v.y, totals[i].sum),
                                     __fdiv_rn(v.z, totals[i].sum),
                                     __fdiv_rn(v.w, totals[i].sum)}};
            result.store(out, 4 * quad, params.head_dim, params.out_aligned != 0);
        }
    }
}

}  // namespace

// At least four blocks a multiprocessor: left to itself, ptxas takes registers for three on some.
#define RINGTP_ATTENTION(suffix, T)                                                      \
    extern "C" __global__ void __launch_bounds__(kAttentionThreads, 4)                   \
        attention_##suffix(const __grid_constant__ AttentionParams params) {             \
        attention<T>(params);                                                            \
    }

RINGTP_ATTENTION(f32, float)
RINGTP_ATTENTION(f16, f16)
RINGTP_ATTENTION(bf16, bf16)
