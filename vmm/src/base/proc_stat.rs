//! What the kernel says of a process or thread in `/proc/PID/stat` (`proc_pid_stat(5)`), as far as Umbra asks.

use std::fs;
use std::path::Path;

/// The beginning of a `stat` file, behind the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcStat {
    /// `R` running or ready, `S` sleeping, `D` waiting in the kernel, `T` stopped by a signal, `t` by a debugger, `Z` ended and not
    /// waited for, `X` gone.
    pub state: char,
    /// The parent's number.
    pub parent: u32,
}

impl ProcStat {
    /// Of the process or thread in `folder` (`/proc/PID`, `/proc/PID/task/TID`). `None`: there is none.
    pub fn read(folder: impl AsRef<Path>) -> Option<Self> {
        Self::parse(&fs::read_to_string(folder.as_ref().join("stat")).ok()?)
    }

    /// "PID (NAME) STATE PARENT ...", and the name may hold anything.
    fn parse(stat: &str) -> Option<Self> {
        let (_, behind_name) = stat.rsplit_once(')')?;
        let mut fields = behind_name.split_whitespace();
        Some(Self { state: fields.next()?.chars().next()?, parent: fields.next()?.parse().ok()? })
    }

    /// A signal or a debugger keeps it from running.
    pub fn is_stopped(self) -> bool {
        matches!(self.state, 'T' | 't')
    }

    /// It does and holds nothing any more.
    pub fn has_ended(self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let of = |text: &str| ProcStat::parse(text).map(|stat| (stat.state, stat.parent));
        assert_eq!(of("17 (vcpu (0)) R 1 1\n"), Some(('R', 1)));
        assert_eq!(of("17 (a) T 5 (b) Z 9 17 17"), Some(('Z', 9)));
        for broken in ["", "17", "17 (name", "17 (name) ", "17 (name) S", "17 (name) S x"] {
            assert_eq!(of(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn a_process_that_is_stopped_is_known_from_one_that_sleeps_and_one_that_has_ended() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let folder = format!("/proc/{}", child.id());
        let until = |wanted: fn(ProcStat) -> bool| {
            let begin = Instant::now();
            while !wanted(ProcStat::read(&folder).unwrap()) {
                assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", ProcStat::read(&folder));
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let pid = Pid::from_raw(child.id().cast_signed());
        assert_eq!(ProcStat::read(&folder).unwrap().parent, std::process::id());
        assert!(!ProcStat::read(&folder).unwrap().is_stopped());
        kill(pid, Signal::SIGSTOP).unwrap();
        until(ProcStat::is_stopped);
        kill(pid, Signal::SIGKILL).unwrap();
        until(ProcStat::has_ended);
        child.wait().unwrap();
        assert_eq!(ProcStat::read(&folder), None);
    }
}
