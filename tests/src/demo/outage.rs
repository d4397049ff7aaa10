//! Outages as the peer saw them: gaps between arrivals of ticks. Pure.
//!
//! The gap ends with the first arrival after it, whether that tick was replayed from the splitter's log or sent live:
//! both are frames of the guest that reached the wire. How many came late is said beside it.

use std::net::Ipv4Addr;

use crate::peer::Tick;

/// A tick that took this much longer than the quickest one was held back somewhere.
const LATE_US: i128 = 50_000;

/// The longest silence in a stretch of time.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Outage {
    /// Its length, ms.
    pub gap_ms: f64,
    /// Ticks that arrived after it, late: they were logged and replayed.
    pub late_ticks: u32,
    /// Ticks that never arrived.
    pub lost_ticks: u32,
}

/// The longest gap between two ticks of `from` that both arrived between `begin_us` and `end_us`.
///
/// `None` when fewer than two arrived.
pub fn longest(ticks: &[Tick], from: Ipv4Addr, begin_us: u64, end_us: u64) -> Option<Outage> {
    let inside = |tick: &&Tick| tick.from == from && (begin_us..=end_us).contains(&tick.arrived_us);
    let window: Vec<_> = ticks.iter().filter(inside).collect();
    let delay = |tick: &Tick| i128::from(tick.arrived_us) - i128::from(tick.sent_us);
    let quickest = ticks.iter().filter(|tick| tick.from == from).map(delay).min()?;
    let gap_us = window.windows(2).map(|pair| pair[1].arrived_us - pair[0].arrived_us).max()?;
    let late = window.iter().filter(|tick| delay(tick) - quickest > LATE_US).count();
    let (first, last) = (window.iter().map(|t| t.seq).min()?, window.iter().map(|t| t.seq).max()?);
    let lost = (last - first + 1).saturating_sub(window.len() as u64);
    #[expect(clippy::cast_precision_loss, reason = "a figure for humans")]
    let gap_ms = gap_us as f64 / 1000.0;
    let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Some(Outage { gap_ms, late_ticks: count(late as u64), lost_ticks: count(lost) })
}

/// A time in which the guest ran nothing.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Standstill {
    /// Between two ticks, by the guest's own clock, ms.
    pub ms: f64,
    /// When the second one arrived at the peer, microseconds of its clock.
    pub arrived_us: u64,
}

/// The longest time for which `from` sent no tick, as it says itself: it had no processor, whatever network and sound did.
pub fn longest_standstill(ticks: &[Tick], from: Ipv4Addr) -> Option<Standstill> {
    let mut sent: Vec<_> = ticks.iter().filter(|tick| tick.from == from).collect();
    sent.sort_by_key(|tick| tick.seq);
    let pairs = sent.windows(2).filter(|pair| pair[0].seq + 1 == pair[1].seq);
    let longest = pairs.max_by_key(|pair| pair[1].sent_us.saturating_sub(pair[0].sent_us))?;
    #[expect(clippy::cast_precision_loss, reason = "a figure for humans")]
    let ms = longest[1].sent_us.saturating_sub(longest[0].sent_us) as f64 / 1000.0;
    Some(Standstill { ms, arrived_us: longest[1].arrived_us })
}

/// The middle of some figures (the upper one of two), and the largest.
pub fn median_and_max(figures: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some((*sorted.get(sorted.len() / 2)?, *sorted.last()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    fn tick(seq: u64, sent_ms: u64, arrived_ms: u64) -> Tick {
        Tick { from: GUEST, seq, sent_us: sent_ms * 1000, arrived_us: arrived_ms * 1000 }
    }

    #[test]
    fn the_gap_ends_with_the_first_replayed_tick() {
        // Ticks 3 and 4 were logged and came in a burst at 1500; tick 2 went down with the driver VM.
        let ticks = [tick(0, 0, 1000), tick(1, 10, 1010), tick(3, 30, 1500), tick(4, 40, 1501), tick(5, 510, 1510)];
        let outage = longest(&ticks, GUEST, 0, u64::MAX).unwrap();
        assert_eq!(outage, Outage { gap_ms: 490.0, late_ticks: 2, lost_ticks: 1 });
    }

    #[test]
    fn other_senders_do_not_fill_the_gap() {
        let mut other = tick(9, 0, 1200);
        other.from = Ipv4Addr::new(10, 77, 0, 3);
        let ticks = [tick(0, 0, 1000), other, tick(1, 10, 1500)];
        assert_eq!(longest(&ticks, GUEST, 0, u64::MAX).unwrap().gap_ms, 500.0);
    }

    #[test]
    fn a_standstill_is_what_the_guest_did_not_send() {
        // 1 s of outage, in which the guest went on; then it stood still for 300 ms; tick 5 is lost.
        let ticks = [
            tick(0, 0, 1000),
            tick(1, 10, 2000),
            tick(2, 20, 2000),
            tick(3, 320, 2300),
            tick(4, 330, 2310),
            tick(6, 900, 2800),
        ];
        let found = longest_standstill(&ticks, GUEST).unwrap();
        assert_eq!(found, Standstill { ms: 300.0, arrived_us: 2_300_000 });
        assert_eq!(longest_standstill(&ticks[..1], GUEST), None);
    }

    #[test]
    fn one_tick_makes_no_gap() {
        assert_eq!(longest(&[tick(0, 0, 1000)], GUEST, 0, u64::MAX), None);
        assert_eq!(median_and_max(&[]), None);
        assert_eq!(median_and_max(&[3.0, 1.0, 2.0]), Some((2.0, 3.0)));
    }
}
