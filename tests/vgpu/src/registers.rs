//! The registers of one warp in one function: every register holds a value for each of the
//! 32 lanes, and beside it which bytes of which lane nobody has ever defined.
//!
//! Registers are untyped bits, as PTX uses them: a *row* is one 32-bit register of 32 lanes; a
//! 64-bit register is two rows viewed as 32 `u64`; 8- and 16-bit registers take a row with the
//! upper bits zero. Immediates are rows too (written once from the function's template), so an
//! operation never asks what kind of operand it has.

use bytemuck::{Pod, Zeroable};

/// Lanes in a warp.
pub const LANES: usize = 32;
/// All lanes.
pub const FULL: u32 = u32::MAX;

/// One value of 32 bits for each lane.
pub type Lanes = [u32; LANES];
/// One value of 64 bits for each lane.
pub type Lanes64 = [u64; LANES];
/// Bit `lane` of plane `b` is set when byte `b` of that lane's value is undefined.
pub type Undef = [u32; 4];
/// The same for values of 64 bits.
pub type Undef64 = [u32; 8];

/// Nothing is undefined.
pub const DEFINED: Undef = [0; 4];
/// Nothing is undefined.
pub const DEFINED64: Undef64 = [0; 8];

/// A register of up to 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct R32(pub u32);
/// A register of 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct R64(pub u32);
/// A predicate register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pred(pub u32);

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Row([u32; LANES]);

/// The register file of a frame; see the module.
#[derive(Clone)]
pub struct Registers {
    rows: Vec<Row>,
    undef: Vec<Undef>,
    preds: Vec<u32>,
    preds_undef: Vec<u32>,
}

impl Registers {
    /// `rows` rows and `preds` predicates, all undefined.
    pub fn new(rows: usize, preds: usize) -> Self {
        Self {
            rows: vec![Row([0; LANES]); rows],
            undef: vec![[FULL; 4]; rows],
            preds: vec![0; preds],
            preds_undef: vec![FULL; preds],
        }
    }

    /// Bytes this file takes, for limits.
    pub fn size_of(rows: usize, preds: usize) -> usize {
        rows * (size_of::<Row>() + size_of::<Undef>()) + preds * 8
    }

    /// Bytes this file takes.
    pub fn bytes(&self) -> usize {
        Self::size_of(self.rows.len(), self.preds.len())
    }

    /// Feeds all values into a hash.
    pub fn fingerprint(&self, hasher: &mut impl std::hash::Hasher) {
        hasher.write(bytemuck::cast_slice(&self.rows));
        hasher.write(bytemuck::cast_slice(&self.preds));
    }

    /// Appends an undefined row.
    pub fn push_row(&mut self) -> R32 {
        self.rows.push(Row([0; LANES]));
        self.undef.push([FULL; 4]);
        R32(self.rows.len() as u32 - 1)
    }

    /// Appends an undefined predicate.
    pub fn push_pred(&mut self) -> Pred {
        self.preds.push(0);
        self.preds_undef.push(FULL);
        Pred(self.preds.len() as u32 - 1)
    }

    /// Appends a row with the same defined value in every lane.
    pub fn push_constant32(&mut self, value: u32) -> R32 {
        self.rows.push(Row([value; LANES]));
        self.undef.push(DEFINED);
        R32(self.rows.len() as u32 - 1)
    }

    /// Appends two rows with the same defined value in every lane.
    pub fn push_constant64(&mut self, value: u64) -> R64 {
        let at = self.rows.len();
        for _ in 0..2 {
            self.rows.push(Row([0; LANES]));
            self.undef.push(DEFINED);
        }
        *self.row_pair_mut(at) = [value; LANES];
        R64(at as u32)
    }

    /// Appends a predicate that is the same in every lane.
    pub fn push_constant_pred(&mut self, value: bool) -> Pred {
        self.preds.push(if value { FULL } else { 0 });
        self.preds_undef.push(0);
        Pred(self.preds.len() as u32 - 1)
    }

    /// The values of a register.
    #[inline(always)]
    pub fn get32(&self, register: R32) -> &Lanes {
        &self.rows[register.0 as usize].0
    }

    /// The values of a 64-bit register.
    #[inline(always)]
    pub fn get64(&self, register: R64) -> &Lanes64 {
        let at = register.0 as usize;
        let pair: &[Row; 2] = self.rows[at..at + 2]
            .first_chunk()
            .expect("a 64-bit register has two rows");
        bytemuck::cast_ref(pair)
    }

    fn row_pair_mut(&mut self, at: usize) -> &mut Lanes64 {
        let pair: &mut [Row; 2] = self.rows[at..at + 2]
            .first_chunk_mut()
            .expect("a 64-bit register has two rows");
        bytemuck::cast_mut(pair)
    }

    /// Which bytes are undefined.
    #[inline(always)]
    pub fn undef32(&self, register: R32) -> Undef {
        self.undef[register.0 as usize]
    }

    /// Which bytes are undefined.
    #[inline(always)]
    pub fn undef64(&self, register: R64) -> Undef64 {
        let at = register.0 as usize;
        let (lo, hi) = (self.undef[at], self.undef[at + 1]);
        [lo[0], lo[1], lo[2], lo[3], hi[0], hi[1], hi[2], hi[3]]
    }

    /// The lanes in which any byte is undefined.
    #[inline(always)]
    pub fn any_undef32(&self, register: R32) -> u32 {
        let u = &self.undef[register.0 as usize];
        u[0] | u[1] | u[2] | u[3]
    }

    /// The lanes in which any byte is undefined.
    #[inline(always)]
    pub fn any_undef64(&self, register: R64) -> u32 {
        self.any_undef32(R32(register.0)) | self.any_undef32(R32(register.0 + 1))
    }

    /// Writes the lanes of `mask`.
    #[inline(always)]
    pub fn set32(&mut self, register: R32, mask: u32, value: &Lanes, undef: Undef) {
        let at = register.0 as usize;
        let row = &mut self.rows[at].0;
        if mask == FULL {
            *row = *value;
            self.undef[at] = undef;
            return;
        }
        for lane in 0..LANES {
            let keep = (mask >> lane & 1).wrapping_sub(1);
            row[lane] = (row[lane] & keep) | (value[lane] & !keep);
        }
        for (old, new) in self.undef[at].iter_mut().zip(undef) {
            *old = (*old & !mask) | (new & mask);
        }
    }

    /// Writes the lanes of `mask`.
    #[inline(always)]
    pub fn set64(&mut self, register: R64, mask: u32, value: &Lanes64, undef: Undef64) {
        let at = register.0 as usize;
        let row = self.row_pair_mut(at);
        if mask == FULL {
            *row = *value;
        } else {
            for lane in 0..LANES {
                let keep = u64::from(mask >> lane & 1).wrapping_sub(1);
                row[lane] = (row[lane] & keep) | (value[lane] & !keep);
            }
        }
        for half in 0..2 {
            for byte in 0..4 {
                let old = &mut self.undef[at + half][byte];
                *old = (*old & !mask) | (undef[4 * half + byte] & mask);
            }
        }
    }

    /// The lanes in which the predicate is true.
    #[inline(always)]
    pub fn pred(&self, register: Pred) -> u32 {
        self.preds[register.0 as usize]
    }

    /// The lanes in which the predicate is undefined.
    #[inline(always)]
    pub fn pred_undef(&self, register: Pred) -> u32 {
        self.preds_undef[register.0 as usize]
    }

    /// Writes the lanes of `mask`.
    #[inline(always)]
    pub fn set_pred(&mut self, register: Pred, mask: u32, value: u32, undef: u32) {
        let at = register.0 as usize;
        self.preds[at] = (self.preds[at] & !mask) | (value & mask);
        self.preds_undef[at] = (self.preds_undef[at] & !mask) | (undef & mask);
    }
}

/// The undefinedness of a result that depends on every byte of its operands.
#[inline(always)]
pub fn spread(lanes: u32) -> Undef {
    [lanes; 4]
}

/// As [`spread`], for 64 bits.
#[inline(always)]
pub fn spread64(lanes: u32) -> Undef64 {
    [lanes; 8]
}

/// The lanes of a mask, lowest first.
#[inline(always)]
pub fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            lane
        })
    })
}

/// Calls `f` with each lane of a mask, lowest first. Nearly always it is all of them, which needs
/// no looking for the next.
#[inline(always)]
pub fn for_lanes(mask: u32, mut f: impl FnMut(usize)) {
    if mask == FULL {
        (0..LANES).for_each(f);
    } else {
        lanes(mask).for_each(&mut f);
    }
}
