//! Each tensor-parallel layer, alone on 1 to 4 ranks and more, is the plain layer: its f64 loop
//! within the bounds of f32 rounding, and exactly where the numbers are small integers.

mod model_support;
mod oracle;

use std::ops::Range;

use model_support::{bits, spmd};
use oracle::bounds::{UNDERFLOW, gamma, linear_error, rms_norm_error, swiglu_error};
use oracle::compare::within;
use oracle::cpu::{poisoned, tensor};
use oracle::random::{Host, Random, cases, rows};
use oracle::{Rows, linear, rms_norm, swiglu};
use ringtp::backend::cpu::{CpuBackend, CpuTensor};
use ringtp::backend::{Backend, RopeTables};
use ringtp::comm::{Communicator, TensorComm};
use ringtp::layers::{
    ColumnParallelLinear, MergedColumnParallelLinear, ParallelLmHead, Partition, QkvParallelLinear,
    Rank, RowParallelLinear, VocabParallelEmbedding,
};
use ringtp::llama::Batch;
use ringtp::shard::Dims;
use ringtp::{DType, Error, Result};

const SIZES: [usize; 9] = [1, 3, 16, 17, 33, 48, 64, 83, 97];

/// Every rank's result of `body`, each on its own thread with its own backend; all succeed.
fn on_ranks<R: Send>(
    tp: usize,
    body: impl Fn(&mut Rank<'_, CpuBackend, TensorComm>, Partition) -> Result<R> + Sync,
) -> Vec<R> {
    let ranks = spmd(tp, Default::default(), |mut comm| {
        let part = Partition {
            tp,
            rank: comm.rank(),
        };
        let mut backend = CpuBackend::new(1)?;
        let mut rank = Rank {
            backend: &mut backend,
            comm: &mut comm,
        };
        assert_eq!(rank.partition(), part);
        body(&mut rank, part)
    });
    let ranks = ranks.expect("a group of ranks");
    ranks
        .into_iter()
        .map(|result| result.expect("no rank panics").expect("no rank fails"))
        .collect()
}

/// Operands of one case: integers, of which everything is exact, or numbers of any kind.
struct Numbers<'a> {
    random: &'a mut Random,
    exact: bool,
}

impl Numbers<'_> {
    fn values(&mut self, n: usize) -> Vec<f32> {
        match self.exact {
            true => self.random.integers(n),
            false => self.random.values(n),
        }
    }

    fn host(&mut self, rows: usize, cols: usize) -> Host {
        let dtype = self.random.choose(&DType::ALL);
        let values = self.values(rows * cols);
        Host::new(rows, cols, dtype, values)
    }

    /// The bound, or nothing where the arithmetic is exact.
    fn error(&self, bound: Rows) -> Rows {
        match self.exact {
            true => bound.iter().map(|row| vec![0.0; row.len()]).collect(),
            false => bound,
        }
    }
}

/// As many cases of integers as of others.
fn numbers(count: u64, mut case: impl FnMut(Numbers<'_>)) {
    cases(2 * count, |random| {
        let exact = random.flip();
        case(Numbers { random, exact });
    });
}

fn wide(values: &[f32], cols: usize) -> Rows {
    rows(values, values.len() / cols, cols)
}

fn columns(rows: &Rows, range: Range<usize>) -> Rows {
    rows.iter().map(|row| row[range.clone()].to_vec()).collect()
}

/// Columns `range` of `[rows, cols]`, as a tensor.
fn slice(values: &[f32], cols: usize, range: Range<usize>) -> CpuTensor {
    let rows = values.chunks_exact(cols);
    let sliced: Vec<f32> = rows.flat_map(|row| row[range.clone()].to_vec()).collect();
    tensor(&sliced, values.len() / cols, range.len())
}

fn one_row(host: &Option<Host>) -> Option<Vec<f64>> {
    // A bias is kept in f32, which has all values of its type.
    host.as_ref().map(|bias| bias.stored(DType::F32).remove(0))
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}

#[test]
fn column_parallel_makes_each_column_once() {
    numbers(40, |mut n| {
        let (tp, rows) = (1 + n.random.below(4), 1 + n.random.below(7));
        let (out, k) = (n.random.choose(&SIZES), n.random.choose(&SIZES));
        let dtype = n.random.choose(&DType::ALL);
        let (weight, x) = (n.host(out, k), n.values(rows * k));
        let bias = n.random.flip().then(|| n.host(1, out));
        let (gather, skip) = (n.random.flip(), n.random.flip());

        let ranks = on_ranks(tp, |rank, part| {
            let view = bias.as_ref().map(Host::view);
            let backend = &mut *rank.backend;
            let mut layer = ColumnParallelLinear::new(backend, weight.view(), view, part, dtype)?;
            (layer.gather_output, layer.skip_bias_add) = (gather, skip);
            let cols = if gather { out } else { layer.local_features() };
            let mut y = poisoned(rows, cols);
            layer.forward(rank, &tensor(&x, rows, k), rows, &mut y)?;
            Ok((y, layer.local_features(), layer.bias().cloned()))
        });

        let (x, w) = (wide(&x, k), weight.stored(dtype));
        let bias = one_row(&bias);
        let added = bias.as_deref().filter(|_| !skip);
        let expected = linear(&x, &w, added);
        let error = n.error(linear_error(&x, &w, added));
        let mut first = 0;
        for (y, local, own_bias) in ranks {
            let mine = first..first + local;
            first = mine.end;
            let cols = if gather { 0..out } else { mine.clone() };
            within(
                y.data(),
                &columns(&expected, cols.clone()),
                &columns(&error, cols),
            )
            .unwrap_or_else(|e| panic!("{tp} ranks, [{out}, {k}]: {e}"));
            let expected_bias = bias.as_ref().map(|bias| narrow(&bias[mine]));
            assert_eq!(own_bias, expected_bias);
        }
        assert_eq!(first, out, "every column has a rank");
    });
}

#[test]
fn merged_columns_keep_a_gate_with_its_up_and_fused_is_the_same() {
    numbers(40, |mut n| {
        let (tp, rows) = (1 + n.random.below(4), 1 + n.random.below(7));
        let (inter, k) = (n.random.choose(&SIZES), n.random.choose(&SIZES));
        let dtype = n.random.choose(&DType::ALL);
        let stored = n.random.choose(&DType::ALL);
        let parts: [Vec<f32>; 2] = std::array::from_fn(|_| n.values(inter * k));
        let biases: [Vec<f32>; 2] = std::array::from_fn(|_| n.values(inter));
        let has_bias = n.random.flip();
        let x = n.values(rows * k);
        let [gate, up] = parts.clone().map(|v| Host::new(inter, k, stored, v));
        let [gate_bias, up_bias] = biases.clone().map(|v| Host::new(1, inter, stored, v));
        let fused = Host::new(2 * inter, k, stored, parts.concat());
        let fused_bias = Host::new(1, 2 * inter, stored, biases.concat());

        let ranks = on_ranks(tp, |rank, part| {
            let backend = &mut *rank.backend;
            let bias = has_bias.then(|| [gate_bias.view(), up_bias.view()]);
            let weights = [gate.view(), up.view()];
            let apart = MergedColumnParallelLinear::new(backend, weights, bias, part, dtype)?;
            let bias = has_bias.then(|| fused_bias.view());
            let together =
                MergedColumnParallelLinear::from_fused(backend, fused.view(), bias, part, dtype)?;
            let x = tensor(&x, rows, k);
            let mut y = poisoned(rows, part.of(inter).len());
            apart.forward(backend, &x, &mut y)?;
            let mut other = poisoned(rows, part.of(inter).len());
            together.forward(backend, &x, &mut other)?;
            assert_eq!(bits(y.data()), bits(other.data()));
            Ok(y)
        });

        let x = wide(&x, k);
        let side = |weight: &Host, bias: &Host| {
            let bias = has_bias.then(|| bias.stored(DType::F32).remove(0));
            let w = weight.stored(dtype);
            let value = linear(&x, &w, bias.as_deref());
            (value, linear_error(&x, &w, bias.as_deref()))
        };
        let (gate, gate_error) = side(&gate, &gate_bias);
        let (up, up_error) = side(&up, &up_bias);
        let (gate_error, up_error) = (n.error(gate_error), n.error(up_error));
        let expected = swiglu(&gate, &up);
        let error = swiglu_error(&gate, &gate_error, &up, &up_error);
        let mut first = 0;
        for y in ranks {
            let mine = first..first + y.cols();
            first = mine.end;
            within(
                y.data(),
                &columns(&expected, mine.clone()),
                &columns(&error, mine),
            )
            .unwrap_or_else(|e| panic!("{tp} ranks, [{inter}, {k}]: {e}"));
        }
        assert_eq!(first, inter);
    });
}

/// Over the ranks the query heads come in order, each once; a rank's KV heads are those of its
/// query heads. From that follows what every rank must have.
#[test]
fn qkv_keeps_queries_with_their_keys_and_values() {
    let mut replicated = 0;
    let mut uneven = 0;
    for (heads, kv_heads) in [(4, 4), (8, 2), (6, 3), (8, 1), (12, 4), (5, 5)] {
        numbers(6, |mut n| {
            let k = n.random.choose(&SIZES);
            let d = n.random.choose(&[2, 10, 16]);
            let dims = Dims {
                hidden_size: k,
                intermediate_size: 1,
                num_hidden_layers: 1,
                num_attention_heads: heads,
                num_key_value_heads: kv_heads,
                head_dim: d,
                vocab_size: 1,
                attention_bias: true,
                mlp_bias: false,
                tie_word_embeddings: false,
            };
            let (rows, dtype) = (1 + n.random.below(4), n.random.choose(&DType::ALL));
            let sizes = [heads * d, kv_heads * d, kv_heads * d];
            let weights = sizes.map(|size| n.host(size, k));
            let biases = sizes.map(|size| n.host(1, size));
            let has_bias = n.random.flip();
            let x = n.values(rows * k);
            let wide_x = wide(&x, k);
            let whole: [(Rows, Rows); 3] = std::array::from_fn(|i| {
                let w = weights[i].stored(dtype);
                let bias = has_bias.then(|| biases[i].stored(DType::F32).remove(0));
                let error = n.error(linear_error(&wide_x, &w, bias.as_deref()));
                (linear(&wide_x, &w, bias.as_deref()), error)
            });

            for tp in dims.valid_tp() {
                let ranks = on_ranks(tp, |rank, part| {
                    let views = std::array::from_fn(|i| weights[i].view());
                    let bias = has_bias.then(|| std::array::from_fn(|i| biases[i].view()));
                    let backend = &mut *rank.backend;
                    let layer = QkvParallelLinear::new(backend, &dims, views, bias, part, dtype)?;
                    let mut y = poisoned(rows, layer.heads().qkv_cols());
                    layer.forward(backend, &tensor(&x, rows, k), &mut y)?;
                    Ok((y, layer.heads()))
                });
                replicated += usize::from(tp > kv_heads);
                uneven += usize::from(!heads.is_multiple_of(tp));
                let (group, mut first) = (heads / kv_heads, 0);
                let counts: Vec<usize> = ranks.iter().map(|(_, heads)| heads.q).collect();
                let spread = counts.iter().max().zip(counts.iter().min());
                assert!(spread.is_some_and(|(most, least)| most - least <= group));
                for (y, own) in ranks {
                    let q = first..first + own.q;
                    first = q.end;
                    let kv = q.start / group..(q.end - 1) / group + 1;
                    assert_eq!(own.kv, kv.len());
                    let ranges = [q, kv.clone(), kv];
                    let mut expected = vec![Vec::new(); rows];
                    let mut error = vec![Vec::new(); rows];
                    for ((value, bound), range) in whole.iter().zip(ranges) {
                        let range = range.start * d..range.end * d;
                        for row in 0..rows {
                            expected[row].extend(&value[row][range.clone()]);
                            error[row].extend(&bound[row][range.clone()]);
                        }
                    }
                    within(y.data(), &expected, &error)
                        .unwrap_or_else(|e| panic!("{heads}/{kv_heads} on {tp}: {e}"));
                }
                assert_eq!(first, heads);
            }
        });
    }
    assert!(replicated > 20 && uneven > 20, "{replicated}, {uneven}");
}

/// A product passes through its rank's fused operations, the additions of the ranks and that
/// of the bias: at most K + tp + 1 roundings.
fn row_error(x: &Rows, w: &Rows, bias: Option<&[f64]>, tp: usize) -> Rows {
    let k = w.first().map_or(0, Vec::len);
    let sizes = |rows: &Rows| -> Rows {
        let row = |row: &Vec<f64>| row.iter().map(|v| v.abs()).collect();
        rows.iter().map(row).collect()
    };
    let bias: Option<Vec<f64>> = bias.map(|bias| bias.iter().map(|b| b.abs()).collect());
    let bound = |size: f64| gamma(k + tp + 1) * size + UNDERFLOW;
    linear(&sizes(x), &sizes(w), bias.as_deref())
        .into_iter()
        .map(|row| row.into_iter().map(bound).collect())
        .collect()
}

#[test]
fn row_parallel_sums_over_the_ranks_and_adds_the_bias_once() {
    numbers(60, |mut n| {
        let (tp, rows) = (1 + n.random.below(4), 1 + n.random.below(7));
        let (out, k) = (n.random.choose(&SIZES), n.random.choose(&SIZES));
        let dtype = n.random.choose(&DType::ALL);
        let (weight, x) = (n.host(out, k), n.values(rows * k));
        let bias = n.random.flip().then(|| n.host(1, out));
        let (parallel, skip) = (n.random.flip(), n.random.flip());
        let reduce = n.random.flip() || (bias.is_some() && !skip);

        let ranks = on_ranks(tp, |rank, part| {
            let view = bias.as_ref().map(Host::view);
            let range = part.of(k);
            let backend = &mut *rank.backend;
            let mut layer =
                RowParallelLinear::new(backend, weight.view(), view, range.clone(), dtype)?;
            layer.input_is_parallel = parallel;
            layer.reduce_results = reduce;
            layer.skip_bias_add = skip;
            let input = match parallel {
                true => slice(&x, k, range),
                false => tensor(&x, rows, k),
            };
            let mut y = poisoned(rows, out);
            layer.forward(rank, &input, rows, &mut y)?;
            Ok((y, layer.bias().cloned()))
        });

        let (x, w) = (wide(&x, k), weight.stored(dtype));
        let bias = one_row(&bias);
        let added = bias.as_deref().filter(|_| !skip);
        let expected = linear(&x, &w, added);
        let error = n.error(row_error(&x, &w, added, tp));
        for (y, own_bias) in &ranks {
            assert_eq!(own_bias.as_deref(), bias.as_deref().map(narrow).as_deref());
            if reduce {
                within(y.data(), &expected, &error)
                    .unwrap_or_else(|e| panic!("{tp} ranks, [{out}, {k}]: {e}"));
                assert_eq!(bits(y.data()), bits(ranks[0].0.data()), "ranks agree");
            }
        }
        if !reduce {
            // The caller's own sum, here in f64.
            let sum = |i: usize| {
                ranks
                    .iter()
                    .map(|(y, _)| f64::from(y.data()[i]))
                    .sum::<f64>()
            };
            let sums: Vec<f64> = (0..rows * out).map(sum).collect();
            for (i, sum) in sums.iter().enumerate() {
                let off = (sum - expected[i / out][i % out]).abs();
                assert!(
                    off <= error[i / out][i % out],
                    "{tp} ranks, element {i}: {off:e}"
                );
            }
        }
    });
}

#[test]
fn an_unreduced_sum_takes_no_bias() {
    let (weight, bias) = (
        Host::new(4, 6, DType::F32, vec![1.0; 24]),
        Host::new(1, 4, DType::F32, vec![0.5; 4]),
    );
    let ranks = on_ranks(3, |rank, part| {
        let (backend, range) = (&mut *rank.backend, part.of(6));
        let bias = Some(bias.view());
        let mut layer = RowParallelLinear::new(backend, weight.view(), bias, range, DType::F32)?;
        let (x, mut y) = (tensor(&[1.0; 2], 1, 2), poisoned(1, 4));
        layer.reduce_results = false;
        let refused = layer.forward(rank, &x, 1, &mut y);
        assert!(matches!(refused, Err(Error::Input(_))), "{refused:?}");
        let message = refused.map_or_else(|e| e.to_string(), |()| String::new());
        assert!(message.contains("skip_bias_add"), "{message}");
        // Nothing was sent: the ranks are in step.
        layer.skip_bias_add = true;
        layer.forward(rank, &x, 1, &mut y)?;
        assert_eq!(y.data(), [2.0; 4]);
        (layer.skip_bias_add, layer.reduce_results) = (false, true);
        layer.forward(rank, &x, 1, &mut y)?;
        Ok(y)
    });
    for y in ranks {
        assert_eq!(y.data(), [6.5; 4], "the bias once, and not three times");
    }
}

/// Vocabularies and numbers of ranks: at 64 ids or fewer a chunk, some ranks have none.
const VOCABULARIES: [usize; 7] = [1, 63, 64, 65, 97, 131, 211];
const VOCABULARY_RANKS: [usize; 6] = [1, 2, 3, 4, 5, 8];

#[test]
fn the_embedding_of_every_id_is_its_row_on_all_ranks() {
    let mut empty = 0;
    for (vocab, tp) in VOCABULARIES
        .map(|v| VOCABULARY_RANKS.map(|tp| (v, tp)))
        .concat()
    {
        cases(2, |random| {
            let (hidden, dtype) = (random.choose(&SIZES), random.choose(&DType::ALL));
            let stored = random.choose(&DType::ALL);
            let table = Host::new(vocab, hidden, stored, random.values(vocab * hidden));
            let mut ids: Vec<u32> = (0..vocab as u32).collect();
            random.shuffle(&mut ids);
            let mut batch = Batch::new();
            let blocks: Vec<u32> = (0..vocab.div_ceil(16) as u32).collect();
            batch.push(&ids, 0, vocab as u32, &blocks);
            let ranks = on_ranks(tp, |rank, part| {
                let backend = &mut *rank.backend;
                let layer = VocabParallelEmbedding::new(backend, table.view(), part, dtype)?;
                let plan = backend.plan(&batch, RopeTables::default(), 16)?;
                let mut y = poisoned(vocab, hidden);
                layer.forward(rank, &plan, &mut y)?;
                let head = ParallelLmHead::<CpuBackend>::tied(vocab, part);
                Ok((y, head.shard().ids.is_empty()))
            });
            let values = table.stored(dtype);
            let expected: Vec<f32> = ids
                .iter()
                .flat_map(|&id| narrow(&values[id as usize]))
                .collect();
            for (y, is_empty) in ranks {
                // -0 becomes +0 in a sum, and equals it.
                assert_eq!(y.data(), expected, "{vocab} ids on {tp} ranks");
                empty += usize::from(is_empty);
            }
        });
    }
    assert!(empty > 20, "{empty}");
}

#[test]
fn gathered_logits_are_those_of_the_true_vocabulary_tied_or_not() {
    for (vocab, tp) in VOCABULARIES
        .map(|v| VOCABULARY_RANKS.map(|tp| (v, tp)))
        .concat()
    {
        numbers(1, |mut n| {
            let (k, rows) = (n.random.choose(&SIZES), n.random.below(4));
            let dtype = n.random.choose(&DType::ALL);
            let (table, weight) = (n.host(vocab, k), n.host(vocab, k));
            let (tied, x) = (n.random.flip(), n.values(rows * k));
            let ranks = on_ranks(tp, |rank, part| {
                let backend = &mut *rank.backend;
                let embedding = VocabParallelEmbedding::new(backend, table.view(), part, dtype)?;
                let head = match tied {
                    true => ParallelLmHead::tied(vocab, part),
                    false => ParallelLmHead::new(backend, weight.view(), part, dtype)?,
                };
                let mut local = poisoned(rows, head.shard().ids.len());
                let x = tensor(&x, rows, k);
                head.forward(backend, &embedding, &x, &mut local)?;
                let mut all = poisoned(rows, vocab);
                head.gather(rank, &local, &mut all)?;
                Ok(all)
            });
            let w = if tied { &table } else { &weight }.stored(dtype);
            let x = wide(&x, k);
            let error = n.error(linear_error(&x, &w, None));
            let expected = linear(&x, &w, None);
            for all in &ranks {
                within(all.data(), &expected, &error)
                    .unwrap_or_else(|e| panic!("{vocab} ids on {tp} ranks: {e}"));
                assert_eq!(bits(all.data()), bits(ranks[0].data()));
            }
        });
    }
}

#[test]
fn the_sum_the_residual_and_the_norm_are_one_operation_with_the_same_bits_on_all_ranks() {
    numbers(40, |mut n| {
        let (tp, rows) = (1 + n.random.below(4), 1 + n.random.below(7));
        let hidden = n.random.choose(&SIZES);
        let parts: Vec<Vec<f32>> = (0..tp).map(|_| n.values(rows * hidden)).collect();
        let (residual, weight) = (n.values(rows * hidden), n.values(hidden));
        let bias = n.random.flip().then(|| n.values(hidden));
        let eps = 1e-5_f32;
        let ranks = on_ranks(tp, |rank, part| {
            let mut x = tensor(&parts[part.rank], rows, hidden);
            let mut sum = tensor(&residual, rows, hidden);
            let mut out = poisoned(rows, hidden);
            let bias = bias.as_ref();
            rank.comm.all_reduce_add_rms_norm(
                rank.backend,
                &mut x,
                bias,
                &mut sum,
                &weight,
                eps,
                &mut out,
            )?;
            Ok((sum, out))
        });
        let (sum, out) = &ranks[0];
        for i in 0..rows * hidden {
            let bias = bias
                .as_ref()
                .map_or(0.0, |bias| f64::from(bias[i % hidden]));
            let terms = parts.iter().map(|part| f64::from(part[i]));
            let terms: Vec<f64> = terms.chain([f64::from(residual[i]), bias]).collect();
            let size: f64 = terms.iter().map(|term| term.abs()).sum();
            let error = match n.exact {
                true => 0.0,
                false => gamma(tp + 1) * size + UNDERFLOW,
            };
            let off = (f64::from(sum.data()[i]) - terms.iter().sum::<f64>()).abs();
            assert!(
                off <= error,
                "{tp} ranks, element {i}: {off:e}, not {error:e}"
            );
        }
        // The norm of that very sum.
        let sums = wide(sum.data(), hidden);
        let weight = oracle::random::wide(&weight);
        let error = rms_norm_error(&sums, &weight, f64::from(eps));
        within(
            out.data(),
            &rms_norm(&sums, &weight, f64::from(eps)),
            &error,
        )
        .unwrap_or_else(|e| panic!("{tp} ranks: {e}"));
        for (other_sum, other_out) in &ranks {
            assert_eq!(bits(other_sum.data()), bits(sum.data()));
            assert_eq!(bits(other_out.data()), bits(out.data()));
        }
    });
}

/// What the comparisons above can see: a bias added twice, a product left out.
#[test]
fn the_bounds_tell_a_wrong_sum_from_rounding() {
    let k = 97;
    let x = vec![vec![0.5; k]];
    let w = vec![vec![0.25; k]];
    let expected = linear(&x, &w, Some(&[0.01]));
    let error = row_error(&x, &w, Some(&[0.01]), 4);
    assert!(within(&[expected[0][0] as f32], &expected, &error).is_ok());
    assert!(within(&[(expected[0][0] + 0.01) as f32], &expected, &error).is_err());
    assert!(within(&[(expected[0][0] - 0.125) as f32], &expected, &error).is_err());
}
