//! Sizes of memory, as people write them; and what they share with other sizes.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// A size in bytes, a multiple of 4 KiB; in files `"512M"`, `"2G"`, or a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

/// The unit of memory sizes: the page of the architecture.
const PAGE: u64 = 4096;

/// Why a text is no memory size.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MemorySizeError {
    /// No number, or an unknown unit.
    #[error("{0:?} is no memory size (a number of bytes, or one with K, M, G or T behind it, as \"512M\")")]
    Syntax(String),
    /// Does not fit into 64 bits.
    #[error("{0:?} is more memory than can be addressed")]
    TooLarge(String),
    /// Not a whole number of pages.
    #[error("{0} bytes is no multiple of 4 KiB; with a unit it is text, as \"512M\"")]
    NotWholePages(u64),
}

impl MemorySize {
    /// Returns a size of `bytes`.
    ///
    /// # Errors
    ///
    /// `bytes` is no multiple of 4 KiB.
    pub fn from_bytes(bytes: u64) -> Result<Self, MemorySizeError> {
        if bytes.is_multiple_of(PAGE) { Ok(Self(bytes)) } else { Err(MemorySizeError::NotWholePages(bytes)) }
    }
}

impl Default for MemorySize {
    fn default() -> Self {
        Self(512 << 20)
    }
}

impl FromStr for MemorySize {
    type Err = MemorySizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::from_bytes(parse_bytes(text, MemorySizeError::Syntax, MemorySizeError::TooLarge)?)
    }
}

/// The bytes that `text` stands for: a number, or one with K, M, G or T behind it.
///
/// # Errors
/// `syntax` of a text that is none, `too_large` of one that does not fit into 64 bits.
pub(super) fn parse_bytes<E>(
    text: &str,
    syntax: impl Fn(String) -> E,
    too_large: impl Fn(String) -> E,
) -> Result<u64, E> {
    let syntax = || syntax(text.into());
    let shift = match text.bytes().last().ok_or_else(syntax)?.to_ascii_uppercase() {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { text.get(..text.len() - 1).ok_or_else(syntax)? };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(syntax());
    }
    let too_large = || too_large(text.into());
    let number: u64 = digits.parse().map_err(|_| too_large())?;
    number.checked_mul(1 << shift).ok_or_else(too_large)
}

/// Shows `bytes` in the largest unit of which they are a multiple.
pub(super) fn show_bytes(bytes: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return write!(f, "{}{unit}", bytes >> shift);
        }
    }
    write!(f, "{bytes}")
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show_bytes(self.0, f)
    }
}

impl Serialize for MemorySize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_size(deserializer)
    }
}

/// A size that files have as a text with a unit, or as a number of bytes.
pub(super) trait Size: FromStr<Err: fmt::Display> {
    /// What is expected, with an example.
    const EXAMPLE: &'static str;

    /// The size of `bytes`.
    ///
    /// # Errors
    /// They are not a whole number of its units.
    fn of_bytes(bytes: u64) -> Result<Self, Self::Err>;
}

impl Size for MemorySize {
    const EXAMPLE: &'static str = "a memory size, as \"512M\" or a number of bytes";

    fn of_bytes(bytes: u64) -> Result<Self, MemorySizeError> {
        Self::from_bytes(bytes)
    }
}

pub(super) fn deserialize_size<'de, T: Size, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct SizeVisitor<T>(PhantomData<T>);

    impl<T: Size> Visitor<'_> for SizeVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(T::EXAMPLE)
        }

        fn visit_i64<E: Error>(self, bytes: i64) -> Result<T, E> {
            let bytes = u64::try_from(bytes).map_err(|_| E::invalid_value(Unexpected::Signed(bytes), &self))?;
            self.visit_u64(bytes)
        }

        fn visit_u64<E: Error>(self, bytes: u64) -> Result<T, E> {
            T::of_bytes(bytes).map_err(E::custom)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }
    }

    deserializer.deserialize_any(SizeVisitor(PhantomData))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        assert_eq!("512M".parse(), Ok(MemorySize(512 << 20)));
        assert_eq!("2g".parse(), Ok(MemorySize(2 << 30)));
        assert_eq!("8192".parse(), Ok(MemorySize(8192)));
        assert_eq!("4K".parse(), Ok(MemorySize(4096)));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "1.5G", "-1M", "512 M", "512MB", "0x1000", "é", "1é"] {
            assert_eq!(text.parse::<MemorySize>(), Err(MemorySizeError::Syntax(text.into())), "{text:?}");
        }
        assert!(matches!("99999999999999999999".parse::<MemorySize>(), Err(MemorySizeError::TooLarge(_))));
        assert!(matches!("99999999999T".parse::<MemorySize>(), Err(MemorySizeError::TooLarge(_))));
        assert_eq!("5000".parse::<MemorySize>(), Err(MemorySizeError::NotWholePages(5000)));
        assert_eq!("1K".parse::<MemorySize>(), Err(MemorySizeError::NotWholePages(1024)));
    }

    proptest! {
        #[test]
        fn display_and_parse_are_inverse(pages in 0..u64::MAX / PAGE) {
            let size = MemorySize(pages * PAGE);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn parse_never_panics(text in ".*") {
            let _ = text.parse::<MemorySize>();
        }
    }
}
