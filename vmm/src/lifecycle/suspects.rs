//! How much of what was recorded a new life gets, after lives that died while they got it. Each death takes something away: first
//! the logged requests, then everything (a clean start).

use std::collections::BTreeMap;

use super::Endpoint;
use crate::wire::messages::Replay;

/// Lives in a row that died replaying, after which the next one starts clean.
const CLEAN_FROM: u32 = 2;

/// The ends at which lives have died while they replayed, since the last one that went live there.
#[derive(Clone, Debug, Default)]
pub(super) struct Suspects(BTreeMap<Endpoint, Suspect>);

#[derive(Clone, Copy, Debug, Default)]
struct Suspect {
    /// Lives in a row that died.
    lives: u32,
    /// For one of them the replay of the log had begun.
    log: bool,
    /// A clean start because of the last death has not been reported to the guest yet.
    untold: bool,
}

impl Suspect {
    fn is_clean(&self) -> bool {
        self.lives >= CLEAN_FROM
    }
}

impl Suspects {
    /// A life has died with the configuration of `ends` in hand, and with their logs (`log`).
    pub(super) fn died<'a>(&mut self, ends: impl IntoIterator<Item = &'a Endpoint>, log: bool) {
        for end in ends {
            let suspect = self.0.entry(*end).or_default();
            suspect.lives = suspect.lives.saturating_add(1);
            suspect.log |= log;
            suspect.untold = true;
        }
    }

    /// A life went live at `end`, or its guest starts over.
    pub(super) fn clear(&mut self, end: Endpoint) {
        self.0.remove(&end);
    }

    pub(super) fn clear_all(&mut self) {
        self.0.clear();
    }

    /// What the guest's own process is to replay.
    pub(super) fn replay(&self, end: Endpoint) -> Replay {
        match self.0.get(&end) {
            Some(suspect) if suspect.log => Replay::ConfigurationOnly,
            _ => Replay::Everything,
        }
    }

    /// Whether the next life gets nothing of what was recorded at `end`.
    pub(super) fn is_clean(&self, end: Endpoint) -> bool {
        self.0.get(&end).is_some_and(Suspect::is_clean)
    }

    /// The ends that start clean because of a death of which their guests do not know yet. Each death is returned once.
    pub(super) fn tell(&mut self) -> Vec<Endpoint> {
        let clean = self.0.iter_mut().filter(|(_, suspect)| suspect.is_clean());
        clean.filter_map(|(end, suspect)| std::mem::take(&mut suspect.untold).then_some(*end)).collect()
    }
}
