// What collectives share between host and device: one C header, read by nvcc and by bindgen, so
// that the two cannot drift. Sizes and offsets are asserted on both sides.
#ifndef RINGTP_COLLECTIVE_ABI_H
#define RINGTP_COLLECTIVE_ABI_H

#include "../abi.h"

enum {
    // Ranks of a group.
    kMaxRanks = 8,
    // Blocks of a collective's grid: each has flags of its own.
    kCollectiveBlocks = 32,
    // Threads of a block.
    kCollectiveThreads = 512,
    // Messages that a block of the ring may send ahead of its successor.
    kRingSlots = 8,
    // Bytes of one such message: two packs a thread.
    kRingMessageBytes = 16384,
    // Bytes that a probe writes to each peer.
    kProbeBytes = 4096
};

// Why a block left a collective without finishing it: `CollectiveRecord::reason`.
enum {
    kReasonTimeout = 1,
    // The abort word was raised: by a peer, or by the host.
    kReasonAborted = 2,
    // The peer is in a later generation: it was rebuilt without this rank.
    kReasonGeneration = 3,
    // The peer is in another call: another collective, size, type or root.
    kReasonOtherCall = 4,
    // The peer has left the group and will not come.
    kReasonLeft = 5
};

// What it waited for: `CollectiveRecord::step`.
enum {
    kStepBarrier = 1,
    kStepRingMessage = 2,
    kStepRingCredit = 3
};

// Why a rank failed, for the host: in pinned memory of the host, so that it can be read even when
// the context is dead. Written once a generation, by the first thread that gives up.
typedef struct CollectiveRecord {
    // The generation, written last, with release: the record is whole.
    uint64_t complete;
    uint32_t reason;
    uint32_t step;
    uint32_t block;
    // The peer waited for.
    uint32_t peer;
    // Of the flag waited for, and of the flag seen; if aborted, 1 + the rank that raised the word.
    uint64_t epoch;
    uint64_t seen;
    // Nanoseconds waited.
    uint64_t waited;
} CollectiveRecord;
RINGTP_ABI_SIZE(CollectiveRecord, 48)

// What a rank's kernels need to know of the group: at a fixed address of the rank's device and
// never in kernel parameters, so that a captured graph survives a rebuild. Written by the host
// while no collective runs.
typedef struct CollectiveControl {
    // Counts rebuilds, from 1 to 65535 and again; the upper 16 bits of every flag.
    uint64_t generation;
    // How long one wait may last, by the waiting device's clock.
    uint64_t deadline_ns;
    uint32_t rank;
    uint32_t world_size;
    // Bit p: this rank can write to and read from rank p.
    uint32_t reachable;
    // This rank's place in the ring.
    uint32_t ring_position;
    // The ranks in the order of the ring.
    uint32_t ring[kMaxRanks];
    // The arena of each rank, in addresses of this device.
    uint64_t arenas[kMaxRanks];
    // Bytes of each of the two staging buffers, and of the result buffer; multiples of 128 times
    // kMaxRanks.
    uint64_t staging_bytes;
    // Where this rank's CollectiveRecord is.
    uint64_t record;
} CollectiveControl;
RINGTP_ABI_SIZE(CollectiveControl, 144)

// What peers reach of a rank: the head of a stretch of device memory. Behind it lie, each aligned
// to 128 bytes: two staging buffers, the result buffer, the ring's messages
// [blocks][slots][bytes].
typedef struct CollectiveArena {
    CollectiveControl control;
    // Nonzero: (generation << 48) + 1 + the rank that gave up. Raised by peers and by the host.
    uint64_t abort __attribute__((aligned(128)));
    // 1 once a thread of this rank has taken the record.
    uint64_t recorded;
    // The probe's word from each rank.
    uint64_t probe_flags[kMaxRanks];
    // The generation that each peer has left for good, written by it.
    uint64_t left[kMaxRanks];
    // The epoch that each block's next collective begins with; the same for all blocks.
    uint64_t epochs[kCollectiveBlocks] __attribute__((aligned(128)));
    // The barrier flag of each peer's block, written by it.
    uint64_t barrier[kCollectiveBlocks][kMaxRanks] __attribute__((aligned(128)));
    // Where each peer's block has its input, by parity of the pass; written before the flag.
    uint64_t sources[2][kCollectiveBlocks][kMaxRanks];
    // Messages that the predecessor in the ring has sent, and that the successor has read.
    uint64_t ring_sent[kCollectiveBlocks] __attribute__((aligned(128)));
    uint64_t ring_read[kCollectiveBlocks] __attribute__((aligned(128)));
    // What the probe of each rank writes here.
    uint8_t probe[kMaxRanks][kProbeBytes] __attribute__((aligned(128)));
} CollectiveArena;
RINGTP_ABI_SIZE(CollectiveArena, 40192)

// The parameters of every collective.
typedef struct CollectiveArgs {
    // This rank's arena.
    uint64_t arena;
    // Device addresses.
    uint64_t input;
    uint64_t output;
    // Elements: of the message; of an all-gather, those of one row of this rank.
    uint64_t elements;
    // Peers read `input` where it is: it is aligned to 16 bytes, whole packs, and within their
    // reach. Otherwise it is staged.
    uint32_t direct;
    // What kind of call it is: the same on all ranks if they make the same call. 8 bits.
    uint32_t tag;
    // Of a broadcast.
    uint32_t root;
    uint32_t reserved;
    // Of an all-gather: rows, and the elements of a row of each rank.
    uint64_t rows;
    uint64_t widths[kMaxRanks];
} CollectiveArgs;
RINGTP_ABI_SIZE(CollectiveArgs, 120)

// What the word of a probe's result says.
enum {
    kProbeUntried = 0,
    kProbeRight = 1,
    // Nothing came until the deadline.
    kProbeMissing = 2,
    // Something else came.
    kProbeDamaged = 3
};

// What a rank's probe found of one peer: in pinned memory of the host.
typedef struct ProbeResult {
    // The peer's writes into this rank's memory.
    uint32_t written;
    // This rank's reads of the peer's memory.
    uint32_t read;
} ProbeResult;
RINGTP_ABI_SIZE(ProbeResult, 8)

// The parameters of the probe.
typedef struct ProbeArgs {
    uint64_t arena;
    // ProbeResult[world_size] of this rank.
    uint64_t results;
    // What makes this probe's words and patterns differ from an earlier one's; not 0.
    uint64_t nonce;
    uint64_t deadline_ns;
    // Bit p: the driver lets this rank reach rank p; and rank p reach this rank.
    uint32_t reaches;
    uint32_t reached_by;
} ProbeArgs;
RINGTP_ABI_SIZE(ProbeArgs, 40)

#endif
