//! Functions passed straight to a guest, each kind of interrupt and BAR: the guest's own driver serves them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::Duration;

use common::{OrTell, STEP, assets, say, scenario};
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::machine::{Attach, Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::{Content, guest_address, peer_address};

/// NIC models, and how the guest's `/proc/interrupts` calls what they interrupt with.
const NICS: [(&str, &str); 4] = [
    ("e1000e", "PCI-MSIX"),
    ("igb", "PCI-MSIX"),
    // INTx; registers in a BAR smaller than a page.
    ("rtl8139", "IO-APIC"),
    ("e1000", "IO-APIC"),
];

/// Sound cards: their driver, the name that ALSA shows, the kind of interrupt.
const SOUND: [(&str, &str, &str, &str); 3] = [
    ("hda", "snd_hda_codec_generic snd_hda_intel", "HDA-Intel", "PCI-MSI"),
    // I/O ports alone.
    ("es1370", "snd_ens1370", "ENS1370", "IO-APIC"),
    ("ac97", "snd_intel8x0", "ICH", "IO-APIC"),
];

const BYTES: u64 = 8 << 20;

fn start(place: &mut Place, variable: &str, address: &str) -> Machine {
    let device = place.expect(&format!("vfio ${variable} && printf %s ${variable}"), STEP).or_tell();
    let mut spec = MachineSpec::one_guest(&device, "", address);
    spec.attach = Attach::Passthrough;
    Machine::start(place, &spec).or_tell()
}

#[test]
fn a_guest_drives_nics_of_every_kind() {
    scenario(drive_nics);
}

fn drive_nics() {
    let models: Vec<_> = NICS.iter().map(|(model, _)| *model).collect();
    let bench = Bench::boot(BenchSpec::new("passthrough-nics").nics(&models), &assets()).or_tell();
    let mut place = Place::Bench(Box::new(bench));
    place.peer().offer(BYTES, 100 << 20, u64::MAX).or_tell();
    for (index, (model, interrupt)) in NICS.iter().enumerate() {
        say(model);
        let machine = start(&mut place, &format!("NIC{index}"), &format!("{}/24", guest_address(index, 0)));
        let peer = peer_address(index);
        let script = format!("umbra-probe first-answer {peer} 20 >&2; wget -q -O - http://{peer}:8000/x | sha256sum");
        let sum = place.in_guest("web", &script, Duration::from_secs(60)).or_tell();
        assert!(sum.starts_with(&Content { bytes: BYTES }.sha256()), "{model}: {sum}");
        let lines = place.in_guest("web", "grep -E ' e(th|np)' /proc/interrupts", STEP).or_tell();
        assert!(lines.contains(interrupt), "{model}: {lines}");
        let complaints =
            place.in_guest("web", "dmesg | grep -iE 'nobody cared|transmit queue.*timed out' || true", STEP);
        assert_eq!(complaints.or_tell(), "", "{model}");
        machine.stop(&mut place).or_tell();
    }
}

#[test]
fn a_guest_finds_sound_cards() {
    scenario(find_sound_cards);
}

fn find_sound_cards() {
    let models: Vec<_> = SOUND.iter().map(|(model, ..)| *model).collect();
    let bench = Bench::boot(BenchSpec::new("passthrough-sound").nics(&[]).sound(&models), &assets()).or_tell();
    let mut place = Place::Bench(Box::new(bench));
    for (index, (model, modules, card, interrupt)) in SOUND.iter().enumerate() {
        say(model);
        let machine = start(&mut place, &format!("SND{index}"), "");
        // The codec's driver before the controller's: no module is loaded behind the kernel's back here.
        let script = format!(
            "rmmod snd_hda_intel 2>/dev/null; for m in {modules}; do modprobe $m; done; \
            await 20 grep -q {card} /proc/asound/cards; cat /proc/asound/cards"
        );
        let cards = place.in_guest("web", &script, STEP).or_tell();
        assert!(cards.contains(card), "{model}: {cards}");
        let lines = place.in_guest("web", "grep snd_ /proc/interrupts", STEP).or_tell();
        assert!(lines.contains(interrupt), "{model}: {lines}");
        machine.stop(&mut place).or_tell();
    }
}
