//! Resets that the driver does by itself, inside a VM that lives on: the device may have lost its cache with them. They stand in the
//! kernel's log before the device answers again, so the log is looked at whenever results are there, before any of them is passed on.
//!
//! What is taken for a reset and is none costs one rewriting of what is not flushed. A driver that resets without a word is not noticed.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use crate::kernel_log::{self, LOG, MAX_RECORD};

/// What the kernel says when it resets a controller, a link or a disk, in lower case:
/// - `ata1: hard resetting link`, `nvme0: I/O tag 5 timeout, reset controller`, `controller is down; will reset`, `usb 1-1: reset
///   high-speed USB device`, `sd 0:0:0:0: Power-on or device reset occurred`, and what RAID controllers have in so many words;
/// - `nvme nvme0: 1/0/0 default/read/poll queues`, with which that driver ends each set-up of its controller.
const SIGNS: [&str; 2] = ["reset", "default/read/poll queues"];

/// The kernel's log, from a point on.
#[derive(Debug)]
pub struct Resets {
    log: Option<File>,
    record: Box<[u8; MAX_RECORD]>,
}

impl Resets {
    /// Follows the log from here on. Without one no reset is noticed.
    pub fn follow() -> Self {
        let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let mut log = OpenOptions::new().read(true).custom_flags(flags).open(LOG);
        if let Ok(log) = &mut log
            && let Err(error) = log.seek(SeekFrom::End(0))
        {
            kernel_log::error(&format!("cannot find the end of the kernel's log: {error}"));
        }
        if let Err(error) = &log {
            kernel_log::error(&format!("the driver's own resets are not noticed: {error}"));
        }
        Self::of(log.ok())
    }

    fn of(log: Option<File>) -> Self {
        Self { log, record: Box::new([0; MAX_RECORD]) }
    }

    /// A log that a test writes.
    #[cfg(test)]
    pub fn of_test(log: File) -> Self {
        Self::of(Some(log))
    }

    /// Whether a reset has begun since the last look.
    pub fn look(&mut self) -> bool {
        let Some(log) = &mut self.log else { return false };
        let mut seen = false;
        loop {
            match log.read(&mut self.record[..]) {
                Ok(0) => return seen,
                Ok(length) => seen |= is_reset(&String::from_utf8_lossy(&self.record[..length])),
                // Overwritten before it was read: it may have been a reset.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => seen = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return seen,
            }
        }
    }
}

/// Whether a record (`Documentation/ABI/testing/dev-kmsg`) is the kernel's own word of a reset.
fn is_reset(record: &str) -> bool {
    let Some((prefix, text)) = record.split_once(';') else { return false };
    let level = prefix.split(',').next().and_then(|level| level.parse::<u32>().ok());
    let line = text.lines().next().unwrap_or_default().to_lowercase();
    // The facility, above the three bits of the level, is 0 for the kernel.
    level.is_some_and(|level| level < 8) && SIGNS.iter().any(|sign| line.contains(sign))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_the_kernel_says_of_a_reset_is_known() {
        for line in [
            "4,512,5140900,-;nvme nvme0: I/O tag 12 (100c) opcode 0x1 (I/O Cmd) QID 1 timeout, reset controller\n",
            "4,512,5140900,-;nvme nvme0: controller is down; will reset: CSTS=0xffffffff, PCI_STATUS=0x10\n",
            "6,512,5140900,-;nvme nvme0: 1/0/0 default/read/poll queues\n SUBSYSTEM=pci\n",
            "3,1,1,-;ata1: hard resetting link\n",
            "5,1,1,-;sd 0:0:0:0: Power-on or device reset occurred\n",
            "6,1,1,c;usb 1-1: reset high-speed USB device number 2 using xhci_hcd\n",
            "4,1,1,-;megaraid_sas 0000:01:00.0: resetting fusion adapter scsi0.\n",
        ] {
            assert!(is_reset(line), "{line}");
        }
        for line in [
            "11,7,1000000,-;umbra-agent: a reset\n",
            "4,1,1,-;ata1: SATA link up 1.5 Gbps (SStatus 113 SControl 300)\n DEVICE=reset\n",
            "reset",
            "",
        ] {
            assert!(!is_reset(line), "{line}");
        }
    }

    #[test]
    fn each_reset_is_seen_once_and_the_log_is_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kmsg");
        let mut writer = File::create(&path).unwrap();
        let mut resets = Resets::of_test(File::open(&path).unwrap());
        assert!(!resets.look());
        writer.write_all(b"3,1,1,-;ata1: hard resetting link\n").unwrap();
        assert!(resets.look() && !resets.look());
    }
}
