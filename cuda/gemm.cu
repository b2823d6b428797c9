// The matrix product, out = epilogue(x wᵀ), with x [rows, depth] and w [cols, depth] as checkpoints
// have it. Sums are taken in f32; the epilogue adds the bias, makes silu(gate) * up of adjacent
// columns, adds the residual, and rounds once. Two kernels, one a row class:
//
//   gemm_few   up to kGemmFewRows rows: a warp streams four rows of w, sixteen bytes a lane, and
//              holds them against every row of x. Grid: one block for kGemmFewCols columns. Block:
//              kGemmFewThreads. No shared memory. Memory-bound; the floor is each weight read once.
//              A lane sums its packs in order, then a butterfly sums the lanes.
//   gemm_many  tiles of 64 rows by 64 columns. Grid: x over the columns, y over the rows. Block:
//              kGemmThreads, four rows by four columns a thread. Shared memory: 16 KiB, a tile of
//              each operand, 32 columns deep. The floor is rows * cols * depth fused operations;
//              the weights are read once for every 64 rows. Each sum runs through K in order.
//
// So the bits of a row depend on that row, the weights, K and the element type, and on which of the
// classes the batch is in: not on other rows, on strides or on alignment.

#include "abi.h"
#include "pack.cuh"

namespace {

// x / (1 + e^-x). Where e^-x overflows the quotient is zero, as it should be to within e^-88 x.
__device__ __forceinline__ float silu(float x) {
    return __fdividef(x, __fadd_rn(1.0f, expf(-x)));
}

// Ends four adjacent columns of w, from `col` on, of one row.
template <typename Out>
__device__ __forceinline__ void finish_as(const GemmParams &params, uint32_t row, uint32_t col,
                                          const float (&sums)[4]) {
    const bool gate_up = params.gate_up != 0;
    const uint32_t width = gate_up ? params.cols / 2 : params.cols;
    const uint32_t first = gate_up ? col / 2 : col;
    const Out *residual =
        static_cast<const Out *>(params.residual) + row * params.residual_stride;
    Out *out = static_cast<Out *>(params.out) + row * params.out_stride;
    // With gate_up two columns come of four.
    const bool aligned = params.out_aligned != 0 && !gate_up;
    const uint32_t end = gate_up ? min(width, first + 2) : width;

    Quad<Out> values = {};
    if (gate_up) {
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            float gate = sums[2 * i], up = sums[2 * i + 1];
            if (params.bias != nullptr && first + i < width) {
                gate = __fadd_rn(gate, params.bias[first + i]);
                up = __fadd_rn(up, params.bias[width + first + i]);
            }
            values.values[i] = __fmul_rn(silu(gate), up);
        }
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const bool biased = params.bias != nullptr && first + i < width;
            values.values[i] = biased ? __fadd_rn(sums[i], params.bias[first + i]) : sums[i];
        }
    }
    if (params.residual != nullptr) {
        const Quad<Out> before = Quad<Out>::load(residual, first, end, aligned);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            values.values[i] = __fadd_rn(values.values[i], before.values[i]);
        }
    }
    values.store(out, first, end, aligned);
}

template <typename T>
__device__ __forceinline__ void finish(const GemmParams &params, uint32_t row, uint32_t col,
                                       const float (&sums)[4]) {
    if (sizeof(T) == 4 || params.wide_out != 0) {
        finish_as<float>(params, row, col, sums);
    } else {
        finish_as<T>(params, row, col, sums);
    }
}

template <typename T> __device__ __forceinline__ void gemm_few(const GemmParams &params) {
    const uint32_t lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
    const uint32_t col = blockIdx.x * kGemmFewCols + 4 * warp;
    // A whole warp: nothing below waits for other warps.
    if (col >= params.cols) return;
    const bool x_aligned = params.x_aligned != 0, w_aligned = params.w_aligned != 0;
    const T *x = static_cast<const T *>(params.x);
    const T *w = static_cast<const T *>(params.w) + col * params.w_stride;

    float sums[kGemmFewRows][4] = {};
    const uint32_t step = kWarpThreads * Pack<T>::kSize;
    for (uint32_t first = lane * Pack<T>::kSize; first < params.depth; first += step) {
        Pack<T> weights[4];
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            // A column beyond the last has no elements: zeros.
            const uint32_t depth = col + c < params.cols ? params.depth : 0;
            weights[c] = Pack<T>::load(w + c * params.w_stride, first, depth, w_aligned);
        }
#pragma unroll
        for (uint32_t r = 0; r < kGemmFewRows; r++) {
            if (r >= params.rows) break;
            const Pack<T> values =
                Pack<T>::load(x + r * params.x_stride, first, params.depth, x_aligned);
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) {
#pragma unroll
                for (uint32_t i = 0; i < Pack<T>::kSize; i++) {
                    sums[r][c] = __fmaf_rn(values[i], weights[c][i], sums[r][c]);
                }
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < kGemmFewRows; r++) {
        if (r >= params.rows) break;
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
#pragma unroll
            for (uint32_t far = kWarpThreads / 2; far > 0; far /= 2) {
                sums[r][c] = __fadd_rn(sums[r][c], __shfl_xor_sync(0xffffffffu, sums[r][c], far));
            }
        }
        // Every lane has the sums now.
        if (lane == r) finish<T>(params, r, col, sums[r]);
    }
}

constexpr uint32_t kTileDepth = 32;

// A tile of an operand, widened: [depth, 64 rows], so that one access gets a thread its four rows.
// Groups of four rows are exchanged by the column, so that the threads that put a pack down (one
// row, several columns) meet in no bank.
struct Tile {
    float values[kTileDepth * kGemmTile];

    static __device__ __forceinline__ uint32_t at(uint32_t k, uint32_t row) {
        return k * kGemmTile + (row ^ (k / 4 % 8 * 4));
    }
    __device__ __forceinline__ float4 quad(uint32_t k, uint32_t row) const {
        return *reinterpret_cast<const float4 *>(&values[at(k, row)]);
    }
};

// The packs that a thread brings of a tile, in registers between memory and shared memory.
template <typename T> struct Fetch {
    static constexpr uint32_t kPacksPerRow = kTileDepth / Pack<T>::kSize;
    static constexpr uint32_t kRowsAtOnce = kGemmThreads / kPacksPerRow;
    static constexpr uint32_t kPacks = kGemmTile / kRowsAtOnce;
    Pack<T> packs[kPacks];

    static __device__ __forceinline__ uint32_t row(uint32_t pack) {
        return threadIdx.x / kPacksPerRow + pack * kRowsAtOnce;
    }
    static __device__ __forceinline__ uint32_t column() {
        return threadIdx.x % kPacksPerRow * Pack<T>::kSize;
    }

    // Of the rows from `first_row` on and the columns from `k` on; zeros beyond either.
    __device__ __forceinline__ void load(const void *from, uint64_t stride, uint32_t rows,
                                         uint32_t depth, uint32_t first_row, uint32_t k,
                                         bool aligned) {
#pragma unroll
        for (uint32_t i = 0; i < kPacks; i++) {
            const uint64_t index = first_row + row(i);
            const T *values = static_cast<const T *>(from) + index * stride;
            packs[i] = Pack<T>::load(values, k + column(), index < rows ? depth : 0, aligned);
        }
    }

    __device__ __forceinline__ void store(Tile &tile) const {
#pragma unroll
        for (uint32_t i = 0; i < kPacks; i++) {
#pragma unroll
            for (uint32_t e = 0; e < Pack<T>::kSize; e++) {
                tile.values[Tile::at(column() + e, row(i))] = packs[i][e];
            }
        }
    }
};

template <typename T> __device__ __forceinline__ void gemm_many(const GemmParams &params) {
    __shared__ Tile x_tile, w_tile;
    const uint32_t first_row = blockIdx.y * kGemmTile, first_col = blockIdx.x * kGemmTile;
    const uint32_t row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
    Fetch<T> x, w;
    auto fetch = [&](uint32_t k) {
        x.load(params.x, params.x_stride, params.rows, params.depth, first_row, k,
               params.x_aligned != 0);
        w.load(params.w, params.w_stride, params.cols, params.depth, first_col, k,
               params.w_aligned != 0);
    };

    float sums[4][4] = {};
    fetch(0);
    for (uint32_t k = 0; k < params.depth; k += kTileDepth) {
        x.store(x_tile);
        w.store(w_tile);
        // Orders the tiles' writes before the reads below.
        __syncthreads();
        // The next tiles are on their way while these are multiplied.
        if (k + kTileDepth < params.depth) fetch(k + kTileDepth);
#pragma unroll
        for (uint32_t i = 0; i < kTileDepth; i++) {
            const float4 a = x_tile.quad(i, row), b = w_tile.quad(i, col);
            const float rows[4] = {a.x, a.y, a.z, a.w}, cols[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (uint32_t r = 0; r < 4; r++) {
#pragma unroll
                for (uint32_t c = 0; c < 4; c++) {
                    sums[r][c] = __fmaf_rn(rows[r], cols[c], sums[r][c]);
                }
            }
        }
        // Orders these reads before the writes of the next tiles.
        __syncthreads();
    }
    if (first_col + col >= params.cols) return;
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
        if (first_row + row + r < params.rows) {
            finish<T>(params, first_row + row + r, first_col + col, sums[r]);
        }
    }
}

}  // namespace

#define RINGTP_GEMM(suffix, T)                                                           \
    extern "C" __global__ void __launch_bounds__(kGemmFewThreads)                        \
        gemm_few_##suffix(const __grid_constant__ GemmParams params) {                   \
        gemm_few<T>(params);                                                             \
    }                                                                                    \
    extern "C" __global__ void __launch_bounds__(kGemmThreads)                           \
        gemm_many_##suffix(const __grid_constant__ GemmParams params) {                  \
        gemm_many<T>(params);                                                            \
    }

RINGTP_GEMM(f32, float)
RINGTP_GEMM(f16, f16)
RINGTP_GEMM(bf16, bf16)
