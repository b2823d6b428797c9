//! Rotary embedding of queries and keys, and the append of keys and values to the cache.

use super::kv::CpuKvPages;
use super::plan::CpuPlan;
use super::simd::LANES;
use super::stored::{Bf16, F16, F32, Stored};
use crate::backend::HeadCounts;
use crate::dtype::DType;

/// Rotates the queries of every row in place and writes its key, rotated, and its value to
/// the pages. `qkv` is `[rows, (q + 2 kv) * head_dim]`.
pub(super) fn rope_append(
    qkv: &mut [f32],
    heads: HeadCounts,
    plan: &CpuPlan,
    pages: &mut CpuKvPages,
    layer: usize,
) {
    match pages.dtype() {
        DType::F32 => typed::<F32>(qkv, heads, plan, pages, layer),
        DType::Bf16 => typed::<Bf16>(qkv, heads, plan, pages, layer),
        DType::F16 => typed::<F16>(qkv, heads, plan, pages, layer),
    }
}

fn typed<E: Stored>(
    qkv: &mut [f32],
    heads: HeadCounts,
    plan: &CpuPlan,
    pages: &mut CpuKvPages,
    layer: usize,
) where
    E::Word: bytemuck::Pod,
{
    let (d, shape) = (heads.head_dim, *pages.shape());
    let (keys, values) = pages.layer_mut::<E::Word>(layer);
    let rows = qkv.chunks_exact_mut(heads.qkv_cols());
    let angles = plan
        .cos
        .chunks_exact(d / 2)
        .zip(plan.sin.chunks_exact(d / 2));
    for ((qkv, (cos, sin)), &(block, slot)) in rows.zip(angles).zip(&plan.slots) {
        let (rotated, value) = qkv.split_at_mut((heads.q + heads.kv) * d);
        rotated
            .chunks_exact_mut(d)
            .for_each(|head| rotate(head, cos, sin));
        for head in 0..heads.kv {
            let from = &rotated[(heads.q + head) * d..][..d];
            let to = &mut keys[shape.key_at(block, head, slot)..][..d * LANES];
            for (to, &key) in to.chunks_exact_mut(LANES).zip(from) {
                to[slot % LANES] = E::narrow(key);
            }
            let to = &mut values[shape.value_at(block, head, slot)..][..d];
            for (to, &value) in to.iter_mut().zip(&value[head * d..]) {
                *to = E::narrow(value);
            }
        }
    }
}

/// Rotates the pairs (i, i + d/2), as Hugging Face checkpoints are laid out.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}
