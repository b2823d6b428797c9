// The clock and the pause. One wrapper an instruction, named after it.
#pragma once

#include <stdint.h>

namespace ptx {

// Nanoseconds of this device's own clock: differences mean something, comparisons with another
// device's do not.
__device__ __forceinline__ uint64_t globaltimer() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

// Pauses this thread for about so many nanoseconds, at most a millisecond.
__device__ __forceinline__ void nanosleep(uint32_t nanoseconds) {
    asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds) : "memory");
}

}  // namespace ptx
