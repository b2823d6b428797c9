//! The bits of a row are those of its own inputs: whatever other rows are computed with it,
//! on however many threads, with whatever instruction set, in however many chunks.

mod oracle;

use oracle::compare::same_bits;
use oracle::cpu::{all_backends, backend, poisoned, tensor};
use oracle::paged::World;
use oracle::random::{Host, Random, cases};
use ringtp::DType;
use ringtp::backend::cpu::{CpuBackend, CpuMatrix};
use ringtp::backend::{Backend, Epilogue, HeadCounts, Layout};

/// The most rows of a batch: twice the largest tile and more.
const MOST: usize = 30;

/// A product of some rows of `x` and `residual`, `[MOST, ..]` each.
struct Product {
    x: Vec<f32>,
    residual: Vec<f32>,
    parts: [Host; 2],
    bias: Vec<f32>,
    layout: Layout,
    k: usize,
    width: usize,
}

impl Product {
    fn random(random: &mut Random, layout: Layout, n: usize, k: usize) -> Self {
        let width = match layout {
            Layout::Rows => 2 * n,
            Layout::GateUp => n,
        };
        let mut part = || Host::new(n, k, DType::F32, random.values(n * k));
        Self {
            parts: [part(), part()],
            x: random.values(MOST * k),
            residual: random.values(MOST * width),
            bias: random.values(2 * n),
            layout,
            k,
            width,
        }
    }

    fn pack(&self, backend: &mut CpuBackend, dtype: DType) -> CpuMatrix {
        backend
            .matrix(
                &[self.parts[0].view(), self.parts[1].view()],
                self.layout,
                dtype,
            )
            .expect("parts of one width")
    }

    /// Of rows `from..to`.
    fn run(&self, backend: &mut CpuBackend, w: &CpuMatrix, from: usize, to: usize) -> Vec<f32> {
        let (n, k, width) = (to - from, self.k, self.width);
        let residual = tensor(&self.residual[from * width..to * width], n, width);
        let epilogue = Epilogue {
            bias: Some(&self.bias),
            residual: Some(&residual),
        };
        let mut out = poisoned(n, width);
        backend
            .linear(
                &tensor(&self.x[from * k..to * k], n, k),
                w,
                epilogue,
                &mut out,
            )
            .expect("shapes fit");
        out.data().to_vec()
    }
}

#[test]
fn a_row_of_a_product_is_the_same_alone_and_in_every_tile_of_every_batch() {
    let mut backend = backend();
    for dtype in DType::ALL {
        for layout in [Layout::Rows, Layout::GateUp] {
            cases(4, |random| {
                let (n, k) = (1 + random.below(50), 1 + random.below(200));
                let product = Product::random(random, layout, n, k);
                let w = product.pack(&mut backend, dtype);
                let alone: Vec<f32> = (0..MOST)
                    .flat_map(|row| product.run(&mut backend, &w, row, row + 1))
                    .collect();
                for rows in 1..=MOST {
                    let from = random.below(MOST - rows + 1);
                    let out = product.run(&mut backend, &w, from, from + rows);
                    let expected = &alone[from * product.width..][..rows * product.width];
                    same_bits(&out, expected)
                        .unwrap_or_else(|e| panic!("{dtype} {layout:?} {rows} rows: {e}"));
                }
            });
        }
    }
}

#[test]
fn a_product_is_the_same_on_all_threads_and_instruction_sets() {
    let mut backends = all_backends();
    for dtype in DType::ALL {
        for layout in [Layout::Rows, Layout::GateUp] {
            cases(6, |random| {
                // 25 rows or more: enough work for other threads to be woken.
                let (n, k) = (33 + random.below(40), 30 + random.below(30));
                let product = Product::random(random, layout, n, k);
                let rows = 25 + random.below(6);
                let mut expected = None;
                for (name, backend) in &mut backends {
                    let w = product.pack(backend, dtype);
                    let out = product.run(backend, &w, 0, rows);
                    let expected = expected.get_or_insert_with(|| out.clone());
                    same_bits(&out, expected)
                        .unwrap_or_else(|e| panic!("{dtype} {layout:?} {name}: {e}"));
                }
            });
        }
    }
}

#[test]
fn norms_are_the_same_for_each_row_alone_on_all_threads_and_instruction_sets() {
    let mut backends = all_backends();
    cases(12, |random| {
        let cols = 1 + random.below(2500);
        let (x, residual) = (random.values(MOST * cols), random.values(MOST * cols));
        let (weight, bias) = (random.values(cols), random.values(cols));
        let mut expected: Option<Vec<f32>> = None;
        for (name, backend) in &mut backends {
            for step in [MOST, 1] {
                let mut found = Vec::new();
                for from in (0..MOST).step_by(step) {
                    let part =
                        |values: &[f32]| tensor(&values[from * cols..][..step * cols], step, cols);
                    let (mut sum, mut out) = (part(&residual), poisoned(step, cols));
                    backend
                        .rms_norm(&part(&x), &weight, 1e-5, &mut out)
                        .expect("shapes fit");
                    found.push(out.data().to_vec());
                    backend
                        .add_rms_norm(&part(&x), Some(&bias), &mut sum, &weight, 1e-5, &mut out)
                        .expect("shapes fit");
                    found.push([sum.data(), out.data()].concat());
                }
                // Row by row: norm, sum, norm of the sum.
                let found: Vec<f32> = match step {
                    1 => found.concat(),
                    _ => (0..MOST)
                        .flat_map(|row| {
                            let at = |list: &[f32], first: usize| {
                                list[(first + row) * cols..][..cols].to_vec()
                            };
                            [at(&found[0], 0), at(&found[1], 0), at(&found[1], MOST)].concat()
                        })
                        .collect(),
                };
                let expected = expected.get_or_insert_with(|| found.clone());
                same_bits(&found, expected).unwrap_or_else(|e| panic!("{name} by {step}: {e}"));
            }
        }
    });
}

fn world(random: &mut Random, dtype: DType, lengths: &[usize]) -> World {
    let kv = random.choose(&[1, 2, 3]);
    let heads = HeadCounts {
        q: kv * random.choose(&[1, 2, 3, 4, 8]),
        kv,
        head_dim: random.choose(&[8, 10, 16, 24, 80]),
    };
    let block_size = random.choose(&[16, 32, 64]);
    World::random(random, heads, block_size, dtype, lengths)
}

#[test]
fn a_prefill_in_chunks_is_the_prefill_in_one() {
    let mut backend = backend();
    for dtype in DType::ALL {
        cases(40, |random| {
            let len = 1 + random.below(90);
            let world = world(random, dtype, &[len]);
            let mut pages = world.poisoned_pages(&mut backend);
            let whole = world.step(&mut backend, &mut pages, &[(0, 0, len)]);
            let mut pages = world.poisoned_pages(&mut backend);
            let (mut chunks, mut cuts, mut from) = (Vec::new(), Vec::new(), 0);
            while from < len {
                let longest = random.choose(&[1, 3, 8, 17, 40]);
                let to = len.min(from + 1 + random.below(longest));
                chunks.extend(world.step(&mut backend, &mut pages, &[(0, from, to)]));
                cuts.push(to);
                from = to;
            }
            same_bits(&chunks, &whole)
                .unwrap_or_else(|e| panic!("{dtype} {:?} cut at {cuts:?}: {e}", world.heads));
        });
    }
}

#[test]
fn a_sequence_attends_alone_as_it_does_among_others() {
    let mut backend = backend();
    for dtype in DType::ALL {
        cases(40, |random| {
            let count = 1 + random.below(4);
            let lengths: Vec<usize> = (0..count)
                .map(|_| random.choose(&[1, 2, 15, 16, 17, 33, 70]))
                .collect();
            let world = world(random, dtype, &lengths);
            let mut parts: Vec<_> = lengths
                .iter()
                .enumerate()
                .map(|(i, &len)| (i, random.below(len), len))
                .collect();
            random.shuffle(&mut parts);
            let mut pages = world.poisoned_pages(&mut backend);
            for &(sequence, from, _) in &parts {
                world.step(&mut backend, &mut pages, &[(sequence, 0, from)]);
            }
            let together = world.step(&mut backend, &mut pages, &parts);
            let mut alone = Vec::new();
            for &(sequence, from, to) in &parts {
                let mut pages = world.poisoned_pages(&mut backend);
                world.step(&mut backend, &mut pages, &[(sequence, 0, from)]);
                alone.extend(world.step(&mut backend, &mut pages, &[(sequence, from, to)]));
            }
            same_bits(&together, &alone)
                .unwrap_or_else(|e| panic!("{dtype} {:?} {parts:?}: {e}", world.heads));
        });
    }
}

#[test]
fn attention_is_the_same_on_all_threads_and_instruction_sets() {
    let mut backends = all_backends();
    for dtype in DType::ALL {
        cases(8, |random| {
            let lengths = [1 + random.below(40), 1 + random.below(40), 20];
            let world = world(random, dtype, &lengths);
            let parts = [(0, 0, lengths[0]), (1, 0, lengths[1]), (2, 0, 20)];
            let mut expected = None;
            for (name, backend) in &mut backends {
                let mut pages = world.poisoned_pages(backend);
                let out = world.step(backend, &mut pages, &parts);
                let expected = expected.get_or_insert_with(|| out.clone());
                same_bits(&out, expected)
                    .unwrap_or_else(|e| panic!("{dtype} {name} {:?}: {e}", world.heads));
            }
        });
    }
}
