// Atomics whose order and scope must be said. One wrapper an instruction, named after it.
#pragma once

#include <stdint.h>

namespace ptx {

// atom.acq_rel.gpu.add: among the threads of this device; the old value. It is after the releases
// that it reads, and what this thread knows of is before whoever reads it with an acquire.
__device__ __forceinline__ uint32_t atom_add_acq_rel_gpu(uint32_t *address, uint32_t value) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(__cvta_generic_to_global(address)), "r"(value)
                 : "memory");
    return old;
}

}  // namespace ptx
