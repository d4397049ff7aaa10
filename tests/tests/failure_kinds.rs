//! Failures that are no panics, each the real thing in a driver VM with a stock kernel: how each is noticed, and that the
//! guest is served again after it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::{Duration, Instant};

use common::{OrTell, RECOVERY, STEP, carrier_changes, guest_reaches_peer, place_in, place_with, say, scenario};
use umbra_tests::bench::{BenchSpec, patience};
use umbra_tests::demo::events::Event;
use umbra_tests::demo::machine::{Machine, NIC_DRIVER};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::peer_address;
use umbra_tests::probe::net::TICK_EVERY;

/// A failure: how it is made (`PID` stands for the driver VM's process), and what it may be noticed by.
const FAILURES: [(&str, &str, &[&str]); 10] = [
    ("a panic", "umbra crash nic0 --kind panic", &["panic"]),
    ("the agent hangs, the kernel lives on", "umbra crash nic0 --kind agent-hang", &["heartbeat"]),
    ("real-time tasks take every CPU", "umbra crash nic0 --kind spin", &["heartbeat"]),
    ("every vCPU spins with interrupts off", "umbra crash nic0 --kind lock-up", &["heartbeat"]),
    ("all memory is taken", "umbra crash nic0 --kind out-of-memory", &["panic", "vm-end", "heartbeat"]),
    ("the driver lets go of its device", "umbra crash nic0 --kind unbind", &["agent"]),
    // The device's command register, written behind its driver's back.
    (
        "the device is switched off",
        "printf '\\0\\0' | dd of=/sys/bus/pci/devices/$NIC0/config bs=1 seek=4 conv=notrunc 2>/dev/null",
        &["device"],
    ),
    ("the guests' frames are taken no more", "umbra crash nic0 --kind stall", &["link"]),
    // A kernel that shuts down stops its network device first.
    ("a reboot without a panic", "umbra crash nic0 --kind reboot", &["vm-end", "link"]),
    ("the VM's process is stopped", "kill -STOP PID", &["heartbeat"]),
];

#[test]
fn each_kind_of_failure_is_noticed_and_outlived() {
    scenario(outlive_each_kind);
}

/// What is too many in the scenario. Emulated on the reference machine, the storm makes some 1,800: as many as its driver handles.
const INTERRUPTS_PER_S: u32 = 1200;
/// Between two ticks of the guest meanwhile: a clock sets their pace, on a slow machine too, so the few interrupts that they make must be
/// far below the share of a storm that such a machine handles. With one each 10 ms they were 400 a second.
const CALM: Duration = Duration::from_millis(100);

/// Has the host's kernel get an uncorrectable error (a poisoned TLP) of `$NIC0` from its root port: `struct
/// aer_error_inj` of `drivers/pci/pcie/aer_inject.c`.
const BUS_ERROR: &str = "modprobe aer_inject && bus=$(echo $NIC0 | cut -c6-7) && { printf \"\\x$bus\\0\\0\\0\\0\\x10\"; \
    head -c 26 /dev/zero; } >/tmp/error && dd if=/tmp/error of=/dev/aer_inject bs=32 count=1 2>/dev/null";

#[test]
fn failures_of_the_device_itself_are_noticed_and_outlived() {
    scenario(outlive_a_broken_device);
}

fn outlive_a_broken_device() {
    let (mut place, mut spec) =
        place_in(BenchSpec { cmdline: "iomem=relaxed".into(), ..BenchSpec::new("broken-device") });
    // A storm has fewer on a slower machine.
    spec.interrupts_per_s = INTERRUPTS_PER_S / patience::whole_factor().min(6);
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    guest_ticks(&mut place, CALM);
    let storm = "umbra-probe storm $NIC0 60 >/tmp/storm 2>&1 & echo $! >/tmp/storm.pid";
    // The kernel's watchdog and the driver's own reset, twice, take up to half a minute.
    let mute = "umbra-probe mute $NIC0 120 >/tmp/mute 2>&1 & echo $! >/tmp/mute.pid";
    for (cause, end, by, expected) in [
        (storm, "kill $(cat /tmp/storm.pid)", "device", "interrupt storm"),
        (BUS_ERROR, "dmesg | grep -q 'aer_inject: Injecting errors'", "device", "uncorrectable error"),
        (mute, "kill $(cat /tmp/mute.pid)", "agent", "is stuck"),
    ] {
        machine.await_standby(NIC_DRIVER, RECOVERY).or_tell();
        place.expect(cause, STEP).or_tell();
        let caused = Instant::now();
        let failed = machine.await_event(RECOVERY, |event| event.event == "driver-failed").or_tell();
        let noticed = caused.elapsed().as_secs_f64();
        let (source, reason) = (failed.text("source").to_owned(), failed.text("reason").to_owned());
        assert!(source == by && reason.contains(expected), "noticed by {source}: {reason}");
        place.expect(end, STEP).or_tell();
        let live = machine.await_live(NIC_DRIVER, RECOVERY).or_tell();
        say(&format!("{reason}: {noticed:.1} s after its cause, {}", times(&failed, &live)));
        guest_reaches_peer(&mut place);
    }
    // Last: a NIC that was tested is not set as it was, and may be slower to interrupt.
    outlive_a_held_lock(&mut place, &mut machine);
    machine.stop(&mut place).or_tell();
}

/// A driver that holds the lock of its kernel's network stack for seconds is at work. Its self-test is such a work, longer than
/// a heartbeat may be missing (3 s); the driver VM lives on.
fn outlive_a_held_lock(place: &mut Place, machine: &mut Machine) {
    let pid = machine.driver_pid(place, NIC_DRIVER).or_tell();
    place.expect("umbra crash nic0 --kind lock-network", STEP).or_tell();
    let console = "until grep -h 'the self-test of .* ms' /run/umbra/*/nic0.console.log; do sleep 0.2; done";
    let said = place.expect(console, STEP).or_tell();
    let took = said.split_whitespace().rev().nth(1).and_then(|ms| ms.parse::<u32>().ok());
    assert!(said.contains("has ended") && took.is_some_and(|ms| ms > 3000), "{said}");
    guest_reaches_peer(place);
    assert_eq!(machine.driver_pid(place, NIC_DRIVER).or_tell(), pid, "the driver VM was replaced");
    say(&format!("the network stack's lock held for {} ms: no failure", took.unwrap_or_default()));
}

/// How long it took to be noticed, and what the outage had in it, for the table of docs/measurements.md.
fn times(failed: &Event, live: &Event) -> String {
    let ms = |number: Option<f64>| number.unwrap_or(f64::NAN);
    let part = |name: &str| ms(live.fields["parts"][name].as_f64());
    format!(
        "noticed after {:.0} ms, away for {:.0} ms, of that boot or restore {:.0}, probe {:.0}, link {:.0}",
        ms(failed.number("detect_ms")),
        ms(live.number("outage_ms")),
        part("boot_ms"),
        part("probe_ms"),
        part("link_ms")
    )
}

/// The guest sends from now on, so often: some failures show only where there is traffic.
fn guest_ticks(place: &mut Place, every: Duration) {
    let ticks = format!("umbra-probe tick {} {} </dev/null >/dev/null 2>&1 & echo", peer_address(0), every.as_millis());
    place.in_guest("web", &ticks, STEP).or_tell();
}

fn outlive_each_kind() {
    let (mut place, mut spec) = place_with("failure-kinds", "rtl8139");
    spec.restart_limit = 20;
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    let before = carrier_changes(&mut place);
    guest_ticks(&mut place, TICK_EVERY);
    for (what, cause, sources) in FAILURES {
        // Outages without one are those of `umbra-bench rebirth`.
        machine.await_standby(NIC_DRIVER, RECOVERY).or_tell();
        let pid = machine.driver_pid(&mut place, NIC_DRIVER).or_tell();
        place.expect(&cause.replace("PID", &pid.to_string()), STEP).or_tell();
        let failed = machine.await_event(RECOVERY, |event| event.event == "driver-failed").or_tell();
        let source = failed.text("source").to_owned();
        assert!(sources.contains(&source.as_str()), "{what}: noticed by {source}: {}", failed.text("reason"));
        let live = machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
        say(&format!("{what}: by {source}, {}", times(&failed, &live)));
        guest_reaches_peer(&mut place);
    }
    assert_eq!(carrier_changes(&mut place), before, "the guest's link never went down");
    machine.stop(&mut place).or_tell();
}
