//! The parts of a recovery: their names, colours and what each means for somebody who reads of them for the first time.

use crate::record::parts::RecoveryParts;

/// A part of a recovery.
pub(super) struct Part {
    /// Its name, which is its CSS class as well (`p-NAME`).
    pub(super) name: &'static str,
    /// What happens in it.
    pub(super) meaning: &'static str,
}

/// Those that are known, in the order of their happening.
pub(super) const PARTS: [Part; 10] = [
    Part { name: "detect", meaning: "from the first sign of the failure until it was certain" },
    Part {
        name: "fence",
        meaning: "the failed driver VM is killed; nothing of it is left that could touch the device or memory",
    },
    Part { name: "reset", meaning: "the device is reset by the host's kernel" },
    Part { name: "back-off", meaning: "a deliberate wait, after several failures in a row" },
    Part { name: "boot", meaning: "the kernel of the next driver VM boots" },
    Part { name: "plug", meaning: "the device is put into the next driver VM, which has been waiting for it" },
    Part { name: "probe", meaning: "the driver finds and initialises the device" },
    Part { name: "set-up", meaning: "addresses, filters and sizes are set as they were" },
    Part { name: "link", meaning: "the network card negotiates with the other end of its cable" },
    Part {
        name: "replay",
        meaning: "what the guests sent in the meantime goes out, in order; then the guests are live again",
    },
];

/// The time of the part `name` in ms.
pub(super) fn time_of(parts: &RecoveryParts, name: &str) -> Option<f64> {
    parts.named().into_iter().find(|(have, _)| *have == name)?.1
}

/// The parts that took time, with their time in ms.
pub(super) fn timed(parts: &RecoveryParts) -> Vec<(&'static Part, f64)> {
    let timed = PARTS.iter().filter_map(|part| Some((part, time_of(parts, part.name)?)));
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
        let parts = RecoveryParts {
            boot_ms: Some(5.0),
            detect_ms: Some(1.0),
            back_off_ms: Some(0.0),
            ..RecoveryParts::default()
        };
        let names: Vec<_> = timed(&parts).iter().map(|(part, _)| part.name).collect();
        assert_eq!(names, ["detect", "boot"]);
    }

    #[test]
    fn every_part_that_is_measured_has_a_meaning() {
        for (name, _) in RecoveryParts::default().named() {
            assert!(PARTS.iter().any(|part| part.name == name), "{name}");
        }
    }

    #[test]
    fn durations_are_readable() {
        assert_eq!(
            [0.25, 15.6, 999.0, 1234.0, 61_000.0].map(duration),
            ["0.2 ms", "16 ms", "999 ms", "1.23 s", "1 min 1 s"]
        );
    }
}
