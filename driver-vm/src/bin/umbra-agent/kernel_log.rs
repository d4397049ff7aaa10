//! The agent's own messages go to the kernel log, so that they stand in order with the kernel's.
//!
//! The console is a serial line, which takes every character by itself: where a driver complains while it probes, the kernel
//! would wait for the line to be out. So the console's level leaves errors out ([`CONSOLE_LEVEL`]), and a thread here writes
//! them to it a little later ([`CALM`]), when there is nothing else to do. What is worse than an error, and all of a panic,
//! goes there at once.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::time::Duration;

use anyhow::Context;

use crate::system;

/// Kernel log levels (`KERN_*`).
const CRITICAL: u8 = 2;
const ERROR: u8 = 3;
const INFO: u8 = 6;

/// For `kernel/printk`: messages below this level go to the console at once.
pub const CONSOLE_LEVEL: &str = "3";
/// The log: one record a read.
pub const LOG: &str = "/dev/kmsg";
const CONSOLE: &str = "/dev/console";
/// Largest record of [`LOG`] (`PRINTKRB_RECORD_MAX`, with room for what the kernel adds).
pub const MAX_RECORD: usize = 8192;

/// Delay before errors go to the console: a card's driver has mostly begun to serve by then.
const CALM: Duration = Duration::from_millis(500);

/// Starts the thread that writes errors to the console, from now on.
///
/// # Errors
/// No log, no console or no thread.
pub fn follow() -> anyhow::Result<()> {
    let mut log = File::open(LOG).context("cannot read the kernel's log")?;
    log.seek(SeekFrom::End(0)).context("cannot find the end of the kernel's log")?;
    let console = OpenOptions::new().write(true).open(CONSOLE).context("cannot open the console")?;
    std::thread::Builder::new()
        .name("kernel-log".into())
        .spawn(move || copy_errors(log, console))
        .context("cannot start a thread")?;
    Ok(())
}

fn copy_errors(mut log: File, mut console: File) {
    system::go_last();
    let mut record = [0; MAX_RECORD];
    loop {
        match log.read(&mut record) {
            Ok(length) => {
                if let Some((at, line)) = console_line(&String::from_utf8_lossy(&record[..length])) {
                    // The log's clock begins with the kernel, as this one.
                    let age = Duration::from_millis(system::uptime_ms()).saturating_sub(at);
                    std::thread::sleep(CALM.saturating_sub(age));
                    // A console that takes nothing is no reason to end.
                    let _ = console.write_all(line.as_bytes());
                }
            }
            // Overwritten before it was read: the log goes on behind.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(_) => return,
        }
    }
}

/// A record (`Documentation/ABI/testing/dev-kmsg`) as the console has its lines, if it is an error, and when it came.
fn console_line(record: &str) -> Option<(Duration, String)> {
    let (prefix, rest) = record.split_once(';')?;
    let mut fields = prefix.split(',');
    let level: u32 = fields.next()?.parse().ok()?;
    let micros: u64 = fields.nth(1)?.parse().ok()?;
    let text = rest.lines().next()?;
    let line = format!("[{:5}.{:06}] {text}\n", micros / 1_000_000, micros % 1_000_000);
    (level % 8 == u32::from(ERROR)).then_some((Duration::from_micros(micros), line))
}

/// Reports the failure that ends the driver VM: it is on the console when this returns.
pub fn fatal(message: &str) {
    write(CRITICAL, message);
}

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
    if let Ok(mut log) = OpenOptions::new().write(true).open(LOG) {
        let _ = log.write_all(format!("<{level}>umbra-agent: {message}\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_look_as_the_console_shows_them() {
        let record = "3,339,5140900,-;irq 16: nobody cared (try booting with the \"irqpoll\" option)\n SUBSYSTEM=pci\n";
        let line = "[    5.140900] irq 16: nobody cared (try booting with the \"irqpoll\" option)\n";
        assert_eq!(console_line(record), Some((Duration::from_micros(5_140_900), line.to_owned())));
        let ours = console_line("11,7,1000000,-;umbra-agent: x\n").map(|(_, line)| line);
        assert_eq!(ours.as_deref(), Some("[    1.000000] umbra-agent: x\n"));
        for other in ["4,340,1,-;a warning\n", "2,1,1,-;critical, there already\n", "", "x,1,1;y", "3,1", "3;y\n"] {
            assert_eq!(console_line(other), None, "{other:?}");
        }
    }
}
