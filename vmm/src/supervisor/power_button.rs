//! The power button of guests. A guest that still boots loses a press of it: its kernel clears the event before it listens, or nobody has
//! told the kernel yet what to do about it. So the button is pressed again until the guest has ended.

use std::time::Duration;

use super::ids::GuestId;
use super::run::Supervisor;
use crate::base::time::Time;
use crate::wire::messages::ToVm;

/// From the first press to the second. Longer than a guest that runs takes to react, which for most is the last that matters: what is
/// shutting down ignores further presses.
const FIRST_WAIT: Duration = Duration::from_secs(4);
/// Longest time between two presses; the time doubles up to it. A boot of minutes (a file system check) costs some minutes more then.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A button that was pressed.
#[derive(Clone, Copy, Debug)]
pub(super) struct PowerButton {
    due: Time,
    wait: Duration,
}

impl PowerButton {
    /// Pressed at `now` for the first time.
    fn pressed(now: Time) -> Self {
        Self { due: now + FIRST_WAIT, wait: FIRST_WAIT }
    }

    /// Whether it is to be pressed once more at `now`; if so, it was.
    fn is_due(&mut self, now: Time) -> bool {
        if now < self.due {
            return false;
        }
        self.wait = LONGEST_WAIT.min(2 * self.wait);
        self.due = now + self.wait;
        true
    }
}

impl Supervisor {
    /// Presses the power button of guest `n`, now and until it has ended.
    pub(super) fn press_power_button(&mut self, n: GuestId) {
        self.guests[n].button = Some(PowerButton::pressed(Time::now()));
        self.tell_guest(n, &ToVm::PowerButton);
    }

    /// Presses those that are due at `now` once more.
    pub(super) fn press_buttons_again(&mut self, now: Time) {
        for n in self.guests.ids() {
            let guest = &mut self.guests[n];
            if guest.process.is_none() {
                guest.button = None;
            }
            if guest.button.as_mut().is_some_and(|button| button.is_due(now)) {
                tracing::debug!(guest = guest.name, "the power button is pressed again");
                self.tell_guest(n, &ToVm::PowerButton);
            }
        }
    }

    /// When the next one is due.
    pub(super) fn button_due(&self) -> Option<Time> {
        self.guests.iter().filter_map(|guest| guest.button.map(|button| button.due)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_pressed_again_and_again_but_seldom() {
        let mut button = PowerButton::pressed(Time(0));
        let at = |s: u64| Time(s * 1_000_000_000);
        let presses: Vec<u64> = (0..120).filter(|s| button.is_due(at(*s))).collect();
        assert_eq!(presses, [4, 12, 28, 58, 88, 118]);
    }
}
