//! What VM processes and agents say, at the point of receipt: nothing is kept that is longer than it may be.
//!
//! Texts stay as they were said, up to their bound; they are made fit for people where they are shown
//! ([`crate::base::untrusted_text`]).

use umbra_driver_vm::protocol::{FromAgent, RxMode};

use crate::base::system_calls;
use crate::base::time::Time;
use crate::base::untrusted_text::{MAX_TEXT, bounded};
use crate::wire::channel::{Error, Incoming};
use crate::wire::messages::{Disconnect, FromVm, LinkEnd, SnapshotNews};
use crate::wire::spawn::VmProcess;

/// Longest text of an agent that is kept, in bytes: a name of a kernel or driver, or a sentence.
const MAX_AGENT_TEXT: usize = 512;

/// Bytes that an agent may say in a second: some hundred messages, where it has five to say and, while a bad cable changes its
/// carrier, ten more.
const AGENT_PER_SECOND: u64 = 64 << 10;

/// Bytes that it may say at once beyond that: more than the buffers on its way hold, which come all together when this process
/// was stopped for a while.
const AGENT_AT_ONCE: u64 = 1 << 20;

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
pub(super) fn hear(process: &VmProcess) -> Result<Incoming<FromVm>, Error> {
    Ok(match process.channel().try_receive_bare()? {
        Incoming::Message(message, none) => {
            Incoming::Message(in_its_life(of_vm(message), (process.started(), Time::now())), none)
        }
        other => other,
    })
}

/// A message whose time is within the life of its process, which is all that is known of the time: one that is made up would make an
/// outage of years.
fn in_its_life(mut message: FromVm, (from, until): (Time, Time)) -> FromVm {
    match &mut message {
        FromVm::Running { at }
        | FromVm::Plugged { at }
        | FromVm::Released { at }
        | FromVm::Panicking { at }
        | FromVm::Panicked { at }
        | FromVm::Ended { at, .. }
        | FromVm::DeviceFailed { at, .. }
        | FromVm::LinkUp { at, .. }
        | FromVm::Lost { at, .. }
        | FromVm::Live { at, .. } => *at = (*at).min(until.0).max(from.0),
        _ => {}
    }
    message
}

/// What an agent says in `line`; the error is a clause for people.
pub(super) fn heard(line: &str) -> Result<FromAgent, String> {
    serde_json::from_str(line).map_err(|error| text(&format!("its agent sent what is no message ({error})")))
}

/// What an agent may still say. One that talks without end would have this process do nothing but listen.
#[derive(Debug)]
pub(super) struct AgentAllowance {
    left: u64,
    /// When it was last reckoned up.
    at: Option<Time>,
}

impl Default for AgentAllowance {
    fn default() -> Self {
        Self { left: AGENT_AT_ONCE, at: None }
    }
}

impl AgentAllowance {
    /// Takes `bytes` that the agent has said by `now` off it.
    ///
    /// # Errors
    /// The agent has said more; a clause for people.
    pub(super) fn take(&mut self, bytes: usize, now: Time) -> Result<(), String> {
        let passed = now.since(self.at.replace(now).unwrap_or(now)).as_millis();
        let grown = u64::try_from(passed).unwrap_or(u64::MAX).saturating_mul(AGENT_PER_SECOND) / 1000;
        let left = self.left.saturating_add(grown).min(AGENT_AT_ONCE).checked_sub(bytes as u64);
        self.left = left.ok_or_else(|| format!("its agent says more than {} KiB a second", AGENT_PER_SECOND >> 10))?;
        Ok(())
    }
}

/// The part of an agent's text that is kept.
pub(super) fn text(said: &str) -> String {
    bounded(said, MAX_AGENT_TEXT)
}

/// That a thread of a VM's process made a system call that it may not make, as a clause.
pub(super) fn confined(thread: &str, call: i64) -> String {
    let call = system_calls::describe(call);
    format!("its process was ended by its confinement: the thread {thread} made the system call {call}")
}

fn of_vm(mut message: FromVm) -> FromVm {
    match &mut message {
        FromVm::Ended { registers, .. } => cut(registers, MAX_REGISTERS),
        FromVm::DeviceFailed { device, what, .. } => {
            cut(device, MAX_TEXT);
            cut(what, MAX_TEXT);
        }
        FromVm::Failed { what, .. } => cut(what, MAX_TEXT),
        FromVm::WantTap { interface } => cut(interface, MAX_TEXT),
        FromVm::Confined { thread, .. } => cut(thread, MAX_TEXT),
        FromVm::Tap { interface, news, .. } => {
            cut(interface, MAX_TEXT);
            cut(news, MAX_TEXT);
        }
        FromVm::Lost {
            cause: LinkEnd::Stalled(what) | LinkEnd::Broken(what) | LinkEnd::Suspect(what) | LinkEnd::OtherDisk(what),
            ..
        }
        | FromVm::Disconnected { why: Disconnect::NoAnswer(what), .. } => cut(what, MAX_TEXT),
        FromVm::Snapshot { news: SnapshotNews::Refused(why) | SnapshotNews::NotTaken(why) } => cut(why, MAX_TEXT),
        FromVm::Disk { news: what, .. } | FromVm::Resized { result: Err(what), .. } => cut(what, MAX_TEXT),
        FromVm::RxMode { mode, .. } => limit_mode(mode),
        FromVm::Pace { steps, .. } => {
            steps.out.truncate(MAX_STEPS);
            steps.into.truncate(MAX_STEPS);
        }
        FromVm::Running { .. }
        | FromVm::Plugged { .. }
        | FromVm::Released { .. }
        | FromVm::Panicking { .. }
        | FromVm::Panicked { .. }
        | FromVm::LinkUp { .. }
        | FromVm::Vcpus(_)
        | FromVm::Status { .. }
        | FromVm::Live { .. }
        | FromVm::SameNetwork { .. }
        | FromVm::ForeignAddress { .. }
        | FromVm::Offloads { .. }
        | FromVm::AtRest { .. }
        | FromVm::Resized { .. }
        | FromVm::Grown { .. }
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
    fn a_time_that_a_process_makes_up_is_one_of_its_life() {
        let life = (Time(100), Time(200));
        let at = |said| match in_its_life(FromVm::Running { at: said }, life) {
            FromVm::Running { at } => at,
            other => panic!("{other:?}"),
        };
        assert_eq!([0, 99, 100, 150, 200, u64::MAX].map(at), [100, 100, 100, 150, 200, 200]);
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
    fn an_agent_may_say_much_at_once_and_little_for_ever() {
        let at = |ms: u64| Time(ms * 1_000_000);
        let mut allowance = AgentAllowance::default();
        // A day of what an agent says, then what buffers hold, however often this process is stopped for a minute.
        for second in 0..86_400 {
            allowance.take(2000, at(second * 1000)).unwrap();
        }
        for minute in 1441..1500 {
            allowance.take(1 << 20, at(minute * 60_000)).unwrap();
        }
        let start = at(1500 * 60_000);
        let mut said = 0;
        let why = loop {
            if let Err(why) = allowance.take(4096, start) {
                break why;
            }
            said += 4096;
        };
        assert_eq!((said, why.as_str()), (1 << 20, "its agent says more than 64 KiB a second"));
    }

    #[test]
    fn an_agent_s_nonsense_is_bounded() {
        let line = format!("{{\"type\":\"{}\"}}", "\u{9b}".repeat(10_000));
        assert!(heard(&line).unwrap_err().len() <= MAX_AGENT_TEXT);
    }
}
