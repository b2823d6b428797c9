// All-gather: the rows of all ranks side by side.
//
// `rows` rows of `widths[r]` elements from rank r, one after another in its input; the output's
// rows are the ranks' rows joined. One row: the inputs one after another. Only bits move. Grid as
// in one_shot.cu. Floor: the bytes of all other ranks into each rank's links, and one hop.
//
// Staged: see one_shot.cu. No barrier at the end: see collective.cuh.
#include "collective.cuh"
#include "pack.cuh"

namespace collective {

// Writes pack `index` of a rank's rows, of `width` elements each, where they belong in the output.
template <typename T>
__device__ __forceinline__ void place(const CollectiveArgs &args, uint64_t column, uint64_t width,
                                      uint64_t total, uint64_t index, uint4 pack) {
    if (args.rows == 1) {
        store_pack<T>(args.output + column * sizeof(T), index, width, pack);
        return;
    }
    uint64_t row = index * kPerPack<T> / width;
    uint64_t at = index * kPerPack<T> % width;
    auto *out = reinterpret_cast<T *>(args.output);
    if (at + kPerPack<T> <= width) {
        store_pack<T>(reinterpret_cast<uint64_t>(out + row * total + column + at), 0, kPerPack<T>,
                      pack);
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < kPerPack<T>; ++i) {
        if (row < args.rows) ptx::st_global(out + row * total + column + at, bits_of<T>(pack, i));
        if (++at == width) {
            at = 0;
            ++row;
        }
    }
}

template <typename T> __device__ __forceinline__ void all_gather(const CollectiveArgs &args) {
    Collective c(args);
    if (!c.begin()) return;
    uint64_t total = 0, longest = 0;
    for (uint32_t peer = 0; peer < c.world_size; ++peer) {
        total += args.widths[peer];
        longest = max(longest, args.widths[peer]);
    }
    const uint64_t packs = packs_of<T>(args.rows * longest);
    const uint64_t elements = args.rows * args.widths[c.rank];
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t threads = gridDim.x * blockDim.x;
    for (uint64_t first = 0; first < packs; first += c.staging_packs()) {
        // A rank with short rows may have nothing left; the barriers are the same for all.
        const uint64_t end = min(packs, first + c.staging_packs());
        const uint64_t mine = min(end, packs_of<T>(elements));
        for (uint64_t i = first + thread; i < mine; i += threads)
            ptx::st_global_v4(c.staging(c.rank) + (i - first),
                              load_pack<T>(args.input, i, elements));
        if (!c.barrier()) return;
        for (uint32_t step = 0; step < c.world_size; ++step) {
            const uint32_t peer = (c.rank + step) % c.world_size;
            const uint64_t width = args.widths[peer];
            uint64_t column = 0;
            for (uint32_t before = 0; before < peer; ++before) column += args.widths[before];
            const uint64_t theirs = min(end, packs_of<T>(args.rows * width));
            for (uint64_t i = first + thread; i < theirs; i += threads)
                place<T>(args, column, width, total, i,
                         ptx::ld_global_v4(c.staging(peer) + (i - first)));
        }
        c.next_pass();
    }
    c.finish();
}

// No collective: puts the rows of all ranks, which the ring has gathered one rank after another in
// `input`, side by side.
template <typename T>
__device__ __forceinline__ void place_columns(const CollectiveArgs &args) {
    const auto *arena = reinterpret_cast<const CollectiveArena *>(args.arena);
    const uint32_t world_size = arena->control.world_size;
    uint64_t total = 0;
    for (uint32_t peer = 0; peer < world_size; ++peer) total += args.widths[peer];
    uint64_t column = 0;
    for (uint32_t peer = 0; peer < world_size; ++peer) {
        const uint64_t width = args.widths[peer];
        const uint64_t elements = args.rows * width;
        const uint64_t source = args.input + args.rows * column * sizeof(T);
        for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < packs_of<T>(elements);
             i += gridDim.x * blockDim.x)
            place<T>(args, column, width, total, i, load_pack<T>(source, i, elements));
        column += width;
    }
}

}  // namespace collective

RINGTP_COLLECTIVE_OF(all_gather, b16, uint16_t)
RINGTP_COLLECTIVE_OF(all_gather, b32, uint32_t)
RINGTP_COLLECTIVE_OF(place_columns, b16, uint16_t)
RINGTP_COLLECTIVE_OF(place_columns, b32, uint32_t)
