//! What VM processes and agents say, at the point of receipt: nothing is kept that is longer than it may be.
//!
//! Texts stay as they were said, up to their bound; they are made fit for people where they are shown
//! ([`crate::base::untrusted_text`]).

use umbra_driver_vm::protocol::{FromAgent, RxMode};

use crate::base::untrusted_text::{MAX_TEXT, bounded};
use crate::wire::channel::{Channel, Error, Incoming};
use crate::wire::messages::{Disconnect, FromVm, LinkEnd, SnapshotNews};

/// Longest text of an agent that is kept, in bytes: a name of a kernel or driver, or a sentence.
const MAX_AGENT_TEXT: usize = 512;

/// Longest dump of registers in bytes: that of 64 vCPUs has about 40 KiB.
const MAX_REGISTERS: usize = 64 << 10;

/// Addresses of each kind in a receive mode, as the protocol has it (`umbra_driver_vm::protocol::RxMode`).
const MAX_ADDRESSES: usize = 64;

/// VLANs of a receive mode: all that there are (12 bits).
const MAX_VLANS: usize = 4096;

/// Steps of a device's pace around an outage: a VM's process sends 240 at most.
const MAX_STEPS: usize = 512;

/// Masks that the report of one outage keeps: enough for each guest's device over several lives.
pub(super) const MAX_MASKS: usize = 256;

/// Takes a message of a VM's process, if one waits.
pub(super) fn hear(channel: &Channel) -> Result<Incoming<FromVm>, Error> {
    Ok(match channel.try_receive_bare()? {
        Incoming::Message(message, none) => Incoming::Message(of_vm(message), none),
        other => other,
    })
}

/// What an agent says in `line`; the error is a clause for people.
pub(super) fn heard(line: &str) -> Result<FromAgent, String> {
    serde_json::from_str(line).map_err(|error| text(&format!("its agent sent what is no message ({error})")))
}

/// The part of an agent's text that is kept.
pub(super) fn text(said: &str) -> String {
    bounded(said, MAX_AGENT_TEXT)
}

fn of_vm(mut message: FromVm) -> FromVm {
    match &mut message {
        FromVm::Ended { registers, .. } => cut(registers, MAX_REGISTERS),
        FromVm::DeviceFailed { device, what, .. } => {
            cut(device, MAX_TEXT);
            cut(what, MAX_TEXT);
        }
        FromVm::Failed { what } => cut(what, MAX_TEXT),
        FromVm::Lost { cause: LinkEnd::Stalled(what) | LinkEnd::Broken(what), .. }
        | FromVm::Disconnected { why: Disconnect::NoAnswer(what), .. } => cut(what, MAX_TEXT),
        FromVm::Snapshot { news: SnapshotNews::Refused(why) | SnapshotNews::NotTaken(why) } => cut(why, MAX_TEXT),
        FromVm::RxMode { mode, .. } => limit_mode(mode),
        FromVm::Pace { steps, .. } => {
            steps.out.truncate(MAX_STEPS);
            steps.into.truncate(MAX_STEPS);
        }
        FromVm::Running { .. }
        | FromVm::Plugged { .. }
        | FromVm::Released { .. }
        | FromVm::Panicked { .. }
        | FromVm::LinkUp { .. }
        | FromVm::Status { .. }
        | FromVm::Live { .. }
        | FromVm::SameNetwork { .. }
        | FromVm::ForeignAddress { .. }
        | FromVm::Offloads { .. }
        | FromVm::Lost { cause: LinkEnd::Closed, .. }
        | FromVm::Disconnected { .. }
        | FromVm::Snapshot { .. } => {}
    }
    message
}

fn cut(said: &mut String, most: usize) {
    if said.len() > most {
        *said = bounded(said, most);
    }
}

/// A mode of more addresses than the protocol allows lets more through, as the protocol says.
fn limit_mode(mode: &mut RxMode) {
    if mode.unicast.len() > MAX_ADDRESSES {
        mode.promiscuous = true;
        mode.unicast.truncate(MAX_ADDRESSES);
    }
    if mode.multicast.len() > MAX_ADDRESSES {
        mode.all_multicast = true;
        mode.multicast.truncate(MAX_ADDRESSES);
    }
    mode.vlans = mode.vlans.take().filter(|vlans| vlans.len() <= MAX_VLANS);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use umbra_driver_vm::protocol::{MAX_LINE, Mac, ToAgent};
    use umbra_shadow::{DeviceId, Generation, LinkId};

    use super::*;
    use crate::wire::messages::VmEnd;

    #[test]
    fn what_a_vm_s_process_says_is_bounded() {
        let long = || "\u{1b}".repeat(100_000);
        let (device, link) = (DeviceId::net(0), LinkId::first(Generation::FIRST));
        let lost = of_vm(FromVm::Lost { device, link, at: 1, cause: LinkEnd::Broken(long()) });
        let FromVm::Lost { cause: LinkEnd::Broken(cause), .. } = lost else { panic!("{lost:?}") };
        assert!(cause.len() <= MAX_TEXT && cause.starts_with('\u{1b}'));
        let why = Disconnect::NoAnswer(long());
        let end = of_vm(FromVm::Disconnected { end: 0, link, why });
        assert!(matches!(end, FromVm::Disconnected { why: Disconnect::NoAnswer(what), .. } if what.len() <= MAX_TEXT));
        let end = of_vm(FromVm::Ended { at: 1, how: VmEnd::Reset, registers: long() });
        assert!(matches!(end, FromVm::Ended { registers, .. } if registers.len() <= MAX_REGISTERS));
    }

    #[test]
    fn a_receive_mode_fits_into_the_agent_s_line_whatever_the_guest_asks_for() {
        let mut mode = RxMode {
            unicast: vec![Mac([2; 6]); 5000],
            multicast: vec![Mac([3; 6]); 5000],
            vlans: Some(vec![4095; MAX_VLANS + 1]),
            ..RxMode::default()
        };
        limit_mode(&mut mode);
        assert!(mode.promiscuous && mode.all_multicast && mode.vlans.is_none());
        mode.vlans = Some(vec![4095; MAX_VLANS]);
        limit_mode(&mut mode);
        assert!(serde_json::to_string(&ToAgent::SetRxMode { end: 0, mode }).unwrap().len() < MAX_LINE);
    }

    #[test]
    fn an_agent_s_nonsense_is_bounded() {
        let line = format!("{{\"type\":\"{}\"}}", "\u{9b}".repeat(10_000));
        assert!(heard(&line).unwrap_err().len() <= MAX_AGENT_TEXT);
    }
}
