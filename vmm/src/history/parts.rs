//! The parts of a recovery: their names, colours and what each means for somebody who reads of them for the first time.

use crate::supervisor::events::Parts;

/// A part of every recovery.
pub(super) struct Part {
    /// Its name, which is its CSS class as well (`p-NAME`).
    pub(super) name: &'static str,
    /// What happens in it.
    pub(super) meaning: &'static str,
    /// Its time in ms.
    pub(super) of: fn(&Parts) -> Option<f64>,
}

/// In the order of their happening.
pub(super) const PARTS: [Part; 9] = [
    Part {
        name: "detect",
        meaning: "from the first sign of the failure until it was certain",
        of: |parts| parts.detect_ms,
    },
    Part {
        name: "fence",
        meaning: "the failed driver VM is killed; nothing of it is left that could touch the device or memory",
        of: |parts| parts.fence_ms,
    },
    Part { name: "reset", meaning: "the device is reset by the host's kernel", of: |parts| parts.reset_ms },
    Part {
        name: "back-off",
        meaning: "a deliberate wait, after several failures in a row",
        of: |parts| parts.back_off_ms,
    },
    Part { name: "boot", meaning: "the kernel of the next driver VM boots", of: |parts| parts.boot_ms },
    Part { name: "probe", meaning: "the driver finds and initialises the device", of: |parts| parts.probe_ms },
    Part { name: "set-up", meaning: "addresses, filters and sizes are set as they were", of: |parts| parts.setup_ms },
    Part {
        name: "link",
        meaning: "the network card negotiates with the other end of its cable",
        of: |parts| parts.link_ms,
    },
    Part {
        name: "replay",
        meaning: "what the guests sent in the meantime goes out, in order; then the guests are live again",
        of: |parts| parts.replay_ms,
    },
];

/// The parts that took time, with their time in ms.
pub(super) fn timed(parts: &Parts) -> Vec<(&'static Part, f64)> {
    let timed = PARTS.iter().filter_map(|part| Some((part, (part.of)(parts)?)));
    timed.filter(|(_, ms)| ms.is_finite() && *ms > 0.0).collect()
}

/// Milliseconds for people.
pub(super) fn duration(ms: f64) -> String {
    match ms {
        ms if ms < 1.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms if ms < 60_000.0 => format!("{:.2} s", ms / 1000.0),
        ms => format!("{:.0} min {:.0} s", (ms / 60_000.0).floor(), ms % 60_000.0 / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_in_their_order_and_without_those_that_took_no_time() {
        let parts = Parts { boot_ms: Some(5.0), detect_ms: Some(1.0), back_off_ms: Some(0.0), ..Parts::default() };
        let names: Vec<_> = timed(&parts).iter().map(|(part, _)| part.name).collect();
        assert_eq!(names, ["detect", "boot"]);
    }

    #[test]
    fn durations_are_readable() {
        assert_eq!(
            [0.25, 15.6, 999.0, 1234.0, 61_000.0].map(duration),
            ["0.2 ms", "16 ms", "999 ms", "1.23 s", "1 min 1 s"]
        );
    }
}
