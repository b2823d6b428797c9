//! Who is to blame when a collective did not finish: from what every rank left behind.

use crate::backend::cuda::abi;
use crate::comm::CommError;

/// Bits of an epoch in a flag (`cuda/collective/collective.cuh`).
pub(crate) const EPOCH_BITS: u32 = 40;

/// How far a flag can be ahead of what is waited for (`cuda/collective/collective.cuh`).
const WINDOW: u64 = 1 << 20;

/// What a kernel wrote for the host when it gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) reason: Reason,
    pub(crate) step: Step,
    pub(crate) block: u32,
    /// The peer waited for.
    pub(crate) peer: usize,
    /// Of the flag waited for.
    pub(crate) epoch: u64,
    /// Of the flag seen; if aborted, 1 + the rank that raised the word.
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
    Left,
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
                abi::kReasonLeft => Reason::Left,
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

    /// Whether a flag is the one waited for, or a later one.
    pub(crate) fn is_met_by(&self, flag: u64) -> bool {
        flag.wrapping_sub(self.epoch) % (1 << EPOCH_BITS) < WINDOW
    }

    fn what(&self) -> &'static str {
        match self.step {
            Step::Barrier => "at the barrier",
            Step::RingMessage => "for a message of the ring",
            Step::RingCredit => "for a free slot of the ring",
        }
    }

    /// What a rank says of it.
    fn words(&self, rank: usize, operation: &str) -> String {
        let (peer, block, epoch) = (self.peer, self.block, self.epoch);
        let waited = std::time::Duration::from_nanos(self.waited_ns);
        let what = self.what();
        let seen = match self.reason {
            Reason::Aborted => format!("ended by rank {}", self.seen.wrapping_sub(1)),
            _ => format!("seen {}", self.seen),
        };
        format!(
            "rank {rank} waited {waited:.3?} for rank {peer} {what} in {operation} (block {block}, \
             epoch {epoch}, {seen})"
        )
    }
}

/// What is known of a rank after a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its context is lost.
    Failed {
        /// What the driver said.
        cause: String,
        /// Whether it was by an access to another device, which may be the one that failed.
        by_link: bool,
    },
    /// A kernel of it gave up.
    GaveUp {
        record: Record,
        /// Whether what it waited for has come meanwhile.
        came_late: bool,
    },
    /// All that it was told to do is done; the epoch that its next collective begins with.
    Done { next_epoch: u64 },
    /// It is still busy with something.
    Busy,
}

/// The error of a group whose ranks are in these states, as `operation` of rank `rank` failed.
///
/// The culprit is a rank whose device failed; one that left; else the one that has come least far:
/// with the lowest epoch, or busy with something else. Where all of these wait, one that waited in
/// vain says for whom. If the flag has come meanwhile, the peer was late; if the peer is beyond the
/// flag, it was written and lost: the link is to blame.
pub(crate) fn diagnose(states: &[State], rank: usize, operation: &'static str) -> CommError {
    let failed = states.iter().enumerate().filter_map(|(rank, s)| match s {
        State::Failed { cause, by_link } => Some((*by_link, rank, cause)),
        _ => None,
    });
    if let Some((_, rank, cause)) = failed.min() {
        return CommError::Poisoned {
            rank,
            cause: cause.clone(),
        };
    }
    let records: Vec<(usize, Record)> = states
        .iter()
        .enumerate()
        .filter_map(|(rank, state)| match state {
            State::GaveUp { record, .. } => Some((rank, *record)),
            _ => None,
        })
        .collect();
    let because = |reason| records.iter().find(move |(_, r)| r.reason == reason);
    if let Some((rank, record)) = because(Reason::OtherCall) {
        return CommError::Mismatch {
            rank: *rank,
            peer: record.peer,
            epoch: record.epoch,
            expected: String::new(),
            found: String::new(),
        };
    }
    let blame = |rank: usize, cause: String| CommError::RankFailed { rank, cause };
    if let Some((rank, record)) = because(Reason::Left) {
        let words = record.words(*rank, operation);
        return blame(record.peer, format!("it left the group: {words}"));
    }
    if let Some((rank, record)) = because(Reason::LaterGeneration) {
        let words = record.words(*rank, operation);
        return blame(*rank, format!("the group was rebuilt without it: {words}"));
    }
    // Epochs that a rank has behind it. Epochs wrap: they are counted from half the range before
    // some record's.
    let origin = records
        .first()
        .map_or(0, |(_, r)| r.epoch.wrapping_sub(1 << (EPOCH_BITS - 1)));
    let behind = |epoch: u64| epoch.wrapping_sub(origin) % (1 << EPOCH_BITS);
    // And whether it has begun the next.
    let progress = |state: &State| match state {
        State::GaveUp { record, .. } => (behind(record.epoch.wrapping_sub(1)), true),
        State::Done { next_epoch } => (behind(*next_epoch), false),
        State::Failed { .. } | State::Busy => (0, false),
    };
    // One that timed out, if any did: a rank that was told waited for less long.
    let witness = records
        .iter()
        .min_by_key(|(_, r)| (r.reason != Reason::Timeout, behind(r.epoch)));
    let words = witness.map_or_else(
        || format!("rank {rank} found {operation} ended"),
        |(rank, record)| record.words(*rank, operation),
    );
    let last = states
        .iter()
        .enumerate()
        .min_by_key(|(_, state)| progress(state));
    match (last, witness) {
        (Some((last, State::Busy)), _) => {
            let why = "it did not come in time, busy with other work";
            blame(last, format!("{why}: {words}"))
        }
        (Some((last, State::Done { .. })), _) => {
            let why = "it did not call the collective in time";
            blame(last, format!("{why}: {words}"))
        }
        (_, Some(&(waiter, record))) if record.reason == Reason::Timeout => {
            let peer = record.peer;
            let came_late = matches!(
                states[waiter],
                State::GaveUp {
                    came_late: true,
                    ..
                }
            );
            // Before a rank waits at a barrier it has told all others.
            let has_told = states.get(peer).is_some_and(|state| {
                progress(state).0 > progress(&states[waiter]).0
                    || matches!(state, State::GaveUp { record: r, .. }
                        if r.step == Step::Barrier && r.epoch == record.epoch)
            });
            match (came_late, has_told) {
                (true, _) => blame(peer, format!("it came too late: {words}")),
                (false, true) => CommError::Link {
                    from: peer,
                    to: waiter,
                    problem: format!(
                        "rank {peer} wrote its flag and rank {waiter} did not see it: {words}"
                    ),
                },
                (false, false) => blame(peer, format!("it did not answer in time: {words}")),
            }
        }
        // Nobody waited in vain: the word was raised by a rank's host.
        (_, Some((_, record))) => {
            let by = (record.seen as usize).checked_sub(1).unwrap_or(rank);
            blame(by, format!("it ended the group: {words}"))
        }
        (_, None) => blame(rank, words),
    }
}

#[cfg(test)]
mod tests {
    use super::{CommError, Reason, Record, State, Step, diagnose};

    fn waits_at(step: Step, peer: usize, epoch: u64, reason: Reason) -> State {
        let record = Record {
            reason,
            step,
            block: 0,
            peer,
            epoch,
            seen: 0,
            waited_ns: 1000,
        };
        let came_late = false;
        State::GaveUp { record, came_late }
    }

    fn waits(peer: usize, epoch: u64, reason: Reason) -> State {
        waits_at(Step::Barrier, peer, epoch, reason)
    }

    fn late(state: State) -> State {
        match state {
            State::GaveUp { record, .. } => State::GaveUp {
                record,
                came_late: true,
            },
            other => other,
        }
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
            waits_at(Step::RingMessage, 3, 15, Reason::Aborted),
            done(10),
            waits_at(Step::RingMessage, 1, 13, Reason::Timeout),
            waits_at(Step::RingMessage, 2, 14, Reason::Timeout),
        ];
        assert_eq!(culprit(&states), 1);
    }

    #[test]
    fn a_busy_rank_and_a_failed_device_are_named() {
        let busy = [waits(1, 11, Reason::Timeout), State::Busy];
        assert_eq!(culprit(&busy), 1);
    }

    #[test]
    fn a_failed_device_is_named_before_those_that_could_not_reach_it() {
        let failed = |cause: &str, by_link| State::Failed {
            cause: cause.into(),
            by_link,
        };
        let states = [
            waits(1, 11, Reason::Timeout),
            failed("NVLINK_UNCORRECTABLE", true),
            failed("ECC_UNCORRECTABLE", false),
        ];
        match diagnose(&states, 0, "all_reduce") {
            CommError::Poisoned { rank, cause } => {
                assert_eq!((rank, cause.as_str()), (2, "ECC_UNCORRECTABLE"));
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_rank_that_came_when_the_others_had_given_up_is_named_and_no_link() {
        use Reason::{Aborted, Timeout};
        // Rank 0 found the word raised at once; its flag reached the others too late.
        let states = [
            waits(1, 11, Aborted),
            late(waits(0, 11, Timeout)),
            late(waits(0, 11, Timeout)),
        ];
        assert_eq!(culprit(&states), 0);
        // It even got through, having found all flags there.
        let states = [done(12), late(waits(0, 11, Timeout))];
        assert_eq!(culprit(&states), 0);
    }

    #[test]
    fn a_rank_that_left_and_one_whose_host_ended_the_group_are_named() {
        let states = [waits(1, 11, Reason::Left), done(10), done(12)];
        assert_eq!(culprit(&states), 1);
        let told = |rank: u64| match waits(0, 11, Reason::Aborted) {
            State::GaveUp { record, came_late } => State::GaveUp {
                record: Record {
                    seen: rank + 1,
                    ..record
                },
                came_late,
            },
            other => other,
        };
        assert_eq!(culprit(&[told(2), told(2), told(2)]), 2);
    }

    #[test]
    fn a_flag_that_was_written_and_not_seen_is_the_links_fault() {
        let peers = [
            done(12),
            waits(0, 13, Reason::Aborted),
            // Both told each other, and neither heard.
            waits(0, 11, Reason::Timeout),
        ];
        for peer in peers {
            let states = [waits(1, 11, Reason::Timeout), peer, done(12)];
            match diagnose(&states, 0, "all_reduce") {
                CommError::Link { from, to, .. } => assert_eq!((from, to), (1, 0)),
                other => panic!("{other}"),
            }
        }
    }
}
