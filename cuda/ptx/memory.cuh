// Accesses to global memory that C++ has no words for, or whose width or path must not be the
// optimiser's choice. One wrapper an instruction, named after it.
//
// All are `volatile` with a "memory" clobber: neither the compiler nor anything it moves may pass
// them. What they order between threads is what the PTX memory model says, no more: see "Memory
// Consistency Model" in the PTX ISA.
#pragma once

#include <stdint.h>

namespace ptx {

// ld.global.v4.u32: `address` is a multiple of 16. Ordinary memory: weak, and after the stores
// before it in the same thread.
__device__ __forceinline__ uint4 ld_global_v4(const void *address) {
    uint4 value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return value;
}

// st.global.v4.u32: `address` is a multiple of 16.
__device__ __forceinline__ void st_global_v4(void *address, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "r"(value.x), "r"(value.y),
                   "r"(value.z), "r"(value.w)
                 : "memory");
}

// ld.global.v2.u32 and st.global.v2.u32: `address` is a multiple of 8.
__device__ __forceinline__ uint2 ld_global_v2(const void *address) {
    uint2 value;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return value;
}

__device__ __forceinline__ void st_global_v2(void *address, uint2 value) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "r"(value.x), "r"(value.y)
                 : "memory");
}

// ld.global of one element.
__device__ __forceinline__ uint32_t ld_global(const uint32_t *address) {
    uint32_t value;
    asm volatile("ld.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return value;
}

__device__ __forceinline__ uint16_t ld_global(const uint16_t *address) {
    uint16_t value;
    asm volatile("ld.global.u16 %0, [%1];"
                 : "=h"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return value;
}

// st.global of one element.
__device__ __forceinline__ void st_global(uint32_t *address, uint32_t value) {
    asm volatile("st.global.u32 [%0], %1;"
                 :
                 : "l"(__cvta_generic_to_global(address)), "r"(value)
                 : "memory");
}

__device__ __forceinline__ void st_global(uint16_t *address, uint16_t value) {
    asm volatile("st.global.u16 [%0], %1;"
                 :
                 : "l"(__cvta_generic_to_global(address)), "h"(value)
                 : "memory");
}

// ld.acquire.sys: a strong load; what follows it in this thread is after the release it reads.
__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t *address) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return value;
}

// ld.relaxed.sys: a strong load that orders nothing else.
__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t *address) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return value;
}

// ld.relaxed.gpu: the same, of what this device alone writes.
__device__ __forceinline__ uint64_t ld_relaxed_gpu(const uint64_t *address) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return value;
}

// st.release.sys: a strong store, after everything that this thread knows of.
__device__ __forceinline__ void st_release_sys(uint64_t *address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;"
                 :
                 : "l"(__cvta_generic_to_global(address)), "l"(value)
                 : "memory");
}

// st.relaxed.sys: a strong store that orders nothing else.
__device__ __forceinline__ void st_relaxed_sys(uint64_t *address, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;"
                 :
                 : "l"(__cvta_generic_to_global(address)), "l"(value)
                 : "memory");
}

// atom.relaxed.gpu.cas: among the threads of this device; the old value.
__device__ __forceinline__ uint64_t atom_relaxed_gpu_cas(uint64_t *address, uint64_t compare,
                                                         uint64_t value) {
    uint64_t old;
    asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old)
                 : "l"(__cvta_generic_to_global(address)), "l"(compare), "l"(value)
                 : "memory");
    return old;
}

}  // namespace ptx
