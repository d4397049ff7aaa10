//! Flushes, and what they prove. An epoch begins when a flush is handed to the driver VM: what was done in earlier epochs is stable
//! when that flush succeeds. At most one flush is in flight; what waits for one when it is handed out shares it.
//!
//! A flush that fails, or that is lost with its life, proves nothing, and neither does a later one about the same data: the device may
//! have dropped them at the first. So the log writes everything again before the next (the rule that NFS servers had to learn: a failed
//! COMMIT changes the write verifier).

use super::errors::{DEATHS, STRIKES, Tally};
use super::queue::RequestId;
use crate::Generation;

/// The time between the hand-over of two flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Epoch(u64);

/// A request that is answered by a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiter {
    /// Which request.
    pub(super) request: RequestId,
    /// Whether it is a flush of the guest; otherwise it is a write that has to be stable before it is acknowledged.
    pub(super) is_flush: bool,
    /// A range of the log was lost while it waited: it fails.
    pub(super) failed: bool,
    strikes: Tally,
    deaths: Tally,
}

impl Waiter {
    pub(super) fn new(request: RequestId, is_flush: bool) -> Self {
        Self { request, is_flush, failed: false, strikes: Tally::default(), deaths: Tally::default() }
    }
}

#[derive(Clone, Debug)]
struct UnderWay {
    covers: Epoch,
    waiters: Vec<Waiter>,
}

/// The flushes of one disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Epochs {
    now: Epoch,
    waiting: Vec<Waiter>,
    under_way: Option<UnderWay>,
    /// A flush died with its life and none has succeeded since.
    again: bool,
    /// When the oldest extent of the log came into it, at the latest, ns.
    oldest: Option<u64>,
    /// The same of what the flush under way does not cover.
    oldest_uncovered: Option<u64>,
    /// A range was lost and no flush of the guest was there to fail for it: the next one does.
    deferred_error: bool,
}

impl Epochs {
    /// The present epoch.
    pub(super) fn now(&self) -> Epoch {
        self.now
    }

    /// A request waits for the next flush.
    pub(super) fn wait(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
    }

    /// Something came into the log at `now` ns.
    pub(super) fn logged(&mut self, now: u64) {
        self.oldest.get_or_insert(now);
        self.oldest_uncovered.get_or_insert(now);
    }

    /// Whether a request waits for the next flush.
    pub(super) fn is_wanted(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether a flush is in flight.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Whether a flush died with its life and is still to be repeated.
    pub(super) fn is_repeated(&self) -> bool {
        self.again
    }

    /// When the oldest extent will be `age` ns old.
    pub(super) fn aged_at(&self, age: u64) -> Option<u64> {
        Some(self.oldest?.saturating_add(age))
    }

    /// A flush is handed to the driver VM, for all that waits.
    pub(super) fn begin(&mut self) {
        self.now.0 += 1;
        let waiters = std::mem::take(&mut self.waiting);
        self.under_way = Some(UnderWay { covers: self.now, waiters });
        self.oldest_uncovered = None;
    }

    /// The flush under way has succeeded. Returns what it covers, and who waited for it.
    pub(super) fn succeed(&mut self) -> Option<(Epoch, Vec<Waiter>)> {
        let UnderWay { covers, waiters } = self.under_way.take()?;
        self.again = false;
        self.oldest = self.oldest_uncovered;
        Some((covers, waiters))
    }

    /// The flush under way has failed in `life`. Returns those for whom it was the second time.
    pub(super) fn fail(&mut self, life: Generation) -> Vec<Waiter> {
        self.put_back(|waiter| waiter.strikes.add(life));
        self.take_those(|waiter| waiter.strikes.lives() >= STRIKES)
    }

    /// The flush under way is answered, but the device lost its cache meanwhile: it proves nothing.
    pub(super) fn void(&mut self) {
        self.put_back(|_| ());
    }

    /// `life` is lost. Returns those whose flush was in flight at too many deaths in a row.
    pub(super) fn lose_life(&mut self, life: Generation) -> Vec<Waiter> {
        self.waiting.iter_mut().for_each(|waiter| waiter.deaths = Tally::default());
        self.again |= self.under_way.is_some();
        self.put_back(|waiter| waiter.deaths.add(life));
        self.take_those(|waiter| waiter.deaths.lives() >= DEATHS)
    }

    /// Those whose flush was in flight wait again, before those who came later.
    fn put_back(&mut self, change: impl Fn(&mut Waiter)) {
        let Some(UnderWay { mut waiters, .. }) = self.under_way.take() else { return };
        waiters.iter_mut().for_each(change);
        waiters.append(&mut self.waiting);
        self.waiting = waiters;
    }

    fn take_those(&mut self, which: impl Fn(&Waiter) -> bool) -> Vec<Waiter> {
        let (taken, left) = self.waiting.drain(..).partition(|waiter| which(waiter));
        self.waiting = left;
        taken
    }

    /// The log is empty: whoever waits for a flush that has not been handed out needs none.
    pub(super) fn take_waiting(&mut self) -> Vec<Waiter> {
        std::mem::take(&mut self.waiting)
    }

    /// Forgets all who wait; returns them.
    pub(super) fn forget_waiters(&mut self) -> Vec<Waiter> {
        let mut waiters = self.under_way.as_mut().map(|flush| std::mem::take(&mut flush.waiters)).unwrap_or_default();
        waiters.append(&mut self.waiting);
        waiters
    }

    /// A range of the log is lost: whoever waits fails, and if no flush of the guest is among them, the next one does.
    pub(super) fn lose_range(&mut self) {
        let under_way = self.under_way.iter_mut().flat_map(|flush| &mut flush.waiters);
        let mut failed_flush = false;
        for waiter in under_way.chain(&mut self.waiting) {
            waiter.failed = true;
            failed_flush |= waiter.is_flush;
        }
        self.deferred_error |= !failed_flush;
    }

    /// Whether the flush that the guest asks for now fails for a lost range; true once for each.
    pub(super) fn take_deferred_error(&mut self) -> bool {
        std::mem::take(&mut self.deferred_error)
    }

    /// The log is empty: nothing has an age, and no flush is to be repeated.
    pub(super) fn emptied(&mut self) {
        (self.oldest, self.oldest_uncovered) = (None, None);
        self.again = false;
    }
}
