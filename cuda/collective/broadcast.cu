// Broadcast: the root's message on every rank. Only bits move.
//
// Grid as in one_shot.cu. Two forms with the same result:
// - `broadcast`: every rank reads the whole from the root. One hop; (N - 1) S bytes out of the
//   root's links.
// - `broadcast_parts`: every other rank reads a part from the root and the rest from the others.
//   Two hops; S bytes out of the root's links, at most S into anybody's. For large messages.
//
// Staged: see one_shot.cu. Reuse of the result buffer: see collective.cuh.
#include "collective.cuh"
#include "pack.cuh"

namespace collective {

template <typename T> __device__ __forceinline__ void stage(const CollectiveArgs& args,
                                                            const Collective& c, uint64_t first,
                                                            uint64_t from, uint64_t count)
{
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * blockDim.x)
        ptx::st_global_v4(c.staging(c.rank) + from + i,
                          load_pack<T>(args.input, first + from + i, args.elements));
}

// Copies packs of this pass to the output.
template <typename T> __device__ __forceinline__ void fetch(const CollectiveArgs& args,
                                                            uint64_t first, uint64_t count,
                                                            const uint4* source, uint4* keep)
{
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * blockDim.x) {
        const uint4 pack = ptx::ld_global_v4(source + i);
        store_pack<T>(args.output, first + i, args.elements, pack);
        if (keep != nullptr) ptx::st_global_v4(keep + i, pack);
    }
}

template <typename T> __device__ __forceinline__ void broadcast(const CollectiveArgs& args)
{
    Collective c(args.arena);
    const uint64_t packs = packs_of<T>(args.elements);
    for (uint64_t first = 0; first < packs; first += c.staging_packs()) {
        const uint64_t count = min(packs - first, c.staging_packs());
        if (c.rank == args.root) stage<T>(args, c, first, 0, count);
        if (!c.barrier()) return;
        fetch<T>(args, first, count, c.staging(args.root), nullptr);
        c.next_pass();
    }
    c.finish();
}

template <typename T> __device__ __forceinline__ void broadcast_parts(const CollectiveArgs& args)
{
    Collective c(args.arena);
    const uint64_t packs = packs_of<T>(args.elements);
    const uint32_t readers = c.world_size - 1;
    // The ranks behind the root, counted from 0; the root itself comes last.
    const uint32_t place = (c.rank + readers - args.root) % c.world_size;
    for (uint64_t first = 0; first < packs; first += c.staging_packs()) {
        const uint64_t count = min(packs - first, c.staging_packs());
        if (c.rank == args.root) {
            for (uint32_t reader = 0; reader < readers; ++reader) {
                const Part part(count, readers, reader);
                stage<T>(args, c, first, part.first, part.count);
            }
        }
        if (!c.barrier(0)) return;
        if (c.rank == args.root) {
            for (uint32_t reader = 0; reader < readers; ++reader) {
                const Part part(count, readers, reader);
                fetch<T>(args, first + part.first, part.count, c.staging(c.rank) + part.first,
                         nullptr);
            }
        } else {
            const Part part(count, readers, place);
            fetch<T>(args, first + part.first, part.count, c.staging(args.root) + part.first,
                     c.result(c.rank));
        }
        if (!c.barrier(1)) return;
        for (uint32_t step = 1; c.rank != args.root && step < readers; ++step) {
            const uint32_t reader = (place + step) % readers;
            const uint32_t peer = (args.root + 1 + reader) % c.world_size;
            const Part part(count, readers, reader);
            fetch<T>(args, first + part.first, part.count, c.result(peer), nullptr);
        }
        c.next_pass();
    }
    c.finish();
}

}  // namespace collective

RINGTP_COLLECTIVE_OF(broadcast, b16, uint16_t)
RINGTP_COLLECTIVE_OF(broadcast, b32, uint32_t)
RINGTP_COLLECTIVE_OF(broadcast_parts, b16, uint16_t)
RINGTP_COLLECTIVE_OF(broadcast_parts, b32, uint32_t)
