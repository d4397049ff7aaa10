//! What happens to a machine every day, with stock Linux guests: resets by triple fault, the host's TAP interface removed and made again, a
//! power button that is pressed while the guest boots, guests without MSI, `hvc0` as console, a machine file that changes, and frames of
//! link protocols through a shared NIC.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{OrTell, STEP, place_with, say, scenario};
use umbra_tests::bench::pcap;
use umbra_tests::demo::machine::{Attach, Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::guest_address;
use umbra_tests::probe::frames::ETHER_TYPE;

/// Longest time in which a script may print nothing: each prints a word for each step.
const SCRIPT: Duration = Duration::from_secs(120);

/// `guest CMDLINE LINES` writes the machine file of a guest `g`, `g SCRIPT` runs a script in it, `up` waits until it answers.
const PRELUDE: &str = r#"
mkdir -p /tmp/daily /run/umbra-bench; cd /tmp/daily
for f in vmlinux guest.cpio; do [ -e $f ] || fetch /share/$f $f; done
guest() { printf '[guest.g]\nkernel = "vmlinux"\ninitrd = ["guest.cpio"%s]\ncmdline = "quiet umbra.patience=%s %s"\nmemory = "192M"\n' \
    "$3" "$UMBRA_PATIENCE" "$1" > g.toml
  printf 'console = { file = "g.log" }\n%b[[guest.g.port]]\nname = "umbra.bench"\nsocket = "/run/umbra-bench/g.sock"\n' "$2" >> g.toml; }
g() { umbra-probe exec /run/umbra-bench/g.sock "$1" 60; }
up() { await 120 umbra-probe exec /run/umbra-bench/g.sock true 10; }
start() { rm -f g.log; umbra run g.toml >out 2>&1 & run=$!; }
fail() { tail -5 out; tail -c 2000 g.log; echo; echo "FAILED: $1"; umbra stop --force >/dev/null 2>&1; exit 1; }
tap() { tunctl -t tap9 >/dev/null; ip addr add 10.88.0.1/24 dev tap9; ip link set tap9 up; }
"#;

/// What is tried: its name, and the script, which ends with 0.
const TRIALS: [(&str, &str); 4] = [
    (
        "a TAP interface is removed and made again, and the guest resets itself by a triple fault",
        r#"tap
guest "console=ttyS0 reboot=t ip4=10.88.0.3/24" '[[guest.g.net]]\ntap = "tap9"\n'
start; up || fail "it does not boot"
g 'await 20 ping -c 1 -W 3 10.88.0.1' || fail "no network"
ip link del tap9
g 'await 20 grep -q 0 /sys/class/net/eth0/carrier' || fail "its carrier stays up without the interface"
await 10 sh -c 'umbra events | grep -q "warning.*tap9"' || fail "no event names the interface"
tap
g 'await 20 grep -q 1 /sys/class/net/eth0/carrier && await 20 ping -c 1 -W 3 10.88.0.1' || fail "its network does not come back"
echo "the interface was away, and is back"
before=$(g 'cat /proc/sys/kernel/random/boot_id')
g 'reboot -f' >/dev/null 2>&1
await 20 sh -c 'umbra events | grep -q guest-rebooted' || fail "a triple fault is no reset"
up || fail "it does not boot again"
[ "$(g 'cat /proc/sys/kernel/random/boot_id')" != "$before" ] || fail "it is the same boot"
g 'await 20 ping -c 1 -W 3 10.88.0.1' || fail "no network after the reset"
umbra stop --force >/dev/null; wait $run; ip link del tap9"#,
    ),
    (
        "the power button is pressed while the guest boots",
        r#"mkdir -p power; cat > power/script <<'X'
modprobe -a button evdev
mkdir -p /etc/acpi/PWRF; printf '#!/bin/busybox sh\npoweroff -f\n' > /etc/acpi/PWRF/00000080; chmod 755 /etc/acpi/PWRF/00000080
acpid -f
X
(cd power; find . | cpio -o -H newc) > power.cpio 2>/dev/null
guest "console=ttyS0" '' ', "power.cpio"'
start; await 20 umbra status >/dev/null; umbra stop --timeout $((60 * UMBRA_PATIENCE)) || fail "the press is lost"
wait $run || fail "it did not end well""#,
    ),
    (
        "a guest with hvc0 as its console and without MSI",
        r#"tap; truncate -s 1M d.img
port='[[guest.g.port]]\nname = "umbra.bench.long"\nsocket = "/run/umbra-bench/g.long.sock"\n'
guest "console=hvc0 loglevel=5 pci=nomsi ip4=10.88.0.3/24" \
  "[[guest.g.net]]\ntap = 'tap9'\n[[guest.g.disk]]\npath = 'd.img'\n$port"
start; up || fail "it does not boot"
[ "$(g 'cat /proc/cmdline | grep -c pci=nomsi; cat /sys/class/tty/console/active')" = "1
hvc0" ] || fail "its console is another"
g 'grep -q MSI /proc/interrupts' && fail "it has message-signalled interrupts"
[ "$(g 'dd if=/dev/vda bs=512 count=1 2>/dev/null | wc -c')" = 512 ] || fail "its disk does not work"
g 'await 20 ping -c 1 -W 3 10.88.0.1' || fail "its network does not work"
g "echo '<4>said by the kernel' > /dev/kmsg"
await 20 grep -q 'said by the kernel' g.log || fail "what the kernel says does not come to the console's file"
umbra-probe exec /run/umbra-bench/g.long.sock 'head -n 1 < /dev/hvc0 > /tmp/typed' 60 & typing=$!
(echo 'typed at hvc0'; await 20 g 'grep -q typed /tmp/typed'; printf '\035') | umbra console g > seen || fail "no umbra console"
wait $typing; g 'grep -q "typed at hvc0" /tmp/typed' || fail "what is typed does not come"
grep -q 'said by the kernel' seen || fail "umbra console does not show what was printed before"
g 'seq 2000 > /dev/hvc0; echo the last line > /dev/hvc0'
await 20 grep -q 'the last line' g.log || fail "what is printed does not come"
[ "$(tr -d '\r' < g.log | grep -xE '[0-9]+' | sort -un | wc -l)" = 2000 ] || fail "lines are missing"
g 'poweroff -f' >/dev/null 2>&1
wait $run || fail "it did not end well"
ip link del tap9"#,
    ),
    (
        "the machine file is read again: a guest's policy, and another guest",
        r#"guest "console=ttyS0" ''
start; up || fail "it does not boot"
sed -i 's/^memory.*/memory = "160M"\non_reset = "stop"/' g.toml
printf '[guest.h]\nkernel = "vmlinux"\ninitrd = ["guest.cpio"]\ncmdline = "quiet"\nmemory = "160M"\n' >> g.toml
printf '[[guest.h.port]]\nname = "umbra.bench"\nsocket = "/run/umbra-bench/h.sock"\n' >> g.toml
umbra reload > changes || fail "it is not taken over"
cat changes
await 120 umbra-probe exec /run/umbra-bench/h.sock true 10 || fail "the guest that was added does not boot"
g 'reboot -f' >/dev/null 2>&1
umbra wait off g --timeout $((20 * UMBRA_PATIENCE)) || fail "on_reset is not what it became"
echo 'kernel = 1' >> g.toml
umbra reload 2>said && fail "a mistake is taken over"
grep -q g.toml said && umbra wait running h || fail "a mistake has no message, or ends a guest: $(cat said)"
umbra stop --force >/dev/null; wait $run; true"#,
    ),
];

#[test]
fn days_of_guests_on_the_host_s_own_devices() {
    scenario(|| {
        let (mut place, spec) = place_with("daily", "e1000e");
        for (what, script) in TRIALS {
            say(what);
            let said = place.expect(&format!("{PRELUDE}\n{script}"), SCRIPT).or_tell();
            said.lines().for_each(|line| say(&format!("  {line}")));
        }
        link_protocols(place, &spec);
    });
}

/// The last byte of the addresses 01:80:c2:00:00:XX that pass a NIC which two guests share: STP, 802.1X, LLDP. A bridge of Linux keeps
/// pause frames (01) and LACP (02) back.
const PASS: [u8; 3] = [0x00, 0x03, 0x0e];

fn link_protocols(mut place: Place, spec: &MachineSpec) {
    say("two guests on one NIC send frames of link protocols");
    let guests = ["web", "db"].into_iter().zip(0..);
    let guests = guests.map(|(name, n)| (name.to_owned(), format!("{}/24", guest_address(0, n)))).collect();
    let spec = MachineSpec { guests, attach: Attach::DriverVm, ..spec.clone() };
    let machine = Machine::start(&mut place, &spec).or_tell();
    common::guest_reaches_peer(&mut place);
    let to = [0x00, 0x01, 0x02, 0x03, 0x0e].map(|last: u8| format!("01:80:c2:00:00:{last:02x}"));
    place.in_guest("web", &format!("umbra-probe frames eth0 {}", to.join(" ")), STEP).or_tell();
    // What was sent later has passed all that was sent before.
    common::guest_reaches_peer(&mut place);
    machine.stop(&mut place).or_tell();
    let Place::Bench(bench) = place else { panic!("a bench") };
    let capture = bench.shutdown().or_tell().join("nic0.pcap");
    let seen: BTreeSet<u8> = pcap::destinations(&capture, ETHER_TYPE).unwrap().iter().map(|to| to[5]).collect();
    assert_eq!(seen, BTreeSet::from(PASS), "on the wire");
}
