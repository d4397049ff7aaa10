//! NICs without a carrier: the driver VM goes over to the spare that has one.

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::StandbyStage;
use umbra_vmm::supervisor::front::protocol::Response;

use crate::cases::{Case, cases};
use crate::machine::{DEVICE, SPARE, TestMachine, make};
use crate::spares::wait_armed;

/// All of them.
pub const ALL: &[Case] = cases![
    a_serving_nic_that_loses_its_carrier_gives_way_to_the_spare,
    a_lost_carrier_is_only_told_where_that_is_switched_off,
    a_spare_without_carrier_serves_until_the_other_nic_has_one,
    a_new_image_that_loses_its_carrier_on_trial_gives_way_to_the_old_one,
    a_guest_that_goes_over_behind_an_unanswered_set_up_is_followed,
];

fn start(driver: &str, spare_after_ms: u32) -> TestMachine {
    let mut machine = make("", driver, &format!("spare = \"{SPARE}\"\nspare_after_ms = {spare_after_ms}\n"));
    machine.start_again();
    machine
}

fn a_serving_nic_that_loses_its_carrier_gives_way_to_the_spare() {
    let machine = start("carrier-lost=1", 100);
    let driver = machine.wait_live(2);
    assert_eq!((driver.device.as_str(), driver.carrier, driver.failures), (SPARE, true, 0));
    assert!(driver.reason.unwrap().starts_with("its NIC has had no carrier for"));
    let events = machine.events_text();
    assert!(events.contains(r#""source":"carrier""#) && events.contains("generation 1 is replaced"), "{events}");
    assert!(!machine.run_dir().join("reports/nic0-gen1.json").exists(), "no failure");
    assert!(machine.guest_log().contains("announce: true"));
    // The one that was left is the spare then.
    wait_armed(&machine, 2, DEVICE, 3);
    machine.stop();
}

fn a_lost_carrier_is_only_told_where_that_is_switched_off() {
    let machine = start("carrier-lost=1", 0);
    wait_armed(&machine, 1, SPARE, 2);
    machine.wait_for("the loss", |driver| !driver.carrier);
    std::thread::sleep(std::time::Duration::from_millis(500));
    machine.wait_live(1);
    machine.stop();
}

fn a_spare_without_carrier_serves_until_the_other_nic_has_one() {
    let machine = start("no-carrier=2", 0);
    machine.wait_for("a spare", |driver| {
        driver.standby.as_ref().is_some_and(|spare| spare.state == StandbyStage::NoCarrier)
    });
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(3);
    assert_eq!((driver.device.as_str(), driver.carrier, driver.failures), (DEVICE, true, 1));
    let events = machine.events_text();
    assert!(events.contains(r#""device":"0000:04:00.0","standby":"no-carrier""#), "{events}");
    assert!(events.contains("its NIC has found no carrier"), "{events}");
    // One outage.
    let report = machine.report_with(1, "an outage", |report| report["outage_ms"].as_f64().is_some());
    assert_eq!(report["source"], "panic");
    machine.stop();
}

fn a_new_image_that_loses_its_carrier_on_trial_gives_way_to_the_old_one() {
    let machine = start("carrier-lost=3", 100);
    wait_armed(&machine, 1, SPARE, 2);
    let Response::Restarted { generation, .. } = machine.restart(Some("image-new")) else { panic!("not restarted") };
    assert_eq!(generation, 3);
    let driver = machine.wait_live(4);
    assert_eq!((driver.kernel.as_deref(), driver.failures), (Some("6.12-fake of image"), 0));
    machine.wait_for_event(r#""event":"restart-failed""#, 1);
    // And so is the next spare.
    let spare = wait_armed(&machine, 4, SPARE, 5).standby.and_then(|spare| spare.generation);
    machine.crash(CrashKind::Panic);
    assert_eq!(machine.wait_live(spare.unwrap()).kernel.as_deref(), Some("6.12-fake of image"));
    machine.stop();
}

/// The driver VM's side has given the set-up up just when the guest had answered.
fn a_guest_that_goes_over_behind_an_unanswered_set_up_is_followed() {
    let machine = start("unanswered=1", 2000);
    wait_armed(&machine, 1, SPARE, 2);
    std::fs::write(machine.dir.path().join("hang-up"), "").unwrap();
    assert_eq!(machine.wait_live(2).device, SPARE);
    machine.stop();
}
