// What the kernels of these tests are made of: loads and stores with an order, by their names in
// the PTX ISA, and a barrier of devices.
#pragma once
using u64 = unsigned long long;
using u32 = unsigned int;
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__

#define LOAD(name, words) \
    DEVICE u64 name(const u64 *p) { \
        u64 v; \
        asm volatile(words ".u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); \
        return v; \
    }
#define STORE(name, words) \
    DEVICE void name(u64 *p, u64 v) { asm volatile(words ".u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }

LOAD(ld_weak, "ld.weak.global")
LOAD(ld_volatile, "ld.volatile.global")
LOAD(ld_relaxed_sys, "ld.relaxed.sys.global")
LOAD(ld_acquire_gpu, "ld.acquire.gpu.global")
LOAD(ld_acquire_sys, "ld.acquire.sys.global")
STORE(st_weak, "st.weak.global")
STORE(st_volatile, "st.volatile.global")
STORE(st_relaxed_sys, "st.relaxed.sys.global")
STORE(st_release_gpu, "st.release.gpu.global")
STORE(st_release_sys, "st.release.sys.global")
DEVICE void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// All blocks with this thread's block number, one on each device, meet: flags[d][world * block + r]
// is where rank r tells device d how far it is. The block's barrier gathers what its threads did;
// the thread that writes the flag releases it, and the thread that reads one acquires; the barrier
// after that hands it to the block.
DEVICE void device_barrier(u64 *const *flags, u64 rank, u64 world, u64 epoch) {
    __syncthreads();
    if (threadIdx.x < world) {
        u64 at = world * blockIdx.x;
        st_release_sys(&flags[threadIdx.x][at + rank], epoch);
        while (ld_acquire_sys(&flags[rank][at + threadIdx.x]) < epoch) {}
    }
    __syncthreads();
}
