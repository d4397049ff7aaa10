//! The command line of the QEMU that is the test host.
//!
//! Invariant: every device under test has an IOMMU group of its own (a root port, or a function of the root bus), with
//! nothing but its second function in it if the spec wants one, and its place is told to the test host's init on the kernel
//! command line (`umbra.nic=`, `umbra.snd=`, `umbra.disk=`).

use std::fs;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::spec::{Accel, BenchSpec, Model};
use crate::lossy_disk::blockdev;

/// What a command line needs beside the spec.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initrd: &'a Path,
    pub(super) dir: &'a Path,
    /// TAP descriptors, one for each NIC.
    pub(super) taps: &'a [RawFd],
    /// The exec server's connected socket.
    pub(super) exec: RawFd,
    /// QEMU's monitor: a connected socket.
    pub(super) monitor: RawFd,
    /// Folder of driver VMs' snapshots, of all test hosts.
    pub(super) snapshots: &'a Path,
}

/// First slot on the root bus for conventional devices; 0x1f and the low ones are the chip set's and the bench's own.
const FIRST_CONVENTIONAL: u8 = 0x08;
/// First slot on the root bus for root ports.
const FIRST_ROOT_PORT: u8 = 0x10;

/// On a loaded machine QEMU's emulation now and then misses waking a halted CPU for its one-shot timer, and with it the
/// whole test host stands still. A periodic tick wakes it at the next beat. The check of the timer at boot fails there too.
const STEADY_CLOCK: &str = " highres=off nohz=off no_timer_check";

/// With a timer of its own QEMU's HDA codec drops a whole buffer (2048 frames) whenever the recording is late, as on a
/// loaded machine, and the end of what it was given when it is stopped.
const HDA_WITHOUT_LOSS: &str = "use-timer=off";

/// How long the time stamp counter is watched for its frequency.
const TSC_WATCH: Duration = Duration::from_millis(50);

/// An emulated CPU's time stamp counter is this machine's. Told its frequency, the test host need not find it out by
/// timing loops, which on a loaded machine came out three times wrong: then its seconds were as much too short.
fn tsc_khz() -> String {
    // SAFETY: every x86-64 CPU has the instruction; it only reads.
    let read = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, first) = (Instant::now(), read());
    std::thread::sleep(TSC_WATCH);
    let (ticks, time) = (read() - first, start.elapsed());
    let khz = u128::from(ticks) * 1_000_000 / time.as_nanos().max(1);
    format!(" tsc_early_khz={khz}")
}

/// Hardware virtualisation is there, so that KVM's guests can be hosts themselves.
pub fn real_kvm() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let nested = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    nested && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

struct Slots {
    conventional: u8,
    root_port: u8,
    arguments: Vec<String>,
    cmdline: String,
}

impl Slots {
    fn add(&mut self, words: &[&str]) {
        self.arguments.extend(words.iter().map(|&word| word.to_owned()));
    }

    /// Gives `model` a place; returns the `bus=...` part of its `-device`.
    fn place(&mut self, model: &Model, kind: &str) -> String {
        if model.is_conventional() {
            let slot = self.conventional;
            self.conventional += 1;
            self.cmdline.push_str(&format!(" umbra.{kind}=pci:{slot:02x}"));
            return format!("bus=pcie.0,addr={slot:#x}");
        }
        let slot = self.root_port;
        self.root_port += 1;
        let port =
            format!("pcie-root-port,id=rp{slot},slot={slot},chassis={slot},bus=pcie.0,addr={slot:#x},{PORT_SPEED}");
        self.add(&["-device", &port]);
        self.cmdline.push_str(&format!(" umbra.{kind}=rp:{slot:02x}"));
        format!("bus=rp{slot}")
    }
}

/// QEMU's root ports say that they run at 16 GT/s. Above 5 GT/s Linux waits after a bus reset for the link to be reported
/// active; QEMU never does that, and the reset would fail after 1.1 s. The NICs here are of the time of 5 GT/s.
const PORT_SPEED: &str = "x-speed=5";

/// Room for translated code, MiB: the most that QEMU takes. Each boot of a VM fills some 40, and when there is no more room all is
/// thrown away at once: the machine then stands still for a quarter of a second and more, in which a player's buffer runs out.
const TRANSLATED_MIB: u32 = 2048;

/// The arguments.
pub(super) fn arguments(spec: &BenchSpec, parts: &Parts<'_>) -> Vec<String> {
    let kvm = spec.accel == Accel::Kvm || (spec.accel == Accel::Auto && real_kvm());
    let mut slots = Slots {
        conventional: FIRST_CONVENTIONAL,
        root_port: FIRST_ROOT_PORT,
        arguments: Vec::new(),
        cmdline: String::new(),
    };
    let dir = parts.dir.display();
    slots.add(&[
        "-machine",
        "q35,kernel-irqchip=split",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-name",
        "debug-threads=on",
    ]);
    // A kernel that panics resets the machine, which ends the emulator at once. Where a reset is a boot, it stands still instead.
    let panic = if spec.reboots {
        0
    } else {
        slots.add(&["-no-reboot"]);
        -1
    };
    if kvm {
        slots.add(&["-accel", "kvm", "-cpu", "host"]);
    } else {
        // An EPYC without what TCG lacks: the same CPU, and no page of warnings.
        slots.add(&["-accel", &format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}"), "-cpu"]);
        slots.add(&["EPYC,+svm,+npt,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec"]);
    }
    slots.add(&["-smp", &spec.cpus.to_string(), "-m", &format!("{}M", spec.memory_mib)]);
    slots.add(&["-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"]);
    slots.add(&["-serial", &format!("file:{dir}/console.log")]);
    slots.add(&["-chardev", &format!("socket,id=exec,fd={}", parts.exec)]);
    slots.add(&["-device", "virtio-serial-pci,bus=pcie.0,addr=0x3"]);
    slots.add(&["-device", "virtserialport,chardev=exec,name=umbra.bench"]);
    slots.add(&["-chardev", &format!("socket,id=monitor,fd={}", parts.monitor)]);
    slots.add(&["-mon", "chardev=monitor,mode=control"]);
    if spec.shell {
        slots.add(&["-chardev", "stdio,id=tty,signal=off", "-device", "virtconsole,chardev=tty"]);
        slots.cmdline.push_str(" umbra.shell");
    }
    slots.add(&["-virtfs", &format!("local,path={dir}/share,mount_tag=share,security_model=none,multidevs=remap")]);
    // Owner and mode are kept beside: in the test host the files are root's, whoever runs this.
    let snapshots = parts.snapshots.display();
    slots.add(&["-virtfs", &format!("local,path={snapshots},mount_tag=snapshots,security_model=mapped-file")]);
    if let Some(root) = &spec.root {
        slots.add(&["-drive", &format!("if=none,id=root,format=raw,snapshot=on,file={}", root.display())]);
        slots.add(&["-device", "virtio-blk-pci,drive=root,serial=umbra-root,bus=pcie.0,addr=0x4"]);
        slots.cmdline.push_str(" umbra.root");
    }
    nics(spec, parts, &mut slots);
    sound(spec, parts, &mut slots);
    storage(spec, parts, &mut slots);
    slots.add(&["-kernel", &parts.kernel.display().to_string(), "-initrd", &parts.initrd.display().to_string()]);
    let clock = if kvm { String::new() } else { format!("{STEADY_CLOCK}{}", tsc_khz()) };
    let cmdline = format!(
        "console=ttyS0 loglevel=7 panic={panic} intel_iommu=on iommu=pt tsc=reliable{clock}{} {}",
        slots.cmdline, spec.cmdline
    );
    slots.add(&["-append", cmdline.trim_end()]);
    slots.arguments
}

fn nics(spec: &BenchSpec, parts: &Parts<'_>, slots: &mut Slots) {
    for (n, (model, tap)) in spec.nics.iter().zip(parts.taps).enumerate() {
        slots.add(&["-netdev", &format!("tap,id=net{n},fd={tap},vhost=off")]);
        if let Some(bytes) = spec.capture {
            let file = parts.dir.join(format!("nic{n}.pcap"));
            let dump = format!("filter-dump,id=dump{n},netdev=net{n},maxlen={bytes},file={}", file.display());
            slots.add(&["-object", &dump]);
        }
        let place = slots.place(model, "nic");
        let two = spec.second_function && !model.is_conventional();
        let first = if two { ",addr=0.0,multifunction=on" } else { "" };
        let device = format!("{},netdev=net{n},mac=52:54:00:77:00:{n:02x},romfile=,{place}{first}", model.name());
        slots.add(&["-device", &device]);
        if two {
            let second = format!("{},mac=52:54:00:77:01:{n:02x},romfile=,{place},addr=0.1", model.name());
            slots.add(&["-device", &second]);
        }
    }
}

fn sound(spec: &BenchSpec, parts: &Parts<'_>, slots: &mut Slots) {
    if spec.sound.is_empty() {
        return;
    }
    let wav = parts.dir.join("sound.wav");
    slots.add(&["-audiodev", &format!("wav,id=wav,path={},out.frequency={}", wav.display(), spec.wav_rate)]);
    slots.add(&["-audiodev", "none,id=silence"]);
    for (n, model) in spec.sound.iter().enumerate() {
        let place = slots.place(model, "snd");
        if model.name().contains("hda") {
            slots.add(&["-device", &format!("{},id=hda{n},{place}", model.name())]);
            slots.add(&["-device", &format!("hda-output,bus=hda{n}.0,audiodev=wav,{HDA_WITHOUT_LOSS}")]);
            // A file records nothing; the microphone of a second codec hears silence in real time.
            slots.add(&["-device", &format!("hda-micro,bus=hda{n}.0,audiodev=silence")]);
        } else {
            slots.add(&["-device", &format!("{},audiodev=wav,{place}", model.name())]);
        }
    }
}

fn storage(spec: &BenchSpec, parts: &Parts<'_>, slots: &mut Slots) {
    for (n, disk) in spec.storage.iter().enumerate() {
        match &disk.nbd {
            Some(socket) => slots.add(&["-blockdev", &blockdev(socket, &format!("disk{n}")).to_string()]),
            None => {
                let file = parts.dir.join(format!("disk{n}.raw"));
                // Without a cache each write would wait for the file: it is the cost of the way there that is measured.
                let unsafe_cache = if disk.hides_cache { ",cache=unsafe" } else { "" };
                slots.add(&["-drive", &format!("if=none,id=disk{n},format=raw,file={}{unsafe_cache}", file.display())]);
            }
        }
        let place = slots.place(&disk.model, "disk");
        let model = disk.model.name();
        // As devices of the newer interface, behind the IOMMU as the others.
        let hides = if disk.hides_cache { ",write-cache=off" } else { "" };
        let modern = if model.starts_with("virtio-") { ",disable-legacy=on,iommu_platform=on" } else { "" };
        let Some((medium, bus)) = disk.disk_model(&format!("ctl{n}")) else {
            slots.add(&["-device", &format!("{model},drive=disk{n},serial=disk{n},{place}{modern}{hides}")]);
            continue;
        };
        // A card's serial number is part of its model.
        let serial = if medium == "sd-card" { String::new() } else { format!(",serial=disk{n}") };
        slots.add(&["-device", &format!("{model},id=ctl{n},{place}{modern}")]);
        slots.add(&["-device", &format!("{medium},id=medium{n},drive=disk{n}{serial}{bus}{hides}")]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Storage;

    fn line(spec: &BenchSpec) -> String {
        let (kernel, initrd) = (Path::new("k"), Path::new("i"));
        let (dir, snapshots) = (Path::new("d"), Path::new("s"));
        let parts = Parts { kernel, initrd, dir, taps: &[5, 6, 7], exec: 4, monitor: 8, snapshots };
        arguments(spec, &parts).join(" ")
    }

    #[test]
    fn each_device_has_a_place_of_its_own_that_init_knows() {
        let line = line(&BenchSpec::new("t").nics(&["e1000e", "rtl8139", "igb"]).sound(&["hda", "es1370"]));
        for part in [
            "e1000e,netdev=net0,mac=52:54:00:77:00:00,romfile=,bus=rp16",
            "rtl8139,netdev=net1,mac=52:54:00:77:00:01,romfile=,bus=pcie.0,addr=0x8",
            "igb,netdev=net2,mac=52:54:00:77:00:02,romfile=,bus=rp17",
            "intel-hda,id=hda0,bus=rp18",
            "ES1370,audiodev=wav,bus=pcie.0,addr=0x9",
            "umbra.nic=rp:10 umbra.nic=pci:08 umbra.nic=rp:11 umbra.snd=rp:12 umbra.snd=pci:09",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn a_disk_is_a_file_or_what_a_server_has() {
        let disk = |nbd: Option<&str>| Storage { nbd: nbd.map(Into::into), ..Storage::empty("nvme", 512) };
        let spec = BenchSpec { storage: vec![disk(None), disk(Some("/s"))], ..BenchSpec::new("t") };
        let line = line(&spec);
        for part in [
            "-drive if=none,id=disk0,format=raw,file=d/disk0.raw ",
            "nvme,drive=disk0,serial=disk0,bus=rp17",
            &format!("-blockdev {} ", blockdev(Path::new("/s"), "disk1")),
            "nvme,drive=disk1,serial=disk1,bus=rp18",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn a_disk_may_have_a_controller_of_its_own() {
        let disk = |model: &str| Storage { hides_cache: model == "ich9-ahci", ..Storage::empty(model, 512) };
        let storage = vec![disk("ich9-ahci"), disk("lsi53c895a"), disk("sdhci-pci"), disk("virtio-blk-pci")];
        let line = line(&BenchSpec { storage, ..BenchSpec::new("t") });
        for part in [
            "-device ich9-ahci,id=ctl0,bus=rp17 -device ide-hd,id=medium0,drive=disk0,serial=disk0,bus=ctl0.0,write-cache=off ",
            "file=d/disk0.raw,cache=unsafe ",
            "-device lsi53c895a,id=ctl1,bus=pcie.0,addr=0x8 -device scsi-hd,id=medium1,drive=disk1,serial=disk1,bus=ctl1.0",
            "-device sdhci-pci,id=ctl2,bus=pcie.0,addr=0x9 -device sd-card,id=medium2,drive=disk2",
            "-device virtio-blk-pci,drive=disk3,serial=disk3,bus=rp18,disable-legacy=on,iommu_platform=on",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn a_reset_ends_the_emulator_unless_it_is_a_boot() {
        for (reboots, ends, panic) in [(false, true, " panic=-1 "), (true, false, " panic=0 ")] {
            let line = line(&BenchSpec { reboots, ..BenchSpec::new("t") });
            assert!(line.contains(" -no-reboot ") == ends && line.contains(panic), "{line}");
        }
    }

    #[test]
    fn a_second_function_sits_beside_the_first() {
        let spec = BenchSpec { second_function: true, ..BenchSpec::new("t").nics(&["e1000e", "rtl8139"]) };
        let line = line(&spec);
        for part in [
            "mac=52:54:00:77:00:00,romfile=,bus=rp16,addr=0.0,multifunction=on -device e1000e,mac=52:54:00:77:01:00",
            "romfile=,bus=rp16,addr=0.1",
            "romfile=,bus=pcie.0,addr=0x8 ",
            "umbra.nic=rp:10 umbra.nic=pci:08",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }
}
