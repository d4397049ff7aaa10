//! Before the host sleeps driver VMs give their devices up, and after it they are reborn; guests' shadows answer meanwhile
//! (`umbra sleep`, `umbra wake`; [`crate::lifecycle`] has the states).
//!
//! Invariant: who asks for sleep is answered when no process has a device any more, whatever its driver VM is doing; nobody is waited for
//! longer than a process that was killed, or a reset: what the kernel holds for longer is named in the answer, and the host goes on.

use super::front::protocol::Response;
use super::run::Supervisor;
use crate::base::time::{Time, milliseconds};
use crate::lifecycle::{Hold, Input};
use crate::record::events::Event;

/// The sleep that was asked for last, until the host is awake.
#[derive(Debug)]
pub(super) struct Sleep {
    since: Time,
    /// How long it took until all devices were free, ms.
    took: Option<f64>,
    /// Who waits for that.
    clients: Vec<u64>,
}

impl Supervisor {
    /// Has all driver VMs give their devices up, for `client`, who is answered when they have.
    pub(super) fn sleep(&mut self, client: u64) {
        let now = Time::now();
        let sleep = self.sleep.get_or_insert_with(|| Sleep { since: now, took: None, clients: Vec::new() });
        sleep.clients.push(client);
        // The watchdog has to know before the host sleeps, which it may as soon as the client is answered.
        self.show(now);
        for n in self.drivers.ids() {
            self.drive(n, Input::Sleep);
            if self.drivers[n].tries_an_image() {
                // What waits is of the image before. It would take the place of one that has not failed.
                self.drive(n, Input::StandbyUseless);
            }
        }
    }

    /// Answers those who wait for the sleep, when all devices are free, or only what hangs in the kernel holds one.
    pub(super) fn look_at_sleep(&mut self, now: Time) {
        let Some(sleep) = &mut self.sleep else { return };
        let held = |hold: fn(Hold) -> bool| self.drivers.iter().filter(move |driver| hold(driver.lifecycle.hold(now)));
        if held(|hold| matches!(hold, Hold::Held { .. })).next().is_some() {
            return;
        }
        let hung: Vec<_> = held(|hold| hold == Hold::Hangs).map(|driver| driver.name.as_str()).collect();
        let clients = std::mem::take(&mut sleep.clients);
        let response = if hung.is_empty() {
            let took = *sleep.took.get_or_insert_with(|| {
                let ms = milliseconds(now.since(sleep.since));
                self.events.tell(&Event::Asleep { ms });
                ms
            });
            Response::Asleep { ms: took }
        } else {
            let what = format!(
                "the kernel does not let a device of {} go: a killed process, or a reset, hangs there (`dmesg`); all else sleeps",
                hung.join(", ")
            );
            Response::Error { what }
        };
        for client in clients {
            self.clients.answer(client, &response);
        }
    }

    /// When those who wait for the sleep are to hear that a spare's device hangs; of serving ones the life cycle has the time.
    pub(super) fn sleep_due(&self) -> Option<Time> {
        self.sleep.as_ref().filter(|sleep| !sleep.clients.is_empty())?;
        let now = Time::now();
        let until = |hold| if let Hold::Held { until } = hold { until } else { None };
        self.drivers.iter().filter_map(|driver| until(driver.lifecycle.hold(now))).min()
    }

    /// The host is awake: driver VMs begin their next lives. Whether they slept.
    pub(super) fn wake(&mut self) -> bool {
        let Some(sleep) = self.sleep.take() else { return false };
        for client in sleep.clients {
            let what = "the host woke before all devices were free".into();
            self.clients.answer(client, &Response::Error { what });
        }
        self.events.tell(&Event::Awake { ms: milliseconds(Time::now().since(sleep.since)) });
        for n in self.drivers.ids() {
            self.drive(n, Input::Wake);
        }
        true
    }
}
