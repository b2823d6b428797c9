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

// cuda/gemm.cu. Up to this many rows of x the weights are streamed, from there on they go through
// tiles: two row classes, each with its own order of summation.
enum { kGemmFewRows = 4 };
enum { kGemmFewThreads = 128, kGemmFewCols = 16, kGemmThreads = 256, kGemmTile = 64 };

// `x` is [rows, depth] and `w` [cols, depth] of the kernel's element type, with strides in elements;
// `out` and `residual` are [rows, cols], with gate_up [rows, cols / 2], of that type or, with
// wide_out, in f32. `bias` is [cols] in f32. `bias` and `residual` may be null. With gate_up the
// rows of `w` alternate, gate and up, while the bias has first all of the gate's, then the up's.
typedef struct GemmParams {
    const void *x;
    const void *w;
    const float *bias;
    const void *residual;
    void *out;
    uint64_t x_stride;
    uint64_t w_stride;
    uint64_t residual_stride;
    uint64_t out_stride;
    uint32_t rows;
    uint32_t cols;
    uint32_t depth;
    uint32_t gate_up;
    uint32_t wide_out;
    // Whether rows start at multiples of 16 bytes: of x, of w, of out and residual.
    uint32_t x_aligned;
    uint32_t w_aligned;
    uint32_t out_aligned;
} GemmParams;
RINGTP_ABI_SIZE(GemmParams, 104)

// cuda/rope.cu. `qkv` is [rows, (q_heads + 2 kv_heads) * head_dim], with a stride in elements; `cos`
// and `sin` are [rows, head_dim / 2] in f32; `slots` is [rows, 2]: block, and slot in it. `keys` and
// `values` are the pages of a layer, [num_blocks, kv_heads, page_size, head_dim rounded up], at
// multiples of 16 bytes.
enum { kRopeThreads = 256 };
// Entries of the KV cache are rounded up to this many elements: whole packs in every type.
enum { kHeadPadding = 8 };

typedef struct RopeParams {
    void *qkv;
    const float *cos;
    const float *sin;
    const uint32_t *slots;
    void *keys;
    void *values;
    uint64_t qkv_stride;
    uint32_t q_heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t page_size;
    // Whether rows and heads of qkv start at multiples of 16 bytes; whether rows of the tables do.
    uint32_t aligned;
    uint32_t tables_aligned;
} RopeParams;
RINGTP_ABI_SIZE(RopeParams, 80)

// cuda/attention.cu: query vectors that share what a block reads, positions of a chunk, rows of an
// item, and the largest head.
enum {
    kAttentionThreads = 128,
    kAttentionQueries = 16,
    kAttentionChunk = 256,
    kAttentionRows = 16,
    kAttentionHeadDim = 256
};

// Some consecutive rows of a sequence, at most kAttentionRows, that attend to their context or to a
// chunk of it.
typedef struct AttentionItem {
    // Where the sequence's block table starts among all tables.
    uint32_t table;
    uint32_t first_row;
    uint32_t rows;
    // The position of the first row.
    uint32_t position;
    // 0 where the item covers its whole context; else into how many items, a chunk each, the rows
    // are split, and which this is.
    uint32_t chunks;
    uint32_t chunk;
    // Of split rows: the first of their chunks * rows partial results, and the number of the split.
    uint32_t partials;
    uint32_t tile;
} AttentionItem;
RINGTP_ABI_SIZE(AttentionItem, 32)

// `qkv` is [rows, qkv_stride], queries rotated and first; `out` is [rows, q_heads * head_dim]; both
// with strides in elements. `partials` and `stats` have room for the results of split items,
// `arrivals` is zero, and is again afterwards.
typedef struct AttentionParams {
    const void *qkv;
    const void *keys;
    const void *values;
    void *out;
    const AttentionItem *items;
    const uint32_t *tables;
    float *partials;
    float *stats;
    uint32_t *arrivals;
    uint64_t qkv_stride;
    uint64_t out_stride;
    uint32_t q_heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t page_size;
    float scale;
    // Whether rows and heads start at multiples of 16 bytes.
    uint32_t qkv_aligned;
    uint32_t out_aligned;
    uint32_t pad;
} AttentionParams;
RINGTP_ABI_SIZE(AttentionParams, 120)

// cuda/rows.cu. `table` is [table_rows, cols] and `out` [rows, cols] of the kernel's element type, with
// strides in elements; `ids` is [rows], or null for every row in order. add_bias takes [cols] in f32
// for the table, and no ids.
enum { kRowsThreads = 128 };

typedef struct RowsParams {
    const void *table;
    const uint32_t *ids;
    void *out;
    uint64_t table_stride;
    uint64_t out_stride;
    uint64_t first_id;
    uint64_t table_rows;
    uint32_t rows;
    uint32_t cols;
    // Whether rows of both start at multiples of 16 bytes.
    uint32_t aligned;
    uint32_t pad;
} RowsParams;
RINGTP_ABI_SIZE(RowsParams, 72)

// cuda/sampling.cu. The forms of records are those of src/llama/sampling/record.rs.
enum { kRecordThreads = 512 };
enum { kRecordBest = 0, kRecordDrawn = 1, kRecordCandidates = 2 };

// A record that is wanted. `penalized` and `banned` are where its ids start among all, each of this
// rank's; `out` is where its `words` words are.
typedef struct RecordRequest {
    uint64_t seed;
    uint64_t draw;
    uint32_t row;
    uint32_t kind;
    uint32_t count;
    uint32_t wants_mass;
    float temperature;
    float penalty;
    uint32_t penalized;
    uint32_t penalized_count;
    uint32_t banned;
    uint32_t banned_count;
    uint32_t out;
    uint32_t words;
} RecordRequest;
RINGTP_ABI_SIZE(RecordRequest, 64)

// `logits` are [rows, cols] in f32 with a stride in elements, this rank's ids from first_id on;
// `edited` has room for [records, cols] if any record has ids.
typedef struct RecordsParams {
    const float *logits;
    float *edited;
    const RecordRequest *requests;
    const uint32_t *ids;
    uint32_t *out;
    uint64_t stride;
    uint32_t cols;
    uint32_t first_id;
} RecordsParams;
RINGTP_ABI_SIZE(RecordsParams, 56)

#include "collective/abi.h"

#endif
