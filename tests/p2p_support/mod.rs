//! Groups of ranks on devices, for tests: a thread a rank, messages with guard bytes around them.
#![allow(dead_code, reason = "each test file uses its part")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use ringtp::DType;
use ringtp::backend::cuda::{DeviceBuffer, DevicePool, DeviceSlice, DeviceSliceMut};
use ringtp::comm::p2p::{P2pComm, P2pGroup, P2pOptions};
use ringtp::dtype::Element;

/// What bytes outside of a message hold; as elements, NaN.
const GUARD: u8 = 0xFF;

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
        let bytes = vec![GUARD; elements * size_of::<T>()];
        self.message::<T>(bytemuck::cast_slice(&aligned::<T>(&bytes)), offset)
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

fn aligned<T: Element>(bytes: &[u8]) -> Vec<T> {
    bytemuck::pod_collect_to_vec(bytes)
}

impl Message {
    pub(crate) fn view(&self) -> DeviceSlice<'_> {
        let whole = self.buffer.as_ref();
        whole
            .range(self.before..self.before + self.bytes)
            .expect("a part")
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

/// A small generator with a printed seed (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Ordinary values, and now and then one of the awkward ones.
    pub(crate) fn value(&mut self) -> f32 {
        const AWKWARD: [f32; 12] = [
            0.0,
            -0.0,
            1e-45,
            -1e-45,
            6e-8,
            -6e-8,
            f32::MAX,
            f32::MIN,
            65504.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
        ];
        if self.below(16) == 0 {
            return AWKWARD[self.below(AWKWARD.len() as u64) as usize];
        }
        (self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0) * (1 << self.below(4)) as f32
    }

    pub(crate) fn values<T: Element>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::from_f32(self.value())).collect()
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

/// What the ring makes of the messages of all ranks: part p starts at place p, and every place
/// after it adds its own and rounds. Parts are of packs of 16 bytes.
pub(crate) fn ring_sum<T: Element>(messages: &[Vec<T>], ring: &[usize]) -> Vec<T> {
    let (n, elements) = (ring.len(), messages[0].len());
    let per_pack = 16 / size_of::<T>();
    let packs = elements.div_ceil(per_pack);
    let mut out = messages[0].clone();
    for place in 0..n {
        let part = ringtp::comm::part(packs, n, place);
        for i in part.start * per_pack..(part.end * per_pack).min(elements) {
            let mut total = messages[ring[place]][i];
            for step in 1..n {
                let own = messages[ring[(place + step) % n]][i];
                total = canonical(T::from_f32(total.to_f32() + own.to_f32()));
            }
            out[i] = total;
        }
    }
    out
}

/// The type's run-time name.
pub(crate) fn dtype<T: Element>() -> DType {
    T::DTYPE
}
