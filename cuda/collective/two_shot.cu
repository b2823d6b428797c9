// All-reduce in two hops: rank r sums part r of every rank's message, then collects the others'
// sums.
//
// Grid: up to kCollectiveBlocks blocks of up to kCollectiveThreads threads, the same on all ranks;
// shared memory for a pointer a rank. Floor: 2 S (N - 1) / N bytes into each rank's links, and two
// hops. The sums are those of one_shot.cu, to the bit.
//
// Peers read the message where it is if they can (`direct`), else from the staging buffer. They
// are done with it at the second barrier, before anything but this rank's own part, which they do
// not read, is overwritten; and their reading of the sums, in the result buffer, is over before
// that is written again: so it works in place, and no third barrier is needed. That holds as long
// as the next kernel in the stream starts when this one has ended (no programmatic launch).
//
// Pack i of each part belongs to the same block on all ranks and in both hops, and so does its
// place in the buffers in every pass: blocks meet nobody but their twins.
#include "collective.cuh"
#include "pack.cuh"

namespace collective {

// In a source that peers are told: the pointer is to the message itself, not to the staging buffer,
// where parts lie at other places. Pointers are aligned to 16 bytes.
constexpr uint64_t kDirect = 1;

template <typename T> __device__ __forceinline__ void two_shot(const CollectiveArgs &args) {
    __shared__ const uint4 *sources[kMaxRanks];
    Collective c(args);
    if (!c.begin()) return;
    const uint64_t packs = packs_of<T>(args.elements);
    const Part own(packs, c.world_size, c.rank);
    // Packs of each part that a pass takes. The longest part has the most passes; all make them.
    const uint64_t per_pass = c.staging_packs() / c.world_size;
    const uint64_t longest = Part(packs, c.world_size, 0).count;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t threads = gridDim.x * blockDim.x;
    for (uint64_t first = 0; first < longest; first += per_pass) {
        const auto end_of = [&](const Part &part) { return min(part.count, first + per_pass); };
        uint64_t source = args.input | kDirect;
        if (!args.direct) {
            source = reinterpret_cast<uint64_t>(c.staging(c.rank));
            for (uint32_t peer = 0; peer < c.world_size; ++peer) {
                const Part part(packs, c.world_size, peer);
                uint4 *staging = c.staging(c.rank) + peer * per_pass;
                for (uint64_t i = first + thread; i < end_of(part); i += threads)
                    ptx::st_global_v4(staging + (i - first),
                                      load_pack<T>(args.input, part.first + i, args.elements));
            }
        }
        if (!c.barrier(0, source)) return;
        if (threadIdx.x < c.world_size) {
            // Where the peer has this rank's part of this pass.
            if (threadIdx.x != c.rank) source = c.source_of(threadIdx.x);
            const uint64_t at = source & kDirect ? own.first + first : c.rank * per_pass;
            sources[threadIdx.x] = reinterpret_cast<const uint4 *>(source & ~kDirect) + at;
        }
        __syncthreads();

        for (uint64_t i = first + thread; i < end_of(own); i += threads) {
            const uint4 sum = sum_over_ranks<T>(
                c.world_size, [&](uint32_t peer) { return sources[peer] + (i - first); });
            ptx::st_global_v4(c.result(c.rank) + (i - first), sum);
            store_pack<T>(args.output, own.first + i, args.elements, sum);
        }
        if (!c.barrier(1)) return;
        // Each starts behind itself, so that not all read from one rank at once.
        for (uint32_t step = 1; step < c.world_size; ++step) {
            const uint32_t peer = (c.rank + step) % c.world_size;
            const Part part(packs, c.world_size, peer);
            for (uint64_t i = first + thread; i < end_of(part); i += threads)
                store_pack<T>(args.output, part.first + i, args.elements,
                              ptx::ld_global_v4(c.result(peer) + (i - first)));
        }
        c.next_pass();
    }
    c.finish();
}

}  // namespace collective

RINGTP_COLLECTIVE(two_shot)
