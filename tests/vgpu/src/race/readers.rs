//! Sets of reads that many words share, each known by a number: a set is one read and the set
//! before it. A warp reads a row, and thirty-two words have the same story; so that they also
//! have the same number, a read's lanes are kept rotated by the number of the word (a row that
//! lane `n` reads at word `n` is lane 0 everywhere), or of the part of it that was read.

use rustc_hash::FxHashMap;

use super::Touch;

/// Reads kept of one word; further readers are forgotten.
const MOST_READERS: u32 = 1 << 12;
/// How far back in a word's reads to look for one of the same warp.
const LOOK_BACK: u32 = 64;
/// Sets of reads kept before the old ones are forgotten.
const MOST_SETS: usize = 1 << 20;

/// One read, or the same by several lanes of a warp, and the reads before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Reader {
    pub(super) before: u32,
    pub(super) block: u64,
    pub(super) warp: u32,
    pub(super) time: u32,
    rotated: u32,
    pub(super) touch: Touch,
}

impl Reader {
    pub(super) fn new(
        before: u32,
        (block, warp, time): (u64, u32, u32),
        lanes: u32,
        word: u32,
        touch: Touch,
    ) -> Self {
        Self {
            before,
            block,
            warp,
            time,
            rotated: lanes.rotate_right(turn(word, touch, lanes)),
            touch,
        }
    }

    /// The lanes that read this word.
    pub(super) fn lanes(&self, word: u32) -> u32 {
        self.rotated
            .rotate_left(turn(word, self.touch, self.rotated))
    }
}

/// How far lanes are rotated: by bytes and halves, four and two lanes to a word; by vectors,
/// several words to a lane.
fn turn(word: u32, touch: Touch, lanes: u32) -> u32 {
    if touch.is_spread() {
        return word.wrapping_mul(lanes.count_ones());
    }
    match touch.bytes().count_ones() {
        1 => word.wrapping_mul(4),
        2 => word.wrapping_mul(2),
        _ => word >> touch.words(),
    }
}

/// A set of reads.
#[derive(Debug)]
struct Set {
    reader: Reader,
    /// How many there are.
    len: u32,
    /// Bits that stand for the reads: where a read's bit is missing, so is the read.
    filter: u64,
}

impl Reader {
    /// Its bit in the filter of a set.
    fn bit(&self) -> u64 {
        let key = u64::from(self.warp) | u64::from(self.time) << 5 | self.block << 31;
        1 << ((key ^ u64::from(self.touch.0) << 17).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
    }
}

/// All sets of reads.
#[derive(Debug, Default)]
pub(super) struct Readers {
    /// Set `n` is number `n - first` here; 0 is the empty set.
    first: u32,
    list: Vec<Set>,
    numbers: FxHashMap<Reader, u32>,
    /// The last questions and their answers, by the first byte read: the next word of the row
    /// asks the same.
    last: [Option<(Reader, u32)>; 4],
}

impl Readers {
    pub(super) fn get(&self, set: u32) -> Option<&Reader> {
        self.set(set).map(|s| &s.reader)
    }

    fn set(&self, set: u32) -> Option<&Set> {
        let at = set.checked_sub(self.first + 1)?;
        self.list.get(at as usize)
    }

    /// The set with one more read, unless it is full or has it already.
    pub(super) fn push(&mut self, reader: Reader) -> u32 {
        let at = reader.touch.bytes().trailing_zeros() as usize & 3;
        if let Some((question, answer)) = self.last[at]
            && question == reader
        {
            return answer;
        }
        let answer = self.find_or_add(reader);
        self.last[at] = Some((reader, answer));
        answer
    }

    fn find_or_add(&mut self, reader: Reader) -> u32 {
        if let Some(&number) = self.numbers.get(&reader) {
            return number;
        }
        let before = self.set(reader.before);
        let (len, filter) = before.map_or((0, 0), |set| (set.len, set.filter));
        if filter & reader.bit() != 0 && self.has(&reader) || len >= MOST_READERS {
            return reader.before;
        }
        if self.list.len() >= MOST_SETS {
            self.first += self.list.len() as u32;
            self.list.clear();
            self.numbers.clear();
        }
        self.list.push(Set {
            reader,
            len: len + 1,
            filter: filter | reader.bit(),
        });
        let number = self.first + self.list.len() as u32;
        self.numbers.insert(reader, number);
        number
    }

    /// Whether one of the last reads before says as much.
    fn has(&self, reader: &Reader) -> bool {
        let mut at = reader.before;
        for _ in 0..LOOK_BACK {
            let Some(other) = self.get(at) else {
                break;
            };
            let same = (other.block, other.warp, other.time, other.touch)
                == (reader.block, reader.warp, reader.time, reader.touch);
            if same && reader.rotated & !other.rotated == 0 {
                return true;
            }
            at = other.before;
        }
        false
    }
}
