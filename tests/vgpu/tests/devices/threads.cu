// Kernels for the tests of host threads. Every pointer to a flag is to a u64 of the device named.
#include "sync.cuh"

// Ranks meet n times; each adds up what it read from its right neighbour. Grid 1, block 32.
KERNEL exchange(u64 rank, u64 world, u64 *const *flags, u64 *const *slots, u64 *out, u64 first, u64 n) {
    u64 sum = out[threadIdx.x];
    for (u64 step = first; step < first + n; ++step) {
        slots[rank][threadIdx.x] = step * 100 + rank * 10 + threadIdx.x;
        device_barrier(flags, rank, world, 2 * step + 1);
        sum += slots[(rank + 1) % world][threadIdx.x];
        device_barrier(flags, rank, world, 2 * step + 2);
    }
    out[threadIdx.x] = sum;
}

// Waits for a word that somebody else stores, the host perhaps.
KERNEL spin_until(const u64 *flag, u64 value, u64 *out) {
    while (ld_acquire_sys(flag) != value) {}
    *out = value;
}

KERNEL set(u64 *flag, u64 value) { st_release_sys(flag, value); }
