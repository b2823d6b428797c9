//! Whole rows against the long way: whatever warps do, both find the same conflicts.

use std::sync::Arc;

use super::{Row, Shadow};
use crate::finding::Place;
use crate::memory::{Order, Scope};
use crate::race::clock::{Knowledge, Learned};
use crate::race::{Access, Actor, Agent, Conflict, LaunchClock, Memo, Race, Stale, WarpClock};
use crate::registers::{FULL, LANES, Lanes64, lanes};

const WORDS: u64 = 96;
const BLOCKS: usize = 2;
const WARPS: usize = 3;
/// The operation that is strong.
const STRONG: u32 = 9;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn race() -> Race {
    let mut race = Race::new(true, Stale::Newest, 0);
    for _ in 0..BLOCKS {
        race.actors.push(Actor {
            device: 0,
            stream: 0,
            number: 1,
            block: None,
        });
    }
    for op in 1..=STRONG {
        let strong = op == STRONG;
        race.accesses.insert(
            op,
            Access {
                place: Arc::new(Place::default()),
                order: if strong { Order::Relaxed } else { Order::Weak },
                scope: Scope::Gpu,
                element: 4,
                bytes: 4,
                non_coherent: false,
            },
        );
    }
    race
}

/// One access of a warp.
struct Step {
    block: usize,
    warp: usize,
    op: u32,
    writes: bool,
    mask: u32,
    addresses: Lanes64,
    bytes: u32,
}

impl Step {
    fn random(r: &mut Random) -> Self {
        let bytes = [1, 2, 4, 4, 4, 8, 16, 32][r.below(8) as usize];
        let units = 4 * WORDS / u64::from(bytes);
        let first = r.below(units);
        let pattern = r.below(6);
        let addresses = std::array::from_fn(|lane| {
            let lane = lane as u64;
            let unit = match pattern {
                0..=2 => first + lane,
                // Halves of a warp read the same, or each one word.
                3 => first + lane % 16,
                4 => first + lane / 16,
                _ => r.next(),
            };
            unit % units * u64::from(bytes)
        });
        let mask = match r.below(3) {
            0 => r.next() as u32 | 1,
            1 => FULL >> r.below(32),
            _ => FULL,
        };
        let strong = r.below(8) == 0;
        Self {
            block: r.below(BLOCKS as u64) as usize,
            warp: r.below(WARPS as u64) as usize,
            op: if strong {
                STRONG
            } else {
                1 + r.below(4) as u32
            },
            writes: r.below(3) == 0,
            mask,
            addresses,
            bytes: if strong { 4.max(bytes) } else { bytes },
        }
    }

    fn agent<'a>(&self, clock: &'a mut WarpClock, launch: &'a LaunchClock) -> Agent<'a> {
        Agent {
            block: 1 + self.block as u64,
            warp: self.warp as u32,
            lane: 0,
            clock,
            launch,
            op: self.op,
            element: 4,
            bytes: self.bytes,
            strong: (self.op == STRONG).then_some(Scope::Gpu),
            non_coherent: false,
            memo: Memo::default(),
        }
    }

    /// Word by word, with an agent of its own for each.
    fn long_way(
        &self,
        shadow: &mut Shadow,
        race: &mut Race,
        clock: &mut WarpClock,
    ) -> Option<(usize, Conflict)> {
        let launch = LaunchClock::default();
        let mut found = None;
        for lane in lanes(self.mask) {
            let at = self.addresses[lane] as u32;
            for word in at / 4..(at + self.bytes).div_ceil(4) {
                let mut agent = self.agent(clock, &launch);
                agent.lane = lane;
                let bytes = match self.bytes {
                    1 => 1 << (at % 4),
                    2 => 3 << (at % 4),
                    _ => 15,
                };
                let conflict = if self.writes {
                    shadow.write(race, &agent, word, bytes)
                } else {
                    shadow.read(race, &mut agent, word, bytes)
                };
                found = found.or(conflict.map(|c| (lane, c)));
            }
        }
        found
    }

    fn as_rows(
        &self,
        shadow: &mut Shadow,
        race: &mut Race,
        clock: &mut WarpClock,
    ) -> Option<(usize, Conflict)> {
        // Strong accesses go lane by lane in any case.
        if self.op == STRONG {
            return self.long_way(shadow, race, clock);
        }
        let launch = LaunchClock::default();
        let mut agent = self.agent(clock, &launch);
        let row = Row {
            mask: self.mask,
            addresses: &self.addresses,
            base: 0,
            bytes: self.bytes,
        };
        if self.writes {
            shadow.write_row(race, &mut agent, &row)
        } else {
            shadow.read_row(race, &mut agent, &row)
        }
    }
}

/// All warps of a block meet.
fn barrier(clocks: &mut [WarpClock]) {
    let mut learned = Learned::default();
    for clock in clocks.iter_mut() {
        clock.meet(FULL);
        learned.join(&clock.learned[0]);
    }
    let times: Vec<u32> = clocks.iter().map(|clock| clock.time).collect();
    for clock in clocks {
        for (known, &time) in clock.near.known.iter_mut().zip(&times) {
            *known = time.max(*known);
        }
        for lane in &mut clock.learned {
            lane.join(&learned);
        }
    }
}

/// A lane learns what one of another block knows.
fn learn(r: &mut Random, clocks: &mut [[WarpClock; WARPS]; BLOCKS]) {
    let (from, warp) = (r.below(BLOCKS as u64) as usize, r.below(WARPS as u64));
    let teller = &mut clocks[from][warp as usize];
    let lane = r.below(LANES as u64) as usize;
    let own = teller.advance();
    let mut known = teller.learned[lane]
        .sure
        .as_deref()
        .cloned()
        .unwrap_or_default();
    known.add(
        1 + from as u64,
        &teller.near.tell(warp as u32, lane, own, u32::MAX),
    );
    let told = Learned {
        sure: Some(Arc::<Knowledge>::new(known)),
        fenced: None,
    };
    let to = &mut clocks[1 - from][r.below(WARPS as u64) as usize];
    to.learn(r.below(LANES as u64) as usize, &told);
}

fn compare(seed: u64, shadows: [Shadow; 2], blocks: u64) -> u32 {
    let mut r = Random(seed);
    let [mut one, mut other] = shadows;
    let (mut race_of_one, mut race_of_other) = (race(), race());
    let mut clocks: [[WarpClock; WARPS]; BLOCKS] = Default::default();
    let mut conflicts = 0;
    for number in 0..60 {
        match r.below(4) {
            0 => barrier(&mut clocks[r.below(blocks) as usize]),
            1 if blocks > 1 => learn(&mut r, &mut clocks),
            1 => clocks[0][0].meet(r.next() as u32 | 1),
            _ => {
                let mut step = Step::random(&mut r);
                step.block %= blocks as usize;
                let clock = &mut clocks[step.block][step.warp];
                let long = step.long_way(&mut one, &mut race_of_one, clock);
                let rows = step.as_rows(&mut other, &mut race_of_other, clock);
                // Where several threads have read, any of them may be named.
                let essence =
                    |found: Option<(usize, Conflict)>| found.map(|(lane, c)| (lane, c.other_wrote));
                assert_eq!(essence(long), essence(rows), "seed {seed}, step {number}");
                conflicts += u32::from(long.is_some());
            }
        }
    }
    conflicts
}

#[test]
fn rows_find_the_conflicts_that_single_words_find() {
    let bytes = 4 * WORDS as usize;
    let mut conflicts = 0;
    for seed in 0..5_000 {
        let shadows = [Shadow::new(bytes), Shadow::new(bytes)];
        conflicts += compare(seed, shadows, BLOCKS as u64);
    }
    assert!(conflicts > 5_000, "{conflicts}");
}

#[test]
fn rows_of_a_block_find_the_conflicts_that_single_words_find() {
    let bytes = 4 * WORDS as usize;
    let mut conflicts = 0;
    for seed in 0..5_000 {
        let shadows = [Shadow::of_block(bytes), Shadow::of_block(bytes)];
        conflicts += compare(seed, shadows, 1);
    }
    assert!(conflicts > 5_000, "{conflicts}");
}
