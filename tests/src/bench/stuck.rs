//! The end of a test host whose emulator has lost an interrupt.
//!
//! Now and then one of QEMU's emulated processors stands still in the test host's kernel, which reads the entry of a level-triggered
//! interrupt in the I/O APIC again and again: the entry says that the interrupt was sent (remote IRR), and no processor ever acknowledges
//! it. Linux itself sees that, and says so on its console (`watchdog: BUG: soft lockup - CPU#0 stuck for 23s!`), every half minute: a
//! console that prints, and keeps waits that follow progress waiting. The emulator is killed when it says so of a time that no slowness
//! explains.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::process::{Companion, Process};
use super::{patience, tell_at_once};

/// How often the console is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A processor may stand still for so long, as on the reference machine: many times what anything in a kernel takes.
const LONGEST: Duration = Duration::from_secs(60);

/// For how long a processor has been stuck, by a line of Linux's watchdog (`watchdog_timer_fn`, kernel/watchdog.c).
fn stuck_for(line: &str) -> Option<Duration> {
    let (_, rest) = line.split_once("BUG: soft lockup - CPU#")?;
    let (seconds, _) = rest.split_once(" stuck for ")?.1.split_once("s!")?;
    seconds.parse().ok().map(Duration::from_secs)
}

/// Watches the `console` of the process `pid`, a child that has not been waited for, until what is returned is dropped.
///
/// # Errors
/// The process is gone, the console cannot be read, or there is no thread.
pub(super) fn on(pid: u32, name: &str, console: &Path) -> io::Result<Companion> {
    // The emulator may not have made it yet.
    let console = File::options().read(true).write(true).create(true).truncate(false).open(console)?;
    let (process, name, mut console) = (Process::open(pid)?, name.to_owned(), console);
    Companion::start("stuck", move |released| {
        let mut begun = Vec::new();
        while released.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            if console.read_to_end(&mut begun).is_err() {
                return;
            }
            let end = begun.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            let lines: Vec<u8> = begun.drain(..end).collect();
            let longest = String::from_utf8_lossy(&lines).lines().filter_map(stuck_for).max();
            if let Some(longest) = longest.filter(|longest| *longest >= patience::scaled(LONGEST)) {
                tell_at_once(&format!(
                    "a processor of the test host `{name}` has stood still for {longest:.0?}: its emulator is ended"
                ));
                let _ = process.signal(libc::SIGKILL);
                return;
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn the_watchdog_s_word_is_read() {
        let line = "[  493.225424] watchdog: BUG: soft lockup - CPU#0 stuck for 49s! [vcpu0:269]";
        assert_eq!(stuck_for(line), Some(Duration::from_secs(49)));
        for other in ["", "[    1.0] CPU#0 stuck", "BUG: soft lockup - CPU#1 stuck for s!", "rcu: INFO: stall on CPU 1"]
        {
            assert_eq!(stuck_for(other), None, "{other}");
        }
    }

    #[test]
    fn an_emulator_whose_processor_stands_still_is_ended_and_one_that_was_late_is_not() {
        let mut console = tempfile::NamedTempFile::new().unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let watch = on(child.id(), "x", console.path()).unwrap();
        writeln!(console, "watchdog: BUG: soft lockup - CPU#0 stuck for 23s! [a:1]").unwrap();
        std::thread::sleep(2 * LOOK);
        assert!(child.try_wait().unwrap().is_none());
        write!(console, "watchdog: BUG: soft lockup - CPU#0 stuck for 9").unwrap();
        std::thread::sleep(2 * LOOK);
        assert!(child.try_wait().unwrap().is_none(), "half a line");
        writeln!(console, "99999s! [a:1]").unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        drop(watch);
    }
}
