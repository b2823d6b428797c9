// Reduce-scatter: rank r gets part r of the sum of all ranks' messages.
//
// `elements` of the message; parts are of elements (`Part`) and may begin anywhere. Grid as in
// one_shot.cu. Floor: S (N - 1) / N bytes into each rank's links, and one hop. The sums are those
// of the all-reduces, to the bit.
//
// Staged, each part at a multiple of a pack: then what peers read is aligned, and the output may
// be a part of the input. No barrier at the end: see collective.cuh.
#include "collective.cuh"
#include "pack.cuh"

namespace collective {

template <typename T> __device__ __forceinline__ void reduce_scatter(const CollectiveArgs &args) {
    Collective c(args);
    if (!c.begin()) return;
    const Part own(args.elements, c.world_size, c.rank);
    // Of the longest part: every rank goes through as many passes.
    const uint64_t packs = packs_of<T>(Part(args.elements, c.world_size, 0).count);
    const uint64_t per_pass = c.staging_packs() / c.world_size;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t threads = gridDim.x * blockDim.x;
    for (uint64_t first = 0; first < packs; first += per_pass) {
        const uint64_t count = min(packs - first, per_pass);
        for (uint32_t peer = 0; peer < c.world_size; ++peer) {
            const Part part(args.elements, c.world_size, peer);
            for (uint64_t i = thread; i < count; i += threads)
                ptx::st_global_v4(
                    c.staging(c.rank) + peer * per_pass + i,
                    load_pack<T>(args.input + part.first * sizeof(T), first + i, part.count));
        }
        if (!c.barrier()) return;
        for (uint64_t i = thread; i < count; i += threads) {
            const uint4 sum = sum_over_ranks<T>(c.world_size, [&](uint32_t peer) {
                return c.staging(peer) + c.rank * per_pass + i;
            });
            store_pack<T>(args.output, first + i, own.count, sum);
        }
        c.next_pass();
    }
    c.finish();
}

}  // namespace collective

RINGTP_COLLECTIVE(reduce_scatter)
