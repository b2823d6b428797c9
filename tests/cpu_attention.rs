//! Paged causal attention agrees with the f64 oracle within the bound of f32 rounding, for
//! mixed batches, grouped queries, scattered blocks; and sees nothing it should not.

mod oracle;

use oracle::bounds::gamma;
use oracle::compare::{same_bits, within};
use oracle::cpu::{backend, poisoned, tensor};
use oracle::paged::World;
use oracle::random::{Random, cases};
use ringtp::DType;
use ringtp::backend::cpu::CpuBackend;
use ringtp::backend::{Backend, HeadCounts, RopeTables};
use ringtp::llama::Batch;

const LENGTHS: [usize; 12] = [1, 2, 8, 15, 16, 17, 31, 32, 33, 48, 100, 300];

fn heads(random: &mut Random) -> HeadCounts {
    let kv = random.choose(&[1, 2, 3]);
    HeadCounts {
        q: kv * random.choose(&[1, 2, 3, 4, 8]),
        kv,
        head_dim: random.choose(&[2, 8, 10, 16, 24, 64, 80, 128]),
    }
}

/// Some sequences, and for each the positions that are computed together at the end: all (a
/// prefill), one (a decode), or some (the last chunk). Long ones end in few rows, which keeps
/// the oracle quick.
fn mixed(random: &mut Random, dtype: DType) -> (World, Vec<(usize, usize, usize)>) {
    let lengths: Vec<usize> = (0..1 + random.below(4))
        .map(|_| random.choose(&LENGTHS))
        .collect();
    let heads = heads(random);
    let block_size = random.choose(&[16, 32, 64]);
    let world = World::random(random, heads, block_size, dtype, &lengths);
    let parts = lengths.iter().enumerate().map(|(i, &len)| {
        let rows = match random.below(3) {
            0 => 1,
            1 => len.min(40),
            _ => 1 + random.below(len.min(30)),
        };
        let rows = if len >= 100 { rows.min(9) } else { rows };
        (i, len - rows, len)
    });
    let parts = parts.collect();
    (world, parts)
}

/// Fills in what comes before `parts`, sequence by sequence, then runs them together.
fn run(world: &World, backend: &mut CpuBackend, parts: &[(usize, usize, usize)]) -> Vec<f32> {
    let mut pages = world.poisoned_pages(backend);
    for &(sequence, from, _) in parts {
        world.step(backend, &mut pages, &[(sequence, 0, from)]);
    }
    world.step(backend, &mut pages, parts)
}

/// The oracle's rows of all parts.
fn exact(
    world: &World,
    parts: &[(usize, usize, usize)],
    visible: impl Fn(usize) -> usize + Copy,
) -> (oracle::Rows, oracle::Rows) {
    let (mut rows, mut errors) = (Vec::new(), Vec::new());
    for &part in parts {
        let (row, error) = world.exact(part, visible);
        rows.extend(row);
        errors.extend(error);
    }
    (rows, errors)
}

fn mixed_batches(dtype: DType) {
    let mut backend = backend();
    cases(100, |random| {
        let (world, parts) = mixed(random, dtype);
        let out = run(&world, &mut backend, &parts);
        let (value, error) = exact(&world, &parts, |position| position + 1);
        within(&out, &value, &error)
            .unwrap_or_else(|e| panic!("{:?} {:?} {parts:?}: {e}", world.heads, world.shape));
    });
}

#[test]
fn mixed_batches_over_f32_entries_are_within_the_bound_of_rounding() {
    mixed_batches(DType::F32);
}

#[test]
fn mixed_batches_over_bf16_entries_are_within_the_bound_of_rounding() {
    mixed_batches(DType::Bf16);
}

#[test]
fn mixed_batches_over_f16_entries_are_within_the_bound_of_rounding() {
    mixed_batches(DType::F16);
}

#[test]
fn a_chunk_may_start_anywhere_and_have_any_length() {
    let mut backend = backend();
    let heads = HeadCounts {
        q: 1,
        kv: 1,
        head_dim: 8,
    };
    for from in 0..36 {
        cases(3, |random| {
            let len = from + 1 + random.below(40);
            let world = World::random(random, heads, 16, DType::F32, &[len]);
            let parts = [(0, from, len)];
            let (value, error) = exact(&world, &parts, |position| position + 1);
            within(&run(&world, &mut backend, &parts), &value, &error)
                .unwrap_or_else(|e| panic!("{from}..{len}: {e}"));
        });
    }
}

#[test]
fn the_comparison_sees_a_causal_limit_off_by_one_and_a_wrong_block() {
    let mut backend = backend();
    let mut wrong_blocks = 0;
    cases(40, |random| {
        let (mut world, mut parts) = mixed(random, DType::Bf16);
        parts.retain(|part| part.2 > 1);
        if parts.is_empty() {
            return;
        }
        let out = run(&world, &mut backend, &parts);
        let (value, error) = exact(&world, &parts, |position| position + 1);
        within(&out, &value, &error).expect("right before the oracle is made wrong");
        let (value, error) = exact(&world, &parts, |position| position);
        within(&out, &value, &error).expect_err("one position too few");
        let (value, error) = exact(&world, &parts, |position| position + 2);
        let last_alone = parts.iter().all(|&(_, from, to)| to - from == 1);
        if !last_alone {
            within(&out, &value, &error).expect_err("one position too many");
        }
        // Entries that went to one block are read from another.
        let (value, error) = exact(&world, &parts, |position| position + 1);
        let mut pages = world.poisoned_pages(&mut backend);
        for &(sequence, from, _) in &parts {
            world.step(&mut backend, &mut pages, &[(sequence, 0, from)]);
        }
        let block = world.shape.block_size;
        let long = parts.iter().find(|part| part.1 >= 2 * block);
        if let Some(&(sequence, ..)) = long {
            world.sequences[sequence].table.swap(0, 1);
            // Two whole blocks, exchanged, are the same set of entries: read one of them twice.
            world.sequences[sequence].table[1] = world.sequences[sequence].table[0];
            let out = world.step(&mut backend, &mut pages, &parts);
            within(&out, &value, &error).expect_err("a wrong block");
            wrong_blocks += 1;
        }
    });
    assert!(wrong_blocks >= 3, "{wrong_blocks} cases");
}

#[test]
fn a_nan_in_a_later_position_does_not_touch_earlier_rows() {
    let mut backend = backend();
    for dtype in DType::ALL {
        cases(30, |random| {
            let heads = heads(random);
            let len = 2 + random.below(60);
            let mut world = World::random(random, heads, 16, dtype, &[len]);
            let clean = run(&world, &mut backend, &[(0, 0, len)]);
            let (at, kv) = (random.below(len), random.below(heads.kv));
            let first = heads.q + kv + heads.kv * random.below(2);
            let element = random.below(heads.head_dim);
            world.sequences[0].qkv[at][first * heads.head_dim + element] = f32::NAN;
            let out = run(&world, &mut backend, &[(0, 0, len)]);
            let cols = heads.q * heads.head_dim;
            same_bits(&out[..at * cols], &clean[..at * cols]).expect("earlier rows");
            // All later rows of this KV head's group attend to it: none hides it.
            let group = heads.q / heads.kv;
            let is_value = first >= heads.q + heads.kv;
            for row in at..len {
                for head in 0..heads.q {
                    let found = &out[row * cols + head * heads.head_dim..][..heads.head_dim];
                    let concerned = head / group == kv;
                    if is_value && concerned {
                        assert!(found[element].is_nan(), "{} from NaN", found[element]);
                    } else {
                        assert!(found.iter().all(|x| x.is_nan() == concerned), "{found:?}");
                    }
                }
            }
        });
    }
}

#[test]
fn a_nan_query_gives_nan_in_its_own_output_alone() {
    let mut backend = backend();
    cases(40, |random| {
        let heads = heads(random);
        let len = 1 + random.below(40);
        let mut world = World::random(random, heads, 32, DType::F16, &[len]);
        let clean = run(&world, &mut backend, &[(0, 0, len)]);
        let (row, head) = (random.below(len), random.below(heads.q));
        let at = head * heads.head_dim + random.below(heads.head_dim);
        world.sequences[0].qkv[row][at] = f32::NAN;
        let out = run(&world, &mut backend, &[(0, 0, len)]);
        for (i, (out, clean)) in out.iter().zip(&clean).enumerate() {
            if i / heads.head_dim == row * heads.q + head {
                assert!(out.is_nan(), "{out} from NaN");
            } else {
                assert_eq!(out.to_bits(), clean.to_bits());
            }
        }
    });
}

#[test]
fn keys_are_rotated_as_queries_are() {
    let mut backend = backend();
    for dtype in DType::ALL {
        cases(30, |random| {
            let head_dim = random.choose(&[2, 8, 10, 80]);
            let heads = HeadCounts {
                q: 2,
                kv: 2,
                head_dim,
            };
            let len = 1 + random.below(40);
            let mut world = World::random(random, heads, 16, dtype, &[len]);
            let angles: Vec<Vec<f32>> = (0..len)
                .map(|_| {
                    random
                        .values(head_dim / 2)
                        .iter()
                        .map(|a| a * 9.0)
                        .collect()
                })
                .collect();
            let of = |f: fn(f32) -> f32| -> Vec<Vec<f32>> {
                let row = |row: &Vec<f32>| row.iter().map(|&a| f(a)).collect();
                angles.iter().map(row).collect()
            };
            (world.sequences[0].cos, world.sequences[0].sin) = (of(f32::cos), of(f32::sin));
            let out = run(&world, &mut backend, &[(0, 0, len)]);

            // The same, its keys rotated beforehand as if they were queries, then not at all.
            let q_cols = 2 * head_dim;
            let mut pages = world.poisoned_pages(&mut backend);
            let rotate = |world: &World, pages: &mut _, backend: &mut CpuBackend| {
                let (plan, mut qkv) = world.batch(backend, &[(0, 0, len)]);
                backend
                    .rope_append(&mut qkv, heads, &plan, pages, world.layer)
                    .expect("shapes fit");
                let rows = qkv.data().chunks_exact(heads.qkv_cols());
                rows.map(|row| row[..q_cols].to_vec()).collect::<Vec<_>>()
            };
            let queries = rotate(&world, &mut pages, &mut backend);
            let mut exchanged = world.clone();
            for row in &mut exchanged.sequences[0].qkv {
                row.copy_within(q_cols..2 * q_cols, 0);
            }
            let keys = rotate(&exchanged, &mut pages, &mut backend);
            for (row, (query, key)) in world.sequences[0]
                .qkv
                .iter_mut()
                .zip(queries.iter().zip(&keys))
            {
                row[..q_cols].copy_from_slice(query);
                row[q_cols..2 * q_cols].copy_from_slice(key);
            }
            world.sequences[0].cos = vec![vec![1.0; head_dim / 2]; len];
            world.sequences[0].sin = vec![vec![0.0; head_dim / 2]; len];
            let again = run(&world, &mut backend, &[(0, 0, len)]);
            same_bits(&again, &out).expect("the same rotation");
        });
    }
}

#[test]
fn a_position_that_stands_alone_gives_its_value_to_the_bit() {
    let mut backend = backend();
    let heads = HeadCounts {
        q: 2,
        kv: 1,
        head_dim: 10,
    };
    cases(50, |random| {
        let world = World::random(random, heads, 16, DType::F32, &[1]);
        let value = &world.sequences[0].qkv[0][30..40];
        let out = run(&world, &mut backend, &[(0, 0, 1)]);
        same_bits(&out, &[value, value].concat()).expect("weight 1 of 1");
    });
}

#[test]
fn far_scores_weigh_nothing_and_equal_ones_the_same() {
    let mut backend = backend();
    let heads = HeadCounts {
        q: 1,
        kv: 1,
        head_dim: 2,
    };
    cases(30, |random| {
        let len = 2 + random.below(40);
        let mut world = World::random(random, heads, 16, DType::F32, &[len]);
        let chosen = random.below(len);
        for (position, row) in world.sequences[0].qkv.iter_mut().enumerate() {
            let key = if position == chosen { 1e4 } else { -1e4 };
            row[..4].copy_from_slice(&[1.0, 0.0, key, 0.0]);
        }
        world.sequences[0].cos = vec![vec![1.0]; len];
        world.sequences[0].sin = vec![vec![0.0]; len];
        let out = run(&world, &mut backend, &[(0, 0, len)]);
        let value = &world.sequences[0].qkv[chosen][4..6];
        // A zero takes up what is left of the others (e^-87 each); no other value does.
        for (found, &expected) in out[(len - 1) * 2..].iter().zip(value) {
            assert!(
                (found - expected).abs() <= len as f32 * 8.0 * 2e-38,
                "{found}"
            );
        }
        // Equal scores: the mean, within the rounding of n sums and n weights.
        for row in &mut world.sequences[0].qkv {
            row[2..4].copy_from_slice(&[0.5, 0.25]);
        }
        let out = run(&world, &mut backend, &[(0, 0, len)]);
        for (i, found) in out[(len - 1) * 2..].iter().enumerate() {
            let values = world.sequences[0]
                .qkv
                .iter()
                .map(|row| f64::from(row[4 + i]));
            let mean = values.clone().sum::<f64>() / len as f64;
            let size = values.map(f64::abs).sum::<f64>() / len as f64;
            let off = (f64::from(*found) - mean).abs();
            assert!(off <= gamma(2 * len + 2) * size, "{found} for {mean}");
        }
    });
}

#[test]
fn a_batch_without_rows_is_served() {
    let mut backend = backend();
    let heads = HeadCounts {
        q: 2,
        kv: 1,
        head_dim: 8,
    };
    let mut world = World::random(&mut Random::new(0), heads, 16, DType::Bf16, &[]);
    world.shape.num_blocks = 0;
    let mut pages = backend.kv_pages(world.shape).expect("no memory");
    let plan = backend
        .plan(&Batch::new(), RopeTables::default(), 16)
        .expect("no sequence");
    let (mut qkv, mut out) = (tensor(&[], 0, 32), poisoned(0, 16));
    backend
        .rope_append(&mut qkv, heads, &plan, &mut pages, 0)
        .expect("nothing to append");
    backend
        .attention(&qkv, heads, &plan, &pages, 0, 1.0, &mut out)
        .expect("nothing to attend");
    assert!(out.data().is_empty());
}
