//! Configuration spaces, BARs, and the NIC's DMA.

use std::io;
use std::time::{Duration, Instant};

use super::GIVES_UP;
use super::function::{Function, PAGE, Page, Registers};
use crate::hostile::plan::index;
use crate::random::Random;

/// Bytes of extended configuration space.
const SPACE: u64 = 4096;
const COMMAND: u64 = 4;
const BARS: u64 = 0x10;

/// Writes to all configuration spaces.
pub(super) fn config(random: &mut Random) -> io::Result<()> {
    let functions = Function::all();
    let begin = Instant::now();
    while begin.elapsed() < GIVES_UP && !functions.is_empty() {
        let function = &functions[index(random, functions.len())];
        let limit = if random.chance(0.3) { SPACE } else { 256 };
        let (offset, value) = (random.below(limit), random.next().to_le_bytes());
        let length = 1 << random.below(3);
        function.write_config(offset, &value[..length]);
    }
    Ok(())
}

/// Moves BARs over memory, over each other, over the interrupt controllers, and off again.
pub(super) fn bars(random: &mut Random) -> io::Result<()> {
    const PLACES: [u32; 9] =
        [0, 0x10_0000, 0x7F0_0000, 0x800_0000, 0xFEC0_0000, 0xFEE0_0000, 0xE000_0000, 0xC000_0000, 0xFFFF_F000];
    let functions = Function::all();
    let begin = Instant::now();
    while begin.elapsed() < GIVES_UP && !functions.is_empty() {
        let function = &functions[index(random, functions.len())];
        let place = PLACES[index(random, PLACES.len())] ^ (u32::from(random.chance(0.5)) << 12);
        function.write_config(BARS + 4 * random.below(6), &place.to_le_bytes());
        let command = u16::try_from(random.below(8)).unwrap_or(7);
        function.write_config(COMMAND, &command.to_le_bytes());
        if let Some(registers) = function.map(index(random, 6)) {
            registers.write32(index(random, registers.length()) & !3, u32::MAX);
        }
    }
    Ok(())
}

/// The RTL8139's registers, by bytes (RTL8139C datasheet, section 5): its ring is one address, and a frame to send another.
mod rtl8139 {
    pub(super) const ID: (u16, u16) = (0x10EC, 0x8139);
    pub(super) const SEND_STATUS: usize = 0x10;
    pub(super) const SEND_ADDRESS: usize = 0x20;
    pub(super) const RING: usize = 0x30;
    pub(super) const COMMAND: usize = 0x37;
    pub(super) const SEND_CONFIG: usize = 0x40;
    pub(super) const RECEIVE_CONFIG: usize = 0x44;
    /// Reset, then both directions.
    pub(super) const RESET: u8 = 0x10;
    pub(super) const ON: u8 = 0x0C;
    /// What is sent is received.
    pub(super) const LOOP: u32 = 3 << 17;
    /// Everything is received, into the largest ring.
    pub(super) const ALL: u32 = 0x1F | 3 << 11 | 7 << 13;
}

/// Has the NIC reach for all addresses.
pub(super) fn dma(random: &mut Random) -> io::Result<()> {
    let nic = Function::all().into_iter().find(|function| function.id == rtl8139::ID);
    let nic = nic.ok_or_else(|| io::Error::other("there is no NIC whose registers are known here"))?;
    nic.take();
    let registers = nic.map(1).ok_or_else(|| io::Error::other("its registers cannot be mapped"))?;
    let page = Page::new()?;
    page.write(0, &[0xA5; PAGE]);
    let begin = Instant::now();
    while begin.elapsed() < GIVES_UP {
        transfer(&registers, random, &page);
    }
    Ok(())
}

/// Has the NIC send from somewhere, and receive that somewhere.
fn transfer(registers: &Registers, random: &mut Random, page: &Page) {
    let anywhere = |random: &mut Random| -> u32 {
        let place = match random.below(4) {
            // Beyond this VM's memory, where the host's may be, and where interrupts go.
            0 => (128 << 20) + (random.below(3 << 30) & !3),
            1 => 0xFEE0_0000 + random.below(1 << 20),
            2 => random.below(128 << 20),
            _ => page.address,
        };
        u32::try_from(place & 0xFFFF_FFFC).unwrap_or(0)
    };
    registers.write8(rtl8139::COMMAND, rtl8139::RESET);
    registers.write32(rtl8139::RING, anywhere(random));
    registers.write8(rtl8139::COMMAND, rtl8139::ON);
    registers.write32(rtl8139::RECEIVE_CONFIG, rtl8139::ALL);
    registers.write32(rtl8139::SEND_CONFIG, if random.chance(0.8) { rtl8139::LOOP } else { 0 });
    for slot in 0..4 {
        registers.write32(rtl8139::SEND_ADDRESS + 4 * slot, anywhere(random));
        registers.write32(rtl8139::SEND_STATUS + 4 * slot, u32::try_from(60 + random.below(1400)).unwrap_or(60));
    }
    // The device has a thread of its own.
    std::thread::sleep(Duration::from_millis(1));
}
