// Protocols between devices with one fault each. A comment `// <kernel>` marks the line that the
// finding must name on one of its sides. Every parameter has 8 bytes.
#include "sync.cuh"

// One-shot with everything in it that can go wrong: what is written, how its flag is set, how the
// flag is read, what is read, and what stands at the end.
#define ONE_SHOT(name, set, wait, end) \
    KERNEL name(Ranks r, u64 *out, u64 n, u64 steps) { \
        u64 i = threadIdx.x, sum = 0; \
        for (u64 step = 1; step <= steps; ++step) { \
            if (i < n) r.data[r.rank][i] = r.rank + i + step; /* name */ \
            __syncthreads(); \
            if (i < r.world) { \
                set; \
                wait; \
            } \
            __syncthreads(); \
            if (i < n) \
                for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i]; \
            end; \
        } \
        if (i < n) out[i] = sum; \
    }
#define SET(f) f(&r.flags[i][r.rank], step)
#define WAIT(f) \
    while (f(&r.flags[r.rank][i]) < step) {}
#define END meet(Ranks{r.rank, r.world, r.flags + r.world, r.data}, step)

ONE_SHOT(flag_relaxed, SET(st_relaxed_sys), WAIT(ld_acquire_sys), END)
ONE_SHOT(released_at_gpu_scope, SET(st_release_gpu), WAIT(ld_acquire_sys), END)
ONE_SHOT(acquired_at_gpu_scope, SET(st_release_sys), WAIT(ld_acquire_gpu), END)
ONE_SHOT(acquired_weakly, SET(st_release_sys), WAIT(ld_weak), END)
ONE_SHOT(flag_read_relaxed, SET(st_release_sys), WAIT(ld_relaxed_sys), END)
ONE_SHOT(flag_written_weakly, SET(st_weak), WAIT(ld_acquire_sys), END)
ONE_SHOT(flag_volatile_alone, SET(st_volatile), WAIT(ld_volatile), END)
ONE_SHOT(fence_at_gpu_scope, fence_gpu(); SET(st_relaxed_sys), WAIT(ld_acquire_sys), END)
ONE_SHOT(no_end_barrier, SET(st_release_sys), WAIT(ld_acquire_sys), )
ONE_SHOT(no_start_barrier, , , END)

// The fence stands before the block's barrier: in the threads that write, and none in the flag's; or
// in every thread, where that of the flag's thread comes too early to publish what others wrote.
#define FENCE_FIRST(name, who) \
    KERNEL name(Ranks r, u64 *out, u64 n, u64) { \
        u64 i = threadIdx.x, sum = 0; \
        if (i < n) r.data[r.rank][i] = r.rank + i; /* name */ \
        if (who) fence_sys(); \
        __syncthreads(); \
        if (i >= 32 && i < 32 + r.world) st_relaxed_sys(&r.flags[i - 32][r.rank], 1); \
        if (i < r.world) wait_for(&r.flags[r.rank][i], 1); \
        __syncthreads(); \
        if (i < n) \
            for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i]; \
        if (i < n) out[i] = sum; \
    }
FENCE_FIRST(fence_before_the_barrier, i < n)
FENCE_FIRST(fence_of_all_before_the_barrier, true)

// The flag is released before the block's other warps have written.
KERNEL no_barrier_before_the_flag(Ranks r, u64 *out, u64 n, u64) {
    u64 i = threadIdx.x, sum = 0;
    if (i < n) r.data[r.rank][i] = r.rank + i;  // no_barrier_before_the_flag
    if (i < r.world) {
        st_release_sys(&r.flags[i][r.rank], 1);
        wait_for(&r.flags[r.rank][i], 1);
    }
    __syncthreads();
    if (i < n)
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    if (i < n) out[i] = sum;
}

// Only the threads that polled know that the peers have come.
KERNEL no_barrier_after_the_flag(Ranks r, u64 *out, u64 n, u64) {
    u64 i = threadIdx.x, sum = 0;
    if (i < n) r.data[r.rank][i] = r.rank + i;  // no_barrier_after_the_flag
    __syncthreads();
    if (i < r.world) {
        st_release_sys(&r.flags[i][r.rank], 1);
        wait_for(&r.flags[r.rank][i], 1);
    }
    if (i < n)
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    __syncthreads();
    if (i < n) out[i] = sum;
}

// Peers' bytes through the path that nobody may write to.
KERNEL read_through_nc(Ranks r, u64 *out, u64 n, u64) {
    u64 i = threadIdx.x, sum = 0;
    if (i < n) r.data[(r.rank + 1) % r.world][i] = r.rank + i;  // read_through_nc
    meet(r, 1);
    if (i < n) sum = ld_nc(&r.data[r.rank][i]);
    if (i < n) out[i] = sum;
}

// Four words in one access, the last of them the flag of the other three: the words of a strong
// access have no order, though whoever reads the flag acquires.
KERNEL one_flag_for_a_vector(Ranks r, u64 *out, u64 n, u64) {
    u64 i = threadIdx.x;
    if (i >= n) return;
    u32 a = r.rank + i, x, y, flag;
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %1, %1, %2};"  // one_flag_for_a_vector
                 ::"l"(&r.data[(r.rank + 1) % r.world][2 * i]), "r"(a), "r"(1u) : "memory");
    const u64 *slot = &r.data[r.rank][2 * i];
    do
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(flag) : "l"((const u32 *)slot + 3) : "memory");
    while (flag != 1);
    asm volatile("ld.weak.global.v2.u32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "l"(slot) : "memory");
    out[i] = x + y;
}

// The same in a weak access, read as a whole: already the flag is written weakly.
KERNEL flag_in_a_weak_vector(Ranks r, u64 *out, u64 n, u64) {
    u64 i = threadIdx.x;
    if (i >= n) return;
    u32 a = r.rank + i;
    asm volatile("st.weak.global.v4.u32 [%0], {%1, %1, %1, %2};"  // flag_in_a_weak_vector
                 ::"l"(&r.data[(r.rank + 1) % r.world][2 * i]), "r"(a), "r"(1u) : "memory");
    u32 x, y, z, flag;
    do
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x), "=r"(y), "=r"(z), "=r"(flag) : "l"(&r.data[r.rank][2 * i]) : "memory");
    while (flag != 1);
    out[i] = x + y + z;
}

// Data and flag of a packet in two stores.
KERNEL packet_in_two_stores(Ranks r, u64 *out, u64 n, u64) {
    u64 i = threadIdx.x, to = (r.rank + 1) % r.world;
    if (i >= n) return;
    r.data[to][2 * i] = r.rank + i;  // packet_in_two_stores
    st_relaxed_sys(&r.data[to][2 * i + 1], 1);
    while (ld_relaxed_sys(&r.data[r.rank][2 * i + 1]) != 1) {}
    out[i] = r.data[r.rank][2 * i];
}

// One set of slots where two are needed: a fast rank overwrites what a slow one still reads.
KERNEL one_buffer_too_few(Ranks r, u64 *out, u64 n, u64 steps) {
    u64 i = threadIdx.x, sum = 0;
    for (u64 step = 1; step <= steps; ++step) {
        if (i < n)
            for (u64 p = 0; p < r.world; ++p) r.data[p][r.rank * n + i] = step + i;  // one_buffer_too_few
        meet(r, step);
        if (i < n)
            for (u64 p = 0; p < r.world; ++p) sum += r.data[r.rank][p * n + i];
    }
    if (i < n) out[i] = sum;
}

// Epochs of 32 bits that wrap, compared as if they did not: after the wrap every flag of the epoch
// before looks late enough.
KERNEL epoch_compared_with_less(Ranks r, u64 *out, u64 n, u64 steps) {
    u64 i = threadIdx.x, sum = 0;
    for (u64 step = 0; step < 2 * steps; ++step) {
        u32 epoch = 0xfffffffe + step;
        if (step % 2 == 0 && i < n) r.data[r.rank][i] = r.rank + i + step;  // epoch_compared_with_less
        __syncthreads();
        if (i < r.world) {
            st_release_sys(&r.flags[i][r.rank], epoch);
            while ((u32)ld_acquire_sys(&r.flags[r.rank][i]) < epoch) {}
        }
        __syncthreads();
        if (step % 2 == 0 && i < n)
            for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    }
    if (i < n) out[i] = sum;
}

// Nothing tells the sender that its last words have been taken.
KERNEL mailbox_without_a_receipt(Ranks r, u64 *out, u64 n, u64 steps) {
    u64 i = threadIdx.x, sum = 0;
    for (u64 step = 1; step <= steps; ++step) {
        if (r.rank == 0) {
            if (i < n) r.data[1][i] = i + step;  // mailbox_without_a_receipt
            __syncthreads();
            if (i == 0) st_release_sys(&r.flags[1][0], step);
        } else {
            if (i == 0) wait_for(&r.flags[1][0], step);
            __syncthreads();
            if (i < n) sum += r.data[1][i];
            __syncthreads();
        }
    }
    if (i < n) out[i] = sum;
}

// Two ranks write to the same slot.
KERNEL slots_that_overlap(Ranks r, u64 *out, u64 n, u64) {
    u64 i = threadIdx.x, sum = 0;
    if (i < n) r.data[0][r.rank / 2 * n + i] = r.rank + i;  // slots_that_overlap
    meet(r, 1);
    if (i < n) sum = r.data[0][i];
    if (i < n) out[i] = sum;
}

// An atomic operation whose scope ends at the device, on a counter for all.
KERNEL counter_at_gpu_scope(Ranks r, u64 *out, u64, u64) {
    if (threadIdx.x == 0) add_relaxed_gpu(&r.data[0][0], r.rank + 1);  // counter_at_gpu_scope
    meet(r, 1);
    if (threadIdx.x == 0) out[0] = r.data[0][0];
}

// A lock that is taken without an acquire.
KERNEL lock_without_acquire(Ranks r, u64 *out, u64, u64 rounds) {
    u64 *lock = r.flags[0];
    if (threadIdx.x == 0)
        for (u64 k = 0; k < rounds; ++k) {
            u64 mine = add_relaxed_sys(&lock[0], 1);
            while (ld_relaxed_sys(&lock[1]) != mine) {}
            r.data[0][0] += r.rank + 1;  // lock_without_acquire
            st_release_sys(&lock[1], mine + 1);
        }
}

// A sequence lock around plain words.
KERNEL seqlock_of_weak_words(Ranks r, u64 *out, u64, u64 rounds) {
    u64 *seq = r.flags[0], *pair = r.data[0];
    if (threadIdx.x != 0) return;
    out[0] = 0;
    if (r.rank == 0) {
        for (u64 k = 1; k <= rounds; ++k) {
            st_relaxed_sys(seq, 2 * k - 1);
            fence_sys();
            st_weak(&pair[0], k);  // seqlock_of_weak_words
            st_release_sys(seq, 2 * k);
        }
        return;
    }
    u64 before, a;
    do {
        before = ld_acquire_sys(seq);
        a = ld_weak(&pair[0]);
        fence_sys();
    } while (before != ld_relaxed_sys(seq) || before != 2 * rounds);
    out[0] = a;
}

// One more rank is waited for than there is.
KERNEL one_rank_too_many(Ranks r, u64 *out, u64, u64) {
    u64 i = threadIdx.x;
    if (i < r.world) st_release_sys(&r.flags[i][r.rank], 1);
    if (i <= r.world) wait_for(&r.flags[r.rank][i], 1);  // one_rank_too_many
    out[i] = 0;
}

// Every block waits for every block of the grid, and not all of them fit on the device.
KERNEL grid_too_large_to_spin(Ranks r, u64 *out, u64, u64) {
    extern __shared__ u64 scratch[];
    scratch[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        add_release_sys(&r.data[0][0], 1);
        wait_for(&r.data[0][0], gridDim.x);  // grid_too_large_to_spin
        out[0] = scratch[0];
    }
}

// Waits for the kernel behind it in its own stream.
KERNEL first_of_two(u64 *flags, u64 *) {
    wait_for(&flags[0], 1);  // kernels_that_wait_for_each_other
    st_release_sys(&flags[1], 1);
}
KERNEL second_of_two(u64 *flags, u64 *) {
    st_release_sys(&flags[0], 1);
    wait_for(&flags[1], 1);
}

KERNEL write(u64 *data, u64 *) {
    data[threadIdx.x] = threadIdx.x;  // write
}
KERNEL read(u64 *data, u64 *out) {
    out[threadIdx.x] = data[threadIdx.x];
}
KERNEL add(u64 *data, u64 *) {
    add_relaxed_sys(&data[0], 1);  // atomics_over_pcie
}
