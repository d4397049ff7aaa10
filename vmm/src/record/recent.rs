//! The newest events, in memory, for those who ask the running machine.

use std::collections::VecDeque;

/// Most events kept: more than a hundred recoveries.
const KEEP: usize = 2048;

/// Most bytes kept: an event may carry a driver VM's words.
const KEEP_BYTES: usize = 1 << 20;

/// Numbered lines, the newest at the end; the oldest go when there are too many.
#[derive(Debug, Default)]
pub struct RecentEvents {
    lines: VecDeque<(u64, String)>,
    bytes: usize,
}

impl RecentEvents {
    pub(super) fn push(&mut self, seq: u64, line: String) {
        self.bytes += line.len();
        self.lines.push_back((seq, line));
        while self.lines.len() > KEEP || self.bytes > KEEP_BYTES {
            let Some((_, oldest)) = self.lines.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }

    /// The first event behind number `after` that is still here, with its number.
    pub fn after(&self, after: u64) -> Option<(u64, &str)> {
        let n = self.lines.partition_point(|(seq, _)| *seq <= after);
        self.lines.get(n).map(|(seq, line)| (*seq, line.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_and_the_rest_is_found_by_number() {
        let mut past = RecentEvents::default();
        assert_eq!(past.after(0), None);
        for seq in 1..=KEEP as u64 + 5 {
            past.push(seq, format!("event {seq}"));
        }
        assert_eq!(past.after(0), Some((6, "event 6")));
        assert_eq!(past.after(100), Some((101, "event 101")));
        assert_eq!(past.after(KEEP as u64 + 5), None);
    }

    #[test]
    fn large_events_count_by_their_bytes() {
        let mut past = RecentEvents::default();
        for seq in 1..=40 {
            past.push(seq, "x".repeat(KEEP_BYTES / 10));
        }
        assert_eq!(past.after(0).map(|(seq, _)| seq), Some(31));
    }
}
