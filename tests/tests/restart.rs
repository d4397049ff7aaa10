//! `umbra restart`: masked, also with a new image; one that does not boot changes nothing; one without the driver gives way
//! to the old one.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, assets, carrier_changes, guest_reaches_peer, say, scenario};
use umbra_tests::bench::{Bench, BenchSpec, Model};
use umbra_tests::demo::machine::{Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::guest_address;

#[test]
fn a_restart_is_masked_and_a_failed_upgrade_falls_back() {
    scenario(restart_and_fall_back);
}

fn restart_and_fall_back() {
    let assets = assets();
    let (one, another) = (Model::from("rtl8139"), Model::from("e1000e"));
    // With the drivers of both it is a newer image; with the other's alone one that cannot serve.
    let images = [&[one.clone()][..], &[one.clone(), another.clone()], &[another]]
        .map(|models| assets.image_for(models).or_tell());
    let mut spec = BenchSpec::new("restart").nics(&["rtl8139"]);
    spec.files = images.to_vec();
    let mut bench = Bench::boot(spec, &assets).or_tell();
    let device = bench.expect("vfio $NIC0 && printf %s $NIC0", STEP).or_tell();
    let [image, newer, other] = images.map(|image| image.file_name().unwrap().to_str().unwrap().to_owned());
    let mut spec = MachineSpec::one_guest(&device, &image, &format!("{}/24", guest_address(0, 0)));
    spec.standby = "cold".into();
    let mut place = Place::Bench(Box::new(bench));
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    guest_reaches_peer(&mut place);
    let before = carrier_changes(&mut place);

    say("a restart");
    let said = place.expect("umbra restart nic0", RECOVERY).or_tell();
    assert!(said.contains("generation 2 serves"), "{said}");
    machine.await_event(STEP, |event| event.event == "driver-live").or_tell();
    guest_reaches_peer(&mut place);

    say("an upgrade");
    let said = place.expect(&format!("umbra restart nic0 --image /share/{newer}"), RECOVERY).or_tell();
    assert!(said.contains("generation 3 serves"), "{said}");
    let live = machine.await_event(STEP, |event| event.event == "driver-live").or_tell();
    say(&format!("masked for {:.0} ms", live.number("outage_ms").unwrap_or(f64::NAN)));
    guest_reaches_peer(&mut place);

    say("an image that does not boot");
    let work = place.work();
    let copy = format!(
        "cp -r {work}/{image} {work}/broken && dd if=/dev/zero of={work}/broken/initramfs.cpio bs=64k count=1 conv=notrunc 2>&1"
    );
    place.expect(&copy, STEP).or_tell();
    let refused = place.run(&format!("umbra restart nic0 --image {work}/broken 2>&1"), RECOVERY).or_tell();
    assert!(!refused.ok() && refused.stdout.contains("goes on with the image of before"), "{}", refused.stdout);
    machine.drain();
    let masked = machine.seen.iter().filter(|event| event.event == "driver-failed").count();
    assert_eq!(masked, 2, "nothing was replaced but by the restarts before");
    guest_reaches_peer(&mut place);

    say("an image without the device's driver");
    let refused = place.run(&format!("umbra restart nic0 --image /share/{other} 2>&1"), RECOVERY).or_tell();
    assert!(!refused.ok() && refused.stdout.contains("the NIC has not appeared"), "{}", refused.stdout);
    let live = machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
    assert!(live.generation >= 6, "{live:?}");
    guest_reaches_peer(&mut place);
    assert_eq!(carrier_changes(&mut place), before, "the guest's link never went down");
    machine.stop(&mut place).or_tell();
}
