//! The agent's own messages go to the kernel log, so that they stand in order with the kernel's and the console's
//! log level decides which of them reach the (slow) serial line.

use std::fs::OpenOptions;
use std::io::Write;

/// Kernel log levels (`KERN_*`).
const ERROR: u8 = 3;
const INFO: u8 = 6;

/// Reports a failure.
pub fn error(message: &str) {
    write(ERROR, message);
}

/// Reports progress.
pub fn info(message: &str) {
    write(INFO, message);
}

fn write(level: u8, message: &str) {
    // One write is one record. Without /dev/kmsg there is nowhere left to complain.
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = log.write_all(format!("<{level}>umbra-agent: {message}\n").as_bytes());
    }
}
