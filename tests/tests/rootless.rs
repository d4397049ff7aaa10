//! A machine that a user runs without root, with a device that `umbra bind --for` gave them: a panic of its driver is outlived, the device
//! is reset as for root, and the driver VM, its standby and its guest are the user's processes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, guest_reaches_peer, place_with, say, scenario};
use umbra_tests::demo::machine::{Machine, NIC_DRIVER};
use umbra_tests::demo::place::Place;

/// Number of the user `ann`.
const ANN: u32 = 1000;

/// Makes the user and what they run programs with; gives them `/dev/kvm`, as the group `kvm` does elsewhere, and room in the share.
const USER: &str = r#"
echo 'ann:x:1000:1000::/tmp/ann:/bin/sh' >>/etc/passwd; echo 'ann:x:1000:' >>/etc/group
mkdir -p /tmp/ann/run /tmp/ann/snapshots /run/umbra-bench
chmod 700 /tmp/ann/run /tmp/ann/snapshots
chown -R 1000:1000 /tmp/ann /run/umbra-bench
chmod 666 /dev/kvm; chmod 777 .
cat >/tmp/as-ann <<'X'
#!/bin/sh
ulimit -l "${LOCKED:-unlimited}"
exec su -s /bin/sh -c 'export XDG_RUNTIME_DIR=/tmp/ann/run; exec umbra "$@"' -- ann sh "$@"
X
chmod 755 /tmp/as-ann
"#;

#[test]
fn a_user_s_machine_outlives_a_crash_of_its_driver() {
    scenario(run_without_root);
}

/// What `umbra` says to the user: both of its outputs.
fn says(place: &mut Place, arguments: &str) -> String {
    place.run(&format!("/tmp/as-ann {arguments} 2>&1"), STEP).or_tell().stdout
}

fn run_without_root() {
    let (mut place, mut spec) = place_with("rootless", "e1000e");
    place.expect(USER, STEP).or_tell();
    spec.program = "/tmp/as-ann".into();
    spec.snapshot_folder = Some("/tmp/ann/snapshots".into());

    say("a device that is root's");
    let remedy = "sudo umbra bind --for";
    let told = says(&mut place, "doctor $NIC0 --json");
    assert!(told.contains(remedy) && told.contains("is not this user's"), "{told}");
    let told = says(&mut place, "bind --for ann $NIC0");
    assert!(told.contains("only root binds functions") && told.contains("`sudo`"), "{told}");
    let told = place.expect("umbra bind --for nobody-here $NIC0 2>&1 && exit 1 || true", STEP).or_tell();
    assert!(told.contains("no user \"nobody-here\""), "{told}");

    say("given to the user, who runs a machine with it");
    let told = place.expect("umbra bind --for ann $NIC0", STEP).or_tell();
    assert!(told.contains("is ann's"), "{told}");
    let order = place.expect("cat /sys/bus/pci/devices/$NIC0/reset_method", STEP).or_tell();
    assert_eq!(order.trim(), "bus pm");
    let told = says(&mut place, "doctor $NIC0 --json");
    assert!(!told.contains(remedy), "{told}");
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    guest_reaches_peer(&mut place);
    machine.await_standby(NIC_DRIVER, RECOVERY).or_tell();
    let owners = place.expect("for p in $(pidof umbra); do stat -c %u /proc/$p; done", STEP).or_tell();
    // Supervisor, guest, driver VM, standby.
    assert_eq!(owners.lines().filter(|owner| *owner == ANN.to_string()).count(), 4, "{owners}");

    say("a panic");
    place.expect("/tmp/as-ann crash nic0", STEP).or_tell();
    let reset = machine.await_event(RECOVERY, |event| event.event == "device-reset").or_tell();
    assert!(reset.text("method") == "bus" && reset.fields["error"].is_null(), "{reset:?}");
    let live = machine.await_live(NIC_DRIVER, RECOVERY).or_tell();
    say(&format!("away for {:.0} ms", live.number("outage_ms").unwrap_or(f64::NAN)));
    guest_reaches_peer(&mut place);
    let warnings = machine.said();
    assert!(!warnings.contains("ermission"), "{warnings}");
    machine.stop(&mut place).or_tell();

    say("given back");
    place.expect("umbra unbind $NIC0", STEP).or_tell();
    let told = says(&mut place, "doctor $NIC0 --json");
    assert!(told.contains("umbra bind"), "{told}");
}
