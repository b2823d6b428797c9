//! The records that devices make of their logits are the CPU's to the bit, whatever is wanted of
//! them; so is the choice of tokens, which is the same code on both.
#![cfg(feature = "cuda")]

mod cuda_support;
mod oracle;

use cuda_support::{Gpu, Operand};
use oracle::compare::same_bits;
use oracle::random::{Random, cases};
use ringtp::backend::WantedRecord;
use ringtp::backend::cpu::sampling::record;
use ringtp::backend::cuda::{self, RowLayout};
use ringtp::llama::SampleRow;
use ringtp::llama::sampling::Record;
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();
test_driver::also_on_every_architecture!();

const WIDTHS: [usize; 9] = [0, 1, 2, 31, 100, 511, 512, 700, 1500];

/// Logits with ties, zeros of both signs and -inf.
fn logits(random: &mut Random, n: usize) -> Vec<f32> {
    let coarse = random.flip();
    let mut value = || match random.below(12) {
        0 => f32::NEG_INFINITY,
        1 => -0.0,
        _ if coarse => random.below(9) as f32 - 4.0,
        _ => 6.0 * random.value(),
    };
    (0..n).map(|_| value()).collect()
}

fn some_ids(random: &mut Random, end: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..random.below(12))
        .map(|_| random.below(end.max(1)) as u32)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn sample_row(random: &mut Random, end: usize) -> SampleRow {
    SampleRow {
        temperature: random.choose(&[0.5, 1.0, 0.01, 7.0]),
        top_k: random.choose(&[0, 1, 5, 80]),
        top_p: random.choose(&[1.0, 0.9, 0.2]),
        repetition_penalty: random.choose(&[1.0, 1.0, 1.3, 0.7]),
        penalized: some_ids(random, end),
        banned: some_ids(random, end),
        seed: random.below(1 << 40) as u64,
        draw: random.below(1 << 40) as u64,
        ..SampleRow::greedy()
    }
}

fn form(random: &mut Random) -> Record {
    match random.below(4) {
        0 => Record::Best,
        1 => Record::Drawn,
        _ => Record::Candidates {
            count: random.choose(&[0, 1, 2, 7, 64, 300, 2000]),
        },
    }
}

/// Rows of logits and what is wanted of them.
struct Case {
    rows: usize,
    cols: usize,
    first_id: usize,
    logits: Vec<f32>,
    wanted: Vec<(usize, SampleRow, Record)>,
}

impl Case {
    fn random(random: &mut Random) -> Self {
        let (rows, cols) = (1 + random.below(3), random.choose(&WIDTHS));
        let first_id = random.choose(&[0, 1, 1000]);
        let mut logits = logits(random, rows * cols);
        if random.below(6) == 0 && cols > 0 {
            let at = random.below(logits.len());
            logits[at] = random.choose(&[f32::NAN, f32::INFINITY]);
        }
        let want = |random: &mut Random| {
            let row = sample_row(random, first_id + cols + 3);
            (random.below(rows), row, form(random))
        };
        Self {
            rows,
            cols,
            first_id,
            wanted: (0..1 + random.below(3)).map(|_| want(random)).collect(),
            logits,
        }
    }

    fn expected(&self) -> Vec<u32> {
        let words = |(row, sample, form): &(usize, SampleRow, Record)| {
            let mut out = vec![0; form.words()];
            let logits = &self.logits[row * self.cols..][..self.cols];
            record(logits, self.first_id, sample, *form, &mut out);
            out
        };
        self.wanted.iter().flat_map(words).collect()
    }

    fn run(&self, gpu: &Gpu, gap: usize) -> Vec<u32> {
        let layout = RowLayout {
            stride: self.cols + gap,
            ..RowLayout::contiguous(DType::F32, self.rows, self.cols)
        };
        let logits = Operand::new(gpu, layout, 4, Some(&self.logits));
        let words = gpu.records(&logits, self.first_id, &self.wanted);
        let words = words.expect("records");
        same_bits(&logits.values(gpu), &self.logits).expect("the logits stay");
        words
    }
}

#[test]
fn records_have_the_words_of_the_cpu() {
    let Some(gpu) = Gpu::take() else { return };
    cases(test_driver::cases_here(160), |random| {
        let case = Case::random(random);
        let gap = random.choose(&[0, 1, 5]);
        assert_eq!(
            case.run(&gpu, gap),
            case.expected(),
            "{} of {:?}",
            case.cols,
            case.wanted
        );
    });
}

/// Everything ties, so that only ids decide: the select goes down to the last digit.
#[test]
fn ties_go_to_the_lowest_ids() {
    let Some(gpu) = Gpu::take() else { return };
    for count in [1, 3, 255, 256, 257] {
        let case = Case {
            rows: 1,
            cols: 900,
            first_id: 70_000,
            logits: vec![1.5; 900],
            wanted: vec![(0, SampleRow::greedy(), Record::Candidates { count })],
        };
        assert_eq!(case.run(&gpu, 0), case.expected(), "{count} of 900");
    }
}

/// The comparison sees another draw, another temperature and an exchanged pair.
#[test]
fn the_comparison_sees_another_draw() {
    let Some(gpu) = Gpu::take() else { return };
    let mut random = Random::new(2);
    let mut case = Case {
        rows: 1,
        cols: 300,
        first_id: 0,
        logits: random.values(300),
        wanted: vec![(
            0,
            SampleRow {
                temperature: 1.0,
                ..SampleRow::greedy()
            },
            Record::Drawn,
        )],
    };
    let found = case.run(&gpu, 0);
    assert_eq!(found, case.expected());
    case.wanted[0].1.draw = 1;
    assert_ne!(found, case.expected());
    case.wanted[0].1.draw = 0;
    case.logits[found[1] as usize] = f32::NEG_INFINITY;
    assert_ne!(found, case.expected());
}

#[test]
fn operands_that_do_not_fit_are_errors_that_say_so() {
    let Some(gpu) = Gpu::take() else { return };
    let sample = SampleRow::greedy();
    let run = |dtype: DType, row: usize, first_id: usize| {
        let layout = RowLayout::contiguous(dtype, 2, 8);
        let logits = Operand::new(&gpu, layout, 0, Some(&[0.0; 16]));
        let wanted = [WantedRecord {
            row,
            sample: &sample,
            record: Record::Best,
        }];
        let (kernels, stream, pool) = (&gpu.kernels, &gpu.stream, &gpu.pool);
        cuda::sampling_records(kernels, stream, pool, logits.rows(), first_id, &wanted)
    };
    run(DType::F32, 1, 0).expect("fits");
    for (what, result) in [
        ("a row below 2", run(DType::F32, 2, 0)),
        ("f32", run(DType::Bf16, 0, 0)),
        ("below 2^32", run(DType::F32, 0, u32::MAX as usize)),
    ] {
        let Err(Error::Shape(fault)) = result else {
            panic!("{what}: an error of shape, not {result:?}");
        };
        assert!(fault.to_string().contains(what), "{fault}");
    }
}
