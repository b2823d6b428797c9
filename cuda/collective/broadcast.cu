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

// Puts packs `from..to` of the message into the staging buffer.
template <typename T>
__device__ __forceinline__ void stage(const CollectiveArgs &args, uint64_t from, uint64_t to,
                                      uint4 *staging) {
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; from + i < to;
         i += gridDim.x * blockDim.x)
        ptx::st_global_v4(staging + i, load_pack<T>(args.input, from + i, args.elements));
}

// Puts packs `from..to`, as they are at `source`, into the output, and for others to read if `keep`
// is not null.
template <typename T>
__device__ __forceinline__ void fetch(const CollectiveArgs &args, uint64_t from, uint64_t to,
                                      const uint4 *source, uint4 *keep) {
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; from + i < to;
         i += gridDim.x * blockDim.x) {
        const uint4 pack = ptx::ld_global_v4(source + i);
        store_pack<T>(args.output, from + i, args.elements, pack);
        if (keep != nullptr) ptx::st_global_v4(keep + i, pack);
    }
}

template <typename T> __device__ __forceinline__ void broadcast(const CollectiveArgs &args) {
    Collective c(args);
    if (!c.begin()) return;
    const uint64_t packs = packs_of<T>(args.elements);
    for (uint64_t first = 0; first < packs; first += c.staging_packs()) {
        const uint64_t end = min(packs, first + c.staging_packs());
        if (c.rank == args.root) stage<T>(args, first, end, c.staging(c.rank));
        if (!c.barrier()) return;
        fetch<T>(args, first, end, c.staging(args.root), nullptr);
        c.next_pass();
    }
    c.finish();
}

template <typename T> __device__ __forceinline__ void broadcast_parts(const CollectiveArgs &args) {
    Collective c(args);
    if (!c.begin()) return;
    const uint64_t packs = packs_of<T>(args.elements);
    const uint32_t readers = c.world_size - 1;
    // The ranks behind the root are the readers 0, 1, ...; the root would be the one after them.
    const uint32_t reader = (c.rank + readers - args.root) % c.world_size;
    const uint64_t per_pass = c.staging_packs() / readers;
    const uint64_t longest = Part(packs, readers, 0).count;
    for (uint64_t first = 0; first < longest; first += per_pass) {
        // The packs of a reader's part that this pass takes, and where the root has them.
        const auto from = [&](const Part &part) { return part.first + first; };
        const auto to = [&](const Part &part) {
            return part.first + min(part.count, first + per_pass);
        };
        const auto staging = [&](uint32_t other) {
            return c.staging(args.root) + other * per_pass;
        };
        for (uint32_t other = 0; c.rank == args.root && other < readers; ++other) {
            const Part part(packs, readers, other);
            stage<T>(args, from(part), to(part), staging(other));
        }
        if (!c.barrier(0)) return;
        for (uint32_t other = 0; other < readers; ++other) {
            // The root takes all from itself, a reader its own part.
            if (c.rank != args.root && other != reader) continue;
            const Part part(packs, readers, other);
            fetch<T>(args, from(part), to(part), staging(other),
                     c.rank == args.root ? nullptr : c.result(c.rank));
        }
        if (!c.barrier(1)) return;
        for (uint32_t step = 1; c.rank != args.root && step < readers; ++step) {
            const uint32_t other = (reader + step) % readers;
            const uint32_t peer = (args.root + 1 + other) % c.world_size;
            const Part part(packs, readers, other);
            fetch<T>(args, from(part), to(part), c.result(peer), nullptr);
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
