//! The hot spare: a download goes on while the driver VMs of two NICs on one network crash in turns; a host behind a bridge in the guest,
//! which speaks when it is spoken to, is reached again after each take-over; a spare that dies is missed by nobody; one on another
//! network is told of. The gaps that the peer saw are told, not judged: the test host is emulated.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use common::{OrTell, RECOVERY, STEP, assets, guest_reaches_peer, most_ms, say, scenario};
use serde_json::Value;
use umbra_tests::bench::patience::{Stall, scaled};
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::guest_log::GuestLog;
use umbra_tests::demo::machine::{Machine, MachineSpec, NIC_DRIVER};
use umbra_tests::demo::outage::longest;
use umbra_tests::demo::place::Place;
use umbra_tests::measure::outages;
use umbra_tests::peer::{Content, Tick, guest_address, now_us, peer_address, ports};

/// Bytes of the download for each crash, and how fast they come.
const SHARE: u64 = 1 << 20;
const RATE: u64 = 512 << 10;

/// A host behind the guest's bridge: it answers, and never speaks by itself.
const SILENT_HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 66);
const SILENT_MAC: [u8; 6] = [0x02, 0, 0, 0, 0x77, 0x66];

/// Puts the guest's address on a bridge over its NIC, and [`SILENT_HOST`] behind it. The host knows the peer's address on the wire, as
/// the peer does its: nobody asks for one.
const BRIDGE: &str = "modprobe -a bridge veth
peer=$(cat /proc/net/arp | grep '^10.77.0.1 ' | grep -o '..:..:..:..:..:..')
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
ip link add br0 type bridge && ip link set br0 address $(cat /sys/class/net/eth0/address) && ip addr flush dev eth0 &&
ip link set eth0 master br0 && ip link set br0 up && ip addr add 10.77.0.2/24 dev br0 &&
ip link add v0 type veth && ip link set v0 master br0 && ip link set v0 up || exit 1
(unshare -n sleep 100000 </dev/null >/dev/null 2>&1 &)
await 10 pidof sleep && host=$(pidof sleep) && ip link set veth0 netns $host || exit 1
nsenter -t $host -n sh -c \"echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; ip link set veth0 address 02:00:00:00:77:66 &&
  ip link set veth0 up && ip addr add 10.77.0.66/24 dev veth0 && arp -s 10.77.0.1 $peer\"";

/// Waits until the silent host has answered a question that was asked after `since`, microseconds of the peer's clock; all answers.
fn reach_silent_host(machine: &mut Machine, place: &mut Place, since: u64) -> Vec<Tick> {
    let (mut ticks, mut stall) = (Vec::new(), Stall::new(STEP));
    while !ticks.iter().any(|tick: &Tick| tick.from == SILENT_HOST && tick.sent_us > since) {
        if stall.is_over(0) {
            say("the host behind the guest's bridge is silent");
            stands(machine, place);
        }
        std::thread::sleep(Duration::from_millis(50));
        ticks.extend(place.peer().take_ticks().or_tell());
    }
    ticks
}

fn standby(machine: &mut Machine, place: &mut Place) -> Value {
    machine.status(place).or_tell()["drivers"][0]["standby"].clone()
}

fn serving_device(machine: &mut Machine, place: &mut Place) -> String {
    machine.status(place).or_tell()["drivers"][0]["device"].as_str().unwrap().into()
}

/// Waits until the spare is armed and is known to be on the network of the serving NIC; its device and process.
fn armed(machine: &mut Machine, place: &mut Place) -> (String, u64) {
    machine.await_event(RECOVERY, |event| event.event == "standby-ready").or_tell();
    let start = Instant::now();
    loop {
        let spare = standby(machine, place);
        if spare["state"] == "armed" && spare["network"] == "same" {
            return (spare["device"].as_str().unwrap().into(), spare["pid"].as_u64().unwrap());
        }
        assert!(start.elapsed() < scaled(RECOVERY), "{spare}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits until the guest has `bytes` of the download.
fn reach(machine: &mut Machine, place: &mut Place, bytes: u64) {
    let mut stall = Stall::new(STEP);
    loop {
        let acknowledged = place.peer().progress().or_tell().acknowledged;
        if acknowledged >= bytes {
            return;
        }
        if stall.is_over(acknowledged) {
            stands(machine, place);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn stands(machine: &mut Machine, place: &mut Place) -> ! {
    place.peer().take_ticks().or_tell();
    std::thread::sleep(Duration::from_secs(1));
    let ticks = place.peer().take_ticks().or_tell().len();
    let (progress, status) = (place.peer().progress().or_tell(), machine.status(place).or_tell());
    let guest = "cat /proc/net/dev; grep virtio /proc/interrupts; umbra-probe ping 10.77.0.1 5";
    let guest = place.in_guest("web", guest, STEP).unwrap_or_default();
    panic!(
        "the download stands at {progress:?}, {ticks} ticks a second arrive\n{status:#}\n{}\n{guest}",
        machine.said()
    );
}

#[test]
fn a_spare_takes_over_and_its_own_death_is_missed_by_nobody() {
    scenario(|| crashes_in_turns("e1000e", "e1000e"));
}

fn crashes_in_turns(nic: &str, spare: &str) {
    let (mut place, spec) = outages::place(&assets(), ("spare", Some(128)), &nic.into(), Some(&spare.into())).or_tell();
    let both = BTreeSet::from([spec.device.clone(), spec.spare.clone().unwrap()]);
    let mut machine = Machine::start(&mut place, &MachineSpec { restart_limit: 20, ..spec }).or_tell();
    guest_reaches_peer(&mut place);
    place.in_guest("web", BRIDGE, STEP).or_tell();
    guest_reaches_peer(&mut place);
    place.peer().ping(SILENT_HOST, SILENT_MAC).or_tell();
    let begin = now_us();
    reach_silent_host(&mut machine, &mut place, begin);
    let before = GuestLog::read(&mut place, "web").or_tell();
    let (peer, guest) = (peer_address(0), guest_address(0, 0));
    place.in_guest("web", &format!("umbra-probe tick {peer} 4 </dev/null >/dev/null 2>&1 & echo"), STEP).or_tell();
    let ways = ["umbra crash nic0", "kill -9 $SERVING", "umbra crash nic0"];
    let content = Content { bytes: SHARE * (ways.len() as u64 + 1) };
    place.peer().offer(content.bytes, RATE, 0).or_tell();
    let url = format!("http://{peer}:{}/file", ports::HTTP);
    let fetch = format!("set -o pipefail; wget -q -O - {url} | sha256sum");
    let mut get = place.start_in_guest("web", &fetch).or_tell();

    for (n, way) in (0..).zip(ways) {
        let (device, _) = armed(&mut machine, &mut place);
        // In turns, unless a driver VM has failed by itself on a machine as loaded as this one may be.
        let pair = BTreeSet::from([device.clone(), serving_device(&mut machine, &mut place)]);
        assert_eq!(pair, both);
        let serving = machine.driver_pid(&mut place, NIC_DRIVER).or_tell();
        place.peer().allow(SHARE * (n + 1)).or_tell();
        reach(&mut machine, &mut place, SHARE * n + SHARE / 3);
        place.peer().take_ticks().or_tell();
        let begin = now_us();
        place.expect(&way.replace("$SERVING", &serving.to_string()), STEP).or_tell();
        let adopted = machine.await_event(RECOVERY, |event| event.event == "driver-adopted").or_tell();
        assert_eq!((adopted.text("standby"), adopted.text("device")), ("armed", device.as_str()));
        let live = machine.await_live("nic0", RECOVERY).or_tell();
        let outage = live.number("outage_ms").unwrap();
        assert!(outage < most_ms(3000.0), "{live:?}");
        let mut ticks = reach_silent_host(&mut machine, &mut place, now_us());
        reach(&mut machine, &mut place, SHARE * (n + 1) - 1);
        ticks.extend(place.peer().take_ticks().or_tell());
        let gap = |who| longest(&ticks, who, begin - 500_000, now_us()).map(|outage| outage.gap_ms);
        say(&format!(
            "{way}: {outage:.1} ms as Umbra counts it, longest silence at the peer: of the guest's ticks {:.1?} ms, of the host behind \
             its bridge {:.1?} ms",
            gap(guest),
            gap(SILENT_HOST)
        ));
    }

    say("the spare itself is killed");
    let (_, pid) = armed(&mut machine, &mut place);
    place.expect(&format!("kill -9 {pid}"), STEP).or_tell();
    machine.await_event(STEP, |event| event.event == "standby-failed").or_tell();
    place.peer().allow(content.bytes).or_tell();
    armed(&mut machine, &mut place);
    let acknowledged = |place: &mut Place| Ok(place.peer().progress()?.acknowledged);
    if place.await_end(&mut get, RECOVERY, acknowledged).is_err() {
        stands(&mut machine, &mut place);
    }
    let sum = get.output().stdout.split_whitespace().next().unwrap_or_default().to_owned();
    assert_eq!(sum, content.sha256(), "{}", get.output().stderr);
    let progress = place.peer().progress().or_tell();
    assert_eq!((progress.connections, progress.resets), (1, 0));
    let noticed = GuestLog::read(&mut place, "web").or_tell().since(&before);
    assert!(noticed.is_clean(), "{noticed:?}");
    machine.stop(&mut place).or_tell();
    let left = place.run("pidof umbra", STEP).or_tell();
    assert!(!left.ok(), "processes are left: {}", left.stdout);
}

/// Questions that are asked before a network counts as silent, one a second (docs/standby.md), and some time.
const SILENT: Duration = Duration::from_secs(90);

#[test]
fn a_spare_on_another_network_is_told_of() {
    scenario(hear_nothing);
}

fn hear_nothing() {
    let assets = assets();
    let nics = ["rtl8139".into(), "rtl8139".into()];
    let image = assets.image_for(&nics).or_tell();
    let mut spec = BenchSpec::new("other-network").nics(&["rtl8139", "rtl8139"]);
    spec.files = vec![image.clone()];
    let mut bench = Bench::boot(spec, &assets).or_tell();
    let mut bind = |nic: &str| bench.expect(&format!("vfio ${nic} && printf %s ${nic}"), STEP).or_tell();
    let (device, other) = (bind("NIC0"), bind("NIC1"));
    let mut place = Place::Bench(Box::new(bench));
    let image = image.file_name().unwrap().to_str().unwrap();
    let machine = MachineSpec::one_guest(&device, image, &format!("{}/24", guest_address(0, 0)));
    let mut machine = Machine::start(&mut place, &MachineSpec { spare: Some(other), ..machine }).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "standby-ready").or_tell();
    let warned = machine.await_event(SILENT, |event| event.event == "warning").or_tell();
    say(warned.text("text"));
    assert_eq!(standby(&mut machine, &mut place)["network"], "silent", "{warned:?}");
    guest_reaches_peer(&mut place);
    machine.stop(&mut place).or_tell();
}
