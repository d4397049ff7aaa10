//! The carrier that agents report, passed on to the guests when it changes, at the rate at most that a bad cable can have.
//!
//! The agent is not trusted: what it repeats is passed over, and one whose carrier changes without end has failed.

use std::time::Duration;

use umbra_driver_vm::protocol::LinkMode;
use umbra_shadow::Generation;

use super::traits;
use crate::base::time::Time;
use crate::lifecycle::{Carrier, Input, NoticedBy, State};
use crate::record::events::Event;
use crate::record::timeline::LifeStage;
use crate::supervisor::driver::EndRef;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::ToVm;

/// Carrier changes tolerated per [`WINDOW`]; a bad cable causes a few per second at most, because each needs an autonegotiation.
const MOST: u32 = 100;
const WINDOW: Duration = Duration::from_secs(10);

/// The reason of failure of an agent that reports more changes.
pub(in crate::supervisor) const FLOOD: &str = "its agent reports a carrier that changes without end";

/// Changes of a carrier within the last [`WINDOW`].
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::supervisor) struct Flaps {
    since: Option<Time>,
    count: u32,
}

impl Flaps {
    /// Counts a change at `now`. Whether there are too many.
    pub(in crate::supervisor) fn count(&mut self, now: Time) -> bool {
        let since = *self.since.get_or_insert(now);
        if now.since(since) >= WINDOW {
            (self.since, self.count) = (Some(now), 0);
        }
        self.count += 1;
        self.count > MOST
    }
}

impl Supervisor {
    pub(in crate::supervisor) fn on_carrier(&mut self, n: DriverId, carrier: Carrier, mode: Option<LinkMode>) {
        let (up, now) = (carrier == Carrier::Up, Time::now());
        let driver = &mut self.drivers[n];
        if driver.lifecycle.carrier() == carrier {
            return;
        }
        let Some(life) = &mut driver.life else { return };
        life.link_mode = mode;
        if life.flaps.count(now) {
            return self.fail_driver(n, NoticedBy::ControlStream, FLOOD, now);
        }
        let state = driver.lifecycle.state();
        let (live, going) = (matches!(state, State::Live { .. }), matches!(state, State::GoingLive { .. }));
        // First, because it may be what going live waits for.
        self.drive(n, Input::Carrier(carrier));
        if up {
            self.stage(n, LifeStage::Carrier, now, String::new());
        }
        if live || going {
            self.tell_carriers(n);
        }
        if live {
            self.events.tell(&Event::Carrier { driver: self.drivers[n].name.clone(), up });
        }
    }

    fn tell_carriers(&mut self, n: DriverId) {
        let Some(generation) = self.drivers[n].lifecycle.generation() else { return };
        for end in self.drivers[n].ends.rows() {
            if traits(end.device.class).has_carrier {
                self.tell_carrier(n, end, generation);
            }
        }
    }

    /// Tells the guest at `end` of the carrier, and of its mode.
    pub(super) fn tell_carrier(&mut self, n: DriverId, EndRef { guest, device }: EndRef, generation: Generation) {
        let driver = &self.drivers[n];
        let up = driver.lifecycle.carrier() == Carrier::Up;
        let mode = driver.life.as_ref().and_then(|life| life.link_mode);
        self.tell_guest(guest, &ToVm::Carrier { device, generation, up, mode });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_cable_is_borne_and_a_flood_is_not() {
        let ms = |n: u64| Time(n * 1_000_000);
        let mut flaps = Flaps::default();
        assert!((0..1000).all(|n| !flaps.count(ms(n * 200))), "five a second");
        let mut flaps = Flaps::default();
        assert_eq!((0..1000).position(|_| flaps.count(ms(1))), Some(100));
    }
}
