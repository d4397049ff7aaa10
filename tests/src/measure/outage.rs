//! Outages through crashes of the driver VM, and the bare re-initialisation of the same driver in the same run.

use std::time::{Duration, Instant};

use super::results::OutageFigures;
use super::{GUEST, answer_of};
use crate::assets::Say;
use crate::demo::DemoError;
use crate::demo::machine::{Machine, NIC_DRIVER};
use crate::demo::outage::longest;
use crate::demo::place::Place;
use crate::peer::{guest_address, now_us, peer_address};
use crate::probe::reinit::Reinit;

/// Longest time for one recovery.
const LIMIT: Duration = Duration::from_secs(120);
/// Ticks are watched for so long after the driver VM serves again.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// Re-initialisations that are measured.
const RUNS: usize = 3;

/// Crashes the driver VM and takes the peer's and Umbra's figures.
pub(super) fn measure(
    machine: &mut Machine,
    place: &mut Place,
    crashes: u32,
    say: Say<'_>,
) -> Result<Vec<OutageFigures>, DemoError> {
    let ticks = format!("umbra-probe tick {} </dev/null >/dev/null 2>&1 & echo", peer_address(0));
    place.in_guest(GUEST, &ticks, Duration::from_secs(20))?;
    let mut all = Vec::new();
    for _ in 0..crashes {
        machine.await_standby(NIC_DRIVER, LIMIT)?;
        place.peer().take_ticks()?;
        std::thread::sleep(AFTERWARDS);
        let begin = now_us() - 400_000;
        place.expect("umbra crash nic0", Duration::from_secs(20))?;
        let live = machine.await_event(LIMIT, |event| event.event == "driver-live")?;
        let mut arrived = Vec::new();
        let start = Instant::now();
        while start.elapsed() < AFTERWARDS {
            std::thread::sleep(Duration::from_millis(50));
            arrived.extend(place.peer().take_ticks()?);
        }
        let peer_ms = longest(&arrived, guest_address(0, 0), begin, u64::MAX).map(|outage| outage.gap_ms);
        say(&format!("    away for {:.0} ms, as the peer saw it", peer_ms.unwrap_or(f64::NAN)));
        all.push(OutageFigures {
            peer_ms,
            umbra_ms: live.number("outage_ms"),
            parts: live.fields.get("parts").cloned().unwrap_or_default(),
        });
    }
    Ok(all)
}

/// Unbind, bind, up, first answer, in the guest that has this NIC to itself.
pub(super) fn reinit(place: &mut Place, (guest, nic): (&str, usize)) -> Result<Vec<Reinit>, DemoError> {
    let script = format!("umbra-probe reinit {}/24 {}", guest_address(nic, 0), peer_address(nic));
    (0..RUNS).map(|_| answer_of(place, guest, &script, Duration::from_secs(60))).collect()
}
