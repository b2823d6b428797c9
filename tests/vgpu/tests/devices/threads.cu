// Kernels for the tests of host threads and of peer access. Every parameter has 8 bytes.
#include "sync.cuh"

// Ranks meet n times; each adds up what it read from its right neighbour. Grid 1, block 32.
KERNEL exchange(Ranks r, u64 *out, u64 first, u64 n) {
    u64 sum = out[threadIdx.x];
    for (u64 step = first; step < first + n; ++step) {
        r.data[r.rank][threadIdx.x] = step * 100 + r.rank * 10 + threadIdx.x;
        meet(r, 2 * step + 1);
        sum += r.data[(r.rank + 1) % r.world][threadIdx.x];
        meet(r, 2 * step + 2);
    }
    out[threadIdx.x] = sum;
}

// Waits for a word that somebody else stores, the host perhaps.
KERNEL spin_until(const u64 *flag, u64 value, u64 *out) {
    while (ld_acquire_sys(flag) != value) {}
    *out = value;
}

KERNEL set(u64 *flag, u64 value) { st_release_sys(flag, value); }

// As spin_until, but no longer than so many virtual nanoseconds: 1 if the word came, 2 if not.
KERNEL until_late(const u64 *flag, u64 value, u64 nanoseconds, u64 *out) {
    u64 start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start)::"memory");
    *out = 2;
    do {
        if (ld_acquire_sys(flag) == value) {
            *out = 1;
            break;
        }
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    } while (now - start < nanoseconds);
}
