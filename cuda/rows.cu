// Moves of rows, and a bias:
//
//   gather_rows  out[i] = table[ids[i] - first_id], or zeros where the table has no such row: the
//                vocab-parallel embedding, and with first_id 0 the rows whose logits are wanted.
//                Without ids, out[i] = table[i]: a slice of columns.
//   add_bias     out += bias, row by row, rounded to the element type
//
// Grid: x over blocks of a row's packs, y over the rows. Block: kRowsThreads, a pack a thread. No
// shared memory. Memory-bound; the floor is each element read once and written once.

#include "abi.h"
#include "pack.cuh"

namespace {

template <typename T> __device__ __forceinline__ void gather_rows(const RowsParams &params) {
    const uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * Pack<T>::kSize;
    if (first >= params.cols) return;
    const bool aligned = params.aligned != 0;
    for (uint64_t row = blockIdx.y; row < params.rows; row += gridDim.y) {
        // An id below the first wraps around to one beyond the last.
        const uint64_t from =
            params.ids == nullptr ? row : uint64_t{params.ids[row]} - params.first_id;
        const T *values = static_cast<const T *>(params.table) + from * params.table_stride;
        Pack<T> pack = {};
        if (from < params.table_rows) pack = Pack<T>::load(values, first, params.cols, aligned);
        T *out = static_cast<T *>(params.out) + row * params.out_stride;
        pack.store(out, first, params.cols, aligned);
    }
}

template <typename T> __device__ __forceinline__ void add_bias(const RowsParams &params) {
    const uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * Pack<T>::kSize;
    if (first >= params.cols) return;
    const bool aligned = params.aligned != 0;
    const VectorPack<T> bias =
        VectorPack<T>::load(static_cast<const float *>(params.table), first, params.cols, aligned);
    for (uint64_t row = blockIdx.y; row < params.rows; row += gridDim.y) {
        T *out = static_cast<T *>(params.out) + row * params.out_stride;
        const Pack<T> before = Pack<T>::load(out, first, params.cols, aligned);
        Pack<T>::of([&](uint32_t i) { return __fadd_rn(before[i], bias[i]); })
            .store(out, first, params.cols, aligned);
    }
}

}  // namespace

// Moves look at no value: bf16 moves as any sixteen bits.
extern "C" __global__ void __launch_bounds__(kRowsThreads)
    gather_rows_b16(const __grid_constant__ RowsParams params) {
    gather_rows<f16>(params);
}
extern "C" __global__ void __launch_bounds__(kRowsThreads)
    gather_rows_b32(const __grid_constant__ RowsParams params) {
    gather_rows<float>(params);
}

#define RINGTP_ADD_BIAS(suffix, T)                                                       \
    extern "C" __global__ void __launch_bounds__(kRowsThreads)                           \
        add_bias_##suffix(const __grid_constant__ RowsParams params) {                   \
        add_bias<T>(params);                                                             \
    }

RINGTP_ADD_BIAS(f32, float)
RINGTP_ADD_BIAS(f16, f16)
RINGTP_ADD_BIAS(bf16, bf16)
