// Whether the links do what the driver says: all ranks write to, wait for and read from each other
// at once. Some machines (IOMMU, virtualisation) report peer access and lose the writes.
//
// Grid: a block a rank, the same on all ranks; any block size. Block p deals with rank p: it writes
// a pattern and then a flag into its memory, waits for the same from it, and checks what came; and
// reads the pattern that rank p's host put into its own place there.
#include "../ptx/memory.cuh"
#include "../ptx/time.cuh"
#include "abi.h"

namespace collective {

// The pattern of a rank: a different word everywhere, and at each probe. As the host computes it.
__device__ __forceinline__ uint32_t pattern(uint64_t nonce, uint32_t rank, uint32_t index) {
    uint32_t x = static_cast<uint32_t>(nonce) * 0x9e3779b9u + rank * 0x85ebca6bu + index;
    x = (x ^ x >> 16) * 0x7feb352du;
    return x ^ x >> 15;
}

// Whether all of a stretch has the pattern of a rank; the same for all threads of the block.
__device__ __forceinline__ bool has_pattern(const uint8_t *at, uint64_t nonce, uint32_t rank) {
    bool wrong = false;
    for (uint32_t i = threadIdx.x; i < kProbeBytes / 4; i += blockDim.x)
        wrong |=
            ptx::ld_global(reinterpret_cast<const uint32_t *>(at) + i) != pattern(nonce, rank, i);
    return !__syncthreads_or(wrong);
}

}  // namespace collective

extern "C" __global__ void probe(const __grid_constant__ ProbeArgs args) {
    using namespace collective;
    auto *mine = reinterpret_cast<CollectiveArena *>(args.arena);
    const uint32_t rank = mine->control.rank, peer = blockIdx.x;
    auto *result = reinterpret_cast<ProbeResult *>(args.results) + peer;
    if (peer == rank) return;
    auto *theirs = reinterpret_cast<CollectiveArena *>(mine->control.arenas[peer]);
    if (args.reaches >> peer & 1) {
        auto *target = reinterpret_cast<uint32_t *>(theirs->probe[rank]);
        for (uint32_t i = threadIdx.x; i < kProbeBytes / 4; i += blockDim.x)
            ptx::st_global(target + i, pattern(args.nonce, rank, i));
        // All have written; the release is in the thread that writes the flag.
        __syncthreads();
        if (threadIdx.x == 0) ptx::st_release_sys(&theirs->probe_flags[rank], args.nonce);
        const bool right = has_pattern(theirs->probe[peer], args.nonce, peer);
        if (threadIdx.x == 0) result->read = right ? kProbeRight : kProbeDamaged;
    }
    if (args.reached_by >> peer & 1) {
        bool missing = false;
        if (threadIdx.x == 0) {
            const uint64_t start = ptx::globaltimer();
            while (ptx::ld_acquire_sys(&mine->probe_flags[peer]) != args.nonce) {
                missing = ptx::globaltimer() - start > args.deadline_ns;
                if (missing) break;
                ptx::nanosleep(1024);
            }
        }
        uint32_t written = kProbeMissing;
        // The acquire, then the barrier: the block sees what the peer wrote before its flag.
        if (!__syncthreads_or(missing))
            written = has_pattern(mine->probe[peer], args.nonce, peer) ? kProbeRight
                                                                       : kProbeDamaged;
        if (threadIdx.x == 0) result->written = written;
    }
}
