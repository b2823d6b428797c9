//! What a warp's request costs the memory: sectors of global memory, passes over the banks of
//! shared memory.

use crate::registers::{LANES, Lanes64, lanes};

const SECTOR: u32 = 32;
const BANKS: u64 = 32;
const BANK_WIDTH: u32 = 4;

/// Sectors that the lanes' accesses touch. An access is aligned to its size, which is at most a
/// sector's, so that each lane touches one.
pub(super) fn sectors(addresses: &Lanes64, mask: u32) -> u64 {
    let mut touched = [0; LANES];
    let (mut n, mut rising) = (0, true);
    for lane in lanes(mask) {
        let sector = addresses[lane] / u64::from(SECTOR);
        if n > 0 && touched[n - 1] == sector {
            continue;
        }
        rising &= n == 0 || touched[n - 1] < sector;
        touched[n] = sector;
        n += 1;
    }
    if !rising {
        n = distinct(&mut touched[..n]);
    }
    n as u64
}

/// Sorts; how many different ones there are, which then come first.
fn distinct(list: &mut [u64]) -> usize {
    list.sort_unstable();
    let mut n = 0;
    for at in 0..list.len() {
        if n == 0 || list[n - 1] != list[at] {
            list[n] = list[at];
            n += 1;
        }
    }
    n
}

/// Passes that an access to shared memory needs, and how many it would without conflicts; see
/// [`Shared`](super::Shared).
pub(super) fn wavefronts(offsets: &Lanes64, mask: u32, bytes: u32) -> (u64, u64) {
    let words = bytes.div_ceil(BANK_WIDTH);
    let part_lanes = LANES as u32 / words;
    let part_mask = u32::MAX >> (LANES as u32 - part_lanes);
    let (mut passes, mut parts) = (0, 0);
    for part in 0..words {
        let here = mask & part_mask << (part * part_lanes);
        if here == 0 {
            continue;
        }
        let mut asked = [0; LANES];
        let mut n = 0;
        for lane in lanes(here) {
            for word in 0..u64::from(words) {
                asked[n] = offsets[lane] / u64::from(BANK_WIDTH) + word;
                n += 1;
            }
        }
        let mut of_bank = [0u64; BANKS as usize];
        let n = distinct(&mut asked[..n]);
        for word in &asked[..n] {
            of_bank[(word % BANKS) as usize] += 1;
        }
        passes += of_bank.into_iter().max().unwrap_or(0);
        parts += 1;
    }
    (passes, parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(f: impl Fn(u64) -> u64) -> Lanes64 {
        std::array::from_fn(|lane| f(lane as u64))
    }

    #[test]
    fn sectors_are_those_of_the_bytes() {
        assert_eq!(sectors(&of(|l| 4 * l), u32::MAX), 4);
        assert_eq!(sectors(&of(|l| 4 * l + 4), u32::MAX), 5);
        assert_eq!(sectors(&of(|l| 8 * l), u32::MAX), 8);
        assert_eq!(sectors(&of(|l| 1024 * l), u32::MAX), 32);
        assert_eq!(sectors(&of(|_| 64), u32::MAX), 1);
        assert_eq!(sectors(&of(|l| 4 * (31 - l)), u32::MAX), 4);
        // To and fro between two.
        assert_eq!(sectors(&of(|l| 4096 * (l % 2)), u32::MAX), 2);
        assert_eq!(sectors(&of(|l| 4 * l), 0x8000_0001), 2);
    }

    #[test]
    fn conflicts_are_those_of_the_banks() {
        assert_eq!(wavefronts(&of(|l| 4 * l), u32::MAX, 4), (1, 1));
        assert_eq!(wavefronts(&of(|l| 8 * l), u32::MAX, 4), (2, 1));
        assert_eq!(wavefronts(&of(|l| 128 * l), u32::MAX, 4), (32, 1));
        assert_eq!(wavefronts(&of(|l| 132 * l), u32::MAX, 4), (1, 1));
        // One word for all, bytes of the same words.
        assert_eq!(wavefronts(&of(|_| 12), u32::MAX, 4), (1, 1));
        assert_eq!(wavefronts(&of(|l| l), u32::MAX, 1), (1, 1));
        // Wide accesses are taken in parts.
        assert_eq!(wavefronts(&of(|l| 8 * l), u32::MAX, 8), (2, 2));
        assert_eq!(wavefronts(&of(|l| 16 * l), u32::MAX, 16), (4, 4));
        assert_eq!(wavefronts(&of(|l| 16 * l), 0xff, 16), (1, 1));
        assert_eq!(wavefronts(&of(|l| 32 * l), u32::MAX, 16), (8, 4));
        assert_eq!(wavefronts(&of(|l| 32 * l), u32::MAX, 32), (8, 8));
    }
}
