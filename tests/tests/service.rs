//! A machine as a service of a Debian host: systemd, udev and logind, the package as dpkg installs it, a binding that lasts, a crash, a
//! reload, a sleep of the host, a supervisor that is killed, a machine file that is wrong, the end, and the package's removal.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeSet;
use std::fs;

use common::{
    OrTell, RECOVERY, STEP, assets, carrier_changes, guest_reaches_peer, packages, say, scenario, skipped_without_root,
};
use serde_json::Value;
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::machine::MachineSpec;
use umbra_tests::demo::place::Place;
use umbra_tests::peer::guest_address;

/// The folder of what the machine needs.
const WORK: &str = "/srv/web";

/// The package and the machine's files, each where it belongs; `$IMAGE` is the driver VM's.
const INSTALL: &str =
    "mkdir -p /srv/web && for f in vmlinux guest.cpio $IMAGE; do fetch /share/$f /srv/web/$f || exit 1; done
dpkg -i /share/umbra_*.deb && getent passwd umbra-vm && install -m 644 /share/web.toml /etc/umbra/web.toml";

/// The NIC is the host's, as its driver found it; bound for good it is vfio-pci's, also when it comes back. (udev looks for new rules by
/// itself, but not within three seconds after it last has.)
const BIND: &str = "driver() { basename \"$(readlink /sys/bus/pci/devices/$NIC0/driver)\"; }
udevadm settle; [ $(driver) = e1000e ] || { echo \"the host's driver is $(driver)\"; exit 1; }
umbra bind --persist $NIC0 && [ $(driver) = vfio-pci ] || exit 1
udevadm control --reload; echo 1 > /sys/bus/pci/devices/$NIC0/remove; echo 1 > /sys/bus/pci/rescan
taken() { [ \"$(driver)\" = vfio-pci ]; }
await 20 taken; echo \"after it was away: $(driver)\"
taken || { journalctl -b -u systemd-udevd --no-pager; cat /etc/udev/rules.d/*; false; }";

/// Users of the processes of VMs, by number, one a line.
const USERS: &str = "for p in /proc/[0-9]*; do
  case \"$(tr '\\0' ' ' 2>/dev/null <$p/cmdline)\" in 'umbra vm '*) sed -n 's/^Uid:.//p' $p/status | cut -f1;; esac
done | sort";

/// Sleeps by logind, and is woken by the clock, which is set when all that comes before the sleep is done: there is no limit to that. The
/// sleep is over when its unit is (`activating` until then), on which that which wakes the machine waits.
const SLEEP: &str = "slept() { cat /sys/power/suspend_stats/success; }
unit=systemd-suspend.service; alarm=/run/systemd/system/$unit.d/alarm.conf
mkdir -p ${alarm%/*}
echo \"[Service]
ExecStartPre=/bin/sh -c 'echo +$((15 * UMBRA_PATIENCE)) > /sys/class/rtc/rtc0/wakealarm'\" > $alarm
systemctl daemon-reload
is_over() {
  case $(systemctl show -p ActiveState --value $unit) in failed) ;; inactive) [ $(slept) -gt $before ];; *) false;; esac
}
suspend() {
  before=$(slept)
  systemctl suspend && until is_over; do sleep 0.2; done
}
without_folders suspend || exit 1
rm $alarm; systemctl daemon-reload; journalctl -b -u $unit --no-pager -o cat
[ $(slept) -gt $before ]";

/// The guest powers off when its button is pressed.
const REACTS: &str = "modprobe -a button evdev; mkdir -p /etc/acpi/PWRF; echo '#!/bin/sh
poweroff -f' > /etc/acpi/PWRF/00000080; chmod 755 /etc/acpi/PWRF/00000080; mkdir -p /var/log; (acpid -f >/dev/null 2>&1 &)";

#[test]
fn a_machine_is_a_service_of_a_debian_host() {
    if skipped_without_root() {
        return;
    }
    scenario(|| {
        let assets = assets();
        let debs = tempfile::tempdir().unwrap();
        let [package, _] = packages(debs.path(), "022");
        let image = assets.driver_image(&"e1000e".into()).or_tell();
        let mut spec = BenchSpec::new("service");
        spec.root = Some(assets.debian(&say).or_tell());
        spec.files = vec![package, image.clone()];
        let mut bench = Bench::boot(spec, &assets).or_tell();
        let device = bench.expect("printf %s $NIC0", STEP).or_tell();
        let image = image.file_name().unwrap().to_str().unwrap();
        let machine = MachineSpec::one_guest(&device, image, &format!("{}/24", guest_address(0, 0)));
        fs::write(bench.share().join("web.toml"), machine.to_toml(WORK, WORK)).unwrap();
        let mut place = Place::Bench(Box::new(bench));

        place.expect(&format!("IMAGE={image}\n{INSTALL}"), RECOVERY).or_tell();
        say(place.expect(BIND, STEP).or_tell().trim());
        is_a_service(&mut place);
        outlives_what_the_host_does(&mut place);
        ends_cleanly(&mut place);
    });
}

fn state(place: &mut Place, unit: &str) -> String {
    let script = format!("systemctl show -p ActiveState -p NRestarts -p ExecMainStatus --value {unit} | tr '\\n' ' '");
    place.expect(&script, STEP).or_tell().trim().to_owned()
}

fn await_standby(place: &mut Place) {
    place.expect("umbra wait standby --timeout $((90 * UMBRA_PATIENCE))", RECOVERY).or_tell();
}

/// It starts with the host's means alone; each of its VMs belongs to a user of its own, of the range that the package has set aside.
fn is_a_service(place: &mut Place) {
    place
        .expect("systemctl enable --now umbra@web || { journalctl -b -u umbra@web --no-pager; exit 1; }", RECOVERY)
        .or_tell();
    await_standby(place);
    guest_reaches_peer(place);
    let range = place.expect("grep -h '^umbra-vm:' /etc/subuid /etc/subgid | sort -u | cut -d: -f2", STEP).or_tell();
    let users = place.expect(USERS, STEP).or_tell();
    let users: BTreeSet<u32> = users.lines().map(|user| user.parse().unwrap()).collect();
    let first: u32 = range.trim().parse().unwrap();
    assert!(users.len() == 3 && users.iter().all(|user| (first..first + 65_536).contains(user)), "{users:?}");
    place.expect("sed -i 's/^limit = 5/limit = 6/' /etc/umbra/web.toml && systemctl reload umbra@web", STEP).or_tell();
    place
        .expect(
            "journalctl --sync; journalctl -b -u umbra@web -o cat | grep 'taken over: driver.nic0.restart.limit'",
            STEP,
        )
        .or_tell();
}

fn outlives_what_the_host_does(place: &mut Place) {
    let before = carrier_changes(place);
    place.expect("umbra crash nic0 --kind panic", STEP).or_tell();
    await_standby(place);
    guest_reaches_peer(place);
    place.expect(SLEEP, RECOVERY).or_tell();
    await_standby(place);
    guest_reaches_peer(place);
    assert_eq!(carrier_changes(place), before, "the guest's link never went down");
    let status: Value = serde_json::from_str(&place.expect("umbra status --json", STEP).or_tell()).unwrap();
    let driver = &status["drivers"][0];
    assert_eq!((driver["generation"].as_u64(), driver["failures"].as_u64()), (Some(3), Some(1)), "{driver}");
    say(place.expect("journalctl --sync; journalctl -b -u umbra@web -o cat | grep sle", STEP).or_tell().trim());
}

fn ends_cleanly(place: &mut Place) {
    // The supervisor is killed: systemd starts the machine again, on what is left.
    place.expect("systemctl kill -s KILL --kill-who=main umbra@web", STEP).or_tell();
    let again = "until [ \"$(systemctl show -p NRestarts --value umbra@web)\" = 1 ] && systemctl -q is-active umbra@web; do \
                 sleep 0.5; done";
    place.expect(again, RECOVERY).or_tell();
    guest_reaches_peer(place);

    // A machine file that is wrong is not tried again.
    let wrong = "echo 'guest = 1' > /etc/umbra/wrong.toml; systemctl start umbra@wrong && exit 1
journalctl --sync; journalctl -b -u umbra@wrong -o cat | grep wrong.toml:1:";
    place.expect(wrong, STEP).or_tell();
    assert_eq!(state(place, "umbra@wrong"), "0 78 failed");

    // As systems do it that have a user's session: a guest without one would be killed after the unit's two minutes.
    place.in_guest("web", REACTS, STEP).or_tell();
    place.expect("systemctl stop umbra@web", RECOVERY).or_tell();
    assert_eq!(state(place, "umbra@web"), "1 0 inactive");
    assert_eq!(place.expect(USERS, STEP).or_tell(), "", "processes of VMs are left");

    place
        .expect("systemctl disable umbra@web; rm /etc/umbra/web.toml /etc/umbra/wrong.toml; dpkg -P umbra", STEP)
        .or_tell();
    // The exec server and its functions are the bench's.
    let left = "find / -xdev -iname '*umbra*' -not -path '/srv/*' -not -path /etc/umbra -not -name '*bench*' -not -name umbra-probe; \
                getent passwd umbra-vm; grep umbra-vm /etc/subuid /etc/subgid; true";
    assert_eq!(place.expect(left, STEP).or_tell(), "", "the package has left it");
}
