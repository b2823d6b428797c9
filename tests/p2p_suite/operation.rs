//! The collectives as values: how to call each, and what it must give.

use half::{bf16, f16};
use ringtp::DType;
use ringtp::backend::cuda::{DeviceSlice, DeviceSliceMut};
use ringtp::comm::cost::Wire;
use ringtp::comm::p2p::{DeviceAllReduce, OneShot, P2pComm, Ring, TwoShot};
use ringtp::comm::part;
use ringtp::dtype::Element;

use super::{Scenario, again, losses, raised, stops, sums, wire};
use crate::p2p_support::{ring_parts, ring_sum, sum};

/// A collective.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    /// By this algorithm.
    AllReduce(&'static dyn DeviceAllReduce),
    ReduceScatter,
    /// Of one row.
    AllGather,
    /// Of rows of different lengths, side by side.
    Columns,
    Broadcast {
        /// In two hops.
        in_parts: bool,
    },
}

/// Rows of [`Operation::Columns`].
const ROWS: usize = 3;

/// A collective for elements of a type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) operation: Operation,
    pub(crate) dtype: DType,
    /// In which order it sums. Around the ring, there are more ranks and shorter messages.
    pub(crate) order: Order,
}

/// In which order ranks are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// From the first to the last, rounded once.
    Ranks,
    /// Around the ring, rounded at each hop.
    Ring,
    /// Up a binary tree: each its own, the left branch, the right branch; rounded at each rank.
    Tree,
}

impl Target {
    /// Every collective that uses a kernel of the crate, given whether the links are a mesh.
    pub(crate) fn of_kernel(name: &str, mesh: bool) -> Vec<Self> {
        let dtype = dtype_of(name);
        let stem = match name {
            "leave" => name,
            _ => name.rsplit_once('_').map_or(name, |(stem, _)| stem),
        };
        let operations: &[Operation] = match (stem, mesh) {
            // What a rank runs last, whatever it ran before.
            ("leave", true) | ("one_shot", true) => &[Operation::AllReduce(&OneShot)],
            ("two_shot", true) => &[Operation::AllReduce(&TwoShot)],
            ("ring_all_reduce", true) => &[Operation::AllReduce(&Ring)],
            ("reduce_scatter", true) | ("ring_reduce_scatter", false) => {
                &[Operation::ReduceScatter]
            }
            ("all_gather", true) => &[Operation::AllGather, Operation::Columns],
            ("ring_all_gather", false) => &[
                Operation::AllGather,
                Operation::Columns,
                Operation::Broadcast { in_parts: false },
            ],
            ("broadcast", true) => &[Operation::Broadcast { in_parts: false }],
            ("broadcast_parts", true) => &[Operation::Broadcast { in_parts: true }],
            _ => &[],
        };
        let target = |&operation| Self {
            operation,
            dtype,
            order: if stem.starts_with("ring") {
                Order::Ring
            } else {
                Order::Ranks
            },
        };
        operations.iter().map(target).collect()
    }

    pub(super) fn is_ring(&self) -> bool {
        self.order == Order::Ring
    }

    /// Whether a rank waits for all others twice a pass.
    pub(super) fn has_two_barriers(&self) -> bool {
        match self.operation {
            Operation::AllReduce(algorithm) => algorithm.name() == "two-shot",
            Operation::Broadcast { in_parts } => in_parts,
            _ => false,
        }
    }

    pub(super) fn scenarios(&self) -> Vec<(&'static str, Scenario)> {
        let mut all: Vec<(&'static str, Scenario)> = vec![
            ("calls back to back", sums::back_to_back),
            (
                "a rank that does not come",
                losses::a_rank_that_does_not_come,
            ),
            (
                "a call after one that failed",
                again::a_call_after_one_that_failed,
            ),
            ("epochs that wrap", sums::as_epochs_wrap),
            ("another call", losses::another_call),
            ("an abort", losses::an_abort),
            ("a rank left behind", losses::a_rank_left_behind),
            ("a rank that leaves", losses::a_rank_that_leaves),
        ];
        let a_rank_that_has_left: Scenario = stops::a_rank_that_has_left;
        let at_a_barrier: Scenario = stops::at_a_barrier;
        let at_the_second: Scenario = stops::at_the_second_barrier;
        let a_raised_word: Scenario = raised::a_raised_word;
        let before_the_total: Scenario = stops::before_the_total;
        let before_a_message: Scenario = stops::before_a_message;
        let before_it_frees_a_slot: Scenario = stops::before_it_frees_a_slot;
        // Columns go around the ring in as many calls as they need; each is one of whole rows.
        if !(self.is_ring() && matches!(self.operation, Operation::Columns)) {
            all.push(("a rank that has left", a_rank_that_has_left));
        }
        match self.order {
            Order::Ring if matches!(self.operation, Operation::Columns) => {}
            Order::Ring => all.extend([
                ("stopped at a barrier", at_a_barrier),
                ("stopped before a message", before_a_message),
                ("stopped before it frees a slot", before_it_frees_a_slot),
            ]),
            Order::Ranks => {
                all.push(("stopped at a barrier", at_a_barrier));
                if self.has_two_barriers() {
                    all.push(("stopped at the second barrier", at_the_second));
                    all.push(("a raised word", a_raised_word));
                }
            }
            // A leaf waits for its parent, and nobody for all others.
            Order::Tree => all.extend([
                ("stopped at a barrier", at_a_barrier),
                ("stopped before the total", before_the_total),
            ]),
        }
        all
    }

    pub(super) fn wire(&self) -> Wire {
        wire(!matches!(
            self.operation,
            Operation::Broadcast { in_parts: true }
        ))
    }

    pub(super) fn algorithms(&self) -> Vec<&'static dyn DeviceAllReduce> {
        match self.operation {
            Operation::AllReduce(algorithm) if algorithm.image().is_some() => vec![algorithm],
            _ => Vec::new(),
        }
    }
}

/// The type in a kernel's name.
pub(crate) fn dtype_of(kernel: &str) -> DType {
    match kernel.rsplit('_').next() {
        Some("f32" | "b32") => DType::F32,
        Some("f16") => DType::F16,
        _ => DType::Bf16,
    }
}

/// One call: which rank brings how much.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) operation: Operation,
    pub(super) ranks: usize,
    pub(super) elements: usize,
    pub(super) in_place: bool,
    pub(super) root: usize,
}

impl Call {
    fn widths(&self) -> Vec<usize> {
        let width = self.elements.div_ceil(ROWS);
        (0..self.ranks).map(|rank| width + 3 * rank).collect()
    }

    /// Elements that a rank brings.
    pub(super) fn input(&self, rank: usize) -> usize {
        match self.operation {
            Operation::Columns => ROWS * self.widths()[rank],
            _ => self.elements,
        }
    }

    /// Elements that it gets.
    pub(super) fn output(&self, rank: usize) -> usize {
        match self.operation {
            Operation::AllReduce(_) | Operation::Broadcast { .. } => self.elements,
            Operation::ReduceScatter => part(self.elements, self.ranks, rank).len(),
            Operation::AllGather => self.ranks * self.elements,
            Operation::Columns => ROWS * self.widths().iter().sum::<usize>(),
        }
    }

    /// Whether the result replaces what the rank brings.
    pub(super) fn replaces(&self) -> bool {
        match self.operation {
            Operation::AllReduce(_) => self.in_place,
            Operation::Broadcast { .. } => true,
            _ => false,
        }
    }

    /// Puts the call into a rank's stream.
    pub(super) fn put<T: Element>(
        &self,
        comm: &mut P2pComm,
        input: &mut DeviceSliceMut<'_>,
        output: &mut DeviceSliceMut<'_>,
    ) -> ringtp::Result<()> {
        let dtype = T::DTYPE;
        // SAFETY: the input, which outlives the call; nothing else writes it.
        let from = unsafe { DeviceSlice::from_raw(input.address(), input.len()) };
        match self.operation {
            Operation::AllReduce(by) if self.in_place => comm.all_reduce_with(by, dtype, input),
            Operation::AllReduce(by) => comm.all_reduce_out_with(by, dtype, from, output),
            Operation::ReduceScatter => comm.reduce_scatter(dtype, from, output),
            Operation::AllGather => comm.all_gather(dtype, from, output),
            Operation::Columns => {
                comm.all_gather_columns(dtype, ROWS, &self.widths(), from, output)
            }
            Operation::Broadcast { .. } => comm.broadcast(dtype, input, self.root),
        }
    }

    /// What a rank must have afterwards, given what all of them brought.
    pub(super) fn expected<T: Element>(
        &self,
        target: &Target,
        messages: &[Vec<T>],
        rank: usize,
        ring: &[usize],
    ) -> Vec<T> {
        let n = self.ranks;
        match self.operation {
            Operation::AllReduce(_) => match target.order {
                Order::Ranks => in_rank_order(messages, 0..self.elements),
                Order::Ring => ring_sum(messages, ring),
                Order::Tree => (0..self.elements)
                    .map(|i| tree_sum(messages, 0, i))
                    .collect(),
            },
            Operation::ReduceScatter => {
                let own = part(self.elements, n, rank);
                if target.order == Order::Ring {
                    ring_parts(messages, ring)[own].to_vec()
                } else {
                    in_rank_order(messages, own)
                }
            }
            Operation::AllGather => messages.concat(),
            Operation::Columns => {
                let widths = self.widths();
                (0..ROWS)
                    .flat_map(|row| {
                        let of = |(m, &w): (&Vec<T>, &usize)| m[row * w..(row + 1) * w].to_vec();
                        let row: Vec<T> = messages.iter().zip(&widths).flat_map(of).collect();
                        row
                    })
                    .collect()
            }
            Operation::Broadcast { .. } => messages[self.root].clone(),
        }
    }
}

fn in_rank_order<T: Element>(messages: &[Vec<T>], range: std::ops::Range<usize>) -> Vec<T> {
    let terms = |i: usize| messages.iter().map(move |message| message[i]);
    range.map(|i| sum(terms(i))).collect()
}

/// The sum of element `i` over the branch of a rank.
fn tree_sum<T: Element>(messages: &[Vec<T>], rank: usize, i: usize) -> T {
    let branches = [2 * rank + 1, 2 * rank + 2];
    let branches = branches.into_iter().filter(|&r| r < messages.len());
    let branches = branches.map(|branch| tree_sum(messages, branch, i));
    sum(std::iter::once(messages[rank][i]).chain(branches))
}

/// Calls a generic function for the type of a target.
macro_rules! for_type {
    ($target:expr, $function:ident($($argument:expr),*)) => {
        match $target.dtype {
            ringtp::DType::F32 => $function::<f32>($($argument),*),
            ringtp::DType::Bf16 => $function::<$crate::p2p_suite::operation::Bf16>($($argument),*),
            ringtp::DType::F16 => $function::<$crate::p2p_suite::operation::F16>($($argument),*),
        }
    };
}
pub(super) use for_type;
pub(super) type Bf16 = bf16;
pub(super) type F16 = f16;
