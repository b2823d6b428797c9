// What the kernels of these tests are made of: accesses and fences by their names in the PTX ISA,
// and the devices' barrier.
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
#define ADD(name, words) \
    DEVICE u64 name(u64 *p, u64 v) { \
        u64 old; \
        asm volatile(words ".add.u64 %0, [%1], %2;" : "=l"(old) : "l"(p), "l"(v) : "memory"); \
        return old; \
    }

LOAD(ld_weak, "ld.weak.global")
LOAD(ld_nc, "ld.global.nc")
LOAD(ld_volatile, "ld.volatile.global")
LOAD(ld_relaxed_sys, "ld.relaxed.sys.global")
LOAD(ld_acquire_gpu, "ld.acquire.gpu.global")
LOAD(ld_acquire_sys, "ld.acquire.sys.global")
STORE(st_weak, "st.weak.global")
STORE(st_volatile, "st.volatile.global")
STORE(st_relaxed_sys, "st.relaxed.sys.global")
STORE(st_release_gpu, "st.release.gpu.global")
STORE(st_release_sys, "st.release.sys.global")
ADD(add_relaxed_gpu, "atom.relaxed.gpu.global")
ADD(add_relaxed_sys, "atom.relaxed.sys.global")
ADD(add_release_sys, "atom.release.sys.global")
ADD(add_acq_rel_sys, "atom.acq_rel.sys.global")
DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DEVICE void fence_sc_sys() { asm volatile("fence.sc.sys;" ::: "memory"); }
DEVICE void wait_for(const u64 *flag, u64 value) {
    while (ld_acquire_sys(flag) < value) {}
}

// A machine of `world` ranks as every kernel here sees it: its own rank, and tables with one
// pointer a rank. A table's entry r points into memory of the device that holds rank r.
struct Ranks {
    u64 rank, world;
    u64 *const *flags;  // flags[d][world * block + r]: how far rank r has told rank d that it is
    u64 *const *data;
};

// The blocks with this block's number, one on each rank, meet. The block's barrier gathers what its
// threads did; the thread that writes the flag releases it; the thread that reads the flag
// acquires, and the barrier after that hands it to the block.
DEVICE void meet(const Ranks &r, u64 epoch) {
    __syncthreads();
    if (threadIdx.x < r.world) {
        u64 at = r.world * blockIdx.x;
        st_release_sys(&r.flags[threadIdx.x][at + r.rank], epoch);
        wait_for(&r.flags[r.rank][at + threadIdx.x], epoch);
    }
    __syncthreads();
}
