//! Groups of ranks on devices, for tests: driven by one thread or by a thread a rank; messages with
//! guard bytes around them; calls with what they must give ([`calls`]).
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod calls;
pub(crate) mod faulty;
#[allow(
    clippy::duplicate_mod,
    reason = "a test may use this and the oracle, which has it too"
)]
#[path = "../random/mod.rs"]
pub(crate) mod random;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use ringtp::DType;
use ringtp::backend::cuda::{DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut};
use ringtp::comm::CommError;
use ringtp::comm::cost::Wire;
use ringtp::comm::p2p::{P2pComm, P2pGroup, P2pOptions};
use ringtp::dtype::Element;

/// What bytes outside of a message hold; as elements, NaN.
const GUARD: u8 = 0xFF;

/// A deadline for collectives that are to fail, of the device's clock: a wait of a millisecond costs
/// the virtual GPU some hundred looks.
pub(crate) const SHORT: Duration = Duration::from_millis(20);

/// The same with a short deadline, for a group of which a rank is to fail. All its ranks are driven
/// by one thread, so that no busy host can keep one waiting.
pub(crate) fn impatient() -> P2pOptions {
    P2pOptions {
        deadline: SHORT,
        ..options()
    }
}

/// Options for tests by which the cost model has large messages in mind, whatever their size: hops
/// are free.
pub(crate) fn as_for_large_messages() -> P2pOptions {
    P2pOptions {
        wire: Some(Wire {
            alpha_us: 0.0,
            bandwidth: 1e9,
        }),
        ..options()
    }
}

/// Options for tests: little memory, so that messages of a few KiB go in several passes; no probe.
/// The deadline is long, as the virtual clock may leap while a busy host keeps a rank waiting.
pub(crate) fn options() -> P2pOptions {
    P2pOptions {
        deadline: Duration::from_secs(60),
        drain: Duration::from_secs(20),
        staging_bytes: 13440,
        probe: None,
        ..P2pOptions::default()
    }
}

/// A rank in a test: its handle, and its memory.
pub(crate) struct Rank {
    pub(crate) comm: P2pComm,
    pub(crate) pool: DevicePool,
}

/// A message in device memory with guard bytes before and after it.
pub(crate) struct Message {
    buffer: DeviceBuffer,
    before: usize,
    bytes: usize,
}

impl Rank {
    pub(crate) fn new(comm: P2pComm) -> Self {
        let pool = DevicePool::new(comm.stream().context(), 0);
        Self { comm, pool }
    }

    /// A message with these elements, `offset` bytes behind a multiple of 16.
    pub(crate) fn message<T: Element>(&self, values: &[T], offset: usize) -> Message {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let before = 16 + offset;
        let mut image = vec![GUARD; before];
        image.extend_from_slice(bytes);
        image.extend([GUARD; 16]);
        let buffer = self.pool.upload(&image, self.comm.stream());
        Message {
            buffer: buffer.expect("an upload"),
            before,
            bytes: bytes.len(),
        }
    }

    /// A message whose bytes are all those of the guard.
    pub(crate) fn poisoned<T: Element>(&self, elements: usize, offset: usize) -> Message {
        self.message::<T>(&poison(elements), offset)
    }

    /// The elements. Panics if a byte outside of them was written.
    pub(crate) fn values<T: Element>(&self, message: &Message) -> Vec<T> {
        let mut image = vec![0u8; message.buffer.len()];
        let stream = self.comm.stream();
        let downloaded = stream.download(message.buffer.as_ref(), &mut image);
        downloaded.expect("a download");
        let range = message.before..message.before + message.bytes;
        let values = aligned::<T>(&image[range.clone()]);
        image[range].fill(GUARD);
        assert!(
            image.iter().all(|&b| b == GUARD),
            "a guard byte was written"
        );
        values
    }
}

/// Elements whose bytes are all those of the guard.
pub(crate) fn poison<T: Element>(elements: usize) -> Vec<T> {
    aligned(&vec![GUARD; elements * size_of::<T>()])
}

fn aligned<T: Element>(bytes: &[u8]) -> Vec<T> {
    bytemuck::pod_collect_to_vec(bytes)
}

impl Message {
    pub(crate) fn view(&self) -> DeviceSlice<'_> {
        self.part(0..self.bytes)
    }

    /// These bytes of it.
    pub(crate) fn part(&self, bytes: Range<usize>) -> DeviceSlice<'_> {
        let range = self.before + bytes.start..self.before + bytes.end;
        self.buffer.as_ref().range(range).expect("a part")
    }

    /// Puts in other elements, as many, from the host.
    pub(crate) fn write<T: Element>(&mut self, rank: &Rank, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let written = rank.comm.stream().upload(bytes, &mut self.view_mut());
        written.expect("an upload");
    }

    pub(crate) fn view_mut(&mut self) -> DeviceSliceMut<'_> {
        let range = self.before..self.before + self.bytes;
        self.buffer.as_mut().range(range).expect("a part")
    }
}

/// Runs `body` on every rank of a group, each on a thread of its own; results in rank order. A
/// panic of a body ends the group for the others, and then the test.
pub(crate) fn run<R: Send>(comms: Vec<P2pComm>, body: impl Fn(&mut Rank) -> R + Sync) -> Vec<R> {
    let body = &body;
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = comms
            .into_iter()
            .map(|comm| {
                scope.spawn(move || {
                    let mut rank = Rank::new(comm);
                    let result = catch_unwind(AssertUnwindSafe(|| body(&mut rank)));
                    if result.is_err() {
                        rank.comm.abort("the body of a test panicked");
                    }
                    result
                })
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().expect("panics of the body are caught")
        };
        threads.into_iter().map(join).collect()
    });
    results
        .into_iter()
        .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        .collect()
}

/// A group on devices 0 to n - 1.
pub(crate) fn group(n: usize, options: P2pOptions) -> (P2pGroup, Vec<P2pComm>) {
    let devices: Vec<usize> = (0..n).collect();
    P2pGroup::new(&devices, options).expect("a group")
}

/// All ranks of a group, driven by one thread: a call only puts work into a stream, so that one
/// thread can call for all of them, and what happens depends on the scheduler's seed alone.
pub(crate) struct Team {
    pub(crate) group: P2pGroup,
    pub(crate) ranks: Vec<Rank>,
}

impl Team {
    pub(crate) fn new(devices: &[usize], options: P2pOptions) -> Self {
        let (group, comms) = P2pGroup::new(devices, options).expect("a group");
        let ranks = comms.into_iter().map(Rank::new).collect();
        Self { group, ranks }
    }

    /// On devices 0 to n - 1.
    pub(crate) fn of(n: usize, options: P2pOptions) -> Self {
        Self::new(&(0..n).collect::<Vec<_>>(), options)
    }

    /// Waits for all ranks, none of which fails.
    pub(crate) fn synchronize(&mut self) {
        for rank in &mut self.ranks {
            let done = rank.comm.synchronize();
            done.unwrap_or_else(|error| panic!("rank {}: {error}", rank.comm.rank()));
        }
    }

    /// Waits for all ranks, which all fail with the same error; a rank that has nothing to wait for
    /// knows only when another one has found out.
    #[track_caller]
    pub(crate) fn failure(&mut self) -> CommError {
        for rank in &mut self.ranks {
            let _ = rank.comm.synchronize();
        }
        let mut first = None;
        for rank in &mut self.ranks {
            let me = rank.comm.rank();
            let error = match rank.comm.synchronize() {
                Err(ringtp::Error::Comm(error)) => error,
                other => panic!("rank {me}: {other:?}, expected the group's failure"),
            };
            assert_eq!(*first.get_or_insert(error.clone()), error, "rank {me} says");
        }
        first.expect("a rank")
    }

    /// Rebuilds the group, every rank on a thread of its own.
    pub(crate) fn rebuild(&mut self) {
        for result in self.try_rebuild() {
            result.expect("a rebuild");
        }
    }

    pub(crate) fn try_rebuild(&mut self) -> Vec<ringtp::Result<()>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .ranks
                .iter_mut()
                .map(|rank| scope.spawn(|| rank.comm.rebuild()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        })
    }
}

/// The sum of one element of every rank, in rank order, rounded once; -0 becomes +0.
pub(crate) fn sum<T: Element>(terms: impl Iterator<Item = T>) -> T {
    let total = terms.map(T::to_f32).reduce(|a, b| a + b).expect("a rank");
    canonical(T::from_f32(total))
}

fn canonical<T: Element>(value: T) -> T {
    if value.to_f32() == 0.0 {
        T::from_f32(0.0)
    } else {
        value
    }
}

/// Whether two elements are the same bits, or both NaN.
pub(crate) fn same<T: Element>(a: &T, b: &T) -> bool {
    bytemuck::bytes_of(a) == bytemuck::bytes_of(b) || (a.to_f32().is_nan() && b.to_f32().is_nan())
}

/// What a part of a message is where it has gone round the ring: it starts at place `first`, and
/// every place after it adds its own and rounds.
fn round_the_ring<T: Element>(
    messages: &[Vec<T>],
    ring: &[usize],
    first: usize,
    part: Range<usize>,
    out: &mut [T],
) {
    let n = ring.len();
    for (i, out) in part.zip(out) {
        let mut total = messages[ring[first % n]][i];
        for step in 1..n {
            let own = messages[ring[(first + step) % n]][i];
            total = canonical(T::from_f32(total.to_f32() + own.to_f32()));
        }
        *out = total;
    }
}

/// What the ring makes of the messages of all ranks: part p starts at place p. Parts are of packs of
/// 16 bytes.
pub(crate) fn ring_sum<T: Element>(messages: &[Vec<T>], ring: &[usize]) -> Vec<T> {
    let (n, elements) = (ring.len(), messages[0].len());
    let per_pack = 16 / size_of::<T>();
    let packs = elements.div_ceil(per_pack);
    let mut out = messages[0].clone();
    for place in 0..n {
        let part = ringtp::comm::part(packs, n, place);
        let part = part.start * per_pack..(part.end * per_pack).min(elements);
        if !part.is_empty() {
            round_the_ring(messages, ring, place, part.clone(), &mut out[part]);
        }
    }
    out
}

/// The same of a reduce-scatter, whose parts are of elements and end at their owners.
pub(crate) fn ring_parts<T: Element>(messages: &[Vec<T>], ring: &[usize]) -> Vec<T> {
    let (n, elements) = (ring.len(), messages[0].len());
    let mut out = messages[0].clone();
    for (place, &owner) in ring.iter().enumerate() {
        let part = ringtp::comm::part(elements, n, owner);
        round_the_ring(messages, ring, place + 1, part.clone(), &mut out[part]);
    }
    out
}

/// The type's run-time name.
pub(crate) fn dtype<T: Element>() -> DType {
    T::DTYPE
}
