//! Before the host sleeps driver VMs give their devices up, and after it they are reborn; guests' shadows answer meanwhile
//! (`umbra sleep`, `umbra wake`; [`crate::lifecycle`] has the states).
//!
//! Invariant: who asks for sleep is answered when no process has a device any more, whatever its driver VM is doing; nobody is waited for
//! longer than a process that was killed.

use super::front::protocol::Response;
use super::run::Supervisor;
use crate::base::time::{Time, milliseconds};
use crate::lifecycle::Input;
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
        for n in self.drivers.ids() {
            self.drive(n, Input::Sleep);
        }
    }

    /// Answers those who wait for the sleep, when all devices are free.
    pub(super) fn look_at_sleep(&mut self) {
        let Some(sleep) = &mut self.sleep else { return };
        if !self.drivers.iter().all(|driver| driver.lifecycle.has_let_go()) {
            return;
        }
        let clients = std::mem::take(&mut sleep.clients);
        let ms = match sleep.took {
            Some(ms) => ms,
            None => {
                let ms = milliseconds(Time::now().since(sleep.since));
                sleep.took = Some(ms);
                self.events.tell(&Event::Asleep { ms });
                ms
            }
        };
        for client in clients {
            self.clients.answer(client, &Response::Asleep { ms });
        }
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
