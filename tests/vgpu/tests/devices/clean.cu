// Protocols between devices without a fault. Every kernel is launched on all ranks, unless it says
// otherwise, with n words of data to each block's share. Every parameter has 8 bytes.
#include "sync.cuh"

DEVICE u64 input(u64 rank, u64 i, u64 step) { return (rank + 1) * 1000 + i * 7 + step; }

// Reads all peers' inputs between two barriers and adds them up in rank order.
KERNEL one_shot(Ranks r, u64 *out, u64 n, u64 step) {
    u64 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) r.data[r.rank][i] = input(r.rank, i, step);
    meet(r, 2 * step + 1);
    u64 sum = 0;
    if (i < n)
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    meet(r, 2 * step + 2);
    if (i < n) out[i] = sum;
}

// As one_shot, in packs of 16 bytes and with as many blocks as there may be: what collectives do
// with long messages. n is even.
KERNEL one_shot_packs(Ranks r, ulonglong2 *out, u64 n, u64 step) {
    u64 first = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    for (u64 i = first; 2 * i < n; i += threads) {
        ulonglong2 *own = (ulonglong2 *)r.data[r.rank];
        own[i] = make_ulonglong2(input(r.rank, 2 * i, step), input(r.rank, 2 * i + 1, step));
    }
    meet(r, 2 * step + 1);
    for (u64 i = first; 2 * i < n; i += threads) {
        ulonglong2 sum = make_ulonglong2(0, 0);
        for (u64 p = 0; p < r.world; ++p) {
            ulonglong2 pack = ((const ulonglong2 *)r.data[p])[i];
            sum.x += pack.x;
            sum.y += pack.y;
        }
        out[i] = sum;
    }
    meet(r, 2 * step + 2);
}

// Writes its input into a slot at each peer, then adds up its own slots. Two sets of slots: whoever
// is at step s has seen all at step s - 1, so nobody still reads the slots of s - 2.
KERNEL push(Ranks r, u64 *out, u64 n, u64 steps) {
    u64 i = threadIdx.x;
    u64 sum = 0;
    for (u64 step = 0; step < steps; ++step) {
        u64 set = (step & 1) * r.world * n;
        if (i < n)
            for (u64 p = 0; p < r.world; ++p)
                r.data[p][set + r.rank * n + i] = input(r.rank, i, step);
        meet(r, step + 1);
        if (i < n)
            for (u64 p = 0; p < r.world; ++p) sum += r.data[r.rank][set + p * n + i];
    }
    if (i < n) out[i] = sum;
}

// Each rank reduces its share of the words, then everybody gathers the shares. n is a multiple of
// the world; the scratch lies behind the inputs.
KERNEL two_shot(Ranks r, u64 *out, u64 n, u64 step) {
    u64 i = threadIdx.x, share = n / r.world;
    if (i < n) r.data[r.rank][i] = input(r.rank, i, step);
    meet(r, 3 * step + 1);
    if (i < share) {
        u64 at = r.rank * share + i, sum = 0;
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][at];
        r.data[r.rank][n + i] = sum;
    }
    meet(r, 3 * step + 2);
    if (i < n) out[i] = r.data[i / share][n + i % share];
    meet(r, 3 * step + 3);
}

// A ring: world - 1 steps of adding what comes from the left, world - 1 of passing it on. The flag
// counts the chunks that have come; each step has a slot of its own.
KERNEL ring(Ranks r, u64 *out, u64 n) {
    u64 i = threadIdx.x, share = n / r.world, right = (r.rank + 1) % r.world;
    if (i < n) out[i] = input(r.rank, i, 0);
    __syncthreads();
    for (u64 step = 0; step < 2 * (r.world - 1); ++step) {
        u64 sent = (r.rank + 2 * r.world - step) % r.world;
        u64 come = (r.rank + 2 * r.world - step - 1) % r.world;
        if (i < share) r.data[right][step * share + i] = out[sent * share + i];
        __syncthreads();
        if (i == 0) {
            st_release_sys(&r.flags[right][0], step + 1);
            wait_for(&r.flags[r.rank][0], step + 1);
        }
        __syncthreads();
        if (i < share) {
            u64 got = r.data[r.rank][step * share + i];
            out[come * share + i] = step < r.world - 1 ? out[come * share + i] + got : got;
        }
        __syncthreads();
    }
}

// Packets of 32 bits of data and 32 of flag, each one scalar: no barrier at all.
KERNEL packets(Ranks r, u64 *out, u64 n, u64 steps) {
    u64 i = threadIdx.x, sum = 0;
    for (u64 step = 0; step < steps; ++step) {
        u64 set = (step & 1) * r.world * n;
        if (i < n) {
            u64 packet = (step + 1) << 32 | input(r.rank, i, step);
            for (u64 p = 0; p < r.world; ++p) st_relaxed_sys(&r.data[p][set + r.rank * n + i], packet);
            for (u64 p = 0; p < r.world; ++p) {
                u64 got;
                do got = ld_relaxed_sys(&r.data[r.rank][set + p * n + i]);
                while (got >> 32 != step + 1);
                sum += got & 0xffffffff;
            }
        }
    }
    if (i < n) out[i] = sum;
}

// The same with two packets to a vector: each element is a packet of its own.
KERNEL packets_v2(Ranks r, u64 *out, u64 n) {
    u64 i = threadIdx.x;
    if (i >= n) return;
    u64 a = 1ull << 32 | (r.rank + i), b = 1ull << 32 | (r.rank * 2 + i);
    u64 to = (r.rank + 1) % r.world;
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(&r.data[to][2 * i]), "l"(a), "l"(b)
                 : "memory");
    u64 x, y;
    do
        asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(x), "=l"(y)
                     : "l"(&r.data[r.rank][2 * i]) : "memory");
    while (x >> 32 != 1 || y >> 32 != 1);
    out[i] = (x & 0xffffffff) * 1000 + (y & 0xffffffff);
}

// Words that are their own flags: a word that nobody has sent yet is all ones. The reader wipes it
// and tells so in a barrier before it is sent to again.
KERNEL sentinel(Ranks r, u64 *out, u64 n, u64 steps) {
    u64 i = threadIdx.x, sum = 0;
    for (u64 step = 0; step < steps; ++step) {
        if (i < n) {
            for (u64 p = 0; p < r.world; ++p)
                st_relaxed_sys(&r.data[p][r.rank * n + i], input(r.rank, i, step));
            for (u64 p = 0; p < r.world; ++p) {
                u64 got;
                do got = ld_relaxed_sys(&r.data[r.rank][p * n + i]);
                while (got == ~0ull);
                sum += got;
                st_relaxed_sys(&r.data[r.rank][p * n + i], ~0ull);
            }
        }
        meet(r, step + 1);
    }
    if (i < n) out[i] = sum;
}

// Rank 0 sends, rank 1 receives; flags[1][0] counts what was sent, flags[0][0] what was taken.
KERNEL mailbox(Ranks r, u64 *out, u64 n, u64 steps) {
    u64 i = threadIdx.x, sum = 0;
    for (u64 step = 0; step < steps; ++step) {
        if (r.rank == 0) {
            if (i == 0) wait_for(&r.flags[0][0], step);
            __syncthreads();
            if (i < n) r.data[1][i] = input(0, i, step);
            __syncthreads();
            if (i == 0) st_release_sys(&r.flags[1][0], step + 1);
        } else {
            if (i == 0) wait_for(&r.flags[1][0], step + 1);
            __syncthreads();
            if (i < n) sum += r.data[1][i];
            __syncthreads();
            if (i == 0) st_release_sys(&r.flags[0][0], step + 1);
        }
    }
    if (i < n) out[i] = sum;
}

// As one_shot; the order comes from fences around relaxed accesses, in the flag's own thread.
KERNEL fences(Ranks r, u64 *out, u64 n) {
    u64 i = threadIdx.x;
    if (i < n) r.data[r.rank][i] = input(r.rank, i, 0);
    __syncthreads();
    if (i < r.world) {
        fence_sys();
        st_relaxed_sys(&r.flags[i][r.rank], 1);
        while (ld_relaxed_sys(&r.flags[r.rank][i]) < 1) {}
        fence_sys();
    }
    __syncthreads();
    u64 sum = 0;
    if (i < n)
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    if (i < n) out[i] = sum;
}

// The old way: volatile flags and __threadfence_system, which is fence.sc.
KERNEL volatiles(Ranks r, u64 *out, u64 n) {
    u64 i = threadIdx.x;
    if (i < n) r.data[r.rank][i] = input(r.rank, i, 0);
    __syncthreads();
    if (i < r.world) {
        __threadfence_system();
        st_volatile(&r.flags[i][r.rank], 1);
        while (ld_volatile(&r.flags[r.rank][i]) < 1) {}
        __threadfence_system();
    }
    __syncthreads();
    u64 sum = 0;
    if (i < n)
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    if (i < n) out[i] = sum;
}

// A counter at rank 0 that everybody adds to and polls.
KERNEL counter(Ranks r, u64 *out, u64 n) {
    u64 i = threadIdx.x;
    if (i < n) r.data[r.rank][i] = input(r.rank, i, 0);
    __syncthreads();
    if (i == 0) {
        add_release_sys(&r.flags[0][0], 1);
        wait_for(&r.flags[0][0], r.world);
    }
    __syncthreads();
    u64 sum = 0;
    if (i < n)
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    if (i < n) out[i] = sum;
}

// A barrier in log2(world) rounds: rank r hears of 2^k more ranks in round k, at second hand.
KERNEL dissemination(Ranks r, u64 *out, u64 n) {
    u64 i = threadIdx.x;
    if (i < n) r.data[r.rank][i] = input(r.rank, i, 0);
    __syncthreads();
    for (u64 k = 0, far = 1; far < r.world; ++k, far *= 2) {
        if (i == 0) {
            st_release_sys(&r.flags[(r.rank + far) % r.world][k], 1);
            wait_for(&r.flags[r.rank][k], 1);
        }
        __syncthreads();
    }
    u64 sum = 0;
    if (i < n)
        for (u64 p = 0; p < r.world; ++p) sum += r.data[p][i];
    if (i < n) out[i] = sum;
}

// A lock at rank 0 whose holders are served in turn; it guards a plain word beside it.
KERNEL ticket_lock(Ranks r, u64 *out, u64 rounds) {
    u64 *lock = r.flags[0];
    if (threadIdx.x == 0)
        for (u64 k = 0; k < rounds; ++k) {
            u64 mine = add_relaxed_sys(&lock[0], 1);
            while (ld_acquire_sys(&lock[1]) != mine) {}
            r.data[0][0] += r.rank + 1;
            st_release_sys(&lock[1], mine + 1);
        }
    meet(Ranks{r.rank, r.world, r.flags + r.world, r.data}, 1);
    if (threadIdx.x == 0) out[0] = r.data[0][0];
}

// Rank 0 writes pairs under a sequence number, odd while it writes; the others read until they get
// a whole one. The words themselves are strong: a read that is thrown away is still a read.
KERNEL seqlock(Ranks r, u64 *out, u64 rounds) {
    u64 *seq = r.flags[0], *pair = r.data[0];
    if (threadIdx.x != 0) return;
    if (r.rank == 0) {
        for (u64 k = 1; k <= rounds; ++k) {
            st_relaxed_sys(seq, 2 * k - 1);
            fence_sys();
            st_relaxed_sys(&pair[0], k);
            st_relaxed_sys(&pair[1], 3 * k);
            st_release_sys(seq, 2 * k);
        }
        out[0] = 0;
        return;
    }
    u64 before, after, a, b;
    do {
        before = ld_acquire_sys(seq);
        a = ld_relaxed_sys(&pair[0]);
        b = ld_relaxed_sys(&pair[1]);
        fence_sys();
        after = ld_relaxed_sys(seq);
    } while (before != after || before & 1 || before != 2 * rounds);
    out[0] = b - 3 * a;
}

// Rank 0 gives its words to everybody.
KERNEL broadcast(Ranks r, u64 *out, u64 n) {
    u64 i = threadIdx.x;
    if (r.rank == 0 && i < n)
        for (u64 p = 0; p < r.world; ++p) r.data[p][i] = input(0, i, 0);
    meet(r, 1);
    if (i < n) out[i] = r.data[r.rank][i];
}

// Everybody writes its share into everybody's output.
KERNEL all_gather(Ranks r, u64 *out, u64 share) {
    u64 i = threadIdx.x;
    if (i < share)
        for (u64 p = 0; p < r.world; ++p) r.data[p][r.rank * share + i] = input(r.rank, i, 0);
    meet(r, 1);
    if (i < share * r.world) out[i] = r.data[r.rank][i];
}

// Waits for a word, and takes what it guards. For one rank.
KERNEL take(u64 *flag, u64 value, u64 *data, u64 *out) {
    if (threadIdx.x == 0) wait_for(flag, value);
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
}

// Writes words, and nothing more: the streams order it.
KERNEL fill(u64 *data, u64 value) { data[threadIdx.x] = value + threadIdx.x; }

// Adds one to words that somebody else wrote.
KERNEL increment(u64 *data, u64 *out) { out[threadIdx.x] = data[threadIdx.x] + 1; }
