//! What a VM's process of [`crate::fake_vm`] says that is too much, too late, or not true.

use umbra_driver_vm::protocol::RxMode;
use umbra_shadow::{DeviceId, Generation, LinkId};
use umbra_vmm::base::time::Time;
use umbra_vmm::wire::channel::Channel;
use umbra_vmm::wire::messages::{FromVm, LinkEnd, PaceSteps, SnapshotNews, VmEnd};

/// More than the socket of a process holds that is not read for a moment.
const MUCH: usize = 2000;

/// A guest's part, when it has gone live for the time `times` with `generation`, by `link`. Whether that is its end.
pub fn guest(
    (cmdline, times): (&str, usize),
    channel: &Channel,
    (device, generation, link): (DeviceId, Generation, Option<LinkId>),
) -> bool {
    let say = |message: &FromVm| channel.send(message, &[]).unwrap();
    if cmdline.contains("boasts ") {
        let steps = PaceSteps { step_ms: 50, before_ms: 2000, out: vec![1; 80], into: vec![1; 80] };
        for _ in 0..MUCH {
            say(&FromVm::Running { at: Time::now().0 });
            say(&FromVm::Pace { device, generation, steps: steps.clone() });
        }
    }
    if let Some(link) = link.filter(|_| cmdline.contains("accuses-long-ago ") && times == 1) {
        say(&FromVm::Lost { device, link, at: 1, cause: LinkEnd::Broken("a rule".into()) });
    }
    if cmdline.contains("talks-and-resets ") && times == 1 {
        for n in 0..MUCH {
            let mode = RxMode { promiscuous: n % 2 == 0, ..RxMode::default() };
            say(&FromVm::RxMode { device, mode });
        }
        say(&FromVm::Ended { at: Time::now().0, how: VmEnd::Reset, registers: String::new() });
        return true;
    }
    false
}

/// A driver VM's part, when it forwards.
pub fn driver(told: impl Fn(&str) -> bool, channel: &Channel) {
    let say = |message: &FromVm| channel.send(message, &[]).unwrap();
    if told("complains") {
        for n in 0..MUCH {
            say(&FromVm::Snapshot { news: SnapshotNews::Refused(format!("it is damaged, {n}")) });
        }
    }
    if told("talks-and-ends") {
        for _ in 0..MUCH {
            say(&FromVm::Snapshot { news: SnapshotNews::There });
        }
        let registers = "rip 2222".into();
        say(&FromVm::Ended { at: Time::now().0, how: VmEnd::Reset, registers });
        std::process::exit(0);
    }
}
