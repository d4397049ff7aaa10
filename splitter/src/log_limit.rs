//! Log lines that a guest can bring about at will: a few, then a few a minute, so that no guest fills the host's log.

use std::fmt::Arguments;
use std::time::{Duration, Instant};

/// Lines written in a row before lines are left out: enough to see what a broken driver does.
const BURST: u32 = 5;

/// Time after which one more line is allowed.
const EVERY: Duration = Duration::from_secs(20);

/// The allowance of one device.
#[derive(Debug)]
pub struct LogLimit {
    /// Lines that may be written now.
    allowed: u32,
    /// When the allowance began to grow again.
    since: Option<Instant>,
    /// Lines since the last one written.
    left_out: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self { allowed: BURST, since: None, left_out: 0 }
    }
}

impl LogLimit {
    /// Logs a warning, unless there were too many. The next warning that is logged says how many were left out.
    pub fn warn(&mut self, line: Arguments<'_>) {
        match self.take(Instant::now()) {
            Some(0) => tracing::warn!("{line}"),
            Some(left_out) => tracing::warn!("{line} (and {left_out} such lines before, left out)"),
            None => {}
        }
    }

    /// Takes a line off the allowance at `now`: how many were left out before it, or `None` if it is to be left out itself.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let grown = u32::try_from((now - since).as_secs() / EVERY.as_secs()).unwrap_or(u32::MAX);
        if grown > 0 {
            self.allowed = self.allowed.saturating_add(grown).min(BURST);
            self.since = Some(now);
        }
        if self.allowed == 0 {
            self.left_out += 1;
            return None;
        }
        self.allowed -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_count() {
        let (mut limit, start) = (LogLimit::default(), Instant::now());
        let written = (0..1000).filter(|n| limit.take(start + Duration::from_millis(*n)).is_some()).count();
        assert_eq!(written, 5);
        assert_eq!(limit.take(start + EVERY), Some(995));
        assert_eq!(limit.take(start + EVERY), None);
        assert_eq!(limit.take(start + 1000 * EVERY), Some(1));
        let written = (0..1000).filter(|_| limit.take(start + 1000 * EVERY).is_some()).count();
        assert_eq!(written, 4, "no more is saved than the burst");
    }
}
