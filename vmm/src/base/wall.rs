//! Wall-clock time for people, in UTC, as RFC 3339 writes it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::time::Time;

/// Seconds of a day.
const DAY: u64 = 86_400;

/// The present, as `2025-07-01T12:00:00.123Z`.
pub fn now() -> String {
    format(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// The wall-clock time of the point `at`, as the clocks stand to each other now.
pub fn of(at: Time) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format(now.saturating_sub(Time::now().since(at)))
}

fn format(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = date(seconds / DAY);
    let of_day = seconds % DAY;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since_epoch.subsec_millis())
}

/// Year, month and day of the day number `days` since 1970-01-01 (Gregorian calendar).
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        assert_eq!(format(Duration::ZERO), "1970-01-01T00:00:00.000Z");
        assert_eq!(format(Duration::from_millis(951_868_799_999)), "2000-02-29T23:59:59.999Z");
        assert_eq!(format(Duration::from_secs(1_735_689_600)), "2025-01-01T00:00:00.000Z");
        assert_eq!(format(Duration::from_secs(4_107_542_399)), "2100-02-28T23:59:59.000Z");
    }
}
