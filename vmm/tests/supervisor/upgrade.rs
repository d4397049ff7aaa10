//! Restarts to other images: one that is given up or fails leaves the old image everywhere.

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::status::DriverStatus;
use umbra_vmm::supervisor::front::protocol::{Request, Response};

use crate::cases::{Case, cases, kill};
use crate::machine::{DEVICE, SPARE, TestMachine, start, start_with_spare};
use crate::spares::wait_armed;

/// All of them.
pub const ALL: &[Case] = cases![
    a_restart_that_is_given_up_on_a_spare_leaves_none_of_its_image,
    a_spare_of_the_old_image_waits_while_a_new_one_is_on_trial,
    a_standby_of_the_old_image_waits_while_a_new_one_is_on_trial,
    a_new_image_on_trial_outlasts_the_sleep_of_the_host,
    a_restart_that_does_not_come_about_leaves_an_earlier_trial_on,
];

const OLD: &str = "6.12-fake of image";
const NEW: &str = "6.12-fake of image-new";

fn kernel(driver: &DriverStatus) -> &str {
    driver.kernel.as_deref().unwrap_or_default()
}

/// Restarts to `image`; returns the generation that serves then.
fn upgrade(machine: &TestMachine, image: Option<&str>) -> u32 {
    match machine.restart(image) {
        Response::Restarted { generation, .. } => generation,
        other => panic!("{other:?}"),
    }
}

/// Waits for a life behind `generation`, and returns it.
fn wait_next(machine: &TestMachine, generation: u32) -> DriverStatus {
    machine.wait_for("the next life", |driver| driver.state == StateName::Live && driver.generation > Some(generation))
}

/// Waits until the next life stands by.
fn wait_standby(machine: &TestMachine) {
    machine.wait_for("a standby", |driver| {
        driver.standby.as_ref().is_some_and(|standby| standby.state == StandbyStage::Ready)
    });
}

fn a_restart_that_is_given_up_on_a_spare_leaves_none_of_its_image() {
    let machine = start_with_spare("");
    wait_armed(&machine, 1, SPARE, 2);
    let Response::Error { what } = machine.restart(Some("image-without-carrier")) else { panic!("it has a carrier") };
    assert!(what.contains("its spare has no carrier") && what.contains("image of before"), "{what}");
    // Generation 3 was of that image, and is gone.
    let driver = wait_armed(&machine, 1, SPARE, 4);
    kill(driver.pid.unwrap());
    let driver = machine.wait_live(4);
    assert_eq!(kernel(&driver), OLD);
    machine.stop();
}

fn a_spare_of_the_old_image_waits_while_a_new_one_is_on_trial() {
    let machine = start_with_spare("");
    wait_armed(&machine, 1, SPARE, 2);
    assert_eq!(upgrade(&machine, Some("image-new")), 3);
    let driver = wait_armed(&machine, 3, DEVICE, 4);
    assert_eq!(kernel(&driver), NEW);
    machine.crash(CrashKind::Panic);
    assert_eq!(kernel(&machine.wait_live(4)), OLD, "at once, by the spare");
    let driver = wait_armed(&machine, 4, SPARE, 5);
    kill(driver.pid.unwrap());
    assert_eq!(kernel(&machine.wait_live(5)), OLD, "and so is the next one");
    machine.stop();
}

fn a_standby_of_the_old_image_waits_while_a_new_one_is_on_trial() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let first = upgrade(&machine, Some("image-new"));
    wait_standby(&machine);
    // A plain restart is one of the image that serves, though the standby is of the old one.
    let second = upgrade(&machine, None);
    assert!(second > first + 1);
    assert_eq!(kernel(&machine.wait_live(second)), NEW);
    wait_standby(&machine);
    machine.crash(CrashKind::Panic);
    let driver = wait_next(&machine, second);
    assert_eq!((kernel(&driver), driver.generation), (OLD, Some(second + 1)), "the standby's");
    machine.stop();
}

fn a_new_image_on_trial_outlasts_the_sleep_of_the_host() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let serving = upgrade(&machine, Some("image-new"));
    wait_standby(&machine);
    assert!(matches!(machine.ask(&Request::Sleep), Some(Response::Asleep { .. })));
    assert!(matches!(machine.ask(&Request::Wake), Some(Response::Awake { slept: true })));
    assert_eq!(kernel(&wait_next(&machine, serving)), NEW, "it has not failed");
    machine.stop();
}

fn a_restart_that_does_not_come_about_leaves_an_earlier_trial_on() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let serving = upgrade(&machine, Some("image-new"));
    assert!(matches!(machine.restart(Some("image-that-does-not-boot")), Response::Error { .. }));
    assert_eq!(kernel(&machine.wait_live(serving)), NEW, "it serves on");
    wait_standby(&machine);
    machine.crash(CrashKind::Panic);
    assert_eq!(kernel(&wait_next(&machine, serving)), OLD, "it was on trial");
    machine.stop();
}
