//! A driver for virtio devices that follows no rule (virtio 1.2, sections 2.7 and 4.1.4.3): rings, registers and doorbells, by the random
//! numbers of the plan.

use std::io;
use std::time::Instant;

use super::GIVES_UP;
use super::function::{Function, PAGE, Page, Registers};
use crate::hostile::plan::index;
use crate::random::Random;

/// Vendor of virtio devices, and a network device. The console is left to its driver: by it this life is heard.
const VIRTIO: u16 = 0x1AF4;
const NET: u16 = 0x1041;
/// Parts of the BAR of memory, as `vmm/src/vm/virtio/pci.rs` has them.
const NOTIFY: usize = 0x3000;
const MSIX_TABLE: usize = 0x4000;
/// Registers of the common configuration, at the BAR's begin.
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const STATUS: usize = 20;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_VECTOR: usize = 26;
const QUEUE_ENABLE: usize = 28;
const QUEUE_DESCRIPTORS: usize = 32;
const QUEUE_DRIVER: usize = 40;
const QUEUE_DEVICE: usize = 48;
const QUEUE_RESET: usize = 58;
/// Status bits: acknowledged, driver, then features and the driver itself are fine.
const DRIVER: u8 = 3;
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
/// Queues of a device that are used.
const QUEUES: u16 = 4;
/// Entries of a queue: a page of descriptors.
const SIZE: u16 = 256;
/// Pages for data.
const DATA: usize = 8;
/// Rounds between two looks at the clock.
const BURST: u32 = 64;

/// A queue's rings.
struct Ring {
    descriptors: Page,
    available: Page,
    used: Page,
    /// What the driver's index says.
    next: u16,
}

/// A device under attack.
struct Device {
    registers: Registers,
    rings: Vec<Ring>,
    data: Vec<Page>,
}

/// The ends of the guests' links.
fn ends() -> impl Iterator<Item = Function> {
    Function::all().into_iter().filter(|function| function.id == (VIRTIO, NET))
}

impl Device {
    fn take(function: &Function) -> io::Result<Option<Self>> {
        function.take();
        let Some(registers) = function.map(0) else { return Ok(None) };
        let ring = || -> io::Result<Ring> {
            Ok(Ring { descriptors: Page::new()?, available: Page::new()?, used: Page::new()?, next: 0 })
        };
        let rings = (0..QUEUES).map(|_| ring()).collect::<io::Result<_>>()?;
        let data = (0..DATA).map(|_| Page::new()).collect::<io::Result<_>>()?;
        Ok(Some(Self { registers, rings, data }))
    }

    /// Starts it as a driver should, with these features.
    fn start(&mut self, features: u64) {
        let registers = &self.registers;
        registers.write8(STATUS, 0);
        registers.write8(STATUS, DRIVER);
        self.set_features(features);
        registers.write8(STATUS, DRIVER | FEATURES_OK);
        for (index, ring) in (0..).zip(&mut self.rings) {
            ring.next = 0;
            for page in [&ring.descriptors, &ring.available, &ring.used] {
                page.write(0, &[0; PAGE]);
            }
            registers.write16(QUEUE_SELECT, index);
            registers.write16(QUEUE_SIZE, SIZE);
            registers.write16(QUEUE_VECTOR, 0);
            registers.write64(QUEUE_DESCRIPTORS, ring.descriptors.address);
            registers.write64(QUEUE_DRIVER, ring.available.address);
            registers.write64(QUEUE_DEVICE, ring.used.address);
            registers.write16(QUEUE_ENABLE, 1);
        }
        registers.write8(STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn set_features(&self, features: u64) {
        for (half, shift) in [(0, 0), (1, 32)] {
            self.registers.write32(DRIVER_FEATURE_SELECT, half);
            // A half is meant.
            #[expect(clippy::cast_possible_truncation, reason = "one half")]
            self.registers.write32(DRIVER_FEATURE, (features >> shift) as u32);
        }
    }

    fn kick(&self, queue: u16) {
        self.registers.write16(NOTIFY + 4 * usize::from(queue), queue);
    }

    /// Writes descriptor `at` of a queue.
    fn describe(&self, queue: usize, at: u16, (address, length, flags, next): (u64, u32, u16, u16)) {
        let ring = &self.rings[queue];
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        ring.descriptors.write(16 * usize::from(at % SIZE), &bytes);
    }

    /// Offers what begins at descriptor `head`, and moves the index by `by`.
    fn offer(&mut self, queue: usize, head: u16, by: u16) {
        let ring = &mut self.rings[queue];
        ring.available.write(4 + 2 * usize::from(ring.next % SIZE), &head.to_le_bytes());
        ring.next = ring.next.wrapping_add(by);
        ring.available.write(2, &ring.next.to_le_bytes());
    }

    /// An address: in memory, at its ends, beyond it, of registers, or any.
    fn address(&self, random: &mut Random) -> u64 {
        let near = random.below(8192);
        match random.below(8) {
            0 => near,
            1 => (128 << 20) - 4096 + near,
            2 => (4 << 30) - 4096 + near,
            3 => 0xFEE0_0000 + near,
            4 => u64::MAX - near,
            5 => random.next(),
            6 => self.rings[index(random, self.rings.len())].used.address + near / 2,
            _ => self.data[index(random, self.data.len())].address,
        }
    }

    /// One thing that no driver does.
    fn misuse(&mut self, random: &mut Random) {
        const LENGTHS: [u32; 10] = [0, 1, 11, 12, 60, 1526, 65_550, 1 << 20, 1 << 31, u32::MAX];
        const STEPS: [u16; 6] = [0, 1, 1, SIZE, SIZE + 1, 0x8000];
        let queue = index(random, self.rings.len());
        let number = u16::try_from(queue).unwrap_or(0);
        let any16 = |random: &mut Random| u16::try_from(random.next() >> 48).unwrap_or(0);
        match random.below(12) {
            // Descriptors: chains that loop, tables of tables, anything.
            0..=4 => {
                let head = any16(random) % SIZE;
                let mut at = head;
                for _ in 0..random.below(6) {
                    let next = if random.chance(0.2) { head } else { any16(random) % (SIZE + SIZE / 8) };
                    let flags = (any16(random) & 7) | u16::from(random.chance(0.5));
                    let length = LENGTHS[index(random, LENGTHS.len())];
                    self.describe(queue, at, (self.address(random), length, flags, next));
                    at = next;
                }
                let head = if random.chance(0.1) { any16(random) } else { head };
                self.offer(queue, head, STEPS[index(random, STEPS.len())]);
                self.kick(number);
            }
            // The used ring and both event indices are forged.
            5 => {
                let ring = &self.rings[queue];
                ring.used.write(index(random, PAGE), &random.next().to_le_bytes());
                ring.available.write(4 + 2 * usize::from(SIZE), &any16(random).to_le_bytes());
                ring.used.write(2, &any16(random).to_le_bytes());
            }
            6 => (0..BURST).for_each(|_| self.kick(number)),
            // Features after they were accepted.
            7 => self.set_features(random.next()),
            // Rings elsewhere, while they run.
            8 => {
                let registers = &self.registers;
                registers.write16(QUEUE_SELECT, number);
                registers.write16(QUEUE_SIZE, any16(random));
                for register in [QUEUE_DESCRIPTORS, QUEUE_DRIVER, QUEUE_DEVICE] {
                    registers.write64(register, self.address(random));
                }
                registers.write16(QUEUE_ENABLE, 1);
            }
            9 => self.registers.write16(QUEUE_RESET - 2 * index(random, 2), 1),
            10 => self.registers.write8(STATUS, u8::try_from(random.below(256)).unwrap_or(0)),
            _ => self.start(u64::MAX >> random.below(64)),
        }
    }
}

/// Works until the attack is over.
fn for_a_while(mut work: impl FnMut()) {
    let begin = Instant::now();
    while begin.elapsed() < GIVES_UP {
        (0..BURST).for_each(|_| work());
    }
}

/// Rings.
pub(super) fn rings(random: &mut Random) -> io::Result<()> {
    for function in ends() {
        let Some(mut device) = Device::take(&function)? else { continue };
        device.start(1 << 32);
        for_a_while(|| device.misuse(random));
    }
    Ok(())
}

/// Doorbells of all devices and queues, also those that are not there.
pub(super) fn kicks(random: &mut Random) -> io::Result<()> {
    let mapped: Vec<_> = Function::all().iter().filter(|f| f.id.0 == VIRTIO).filter_map(|f| f.map(0)).collect();
    if mapped.is_empty() {
        return Err(io::Error::other("no registers can be mapped"));
    }
    for_a_while(|| {
        let queue = random.below(1 << 10);
        let value = u16::try_from(queue).unwrap_or(0);
        mapped[index(random, mapped.len())].write16(NOTIFY + 4 * usize::from(value), value);
    });
    Ok(())
}

/// Frames by good rings, with headers that promise anything, from anybody.
pub(super) fn headers(random: &mut Random) -> io::Result<()> {
    /// What a frame may offer: checksums, segments.
    const FEATURES: u64 = 1 << 32 | 1 << 16 | 0xF << 11 | 3;
    const SENDS: usize = 1;
    const ETHERTYPES: [[u8; 2]; 5] = [[8, 0], [8, 6], [0x86, 0xdd], [0x81, 0], [0, 0]];
    for function in ends() {
        let Some(mut device) = Device::take(&function)? else { continue };
        device.start(FEATURES);
        let (mut at, mut frames) = (0u16, 0u32);
        for_a_while(|| {
            let page = &device.data[index(random, DATA)];
            let noise: Vec<u8> = (0..16).flat_map(|_| random.next().to_le_bytes()).collect();
            page.write(0, &noise);
            // The header's first two bytes say what is promised; the destination is everybody, often.
            page.write(0, &[u8::try_from(random.below(4)).unwrap_or(0), [0, 1, 4, 5, 3, 0x81][index(random, 6)]]);
            if random.chance(0.7) {
                page.write(12, &[0xff; 6]);
            }
            page.write(24, &ETHERTYPES[index(random, ETHERTYPES.len())]);
            let length = u32::try_from(random.below(4097)).unwrap_or(0);
            let (address, next) = (page.address, at.wrapping_add(1) % SIZE);
            let parts = if random.chance(0.3) { 18 } else { 1 };
            for part in 0..parts {
                let more = u16::from(part + 1 < parts);
                device.describe(SENDS, (at + part) % SIZE, (address, length, more, (at + part + 1) % SIZE));
            }
            device.offer(SENDS, at, 1);
            device.kick(1);
            (at, frames) = (next, frames + 1);
            // The other end is given time to take some.
            if frames.is_multiple_of(u32::from(SIZE)) {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
    }
    Ok(())
}

/// Vectors that point anywhere, of devices that interrupt.
pub(super) fn vectors(random: &mut Random) -> io::Result<()> {
    const ENTRIES: usize = 8;
    const ENABLE: [u16; 4] = [0x8000, 0xC000, 0, 0x87FF];
    for function in ends() {
        let Some(mut device) = Device::take(&function)? else { continue };
        device.start(1 << 32);
        for_a_while(|| {
            let entry = MSIX_TABLE + 16 * index(random, ENTRIES);
            let address = [0xFEE0_0000 | random.below(1 << 20), random.next(), 0, u64::MAX][index(random, 4)];
            device.registers.write64(entry, address);
            device.registers.write32(entry + 8, u32::try_from(random.next() >> 32).unwrap_or(0));
            device.registers.write32(entry + 12, u32::try_from(random.below(2)).unwrap_or(0));
            // Message control stands in the capability's upper half, wherever that is.
            for offset in (0x40..0x100).step_by(4) {
                if random.chance(0.02) {
                    function.write_config(offset + 2, &ENABLE[index(random, ENABLE.len())].to_le_bytes());
                }
            }
            device.registers.write16(QUEUE_SELECT, 0);
            device.registers.write16(QUEUE_VECTOR, u16::try_from(random.below(16)).unwrap_or(0));
            device.describe(0, 0, (device.data[0].address, 2048, 2, 0));
            device.offer(0, 0, 1);
            device.kick(0);
        });
    }
    Ok(())
}

/// Registers of all functions, by values of all kinds.
pub(super) fn registers(random: &mut Random) -> io::Result<()> {
    let mapped: Vec<_> = Function::all().iter().flat_map(|f| (0..6).filter_map(move |bar| f.map(bar))).collect();
    if mapped.is_empty() {
        return Err(io::Error::other("no registers can be mapped"));
    }
    for_a_while(|| {
        let registers = &mapped[index(random, mapped.len())];
        let (at, value) = (index(random, registers.length()), random.next().to_le_bytes());
        match random.below(4) {
            0 => registers.write8(at, value[0]),
            1 => registers.write16(at & !1, u16::from_le_bytes([value[0], value[1]])),
            2 => registers.write32(at & !3, u32::from_le_bytes([value[0], value[1], value[2], value[3]])),
            _ => {
                registers.read32(at & !3);
            }
        }
    });
    Ok(())
}
