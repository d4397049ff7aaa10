//! A machine as a service of a Debian host: systemd, udev and logind, the package as dpkg installs it, a binding that lasts, a crash, a
//! reload, a sleep of the host, its reboot, a supervisor that is killed, a machine file that is wrong, the end, and the package's removal.
//! Beside it a user's machine, run without root on a NIC that is theirs after it was away and after the reboot.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

use common::{
    OrTell, RECOVERY, STEP, assets, carrier_changes, guest_reaches_peer, packages, say, scenario, skipped_without_root,
};
use serde_json::Value;
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::machine::{Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::{guest_address, peer_address};

/// The folder of what the machine needs.
const WORK: &str = "/srv/web";

/// The package and the machine's files, each where it belongs; `$IMAGE` is the driver VM's.
const INSTALL: &str =
    "mkdir -p /srv/web && for f in vmlinux guest.cpio $IMAGE; do fetch /share/$f /srv/web/$f || exit 1; done
dpkg -i /share/umbra_*.deb && getent passwd umbra-vm && install -m 644 /share/web.toml /etc/umbra/web.toml";

/// A user as an administrator adds one who is to run machines (docs/passthrough.md), and `as-ann` to be that user.
const USER: &str = r#"useradd -m -s /bin/sh -G kvm ann || exit 1
cat > /usr/local/bin/as-ann <<'X'
#!/bin/sh
install -d -m 700 -o ann /run/user/1000
export XDG_RUNTIME_DIR=/run/user/1000 HOME=/home/ann
ulimit -l unlimited
exec setpriv --reuid ann --regid "$(id -g ann)" --init-groups umbra "$@"
X
chmod 755 /usr/local/bin/as-ann; chmod 777 /share; [ $(id -u ann) = 1000 ]"#;

/// `driver BDF`, the function's driver; `owner BDF`, whose the file of its IOMMU group is; `away`, by which both NICs leave and come back.
const FUNCTIONS: &str = r#"
driver() { basename "$(readlink /sys/bus/pci/devices/$1/driver)"; }
owner() { stat -c %U /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/$1/iommu_group)); }
away() { for nic in $NIC0 $NIC1; do echo 1 > /sys/bus/pci/devices/$nic/remove; done; echo 1 > /sys/bus/pci/rescan; }
drivers() { [ "$(driver $NIC0) $(driver $NIC1)" = "$1" ]; }
owners() { [ "$(owner $NIC0) $(owner $NIC1)" = "root ann" ]; }
tell() { echo "$1: $(driver $NIC0) of $(owner $NIC0), $(driver $NIC1) of $(owner $NIC1)"; }
bound() { await 20 drivers "vfio-pci vfio-pci"; await 20 owners; tell "$1"; drivers "vfio-pci vfio-pci" && owners ||
  { journalctl -b -u systemd-udevd --no-pager; cat /etc/udev/rules.d/*; false; }; }
"#;

/// The NICs are the host's, as its driver found them; bound for good they are vfio-pci's, one of them the user's, also when they come back.
/// (udev looks for new rules by itself, but not within three seconds after it last has.)
const BIND: &str = r#"udevadm settle; drivers "e1000e e1000e" || { tell "at first"; exit 1; }
umbra bind --persist $NIC0 && umbra bind --persist --for ann $NIC1 && bound "bound" || exit 1
udevadm control --reload; away; bound "after they were away""#;

/// A unit before the machine's, which sees what the host's boot has made of the NICs.
const LOOK: &str = r#"cat > /usr/local/bin/look <<X
udevadm settle
for nic in $NIC0 $NIC1; do basename \$(readlink /sys/bus/pci/devices/\$nic/driver); done > /run/look
X
echo '[Unit]
Before=umbra@web.service
[Service]
Type=oneshot
ExecStart=/bin/sh /usr/local/bin/look
[Install]
WantedBy=multi-user.target' > /etc/systemd/system/look.service
systemctl enable look"#;

/// Given back, the user's NIC is the host's, also when it comes back, and the other one is bound as before.
const UNBIND: &str = r#"umbra unbind $NIC1 && [ "$(ls /etc/udev/rules.d)" = 10-umbra-$NIC0.rules ] || { ls /etc/udev/rules.d; exit 1; }
udevadm control --reload; away; await 20 drivers "vfio-pci e1000e"; udevadm settle; drivers "vfio-pci e1000e" ||
  { tell "given back"; exit 1; }"#;

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
        let mut spec = BenchSpec::new("service").nics(&["e1000e", "e1000e"]);
        spec.root = Some(assets.debian(&say).or_tell());
        spec.reboots = true;
        spec.files = vec![package, image.clone()];
        let mut bench = Bench::boot(spec, &assets).or_tell();
        let nics = bench.expect("echo $NIC0 $NIC1", STEP).or_tell();
        let (nic, of_ann) = nics.trim().split_once(' ').unwrap();
        let image = image.file_name().unwrap().to_str().unwrap();
        let machine = MachineSpec::one_guest(nic, image, &format!("{}/24", guest_address(0, 0)));
        fs::write(bench.share().join("web.toml"), machine.to_toml(WORK, WORK)).unwrap();
        let of_ann = MachineSpec {
            name: "ann".into(),
            program: "as-ann".into(),
            guests: vec![("laptop".into(), format!("{}/24", guest_address(1, 0)))],
            snapshots: false,
            standby: "cold".into(),
            ..MachineSpec::one_guest(of_ann, image, "")
        };
        let mut place = Place::Bench(Box::new(bench));

        place.expect(&format!("IMAGE={image}\n{INSTALL}"), RECOVERY).or_tell();
        place.expect(USER, STEP).or_tell();
        say(place.expect(&format!("{FUNCTIONS}{BIND}"), STEP).or_tell().trim());
        is_a_service(&mut place);
        runs_for_a_user(&mut place, &of_ann);
        outlives_what_the_host_does(&mut place);
        outlives_a_reboot(&mut place);
        runs_for_a_user(&mut place, &of_ann);
        place.expect(&format!("{FUNCTIONS}{UNBIND}"), STEP).or_tell();
        ends_cleanly(&mut place);
    });
}

/// A user without root runs a machine on the NIC that is theirs.
fn runs_for_a_user(place: &mut Place, spec: &MachineSpec) {
    place.expect("as-ann doctor $NIC1 && mkdir -p /run/umbra-bench && chmod 1777 /run/umbra-bench", STEP).or_tell();
    let machine = Machine::start(place, spec).or_tell();
    let script = format!("umbra-probe first-answer {} 20", peer_address(1));
    place.in_guest("laptop", &script, STEP).or_tell();
    let owners = "for p in /proc/[0-9]*; do
  case \"$(tr '\\0' ' ' 2>/dev/null <$p/cmdline)\" in 'umbra run '* | 'umbra vm '*) stat -c %U $p;; esac
done";
    let owners = place.expect(owners, STEP).or_tell();
    // Supervisor, guest, driver VM.
    assert_eq!(owners.lines().filter(|owner| *owner == "ann").count(), 3, "{owners}");
    machine.stop(place).or_tell();
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
    let status = status(place);
    let driver = &status["drivers"][0];
    assert_eq!((driver["generation"].as_u64(), driver["failures"].as_u64()), (Some(3), Some(1)), "{driver}");
    say(place.expect("journalctl --sync; journalctl -b -u umbra@web -o cat | grep sle", STEP).or_tell().trim());
}

/// The machine comes back with the host, by itself: its NIC is bound before its unit starts. What it told before is kept.
fn outlives_a_reboot(place: &mut Place) {
    place.in_guest("web", REACTS, STEP).or_tell();
    place.expect(LOOK, STEP).or_tell();
    let Place::Bench(bench) = place else { panic!("a bench") };
    let start = Instant::now();
    bench.reboot("systemctl reboot").or_tell();
    say(&format!("rebooted within {:.0} s", start.elapsed().as_secs_f64()));
    assert_eq!(place.expect("cat /run/look", STEP).or_tell(), "vfio-pci\nvfio-pci\n", "as the unit started");
    say(place.expect(&format!("{FUNCTIONS}bound 'after the reboot'"), STEP).or_tell().trim());
    guest_reaches_peer(place);
    await_standby(place);
    assert_eq!(state(place, "umbra@web"), "0 0 active");
    place.expect("umbra events --run 1 | grep '\"event\":\"driver-failed\"'", STEP).or_tell();
}

fn status(place: &mut Place) -> Value {
    serde_json::from_str(&place.expect("umbra status --json", STEP).or_tell()).unwrap()
}

/// Each VM's process is in a control group of its own, also after its supervisor was killed; the one that takes more memory than it may
/// dies alone, and is reborn with what the machine file says by now.
fn has_bounds(place: &mut Place) {
    let share = "sed -i '/^\\[driver.nic0\\]/a cpu_max = \"400%\"' /etc/umbra/web.toml && systemctl reload umbra@web";
    place.expect(share, STEP).or_tell();
    await_standby(place);
    let (before, changes) = (status(place), carrier_changes(place));
    let (guest, driver) = (&before["guests"][0], &before["drivers"][0]);
    let service = "/system.slice/system-umbra.slice/umbra@web.service";
    for (of, vm) in [("guest", guest), ("driver VM", driver), ("standby", &driver["standby"])] {
        let group = &vm["cgroup"];
        let (path, memory, most) =
            (group["path"].as_str().unwrap(), group["memory"].as_u64(), group["memory_max"].as_u64());
        assert!(path.starts_with(service) && memory.unwrap() < most.unwrap(), "{of}: {group}");
        let files =
            "memory.max memory.peak memory.swap.max memory.oom.group pids.max pids.current cpu.max cpu.weight.nice";
        let script =
            format!("grep -x 0::{path} /proc/{}/cgroup && cd /sys/fs/cgroup{path} && grep . {files}", vm["pid"]);
        say(&format!("{of}: {}", place.expect(&script, STEP).or_tell().trim().replace('\n', ", ")));
    }
    assert_eq!(
        place.expect(&format!("cat /proc/{}/cgroup", before["pid"]), STEP).or_tell().trim(),
        format!("0::{service}/supervisor")
    );
    say(place.expect("systemd-analyze security umbra@web --no-pager | tail -n 1", STEP).or_tell().trim());

    let group = driver["cgroup"]["path"].as_str().unwrap();
    let hog = format!(
        "sh -c 'echo $$ > $0/cgroup.procs && exec tail /dev/zero' /sys/fs/cgroup{group}; [ $? = 137 ] || exit 1
until umbra status --json | grep 'took more memory than its control group may have'; do sleep 0.2; done
umbra wait ok --timeout $((90 * UMBRA_PATIENCE))"
    );
    place.expect(&hog, RECOVERY).or_tell();
    guest_reaches_peer(place);
    let after = status(place);
    assert_eq!((&after["pid"], &after["guests"][0]["pid"]), (&before["pid"], &guest["pid"]), "{after}");
    let reborn = &after["drivers"][0];
    assert_eq!((&reborn["pid"], reborn["failures"].as_u64()), (&driver["standby"]["pid"], Some(1)), "{reborn}");
    assert_eq!(carrier_changes(place), changes, "the guest's link never went down");
    let path = reborn["cgroup"]["path"].as_str().unwrap();
    let look = format!(
        "cat /sys/fs/cgroup{path}/cpu.max; ls -d /sys/fs/cgroup{service}/vm-* | wc -l; ls -d /sys/fs/cgroup{group}"
    );
    let looked = place.run(&look, STEP).or_tell().stdout;
    assert_eq!(looked, "80000 20000\n3\n", "the dead one's group is gone");
}

fn ends_cleanly(place: &mut Place) {
    // The supervisor is killed: systemd starts the machine again, on what is left.
    place.expect("systemctl kill -s KILL --kill-who=main umbra@web", STEP).or_tell();
    let again = "until [ \"$(systemctl show -p NRestarts --value umbra@web)\" = 1 ] && systemctl -q is-active umbra@web; do \
                 sleep 0.5; done";
    place.expect(again, RECOVERY).or_tell();
    if let Err(why) = place.in_guest("web", &format!("umbra-probe first-answer {} 20", peer_address(0)), STEP) {
        let log =
            "journalctl --sync; journalctl -b -u umbra@web -o short-monotonic --no-pager | tail -n 60; umbra status";
        say(place.run(log, STEP).or_tell().stdout.trim());
        panic!("{why}");
    }
    has_bounds(place);

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
        .expect("systemctl disable umbra@web look; rm /etc/umbra/web.toml /etc/umbra/wrong.toml; dpkg -P umbra", STEP)
        .or_tell();
    // The exec server and its functions are the bench's.
    let left = "find / -xdev -iname '*umbra*' -not -path '/srv/*' -not -path '/home/*' -not -path /etc/umbra -not -name '*bench*' \
                -not -name umbra-probe; getent passwd umbra-vm; grep umbra-vm /etc/subuid /etc/subgid; true";
    assert_eq!(place.expect(left, STEP).or_tell(), "", "the package has left it");
}
