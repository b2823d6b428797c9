// A rank's part in choosing the next tokens: from its shard of rows of logits to records of a few
// words (src/llama/sampling/record.rs), which all ranks gather and merge alike. To the bit of
// src/backend/cpu/sampling.rs, except that the candidates of a list come in any order.
//
// Grid: one block a record. Block: kRecordThreads. Shared memory: 20 KiB, a mass a thread. The
// logits of a row are read once for a best or a drawn token, and a few times for candidates: a
// radix select finds the count-th without a sort. Latency-bound; a row of 128 Ki logits stays in
// the second-level cache.

#include "abi.h"
#include "sampling.cuh"

using sampling::Gumbel;
using sampling::Mass;

namespace {

struct Draw {
    double value;
    uint32_t id;
};

// What threads exchange, one use at a time.
union Exchange {
    uint64_t keys[kRecordThreads];
    Draw draws[kRecordThreads];
    Mass masses[kRecordThreads];
    uint32_t counts[kRecordThreads];
    uint32_t bins[256];
    __device__ Exchange() {}
};

// Combines the threads' values by a tree; thread 0 has the result, and all may go on.
template <typename V, typename Combine>
__device__ __forceinline__ V reduce(V *slots, V value, Combine combine) {
    slots[threadIdx.x] = value;
    for (uint32_t half = kRecordThreads / 2; half > 0; half /= 2) {
        // Orders the slots' writes of one level before their reads of the next.
        __syncthreads();
        if (threadIdx.x < half) {
            slots[threadIdx.x] = combine(slots[threadIdx.x], slots[threadIdx.x + half]);
        }
    }
    __syncthreads();
    value = slots[0];
    // Orders that read before the next use of the slots.
    __syncthreads();
    return value;
}

__device__ __forceinline__ uint32_t count_all(Exchange &exchange, uint32_t count) {
    return reduce(exchange.counts, count, [](uint32_t a, uint32_t b) { return a + b; });
}

__device__ __forceinline__ void put64(uint32_t *out, uint64_t value) {
    out[0] = static_cast<uint32_t>(value);
    out[1] = static_cast<uint32_t>(value >> 32);
}

// One row of logits of this shard.
struct Row {
    const float *logits;
    uint32_t cols, first_id;

    // Calls f(logit, id) for the thread's candidates: ids that are not at -inf.
    template <typename F> __device__ __forceinline__ void each(F f) const {
        for (uint32_t i = threadIdx.x; i < cols; i += kRecordThreads) {
            const float logit = logits[i];
            if (logit > -CUDART_INF_F) f(logit, first_id + i);
        }
    }
};

// The row after repetition penalty and bans: in a copy, if this shard has any such id.
__device__ __forceinline__ Row processed(const RecordsParams &params,
                                         const RecordRequest &request, Row row) {
    const uint32_t *penalized = params.ids + request.penalized;
    const uint32_t *banned = params.ids + request.banned;
    if (request.penalized_count + request.banned_count == 0) return row;
    float *copy = params.edited + static_cast<uint64_t>(blockIdx.x) * row.cols;
    for (uint32_t i = threadIdx.x; i < row.cols; i += kRecordThreads) copy[i] = row.logits[i];
    // Orders the copy before the changes to it, these before the bans, and those before reads.
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < request.penalized_count; i += kRecordThreads) {
        float &logit = copy[penalized[i] - row.first_id];
        // A penalty below 1 may overflow: stay a number.
        logit = logit < 0.0f ? __fmul_rn(logit, request.penalty)
                             : fminf(__fdiv_rn(logit, request.penalty), CUDART_MAX_NORMAL_F);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < request.banned_count; i += kRecordThreads) {
        copy[banned[i] - row.first_id] = -CUDART_INF_F;
    }
    __syncthreads();
    row.logits = copy;
    return row;
}

__device__ __forceinline__ void best(Exchange &exchange, const Row &row, uint32_t *out) {
    uint64_t most = sampling::kNoCandidate;
    row.each([&](float logit, uint32_t id) { most = min(most, sampling::candidate(logit, id)); });
    most = reduce(exchange.keys, most, [](uint64_t a, uint64_t b) { return min(a, b); });
    if (threadIdx.x == 0) put64(out, most);
}

// The greater value; of equals, the lower id.
__device__ __forceinline__ Draw better(const Draw &a, const Draw &b) {
    const bool first = a.value > b.value || (a.value == b.value && a.id < b.id);
    return first ? a : b;
}

__device__ __forceinline__ void drawn(Exchange &exchange, const RecordRequest &request,
                                      const Row &row, uint32_t *out) {
    const Gumbel gumbel = {request.seed, request.draw};
    const double temperature = request.temperature;
    Draw most = {-CUDART_INF, UINT32_MAX};
    row.each([&](float logit, uint32_t id) {
        double value;
        const double scaled = __ddiv_rn(static_cast<double>(logit), temperature);
        if (gumbel.perturb_above(scaled, id, most.value, &value) && value > most.value) {
            most = {value, id};
        }
    });
    most = reduce(exchange.draws, most, [](const Draw &a, const Draw &b) { return better(a, b); });
    if (threadIdx.x == 0) {
        out[0] = most.id;
        put64(out + 1, static_cast<uint64_t>(__double_as_longlong(most.value)));
    }
}

// The greatest key of the `wanted` least, of which there are more: digit after digit from the top.
__device__ __forceinline__ uint64_t radix_select(Exchange &exchange, const Row &row,
                                                 uint32_t wanted) {
    __shared__ uint32_t chosen, below, inside;
    static_assert(kRecordThreads >= 256, "a thread a bin");
    uint64_t prefix = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) exchange.bins[threadIdx.x] = 0;
        // Orders the zeros before the counts, the counts before their sums, and those before reads.
        __syncthreads();
        row.each([&](float logit, uint32_t id) {
            const uint64_t key = sampling::candidate(logit, id);
            // Above the digit in question, keys agree with what was chosen.
            const bool matches = shift == 56 || (key ^ prefix) >> (shift + 8) == 0;
            if (matches) atomicAdd(&exchange.bins[key >> shift & 255], 1);
        });
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t bin = 0, sum = 0;
            while (sum + exchange.bins[bin] < wanted) sum += exchange.bins[bin++];
            chosen = bin;
            below = sum;
            inside = exchange.bins[bin];
        }
        __syncthreads();
        // Two more barriers stand before what the next round writes of these.
        prefix |= uint64_t{chosen} << shift;
        wanted -= below;
        if (inside == wanted) return prefix | ((uint64_t{1} << shift) - 1);
    }
    return prefix;
}

__device__ __forceinline__ void candidates(Exchange &exchange, const RecordRequest &request,
                                           const Row &row, uint32_t *out) {
    __shared__ uint32_t listed;
    const double temperature = request.temperature;
    uint32_t size = 0;
    Mass mass = Mass::empty();
    row.each([&](float logit, uint32_t) {
        size++;
        if (request.wants_mass != 0) {
            mass.add_exp(__ddiv_rn(static_cast<double>(logit), temperature));
        }
    });
    size = count_all(exchange, size);
    mass = reduce(exchange.masses, mass, [](Mass a, const Mass &b) {
        a.add(b);
        return a;
    });
    if (threadIdx.x == 0) {
        out[0] = size;
        put64(out + 1, static_cast<uint64_t>(__double_as_longlong(mass.place)));
        for (uint32_t i = 0; i < 4; i++) put64(out + 3 + 2 * i, mass.digits[i]);
        listed = 0;
    }
    uint32_t *list = out + 11;
    for (uint32_t i = threadIdx.x; i < 2 * request.count; i += kRecordThreads) list[i] = UINT32_MAX;
    uint64_t last = sampling::kNoCandidate;
    if (request.count > 0 && size > request.count) last = radix_select(exchange, row, request.count);
    // Orders the empty list before what is put into it.
    __syncthreads();
    if (request.count == 0) return;
    row.each([&](float logit, uint32_t id) {
        const uint64_t key = sampling::candidate(logit, id);
        if (key <= last) put64(list + 2 * atomicAdd(&listed, 1), key);
    });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kRecordThreads)
    sampling_records(const __grid_constant__ RecordsParams params) {
    __shared__ Exchange exchange;
    const RecordRequest request = params.requests[blockIdx.x];
    Row row = {params.logits + request.row * params.stride, params.cols, params.first_id};
    uint32_t *out = params.out + request.out;

    // NaN or +inf: not below infinity.
    uint32_t bad = 0;
    for (uint32_t i = threadIdx.x; i < row.cols; i += kRecordThreads) {
        if (!(row.logits[i] < CUDART_INF_F)) bad++;
    }
    bad = count_all(exchange, bad);
    if (threadIdx.x == 0) out[0] = bad;
    if (bad > 0) {
        for (uint32_t i = 1 + threadIdx.x; i < request.words; i += kRecordThreads) out[i] = 0;
        return;
    }
    row = processed(params, request, row);
    if (request.kind == kRecordBest) {
        best(exchange, row, out + 1);
    } else if (request.kind == kRecordDrawn) {
        drawn(exchange, request, row, out + 1);
    } else {
        candidates(exchange, request, row, out + 1);
    }
}
