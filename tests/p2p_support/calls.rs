//! Calls of every collective, with what they must give: to the bit what the CPU's ranks give, or
//! what the ring's hops do.

use ringtp::backend::cuda::{DeviceSlice, DeviceSliceMut};
use ringtp::comm::p2p::{ALL, DeviceAllReduce, P2pGroup};
use ringtp::comm::{self, GroupOptions, Rounding, part, run_ranks};
use ringtp::dtype::Element;

use super::random::Random;
use super::{Message, Rank, Team, poison, ring_parts, ring_sum, same};

/// A collective.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    AllReduce(&'static dyn DeviceAllReduce),
    ReduceScatter,
    AllGather,
    /// So many rows, of so many columns from each rank.
    Columns(usize, Vec<usize>),
    /// From this root.
    Broadcast(usize),
    Barrier,
}

/// How the ranks are joined, which decides what is rounded where.
#[derive(Clone, Debug)]
pub(crate) struct Wiring {
    pub(crate) world_size: usize,
    pub(crate) is_mesh: bool,
    pub(crate) ring: Vec<usize>,
}

impl Wiring {
    pub(crate) fn of(group: &P2pGroup) -> Self {
        Self {
            world_size: group.world_size(),
            is_mesh: group.links().is_mesh(),
            ring: group.ring().expect("a ring").to_vec(),
        }
    }
}

/// A call of all ranks: what each passes in, and what each must find.
#[derive(Clone, Debug)]
pub(crate) struct Case<T> {
    pub(crate) kind: Kind,
    in_place: bool,
    /// Of the buffers of each rank, beyond a multiple of 16 bytes.
    offsets: Vec<usize>,
    /// What each rank's first buffer holds before and after, and its second after, if it has one.
    before: Vec<Vec<T>>,
    after: Vec<Vec<T>>,
    out: Option<Vec<Vec<T>>>,
}

/// A rank's memory for a case.
pub(crate) struct Buffers {
    first: Message,
    out: Option<Message>,
}

impl Buffers {
    /// The first.
    pub(crate) fn first(&self) -> &Message {
        &self.first
    }
}

/// What every rank's `body` gives on the CPU's ranks.
fn on_cpu<R: Send>(
    n: usize,
    body: impl Fn(&mut comm::CpuComm) -> ringtp::Result<R> + Sync,
) -> Vec<R> {
    let results = run_ranks(n, GroupOptions::default(), body).expect("ranks");
    results.into_iter().map(|r| r.expect("a result")).collect()
}

impl<T: Element> Case<T> {
    /// A call with random values: of `elements` in all of a reduction or broadcast, of each rank of a
    /// gather, of each column's height of columns.
    pub(crate) fn new(
        random: &mut Random,
        wiring: &Wiring,
        kind: Kind,
        elements: usize,
        in_place: bool,
    ) -> Self {
        let n = wiring.world_size;
        let offsets = (0..n)
            .map(|_| {
                if random.below(3) == 0 {
                    size_of::<T>()
                } else {
                    0
                }
            })
            .collect();
        let mut case = Self {
            kind,
            in_place,
            offsets,
            before: Vec::new(),
            after: Vec::new(),
            out: None,
        };
        let inputs = (0..n)
            .map(|rank| {
                let elements = match &case.kind {
                    Kind::Columns(rows, widths) => rows * widths[rank],
                    Kind::Barrier => 0,
                    _ => elements,
                };
                random.awkward_values(elements)
            })
            .collect();
        case.fill(wiring, inputs);
        case
    }

    /// The same call with other values.
    pub(crate) fn again(&self, random: &mut Random, wiring: &Wiring) -> Self {
        let mut other = self.clone();
        let inputs = (0..wiring.world_size)
            .map(|rank| random.awkward_values(self.input(rank).len()))
            .collect();
        other.fill(wiring, inputs);
        other
    }

    /// What a rank passes in.
    fn input(&self, rank: usize) -> &[T] {
        let before = &self.before[rank];
        match &self.kind {
            Kind::AllGather if self.in_place => {
                let each = before.len() / self.before.len();
                &before[rank * each..][..each]
            }
            _ => before,
        }
    }

    fn fill(&mut self, wiring: &Wiring, inputs: Vec<Vec<T>>) {
        let n = wiring.world_size;
        self.out = None;
        self.after = inputs.clone();
        match &self.kind {
            Kind::AllReduce(algorithm) => {
                let sum = match algorithm.rounding() {
                    Rounding::PerHop if n > 1 => ring_sum(&inputs, &wiring.ring),
                    _ => on_cpu(n, |comm| {
                        let mut data = inputs[comm.rank()].clone();
                        comm.all_reduce_with(&comm::TwoShot, &mut data)?;
                        Ok(data)
                    })
                    .swap_remove(0),
                };
                if self.in_place {
                    self.after = vec![sum; n];
                } else {
                    self.out = Some(vec![sum; n]);
                }
            }
            Kind::ReduceScatter => {
                let owned = |rank| part(inputs[0].len(), n, rank);
                let parts: Vec<Vec<T>> = if wiring.is_mesh || n == 1 {
                    on_cpu(n, |comm| {
                        let mine = owned(comm.rank());
                        let mut out = poison(mine.len());
                        comm.reduce_scatter(&inputs[comm.rank()], &mut out)?;
                        Ok(out)
                    })
                } else {
                    let whole = ring_parts(&inputs, &wiring.ring);
                    (0..n).map(|rank| whole[owned(rank)].to_vec()).collect()
                };
                if self.in_place {
                    for (rank, part) in parts.iter().enumerate() {
                        self.after[rank][owned(rank)].copy_from_slice(part);
                    }
                } else {
                    self.out = Some(parts);
                }
            }
            Kind::AllGather => {
                let each = inputs[0].len();
                let all = on_cpu(n, |comm| {
                    let mut out: Vec<T> = poison(n * each);
                    comm.all_gather(&inputs[comm.rank()], &mut out)?;
                    Ok(out)
                });
                if self.in_place {
                    self.after = all;
                    self.before = (0..n)
                        .map(|rank| {
                            let mut before = poison(n * each);
                            before[rank * each..][..each].copy_from_slice(&inputs[rank]);
                            before
                        })
                        .collect();
                    return;
                }
                self.out = Some(all);
            }
            Kind::Columns(rows, widths) => {
                let all: Vec<T> = (0..*rows)
                    .flat_map(|row| {
                        let columns = inputs.iter().zip(widths);
                        columns.flat_map(move |(input, &width)| {
                            input[row * width..][..width].iter().copied()
                        })
                    })
                    .collect();
                self.out = Some(vec![all; n]);
            }
            Kind::Broadcast(root) => {
                self.after = on_cpu(n, |comm| {
                    let mut data = inputs[comm.rank()].clone();
                    comm.broadcast(&mut data, *root)?;
                    Ok(data)
                });
            }
            Kind::Barrier => {}
        }
        self.before = inputs;
    }

    /// One rank's buffers. Allocating waits for the device: all of it comes before any rank's call.
    pub(crate) fn place(&self, rank: &Rank) -> Buffers {
        let me = rank.comm.rank();
        let offset = self.offsets[me];
        let out = self.out.as_ref().map(|out| {
            // The other is aligned now and then where this one is not.
            let offset = self.offsets[(me + 1) % self.offsets.len()];
            rank.poisoned::<T>(out[me].len(), offset)
        });
        Buffers {
            first: rank.message(&self.before[me], offset),
            out,
        }
    }

    /// Puts the values of this case into the buffers of another like it.
    pub(crate) fn write(&self, rank: &Rank, buffers: &mut Buffers) {
        let me = rank.comm.rank();
        buffers.first.write(rank, &self.before[me]);
        if let (Some(out), Some(buffer)) = (&self.out, &mut buffers.out) {
            buffer.write::<T>(rank, &poison(out[me].len()));
        }
    }

    /// Puts one rank's call into its stream.
    pub(crate) fn call(&self, rank: &mut Rank, buffers: &mut Buffers) -> ringtp::Result<()> {
        let (dtype, size, comm) = (T::DTYPE, size_of::<T>(), &mut rank.comm);
        let (me, n) = (comm.rank(), comm.world_size());
        let Buffers { first, out } = buffers;
        match (&self.kind, out) {
            (Kind::AllReduce(algorithm), None) => {
                comm.all_reduce_with(*algorithm, dtype, &mut first.view_mut())
            }
            (Kind::AllReduce(algorithm), Some(out)) => {
                comm.all_reduce_out_with(*algorithm, dtype, first.view(), &mut out.view_mut())
            }
            (Kind::ReduceScatter, Some(out)) => {
                comm.reduce_scatter(dtype, first.view(), &mut out.view_mut())
            }
            (Kind::ReduceScatter, None) => {
                let mine = part(self.before[me].len(), n, me);
                let out = first.part(mine.start * size..mine.end * size);
                let (address, len) = (out.address(), out.len());
                // SAFETY: a part of `first`, which the kernels read before they write it.
                let mut out = unsafe { DeviceSliceMut::from_raw(address, len) };
                comm.reduce_scatter(dtype, first.view(), &mut out)
            }
            (Kind::AllGather, Some(out)) => {
                comm.all_gather(dtype, first.view(), &mut out.view_mut())
            }
            (Kind::AllGather, None) => {
                let each = self.input(me).len() * size;
                let input = first.part(me * each..(me + 1) * each);
                // SAFETY: a part of `first`, which the kernels read before they write it.
                let input = unsafe { DeviceSlice::from_raw(input.address(), input.len()) };
                comm.all_gather(dtype, input, &mut first.view_mut())
            }
            (Kind::Columns(rows, widths), Some(out)) => {
                comm.all_gather_columns(dtype, *rows, widths, first.view(), &mut out.view_mut())
            }
            (Kind::Columns(..), None) => unreachable!("columns have a place of their own"),
            (Kind::Broadcast(root), _) => comm.broadcast(dtype, &mut first.view_mut(), *root),
            (Kind::Barrier, _) => comm.barrier(),
        }
    }

    /// Checks that a call that failed has written no output.
    pub(crate) fn check_untouched(&self, rank: &Rank, buffers: &Buffers) {
        let me = rank.comm.rank();
        let equal =
            |a: &[T], b: &[T]| bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b);
        let first = rank.values::<T>(&buffers.first);
        assert!(equal(&first, &self.before[me]), "{:?}", self.kind);
        if let Some(out) = &buffers.out {
            let out = rank.values::<T>(out);
            assert!(equal(&out, &poison(out.len())), "{:?}", self.kind);
        }
    }

    /// Checks one rank's buffers; panics with `context`.
    pub(crate) fn check(&self, rank: &Rank, buffers: &Buffers, context: &str) {
        let me = rank.comm.rank();
        let sums = matches!(self.kind, Kind::AllReduce(_) | Kind::ReduceScatter);
        let check = |what: &str, message: &Message, expected: &[T]| {
            let found = rank.values::<T>(message);
            let right =
                |a: &T, b: &T| bytemuck::bytes_of(a) == bytemuck::bytes_of(b) || sums && same(a, b);
            let wrong = (0..expected.len()).find(|&i| !right(&found[i], &expected[i]));
            if let Some(i) = wrong {
                panic!(
                    "{context}: {:?} of {}, {} ranks, in place {}: on rank {me} element {i} of {} \
                     of {what} is {:?}, expected {:?}",
                    self.kind,
                    T::DTYPE,
                    self.before.len(),
                    self.in_place,
                    expected.len(),
                    found[i],
                    expected[i]
                );
            }
        };
        check("its first buffer", &buffers.first, &self.after[me]);
        if let (Some(out), Some(buffer)) = (&self.out, &buffers.out) {
            check("its output", buffer, &out[me]);
        }
    }
}

/// Calls of every collective, of these sizes in bytes, in a random order.
pub(crate) fn every_kind<T: Element>(
    random: &mut Random,
    wiring: &Wiring,
    bytes: &[usize],
) -> Vec<Case<T>> {
    let n = wiring.world_size;
    let mut cases = Vec::new();
    for &bytes in bytes {
        let elements = bytes.div_ceil(size_of::<T>());
        for in_place in [false, true] {
            let mut add = |random: &mut Random, kind, elements| {
                cases.push(Case::new(random, wiring, kind, elements, in_place));
            };
            for &algorithm in ALL {
                if wiring.is_mesh || algorithm.name() == "ring" {
                    add(random, Kind::AllReduce(algorithm), elements);
                }
            }
            add(random, Kind::ReduceScatter, elements);
            // Of each rank, so that all together have about as many.
            add(random, Kind::AllGather, elements.div_ceil(n));
            let root = random.below(n);
            add(random, Kind::Broadcast(root), elements);
        }
        let rows = 1 + random.below(7);
        let widths = (0..n)
            .map(|_| random.below(2 * elements / (n * rows) + 2))
            .collect();
        let kind = Kind::Columns(rows, widths);
        cases.push(Case::new(random, wiring, kind, 0, false));
        cases.push(Case::new(random, wiring, Kind::Barrier, 0, false));
    }
    random.shuffle(&mut cases);
    cases
}

/// All calls of all ranks back to back, and then the check of all results.
pub(crate) fn run_all<T: Element>(team: &mut Team, cases: &[Case<T>], context: &str) {
    let mut buffers: Vec<Vec<Buffers>> = team
        .ranks
        .iter()
        .map(|rank| cases.iter().map(|case| case.place(rank)).collect())
        .collect();
    call_all(team, cases, &mut buffers);
    team.synchronize();
    check_all(team, cases, &buffers, context);
}

/// Puts all calls of all ranks into their streams.
pub(crate) fn call_all<T: Element>(
    team: &mut Team,
    cases: &[Case<T>],
    buffers: &mut [Vec<Buffers>],
) {
    for (rank, buffers) in team.ranks.iter_mut().zip(buffers) {
        for (case, buffers) in cases.iter().zip(buffers) {
            case.call(rank, buffers).expect("a call");
        }
    }
}

/// Checks the results of all calls on all ranks.
pub(crate) fn check_all<T: Element>(
    team: &Team,
    cases: &[Case<T>],
    buffers: &[Vec<Buffers>],
    context: &str,
) {
    for (rank, buffers) in team.ranks.iter().zip(buffers) {
        for (case, buffers) in cases.iter().zip(buffers) {
            case.check(rank, buffers, context);
        }
    }
}
