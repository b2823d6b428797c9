//! What the machine can do, measured in the same run as what is compared with it: how fast its
//! cores read memory together, and how many f32 fused multiply-adds they do.
//!
//! Include it in a bench: `#[path = "common/limits.rs"] mod limits;`

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Passes of each measurement; the median counts.
const PASSES: usize = 9;

/// A measured limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// 1e9 bytes or floating-point operations a second, all threads together.
    pub(crate) giga_per_second: f64,
    /// The loop that did it.
    pub(crate) how: &'static str,
}

/// The rate at which `threads` threads together read `bytes` of memory in huge pages, 1e9 bytes
/// a second: the best loop's median over passes.
///
/// Take `bytes` like those that the measured code reads, and beyond the caches.
pub(crate) fn read_bandwidth(threads: usize, bytes: usize) -> Limit {
    let mut memory = HugeMemory::new(bytes);
    let words = memory.words();
    let part = words.len().div_ceil(threads).next_multiple_of(512);
    std::thread::scope(|scope| {
        for words in words.chunks_mut(part) {
            scope.spawn(|| words.iter_mut().zip(1..).for_each(|(word, i)| *word = i));
        }
    });
    let words = &*words;
    let expected = words.iter().fold(0u64, |sum, &w| sum.wrapping_add(w));
    let rate = |(how, sum): (&'static str, Sum)| {
        let time = median_of_passes(threads, |thread| {
            let from = (thread * part).min(words.len());
            let to = (from + part).min(words.len());
            sum(&words[from..to])
        });
        assert_eq!(time.1, expected, "{how} must read everything");
        Limit {
            giga_per_second: size_of_val(words) as f64 / time.0.as_secs_f64() / 1e9,
            how,
        }
    };
    best(sums().into_iter().map(rate))
}

/// The rate of f32 multiply-adds in registers on `threads` threads together, each counted as two
/// operations, 1e9 a second.
pub(crate) fn fma_peak(threads: usize) -> Limit {
    let rate = |(how, flops_a_round, burn): (&'static str, usize, Burn)| {
        const ROUNDS: usize = 10_000_000;
        let time = median_of_passes(threads, |_| {
            black_box(burn(black_box(ROUNDS), black_box(0.5), black_box(1.0)));
            0
        });
        let flops = (threads * ROUNDS * flops_a_round) as f64;
        Limit {
            giga_per_second: flops / time.0.as_secs_f64() / 1e9,
            how,
        }
    };
    best(burns().into_iter().map(rate))
}

fn best(limits: impl Iterator<Item = Limit>) -> Limit {
    limits
        .max_by(|a, b| a.giga_per_second.total_cmp(&b.giga_per_second))
        .expect("there is a portable loop")
}

/// Runs `work(thread)` on all threads at once, `PASSES` times after one to warm up; the median
/// time from the common start to the last end, and the sum of the results of one pass.
fn median_of_passes(threads: usize, work: impl Fn(usize) -> u64 + Sync) -> (Duration, u64) {
    let barrier = Barrier::new(threads);
    let run = |thread: usize| {
        let (mut times, mut result) = (Vec::new(), 0);
        for _ in 0..=PASSES {
            barrier.wait();
            let start = Instant::now();
            result = black_box(work(thread));
            barrier.wait();
            times.push(start.elapsed());
        }
        (times.split_off(1), result)
    };
    let runs: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || run(thread)))
            .collect();
        handles
            .into_iter()
            .map(|handle| handle.join().expect("the work does not panic"))
            .collect()
    });
    let mut times = runs[0].0.clone();
    times.sort();
    let sum = runs.iter().fold(0u64, |sum, run| sum.wrapping_add(run.1));
    (times[PASSES / 2], sum)
}

/// Anonymous memory for which the kernel is asked to use huge pages.
struct HugeMemory {
    start: *mut libc::c_void,
    bytes: usize,
}

impl HugeMemory {
    fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(2 << 20);
        // SAFETY: a new private mapping with no address asked for touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(start != libc::MAP_FAILED, "no {bytes} bytes of memory");
        // SAFETY: the range is the mapping just made. The advice may be refused: it is one.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
        }
        Self { start, bytes }
    }

    fn words(&mut self) -> &mut [u64] {
        // SAFETY: the mapping is page-aligned, zeroed, `bytes` long, and borrowed mutably with
        // `self` for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.bytes / 8) }
    }
}

impl Drop for HugeMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

/// The wrapping sum of some words.
type Sum = fn(&[u64]) -> u64;
/// Rounds of `acc = acc * a + b` on many accumulators; their sum.
type Burn = fn(usize, f32, f32) -> f32;

fn sum_portable(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, &word| sum.wrapping_add(word))
}

fn burn_portable(rounds: usize, a: f32, b: f32) -> f32 {
    let mut acc = [0.0f32; 32];
    for _ in 0..rounds {
        acc.iter_mut().for_each(|acc| *acc = *acc * a + b);
    }
    acc.iter().sum()
}

fn sums() -> Vec<(&'static str, Sum)> {
    let mut sums: Vec<(&'static str, Sum)> = vec![("portable", sum_portable)];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            sums.push(("AVX2, 1 stream", |w| x86::avx2_sum::<1>(w)));
            sums.push(("AVX2, 4 streams", |w| x86::avx2_sum::<4>(w)));
        }
        if is_x86_feature_detected!("avx512f") {
            sums.push(("AVX-512, 1 stream", |w| x86::avx512_sum::<1>(w)));
            sums.push(("AVX-512, 2 streams", |w| x86::avx512_sum::<2>(w)));
            sums.push(("AVX-512, 4 streams", |w| x86::avx512_sum::<4>(w)));
            sums.push(("AVX-512, 8 streams", |w| x86::avx512_sum::<8>(w)));
        }
    }
    sums
}

fn burns() -> Vec<(&'static str, usize, Burn)> {
    let mut burns: Vec<(&'static str, usize, Burn)> = vec![("portable", 2 * 32, burn_portable)];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            burns.push(("AVX2", 2 * 8 * x86::AVX2_CHAINS, x86::avx2_burn));
        }
        if is_x86_feature_detected!("avx512f") {
            burns.push(("AVX-512", 2 * 16 * x86::AVX512_CHAINS, x86::avx512_burn));
        }
    }
    #[cfg(target_arch = "aarch64")]
    burns.push(("NEON", 2 * 4 * neon::CHAINS, neon::burn));
    burns
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Independent chains: more than the latency (4) times the units (2), fewer than registers.
    pub(super) const AVX512_CHAINS: usize = 16;
    pub(super) const AVX2_CHAINS: usize = 12;

    /// Defines a sum and a burn for one vector width. A sum walks `STREAMS` equal parts of the
    /// words side by side: the prefetchers of one core follow several streams, and some cores
    /// need that to fill their line buffers.
    macro_rules! loops {
        (
            $features:literal, $chains:ident, $words:literal, $bits:ty, $floats:ty,
            $sum:ident, $sum_of:ident, $burn:ident, $burn_of:ident,
            $load:ident, $add:ident, $zero:ident, $set:ident, $fma:ident
        ) => {
            pub(super) fn $sum<const STREAMS: usize>(words: &[u64]) -> u64 {
                // SAFETY: the caller's list names this only where the features were detected.
                unsafe { $sum_of::<STREAMS>(words) }
            }

            #[target_feature(enable = $features)]
            fn $sum_of<const STREAMS: usize>(words: &[u64]) -> u64 {
                const UNROLL: usize = 4;
                let step = $words * UNROLL;
                let part = words.len() / STREAMS / step * step;
                let mut sums = [[$zero(); UNROLL]; STREAMS];
                for at in (0..part).step_by(step) {
                    for (stream, sums) in sums.iter_mut().enumerate() {
                        for (i, sum) in sums.iter_mut().enumerate() {
                            let at = stream * part + at + i * $words;
                            // SAFETY: `at + $words <= STREAMS * part <= words.len()`.
                            let vector = unsafe { $load(words.as_ptr().add(at).cast()) };
                            *sum = $add(*sum, vector);
                        }
                    }
                }
                let mut total = super::sum_portable(&words[STREAMS * part..]);
                for sum in sums.as_flattened() {
                    // SAFETY: any bits are integers, and both have the same size.
                    let lanes: [u64; $words] = unsafe { std::mem::transmute::<$bits, _>(*sum) };
                    total = total.wrapping_add(super::sum_portable(&lanes));
                }
                total
            }

            pub(super) fn $burn(rounds: usize, a: f32, b: f32) -> f32 {
                // SAFETY: the caller's list names this only where the features were detected.
                unsafe { $burn_of(rounds, a, b) }
            }

            #[target_feature(enable = $features)]
            fn $burn_of(rounds: usize, a: f32, b: f32) -> f32 {
                let (a, b) = ($set(a), $set(b));
                let mut chains = [a; $chains];
                for _ in 0..rounds {
                    for chain in &mut chains {
                        *chain = $fma(*chain, a, b);
                    }
                }
                chains.iter().fold(0.0, |sum, &chain| {
                    // SAFETY: any bits are floats, and both have the same size.
                    let lanes = unsafe { std::mem::transmute::<$floats, [f32; 2 * $words]>(chain) };
                    sum + lanes.iter().sum::<f32>()
                })
            }
        };
    }

    loops!(
        "avx512f",
        AVX512_CHAINS,
        8,
        __m512i,
        __m512,
        avx512_sum,
        avx512_sum_of,
        avx512_burn,
        avx512_burn_of,
        _mm512_loadu_si512,
        _mm512_add_epi64,
        _mm512_setzero_si512,
        _mm512_set1_ps,
        _mm512_fmadd_ps
    );
    loops!(
        "avx2,fma",
        AVX2_CHAINS,
        4,
        __m256i,
        __m256,
        avx2_sum,
        avx2_sum_of,
        avx2_burn,
        avx2_burn_of,
        _mm256_loadu_si256,
        _mm256_add_epi64,
        _mm256_setzero_si256,
        _mm256_set1_ps,
        _mm256_fmadd_ps
    );
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    /// Independent chains: at least the latency (4) times the units (4), fewer than registers.
    pub(super) const CHAINS: usize = 24;

    pub(super) fn burn(rounds: usize, a: f32, b: f32) -> f32 {
        // SAFETY: every aarch64 target of this crate has NEON.
        unsafe { burn_of(rounds, a, b) }
    }

    #[target_feature(enable = "neon")]
    fn burn_of(rounds: usize, a: f32, b: f32) -> f32 {
        let (a, b) = (vdupq_n_f32(a), vdupq_n_f32(b));
        let mut chains = [a; CHAINS];
        for _ in 0..rounds {
            for chain in &mut chains {
                *chain = vfmaq_f32(b, *chain, a);
            }
        }
        chains
            .iter()
            .fold(0.0, |sum, &chain| sum + vaddvq_f32(chain))
    }
}
