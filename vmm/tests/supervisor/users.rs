//! Users of the processes of a machine that root runs.

use std::collections::BTreeSet;
use std::fs;

use umbra_driver_vm::protocol::CrashKind;

use crate::cases::{Case, cases};
use crate::machine::{TestMachine, make};

/// All of them.
pub const ALL: &[Case] = cases![
    each_process_of_a_machine_has_a_user_of_its_own,
    a_machine_whose_users_run_out_runs_on,
    a_machine_that_is_not_confined_stays_its_supervisor_s,
];

/// The host's `umbra-vm`.
const SHARED: u32 = 987;

/// A machine on a host that has set so many numbers aside, from 700 on, with these keys at the top of its file. `None`: this is not root.
fn machine(count: u32, keys: &str) -> Option<TestMachine> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root's processes are handed to others");
        return None;
    }
    let mut machine = make("", "", "");
    let etc = machine.dir.path().join("etc");
    fs::create_dir(&etc).unwrap();
    fs::write(etc.join("passwd"), format!("umbra-vm:x:{SHARED}:{SHARED}::/:/bin/false\n")).unwrap();
    for file in ["subuid", "subgid"] {
        fs::write(etc.join(file), format!("umbra-vm:700:{count}\n")).unwrap();
    }
    let file = machine.dir.path().join("m.toml");
    fs::write(&file, keys.to_owned() + &fs::read_to_string(&file).unwrap()).unwrap();
    machine.start_again();
    Some(machine)
}

/// Users of the guest, of `generation` of the driver VM, which serves, and of the standby behind it; what their processes were told.
fn users(machine: &TestMachine, generation: u32) -> [Option<u32>; 3] {
    let driver = machine.wait_live_with_standby(generation);
    let guest = machine.wait_for_guest("web", "its process", |guest| guest.pid.is_some());
    let standby = driver.standby.unwrap();
    let all = [(guest.pid, guest.uid), (driver.pid, driver.uid), (standby.pid, standby.uid)];
    for (pid, uid) in all {
        let words = fs::read_to_string(format!("/proc/{}/cmdline", pid.unwrap())).unwrap();
        let told = words.split('\0').skip_while(|word| *word != "--user").nth(1).map(ToOwned::to_owned);
        assert_eq!(told, uid.map(|uid| format!("{uid}:{uid}")));
    }
    all.map(|(_, uid)| uid)
}

fn each_process_of_a_machine_has_a_user_of_its_own() {
    let Some(machine) = machine(4, "") else { return };
    let own = |users: [Option<u32>; 3]| {
        let own: BTreeSet<_> = users.into_iter().flatten().filter(|uid| (700..704).contains(uid)).collect();
        assert_eq!(own.len(), 3, "{users:?}");
        users
    };
    let before = own(users(&machine, 1));
    machine.crash(CrashKind::Panic);
    let after = own(users(&machine, 2));
    assert_eq!(after[..2], [before[0], before[2]], "the standby serves");
    machine.stop();
}

fn a_machine_whose_users_run_out_runs_on() {
    let Some(machine) = machine(2, "") else { return };
    assert_eq!(users(&machine, 1), [Some(700), Some(701), Some(SHARED)]);
    machine.crash(CrashKind::Panic);
    assert_eq!(users(&machine, 2)[..2], [Some(700), Some(SHARED)]);
    machine.stop();
}

fn a_machine_that_is_not_confined_stays_its_supervisor_s() {
    let Some(machine) = machine(4, "confine = \"log\"\n") else { return };
    assert_eq!(users(&machine, 1), [None; 3]);
    machine.stop();
}
