//! The structs that kernels take have the same size on both sides: `cuda/abi.h` asserts these
//! numbers where nvcc reads it, and here Rust does. (Offsets of all fields are asserted in what
//! bindgen wrote, when it is compiled.)
#![cfg(feature = "cuda")]

use ringtp::backend::cuda::abi;

#[test]
fn structs_have_the_sizes_that_abi_h_states() {
    assert_eq!(size_of::<abi::NormParams>(), abi::kNormParamsBytes as usize);
    assert_eq!(size_of::<abi::GemmParams>(), abi::kGemmParamsBytes as usize);
    assert_eq!(size_of::<abi::RopeParams>(), abi::kRopeParamsBytes as usize);
    assert_eq!(
        size_of::<abi::AttentionItem>(),
        abi::kAttentionItemBytes as usize
    );
    assert_eq!(
        size_of::<abi::AttentionParams>(),
        abi::kAttentionParamsBytes as usize
    );
    assert_eq!(size_of::<abi::RowsParams>(), abi::kRowsParamsBytes as usize);
    assert_eq!(
        size_of::<abi::RecordRequest>(),
        abi::kRecordRequestBytes as usize
    );
    assert_eq!(
        size_of::<abi::RecordsParams>(),
        abi::kRecordsParamsBytes as usize
    );
    assert_eq!(
        size_of::<abi::CollectiveRecord>(),
        abi::kCollectiveRecordBytes as usize
    );
    assert_eq!(
        size_of::<abi::CollectiveControl>(),
        abi::kCollectiveControlBytes as usize
    );
    assert_eq!(
        size_of::<abi::CollectiveArena>(),
        abi::kCollectiveArenaBytes as usize
    );
    assert_eq!(
        size_of::<abi::CollectiveArgs>(),
        abi::kCollectiveArgsBytes as usize
    );
    assert_eq!(
        size_of::<abi::ProbeResult>(),
        abi::kProbeResultBytes as usize
    );
    assert_eq!(size_of::<abi::ProbeArgs>(), abi::kProbeArgsBytes as usize);
}

/// Every struct states its size, and every stated size is checked above.
#[test]
fn no_struct_is_left_out() {
    let header = [
        include_str!("../cuda/abi.h"),
        include_str!("../cuda/collective/abi.h"),
    ]
    .join("\n");
    let here = include_str!("cuda_abi.rs");
    let structs = header
        .lines()
        .filter_map(|line| line.strip_prefix("typedef struct "));
    let mut count = 0;
    for name in structs.map(|rest| rest.trim_end_matches(" {")) {
        count += 1;
        assert!(
            header.contains(&format!("RINGTP_ABI_SIZE({name}, ")),
            "{name} in its header"
        );
        assert!(
            here.contains(&format!("size_of::<abi::{name}>()")),
            "{name} in this file"
        );
    }
    assert!(count > 0, "no struct was recognised");
}
