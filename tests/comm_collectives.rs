//! Reduce-scatter, all-gather, broadcast, scatter, gather and barrier put every element where
//! it belongs, for 1 to 8 ranks and sizes around every boundary.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use half::{bf16, f16};
use ringtp::comm::{CpuComm, GroupOptions, part, run_ranks};
use ringtp::dtype::Element;
use ringtp::{Result, comm::CommError};

const SIZES: [usize; 12] = [0, 1, 2, 7, 8, 9, 15, 16, 17, 64, 257, 10_007];

/// Runs `body` on 1 to 8 ranks; all must succeed.
fn on_ranks(body: impl Fn(&mut CpuComm) -> Result<()> + Sync) {
    for world_size in 1..=8 {
        for (rank, result) in run_ranks(world_size, GroupOptions::default(), &body)
            .unwrap()
            .into_iter()
            .enumerate()
        {
            result.unwrap_or_else(|error| panic!("rank {rank} of {world_size}: {error}"));
        }
    }
}

/// Element `i` of rank `rank`'s input: distinct for small arguments.
fn item(rank: usize, i: usize) -> u32 {
    (rank * 1_000_000 + i) as u32
}

fn items(rank: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| item(rank, i)).collect()
}

#[test]
fn parts_tile_the_whole_and_differ_by_one_at_most() {
    for n in 0..100 {
        for world_size in 1..=9 {
            let mut end = 0;
            for rank in 0..world_size {
                let part = part(n, world_size, rank);
                assert_eq!(part.start, end);
                assert!(part.len() == n / world_size || part.len() == n / world_size + 1);
                end = part.end;
            }
            assert_eq!(end, n);
        }
    }
}

fn reduce_scatter_of<T: Element>() {
    on_ranks(|comm| {
        let (rank, n) = (comm.rank(), comm.world_size());
        for len in SIZES {
            // Sums below 120: exact in every type.
            let input: Vec<T> = (0..len)
                .map(|i| T::from_f32(((i + rank) % 16) as f32))
                .collect();
            let mine = part(len, n, rank);
            let mut out = vec![T::from_f32(-1.0); mine.len()];
            comm.reduce_scatter(&input, &mut out)?;
            for (i, out) in mine.zip(out) {
                let expected: usize = (0..n).map(|rank| (i + rank) % 16).sum();
                assert_eq!(out.to_f32(), expected as f32, "element {i} of {len}");
            }
        }
        Ok(())
    });
}

#[test]
fn reduce_scatter_gives_each_rank_its_part_of_the_sum() {
    reduce_scatter_of::<f32>();
    reduce_scatter_of::<bf16>();
    reduce_scatter_of::<f16>();
}

/// The same contract, hence the same bits.
#[test]
fn reduce_scatter_then_all_gather_is_all_reduce_bit_for_bit() {
    on_ranks(|comm| {
        let (rank, n) = (comm.rank(), comm.world_size());
        let len = 1003;
        let input: Vec<f32> = (0..len)
            .map(|i| ((i * 7919 + rank * 104_729) % 10_007) as f32 * 0.37 - 1000.0)
            .collect();
        let mut mine = vec![0.0; part(len, n, rank).len()];
        comm.reduce_scatter(&input, &mut mine)?;
        let counts: Vec<usize> = (0..n).map(|rank| part(len, n, rank).len()).collect();
        let (mut gathered, mut sum) = (vec![0.0_f32; len], input);
        comm.all_gather_v(&mine, &counts, &mut gathered)?;
        comm.all_reduce(&mut sum)?;
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&gathered), bits(&sum));
        Ok(())
    });
}

#[test]
fn all_gather_puts_the_inputs_in_rank_order() {
    on_ranks(|comm| {
        let n = comm.world_size();
        for len in SIZES {
            let mut out = vec![u32::MAX; len * n];
            comm.all_gather(&items(comm.rank(), len), &mut out)?;
            let expected: Vec<u32> = (0..n).flat_map(|rank| items(rank, len)).collect();
            assert_eq!(out, expected);
        }
        Ok(())
    });
}

#[test]
fn all_gather_v_takes_a_length_of_its_own_from_each_rank() {
    on_ranks(|comm| {
        let n = comm.world_size();
        for len in SIZES {
            let counts: Vec<usize> = (0..n).map(|rank| (len * rank) % 1009).collect();
            let mut out = vec![u32::MAX; counts.iter().sum()];
            comm.all_gather_v(&items(comm.rank(), counts[comm.rank()]), &counts, &mut out)?;
            let expected: Vec<u32> = (0..n).flat_map(|rank| items(rank, counts[rank])).collect();
            assert_eq!(out, expected);
        }
        Ok(())
    });
}

#[test]
fn broadcast_gives_every_rank_the_roots_data() {
    on_ranks(|comm| {
        for root in 0..comm.world_size() {
            for len in SIZES {
                let mut data = items(comm.rank(), len);
                comm.broadcast(&mut data, root)?;
                assert_eq!(data, items(root, len));
            }
        }
        Ok(())
    });
}

#[test]
fn scatter_gives_every_rank_its_part_of_the_roots_data() {
    on_ranks(|comm| {
        let n = comm.world_size();
        for root in 0..n {
            for len in SIZES {
                let whole = items(root, len * n);
                let input: &[u32] = if comm.rank() == root { &whole } else { &[] };
                let mut out = vec![u32::MAX; len];
                comm.scatter(input, &mut out, root)?;
                assert_eq!(out, whole[comm.rank() * len..][..len]);
            }
        }
        Ok(())
    });
}

#[test]
fn gather_collects_the_inputs_on_the_root() {
    on_ranks(|comm| {
        let n = comm.world_size();
        for root in 0..n {
            for len in SIZES {
                let is_root = comm.rank() == root;
                let mut out = vec![u32::MAX; if is_root { len * n } else { 0 }];
                comm.gather(&items(comm.rank(), len), &mut out, root)?;
                if is_root {
                    let expected: Vec<u32> = (0..n).flat_map(|rank| items(rank, len)).collect();
                    assert_eq!(out, expected);
                }
            }
        }
        Ok(())
    });
}

#[test]
fn nobody_passes_a_barrier_before_all_have_come() {
    let arrived = AtomicUsize::new(0);
    for result in run_ranks(5, GroupOptions::default(), |comm| {
        for round in 1..=200 {
            if comm.rank() == round % 5 && round % 50 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            arrived.fetch_add(1, Ordering::Relaxed);
            comm.barrier()?;
            assert!(arrived.load(Ordering::Relaxed) >= 5 * round);
        }
        Ok(())
    })
    .unwrap()
    {
        result.unwrap();
    }
}

/// The root sends and goes on; it may be two calls ahead of the others, no more, and
/// overwrites nothing that they have yet to read.
#[test]
fn a_root_that_races_ahead_overwrites_nothing() {
    for result in run_ranks(3, GroupOptions::default(), |comm| {
        for call in 0..2000 {
            let mut data = items(call, 500);
            if comm.rank() != 0 {
                data.fill(0);
                if call % 97 == comm.rank() {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            comm.broadcast(&mut data, 0)?;
            assert_eq!(data, items(call, 500), "call {call}");
        }
        Ok(())
    })
    .unwrap()
    {
        result.unwrap();
    }
}

#[test]
fn lengths_that_differ_between_ranks_are_an_error_and_no_short_copy() {
    for result in run_ranks(2, GroupOptions::default(), |comm| {
        // The same total, split differently.
        let counts = [[3, 5], [4, 4]][comm.rank()];
        let mut out = [0_u8; 8];
        Ok(comm.all_gather_v(&vec![1; counts[comm.rank()]], &counts, &mut out))
    })
    .unwrap()
    {
        let error: CommError = result.unwrap().unwrap_err();
        assert!(error.to_string().contains("length"), "{error}");
    }
}

#[test]
fn statistics_count_calls_bytes_and_time() {
    for result in run_ranks(4, GroupOptions::default(), |comm| {
        comm.all_gather(&[0_u8; 100], &mut [0; 400])?;
        comm.broadcast(&mut [0_u8; 10], 0)?;
        comm.barrier()?;
        let stats = comm.stats();
        assert_eq!(stats.calls, 3);
        assert_eq!(stats.bytes_sent, if comm.rank() == 0 { 330 } else { 300 });
        assert!(stats.elapsed > Duration::ZERO);
        Ok(())
    })
    .unwrap()
    {
        result.unwrap();
    }
}

/// Both send and neither reads, so nothing is seen amiss until they meet: in the next call.
#[test]
fn ranks_that_only_send_differently_are_found_at_their_next_call() {
    let results = run_ranks(2, GroupOptions::default(), |comm| {
        let mut data = [1.0_f32];
        if comm.rank() == 0 {
            comm.broadcast(&mut data, 0)?;
        } else {
            comm.gather(&data, &mut [], 0)?;
        }
        Ok(comm.all_reduce(&mut data)?)
    })
    .unwrap();
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("broadcast") && error.contains("gather"),
            "{error}"
        );
    }
}
