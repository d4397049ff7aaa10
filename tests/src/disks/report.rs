//! The table of `umbra-bench disks`.

use super::trial::ModelResult;
use crate::demo::outage::median_and_max;

impl ModelResult {
    /// The head of the table.
    pub fn head() -> String {
        format!(
            "{:<16} {:>7} {:>8} {:>9} {:>8} {:>6} {:>7} {:>11} {:>11}  {}",
            "model", "crashes", "losses", "lost", "writes", "wrong", "errors", "outage p50", "max", "reset"
        )
    }

    /// Its line. *losses* came early enough to show something, *lost* are sectors; outages are in ms, without planned restarts.
    pub fn line(&self) -> String {
        let losses = self.crashes.iter().filter(|crash| crash.shows && crash.lost > 0).count();
        let lost: u64 = self.crashes.iter().map(|crash| crash.lost).sum();
        let outages: Vec<f64> = self.crashes.iter().filter_map(|crash| crash.outage_ms).collect();
        let (median, max) = median_and_max(&outages).unwrap_or_default();
        let found = self.found.clone().unwrap_or_default();
        let reset = self.crashes.first().map_or("", |crash| crash.reset.as_str());
        let line = format!(
            "{:<16} {:>7} {losses:>8} {lost:>9} {:>8} {:>6} {:>7} {median:>11.0} {max:>11.0}  {reset}",
            self.model,
            self.crashes.len(),
            found.writes,
            found.wrong,
            found.io_errors
        );
        match &self.error {
            Some(error) => format!("{line}  FAILED {error}"),
            None if self.is_sound() => line,
            None => format!("{line}  WRONG {:?} {:?}", found.what, self.guest_log),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disks::{Crashed, Kind};
    use crate::probe::disk::Found;

    #[test]
    fn a_line_says_what_was_lost_and_what_is_wrong() {
        let crash = |shows, outage_ms| Crashed { kind: Kind::Panic, lost: 7, shows, outage_ms, reset: "flr".into() };
        let found = Found { writes: 9, ..Found::default() };
        let crashes = vec![crash(true, Some(500.0)), crash(false, Some(900.0)), crash(true, Some(700.0))];
        let (model, guest_log) = ("nvme".to_owned(), Vec::new());
        let mut result = ModelResult { model, crashes, found: Some(found), guest_log, error: None };
        let fields: Vec<_> = ModelResult::head().split_whitespace().map(str::to_owned).collect();
        assert_eq!(fields.len(), 11, "{fields:?}");
        let line = result.line();
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>(),
            ["nvme", "3", "2", "21", "9", "0", "0", "700", "900", "flr"]
        );
        result.found.as_mut().unwrap().wrong = 1;
        assert!(!result.is_sound() && result.line().contains("WRONG"));
        result.error = Some("it does not boot".into());
        assert!(result.line().ends_with("FAILED it does not boot"));
    }
}
