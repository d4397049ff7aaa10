//! The rules that the model test breaks on purpose: each must be caught. A thread breaks at most one rule at a time.

use std::cell::Cell;

/// A rule, named by what happens without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::block) enum Rule {
    /// A read may be in flight with a change of the same sectors.
    ReadsPassChanges,
    /// Two changes of the same sectors may be in flight together.
    ChangesPassChanges,
    /// A read does not wait until what it reads is written again.
    ReadsPassTheOwed,
    /// A change is acknowledged when it is handed over.
    ChangesAreDoneWhenHanded,
    /// A change that is done does not enter the log.
    DoneIsNotLogged,
    /// The log keeps what it has where something newer is done.
    TheOldContentStays,
    /// Overwriting the middle of an extent drops what is behind it.
    CutsDropTheRest,
    /// What is behind a cut gets the content of the extent's beginning.
    CutsKeepTheirStart,
    /// A flush removes what was done while it was under way.
    PruneOneEpochMore,
    /// The guest's flush is answered at once.
    FlushIsNotAwaited,
    /// A flush is handed out while something is owed.
    FlushesWhileOwing,
    /// A flush that failed is repeated, without writing anything again.
    FailedFlushesAreRepeated,
    /// What was on the device of a lost life is held to be on the next.
    HereOutlivesTheDevice,
    /// What was in flight when its life was lost is acknowledged.
    InFlightCountsAsDone,
    /// What was written again leaves the log without a flush.
    ReplayIsStable,
    /// Writes under way at the guest's reset are forgotten.
    OrphansAreForgotten,
    /// One part of a request stands for all.
    OnePartIsEnough,
    /// A write is acknowledged before it is stable, although the guest does not flush.
    ThroughIsNotAwaited,
    /// A lost life may still answer.
    TheDeadMayAnswer,
    /// Answers count that came after the device has lost its cache.
    VoidAnswersCount,
    /// What was acknowledged need not be stable before a deliberate reset.
    RestNeedsNoFlush,
    /// After a change that failed, the log is held to be on the device as before.
    FailedChangesLeaveNoTrace,
    /// Each connection with a driver VM counts as a life of it.
    ConnectionsCountAsLives,
    /// An error without a cause goes to the guest the first time.
    SuspectErrorsAreTheDisks,
    /// What cannot be written again is dropped without a word.
    LostInSilence,
    /// A request is acknowledged of which a part was done, and then lost.
    LostPartsCountAsDone,
    /// What could not be written again once is lost.
    OneFailureLoses,
    /// What was in flight at a death is held for its cause.
    OneDeathIsEnough,
    /// The log has no bound.
    NoBound,
    /// A block by which the disk is recognised stays one when it is overwritten.
    SamplesOutliveTheirBlock,
    /// A driver VM does not say that another guest's flush has failed.
    OthersFailInSilence,
    /// A disk is taken whatever it says of itself.
    AnyDiskIsTaken,
}

impl Rule {
    pub(super) const ALL: [Self; 32] = [
        Self::ReadsPassChanges,
        Self::ChangesPassChanges,
        Self::ReadsPassTheOwed,
        Self::ChangesAreDoneWhenHanded,
        Self::DoneIsNotLogged,
        Self::TheOldContentStays,
        Self::CutsDropTheRest,
        Self::CutsKeepTheirStart,
        Self::PruneOneEpochMore,
        Self::FlushIsNotAwaited,
        Self::FlushesWhileOwing,
        Self::FailedFlushesAreRepeated,
        Self::HereOutlivesTheDevice,
        Self::InFlightCountsAsDone,
        Self::ReplayIsStable,
        Self::OrphansAreForgotten,
        Self::OnePartIsEnough,
        Self::ThroughIsNotAwaited,
        Self::TheDeadMayAnswer,
        Self::VoidAnswersCount,
        Self::RestNeedsNoFlush,
        Self::FailedChangesLeaveNoTrace,
        Self::ConnectionsCountAsLives,
        Self::SuspectErrorsAreTheDisks,
        Self::LostInSilence,
        Self::LostPartsCountAsDone,
        Self::OneFailureLoses,
        Self::OneDeathIsEnough,
        Self::NoBound,
        Self::SamplesOutliveTheirBlock,
        Self::OthersFailInSilence,
        Self::AnyDiskIsTaken,
    ];
}

thread_local! {
    static BROKEN: Cell<Option<Rule>> = const { Cell::new(None) };
}

/// Whether `rule` is broken on this thread.
pub(in crate::block) fn is_broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}

/// Whether no rule is broken on this thread.
pub(super) fn is_sound() -> bool {
    BROKEN.get().is_none()
}

/// Breaks a rule on this thread until it is dropped.
pub(super) struct Breaking;

impl Breaking {
    pub(super) fn rule(rule: Rule) -> Self {
        BROKEN.set(Some(rule));
        Self
    }
}

impl Drop for Breaking {
    fn drop(&mut self) {
        BROKEN.set(None);
    }
}
