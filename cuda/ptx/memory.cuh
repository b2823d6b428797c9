// Global loads and stores of 16 bytes: that an access is that wide is then a fact of the source
// and not of the optimiser.
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

}  // namespace ptx
