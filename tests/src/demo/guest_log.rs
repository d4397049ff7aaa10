//! What the guest itself noticed: its kernel log and the carrier's change count, before and after.

use std::time::Duration;

use super::DemoError;
use super::place::Place;

/// Words that a kernel log must not have gained: virtio resets, link changes, driver errors, watchdogs.
const UNCLEAN: [&str; 12] = [
    "virtio",
    "reset",
    "link",
    "carrier",
    "netdev",
    "watchdog",
    "tx timeout",
    "error",
    "fail",
    "warning",
    "bug:",
    "eth0",
];

/// The guest's state of knowledge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct GuestLog {
    pub(super) lines: Vec<String>,
    pub(super) carrier_changes: u64,
}

impl GuestLog {
    pub(super) fn read(place: &mut Place, guest: &str) -> Result<Self, DemoError> {
        let script = "dmesg; echo; cat /sys/class/net/e*/carrier_changes";
        Ok(Self::parse(&place.in_guest(guest, script, Duration::from_secs(60))?))
    }

    fn parse(text: &str) -> Self {
        let (log, changes) = text.trim_end().rsplit_once('\n').unwrap_or_default();
        let lines = log.lines().filter(|line| !line.is_empty()).map(Into::into).collect();
        Self { lines, carrier_changes: changes.trim().parse().unwrap_or(u64::MAX) }
    }

    /// What is new since `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        Self {
            lines: self.lines.iter().skip(before.lines.len()).cloned().collect(),
            carrier_changes: self.carrier_changes.wrapping_sub(before.carrier_changes),
        }
    }

    /// Of a difference: nothing that a network device would have caused.
    pub(super) fn is_clean(&self) -> bool {
        let telling = |line: &String| {
            let line = line.to_lowercase();
            UNCLEAN.iter().any(|word| line.contains(word))
        };
        self.carrier_changes == 0 && !self.lines.iter().any(telling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_lines_count() {
        let before = GuestLog::parse("[ 1.0] virtio_net virtio0 eth0: up\n[ 1.1] x\n\n2\n");
        let same = GuestLog::parse("[ 1.0] virtio_net virtio0 eth0: up\n[ 1.1] x\n[ 9.0] random: crng init\n\n2\n");
        assert!(same.since(&before).is_clean());
        assert_eq!(same.since(&before).lines, ["[ 9.0] random: crng init"]);
    }

    #[test]
    fn a_reset_or_a_flap_is_unclean() {
        let before = GuestLog::parse("a\n\n2\n");
        assert!(!GuestLog::parse("a\n[ 5.0] NETDEV WATCHDOG: eth0\n\n2\n").since(&before).is_clean());
        assert!(!GuestLog::parse("a\n\n4\n").since(&before).is_clean());
    }
}
