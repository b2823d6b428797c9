// All-reduce in one hop: every rank reads every other's message and sums it for itself.
//
// Grid: up to kCollectiveBlocks blocks of up to kCollectiveThreads threads, the same on all ranks;
// no shared memory. Floor: (N - 1) S bytes into each rank's links, and one hop.
//
// The message is staged in memory of this rank first, in packs: peers then read whole, aligned
// packs whatever the caller's pointers are, the sum may be made in place, and no barrier is needed
// at the end (see "Why buffers may be reused" in collective.cuh), which would cost another hop.
#include "collective.cuh"
#include "pack.cuh"

namespace collective {

template <typename T> __device__ __forceinline__ void one_shot(const CollectiveArgs &args) {
    Collective c(args);
    if (!c.begin()) return;
    const uint64_t packs = packs_of<T>(args.elements);
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t threads = gridDim.x * blockDim.x;
    for (uint64_t first = 0; first < packs; first += c.staging_packs()) {
        const uint64_t count = min(packs - first, c.staging_packs());
        uint4 *staging = c.staging(c.rank);
        for (uint64_t i = thread; i < count; i += threads)
            ptx::st_global_v4(staging + i, load_pack<T>(args.input, first + i, args.elements));
        if (!c.barrier()) return;
        for (uint64_t i = thread; i < count; i += threads) {
            const uint4 sum =
                sum_over_ranks<T>(c.world_size, [&](uint32_t peer) { return c.staging(peer) + i; });
            store_pack<T>(args.output, first + i, args.elements, sum);
        }
        c.next_pass();
    }
    c.finish();
}

}  // namespace collective

RINGTP_COLLECTIVE(one_shot)
