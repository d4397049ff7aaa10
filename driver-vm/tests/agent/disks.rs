//! The disk service on real drivers. The test is the host: it holds the other ends of the ports, and reads and writes the pool in the
//! VM's memory, which is a file.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use umbra_driver_vm::block_protocol::{
    FromService, Hello, Operation, RECORD_BYTES, ToService, encode_hello, parse_hello,
};
use umbra_driver_vm::protocol::{BlockEnd, BlockPlan, CrashKind, DevicePlace, DiskPart, FromAgent, ToAgent};
use umbra_shadow::block::{Disk, SectorRange, Tag, WriteCache};
use umbra_shadow::{Generation, LinkId};

use crate::alone;
use crate::vm::DriverVm;

/// Sectors of a disk.
const SECTORS: u64 = 32_768;
/// Bytes of a VM's memory: the default for disks.
const MEMORY: u64 = 192 << 20;
/// For one answer.
const PATIENCE: Duration = Duration::from_secs(90);

/// A model of a controller with a disk.
struct Model {
    /// Arguments of QEMU; `{disk}` is the disk's drive, and `{serial}` its serial number.
    devices: &'static [&'static str],
    modules: &'static [&'static str],
    /// Driver that is reported.
    driver: &'static str,
    cache: WriteCache,
}

const NVME: Model = Model {
    devices: &["nvme,drive={disk},serial={serial},bus=pcie.0"],
    modules: &["nvme"],
    driver: "nvme",
    cache: WriteCache::Volatile,
};

const AHCI: Model = Model {
    devices: &["ide-hd,drive={disk},serial={serial},bus=ide.{n}"],
    modules: &["ahci"],
    driver: "ahci",
    cache: WriteCache::Volatile,
};

/// The host's ends of a VM's disks.
struct Host {
    vm: DriverVm,
    dir: PathBuf,
    memory: File,
    ports: Vec<UnixListener>,
}

/// A session at one port.
struct Session {
    stream: UnixStream,
    link: LinkId,
    hello: Hello,
    buffer: Vec<u8>,
}

impl Host {
    fn boot(model: &Model, disks: usize, ends: usize, words: &str) -> Self {
        Self::boot_with(model, disks, ends, words, &[])
    }

    /// With disks that begin with these bytes.
    fn boot_with(model: &Model, disks: usize, ends: usize, words: &str, contents: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_owned();
        for n in 0..disks {
            let disk = File::create(place.join(format!("disk{n}"))).unwrap();
            disk.set_len(SECTORS * 512).unwrap();
            disk.write_all_at(contents, 0).unwrap();
        }
        let memory = OpenOptions::new().read(true).write(true).create_new(true).open(place.join("memory")).unwrap();
        memory.set_len(MEMORY).unwrap();
        let ports: Vec<_> = (0..ends).map(|n| UnixListener::bind(place.join(format!("port{n}"))).unwrap()).collect();
        let name = model.devices.last().and_then(|device| device.split(',').next());
        let vm = DriverVm::boot_with(dir, model.modules, name, words, |command| {
            let shown = place.display();
            command.args(["-m", &format!("{}M", MEMORY >> 20), "-machine", "memory-backend=memory"]);
            let memory = format!("memory-backend-file,id=memory,size={MEMORY},mem-path={shown}/memory,share=on");
            command.args(["-object", &memory]);
            for n in 0..ends {
                command.args(["-chardev", &format!("socket,id=port{n},path={shown}/port{n},reconnect-ms=50")]);
                command.args(["-device", &format!("virtserialport,chardev=port{n},name=org.umbra.block.{n}")]);
            }
            for n in 0..disks {
                let drive =
                    format!("file={shown}/disk{n},if=none,id=disk{n},format=raw,discard=unmap,detect-zeroes=off");
                command.args(["-drive", &drive]);
                for device in model.devices {
                    let device = device.replace("{disk}", &format!("disk{n}")).replace("{serial}", &format!("SER{n}"));
                    command.args(["-device", &device.replace("{n}", &n.to_string())]);
                }
            }
        });
        Self { vm, dir: place, memory, ports }
    }

    fn configure(&mut self, ends: Vec<BlockEnd>, device: DevicePlace) {
        self.vm.begin();
        self.vm.send(&ToAgent::ConfigureBlock(BlockPlan { ends, appear_within_s: 10, device }));
    }

    fn expect_disks(&mut self) -> (String, Vec<Disk>) {
        let message = self.vm.expect(|message| matches!(message, FromAgent::Disks { .. }));
        let FromAgent::Disks { driver, disks, .. } = message else { unreachable!() };
        assert!(disks.iter().all(Disk::is_sane), "{disks:?}");
        (driver, disks)
    }

    /// A session, for which the port is connected.
    fn begin(&self, port: usize, attempt: u32) -> Session {
        let (mut stream, _) = self.ports[port].accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let link = LinkId { generation: Generation::new(3).unwrap(), attempt };
        stream.write_all(&ToService::Begin.encode(link)).unwrap();
        Session::greet(stream, link)
    }

    /// Where a place of the pool is in the VM's memory.
    fn locate(hello: &Hello, mut place: u64) -> u64 {
        for range in &hello.pool {
            if place < range.length {
                return range.start + place;
            }
            place -= range.length;
        }
        panic!("no such place");
    }

    fn fill(&self, session: &Session, place: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, Self::locate(&session.hello, place)).unwrap();
    }

    fn look(&self, session: &Session, place: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_exact_at(&mut bytes, Self::locate(&session.hello, place)).unwrap();
        bytes
    }

    fn sectors(&self, disk: usize, start: u64, count: usize) -> Vec<u8> {
        sectors(&self.dir.join(format!("disk{disk}")), start, count)
    }
}

fn sectors(disk: &Path, start: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * 512];
    File::open(disk).unwrap().read_exact_at(&mut bytes, start * 512).unwrap();
    bytes
}

impl Session {
    fn greet(stream: UnixStream, link: LinkId) -> Self {
        let mut buffer = Vec::new();
        // A stream: where the hello ends is where its JSON does.
        let hello = loop {
            let json = buffer.get(RECORD_BYTES..).unwrap_or_default();
            let hello = Hello::deserialize(&mut serde_json::Deserializer::from_slice(json));
            match hello {
                Ok(hello) => break hello,
                Err(_) => receive(&stream, &mut buffer),
            }
        };
        let length = encode_hello(&hello, link).unwrap().len();
        assert_eq!(parse_hello(&buffer[..length], link), Ok(Some(hello.clone())));
        buffer.drain(..length);
        Self { stream, link, hello, buffer }
    }

    fn send(&mut self, orders: &[ToService]) {
        let bytes: Vec<u8> = orders.iter().flat_map(|order| order.encode(self.link)).collect();
        self.stream.write_all(&bytes).unwrap();
    }

    fn answers(&mut self, count: usize) -> Vec<FromService> {
        while self.buffer.len() < count * RECORD_BYTES {
            receive(&self.stream, &mut self.buffer);
        }
        let bytes: Vec<u8> = self.buffer.drain(..count * RECORD_BYTES).collect();
        let parse = |record: &[u8; RECORD_BYTES]| FromService::parse(record, self.link).unwrap().unwrap();
        bytes.as_chunks().0.iter().map(parse).collect()
    }

    fn order(&mut self, order: ToService) -> FromService {
        self.send(&[order]);
        loop {
            // A driver may have reset its device while it probed.
            match self.answers(1)[0] {
                FromService::CacheLost => {}
                answer => return answer,
            }
        }
    }
}

fn receive(mut stream: &UnixStream, buffer: &mut Vec<u8>) {
    let mut chunk = [0; 4096];
    let length = stream.read(&mut chunk).unwrap();
    assert_ne!(length, 0, "the VM has closed the port");
    buffer.extend_from_slice(&chunk[..length]);
}

fn access(tag: u16, operation: Operation, start: u64, sectors: u64) -> ToService {
    ToService::Access { tag: Tag(tag), operation, at: SectorRange::new(start, sectors).unwrap() }
}

fn flush(tag: u16) -> ToService {
    ToService::Flush { tag: Tag(tag) }
}

fn done(tag: u16, bytes: u64) -> FromService {
    FromService::Done { tag: Tag(tag), errno: 0, bytes }
}

fn end(serial: Option<&str>, part: DiskPart) -> BlockEnd {
    BlockEnd { serial: serial.map(Into::into), part, read_only: false, has_cache: false, io_timeout_ms: 10_000 }
}

/// Writes, zeroes, discards, flushes and reads back, and finds what was written on the disk.
fn disk_is_served(model: &Model) {
    let _alone = alone();
    let mut host = Host::boot(model, 1, 1, "hugepages=8");
    host.configure(vec![end(None, DiskPart::Whole)], DevicePlace::Present);
    let (driver, disks) = host.expect_disks();
    assert_eq!((&driver[..], disks[0].cache), (model.driver, model.cache));
    assert!(disks[0].identity.sectors <= SECTORS && !disks[0].identity.read_only, "{disks:?}");
    let mut session = host.begin(0, 1);
    assert_eq!(session.hello.disk, disks[0]);
    let data: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[1] ^ 0x5a).collect();
    host.fill(&session, 4096, &data);
    assert_eq!(session.order(access(1, Operation::Write { place: 4096 }, 2048, 2048)), done(1, 1 << 20));
    assert_eq!(session.order(flush(2)), done(2, 0));
    assert_eq!(host.sectors(0, 2048, 2048), data);
    assert_eq!(session.order(access(3, Operation::Read { place: 3 << 20 }, 2056, 8)), done(3, 4096));
    assert_eq!(host.look(&session, 3 << 20, 4096), data[4096..8192]);
    for (tag, unmap) in [(4, true), (5, false)] {
        let start = 2048 + u64::from(tag) * 8;
        assert_eq!(session.order(access(tag, Operation::WriteZeroes { unmap }, start, 8)), done(tag, 0));
        assert_eq!(session.order(access(6, Operation::Read { place: 0 }, start, 8)), done(6, 4096));
        assert_eq!(host.look(&session, 0, 4096), [0; 4096]);
    }
    if disks[0].discards {
        assert_eq!(session.order(access(7, Operation::Discard, 4088, 8)), done(7, 0));
    }
    // As many at once as may be.
    let depth = session.hello.depth.min(64);
    let orders: Vec<_> =
        (0..depth).map(|tag| access(tag, Operation::Read { place: u64::from(tag) * 4096 }, 2048, 8)).collect();
    session.send(&orders);
    assert_eq!(session.answers(orders.len()).len(), orders.len());
    assert!((0..depth).all(|tag| host.look(&session, u64::from(tag) * 4096, 4096) == data[..4096]));
    // The host's end closes, and another session comes.
    drop(session);
    let mut session = host.begin(0, 2);
    assert_eq!(session.order(access(1, Operation::Read { place: 0 }, 2048, 8)), done(1, 4096));
    assert_eq!(host.look(&session, 0, 4096), data[..4096]);

    host.vm.send(&ToAgent::Crash { kind: CrashKind::Panic });
    host.vm.wait_for_end();
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn nvme_is_served() {
    disk_is_served(&NVME);
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn ahci_is_served() {
    disk_is_served(&AHCI);
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn virtio_blk_is_served() {
    let devices = &["virtio-blk-pci,drive={disk},serial={serial}"];
    disk_is_served(&Model { devices, modules: &["virtio_blk"], driver: "virtio_blk", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn virtio_scsi_is_served() {
    let devices = &["virtio-scsi-pci,id=hba{n}", "scsi-hd,drive={disk},serial={serial},bus=hba{n}.0"];
    disk_is_served(&Model { devices, modules: &["virtio_scsi"], driver: "virtio_scsi", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn megasas_is_served() {
    let devices = &["megasas-gen2,id=hba{n}", "scsi-hd,drive={disk},serial={serial},bus=hba{n}.0"];
    disk_is_served(&Model { devices, modules: &["megaraid_sas"], driver: "megaraid_sas", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn pvscsi_is_served() {
    let devices = &["pvscsi,id=hba{n}", "scsi-hd,drive={disk},serial={serial},bus=hba{n}.0"];
    disk_is_served(&Model { devices, modules: &["vmw_pvscsi"], driver: "vmw_pvscsi", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn sym53c8xx_is_served() {
    let devices = &["lsi53c895a,id=hba{n}", "scsi-hd,drive={disk},serial={serial},bus=hba{n}.0"];
    disk_is_served(&Model { devices, modules: &["sym53c8xx"], driver: "sym53c8xx", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn am53c974_is_served() {
    let devices = &["am53c974,id=hba{n}", "scsi-hd,drive={disk},serial={serial},bus=hba{n}.0"];
    disk_is_served(&Model { devices, modules: &["am53c974"], driver: "am53c974", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn usb_storage_is_served() {
    let devices = &["qemu-xhci,id=usb", "usb-storage,drive={disk},serial={serial},bus=usb.0"];
    disk_is_served(&Model { devices, modules: &["xhci-pci"], driver: "xhci_hcd", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn uas_is_served() {
    let devices = &["qemu-xhci,id=usb", "usb-uas,id=uas", "scsi-hd,drive={disk},serial={serial},bus=uas.0"];
    disk_is_served(&Model { devices, modules: &["xhci-pci"], driver: "xhci_hcd", cache: WriteCache::Volatile });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn sd_card_is_served() {
    let devices = &["sdhci-pci,id=sd", "sd-card,drive={disk},bus=sd-bus"];
    disk_is_served(&Model { devices, modules: &["sdhci-pci"], driver: "sdhci-pci", cache: WriteCache::None });
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn disks_are_found_by_serial_number_and_parts_keep_apart() {
    let _alone = alone();
    let mut host = Host::boot(&NVME, 2, 3, "hugepages=8");
    let half = DiskPart::Range { start: SECTORS / 2, sectors: 0 };
    let first_half = DiskPart::Range { start: 0, sectors: SECTORS / 2 };
    host.configure(
        vec![end(Some("SER1"), first_half), end(Some("SER0"), DiskPart::Whole), end(Some("SER1"), half)],
        DevicePlace::Present,
    );
    host.expect_disks();
    let mut sessions: Vec<_> = (0..3).map(|port| host.begin(port, 1)).collect();
    for (session, start) in sessions.iter_mut().zip([0, 0, SECTORS / 2]) {
        let number = u8::try_from(session.hello.pool[0].start >> 21 & 0xff).unwrap();
        host.fill(session, 0, &[number; 4096]);
        assert_eq!(session.order(access(1, Operation::Write { place: 0 }, start, 8)), done(1, 4096));
        assert_eq!(session.order(flush(1)), done(1, 0));
    }
    let number = |session: &Session| u8::try_from(session.hello.pool[0].start >> 21 & 0xff).unwrap();
    for (session, (disk, start)) in sessions.iter().zip([(1, 0), (0, 0), (1, SECTORS / 2)]) {
        assert_eq!(host.sectors(disk, start, 8), [number(session); 4096]);
    }
    host.vm.send(&ToAgent::Crash { kind: CrashKind::Reboot });
    host.vm.wait_for_end();
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn a_disk_that_is_not_there_or_not_the_only_one_is_named() {
    let _alone = alone();
    for (serial, said) in [(Some("SER9"), "the disk \"SER9\" has not appeared"), (None, "several disks")] {
        let mut host = Host::boot(&NVME, 2, 1, "");
        host.configure(vec![end(serial, DiskPart::Whole)], DevicePlace::Present);
        let failed = host.vm.expect(|message| matches!(message, FromAgent::Failed { .. }));
        let FromAgent::Failed { what } = failed else { unreachable!() };
        assert!(what.contains(said) && what.contains("SER0") && what.contains("SER1"), "{what}");
        host.vm.wait_for_end();
    }
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn a_standby_keeps_its_pool_and_serves_the_disk_that_comes() {
    let _alone = alone();
    let mut host = Host::boot(&NVME, 1, 1, "hugepages=8 umbra.awaits");
    let ready = host.vm.expect(|message| matches!(message, FromAgent::Ready { loaded: true, .. }));
    let FromAgent::Ready { unused, .. } = ready else { unreachable!() };
    assert!(!unused.is_empty(), "the VM gives no memory up");
    host.vm.begin_saved();
    let plan = BlockPlan { ends: vec![end(None, DiskPart::Whole)], appear_within_s: 10, device: DevicePlace::ToCome };
    host.vm.send(&ToAgent::ConfigureBlock(plan));
    host.vm.beats(4);
    host.vm.send(&ToAgent::Rescan);
    host.expect_disks();
    let mut session = host.begin(0, 1);
    assert_eq!(session.hello.pool.iter().map(|range| range.length).sum::<u64>(), 16 << 20);
    for range in &session.hello.pool {
        let is_apart = |start: u64, length: u64| start + length <= range.start || range.start + range.length <= start;
        assert!(unused.iter().all(|unused| is_apart(unused.start, unused.length)), "{unused:?} {range:?}");
    }
    host.fill(&session, 15 << 20, &[0x5a; 4096]);
    assert_eq!(session.order(access(1, Operation::Write { place: 15 << 20 }, 0, 8)), done(1, 4096));
    assert_eq!(session.order(flush(1)), done(1, 0));
    assert_eq!(host.sectors(0, 0, 8), [0x5a; 4096]);
    host.vm.send(&ToAgent::Crash { kind: CrashKind::Stall });
    host.vm.beats(2);
    session.send(&[flush(2)]);
    host.vm.beats(4);
    session.stream.set_nonblocking(true).unwrap();
    assert!((&session.stream).read(&mut [0; 64]).is_err(), "an order was taken");
    host.vm.send(&ToAgent::Crash { kind: CrashKind::Reboot });
    host.vm.wait_for_end();
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn a_partition_is_found_in_the_disk_s_table() {
    let _alone = alone();
    let mut table = [0; 512];
    // The second entry: type 0x83, 4096 sectors from 2048 (LBA, little-endian).
    table[462 + 4] = 0x83;
    table[462 + 8..462 + 12].copy_from_slice(&2048u32.to_le_bytes());
    table[462 + 12..462 + 16].copy_from_slice(&4096u32.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut host = Host::boot_with(&AHCI, 1, 1, "", &table);
    host.configure(vec![end(Some("SER0"), DiskPart::Partition(2))], DevicePlace::Present);
    let (_, disks) = host.expect_disks();
    let window = disks[0].identity.window;
    assert_eq!((window.start, window.sectors, disks[0].identity.sectors), (2048, 4096, SECTORS));
    let mut session = host.begin(0, 1);
    host.fill(&session, 0, &[0x5a; 512]);
    assert_eq!(session.order(access(1, Operation::Write { place: 0 }, 6143, 1)), done(1, 512));
    assert_eq!(session.order(flush(1)), done(1, 0));
    assert_eq!(host.sectors(0, 6143, 1), [0x5a; 512]);
    host.vm.send(&ToAgent::Crash { kind: CrashKind::Reboot });
    host.vm.wait_for_end();
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn a_reset_by_the_driver_itself_is_reported_before_the_answer() {
    let _alone = alone();
    let mut host = Host::boot(&AHCI, 1, 1, "hugepages=8");
    host.configure(vec![end(None, DiskPart::Whole)], DevicePlace::Present);
    host.expect_disks();
    let mut session = host.begin(0, 1);
    host.fill(&session, 0, &[0x5a; 4096]);
    let write = |tag| access(tag, Operation::Write { place: 0 }, 8 * u64::from(tag), 8);
    assert_eq!(session.order(write(0)), done(0, 4096));
    // So slow that the driver gives up a command after its 30 s, and resets the link.
    host.vm.tell_monitor("block_set_io_throttle disk0 64 0 0 0 0 0");
    // QEMU is that slow from the second request on.
    assert_eq!(session.order(write(0)), done(0, 4096));
    session.send(&(1..4).map(write).collect::<Vec<_>>());
    host.vm.beats(4 * 35);
    host.vm.tell_monitor("block_set_io_throttle disk0 0 0 0 0 0 0");
    let answers = session.answers(4);
    let lost = answers.iter().position(|answer| *answer == FromService::CacheLost);
    assert!(lost.is_some_and(|at| at < 3), "{answers:?}\n{}", host.vm.console());
    assert!((1..4).all(|tag| answers.contains(&done(tag, 4096))), "{answers:?}");
    assert_eq!(session.order(flush(1)), done(1, 0));
    assert_eq!(host.sectors(0, 0, 32), [0x5a; 32 * 512]);
    host.vm.send(&ToAgent::Crash { kind: CrashKind::Unbind });
    let answer = loop {
        if let FromService::Done { errno, .. } = session.order(write(0))
            && errno != 0
        {
            break errno;
        }
    };
    assert!([5, 6, 19].contains(&answer), "errno {answer}");
    host.vm.send(&ToAgent::Crash { kind: CrashKind::Reboot });
    host.vm.wait_for_end();
}
