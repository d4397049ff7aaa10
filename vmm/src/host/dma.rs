//! Switches a function's DMA off from outside, while a VM still holds it: the command register's bus master bit (PCI
//! 3.0, section 6.2.2), through the host kernel's sysfs. A driver VM that is still alive could switch it on again; one
//! that has failed is killed next.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;

use super::sysfs::HostDevice;

/// Offset of the command register.
const COMMAND: u64 = 4;
/// Its bus master bit, in the low byte.
const BUS_MASTER: u8 = 1 << 2;

impl HostDevice {
    /// Clears the bus master bit.
    ///
    /// # Errors
    /// When the configuration space cannot be read or written, as without root.
    pub fn stop_dma(&self) -> io::Result<()> {
        let config = OpenOptions::new().read(true).write(true).open(self.directory().join("config"))?;
        let mut low = [0];
        config.read_exact_at(&mut low, COMMAND)?;
        config.write_all_at(&[low[0] & !BUS_MASTER], COMMAND)
    }
}

#[cfg(test)]
mod tests {
    use crate::host::sysfs::tests::FakeBus;

    #[test]
    fn only_the_bus_master_bit_is_cleared() {
        let bus = FakeBus::new();
        let card = bus.add("0000:01:00.0", Some(1), Some("vfio-pci"));
        let config = card.directory().join("config");
        std::fs::write(&config, [0x86, 0x80, 0x68, 0x26, 0x07, 0x05, 0x10, 0]).unwrap();
        card.stop_dma().unwrap();
        assert_eq!(std::fs::read(config).unwrap(), [0x86, 0x80, 0x68, 0x26, 0x03, 0x05, 0x10, 0]);
    }
}
