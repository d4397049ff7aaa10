//! Which errors are the disk's own, and what counts as a failure of its driver VM.
//!
//! An error that names its cause is the truth about the disk and goes to the guest. Every other one may be the failing driver's:
//! the life that reported it counts as failed, and the request is issued again in the next life. The second such error of the same
//! request, in another life, goes to the guest. A request that was in flight at three deaths in a row is held for their cause.
//!
//! A range whose error went to the guest so is known to be bad: until it is read or written again, further suspect errors there go to
//! the guest at once, in a life that has worked. So each bad sector costs one life at most, and a guest that reads it again and again
//! costs the others of its controller nothing.
//!
//! What was acknowledged is given up with more reluctance: a suspect error, or a death, counts against a logged range only in a life
//! that *has worked*, that is, has carried out at least one other order. A driver that fails whatever it is asked (a dead controller,
//! a crash soon after each start) would otherwise cost one range every few lives. It ends in a quarantine instead, with the log whole.

use super::bounds::MAX_LOST;
use super::exchange::Access;
use super::identity::Mismatch;
use super::range::{RangeSet, SectorRange};
use crate::Generation;

/// Lives with a suspect error of one request after which it reaches the guest (or marks a logged range lost). One is masked: drivers report
/// `EIO` for a controller that they have lost. A second comes from a disk that has no better word for a bad sector, as SD cards.
pub(super) const STRIKES: u8 = 2;

/// Deaths in a row with the same request in flight after which it is held for their cause. The third is always one that the request
/// was alone in flight at: a replay after a death in replay goes one at a time.
pub(super) const DEATHS: u8 = 3;

/// In how many lives of the driver VM something went wrong. A connection that is made again with the same driver VM is the same life: what
/// it does twice shows nothing of the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    lives: u8,
    last: Option<Generation>,
}

impl Tally {
    /// It went wrong in this life.
    pub(super) fn add(&mut self, life: Generation) {
        if self.last.replace(life) != Some(life) || broken!(ConnectionsCountAsLives) {
            self.lives = self.lives.saturating_add(1);
        }
    }

    /// It went wrong, and the life has no part in it: counts each time.
    pub(super) fn add_once_more(&mut self) {
        self.lives = self.lives.saturating_add(1);
    }

    /// In how many lives.
    pub(super) fn lives(self) -> u8 {
        self.lives
    }
}

/// Ranges of which suspect errors have reached the guest: at most [`MAX_LOST`] of reads and of changes.
#[derive(Clone, Debug, Default)]
pub(super) struct Bad {
    reads: RangeSet,
    changes: RangeSet,
}

impl Bad {
    fn of(&mut self, access: Access) -> &mut RangeSet {
        if access.changes() { &mut self.changes } else { &mut self.reads }
    }

    /// A suspect error of `access` in `range` has reached the guest.
    pub(super) fn add(&mut self, access: Access, range: SectorRange) {
        let set = self.of(access);
        if set.len() < MAX_LOST {
            set.insert(range);
        }
    }

    /// `access` to `range` has worked: what was written can be read as well.
    pub(super) fn worked(&mut self, access: Access, range: SectorRange) {
        self.reads.remove(range);
        if access.changes() {
            self.changes.remove(range);
        }
    }

    /// Whether `access` has failed in a part of `range`, and not worked since.
    pub(super) fn is_known(&mut self, access: Access, range: SectorRange) -> bool {
        self.of(access).overlaps(range)
    }
}

/// The class of an error that a driver VM reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// A sector cannot be read or written (`ENODATA`).
    Medium,
    /// The disk is out of space (`ENOSPC`), as a thin volume may be.
    NoSpace,
    /// The integrity data do not match (`EILSEQ`).
    Protection,
    /// Another host has reserved the disk (`EBADE`).
    Reservation,
    /// The disk does not offer that (`EOPNOTSUPP`).
    Unsupported,
    /// Everything else: disk, cable or driver.
    Suspect,
}

impl ErrorClass {
    /// Of an errno of Linux, as `blk_status_to_errno` gives it (`block/blk-core.c`).
    pub fn of_errno(errno: i32) -> Self {
        match errno {
            61 => Self::Medium,
            28 => Self::NoSpace,
            84 => Self::Protection,
            52 => Self::Reservation,
            95 => Self::Unsupported,
            _ => Self::Suspect,
        }
    }

    /// Whether the driver VM may be the one that fails.
    pub fn is_suspect(self) -> bool {
        self == Self::Suspect
    }
}

/// An answer that cannot be: the driver VM broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Nothing with this tag is in flight: it never was, or was answered before.
    #[error("an answer to order {0}, which is not in flight")]
    UnknownTag(u16),
    /// More or fewer bytes than ordered.
    #[error("an answer of {got} bytes to an order of {expected}")]
    WrongLength {
        /// Bytes ordered.
        expected: u64,
        /// Bytes reported.
        got: u64,
    },
    /// A block for comparison where none was ordered, or the other way round.
    #[error("an answer to order {0} that does not fit what was ordered")]
    WrongKind(u16),
}

/// Why a life counts as failed. The shadow has masked it by then, and reads nothing of it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It broke the protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// It reported an error that may be its own; the request is issued again in the next life.
    #[error("an I/O error without a cause: the driver is suspected")]
    Suspect,
    /// It could not flush: everything that is not stable is written again.
    #[error("a flush failed: nothing since the last one counts as stable")]
    FlushFailed,
    /// Orders in flight, and no answer to any of them.
    #[error("no answer for {ms} ms")]
    Stalled {
        /// Time without an answer, ms.
        ms: u64,
    },
    /// It was to come to rest and did not in time.
    #[error("not at rest in time")]
    NotQuiesced,
    /// Its disk is another one. Nothing was written to it; it must not be tried again.
    #[error(transparent)]
    OtherDisk(#[from] Mismatch),
}

impl Failure {
    /// Whether a next life would meet the same: the disk is to be quarantined, not the driver VM restarted.
    pub fn is_final(self) -> bool {
        matches!(self, Self::OtherDisk(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_that_name_a_cause_are_the_disk_s_own() {
        for (errno, class) in [(61, ErrorClass::Medium), (28, ErrorClass::NoSpace), (95, ErrorClass::Unsupported)] {
            assert_eq!(ErrorClass::of_errno(errno), class);
            assert!(!class.is_suspect());
        }
        // EIO, ETIMEDOUT, ENOLINK, EREMOTEIO, ENODEV, ENOMEM, and what is no errno.
        for errno in [5, 110, 67, 121, 19, 12, 0, -5, i32::MAX] {
            assert_eq!(ErrorClass::of_errno(errno), ErrorClass::Suspect);
        }
    }
}
