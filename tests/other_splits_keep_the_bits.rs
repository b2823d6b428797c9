//! Two ways to split a model otherwise, and what each keeps: with `tp_invariant` the logits have
//! the bits of one rank at every number of ranks; with `sequence_parallel` those of the same
//! number of ranks without it.

mod model_support;

use model_support::{Result, batch, bits, load, open, some_ids};
use ringtp::llama::GroupOptions;

/// Every kind of split: KV heads shared out evenly and not, replicated, odd widths, biases.
const MODELS: [&str; 9] = [
    "mha",
    "gqa_16_8",
    "gqa_24_3",
    "mqa_24_1",
    "odd_sizes",
    "biases_tied",
    "rope_yarn_mscale",
    "bf16",
    "f16",
];

/// Of a prompt in one step, then of a few tokens more: fewer rows than ranks.
fn logits(name: &str, tp: usize, tp_invariant: bool, sequence_parallel: bool) -> Result<Vec<u32>> {
    let options = GroupOptions {
        tp,
        tp_invariant,
        sequence_parallel,
        ..Default::default()
    };
    let mut group = load(name, options)?;
    let ids = some_ids(group.limits().vocab_size, 3, 24);
    let mut all = bits(&group.forward(&batch(&ids[..21], 0, 21, &[1, 0]))?);
    for at in 21..24 {
        all.extend(bits(&group.forward(&batch(
            &ids[at..at + 1],
            at,
            21,
            &[1, 0],
        ))?));
    }
    Ok(all)
}

fn ranks(name: &str) -> Result<Vec<usize>> {
    let valid = open(name)?.config().dims.valid_tp();
    Ok(valid.into_iter().filter(|&tp| tp <= 8).collect())
}

#[test]
fn tp_invariant_gives_the_bits_of_one_rank_on_any_number() -> Result {
    let mut differ_by_default = 0;
    for name in MODELS {
        let one = logits(name, 1, false, false)?;
        for tp in ranks(name)? {
            assert!(logits(name, tp, true, false)? == one, "{name}, tp {tp}");
            differ_by_default += usize::from(logits(name, tp, false, false)? != one);
        }
    }
    // The negative control: without it most differ, so the comparison sees the difference.
    assert!(differ_by_default > 20, "{differ_by_default}");
    Ok(())
}

#[test]
fn sequence_parallel_changes_no_bit() -> Result {
    for name in MODELS {
        for tp in ranks(name)? {
            let plain = logits(name, tp, false, false)?;
            assert!(logits(name, tp, false, true)? == plain, "{name}, tp {tp}");
        }
    }
    Ok(())
}
