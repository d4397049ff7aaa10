//! What a lossy disk was told to get wrong: errors by kind of request and range, delays by kind of request.

use std::ops::Range;
use std::time::Duration;

/// A kind of request. Zeroing and trimming count as writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Reads.
    Read,
    /// Writes, zeroing and trimming.
    Write,
    /// Flushes, which have no range: see [`super::LossyDisk::fail`].
    Flush,
}

/// How often an error occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// Once; then the range is sound.
    Once,
    /// Always, until [`super::LossyDisk::heal`].
    Always,
}

#[derive(Clone, Debug)]
struct Fault {
    class: Class,
    sectors: Range<u64>,
    times: Times,
}

/// Errors and delays to come.
#[derive(Debug, Default)]
pub(super) struct Faults {
    errors: Vec<Fault>,
    read: Duration,
    write: Duration,
    flush: Duration,
}

impl Faults {
    /// Requests of this class that touch `sectors` fail.
    pub(super) fn add(&mut self, class: Class, sectors: Range<u64>, times: Times) {
        self.errors.push(Fault { class, sectors, times });
    }

    /// No more errors.
    pub(super) fn clear(&mut self) {
        self.errors.clear();
    }

    /// The range of the first error that a request on `sectors` meets; any error of its class, if it is a flush.
    pub(super) fn meet(&mut self, class: Class, sectors: &Range<u64>) -> Option<Range<u64>> {
        let overlaps = |range: &Range<u64>| range.start < sectors.end && sectors.start < range.end;
        let meets = |fault: &Fault| fault.class == class && (class == Class::Flush || overlaps(&fault.sectors));
        let at = self.errors.iter().position(meets)?;
        let fault = self.errors[at].clone();
        if fault.times == Times::Once {
            self.errors.remove(at);
        }
        Some(fault.sectors)
    }

    /// How long after its arrival a request of this class is served.
    pub(super) fn delay(&self, class: Class) -> Duration {
        match class {
            Class::Read => self.read,
            Class::Write => self.write,
            Class::Flush => self.flush,
        }
    }

    pub(super) fn set_delay(&mut self, class: Class, delay: Duration) {
        *match class {
            Class::Read => &mut self.read,
            Class::Write => &mut self.write,
            Class::Flush => &mut self.flush,
        } = delay;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_met_by_its_class_within_its_range_as_often_as_said() {
        let mut faults = Faults::default();
        faults.add(Class::Read, 8..16, Times::Once);
        faults.add(Class::Write, 8..16, Times::Always);
        assert_eq!(faults.meet(Class::Read, &(0..8)), None);
        assert_eq!(faults.meet(Class::Read, &(16..17)), None);
        assert_eq!(faults.meet(Class::Read, &(15..17)), Some(8..16));
        assert_eq!(faults.meet(Class::Read, &(15..17)), None);
        assert_eq!(faults.meet(Class::Write, &(0..9)), Some(8..16));
        assert_eq!(faults.meet(Class::Write, &(0..9)), Some(8..16));
        assert_eq!(faults.meet(Class::Flush, &(0..0)), None);
        faults.add(Class::Flush, 3..4, Times::Once);
        assert_eq!(faults.meet(Class::Flush, &(0..0)), Some(3..4));
        faults.clear();
        assert_eq!(faults.meet(Class::Write, &(0..9)), None);
    }
}
