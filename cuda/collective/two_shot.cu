// All-reduce in two hops: rank r sums part r of every rank's message, then collects the others'
// sums.
//
// Grid: up to RINGTP_MAX_BLOCKS blocks of up to RINGTP_MAX_THREADS threads, the same on all ranks;
// shared memory for a pointer a rank. Floor: 2 S (N - 1) / N bytes into each rank's links, and two
// hops. The sums are those of one_shot.cu, to the bit.
//
// Peers read the message where it is if they can (`direct`), else from the staging buffer. They
// are done with it at the second barrier, before anything but this rank's own part, which they do
// not read, is overwritten; and their reading of the sums, in the result buffer, is over before
// that is written again: so it works in place, and no third barrier is needed. That holds as long
// as the next kernel in the stream starts when this one has ended (no programmatic launch).
//
// Pack i of each part belongs to the same thread in both hops, and to the same block on all ranks.
#include "collective.cuh"
#include "pack.cuh"

namespace collective {

template <typename T> __device__ __forceinline__ void two_shot(const CollectiveArgs& args)
{
    __shared__ const uint4* sources[kMaxRanks];
    Collective c(args.arena);
    const uint64_t packs = packs_of<T>(args.elements);
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t threads = gridDim.x * blockDim.x;
    for (uint64_t first = 0; first < packs; first += c.staging_packs()) {
        const uint64_t count = min(packs - first, c.staging_packs());
        uint4* staging = c.staging(c.rank);
        const uint4* source = reinterpret_cast<const uint4*>(args.input) + first;
        if (!args.direct) {
            source = staging;
            for (uint32_t peer = 0; peer < c.world_size; ++peer) {
                const Part part(count, c.world_size, peer);
                for (uint64_t i = thread; i < part.count; i += threads)
                    ptx::st_global_v4(
                        staging + part.first + i,
                        load_pack<T>(args.input, first + part.first + i, args.elements));
            }
        }
        if (!c.barrier(0, reinterpret_cast<uint64_t>(source))) return;
        if (threadIdx.x < c.world_size)
            sources[threadIdx.x] =
                threadIdx.x == c.rank ? source
                                      : reinterpret_cast<const uint4*>(c.source_of(threadIdx.x));
        __syncthreads();

        const Part own(count, c.world_size, c.rank);
        for (uint64_t i = thread; i < own.count; i += threads) {
            const uint4 sum = sum_over_ranks<T>(c.world_size, [&](uint32_t peer) {
                return sources[peer] + own.first + i;
            });
            ptx::st_global_v4(c.result(c.rank) + i, sum);
            store_pack<T>(args.output, first + own.first + i, args.elements, sum);
        }
        if (!c.barrier(1)) return;
        // Each starts behind itself, so that not all read from one rank at once.
        for (uint32_t step = 1; step < c.world_size; ++step) {
            const uint32_t peer = (c.rank + step) % c.world_size;
            const Part part(count, c.world_size, peer);
            for (uint64_t i = thread; i < part.count; i += threads)
                store_pack<T>(args.output, first + part.first + i, args.elements,
                              ptx::ld_global_v4(c.result(peer) + i));
        }
        c.next_pass();
    }
    c.finish();
}

}  // namespace collective

RINGTP_COLLECTIVE(two_shot)
