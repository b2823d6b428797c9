// The ring: every rank writes to its successor alone. For partial meshes, and by name.
//
// All-reduce: part p of the message starts at place p of the ring; every rank on its way adds its
// own and rounds to the message's type; place p - 1 completes it and sends it around once more.
// `ring_reduce_scatter` does the first half, with parts that end at their owners; `ring_all_gather`
// the second. Floor: 2 S (N - 1) / N bytes out of each rank's link, half of it for a half; 2 (N -
// 1) hops, of which chunks keep all links busy at once.
//
// Grid: up to kCollectiveBlocks blocks of kCollectiveThreads threads, the same on all ranks. Each
// block is a ring of its own with its share of each part, cut into messages of kRingMessageBytes
// bytes; a group of them follows one another through each step, so that a block works on one while
// the next is under way.
//
// # Who writes, who reads, what orders it
//
// - A block writes a message into a slot in its successor's memory. `__syncthreads()`, then one
//   thread stores `ring_sent` there with release at system scope. The successor's thread polls that
//   word with acquire, and a `__syncthreads()` lets its block read the slot.
// - When the block has read the slot: `__syncthreads()`, then one thread stores `ring_read` into
// the
//   predecessor's memory with release; the predecessor acquires it before it writes that slot
//   again, kRingSlots messages later. So a write never overtakes the reading of what it
//   replaces.
// - Both words count messages on top of the epoch, and all ranks send as many. A collective begins
//   with a barrier among neighbours: then both are in this collective, have read all that they were
//   sent before, and no word is ahead of its count; the slots are free.
// - The slots belong to the ring alone. Nothing that another rank reads is staged, so the passes of
//   the other collectives keep their argument: a ring counts as a pass with a barrier among
//   neighbours, and with N > 2 those are not all ranks; but every rank's last message depends on
//   all others' first, so whoever ends this collective knows that all have begun it.
#include "collective.cuh"
#include "pack.cuh"

namespace collective {

constexpr uint64_t kMessagePacks = kRingMessageBytes / 16;
// Messages of a group: half of the slots, so that a group can be sent while the last one is read.
constexpr uint32_t kGroup = kRingSlots / 2;

// One block's end of the ring.
struct Ring {
    Collective &c;
    uint32_t previous;
    uint32_t next;
    // Messages received and sent so far.
    uint64_t received = 0;
    uint64_t sent = 0;

    __device__ __forceinline__ explicit Ring(Collective &c) : c(c) {
        const uint32_t *ring = c.mine->control.ring;
        const uint32_t position = c.mine->control.ring_position;
        next = ring[(position + 1) % c.world_size];
        previous = ring[(position + c.world_size - 1) % c.world_size];
    }

    // Waits for the predecessor's next message, if `receives`, and for a free slot at the
    // successor, if `sends`. False, for all threads, if a rank is lost.
    __device__ __forceinline__ bool ready(bool receives, bool sends) const {
        bool failed = false;
        // Two threads of different warps, so that the waits overlap. The first 2 epochs are the
        // barrier's.
        if (threadIdx.x == 0 && receives)
            failed = !c.wait(&c.mine->ring_sent[blockIdx.x], c.flag(2 + received + 1), previous,
                             kStepRingMessage);
        if (threadIdx.x == 32 && sends && sent >= kRingSlots)
            failed =
                !c.wait(&c.mine->ring_read[blockIdx.x], c.flag(2 + sent - kRingSlots + 1),
                        next, kStepRingCredit);
        return !__syncthreads_or(failed);
    }

    // All threads have read the message and written the next one: tells both neighbours.
    __device__ __forceinline__ void pass_on(bool receives, bool sends) {
        __syncthreads();
        if (threadIdx.x == 0 && sends)
            ptx::st_release_sys(&c.arena(next)->ring_sent[blockIdx.x], c.flag(2 + sent + 1));
        if (threadIdx.x == 32 && receives)
            ptx::st_release_sys(&c.arena(previous)->ring_read[blockIdx.x],
                                c.flag(2 + received + 1));
        received += receives;
        sent += sends;
    }

    __device__ __forceinline__ const uint4 *incoming() const {
        return c.ring_slot(c.rank, received);
    }

    __device__ __forceinline__ uint4 *outgoing() const { return c.ring_slot(next, sent); }
};

enum class Halves { kReduceScatter, kAllGather, kBoth };

// Where part `index`, counted round the ring, is in the input and the output, in elements.
struct Segment {
    uint64_t input;
    uint64_t output;
    uint64_t elements;
};

// `part(index)` gives the Segment of a part; `longest` is the packs of the longest one.
template <typename T, Halves halves, typename PartOf>
__device__ __forceinline__ void ring(const CollectiveArgs &args, PartOf part, uint64_t longest) {
    Collective c(args);
    Ring ring(c);
    const uint32_t n = c.world_size;
    const uint32_t position = c.mine->control.ring_position;
    // In step s this rank receives the part that started s places back. A reduce-scatter's parts
    // start one place later, so that they end at their owners.
    const uint32_t shift = halves == Halves::kReduceScatter ? 1 : 0;
    const uint32_t last_sum = halves == Halves::kAllGather ? 0 : n - 1;
    const uint32_t steps = halves == Halves::kBoth ? 2 * n - 2 : n - 1;
    if (!c.barrier_among(1u << ring.previous | 1u << ring.next, 0)) return;

    const uint64_t messages = (longest + kMessagePacks - 1) / kMessagePacks;
    // This block's messages of each part: every gridDim-th. All blocks go through as many.
    const uint64_t each = (messages + gridDim.x - 1) / gridDim.x;
    for (uint64_t group = 0; group < each; group += kGroup) {
        const uint32_t members = static_cast<uint32_t>(min(each - group, uint64_t{kGroup}));
        for (uint32_t step = 0; step <= steps; ++step) {
            const bool receives = step > 0, sends = step < steps;
            const Segment own = part((position + 2 * n - step - shift) % n);
            for (uint32_t member = 0; member < members; ++member) {
                if (!ring.ready(receives, sends)) return;
                const uint64_t first = ((group + member) * gridDim.x + blockIdx.x) * kMessagePacks;
                const uint64_t packs = packs_of<T>(own.elements);
                const uint64_t count = first < packs ? min(packs - first, kMessagePacks) : 0;
                for (uint64_t i = threadIdx.x; i < count; i += blockDim.x) {
                    uint4 pack;
                    if (receives) pack = ptx::ld_global_v4(ring.incoming() + i);
                    if (!receives) {
                        pack = load_pack<T>(args.input + own.input * sizeof(T), first + i,
                                            own.elements);
                    } else if (step <= last_sum) {
                        // The sum so far comes first.
                        Sum<T> sum(pack);
                        sum.add(load_pack<T>(args.input + own.input * sizeof(T), first + i,
                                             own.elements));
                        pack = sum.round();
                    }
                    // The part is complete here: the sum's last step, and all steps after it.
                    if (step >= last_sum)
                        store_pack<T>(args.output + own.output * sizeof(T), first + i, own.elements,
                                      pack);
                    if (sends) ptx::st_global_v4(ring.outgoing() + i, pack);
                }
                ring.pass_on(receives, sends);
            }
        }
    }
    // The barrier's two, and one a message: at most as many as were sent, made even.
    c.next_pass(2 + (ring.sent + 1) / 2 * 2);
    c.finish();
}

template <typename T> __device__ __forceinline__ void ring_all_reduce(const CollectiveArgs &args) {
    const auto *arena = reinterpret_cast<const CollectiveArena *>(args.arena);
    const uint32_t n = arena->control.world_size;
    const uint64_t packs = packs_of<T>(args.elements);
    // Parts are of packs, so that all accesses stay aligned; the last pack may be a part of one.
    const auto part = [&](uint32_t index) {
        const Part part(packs, n, index);
        const uint64_t first = part.first * kPerPack<T>;
        const uint64_t end = min(first + part.count * kPerPack<T>, args.elements);
        return Segment{first, first, end > first ? end - first : 0};
    };
    ring<T, Halves::kBoth>(args, part, Part(packs, n, 0).count);
}

template <typename T>
__device__ __forceinline__ void ring_reduce_scatter(const CollectiveArgs &args) {
    const auto *arena = reinterpret_cast<const CollectiveArena *>(args.arena);
    const uint32_t n = arena->control.world_size;
    // The part of the rank at a place of the ring; it arrives at the start of its owner's output.
    const auto part = [&](uint32_t index) {
        const Part part(args.elements, n, arena->control.ring[index]);
        return Segment{part.first, 0, part.count};
    };
    ring<T, Halves::kReduceScatter>(args, part, packs_of<T>(Part(args.elements, n, 0).count));
}

// One row: the input of each rank, of its own length, goes where it belongs in the output.
template <typename T> __device__ __forceinline__ void ring_all_gather(const CollectiveArgs &args) {
    const auto *arena = reinterpret_cast<const CollectiveArena *>(args.arena);
    const uint32_t n = arena->control.world_size;
    uint64_t longest = 0;
    for (uint32_t rank = 0; rank < n; ++rank) longest = max(longest, args.widths[rank]);
    const auto part = [&](uint32_t index) {
        const uint32_t owner = arena->control.ring[index];
        uint64_t column = 0;
        for (uint32_t before = 0; before < owner; ++before) column += args.widths[before];
        return Segment{0, column, args.widths[owner]};
    };
    ring<T, Halves::kAllGather>(args, part, packs_of<T>(longest));
}

}  // namespace collective

RINGTP_COLLECTIVE(ring_all_reduce)
RINGTP_COLLECTIVE(ring_reduce_scatter)
RINGTP_COLLECTIVE_OF(ring_all_gather, b16, bf16)
RINGTP_COLLECTIVE_OF(ring_all_gather, b32, float)
