//! Work in a test host that may have to be begun again: an emulated one fails by itself now and then (docs/bench.md).

use super::DemoError;
use crate::assets::Say;
use crate::bench::has_nested_kvm;

/// Attempts on an emulated machine; with real KVM the first failure counts.
pub const ATTEMPTS: u32 = 3;

/// How often work is begun on this machine.
pub fn allowed() -> u32 {
    if has_nested_kvm() { 1 } else { ATTEMPTS }
}

/// Does `work`, which is told the number of the attempt, from 1; where the test host is emulated, shows a failure that may be the
/// emulation's, or a result that is not `good`, and does it again, [`ATTEMPTS`] times in all.
///
/// # Errors
/// Those of the last attempt, or one that another attempt would not change.
pub fn in_test_host<T>(
    say: Say<'_>,
    good: impl Fn(&T) -> bool,
    mut work: impl FnMut(u32) -> Result<T, DemoError>,
) -> Result<T, DemoError> {
    let attempts = allowed();
    for attempt in 1..attempts {
        let what = match work(attempt) {
            Ok(result) if !good(&result) => "its result is not as it should be".to_owned(),
            Err(error) if error.may_be_emulation() => format!("failed {}", error.headline()),
            result => return result,
        };
        say(&format!("attempt {attempt} of {attempts} in an emulated test host: {what}; once more"));
    }
    work(attempts)
}
