//! A VM that was taken over attacks, life after life, by all that it has: a driver VM, or a guest beside another one on its NIC. What it
//! achieves is its own end. The guest beside it loses no byte and no tick, and the host is as before.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, say, scenario};
use umbra_tests::hostile::campaign::{self, Attacker, HostileSpec};

/// The seed begins with DMA, a line without end and a wrong generation, and lives on honestly.
#[test]
fn a_hostile_driver_vm_ends_itself_alone() {
    scenario(|| {
        nothing_is_achieved(&HostileSpec { by: Attacker::DriverVm, nic: "rtl8139".into(), seconds: 20, seed: 2759 })
    });
}

/// The seed begins with frames that promise anything, rings by no rule, and vectors that point anywhere.
#[test]
fn a_hostile_guest_harms_itself_alone() {
    scenario(|| nothing_is_achieved(&HostileSpec { by: Attacker::Guest, nic: "e1000e".into(), seconds: 15, seed: 37 }));
}

fn nothing_is_achieved(spec: &HostileSpec) {
    let result = campaign::run(spec, &say).or_tell();
    say(&result.table());
    assert!(result.is_sound(), "{:#?}", result.breaches);
    assert!(result.served > 0 && !result.attacks.is_empty(), "nothing was tried: {result:#?}");
}
