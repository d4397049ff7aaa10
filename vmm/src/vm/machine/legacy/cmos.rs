//! CMOS memory and the real-time clock (MC146818), as far as a boot reads it: the time of day in BCD, never
//! in the middle of an update. No alarms, no periodic interrupt: the clock's interrupt does not exist.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::vm::machine::layout;

/// Register B: 24-hour clock, BCD.
const STATUS_B: u8 = 0x02;
/// Register D: the memory has power.
const STATUS_D: u8 = 0x80;
/// The top bit of the index masks NMIs on a PC.
const INDEX_MASK: u8 = 0x7f;

/// The chip. All of it is saved: the time is the host's.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cmos {
    index: u8,
    #[serde(with = "memory")]
    memory: [u8; 128],
}

/// Serde knows arrays of up to 32 elements.
mod memory {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(memory: &[u8; 128], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(memory)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 128], D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        bytes.try_into().map_err(|_| D::Error::custom("128 bytes are needed"))
    }
}

impl Default for Cmos {
    fn default() -> Self {
        Self { index: 0, memory: [0; 128] }
    }
}

impl Cmos {
    pub(super) fn read(&self, port: u16) -> u8 {
        if port == layout::CMOS_INDEX {
            return 0xff;
        }
        match self.index {
            index @ (0 | 2 | 4 | 6..=9 | 0x32) => Time::now().register(index),
            0x0a | 0x0c => 0,
            0x0b => STATUS_B,
            0x0d => STATUS_D,
            index => self.memory[usize::from(index)],
        }
    }

    pub(super) fn write(&mut self, port: u16, value: u8) {
        if port == layout::CMOS_INDEX {
            self.index = value & INDEX_MASK;
        } else {
            self.memory[usize::from(self.index)] = value;
        }
    }
}

/// Coordinated universal time.
#[derive(Debug, PartialEq, Eq)]
struct Time {
    year: u64,
    month: u64,
    day: u64,
    /// 1 is Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Time {
    fn now() -> Self {
        Self::from_unix(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
    }

    fn from_unix(seconds: u64) -> Self {
        let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
        let weekday = (days + 4) % 7 + 1;
        let mut year = 1970;
        let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        while days >= 365 + u64::from(leap(year)) {
            days -= 365 + u64::from(leap(year));
            year += 1;
        }
        let february = 28 + u64::from(leap(year));
        let mut month = 1;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
            if days < length {
                break;
            }
            days -= length;
            month += 1;
        }
        Self { year, month, day: days + 1, weekday, hour: rest / 3600, minute: rest / 60 % 60, second: rest % 60 }
    }

    fn register(&self, index: u8) -> u8 {
        let value = match index {
            0 => self.second,
            2 => self.minute,
            4 => self.hour,
            6 => self.weekday,
            7 => self.day,
            8 => self.month,
            9 => self.year % 100,
            _ => self.year / 100,
        };
        u8::try_from(((value / 10) << 4) | (value % 10)).unwrap_or(0xff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_days_are_right() {
        let leap_day = Time::from_unix(1_709_210_096);
        assert_eq!((leap_day.year, leap_day.month, leap_day.day), (2024, 2, 29));
        assert_eq!((leap_day.hour, leap_day.minute, leap_day.second, leap_day.weekday), (12, 34, 56, 5));
        let epoch = Time::from_unix(0);
        assert_eq!((epoch.year, epoch.month, epoch.day, epoch.weekday), (1970, 1, 1, 5));
        let last = Time::from_unix(1_735_689_599);
        assert_eq!((last.year, last.month, last.day), (2024, 12, 31));
    }

    #[test]
    fn registers_are_bcd() {
        let time = Time::from_unix(1_709_210_096);
        assert_eq!([0, 2, 4, 9, 0x32].map(|i| time.register(i)), [0x56, 0x34, 0x12, 0x24, 0x20]);
    }
}
