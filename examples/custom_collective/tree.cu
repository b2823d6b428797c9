// All-reduce along a binary tree: sums go up to rank 0, which sends the total down.
//
// Rank r has the children 2r + 1 and 2r + 2. Grid: up to kCollectiveBlocks blocks of up to
// kCollectiveThreads threads, the same on all ranks; each block is a tree of its own with its share
// of the message. Bytes: S up and S down each edge of the tree. Hops: twice the depth.
//
// What a rank sums, its own message, then the left and the right child's sums, is rounded to the
// message's type once.
//
// # Who writes, who reads, what orders it
//
// - A rank puts the sum of its branch into its own staging buffer and signals its parent, which
//   reads it there once it has waited for both children. The total goes into each rank's result
//   buffer, a signal to both children, who read it there: `signal` and `wait_for` have the release
//   and the acquire.
// - The staging buffer of a pass is read by the parent before its signal for the total, which this
//   rank waits for within the pass. The result buffer is read by the children before their signals
//   of the next pass, which this rank waits for before it writes that buffer again.
// - Whoever has the total knows that all ranks have begun this pass, for all have a part in it: so
//   it counts as a pass with a barrier among all for the collectives before and after it.
#include "collective/collective.cuh"
#include "collective/pack.cuh"

namespace collective {

template <typename T> __device__ __forceinline__ void tree(const CollectiveArgs &args) {
    Collective c(args);
    if (!c.begin()) return;
    const uint32_t left = 2 * c.rank + 1, right = left + 1, up = (c.rank - 1) / 2;
    const bool has_left = left < c.world_size, has_right = right < c.world_size;
    const uint32_t children = (has_left ? 1u << left : 0) | (has_right ? 1u << right : 0);
    const uint32_t parent = c.rank == 0 ? 0 : 1u << up;
    const uint64_t packs = packs_of<T>(args.elements);
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t threads = gridDim.x * blockDim.x;
    for (uint64_t first = 0; first < packs; first += c.staging_packs()) {
        const uint64_t count = min(packs - first, c.staging_packs());
        if (!c.wait_for(children, 0)) return;
        for (uint64_t i = thread; i < count; i += threads) {
            Sum<T> sum(load_pack<T>(args.input, first + i, args.elements));
            if (has_left) sum.add(ptx::ld_global_v4(c.staging(left) + i));
            if (has_right) sum.add(ptx::ld_global_v4(c.staging(right) + i));
            ptx::st_global_v4((parent ? c.staging(c.rank) : c.result(c.rank)) + i, sum.round());
        }
        if (parent) {
            c.signal(parent, 0);
            if (!c.wait_for(parent, 1)) return;
        }
        for (uint64_t i = thread; i < count; i += threads) {
            const uint4 total = ptx::ld_global_v4(c.result(parent ? up : c.rank) + i);
            if (parent && children) ptx::st_global_v4(c.result(c.rank) + i, total);
            store_pack<T>(args.output, first + i, args.elements, total);
        }
        c.signal(children, 1);
        c.next_pass();
    }
    c.finish();
}

}  // namespace collective

RINGTP_COLLECTIVE(tree)
