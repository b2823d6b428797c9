// What a kernel needs to be a collective: its peers, flags, epochs, the deadline and the abort.
//
// A collective in a few lines (see one_shot.cu):
//
//     Collective c(args);
//     if (!c.begin()) return;              // somebody was lost before
//     ...                                  // write to c.staging(c.rank)
//     if (!c.barrier()) return;            // all ranks have written; false: somebody is lost
//     ...                                  // read c.staging(peer), write the output
//     c.finish(1);
//
// All ranks launch the same kernels in the same order with the same grid, and all blocks of a grid
// are resident at once. Block b talks to the blocks b of its peers and to nobody else: what block
// b stages or sums, block b of the peers reads.
//
// # The barrier: who writes, who reads, what orders it
//
// - `__syncthreads()` makes all that the block's threads wrote happen before what thread p < N
//   does next. Thread p then stores the flag into rank p's memory with release at system scope: the
//   release stands in the thread that writes the flag, and is cumulative over the barrier.
// - Rank p's thread for this rank polls the flag in its own memory with acquire at system scope,
//   and a `__syncthreads()` hands on what it learned to its block.
// - A flag has one writer, and its epoch only grows. Waiting for "at least mine" is right, as a peer
//   may be one barrier ahead; it can't be two, since it waits for this rank's flag in between.
// - A flag also has a tag of the call, so that ranks that make different calls find out: 16 bits of
//   generation, 8 of tag, 40 of epoch. Epochs wrap; one that is ahead by more than `kWindow` is one
//   that was left behind long ago, by a block that small messages do not use.
// - Nothing is read or written across a link but data and flags; nobody polls across one.
//
// # Epochs and passes
//
// A pass is a stretch of a message that fits the staging buffer. It takes two epochs, of which a
// collective with one barrier leaves the second out; their number may jump. The epoch is the same
// for all blocks, also for those that a small grid leaves out (`finish` moves theirs on): so its
// parity of passes names one of two staging buffers for the whole rank.
//
// # Why buffers may be reused
//
// - Staging buffer of pass k (parity k): written again in pass k + 2, by a rank that has passed a
//   barrier of pass k + 1. Its peers had entered pass k + 1 by then, so they had finished pass k:
//   the same block by program order and the `__syncthreads()` before the flag, and other blocks,
//   where k was of another kernel, since a kernel starts when the one before it in the stream has
//   ended. So, within a kernel, a place in the buffer belongs to one block in all passes. Every
//   pass has a barrier among all ranks (in the ring: see ring.cu).
// - Result buffer of pass k: written again behind the first barrier of pass k + 1, which its
//   readers entered after they had read it.
// - `sources` of pass k: as the staging buffer.
//
// # Losing a peer
//
// A wait ends at the deadline, when the abort word is raised, when the peer turns out to be in a
// later generation, or when it has left for good (leave.cu: the word that says so is released after
// the last flag of its, so a flag that is not there behind an acquire of the word will not come).
// Whoever gives up writes the record for the host, raises the abort word of
// all whom it reaches, and the whole block leaves without writing output. The word stays until
// the group is rebuilt: later collectives see it in their first barrier and leave at once, so that
// a captured step of many costs one deadline. A peer may have finished this collective; none
// finishes the next.
//
// A peer may also be through the barrier of this collective, and still be reading. Its epoch is that
// of the calls after it, and so is its staging buffer: so a rank that has given up stages nothing
// more (`begin`). A rank that has not, and only finds the word raised, has done with every call before.
#pragma once

#include "../ptx/memory.cuh"
#include "../ptx/time.cuh"
#include "abi.h"

namespace collective {

constexpr uint32_t kGenerationShift = 48;
constexpr uint32_t kTagShift = 40;
constexpr uint64_t kEpochs = 1ull << kTagShift;
// How far a flag can be ahead of what is waited for, generously.
constexpr uint64_t kWindow = 1 << 20;

// Polls between two looks at the clock and the abort word.
constexpr uint32_t kPollsPerCheck = 64;
// Waiting for longer than this, in nanoseconds, is done at leisure.
constexpr uint64_t kSpin = 100000;
// The pauses of such a wait.
constexpr uint32_t kPause = 8192;

struct Collective {
    CollectiveArena *mine;
    uint32_t rank;
    uint32_t world_size;
    // The upper bits of every flag of this call.
    uint64_t generation_and_tag;
    // Of the pass that is under way: even.
    uint64_t epoch;

    __device__ __forceinline__ explicit Collective(const CollectiveArgs &args)
        : mine(reinterpret_cast<CollectiveArena *>(args.arena)), rank(mine->control.rank),
          world_size(mine->control.world_size),
          generation_and_tag(mine->control.generation << kGenerationShift |
                             uint64_t{args.tag & 0xff} << kTagShift),
          epoch(mine->epochs[blockIdx.x]) {}

    __device__ __forceinline__ CollectiveArena *arena(uint32_t peer) const {
        return reinterpret_cast<CollectiveArena *>(mine->control.arenas[peer]);
    }

    // A peer's staging buffer of this pass, or one's own.
    __device__ __forceinline__ uint4 *staging(uint32_t peer) const {
        return buffer(peer) + (epoch / 2 % 2) * staging_packs();
    }

    // A peer's result buffer, or one's own.
    __device__ __forceinline__ uint4 *result(uint32_t peer) const {
        return buffer(peer) + 2 * staging_packs();
    }

    // The messages that a peer's block was sent around the ring, or one's own.
    __device__ __forceinline__ uint4 *ring_slot(uint32_t peer, uint64_t message) const {
        constexpr uint64_t kPacks = kRingMessageBytes / 16;
        const uint64_t slot = blockIdx.x * kRingSlots + message % kRingSlots;
        return buffer(peer) + 3 * staging_packs() + slot * kPacks;
    }

    // Packs of a staging buffer and of the result buffer: what a pass can take.
    __device__ __forceinline__ uint64_t staging_packs() const {
        return mine->control.staging_bytes / 16;
    }

    // Whether this rank has given up no call before this one. Every thread calls it, before anything
    // is written that peers read. False, for all threads: leave; the record is there already.
    __device__ __forceinline__ bool begin() const {
        // Of an earlier kernel, or of another block of this one, whose peers' blocks hear of it.
        const bool gave_up = threadIdx.x == 0 && ptx::ld_relaxed_gpu(&mine->recorded) != 0;
        return !__syncthreads_or(gave_up);
    }

    // Waits until every rank's block is here. Every thread calls it; `stage` (0 or 1) counts the
    // barriers of a pass. `source` is handed to the peers: see `source_of`. False, for all
    // threads, if a rank is lost: then leave without writing output.
    __device__ __forceinline__ bool barrier(uint32_t stage = 0, uint64_t source = 0) {
        return barrier_among((1u << world_size) - 1, stage, source);
    }

    // The same among some ranks.
    __device__ __forceinline__ bool barrier_among(uint32_t ranks, uint32_t stage,
                                                  uint64_t source = 0) {
        const uint32_t peer = threadIdx.x;
        const uint64_t target = flag(stage + 1);
        bool failed = false;
        __syncthreads();
        if (peer < kMaxRanks && peer != rank && (ranks >> peer & 1)) {
            CollectiveArena *theirs = arena(peer);
            if (stage == 0) theirs->sources[epoch / 2 % 2][blockIdx.x][rank] = source;
            ptx::st_release_sys(&theirs->barrier[blockIdx.x][rank], target);
            failed = !wait(&mine->barrier[blockIdx.x][peer], target, peer, kStepBarrier);
        }
        return !__syncthreads_or(failed);
    }

    // Half of a barrier: tells the blocks of `ranks` that this one is here. What its threads wrote
    // before, they see behind `wait_for`. Every thread calls it; `stage` as of `barrier`. A rank
    // signals another once a stage, and what it signals is waited for in the same pass.
    __device__ __forceinline__ void signal(uint32_t ranks, uint32_t stage) const {
        const uint32_t peer = threadIdx.x;
        __syncthreads();
        if (peer < kMaxRanks && (ranks >> peer & 1))
            ptx::st_release_sys(&arena(peer)->barrier[blockIdx.x][rank], flag(stage + 1));
    }

    // The other half: waits for the signals of `ranks`. False, for all threads, if one is lost:
    // then leave without writing output.
    __device__ __forceinline__ bool wait_for(uint32_t ranks, uint32_t stage) const {
        const uint32_t peer = threadIdx.x;
        bool failed = false;
        if (peer < kMaxRanks && (ranks >> peer & 1))
            failed = !wait(&mine->barrier[blockIdx.x][peer], flag(stage + 1), peer, kStepBarrier);
        return !__syncthreads_or(failed);
    }

    // What a peer handed to the first barrier of this pass; any thread, after it.
    __device__ __forceinline__ uint64_t source_of(uint32_t peer) const {
        return mine->sources[epoch / 2 % 2][blockIdx.x][peer];
    }

    // Waits until a flag in this rank's own memory reaches `target`: one thread. After it, and a
    // `__syncthreads()`, the block sees what the writer of the flag had done.
    __device__ __forceinline__ bool wait(const uint64_t *word, uint64_t target, uint32_t peer,
                                         uint32_t step) const {
        // Both loads are under way at once; the word is looked at even if the flag is there.
        const bool aborted = is_raised(ptx::ld_relaxed_sys(&mine->abort));
        const uint64_t seen = ptx::ld_acquire_sys(word);
        return (!aborted && seen == target) || wait_long(word, target, peer, step);
    }

    // The flag of the epoch `ahead` of this pass's first.
    __device__ __forceinline__ uint64_t flag(uint64_t ahead) const {
        return generation_and_tag | (epoch + ahead) % kEpochs;
    }

    // On to the next pass, `epochs` on: at least 2, and even.
    __device__ __forceinline__ void next_pass(uint64_t epochs = 2) { epoch += epochs; }

    // The end: the next collective begins where this one's passes ended. Every block moves its
    // own epoch, and all together those of the blocks that this grid leaves out.
    __device__ __forceinline__ void finish() {
        const uint32_t block = blockIdx.x + threadIdx.x * gridDim.x;
        if (block < kCollectiveBlocks) mine->epochs[block] = epoch;
    }

  private:
    __device__ __forceinline__ uint4 *buffer(uint32_t peer) const {
        constexpr uint64_t kHead = (sizeof(CollectiveArena) + 127) / 128 * 128;
        return reinterpret_cast<uint4 *>(mine->control.arenas[peer] + kHead);
    }

    __device__ __forceinline__ uint64_t generation() const {
        return generation_and_tag >> kGenerationShift;
    }

    // A generation is never 0, so neither is a word that was raised in this one.
    __device__ __forceinline__ bool is_raised(uint64_t word) const {
        return word >> kGenerationShift == generation();
    }

    enum class Seen { kNotYet, kReached, kOtherCall, kLaterGeneration };

    __device__ __forceinline__ Seen look(uint64_t seen, uint64_t target) const {
        // Generations wrap. A flag that was never written is of generation 0, which there is not.
        const uint64_t theirs = seen >> kGenerationShift;
        const uint16_t newer = static_cast<uint16_t>(theirs - generation());
        if (theirs != 0 && newer != 0 && newer < 0x8000) return Seen::kLaterGeneration;
        if (newer != 0 || (seen - target) % kEpochs >= kWindow) return Seen::kNotYet;
        // One that is ahead belongs to the peer's next call; this one's was as it should be, or
        // the peer would not have left its barrier.
        const bool other_tag = (seen - target) % kEpochs == 0 && seen != target;
        return other_tag ? Seen::kOtherCall : Seen::kReached;
    }

    // The same for one that was not there at once: polls until the flag comes, the abort word is
    // raised, or the deadline has passed.
    __device__ __forceinline__ bool wait_long(const uint64_t *word, uint64_t target, uint32_t peer,
                                              uint32_t step) const {
        const uint64_t start = ptx::globaltimer();
        uint64_t waited = 0;
        for (;;) {
            const uint64_t raised = ptx::ld_relaxed_sys(&mine->abort);
            if (is_raised(raised)) {
                return give_up(kReasonAborted, step, peer, target, raised, waited);
            }
            const bool left = ptx::ld_acquire_sys(&mine->left[peer]) == generation();
            uint64_t seen = 0;
            Seen found = Seen::kNotYet;
            // A flag that is late by this much may as well be a little later.
            if (waited > kSpin) ptx::nanosleep(kPause);
            const uint32_t polls = waited > kSpin ? 1 : kPollsPerCheck;
#pragma unroll 1
            for (uint32_t poll = 0; poll < polls && found == Seen::kNotYet; ++poll) {
                seen = ptx::ld_acquire_sys(word);
                found = look(seen, target);
            }
            if (found == Seen::kReached) return true;
            if (found == Seen::kOtherCall)
                return give_up(kReasonOtherCall, step, peer, target, seen, waited);
            if (found == Seen::kLaterGeneration)
                return give_up(kReasonGeneration, step, peer, target, seen, waited);
            if (left) return give_up(kReasonLeft, step, peer, target, seen, waited);
            waited = ptx::globaltimer() - start;
            if (waited > mine->control.deadline_ns)
                return give_up(kReasonTimeout, step, peer, target, seen, waited);
        }
    }

    // Tells the host why, and everybody that it is over. Always false.
    __device__ __forceinline__ bool give_up(uint32_t reason, uint32_t step, uint32_t peer,
                                            uint64_t target, uint64_t seen, uint64_t waited) const {
        if (ptx::atom_relaxed_gpu_cas(&mine->recorded, 0, 1) == 0) {
            auto *record = reinterpret_cast<CollectiveRecord *>(mine->control.record);
            record->reason = reason;
            record->step = step;
            record->block = blockIdx.x;
            record->peer = peer;
            record->epoch = target % kEpochs;
            record->seen = seen % kEpochs;
            record->waited = waited;
            // The host reads `complete` first: release, so that the rest is there then.
            ptx::st_release_sys(&record->complete, generation());
        }
        const uint64_t word = generation() << kGenerationShift | (rank + 1);
#pragma unroll 1
        for (uint32_t other = 0; other < world_size; ++other)
            if (mine->control.reachable >> other & 1)
                ptx::st_relaxed_sys(&arena(other)->abort, word);
        return false;
    }
};

}  // namespace collective

// The kernels NAME_f32, NAME_bf16 and NAME_f16 of a template `collective::NAME`.
#define RINGTP_COLLECTIVE(NAME)                                                                    \
    RINGTP_COLLECTIVE_OF(NAME, f32, float)                                                         \
    RINGTP_COLLECTIVE_OF(NAME, bf16, bf16)                                                         \
    RINGTP_COLLECTIVE_OF(NAME, f16, f16)

// One kernel: NAME_SUFFIX, of `collective::NAME<TYPE>`.
#define RINGTP_COLLECTIVE_OF(NAME, SUFFIX, TYPE)                                                   \
    extern "C" __global__ void __launch_bounds__(kCollectiveThreads, 1)                            \
        NAME##_##SUFFIX(const __grid_constant__ CollectiveArgs args) {                             \
        collective::NAME<TYPE>(args);                                                              \
    }
