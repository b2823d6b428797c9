//! Loads, stores, atomics, address conversion, fences and cache hints.

mod atomic;
mod hints;
mod load_store;

use crate::lowering::{Address, Base, LoadError, Lowering, Modifiers, Symbol, bad, unsupported};
use crate::machine::Cx;
use crate::memory::{FRAME_PARAMS, Order, Scope, Space};
use crate::program::Action;
use crate::ptx::ast::{self, Instruction};
use crate::registers::{LANES, Lanes64};

/// See [`super::lower`].
pub(super) fn lower(
    instruction: &Instruction,
    modifiers: &mut Modifiers,
    f: &mut Lowering,
) -> Option<Result<Action, LoadError>> {
    load_store::lower(instruction, modifiers, f)
        .or_else(|| atomic::lower(instruction, modifiers, f))
        .or_else(|| hints::lower(instruction, modifiers, f))
}

/// The state space among the modifiers.
fn take_space(m: &mut Modifiers) -> Result<Space, LoadError> {
    const SPACES: [&str; 10] = [
        "global",
        "const",
        "shared",
        "shared::cta",
        "shared::cluster",
        "local",
        "param",
        "param::entry",
        "param::func",
        "generic",
    ];
    Ok(match m.take_any(&SPACES) {
        None | Some("generic") => Space::Generic,
        Some("global") => Space::Global,
        Some("const") => Space::Const,
        Some("local") => Space::Local,
        Some("param" | "param::entry" | "param::func") => Space::Param,
        Some("shared::cluster") => return Err(unsupported("'.shared::cluster'")),
        Some(_) => Space::Shared,
    })
}

fn take_scope(m: &mut Modifiers) -> Option<Scope> {
    Some(match m.take_any(&["cta", "cluster", "gpu", "sys"])? {
        "cta" => Scope::Cta,
        "cluster" => Scope::Cluster,
        "gpu" => Scope::Gpu,
        _ => Scope::Sys,
    })
}

/// Order and scope of a load or store: what they are without a word, and what the words say.
fn take_order(m: &mut Modifiers, released: bool) -> Result<(Order, Scope), LoadError> {
    if m.take("volatile") {
        return Ok((Order::Volatile, Scope::Sys));
    }
    if m.take("mmio") {
        if !m.take("relaxed") {
            return Err(bad("'.mmio' wants '.relaxed'"));
        }
        let scope = take_scope(m).ok_or_else(|| bad("'.mmio.relaxed' wants a scope"))?;
        return Ok((Order::Relaxed, scope));
    }
    m.take("weak");
    let name = if released { "release" } else { "acquire" };
    let order = if m.take("relaxed") {
        Order::Relaxed
    } else if m.take(name) {
        if released {
            Order::Release
        } else {
            Order::Acquire
        }
    } else {
        return Ok((Order::Weak, Scope::Cta));
    };
    let scope =
        take_scope(m).ok_or_else(|| bad(format!("'.{name}' or '.relaxed' wants a scope")))?;
    Ok((order, scope))
}

/// Takes the hints that change no result: caching, eviction, prefetch size. A cache policy
/// operand is allowed with `.L2::cache_hint`.
fn take_cache_hints(m: &mut Modifiers) -> bool {
    m.take_any(&["ca", "cg", "cs", "lu", "cv", "wb", "wt"]);
    for level in ["L1", "L2"] {
        for hint in [
            "evict_normal",
            "evict_unchanged",
            "evict_first",
            "evict_last",
            "no_allocate",
        ] {
            m.take(&format!("{level}::{hint}"));
        }
    }
    for size in ["L2::64B", "L2::128B", "L2::256B"] {
        m.take(size);
    }
    m.take("L2::cache_hint")
}

/// A memory operand ready to be computed: one address for each lane.
#[derive(Debug, Clone, Copy)]
struct Target {
    space: Space,
    address: Address,
}

impl Target {
    fn of(mut space: Space, address: Address) -> Result<Self, LoadError> {
        let mut address = address;
        match (space, address.symbol) {
            // A variable's own space stands in for a generic access to it.
            (Space::Generic, Some(Symbol::Shared(_))) => space = Space::Shared,
            (Space::Generic, Some(Symbol::Local(_))) => space = Space::Local,
            (Space::Param, Some(Symbol::FrameParam(..))) => {
                address.offset = address.offset.wrapping_add(FRAME_PARAMS as i64);
            }
            (
                Space::Global | Space::Generic,
                Some(Symbol::Address(ast::Space::Global | ast::Space::Const, _)),
            )
            | (Space::Const, Some(Symbol::Address(ast::Space::Const, _)))
            | (Space::Shared, Some(Symbol::Shared(_)))
            | (Space::Local, Some(Symbol::Local(_)))
            | (Space::Param, Some(Symbol::KernelParam(..)))
            | (_, None) => {}
            (space, Some(symbol)) => {
                return Err(bad(format!("{symbol:?} is not in {space:?} memory")));
            }
        }
        Ok(Self { space, address })
    }

    /// The addresses, and the lanes whose address nobody defined.
    #[inline(always)]
    fn addresses(&self, cx: &Cx) -> (Lanes64, u32) {
        let offset = self.address.offset as u64;
        let frame = if self.address.in_frame {
            u64::from(cx.local_base)
        } else {
            0
        };
        match self.address.base {
            None => ([offset.wrapping_add(frame); LANES], 0),
            Some(Base::R64(base)) => {
                let base_values = cx.regs.get64(base);
                (
                    std::array::from_fn(|l| base_values[l].wrapping_add(offset)),
                    cx.regs.any_undef64(base),
                )
            }
            // Addresses of 32 bits wrap as such.
            Some(Base::R32(base)) => {
                let base_values = cx.regs.get32(base);
                (
                    std::array::from_fn(|l| u64::from(base_values[l].wrapping_add(offset as u32))),
                    cx.regs.any_undef32(base),
                )
            }
        }
    }
}
