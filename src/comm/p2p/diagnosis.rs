//! Who is to blame when a collective did not finish: from what every rank left behind.

use crate::backend::cuda::abi;
use crate::comm::CommError;

/// Bits of an epoch in a flag (`cuda/collective/collective.cuh`).
pub(crate) const EPOCH_BITS: u32 = 40;

/// What a kernel wrote for the host when it gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) reason: Reason,
    pub(crate) step: Step,
    pub(crate) block: u32,
    /// The peer waited for.
    pub(crate) peer: usize,
    /// Of the flag waited for, and of the one seen.
    pub(crate) epoch: u64,
    pub(crate) seen: u64,
    pub(crate) waited_ns: u64,
}

/// Why it gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Timeout,
    Aborted,
    LaterGeneration,
    OtherCall,
}

/// What it waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Barrier,
    RingMessage,
    RingCredit,
}

impl Record {
    /// Words of a `CollectiveRecord` after its first: `None` if they are none, which no kernel
    /// writes.
    pub(crate) fn from_words(words: [u64; 5]) -> Option<Self> {
        let [reason_step, block_peer, epoch, seen, waited_ns] = words;
        let halves = |word: u64| (word as u32, (word >> 32) as u32);
        let (reason, step) = halves(reason_step);
        let (block, peer) = halves(block_peer);
        Some(Self {
            reason: match reason {
                abi::kReasonTimeout => Reason::Timeout,
                abi::kReasonAborted => Reason::Aborted,
                abi::kReasonGeneration => Reason::LaterGeneration,
                abi::kReasonOtherCall => Reason::OtherCall,
                _ => return None,
            },
            step: match step {
                abi::kStepBarrier => Step::Barrier,
                abi::kStepRingMessage => Step::RingMessage,
                abi::kStepRingCredit => Step::RingCredit,
                _ => return None,
            },
            block,
            peer: peer as usize,
            epoch,
            seen,
            waited_ns,
        })
    }

    fn what(&self) -> &'static str {
        match self.step {
            Step::Barrier => "at the barrier",
            Step::RingMessage => "for a message of the ring",
            Step::RingCredit => "for a free slot of the ring",
        }
    }
}

/// What is known of a rank after a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its device failed; what the driver said.
    Failed(String),
    /// A kernel of it gave up.
    GaveUp(Record),
    /// All that it was told to do is done; the epoch that its next collective begins with.
    Done { next_epoch: u64 },
    /// It is still busy with something.
    Busy,
}

/// The error of a group whose ranks are in these states, as `operation` of rank `rank` failed.
///
/// The culprit is a rank whose device failed; else the one that has come least far: with the
/// lowest epoch, or busy with something else. Where that is a waiting rank itself and the one it
/// waits for has gone on, the flag was written and did not arrive: the link is to blame.
pub(crate) fn diagnose(states: &[State], rank: usize, operation: &'static str) -> CommError {
    let failed = states
        .iter()
        .enumerate()
        .find_map(|(rank, state)| match state {
            State::Failed(cause) => Some((rank, cause)),
            _ => None,
        });
    if let Some((rank, cause)) = failed {
        return CommError::RankFailed {
            rank,
            cause: format!("its device failed: {cause}"),
        };
    }
    let records = || {
        states
            .iter()
            .enumerate()
            .filter_map(|(rank, state)| match state {
                State::GaveUp(record) => Some((rank, *record)),
                _ => None,
            })
    };
    if let Some((rank, record)) = records().find(|(_, r)| r.reason == Reason::OtherCall) {
        return CommError::Mismatch {
            rank,
            peer: record.peer,
            epoch: record.epoch,
            expected: String::new(),
            found: String::new(),
        };
    }
    // Timed out, if any did: a rank that was aborted waited for less long.
    let witness = records()
        .min_by_key(|(_, r)| (r.reason != Reason::Timeout, r.epoch))
        .map(|(rank, record)| {
            format!(
                "rank {rank} waited {:.3?} for rank {} {} in {operation} (block {}, epoch {}, \
                 seen {})",
                std::time::Duration::from_nanos(record.waited_ns),
                record.peer,
                record.what(),
                record.block,
                record.epoch,
                record.seen
            )
        });
    let witness = witness.unwrap_or_else(|| format!("rank {rank} found {operation} aborted"));
    // Epochs that a rank has behind it, and whether it has yet to begin the next. Epochs wrap: they
    // are counted from half the range before some record's.
    let half = 1 << (EPOCH_BITS - 1);
    let origin = records()
        .next()
        .map_or(0, |(_, r)| r.epoch.wrapping_sub(half));
    let behind = |epoch: u64| epoch.wrapping_sub(origin) % (1 << EPOCH_BITS);
    let progress = |state: &State| match state {
        State::GaveUp(record) => (behind(record.epoch.wrapping_sub(1)), true),
        State::Done { next_epoch } => (behind(*next_epoch), false),
        State::Failed(_) | State::Busy => (0, false),
    };
    let last = states
        .iter()
        .enumerate()
        .min_by_key(|(_, state)| progress(state));
    match last {
        Some((culprit, State::Busy)) => CommError::RankFailed {
            rank: culprit,
            cause: format!("it did not come in time, busy with other work: {witness}"),
        },
        Some((culprit, State::Done { .. })) => CommError::RankFailed {
            rank: culprit,
            cause: format!("it did not call the collective in time: {witness}"),
        },
        Some((culprit, State::GaveUp(record))) => {
            let peer_went_on = states
                .get(record.peer)
                .is_some_and(|peer| progress(peer).0 > progress(&states[culprit]).0);
            if peer_went_on || record.reason != Reason::Timeout {
                CommError::Link {
                    from: record.peer,
                    to: culprit,
                    problem: format!(
                        "rank {} went on and rank {culprit} did not see its flag: {witness}",
                        record.peer
                    ),
                }
            } else {
                CommError::RankFailed {
                    rank: record.peer,
                    cause: format!("it did not answer in time: {witness}"),
                }
            }
        }
        _ => CommError::RankFailed {
            rank,
            cause: witness,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{CommError, Reason, Record, State, Step, diagnose};

    fn waits(peer: usize, epoch: u64, reason: Reason) -> State {
        State::GaveUp(Record {
            reason,
            step: Step::Barrier,
            block: 0,
            peer,
            epoch,
            seen: 0,
            waited_ns: 1000,
        })
    }

    fn done(next_epoch: u64) -> State {
        State::Done { next_epoch }
    }

    /// The rank that is blamed.
    fn culprit(states: &[State]) -> usize {
        match diagnose(states, 0, "all_reduce") {
            CommError::RankFailed { rank, .. } => rank,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_rank_that_did_not_call_is_named() {
        use Reason::{Aborted, Timeout};
        let states = [waits(2, 11, Timeout), waits(2, 11, Aborted), done(10)];
        assert_eq!(culprit(&states), 2);
        // It had not even called the one before.
        let states = [done(8), waits(0, 9, Timeout), waits(1, 11, Aborted)];
        assert_eq!(culprit(&states), 0);
        // Epochs wrap.
        let states = [waits(1, 1, Timeout), done((1 << super::EPOCH_BITS) - 2)];
        assert_eq!(culprit(&states), 1);
    }

    #[test]
    fn in_a_ring_a_predecessor_that_waits_itself_is_innocent() {
        // 0 <- 3 <- 2 <- 1, and 1 never called.
        let states = [
            waits(3, 15, Reason::Aborted),
            done(10),
            waits(1, 13, Reason::Timeout),
            waits(2, 14, Reason::Timeout),
        ];
        assert_eq!(culprit(&states), 1);
    }

    #[test]
    fn a_busy_rank_and_a_failed_device_are_named() {
        let busy = [waits(1, 11, Reason::Timeout), State::Busy];
        assert_eq!(culprit(&busy), 1);
        let failed = [
            waits(1, 11, Reason::Timeout),
            done(10),
            State::Failed("700".into()),
        ];
        assert_eq!(culprit(&failed), 2);
    }

    #[test]
    fn a_flag_that_was_written_and_not_seen_is_the_links_fault() {
        for peer in [done(12), waits(0, 13, Reason::Aborted)] {
            let states = [waits(1, 11, Reason::Timeout), peer, done(12)];
            match diagnose(&states, 0, "all_reduce") {
                CommError::Link { from, to, .. } => assert_eq!((from, to), (1, 0)),
                other => panic!("{other}"),
            }
        }
    }
}
