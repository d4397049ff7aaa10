//! A driver VM that was taken over attacks, life after life, by all that it has: what it achieves is its own end. The guest beside it loses
//! no byte and no tick, and the host is as before.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, say, scenario};
use umbra_tests::hostile::campaign::{self, Attacker, HostileSpec};

/// The attacked NIC, for how many seconds at least, and the seed: it begins with DMA, a line without end and a wrong generation, and lives
/// on honestly.
const SPEC: (&str, u32, u64) = ("rtl8139", 20, 2759);

#[test]
fn a_hostile_driver_vm_ends_itself_alone() {
    scenario(|| {
        let (nic, seconds, seed) = SPEC;
        let result =
            campaign::run(&HostileSpec { by: Attacker::DriverVm, nic: nic.into(), seconds, seed }, &say).or_tell();
        say(&result.table());
        assert!(result.is_sound(), "{:#?}", result.breaches);
        assert!(result.served > 0 && !result.attacks.is_empty(), "nothing was tried: {result:#?}");
    });
}
