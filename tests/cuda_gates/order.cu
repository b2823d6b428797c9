// What the gates on the order of accesses must catch. Each kernel waits for a flag and then copies
// what the flag's writer wrote, or writes something and then a flag; each is wrong in one way.
#include "../../cuda/ptx/memory.cuh"

// Promises that nobody writes what is behind `data`: the compiler reads it through the cache that
// is not kept coherent, and as early as it likes.
extern "C" __global__ void reads_what_it_calls_constant(const uint64_t *flag,
                                                        const uint4 *__restrict__ data,
                                                        uint4 *__restrict__ out) {
    if (threadIdx.x == 0)
        while (ptx::ld_acquire_sys(flag) == 0) {
        }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
}

// As it should be: what the gates let through.
extern "C" __global__ void is_right(const uint64_t *flag, const uint4 *data, uint4 *out,
                                    uint64_t *other) {
    if (threadIdx.x == 0)
        while (ptx::ld_acquire_sys(flag) == 0) {
        }
    __syncthreads();
    ptx::st_global_v4(out + threadIdx.x, ptx::ld_global_v4(data + threadIdx.x));
    __syncthreads();
    if (threadIdx.x == 0) ptx::st_release_sys(other, 1);
}
