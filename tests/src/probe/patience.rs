//! Time limits in machines under test: the bench tells them how many times slower than the reference they are.

use std::time::Duration;

/// The whole number by which every limit is multiplied; the bench sets it for scripts in the test host and in guests
/// ([`crate::bench::patience::whole_factor`]).
pub const VARIABLE: &str = "UMBRA_PATIENCE";
/// A larger number than this is a mistake of somebody's.
const MOST: u32 = 64;

/// A limit as it is on this machine.
pub fn scaled(limit: Duration) -> Duration {
    let told = std::env::var(VARIABLE).ok().and_then(|text| text.trim().parse().ok());
    limit * told.unwrap_or(1).clamp(1, MOST)
}
