//! What the block splitter reports to the supervisor.

use umbra_shadow::block::{Counts, Mismatch};
use umbra_shadow::{Generation, LinkId};

use super::link::LinkError;

/// A report. None is made of a link that the supervisor gave up itself.
#[derive(Debug)]
pub enum Notice {
    /// The driver VM of this generation has the guest's disk and serves whatever is clear of the replay, which goes on
    /// ([`super::BlockSplitter::shadow`] says how far it is). What was counted since the splitter began to mask.
    Live(Generation, Counts),
    /// This link has ended; the shadow masks.
    Lost(LinkId, LinkError),
    /// This link has ended, because its disk is not the guest's: nothing was written to it, and the next life would bring the same. The
    /// disk is to be quarantined.
    OtherDisk(LinkId, Mismatch),
    /// The end of [`super::BlockSplitter::quiesce`].
    AtRest {
        /// Everything that was acknowledged is on the medium. Otherwise the disk did not come to rest in time, or its driver VM was lost
        /// before: what is not stable stays in the log, for the next life.
        stable: bool,
    },
}

/// Takes notices; it must neither block nor call the splitter.
pub type Listener = Box<dyn FnMut(Notice) + Send>;

/// What was counted from `before` to `now`.
pub(super) fn since(now: Counts, before: Counts) -> Counts {
    Counts {
        kept_in_flight: now.kept_in_flight - before.kept_in_flight,
        rewritten_sectors: now.rewritten_sectors - before.rewritten_sectors,
        flushes: now.flushes - before.flushes,
        own_flushes: now.own_flushes - before.own_flushes,
        failed_flushes: now.failed_flushes - before.failed_flushes,
        masked_errors: now.masked_errors - before.masked_errors,
        failed_requests: now.failed_requests - before.failed_requests,
        lost_sectors: now.lost_sectors - before.lost_sectors,
        orphans: now.orphans - before.orphans,
    }
}
