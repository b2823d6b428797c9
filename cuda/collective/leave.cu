// A rank leaves the group for good: whoever waits for it, or will, learns that at once.
//
// The last kernel of the rank: one block of at least kMaxRanks threads. Thread p tells rank p, with
// release at system scope. All kernels before it in the stream have ended, so their flags come
// before the word: see "Losing a peer" in collective.cuh.
#include "../ptx/memory.cuh"
#include "abi.h"

extern "C" __global__ void leave(const __grid_constant__ CollectiveArgs args) {
    const CollectiveControl &control = reinterpret_cast<CollectiveArena *>(args.arena)->control;
    const uint32_t peer = threadIdx.x;
    if (peer >= control.world_size || peer == control.rank) return;
    if (!(control.reachable >> peer & 1)) return;
    auto *theirs = reinterpret_cast<CollectiveArena *>(control.arenas[peer]);
    ptx::st_release_sys(&theirs->left[control.rank], control.generation);
}
