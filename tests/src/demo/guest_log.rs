//! What the guest itself noticed: its kernel log and the carrier's change count, before and after.

use std::time::Duration;

use super::DemoError;
use super::place::Place;

/// Words that a kernel log must not have gained: virtio resets, link changes, driver errors, watchdogs, sound, requests to disks.
const UNCLEAN: [&str; 18] = [
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
    "snd",
    "alsa",
    "pcm",
    "underrun",
    "blk_update_request",
    "blocked for more than",
];

/// The guest's state of knowledge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestLog {
    /// Lines of the kernel's log.
    pub lines: Vec<String>,
    /// Carrier changes; none without a NIC.
    pub carrier_changes: u64,
}

impl GuestLog {
    /// Reads it.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn read(place: &mut Place, guest: &str) -> Result<Self, DemoError> {
        let script = "dmesg; echo; cat /sys/class/net/e*/carrier_changes 2>/dev/null || echo 0";
        Ok(Self::parse(&place.in_guest(guest, script, Duration::from_secs(60))?))
    }

    fn parse(text: &str) -> Self {
        let (log, changes) = text.trim_end().rsplit_once('\n').unwrap_or_default();
        let lines = log.lines().filter(|line| !line.is_empty()).map(Into::into).collect();
        Self { lines, carrier_changes: changes.trim().parse().unwrap_or(u64::MAX) }
    }

    /// What is new since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            lines: self.lines.iter().skip(before.lines.len()).cloned().collect(),
            carrier_changes: self.carrier_changes.wrapping_sub(before.carrier_changes),
        }
    }

    /// Of a difference: nothing that a network or sound device would have caused.
    pub fn is_clean(&self) -> bool {
        let telling = |line: &&String| {
            let line = line.to_lowercase();
            UNCLEAN.iter().any(|word| line.contains(word))
        };
        self.carrier_changes == 0 && without_clock_warnings(&self.lines).find(telling).is_none()
    }
}

/// What the kernel calls its clock's messages, as "clocksource: Long readout interval, skipping watchdog check".
const CLOCK: &str = "clocksource: ";

/// The lines but for what the kernel says of its own clock (`kernel/time`), warnings with their traces: that comes from an emulated
/// machine, or a slow one, not from a device. They are shown all the same.
fn without_clock_warnings(lines: &[String]) -> impl Iterator<Item = &String> {
    let mut inside = false;
    let next_is_clock = |at: usize| lines.get(at + 1).is_some_and(|line| line.contains(" at kernel/time/"));
    lines.iter().enumerate().filter_map(move |(at, line)| {
        inside |= line.contains("[ cut here ]") && next_is_clock(at);
        let keep = !inside && !line.contains(CLOCK);
        inside &= !line.contains("[ end trace");
        keep.then_some(line)
    })
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
    fn a_warning_about_the_clock_is_no_device() {
        let trace = |place: &str| {
            format!(
                "a\n[ 2.0] ----[ cut here ]----\n[ 2.1] WARNING: CPU: 0 at {place}\n[ 2.2] virtio_net\n[ 2.3] ---[ end trace 0 ]---\n"
            )
        };
        let before = GuestLog::parse("a\n\n2\n");
        let clean = |log: String| GuestLog::parse(&format!("{log}\n2\n")).since(&before).is_clean();
        assert!(clean(trace("kernel/time/hrtimer.c:1781")));
        let slow = "a\n[ 2.0] clocksource: Long readout interval, skipping watchdog check: cs_nsec: 1186709080\n";
        assert!(clean(slow.into()), "a machine that stands still for a second");
        assert!(!clean(trace("net/sched/sch_generic.c:500")));
        assert!(!clean(trace("kernel/time/hrtimer.c:1781") + "[ 3.0] virtio_net: link down\n"));
    }

    #[test]
    fn a_reset_or_a_flap_is_unclean() {
        let before = GuestLog::parse("a\n\n2\n");
        assert!(!GuestLog::parse("a\n[ 5.0] NETDEV WATCHDOG: eth0\n\n2\n").since(&before).is_clean());
        assert!(!GuestLog::parse("a\n\n4\n").since(&before).is_clean());
    }
}
