//! Which errors are the disk's own, and what counts as a failure of its driver VM.
//!
//! An error that names its cause is the truth about the disk and goes to the guest. Every other one may be the failing driver's:
//! the life that reported it counts as failed, and the request is issued again in the next life. The second such error of the same
//! request goes to the guest. A request that was in flight at three deaths in a row is held for their cause.
//!
//! What was acknowledged is given up with more reluctance: a suspect error, or a death, counts against a logged range only in a life
//! that *has worked*, that is, has carried out at least one other order. A driver that fails whatever it is asked (a dead controller,
//! a crash soon after each start) would otherwise cost one range every few lives. It ends in a quarantine instead, with the log whole.

use super::identity::Mismatch;

/// Suspect errors of one request, over all lives, that reach the guest (or mark a logged range lost). One is masked: drivers report
/// `EIO` for a controller that they have lost. A second comes from a disk that has no better word for a bad sector, as SD cards.
pub(super) const STRIKES: u8 = 2;

/// Deaths in a row with the same request in flight after which it is held for their cause. The third is always one that the request
/// was alone in flight at: a replay after a death in replay goes one at a time.
pub(super) const DEATHS: u8 = 3;

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
